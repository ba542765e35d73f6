"""What a checkpoint costs those who train, and how fast a share is uploaded against a plain put of the same bytes.

Runs of two workers of the 10.6M model on a local cluster, through Ray Train as in production, by turns with and without
checkpoints, to `file://`. The stall is what the event log tells: from the end of the lease at the checkpoint to the first
work after it. The cost counts everything else too (the upload beside training): time per step with checkpoints by that
without.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import common
import torch
from reform import make_config, prepare_corpus
from workload import DEFAULT

from elastic_lm import fit
from elastic_lm.checkpoint import store
from elastic_lm.config import RunConfig
from elastic_lm.engine.state import ReplicaState
from elastic_lm.events.log import read
from elastic_lm.events.types import EventKind
from elastic_lm.model.transformer import GPT
from elastic_lm.runtime.cluster import LocalCluster
from elastic_lm.storage import Storage

WORKERS = 2
WARM_UP_STEPS = 3  # of each run, left out


@dataclass
class Measured:
    """Of one kind of run, over all rounds. Seconds."""

    step_s: list[float] = field(default_factory=list)  # mean per run, stalls included
    stalls_s: list[float] = field(default_factory=list)
    saves_s: list[float] = field(default_factory=list)


def train(config: RunConfig, measured: Measured) -> None:
    fit(config, quiet=True)
    events = list(read(Storage.open(config.run_url).child("events")))
    steps = [e for e in events if e.kind is EventKind.STEP_COMMITTED and (e.step or 0) >= WARM_UP_STEPS]
    stalls = [
        e.fields["lost_s"]
        for e in events
        if e.kind is EventKind.REFORMED and e.fields["cause"] in ("lease", "checkpoint")
    ]
    measured.stalls_s += stalls
    measured.saves_s += [e.fields["seconds"] for e in events if e.kind is EventKind.CHECKPOINT_SAVED]
    measured.step_s.append((sum(e.fields["step_s"] for e in steps) + sum(stalls)) / len(steps))


def runs(folder: Path, every: int, steps: int, rounds: int) -> tuple[Measured, Measured]:
    """(with, without) checkpoints."""
    tokens = prepare_corpus(folder)
    base = make_config(folder, tokens, WORKERS).replace(f"training.steps={steps}", f"workers.min={WORKERS}")
    saving, plain = Measured(), Measured()
    with LocalCluster(WORKERS):
        for number in range(rounds):
            train(base.replace(f"name=plain-{number}"), plain)
            train(base.replace(f"name=saving-{number}", f"checkpoint.every_steps={every}"), saving)
    return saving, plain


def uploads(rounds: int) -> Iterator[tuple[float, float]]:
    """(s3fs's, ours): MB/s of one put of the same bytes, hashing and serialising included in ours."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request else
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench",
            "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
        boto3.client("s3").create_bucket(Bucket="bench-bucket")
        state = ReplicaState(GPT(DEFAULT.model))
        tensors = {name: tensor.clone() for name, tensor in state.tensors().items()}
        for tensor in tensors.values():
            torch.nn.init.normal_(tensor)
        num_bytes = sum(tensor.numel() * 4 for tensor in tensors.values())
        bare = s3fs.S3FileSystem()
        data = os.urandom(num_bytes)
        for number in range(rounds):
            began = time.perf_counter()
            bare.pipe_file(f"bench-bucket/bare-{number}", data)
            middle = time.perf_counter()
            store.save_share(Storage.open("s3://bench-bucket/run"), number, tensors)
            yield num_bytes / 1e6 / (middle - began), num_bytes / 1e6 / (time.perf_counter() - middle)
    finally:
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--steps", type=int, default=43)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--upload-rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{common.machine()}; a checkpoint every {arguments.every} steps\n")
    with tempfile.TemporaryDirectory() as folder:
        saving, plain = runs(Path(folder), arguments.every, arguments.steps, arguments.rounds)
    costs = [100 * (with_ / without - 1) for with_, without in zip(saving.step_s, plain.step_s, strict=True)]
    rows = [
        ("stall per checkpoint, ms", common.spread([1e3 * s for s in saving.stalls_s], 0)),
        ("95 % of them at most, ms", f"{1e3 * common.percentile(saving.stalls_s, 0.95):.0f} of {len(saving.stalls_s)}"),
        ("from copy to manifest, s", common.spread(saving.saves_s)),
        ("s per step without", common.spread(plain.step_s, 3)),
        ("s per step with", common.spread(saving.step_s, 3)),
        (f"cost, every {arguments.every} steps, %", common.spread(costs)),
        ("the same, every 20 steps, %", common.spread([cost * arguments.every / 20 for cost in costs])),
    ]
    print("\n".join(common.table(("what", "median (least - most)"), rows)))
    speeds = list(uploads(arguments.upload_rounds))
    bare, ours = ([speed[side] for speed in speeds] for side in (0, 1))
    ratios = [share / put for put, share in speeds]
    print(
        f"\nupload: s3fs {common.spread(bare, 0)} MB/s, a share {common.spread(ours, 0)} MB/s, ratio {common.spread(ratios)}"
    )


if __name__ == "__main__":
    main()
