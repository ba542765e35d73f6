"""The log as a table: a row for every committed step, for pandas, polars and whatever else reads Parquet or CSV.

Invariant: computed from the log alone, by the rule of history.py: of a step that was trained again the last record counts, of
what the run went back from none does, and rows are in the order of steps. What an event of another version lacks is null.
Trade-off: the table is held whole, about 300 bytes a step (30 MB for 100,000), because a step that is told again takes
the place of a row that was there.

`python -m elastic_lm.monitor.table` prints docs/steps.md, and a test fails when the file is out of date.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from elastic_lm.errors import ConfigError
from elastic_lm.events.log import read
from elastic_lm.events.types import Event, EventKind
from elastic_lm.storage import Storage

if TYPE_CHECKING:
    import pyarrow as pa

FILE = "metrics/steps.parquet"  # in the run's folder
BATCH_ROWS = 8_192  # rows that wait as Python objects, about a kilobyte each
LARGEST = 2**63 - 1

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column. `field` is the name in the event's fields; None: an attribute of the event with the column's name."""

    name: str
    kind: Literal["int64", "float64", "string"]
    help: str
    field: str | None = None

    def of(self, event: Event) -> Any:
        """The event's value for this column, None when it has none of this kind."""
        value = getattr(event, self.name) if self.field is None else event.fields.get(self.field)
        match value:
            case bool():
                return None
            case int() if self.kind != "string" and -LARGEST <= value <= LARGEST:
                return value if self.kind == "int64" else float(value)
            case float() if self.kind == "float64":
                return value
            case str() if self.kind == "string":
                return value
        return None


COLUMNS = (
    Column("step", "int64", "The step, counted from 0."),
    Column("time_s", "float64", "When it was told as committed, in unix seconds."),
    Column("attempt", "int64", "Which life of the run's coordinator, from 1."),
    Column("generation", "string", "Which agreed list of workers."),
    Column("world_size", "int64", "Workers that trained the step.", "world_size"),
    Column("loss_nats", "float64", "Sum over targets by number of targets.", "loss"),
    Column("learning_rate", "float64", "Learning rate.", "learning_rate"),
    Column("gradient_norm", "float64", "Global L2 norm of the gradient before clipping.", "grad_norm"),
    Column("num_tokens", "int64", "Targets of the step.", "num_targets"),
    Column("step_s", "float64", "Wall time of the step, on the worker that told it; so are the parts.", "step_s"),
    Column("compute_s", "float64", "Part of it: forward and backward.", "compute_s"),
    Column("data_wait_s", "float64", "Part of it: waiting for tokens.", "data_wait_s"),
    Column("reduce_wait_s", "float64", "Part of it: waiting for the sum over all workers.", "reduce_wait_s"),
    Column("optimizer_s", "float64", "Part of it: the update.", "optimizer_s"),
    Column("num_refused", "int64", "Elements of gradients that were not finite or out of range.", "refused"),
    Column("sample_hash", "int64", "Hash of the tokens that entered the step.", "sample_hash"),
)
TOTAL = Column("num_tokens_total", "int64", "Targets of this step and of all rows before it.")  # known at the end only


def row_of(event: Event) -> Row | None:
    """The row that the event is, without the total; None when it is no committed step."""
    if event.kind is not EventKind.STEP_COMMITTED or COLUMNS[0].of(event) is None:
        return None
    return {column.name: column.of(event) for column in COLUMNS}


def table_of(events: Iterable[Event]) -> pa.Table:
    """All committed steps of `events`, in the order of the log."""
    import pyarrow as pa
    import pyarrow.compute

    schema = pa.schema([pa.field(c.name, getattr(pa, c.kind)(), metadata={"help": c.help}) for c in COLUMNS])
    ends: list[tuple[int, int]] = []
    table = pa.Table.from_batches(_batches(events, schema, ends), schema)
    if (rows := _last_rows(table["step"], ends)) is not None:
        table = table.take(rows)
    total = pa.compute.cumulative_sum(table["num_tokens"], skip_nulls=True)
    field = pa.field(TOTAL.name, pa.int64(), metadata={"help": TOTAL.help})
    return table.add_column(table.schema.get_field_index("num_tokens") + 1, field, total)


