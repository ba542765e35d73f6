"""What trackers find in the files that we write: TensorBoard's event files and wandb's run files, record by record."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event as Record
from tensorboardX.proto.event_pb2 import SessionLog
from tensorboardX.record_writer import masked_crc32c

BLOCK_BYTES = 32_768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4  # whole records, and the pieces of those that cross a block


def tensorboard_records(file: Path) -> Iterator[Record]:
    """Records of an event file (TFRecord framing), checksums verified."""
    data, at = file.read_bytes(), 0
    while at < len(data):
        header = data[at : at + 8]
        (length,) = struct.unpack("<Q", header)
        body = data[at + 12 : at + 12 + length]
        assert struct.unpack("<I", data[at + 8 : at + 12])[0] == masked_crc32c(header)
        assert struct.unpack("<I", data[at + 12 + length : at + 16 + length])[0] == masked_crc32c(body)
        yield Record.FromString(body)
        at += 16 + length


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float, float]]]:
    """tag -> [(step, wall time, value)] as TensorBoard shows it: the files in the order of their names, and what a new
    session says comes again is forgotten."""
    shown: dict[str, list[tuple[int, float, float]]] = {}
    for file in sorted(folder.glob("*tfevents*")):
        for record in tensorboard_records(file):
            if record.session_log.status == SessionLog.START:
                shown = {tag: [point for point in points if point[0] < record.step] for tag, points in shown.items()}
            for value in record.summary.value:
                shown.setdefault(value.tag, []).append((record.step, record.wall_time, value.simple_value))
    return shown


def wandb_records(file: Path) -> Iterator[Any]:
    """Records of a run file: wandb's messages in the blocks of a LevelDB log, checksums verified."""
    from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

    data = file.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = 7, b""
    while at < len(data):
        if BLOCK_BYTES - at % BLOCK_BYTES < 7:  # no header fits: the rest of the block is padding
            at += BLOCK_BYTES - at % BLOCK_BYTES
            continue
        checksum, length, kind = struct.unpack("<IHB", data[at : at + 7])
        body = data[at + 7 : at + 7 + length]
        assert zlib.crc32(bytes([kind]) + body) == checksum
        parts = (b"" if kind in (FULL, FIRST) else parts) + body
        at += 7 + length
        if kind in (FULL, LAST):
            yield WandbRecord.FromString(parts)


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    """Rows of the one run in a `wandb` folder, as they would be sent."""
    (file,) = folder.glob("offline-run-*/run-*.wandb")
    rows = [record.history.item for record in wandb_records(file) if record.HasField("history")]
    return [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]
