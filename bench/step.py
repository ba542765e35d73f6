"""Tokens per second of a step: the engine against the loop that most people would write, side by side in time slices.

All sides are alive from the start; in turn each runs for a few seconds while the others are stopped (SIGSTOP), so that a
machine whose speed drifts is the same machine for all of them. Only steps that lie wholly inside a slice count. Needs torch
and nothing else; on a machine with a GPU, for example

python bench/step.py --device cuda --preset gpt2 --precision bf16 --vocab-size 50304 --sequence-length 1024 \\
    --micro-batches 8 --micro-batch-size 16

All sides' memory is held at once: where that does not fit, give fewer `--sides`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import common
from process_tree import signal_tree
from workload import Workload

WARM_UP_STEPS = 3
START_S = 300.0  # one that compiles takes a minute

PLAIN = ["bench/rivals/ddp.py"]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PAIR, SINGLE = ["bench/members.py"], ["bench/members.py", "--world-size", "1"]
# What each side is called, and what runs it. The first of the chosen ones with as many processes is what the others are
# measured by.
SIDES = {
    "ddp": ("torchrun DDP, 2 processes", [*TWO, *PLAIN]),
    "exact2": ("elastic, exact, 2 members", PAIR),
    "gloo2": ("elastic, exact, 2 members, gloo", [*PAIR, "--collectives", "gloo"]),
    "fast2": ("elastic, fast, 2 members", [*PAIR, "--reduction", "fast"]),
    "plain": ("plain loop, 1 process", PLAIN),
    "exact": ("elastic, exact, 1 member", SINGLE),
    "fast": ("elastic, fast, 1 member", [*SINGLE, "--reduction", "fast"]),
    "plain-compiled": ("plain loop, 1 process, compiled", [*PLAIN, "--compile"]),
    "exact-compiled": ("elastic, exact, 1 member, compiled", [*SINGLE, "--compile"]),
    "fast-compiled": ("elastic, fast, 1 member, compiled", [*SINGLE, "--reduction", "fast", "--compile"]),
    "recompute": ("elastic, exact, 1 member, recompute", [*SINGLE, "--recompute"]),
}
CHOSEN = {
    "cpu": ["ddp", "exact2", "gloo2", "fast2", "plain", "exact", "fast"],
    "cuda": ["plain", "exact", "fast", "plain-compiled", "exact-compiled", "fast-compiled"],
}


class Side:
    """One way to do the work: its processes, stopped unless it is their turn."""

    def __init__(self, name: str, command: list[str], output: IO[str]) -> None:
        self.name = name
        self._path = Path(output.name)
        folder = str(self._path.parent)  # torchrun, ended by SIGKILL, leaves its own temporary files behind
        environment = {**common.ENVIRONMENT, "TMPDIR": folder}
        self._process = subprocess.Popen(command, env=environment, stdout=output, cwd=common.HERE.parent)
        self.slices: list[list[dict[str, Any]]] = []
        deadline = time.monotonic() + START_S
        while len(self.steps()) < WARM_UP_STEPS:
            if self._process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{name}: {' '.join(command)} did no step within {START_S:.0f} s")
            time.sleep(0.1)
        signal_tree(self._process.pid, signal.SIGSTOP)

    def steps(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._path.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def run(self, seconds: float) -> float:
        """Let it work for a slice.    Returns: the median of its whole steps there, in seconds."""
        began = time.monotonic()
        signal_tree(self._process.pid, signal.SIGCONT)
        time.sleep(seconds)
        signal_tree(self._process.pid, signal.SIGSTOP)
        whole = [step for step in self.steps() if step["began"] > began]
        if not whole:
            sys.exit(f"{self.name}: no whole step in a slice of {seconds} s; give a longer one")
        self.slices.append(whole)
        return statistics.median(step["ended"] - step["began"] for step in whole)

    def peak_bytes(self) -> int:
        """That rank 0 had at most."""
        return max(step["peak_bytes"] for step in self.steps())

    def end(self) -> None:
        signal_tree(self._process.pid, signal.SIGKILL)
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--slice", type=float, default=9.0, help="seconds that a side runs at a time")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="all that make sense on the device, unless given")
    Workload.add_to(parser)
    arguments = parser.parse_args()
    workload = Workload.of(arguments)
    chosen = arguments.sides or CHOSEN[workload.device.partition(":")[0]]
    commands = {name: [sys.executable, *command, *workload.options()] for name, command in map(SIDES.get, chosen)}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        sides = []
        for name, command in commands.items():
            output = stack.enter_context(tempfile.NamedTemporaryFile("w", suffix=".jsonl", dir=folder))
            sides.append(Side(name, command, output))
            stack.callback(sides[-1].end)
        step_s: dict[str, list[float]] = {side.name: [] for side in sides}
        for number in range(arguments.rounds):
            for side in sides:
                step_s[side.name].append(side.run(arguments.slice))
            told = ", ".join(f"{name}: {seconds[-1]:.2f} s" for name, seconds in step_s.items())
            print(f"round {number + 1}: {told}", file=sys.stderr, flush=True)
        report(sides, step_s, workload)


def report(sides: list[Side], step_s: dict[str, list[float]], workload: Workload) -> None:
    rounds, batch = len(next(iter(step_s.values()))), workload.tokens_per_step
    print(f"{common.machine()}; {' '.join(workload.options())}: {batch} tokens per step, {rounds} rounds\n")
    peak = workload.peak_flops()
    rows = []
    for side in sides:
        rival = next(other.name for other in sides if (" 1 " in other.name) == (" 1 " in side.name))
        ratios = [theirs / mine for mine, theirs in zip(step_s[side.name], step_s[rival], strict=True)]
        rates = [batch / seconds for seconds in step_s[side.name]]
        flops = workload.flops_per_s(statistics.median(rates))
        mfu = "-" if peak is None else f"{100 * flops / peak:.1f} %"
        told = [common.spread(rates, 0), common.spread(ratios, 3), f"{flops / 1e12:.3g}", mfu]
        rows.append([side.name, *told, f"{side.peak_bytes() / 1e6:,.0f}", _parts(side)])
    head = ["side", "tokens/s", "ratio in the round", "model TFLOP/s", "MFU", "peak MB", "rank 0's step"]
    print("\n".join(common.table(head, rows)))
    _compare_losses([side for side in sides if "exact" in side.name and "compiled" not in side.name])


def _parts(side: Side) -> str:
    steps = [step["parts"] for steps in side.slices for step in steps if "parts" in step]
    names = steps[0] if steps else []
    return ", ".join(f"{n.removesuffix('_s')} {1e3 * statistics.median(s[n] for s in steps):.0f} ms" for n in names)


def _compare_losses(sides: list[Side]) -> None:
    """Exact sums: the same losses, to the bit, whatever the number of members."""
    if len(sides) < 2:
        return
    losses = [{step["step"]: step["loss"] for step in side.steps()} for side in sides]
    common_steps = set.intersection(*map(set, losses))
    different = [step for step in common_steps if len({of[step] for of in losses}) > 1]
    names = ", ".join(side.name.removeprefix("elastic, exact, ") for side in sides)
    print(f"\nexact, {names}: {len(common_steps)} losses compared, {len(different)} differ")
    if different:
        sys.exit("the bits differ")


if __name__ == "__main__":
    main()
