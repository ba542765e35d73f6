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
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

BUCKET = "elastic-lm-demo"
START_S = 60.0


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
    manifest = prepare([source], out, PrepareOptions(vocab_size=2048))
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
        workers={"min": 3, "max": 3},
    )


def _train(name: str, arguments: argparse.Namespace, disturber: Disturber | None) -> tuple[Any, float]:
    from elastic_lm import fit

    if disturber is not None:
        disturber.watch(name)
    began = time.monotonic()
    try:
        result = fit(_config(name, arguments), on_line=lambda line: print(f"  {line}", flush=True))
    finally:
        if disturber is not None:
            disturber.stop()
    return result, time.monotonic() - began


class Disturber:
    """Kills a node, adds one, freezes a worker, each at a chosen step; remembers when."""

    def __init__(self, cluster: Any, steps: int) -> None:
        self._cluster = cluster
        self._plan: list[tuple[int, str, Callable[[dict[str, Any]], str]]] = [
            (steps // 4, "node killed", self._kill_node),
            (steps // 2, "worker frozen", self._freeze_worker),
        ]
        self.done: list[tuple[str, float]] = []  # what, unix time
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, run: str) -> None:
        self._thread = threading.Thread(target=self._run, args=(run,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(30)

    def _run(self, run: str) -> None:
        for step, what, do in self._plan:
            status = self._await_step(run, step)
            if status is None:
                return
            self.done.append((what, time.time()))
            print(f"  >>> step {status['step']}: {do(status)}", flush=True)
            if what == "node killed":
                self._cluster.add_node()
                print("  >>> a new node is up", flush=True)

    def _await_step(self, run: str, step: int) -> dict[str, Any] | None:
        """The run's status once it has committed `step` steps with every worker at work; None when stopped."""
        import ray

        from elastic_lm.runtime.mailbox import find_mailbox

        while not self._stop.wait(0.05):
            with contextlib.suppress(ValueError, ray.exceptions.RayError):
                status = ray.get(find_mailbox(run).status.remote(), timeout=5)
                if status.get("step", 0) >= step and status["world_size"] == status["max_workers"]:
                    return dict(status)
        return None

    def _kill_node(self, status: dict[str, Any]) -> str:
        used = {member["node_id"] for member in status["members"].values()}
        node = next(node for node in self._cluster.nodes if node.node_id in used)
        node.kill()
        return f"killed node {node.node_id[:8]} with everything on it (SIGKILL)"

    def _freeze_worker(self, status: dict[str, Any]) -> str:
        member_id, member = sorted(status["members"].items())[-1]
        os.kill(member["pid"], signal.SIGSTOP)
        return f"froze {member_id}, process {member['pid']} (SIGSTOP)"


# -- the report ------------------------------------------------------------------------------------------------------


def _report(disturber: Disturber, disturbed: tuple[Any, float], undisturbed: tuple[Any, float]) -> int:
    from elastic_lm.events.log import read
    from elastic_lm.events.types import EventKind
    from elastic_lm.storage import Storage

    events = list(read(Storage.open(f"s3://{BUCKET}/runs/disturbed/events")))
    print("\n— What the faults cost —")
    for what, at in disturber.done:
        again = next((e for e in events if e.kind is EventKind.REFORMED and e.time_s > at), None)
        cost = (
            f"training again after {again.time_s - at:.2f} s ({again.fields['world_size']} workers)" if again else "?"
        )
        print(f"  {what:15} {cost}")
    if len(disturber.done) < 2:
        print("  NOT every fault was injected: the run was too short.")
    for name, (result, seconds) in (("disturbed", disturbed), ("undisturbed", undisturbed)):
        figures = result.metrics
        rate = figures.get("tokens_per_s")
        print(f"\n— {name} — {result.verdict} at step {result.last_step} in {seconds:.0f} s")
        print(f"  loss {figures.get('loss', float('nan')):.6f}   {rate:,.0f} tokens/s" if rate else "  no figures")
        print(f"  weights {result.digest.get('weights')}\n  state   {result.digest.get('state')}")
    whole = all(result.ok and result.digest for result, _ in (disturbed, undisturbed)) and len(disturber.done) == 2
    identical = whole and disturbed[0].digest == undisturbed[0].digest
    print(f"\nfinal state identical: {'yes' if identical else 'no'}")
    return 0 if identical else 1


if __name__ == "__main__":
    sys.exit(main())
