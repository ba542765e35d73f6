"""The table of steps: every step once as the log's replay has it, the same values in Parquet and CSV, small for a long run."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pyarrow.parquet
import pytest

from elastic_lm.errors import ConfigError
from elastic_lm.events.log import EventLog
from elastic_lm.events.types import Event, EventKind
from elastic_lm.monitor import table
from elastic_lm.monitor.history import History
from elastic_lm.storage import Storage
from tests.monitor.story import at, committed, rewound
from tests.monitor.test_history import begun, finished, granted

DOCUMENT = Path(__file__).parents[2] / "docs" / "steps.md"
THIRD = 1 / 3  # has no short decimal form


def a_run() -> list[Event]:
    """Steps 1 and 2 are trained again by a second attempt."""
    return [
        begun(), granted(1, 2), committed(2, 0, loss=THIRD), committed(3, 1), committed(4, 2),
        begun(10, attempt=2), granted(11, 3),
        *(committed(12 + step, step, attempt=2, world_size=3, tokens=100, loss=2.0 - THIRD * step) for step in (1, 2, 3)),
        finished(16, "done", attempt=2),
    ]  # fmt: skip


def test_rows_are_the_steps_that_the_replayed_history_has() -> None:
    events = a_run()
    rows = table.table_of(events).to_pylist()
    points = History.of(events).points
    assert [row["step"] for row in rows] == [point.step for point in points] == [0, 1, 2, 3]
    for row, point in zip(rows, points, strict=True):
        assert row["time_s"] == events[0].time_s + point.time_s
        assert row["loss_nats"] == point.fields["loss"] and row["gradient_norm"] == point.fields["grad_norm"]
        assert row["num_tokens"] == point.tokens and row["num_refused"] == point.fields["refused"]
        for name in ("world_size", "generation", "learning_rate", "sample_hash", "step_s", "compute_s", "data_wait_s",
                     "reduce_wait_s", "optimizer_s"):  # fmt: skip
            assert row[name] == point.fields[name] is not None
    assert [row["attempt"] for row in rows] == [0, 2, 2, 2]
    assert [row["num_tokens_total"] for row in rows] == [400, 500, 600, 700]


@pytest.mark.parametrize("more", [[], [committed(20, 2, loss=1.5)], [committed(20, 2, loss=1.5), rewound(21, 1)]])
def test_rows_are_those_that_the_run_has_not_gone_back_from(more: list[Event]) -> None:
    events = [begun(), *(committed(1 + step, step) for step in range(5)), rewound(9, 2), *more]
    expected = [(point.step, point.fields["loss"]) for point in History.of(events).points]
    assert [(row["step"], row["loss_nats"]) for row in table.table_of(events).to_pylist()] == expected
    assert len(expected) == (2 if not more else 3 if len(more) == 1 else 1)


def test_pandas_and_pyarrow_read_back_what_was_written(tmp_path: Path) -> None:
    storage = Storage.open(f"file://{tmp_path}/runs/mine")
    log = EventLog(storage.child("events"))
    for event in a_run():
        log.append(event)
    assert log.close()
    assert table.write("mine", storage) == f"{storage.url}/metrics/steps.parquet"
    file = tmp_path / "runs/mine/metrics/steps.parquet"
    expected = table.table_of(a_run())
    read = pyarrow.parquet.read_table(file)
    assert read.equals(expected, check_metadata=True)
    assert read.schema.field("loss_nats").metadata == {b"help": b"Sum over targets by number of targets."}
    frame = pandas.read_parquet(file)
    assert frame["loss_nats"].tolist() == [THIRD, 2.0 - THIRD, 2.0 - THIRD * 2, 1.0]
    assert frame.dtypes["world_size"] == "int64" and frame.dtypes["generation"] in ("object", "str")
    assert frame.set_index("step").loc[3, "num_tokens_total"] == 700


def test_csv_keeps_every_bit_of_a_number(tmp_path: Path) -> None:
    file = tmp_path / "steps.csv"
    table.write_file(a_run(), str(file))
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    expected = table.table_of(a_run()).to_pylist()
    assert [list(row) for row in rows] == [list(row) for row in expected]
    assert [float(row["loss_nats"]) for row in rows] == [row["loss_nats"] for row in expected]
    assert [row["generation"] for row in rows] == ["1.1"] * 4


def test_log_without_steps_is_a_table_without_rows(tmp_path: Path) -> None:
    table.write_file([begun()], f"{tmp_path}/steps.parquet")
    frame = pandas.read_parquet(tmp_path / "steps.parquet")
    assert len(frame) == 0 and frame.dtypes["loss_nats"] == "float64" and "num_tokens_total" in frame


def odd(**fields: Any) -> Event:
    return at(1, EventKind.STEP_COMMITTED, step=7, **fields)


@pytest.mark.parametrize(
    ("fields", "column", "value"),
    [
        ({}, "loss_nats", None),  # an event of another version
        ({"loss": "low"}, "loss_nats", None),
        ({"loss": 2}, "loss_nats", 2.0),  # JSON has no other way to write 2.0 in some languages
        ({"loss": True}, "loss_nats", None),
        ({"num_targets": 400.5}, "num_tokens", None),
        ({"sample_hash": 2**63 - 1}, "sample_hash", 2**63 - 1),  # the largest there is
        ({"sample_hash": 2**63}, "sample_hash", None),
        ({"sample_hash": [1]}, "sample_hash", None),
    ],
)
def test_what_is_not_of_its_kind_is_null(fields: dict[str, Any], column: str, value: Any) -> None:
    assert table.table_of([odd(**fields)])[column].to_pylist() == [value]


def test_total_goes_on_over_a_step_of_unknown_size() -> None:
    rows = table.table_of([committed(1, 6), odd(), committed(2, 8)])
    assert rows["num_tokens_total"].to_pylist() == [400, None, 800]


@pytest.mark.parametrize("step", [None, 2**70])
def test_step_without_a_number_is_left_out(step: int | None) -> None:
    assert table.table_of([at(1, EventKind.STEP_COMMITTED, step=step), committed(2, 0)])["step"].to_pylist() == [0]


def test_not_a_number_stays_one() -> None:
    (loss,) = table.table_of([odd(loss=float("nan"))])["loss_nats"].to_pylist()
    assert loss != loss


def test_long_run_takes_little_memory() -> None:
    def events() -> Iterator[Event]:
        yield from (committed(float(step), step) for step in range(100_000))
        yield committed(1e6, 50_000, loss=1.0)  # the way that takes most: rows are chosen anew

    table.table_of(a_run())  # what is imported on first use does not count
    tracemalloc.start()
    rows = table.table_of(events())
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows.num_rows == 100_000 and rows["loss_nats"][50_000].as_py() == 1.0
    assert peak_bytes < 40e6  # measured 21 MB; as events they would be 160 MB
    assert rows.nbytes < 20e6  # held by Arrow, which tracemalloc does not see


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("steps.xlsx", "is neither .parquet nor .csv"),
        ("steps", "is neither .parquet nor .csv"),
        ("absent/steps.csv", "/absent; make it first"),
        ("taken.csv", "cannot be written: Is a directory"),
    ],
)
def test_file_that_cannot_be_is_refused_with_its_name(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "taken.csv").mkdir()
    with pytest.raises(ConfigError) as raised:
        table.write_file(a_run(), f"{tmp_path}/{name}")
    assert str(raised.value).startswith(f"{tmp_path}/{name} ") and message in str(raised.value)


def test_document_is_what_the_module_prints() -> None:
    command = [sys.executable, "-m", "elastic_lm.monitor.table"]
    printed = subprocess.run(command, capture_output=True, check=True, text=True, timeout=50).stdout
    assert printed == table.markdown()
    assert DOCUMENT.read_text(encoding="utf-8") == printed, "docs/steps.md is out of date: make docs"


def test_document_names_the_columns_in_their_order() -> None:
    names = [line.split("`")[1] for line in table.markdown().splitlines() if line.startswith("| `")]
    assert names == table.table_of([]).schema.names
