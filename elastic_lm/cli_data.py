"""Commands about a corpus that is there: its figures, and its text as training sees it.

Invariant: `show` of a step tells the samples that workers train on in that step, by the same order and the same verified
reads. A fork has not trained the steps before it: where its parent's samples were others, it is refused to tell them. Nothing is
written, and only storage is needed.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elastic_lm.corpus_figures import describe, facts
from elastic_lm.errors import ConfigError, NotFoundError, StorageError
from elastic_lm.terminal import deliver, say, told_errors, visible

if TYPE_CHECKING:
    from elastic_lm.config import RunConfig
    from elastic_lm.data.manifest import Manifest
    from elastic_lm.data.order import Order
    from elastic_lm.data.passages import Passage, Passages
    from elastic_lm.experiment.lineage import Change
    from elastic_lm.run import Run
    from elastic_lm.storage import Storage

NO_INDEX = (
    "elastic-lm: this corpus has no index of documents, so where its text is from is unknown; it gets one when it is "
    "prepared again"
)

app = typer.Typer(no_args_is_help=True)
Corpus = Annotated[str, typer.Argument(help="A corpus's address, RUN.YAML, or a run.", metavar="CORPUS|RUN")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.callback()
def _about() -> None:
    """Look at a prepared corpus."""


@app.command()
def info(corpus: Corpus, as_json: AsJson = False) -> None:
    """What a corpus holds, in figures."""
    with told_errors():
        from elastic_lm.data.summary import Summary

        found = _find(corpus)
        summary = Summary.load(found.storage, found.manifest)
        told = json.dumps(facts(found.storage, found.manifest, summary)) if as_json else None
    deliver(told or describe(found.storage, found.manifest, summary))


@app.command()
def show(
    corpus: Corpus,
    step: Annotated[int | None, typer.Option(min=0, help="The samples of this step.")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=0, help="Of one micro-batch only.")] = None,
    sample: Annotated[int | None, typer.Option(min=0, help="One sample of each micro-batch only.")] = None,
    tokens: Annotated[str | None, typer.Option(help="These, as they lie in the corpus.", metavar="START..STOP")] = None,
    held_out: Annotated[bool, typer.Option("--held-out", help="With --tokens: those of the held-out part.")] = False,
    sequence_length: Annotated[int | None, typer.Option(help="For --step of a corpus: the batch's.")] = None,
    micro_batches: Annotated[int | None, typer.Option(help="The same.")] = None,
    micro_batch_size: Annotated[int | None, typer.Option(help="The same.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same.")] = None,
    window_blocks: Annotated[int | None, typer.Option(help="The same; else what runs choose.")] = None,
    loss: Annotated[
        bool,
        typer.Option(
            "--loss",
            help="Of a run's step, the loss of each sample, with the weights of the last checkpoint before it.",
        ),
    ] = False,
    before_rewind: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of a run that went back: as the step was before the N-th time, with what it then left out."
        ),
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="The ids of the tokens, too.")] = False,
    full: Annotated[bool, typer.Option("--full", help="All of the text, with its line breaks.")] = False,
    as_json: AsJson = False,
) -> None:
    """Text of a step, or of any tokens, and where it is from."""
    with told_errors():
        from elastic_lm.data.passages import Passages

        shape = {
            "sequence_length": sequence_length, "micro_batches": micro_batches, "micro_batch_size": micro_batch_size,
            "seed": seed, "window_blocks": window_blocks,
        }  # fmt: skip
        if (step is None) == (tokens is None):
            raise ConfigError("say what to show, and one of both: --step N, or --tokens START..STOP")
        if held_out and tokens is None:
            raise ConfigError("no step trains on held-out text; look at it with --held-out --tokens START..STOP")
        if loss and step is None:
            raise _no_loss()
        if step is None:
            _check_of_no_step({"micro_batch": micro_batch, "sample": sample, "before_rewind": before_rewind, **shape})
        found = _find(corpus)
        if before_rewind is not None:
            found = _before(found, before_rewind)
        if loss and found.config is None:
            raise _no_loss()
        if step is not None and found.config is not None:
            _check_has(found.num_steps, step)
        if step is not None and found.folder is not None:
            _check_trained_here(found.folder, step)
        if step is None:
            ranges: Iterator[Range] = iter([Range(*_range(str(tokens)), {})])
        else:
            ranges = _samples(_order(found, shape), found.manifest, step, micro_batch, sample)
        passages = Passages(found.storage, found.manifest, held_out=held_out)
        if loss and step is not None:
            ranges = _judged(ranges, passages, found, step)
        tell = _Teller(ids=ids, full=full)
        for wanted in ranges:
            if as_json:
                deliver(json.dumps(_as_json(wanted, passages, ids=ids)))
            else:
                tell.range(wanted, passages)
        if not passages.has_origins and not as_json:
            say(NO_INDEX, sys.stderr)


# -- which corpus ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """A corpus, and the run that trains on it if it was named by one, with the folder in which that was found.

    `num_steps`: to how many the run comes. `at_most`: steps that were trained as `config` says, where it went back later.
    """

    storage: Storage
    manifest: Manifest
    config: RunConfig | None = None
    folder: Storage | None = None
    num_steps: int = 0
    at_most: int | None = None


def _find(text: str) -> _Found:
    """The corpus that a person means. A run that is there has its own config, whatever its YAML file says by now: of that only
    more steps count.

    Raises: CheckpointError, ConfigError, DataError, NotFoundError, StorageError.
    """
    from elastic_lm.config import RunConfig
    from elastic_lm.config_text import is_yaml
    from elastic_lm.data.manifest import FILE_NAME, Manifest
    from elastic_lm.experiment.rewinds import Rewinds
    from elastic_lm.run import Run
    from elastic_lm.storage import Storage

    if is_yaml(text):
        wanted = RunConfig.load(text)
        run, num_steps = Run.open(wanted), wanted.training.steps
        config = _begun(run) or wanted
    else:
        try:
            storage = Storage.open(text)
        except StorageError as error:
            raise ConfigError(str(error)) from error
        if storage.exists(FILE_NAME):
            return _Found(storage, Manifest.load(storage))
        try:
            run, num_steps = Run.open(text), 0
            config = run.config
        except (ConfigError, NotFoundError) as error:
            raise NotFoundError(
                f"{text} is no corpus (there is no {FILE_NAME} in {storage.url}) and no run ({error})"
            ) from error
    tokens, folder = Storage.open(config.data.tokens), run.address.folder()
    manifest = Manifest.load(tokens)
    config = Rewinds.load(folder).applied(config)
    config = config.settled(manifest=manifest.hash, window_blocks=manifest.window_blocks)
    return _Found(tokens, manifest, config, folder, max(num_steps, config.training.steps))


def _begun(run: Run) -> RunConfig | None:
    """What the run was last trained with; None when it has not begun.    Raises: ConfigError, StorageError."""
    try:
        return run.config
    except NotFoundError:
        return None


def _before(found: _Found, number: int) -> _Found:
    """With the run's batches as they were before it went back for that time.    Raises: ConfigError when it never did."""
    from elastic_lm.experiment.rewinds import Rewinds, with_skip

    if found.config is None or found.folder is None:
        raise ConfigError("only a run goes back, and this is a corpus: data show RUN --step N --before-rewind K")
    made = Rewinds.load(found.folder).made
    if number > len(made):
        raise ConfigError(
            f"--before-rewind {number}: times that the run went back: {len(made)}; leave it out, or choose one of them"
        )
    at_most = min(rewind.to_step for rewind in made[number - 1 :])
    return replace(found, config=with_skip(found.config, made[number - 1].before), at_most=at_most)


