"""The same work on what a user would pick instead: tokens/s, what a worker's SIGKILL costs, what one more worker costs.

Every rival begins with one worker, gets a second one, and loses one of the two to SIGKILL, as often as `--repeats` says;
each time from its start. Ours runs as in production, through Ray Train on a local cluster, as `reform.py` does it.
A stall is the time from the kill to the first optimizer step beyond the last one that was complete before it; whatever a
system does meanwhile (wait, start again, repeat steps from a checkpoint, compute a step that it then discards) is in it.

Systems may be measured one at a time: with `--results FILE` the table is made of all that the file has gathered. Repeat a
system on a machine that does nothing else; those who are to be compared, soon after each other.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import common
from jobs import MAX_WORKERS, Job, RayTrainJob, TorchftJob, TorchrunJob
from reform import Injector, make_config, prepare_corpus
from timeline import Done, Timeline
from trial import STEADY_STEPS, Figures, System, Trial, join_values
from workload import DEFAULT

from elastic_lm import fit
from elastic_lm.events.log import read
from elastic_lm.events.types import Event, EventKind
from elastic_lm.runtime.cluster import LocalCluster
from elastic_lm.storage import Storage

OURS = "elastic-lm, exact sums"


def measure_ours(name: str, repeats: int, seed: int) -> Iterator[Figures]:
    """Kills of workers, and nodes that die and are replaced, in one run of two workers."""
    with tempfile.TemporaryDirectory() as folder, LocalCluster(MAX_WORKERS) as cluster, ThreadPoolExecutor(1) as pool:
        config = make_config(Path(folder), prepare_corpus(Path(folder)), MAX_WORKERS)
        config = config.replace(f"checkpoint.every_steps={common.CHECKPOINT_STEPS}")
        training = pool.submit(fit, config, on_line=lambda line: print(f"  {line}", file=sys.stderr))
        injector = Injector(cluster, training, seed, MAX_WORKERS)
        for _ in range(repeats):
            injector.steady(STEADY_STEPS)
            injector.inject("kill")
            injector.inject("node")
        injector.stop()
        training.result()
        events = list(read(Storage.open(config.run_url).child("events")))
    timeline = timeline_of(events)
    reformed = {i: next(e for e in events if e.kind is EventKind.REFORMED and e.time_s > i.at) for i in injector.done}
    for seconds in timeline.stretches(MAX_WORKERS):
        yield Figures(name, "rate", {"tokens_per_s": DEFAULT.tokens_per_step / seconds})
    for injection, event in reformed.items():
        if injection.what == "kill":
            # A step that was complete when its worker died may be logged a moment later: it is not taken for the next one.
            beyond = timeline.beyond(event.time_s)
            stall_s = beyond.ended - injection.at
            values = {
                "stall_s": stall_s,
                "again_s": stall_s,
                "beyond_work_s": stall_s - timeline.usual(beyond.world_size),
            }
            # The log has every step once, whatever was computed twice: where the survivors went on says how many that were.
            values["repeated"] = max(0, timeline.newest(event.time_s) + 1 - event.step)
            yield Figures(name, "kill", {**values, "lost": 0})
        if injection.what == "node added":
            # The step under way then is one that the dead node holds up.
            calm = timeline.beyond(injection.at).ended
            yield Figures(name, "join", join_values(timeline, injection.at, calm))


def timeline_of(events: Sequence[Event]) -> Timeline:
    """By the event log's clock."""
    return Timeline(
        Done(event.step, event.time_s - event.fields["step_s"], event.time_s, event.fields["world_size"])
        for event in events
        if event.kind is EventKind.STEP_COMMITTED
    )


def versions(torchft_python: Path | None) -> str:
    """Of what is compared."""
    told = [f"{name} {version(name)}" for name in ("torch", "ray")]
    if torchft_python is not None:
        script = (
            "from importlib.metadata import version; print('torchft', version('torchft'), 'on torch', version('torch'))"
        )
        told.append(subprocess.run([torchft_python, "-c", script], capture_output=True, text=True, check=True).stdout)
    return ", ".join(told).strip()


