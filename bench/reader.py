"""The data path: tokens per second through one reader actor, against a bare s3fs read of the same bytes from the same server.

Give the server by AWS_ENDPOINT_URL and keys by the standard variables (docs: bench/README.md says which one the published
figures used); without one, an embedded server is started, which is slow itself. Both sides alternate; reported are medians
and spread over the rounds, and the time to a first batch from a cold and from a warm reader.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import common
import numpy as np

from elastic_lm.data.manifest import Manifest
from elastic_lm.data.order import Order
from elastic_lm.data.shards import ShardWriter
from elastic_lm.data.windows import RANGES_IN_FLIGHT
from elastic_lm.runtime import cluster
from elastic_lm.runtime.reader import start_reader
from elastic_lm.runtime.window_client import WindowClient
from elastic_lm.storage import Storage

BUCKET = "elastic-lm-bench"
VOCAB_SIZE = 50_000
BLOCK_TOKENS = 2**21 + 1  # 4 MiB of uint16
MICRO_BATCH_SIZE, LENGTH = 8, 1024


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The address of an S3 server: the one in the environment, or an embedded one."""
    if "AWS_ENDPOINT_URL" in os.environ:
        yield os.environ["AWS_ENDPOINT_URL"]
        return
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    os.environ.update(AWS_ENDPOINT_URL=f"http://{host}:{port}", AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x")
    yield f"{os.environ['AWS_ENDPOINT_URL']} (moto)"
    moto.stop()


def make_corpus(storage: Storage, num_tokens: int) -> Manifest:
    """Random ids, in the format of a prepared corpus."""
    draw = np.random.default_rng(0)
    writer = ShardWriter(storage, "train", "uint16", BLOCK_TOKENS)
    for start in range(0, num_tokens, BLOCK_TOKENS):
        writer.add(draw.integers(0, VOCAB_SIZE, min(BLOCK_TOKENS, num_tokens - start), dtype=np.uint16))
    special = {name: number for number, name in enumerate(("pad", "cls", "sep", "mask", "end_of_text"))}
    return Manifest("uint16", VOCAB_SIZE, "none", special, BLOCK_TOKENS, writer.close())


def raw_read(manifest: Manifest, root: str) -> float:
    """Seconds for s3fs alone to fetch every block, as many at a time as a reader fetches."""
    import s3fs

    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    began = time.perf_counter()
    with ThreadPoolExecutor(RANGES_IN_FLIGHT) as pool:
        fetched = pool.map(
            lambda place: len(
                fs.cat_file(f"{root}/{place[0]}", start=place[1].offset, end=place[1].offset + place[1].length)
            ),
            manifest.blocks,
        )
        assert sum(fetched) == sum(block.length for _, block in manifest.blocks)
    return time.perf_counter() - began


def through_reader(storage: Storage, manifest: Manifest, order: Order) -> dict[str, float]:
    """One epoch through one reader actor to one consumer, as a worker consumes it."""
    import ray

    began = time.perf_counter()
    reader = start_reader(storage, manifest, order, prefetch_windows=2, num_cpus=0)
    client = WindowClient(order, "s3://bucket/tokens", [reader], reader_timeout_s=60, storage_timeout_s=60)
    never = bool  # `bool()` is False
    client.tokens(0, 0, never)
    cold_s = time.perf_counter() - began
    steps = order.num_samples // MICRO_BATCH_SIZE
    began = time.perf_counter()
    total = sum(client.tokens(step, 0, never).size for step in range(steps))
    epoch_s = time.perf_counter() - began
    joined_at = steps + steps // order.num_windows // 2  # in the middle of the next epoch's first window
    client.tokens(joined_at - 1, 0, never)
    while ray.get(reader.stats.remote())["windows_under_way"]:  # what it reads ahead is read on the same cores
        time.sleep(0.05)
    joiner = WindowClient(order, "s3://bucket/tokens", [reader], reader_timeout_s=60, storage_timeout_s=60)
    began = time.perf_counter()
    joiner.tokens(joined_at, 0, never)
    warm_s = time.perf_counter() - began
    ray.kill(reader)
    return {"tokens_per_s": total / epoch_s, "cold_s": cold_s, "warm_s": warm_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=134_000_000)
    arguments = parser.parse_args()
    with server() as endpoint, contextlib.ExitStack() as stack:
        import s3fs

        with contextlib.suppress(FileExistsError):
            s3fs.S3FileSystem().mkdir(BUCKET)
        storage = Storage.open(f"s3://{BUCKET}/tokens")
        manifest = make_corpus(storage, arguments.tokens)
        order = manifest.order(sequence_length=LENGTH, micro_batches=1, micro_batch_size=MICRO_BATCH_SIZE, seed=0)
        stack.enter_context(cluster.connected(2))
        raw, ours = [], []
        for _ in range(arguments.rounds):
            raw.append(manifest.num_tokens / raw_read(manifest, f"{BUCKET}/tokens"))
            ours.append(through_reader(storage, manifest, order))
        report(endpoint, manifest, raw, ours)


def report(endpoint: str, manifest: Manifest, raw: list[float], ours: list[dict[str, Any]]) -> None:
    print(
        f"{common.machine()}; S3 server at {endpoint}; {manifest.num_tokens:,} tokens, {len(manifest.blocks)} blocks\n"
    )
    through = [told["tokens_per_s"] for told in ours]
    ratios = [mine / bare for mine, bare in zip(through, raw, strict=True)]
    rows = [
        ["s3fs alone, every block once", common.spread([r / 1e6 for r in raw], 0) + " M tokens/s"],
        [
            "through one reader, shuffled, verified, in batches",
            common.spread([r / 1e6 for r in through], 0) + " M tokens/s",
        ],
        ["ratio in the round", common.spread(ratios)],
        ["first batch, reader not started yet", common.spread([t["cold_s"] for t in ours]) + " s"],
        ["first batch of a consumer that joins another one", common.spread([t["warm_s"] for t in ours], 3) + " s"],
    ]
    print("\n".join(common.table(["what", "median (lowest - highest)"], rows)))
    print(f"\nmedian ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