def _no_loss() -> ConfigError:
    return ConfigError("a loss takes a run's weights and its samples: data show RUN --step N --loss")


def _check_of_no_step(options: dict[str, int | None]) -> None:
    """Raises: ConfigError when one of them is given: each says something of a step."""
    if given := [_option(name) for name, value in options.items() if value is not None]:
        raise ConfigError(
            f"--tokens shows the corpus as it lies there, whatever steps make of it; leave out {', '.join(given)}, or choose "
            "--step N in place of --tokens"
        )


# -- which tokens ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """Tokens [start, stop) of a corpus. `place`: what they are in training, by its names. `judged`: their loss, in nats per
    target, and the steps that the weights were trained for.
    """

    start: int
    stop: int
    place: dict[str, int]
    judged: tuple[float, int] | None = None


def _order(found: _Found, shape: dict[str, int | None]) -> Order:
    given = {name: value for name, value in shape.items() if value is not None}
    if found.config is not None:
        if given:
            raise ConfigError(f"the run says what its batches are; leave out {', '.join(map(_option, given))}")
        return found.manifest.order(**found.config.order_fields())
    missing = [name for name in shape if name not in given and name != "window_blocks"]
    if missing:
        raise ConfigError(
            f"a corpus alone does not say what a step trains on; name a run instead, or add "
            f"{', '.join(map(_option, missing))}"
        )
    fields: dict[str, Any] = given
    return found.manifest.order(**fields)


def _check_has(num_steps: int, step: int) -> None:
    """Raises: ConfigError when the run never comes to this step."""
    if step >= num_steps:
        raise ConfigError(
            f"--step {step}: the run ends at step {num_steps:,} (training.steps), and its last one is step {num_steps - 1}; "
            "choose an earlier one, or name a RUN.YAML with more steps"
        )


def _check_trained_here(folder: Storage, step: int) -> None:
    """Raises: ConfigError when the run is a fork, and the samples that it would tell are not those of the run that trained them.

    CheckpointError when its lineage cannot be read; StorageError.
    """
    from elastic_lm.experiment.lineage import Lineage

    lineage = Lineage.load(folder)
    before = [link for link in (lineage.chain() if lineage else ()) if step < link.parent.step]
    names = sorted({change.name for link in before for change in link.changes if _changes_samples(change, step)})
    if names:
        at, trainer = before[-1].parent.step, before[-1].parent
        raise ConfigError(
            f"step {step} is before the fork at step {at}, with other samples than the run's ({', '.join(names)}), and was "
            f"trained by {trainer.name}: data show {trainer.url} --step {step}"
        )


def _changes_samples(change: Change, step: int) -> bool:
    """Whether with it the step has other samples. Batches that are left out later change nothing."""
    from elastic_lm.data.order import batch_of
    from elastic_lm.experiment.changes import ORDER

    if change.name == "training.skip":
        return batch_of(step, change.before or ()) != batch_of(step, change.after or ())
    return change.identity and change.name.startswith(ORDER)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _samples(
    order: Order, manifest: Manifest, step: int, micro_batch: int | None, sample: int | None
) -> Iterator[Range]:
    """The samples of a step in order.    Raises: ConfigError when it has none of these numbers."""
    for name, number, size in (
        ("--micro-batch", micro_batch, order.micro_batches),
        ("--sample", sample, order.micro_batch_size),
    ):
        if number is not None and number >= size:
            raise ConfigError(f"{name} {number}: there are {size}, 0 to {size - 1}")
    for j in range(order.micro_batches) if micro_batch is None else [micro_batch]:
        for row, at in enumerate(order.micro_batch(step, j)):
            if sample in (None, row):
                start = at.block * manifest.block_tokens + at.index_in_block * order.sequence_length
                place = {
                    "step": step, "batch": order.batch(step), "micro_batch": j, "sample": row, "epoch": at.epoch,
                    "block": at.block, "index_in_block": at.index_in_block,
                }  # fmt: skip
                yield Range(start, start + order.sequence_length + 1, place)


def _judged(ranges: Iterator[Range], passages: Passages, found: _Found, step: int) -> Iterator[Range]:
    """Raises: as `SampleLoss`."""
    from elastic_lm.sample_loss import SampleLoss

    assert found.config is not None and found.folder is not None
    loss = SampleLoss(found.folder, found.config, found.manifest, step, found.at_most)
    for wanted in ranges:
        ids = [token for passage in passages.between(wanted.start, wanted.stop) for token in passage.ids]
        yield replace(wanted, judged=(loss.of(ids), loss.step))


def _range(text: str) -> tuple[int, int]:
    start, dots, stop = text.replace("_", "").replace(",", "").partition("..")
    if not (dots and start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise ConfigError(f"--tokens {text!r} is no range of tokens; write START..STOP, e.g. 0..1000: STOP is left out")
    return int(start), int(stop)


# -- words -----------------------------------------------------------------------------------------------------------


def _as_json(wanted: Range, passages: Passages, *, ids: bool) -> dict[str, Any]:
    found = [_passage_as_json(passage, ids=ids) for passage in passages.between(wanted.start, wanted.stop)]
    told = {} if wanted.judged is None else {"loss": _finite(wanted.judged[0]), "weights_step": wanted.judged[1]}
    return {**wanted.place, **told, "tokens": [wanted.start, wanted.stop], "passages": found}


def _finite(loss: float) -> float | None:
    """JSON has no other numbers."""
    return loss if math.isfinite(loss) else None


def _passage_as_json(passage: Passage, *, ids: bool) -> dict[str, Any]:
    told: dict[str, Any] = {"tokens": [passage.start, passage.start + len(passage.ids)], "document": None}
    if passage.origin is not None:
        told["document"] = {**asdict(passage.origin), "unit": _unit(passage.origin.file)}
    return {**told, "ends": passage.ends, "text": passage.text, **({"ids": passage.ids} if ids else {})}


def _unit(file: str) -> str:
    from elastic_lm.data.formats import format_of

    format = format_of(file, "")
    return format.unit if format is not None else "place"


class _Teller:
    """Says ranges to people, with what a terminal would act on made visible."""

    def __init__(self, *, ids: bool, full: bool) -> None:
        self._ids, self._full = ids, full
        self._width = shutil.get_terminal_size().columns
        self._encoding = sys.stdout.encoding or "utf-8"

    def range(self, wanted: Range, passages: Passages) -> None:
        for number, passage in enumerate(passages.between(wanted.start, wanted.stop)):
            if number == 0:  # what cannot be read has no title
                self._say(_title(wanted))
            self._say(f"  {_whence(passage)}")
            for line in visible(passage.text, line_breaks=self._full).split("\n"):
                self._say(f"    {line}", cut=not self._full)
            if self._ids:
                self._say(f"    {' '.join(map(str, passage.ids))}", cut=not self._full)

    def _say(self, text: str, *, cut: bool = False) -> None:
        from rich.text import Text

        told = Text(text.encode(self._encoding, "backslashreplace").decode(self._encoding))
        if cut:
            told.truncate(self._width, overflow="ellipsis" if self._encoding.lower().startswith("utf") else "crop")
        deliver(told.plain)


def _title(wanted: Range) -> str:
    tokens = f"tokens {wanted.start}..{wanted.stop}"  # as --tokens takes them
    if not wanted.place:
        return tokens
    at = wanted.place
    batch = f" (batch {at['batch']:,})" if at["batch"] != at["step"] else ""
    return (
        f"step {at['step']:,}{batch}, micro-batch {at['micro_batch']:,}, sample {at['sample']:,}: {tokens}, block "
        f"{at['block']:,}, epoch {at['epoch']:,}{_judgement(wanted)}"
    )


def _judgement(wanted: Range) -> str:
    if wanted.judged is None:
        return ""
    loss, step = wanted.judged
    told = f"{loss:.4f}" if math.isfinite(loss) else "not finite"
    return f"; loss {told} with the weights of step {step:,}"


def _whence(passage: Passage) -> str:
    end = ", its end" if passage.ends else ""
    if passage.origin is None:
        return f"source unknown: {len(passage.ids):,} tokens of a document{end}"
    origin = passage.origin
    first = passage.start - origin.first_token
    return (
        f"{visible(origin.file)}, {_unit(origin.file)} {origin.place}: tokens {first}..{first + len(passage.ids)} of "
        f"{origin.num_tokens}{end}"
    )
