"""How likely a model finds a text, in nats: the log-probability of its tokens, summed.

A causal model is asked for each token behind those before it. One that fills in masks is asked for each token with that one
hidden and all others in sight: the pseudo-log-likelihood (Salazar et al. 2020). A document begins behind the token that ended
the one before, in training as here; to a model that sees both sides it ends with that token, too.

Invariant: sequences are never padded: those of equal length are read together, so that no token is there which the text does
not have. Which are read together follows from all readings of a task, not from who reads them. The softmax is over all rows of
the model. The head of a model of ours is applied to chunks of places, whose size follows from the vocabulary alone: no context
is so long that its logits fill the memory. A model of `model.factory` gives all of them at once.

Shapes: B sequences, T tokens, N places, C those of a chunk, D features, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elastic_lm.engine.cross_entropy import is_first
from elastic_lm.errors import ConfigError
from elastic_lm.evaluate.pieces import PIECE_TOKENS, Plan
from elastic_lm.evaluate.result import Outcome
from elastic_lm.model.transformer import GPT
from elastic_lm.trained_model import ModelInterface, TrainedModel

BATCH_TOKENS = 1024  # read at once, or one longer sequence
CHUNK_LOGITS = 1 << 23  # at a time: 32 MB
SLICE_LOGITS = 1 << 18  # of a chunk, gone through at once: 1 MB, which a core's own cache holds (bench/README.md)


@dataclass(frozen=True)
class Reading:
    """A sequence that the model reads, and what it is asked: at each of `places` for the token in `targets`.

    `cut`: the beginning did not fit into the model's context and was left out.
    """

    ids: tuple[int, ...]
    places: tuple[int, ...]
    targets: tuple[int, ...]
    cut: bool = False


@dataclass(frozen=True)
class Rivals:
    """Texts behind one context, a reading for each: all are asked from the same token on, behind the same tokens.

    `tail_bytes`: of the context's end that is asked for with each. `shortened`: that is more than white space.
    """

    readings: tuple[Reading, ...]
    tail_bytes: int
    shortened: bool


def rivals(model: ModelInterface, context: str, texts: Sequence[str]) -> Rivals:
    """To a causal model. What is too long loses tokens of the context, from its beginning.

    A token may join the context's end with a text's beginning. Then the tokens from there on are asked for, of every text: the
    log-probabilities are all of the same tail and a text, behind the same prefix. White space at the end of the context is in
    the tail, because tokens begin with it, not end.
    Raises: ConfigError when a text alone is too long, or is no token of its own.
    """
    before = model.encoder.encode(context.rstrip())[:-1]
    wholes = [model.encoder.encode(context + text)[:-1] for text in texts]
    starts = [_common(whole, before) for whole in wholes]
    for text, whole, start in zip(texts, wholes, starts, strict=True):
        if start == len(whole):
            raise ConfigError(f"{_shown(text)} adds no token to what is before it; correct it, or leave the item out")
    start = min(starts)
    tail_bytes = sum(model.encoder.num_bytes(token) for token in before[start:])
    return Rivals(
        tuple(_from(model, text, whole, start) for text, whole in zip(texts, wholes, strict=True)),
        tail_bytes + len(context[len(context.rstrip()) :].encode()),
        shortened=start < len(before),
    )


def continuation(model: ModelInterface, context: str, text: str) -> Reading:
    """Of one text.    Raises: as `rivals`."""
    return rivals(model, context, [text]).readings[0]


def _from(model: ModelInterface, text: str, whole: Sequence[int], start: int) -> Reading:
    """All tokens read, and those from `start` on asked for.    Raises: ConfigError when they are too many."""
    num_asked = len(whole) - start
    if num_asked > model.max_tokens:
        raise ConfigError(
            f"{_shown(text)} has {num_asked} tokens, and the model's context is {model.max_tokens}; shorten it, or leave the "
            "item out"
        )
    ids = [model.special_ids["end_of_text"], *whole]
    read = ids[max(0, len(ids) - 1 - model.max_tokens) : -1]
    places = range(len(read) - num_asked, len(read))
    return Reading(tuple(read), tuple(places), tuple(ids[-num_asked:]), cut=len(read) < len(ids) - 1)


def hidden_one_by_one(model: ModelInterface, text: str) -> list[Reading]:
    """The whole text, to a model that fills in masks.    Raises: ConfigError when it is too long."""
    end, mask = model.special_ids["end_of_text"], model.special_ids["mask"]
    ids = [end, *model.encoder.encode(text)]
    if len(ids) > model.max_tokens:
        raise ConfigError(
            f"{_shown(text)} has {len(ids)} tokens with those that begin and end a document, and the model's context is "
            f"{model.max_tokens}; shorten it, or leave the item out"
        )
    return [Reading((*ids[:at], mask, *ids[at + 1 :]), (at,), (ids[at],)) for at in range(1, len(ids) - 1)]


@dataclass(frozen=True)
class Score:
    """`log_p`: the targets' log-probabilities, summed. `is_most_probable`: no token is likelier than any of them in its place."""

    log_p: float
    is_most_probable: bool


