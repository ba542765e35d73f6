"""The promise on one machine: a run that loses a node and has a worker frozen ends with the same bits as one left alone.

Starts an S3 server and a Ray cluster of logical nodes, prepares the Python standard library's own source as text, and
trains twice: once while a node is killed, another one added and a worker frozen, once undisturbed. Prints what each fault cost
and compares the sha256 of the final states. Exit code 0 when they are identical, 1 when not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUCKET = "elastic-lm-demo"
START_S = 60.0
NUM_DISTURBANCES = 3
REPORT = Path("build", "demo-report.html")


def main() -> int:
    arguments = _parse()
    with s3_server() as endpoint:
        print(f"S3 server for the demo at {endpoint}, bucket {BUCKET}.")
        from elastic_lm.runtime.cluster import LocalCluster

        print("Starting a Ray cluster: a head and 3 nodes of one CPU each ...", flush=True)
        with LocalCluster(3) as cluster:
            _prepare(arguments)
            print("\n— Run 1: disturbed —", flush=True)
            disturber = Disturber(cluster, arguments.steps)
            disturbed, disturbed_s = _train("disturbed", arguments, disturber)
            print("\n— Run 2: undisturbed —", flush=True)
            undisturbed, undisturbed_s = _train("undisturbed", arguments, None)
        return _report(disturber, (disturbed, disturbed_s), (undisturbed, undisturbed_s))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="optimizer updates of each run (default: 60)")
    parser.add_argument("--preset", default="mini", help="model preset (default: mini)")
    return parser.parse_args()


# -- the parts -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """moto's S3 server in a process of its own on a free port, with the bucket made. Sets the standard AWS variables."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    os.environ.update(
        AWS_ENDPOINT_URL=endpoint,
        AWS_ACCESS_KEY_ID="demo",
        AWS_SECRET_ACCESS_KEY="demo",
        AWS_DEFAULT_REGION="us-east-1",
    )
    try:
        _make_bucket(port)
        yield endpoint
    finally:
        process.terminate()
        process.wait(10)


def _make_bucket(port: int) -> None:
    import s3fs

    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            break
        if time.monotonic() > deadline:
            raise TimeoutError(f"the S3 server did not open port {port} within {START_S:.0f} s")
        time.sleep(0.1)
    s3fs.S3FileSystem().mkdir(BUCKET)


def _prepare(arguments: argparse.Namespace) -> None:
    from elastic_lm.data.prepare import PrepareOptions
    from elastic_lm.runtime.fan_out import prepare
    from elastic_lm.storage import Storage

    source = os.path.join(sysconfig.get_paths()["stdlib"], "*.py")
    began = time.monotonic()
    out = Storage.open(f"s3://{BUCKET}/tokens")
    manifest = prepare([source], out, PrepareOptions(vocab_size=2048, held_out=0.03))
    print(f"Prepared {manifest.num_tokens:,} tokens of {source} in {time.monotonic() - began:.1f} s.", flush=True)


def _config(name: str, arguments: argparse.Namespace) -> Any:
    from elastic_lm import RunConfig

    return RunConfig(
        name=name,
        storage=f"s3://{BUCKET}",
        data={"tokens": f"s3://{BUCKET}/tokens"},
        model={"preset": arguments.preset},
        batch={"micro_batches": 12, "micro_batch_size": 4, "sequence_length": 128},
        training={"steps": arguments.steps},
        optimizer={"learning_rate": 2e-3},
        schedule={"warmup_steps": 10},
        checkpoint={"every_steps": 20},
        evaluation={"every": arguments.steps, "samples": 64},
        workers={"min": 3, "max": 3},
    )


def _train(name: str, arguments: argparse.Namespace, disturber: Disturber | None) -> tuple[Any, float]:
    """Train in a thread; the main thread breaks things meanwhile (only it may start nodes)."""
    from elastic_lm import fit

    config = _config(name, arguments)
    with ThreadPoolExecutor(1) as trainer:
        began = time.monotonic()
        future = trainer.submit(fit, config, on_line=lambda line: print(f"  {line}", flush=True))
        if disturber is not None:
            disturber.disturb(name, future)
        return future.result(), time.monotonic() - began


@dataclass
class Injected:
    """A fault, or a node that came: when, and how many workers should be at work again afterwards."""

    what: str
    at: float  # unix time
    world_size: int