def rivals(torchft_python: Path | None) -> dict[str, System]:
    """By the word that selects it."""
    found = {
        "plain": System("plain loop, 1 process", lambda n: Job(n)),
        "plain2": System("plain loop, 1 process of 2 threads", lambda n: Job(n, threads=2)),
        "torchrun": System("torchrun DDP, elastic restarts", lambda n: TorchrunJob(n)),
        "ray": System("Ray Train, elastic", lambda n: RayTrainJob(n)),
    }
    if (python := torchft_python) is not None:
        found["torchft"] = System("torchft, heartbeat timeout 5 s", lambda n: TorchftJob(n, python))
        found["torchft1"] = System("torchft, heartbeat timeout 1 s", lambda n: TorchftJob(n, python, 1000))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words = [*rivals(Path()), "ours"]
    parser.add_argument("--systems", nargs="*", choices=words, default=words, help="none: the table of --results alone")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=90.0, help="seconds after which a stall counts as a hang")
    parser.add_argument("--into-interval", type=int, default=common.CHECKPOINT_STEPS // 2,
                        help="steps after a checkpoint at which a worker is killed")  # fmt: skip
    parser.add_argument("--torchft-python", type=Path, help="of an environment with bench/rivals/requirements.txt")
    parser.add_argument("--results", type=Path, help="add to this file, and print all that it holds")
    arguments = parser.parse_args()
    known = rivals(arguments.torchft_python)
    gathered = read_figures(arguments.results)
    draw = random.Random(arguments.seed)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # every job is ended on the way out
    for word in arguments.systems:
        if word == "ours":
            measured = measure_ours(OURS, arguments.repeats, arguments.seed)
        elif word in known:
            trial = Trial(known[word], draw, arguments.limit, arguments.into_interval)
            measured = (figures for _ in range(arguments.repeats) for figures in trial.measure())
        else:
            print(f"{word} is left out: --torchft-python names no environment that has it", file=sys.stderr)
            continue
        for figures in measured:
            print(figures, file=sys.stderr, flush=True)
            gathered.append(figures)
            if arguments.results is not None:
                with arguments.results.open("a") as file:
                    print(json.dumps(asdict(figures)), file=file)
    report(gathered, versions(arguments.torchft_python))


def read_figures(path: Path | None) -> list[Figures]:
    if path is None or not path.exists():
        return []
    return [Figures(**json.loads(line)) for line in path.read_text().splitlines()]


def report(gathered: Sequence[Figures], told_versions: str) -> None:
    print(f"{common.machine()}; {told_versions}; {DEFAULT.tokens_per_step} tokens per step\n")
    names = [system.name for system in rivals(Path()).values()] + [OURS]
    rows = [row(name, [figures for figures in gathered if figures.system == name]) for name in names]
    head = ["system", "tokens/s", "kill: stall, s", "until any step is done, s", "stall beyond that step's work, s",
            "steps repeated", "batches lost", "join: contributes after, s", "others' stall, s",
            "steps repeated"]  # fmt: skip
    print("\n".join(common.table(head, [row for row in rows if any(cell != "-" for cell in row[1:])])))
    for figures in gathered:
        if figures.what == "run":
            print(f"\n{figures.system}, a run without further figures: {figures.failure}")


def row(name: str, gathered: Sequence[Figures]) -> list[str]:
    kills, joins = ([f for f in gathered if f.what == what] for what in ("kill", "join"))
    return [
        name,
        cell([f for f in gathered if f.what == "rate"], "tokens_per_s", 0),
        cell(kills, "stall_s", 1, told=True),
        cell(kills, "again_s", 1),
        cell(kills, "beyond_work_s", 1),
        cell(kills, "repeated", 0),
        cell(kills, "lost", 0),
        cell(joins, "contributes_s", 1, told=True),
        cell(joins, "stall_s", 1),
        cell(joins, "repeated", 0),
    ]


def cell(gathered: Sequence[Figures], value: str, digits: int, told: bool = False) -> str:
    """Median and spread, of how many; and, where it is `told`, why others have no value."""
    values = [figures.values[value] for figures in gathered if value in figures.values]
    parts = []
    if values:
        median = common.spread(values, digits) if len(values) > 1 else f"{values[0]:.{digits}f}"
        parts.append(f"{median}, n={len(values)}")
    if told:
        failures = Counter(figures.failure for figures in gathered if figures.failure)
        parts += [f"{failure}: {count} of {len(gathered)}" for failure, count in failures.items()]
    return "; ".join(parts) or "-"


if __name__ == "__main__":
    main()