@dataclass(frozen=True)
class Likelihoods:
    """A piece: readings whose log-likelihoods are asked for, a list of floats. They are whole batches of a task's."""

    readings: tuple[Reading, ...]

    def answer(self, model: TrainedModel) -> list[float]:
        return log_likelihoods(model, self.readings)

    def num_tokens(self, answer: list[float]) -> int:
        return sum(len(reading.ids) for reading in self.readings)


def plan(readings: Sequence[Reading], outcome: Callable[[list[float]], Outcome]) -> Plan:
    """`outcome` takes the log-likelihoods in the order of the readings."""
    shares = _shares(readings)

    def outcome_of(answers: Sequence[list[float]]) -> Outcome:
        found = [0.0] * len(readings)
        for numbers, log_p in zip(shares, answers, strict=True):
            for number, each in zip(numbers, log_p, strict=True):
                found[number] = each
        return outcome(found)

    return Plan([Likelihoods(tuple(readings[number] for number in numbers)) for numbers in shares], outcome_of)


def _shares(readings: Sequence[Reading]) -> list[list[int]]:
    """Numbers of readings: batches one after the other, up to PIECE_TOKENS at a time.

    A piece alone makes the same batches again: of each length all but the last are full, and that one stays the last.
    """
    shares: list[list[int]] = []
    room = 0
    for numbers in _batches(readings):
        size = len(numbers) * len(readings[numbers[0]].ids)
        if size > room:
            shares.append([])
            room = PIECE_TOKENS
        shares[-1] += numbers
        room -= size
    return shares


def log_likelihoods(model: TrainedModel, readings: Sequence[Reading]) -> list[float]:
    """Of each reading its targets' log-probabilities, summed."""
    return [score.log_p for score in scores(model, readings)]


def scores(
    model: TrainedModel, readings: Sequence[Reading], heard: Callable[[Sequence[Reading]], None] = lambda batch: None
) -> list[Score]:
    """Of each reading. `heard` gets every batch of them as soon as it has its scores."""
    found: dict[int, Score] = {}
    for numbers in _batches(readings):
        batch = [readings[number] for number in numbers]
        sizes = [len(reading.places) for reading in batch]
        log_p_N, best_N = _log_probabilities(model.module, batch, model.device)
        for number, part_N, is_best_N in zip(numbers, log_p_N.split(sizes), best_N.split(sizes), strict=True):
            found[number] = Score(float(part_N.sum()), bool(is_best_N.all()))
        heard(batch)
    return [found[number] for number in range(len(readings))]


@torch.no_grad()
def _log_probabilities(module: nn.Module, batch: Sequence[Reading], device: str) -> tuple[Tensor, Tensor]:
    """Of all targets of sequences that are equally long, in their order; and whether each is the most probable token.

    Both on the host.
    """
    tokens_BT = torch.tensor([reading.ids for reading in batch], device=device)
    length = tokens_BT.shape[1]
    places = [row * length + place for row, reading in enumerate(batch) for place in reading.places]
    places_N = torch.tensor(places, device=device)
    targets_N = torch.tensor([target for reading in batch for target in reading.targets], device=device)
    if isinstance(module, GPT):
        size = max(1, CHUNK_LOGITS // module.head.out_features)
        chunks = (module.head(features_CD) for features_CD in module.features(tokens_BT, places_N).split(size))
    else:
        logits_NV = module(tokens_BT).flatten(0, 1)[places_N]
        size = max(1, CHUNK_LOGITS // logits_NV.shape[-1])
        chunks = (logits_CV for logits_CV in logits_NV.split(size))
    found = [_of_logits(*pair) for pair in zip(chunks, targets_N.split(size), strict=True)]
    log_p, is_best = zip(*found, strict=True)
    return torch.cat(log_p).cpu(), torch.cat(is_best).cpu()


def _of_logits(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Of the targets: log-probability in fp64, and whether it is the most probable token.

    log p = (x - m) - log Σ exp(x' - m), m the largest logit. Only the terms of the sum are of the logits' precision, and fp32 at
    least: of fp32 logits that is within 2e-7 of a softmax in fp64 (measured), where a softmax in fp32 is within 2e-6.
    """
    size = max(1, SLICE_LOGITS // logits_CV.shape[-1])
    found = [_of_slice(*pair) for pair in zip(logits_CV.split(size), targets_C.split(size), strict=True)]
    log_p, is_best = zip(*found, strict=True)
    return torch.cat(log_p), torch.cat(is_best)


def _of_slice(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    found_C = logits_CV.gather(1, targets_C[:, None])[:, 0]
    most_C = logits_CV.amax(-1)
    sum_C = (logits_CV - most_C[:, None]).exp_().sum(-1)
    log_p_C = found_C.double() - most_C.double() - sum_C.double().log()
    return log_p_C, is_first(logits_CV, targets_C, found_C, most_C)


def _batches(readings: Sequence[Reading]) -> Iterator[list[int]]:
    """Numbers of readings that are equally long, up to BATCH_TOKENS at a time."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, reading in enumerate(readings):
        by_length[len(reading.ids)].append(number)
    for length, numbers in sorted(by_length.items()):
        size = max(1, BATCH_TOKENS // length)
        yield from (numbers[first : first + size] for first in range(0, len(numbers), size))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