def _batches(events: Iterable[Event], schema: pa.Schema, ends: list[tuple[int, int]]) -> Iterable[pa.RecordBatch]:
    """`ends` gets (rows until then, step) of each time that the run went back: of these rows those from this step on are void."""
    import pyarrow as pa

    waiting: list[Row] = []
    num_rows = 0
    for event in events:
        if (row := row_of(event)) is not None:
            waiting.append(row)
            num_rows += 1
        elif event.kind is EventKind.REWOUND and event.step is not None:
            ends.append((num_rows, event.step))
        if len(waiting) == BATCH_ROWS:
            yield pa.RecordBatch.from_pylist(waiting, schema)
            waiting = []
    yield pa.RecordBatch.from_pylist(waiting, schema)


def _last_rows(steps: pa.ChunkedArray, ends: list[tuple[int, int]]) -> list[int] | None:
    """The row of each step that was told last, by step; None when that is every row as it stands."""
    last: dict[int, int] = {}
    in_order, newest = True, -1
    for row, step in enumerate(steps):
        number = step.as_py()
        last[number], in_order, newest = row, in_order and number > newest, number
    for num_rows, first in ends:
        last = {step: row for step, row in last.items() if step < first or row >= num_rows}
    return None if in_order and not ends else [last[step] for step in sorted(last)]


# -- files -----------------------------------------------------------------------------------------------------------


def parquet(table: pa.Table) -> bytes:
    """The table as a Parquet file."""
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def csv(table: pa.Table) -> bytes:
    """The table as CSV with a header; a null is empty."""
    import pyarrow.csv

    buffer = io.BytesIO()
    pyarrow.csv.write_csv(table, buffer)
    return buffer.getvalue()


FORMATS: dict[str, Callable[[Any], bytes]] = {".parquet": parquet, ".csv": csv}


def write(name: str, run_storage: Storage) -> str:
    """Write Parquet from the run's log into its folder.    Returns: the file's address.    Raises: StorageError."""
    run_storage.write(FILE, parquet(table_of(read(run_storage.child("events")))))
    return f"{run_storage.url}/{FILE}"


def write_file(events: Iterable[Event], path: str) -> None:
    """Write Parquet or CSV, by the name's end, to a file here.    Raises: ConfigError when that cannot be."""
    encode = FORMATS.get(Path(path).suffix)
    if encode is None:
        raise ConfigError(f"{path} is neither .parquet nor .csv; name a file that ends with one of them")
    if not Path(path).absolute().parent.is_dir():  # before the log is read, which may take a while
        raise ConfigError(f"{path} cannot be written: there is no folder {Path(path).absolute().parent}; make it first")
    try:
        Path(path).write_bytes(encode(table_of(events)))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


# -- the document ----------------------------------------------------------------------------------------------------


def markdown() -> str:
    """docs/steps.md."""
    lines = [
        "# The table of steps",
        "",
        "Generated by `make docs` from `elastic_lm/monitor/table.py`; edit there.",
        "",
        f"One row for each committed step, in the order of steps. Every run writes it at its end as `{FILE}` in its",
        "folder; `elastic-lm export RUN` writes it at any time (`--out FILE.parquet` or `FILE.csv` for a file of your",
        "own), and `Run.open(RUN).metrics()` returns it as a pyarrow Table. It is computed from the event log: of a step",
        "that was trained again the last record counts, and of what the run went back from none does. What an event of",
        "another version lacks is null.",
        "",
        "| column | type | meaning |",
        "| --- | --- | --- |",
    ]
    at = [column.name for column in COLUMNS].index("num_tokens") + 1
    for column in (*COLUMNS[:at], TOTAL, *COLUMNS[at:]):
        lines.append(f"| `{column.name}` | {column.kind} | {column.help} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    print(markdown(), end="")