class Watch:
    """Looks at a run that trains."""

    def __init__(self, run: str, training: Future[Any]) -> None:
        self._run, self._training = run, training

    def until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
        """The first status that meets the condition; None when the run has ended before."""
        import ray

        from elastic_lm.runtime.mailbox import find_mailbox

        while not self._training.done():
            with contextlib.suppress(ValueError, ray.exceptions.RayError):
                status = ray.get(find_mailbox(self._run).status.remote(), timeout=5)
                if status and condition(status):
                    return dict(status)
            time.sleep(0.05)
        return None


class Disturber:
    """Kills a node, adds one, freezes a worker, each at a chosen step; remembers when."""

    def __init__(self, cluster: Any, steps: int) -> None:
        self._cluster, self._steps = cluster, steps
        self.done: list[Injected] = []

    def disturb(self, run: str, training: Future[Any]) -> None:
        for step, disturbance in ((self._steps // 4, self._kill_node), (self._steps // 2, self._freeze_worker)):
            watch = Watch(run, training)
            status = watch.until(lambda s, step=step: s["step"] >= step and s["world_size"] == s["max_workers"])
            if status is None:
                return
            disturbance(status, watch)

    def _kill_node(self, status: dict[str, Any], watch: Watch) -> None:
        used = {member["node_id"] for member in status["members"].values()}
        node = next(node for node in self._cluster.nodes if node.node_id in used)
        self._tell("node killed", status, f"node {node.node_id[:8]}, everything on it gets SIGKILL", -1)
        node.kill()
        # A node that starts takes this machine's cores for a second; one that replaces another has its own.
        watch.until(lambda s: s["world_size"] < status["world_size"])
        self._cluster.add_node()
        self._tell("node added", status, "a new node is up", 0)

    def _freeze_worker(self, status: dict[str, Any], watch: Watch) -> None:
        member_id, member = sorted(status["members"].items())[-1]
        self._tell("worker frozen", status, f"{member_id}, process {member['pid']}, gets SIGSTOP", -1)
        os.kill(member["pid"], signal.SIGSTOP)

    def _tell(self, what: str, status: dict[str, Any], detail: str, change: int) -> None:
        self.done.append(Injected(what, time.time(), status["world_size"] + change))
        print(f"  >>> {what}: {detail}", flush=True)


# -- the report ------------------------------------------------------------------------------------------------------


def _report(disturber: Disturber, disturbed: tuple[Any, float], undisturbed: tuple[Any, float]) -> int:
    from elastic_lm.events.log import read
    from elastic_lm.events.types import EventKind
    from elastic_lm.monitor.report import render
    from elastic_lm.storage import Storage

    events = list(read(Storage.open(f"s3://{BUCKET}/runs/disturbed/events")))
    resumptions = [event for event in events if event.kind is EventKind.REFORMED]
    print("\n— What it cost —")
    for injected in disturber.done:
        print(f"  {injected.what:15} {_cost(injected, resumptions)}")
    if len(disturber.done) < NUM_DISTURBANCES:
        print("  NOT everything was done to the run: it was too short.")
    for name, (result, seconds) in (("disturbed", disturbed), ("undisturbed", undisturbed)):
        figures = result.metrics
        rate = figures.get("tokens_per_s")
        print(f"\n— {name} — {result.verdict} at step {result.last_step} in {seconds:.0f} s")
        losses = (("loss", figures.get("loss")), ("held out", figures.get("held_out_loss")))
        told = ", ".join(f"{what} {loss:.6f}" for what, loss in losses if loss is not None)
        print(f"  {told}   {rate:,.0f} tokens/s" if rate else "  no figures")
        print(f"  weights {result.digest.get('weights')}\n  state   {result.digest.get('state')}")
    whole = (
        all(result.ok and result.digest for result, _ in (disturbed, undisturbed))
        and len(disturber.done) == NUM_DISTURBANCES
    )
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(render("disturbed", events))
    print(f"\nThe disturbed run as a page to look at: {REPORT}")
    measured = {result.metrics.get("held_out_loss") for result, _ in (disturbed, undisturbed)}
    identical = whole and disturbed[0].digest == undisturbed[0].digest and len(measured) == 1
    print(f"\nfinal state and held-out loss identical: {'yes' if identical else 'no'}")
    return 0 if identical else 1


def _cost(injected: Injected, resumptions: list[Any]) -> str:
    """From the injection until that many workers were at work, and how long nobody was."""
    later = (e for e in resumptions if e.time_s > injected.at and e.fields["world_size"] == injected.world_size)
    again = next(later, None)
    if again is None:
        return "not made up for before the end"
    return (
        f"{injected.world_size} workers at work after {again.time_s - injected.at:.2f} s "
        f"(nobody for {again.fields['lost_s']:.2f} s of it); no step lost, none repeated"
    )


if __name__ == "__main__":
    sys.exit(main())
