"""What a model writes behind prompts, for the tasks that judge a text and not its likelihood.

Invariant: what is drawn behind a prompt follows from the seed and the prompt's number in the task, so that two prompts are as
independent as two seeds, and no bit depends on which worker continues them, or what else is in its piece.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

from elastic_lm.generation import Generator, NotFiniteError, Sampling
from elastic_lm.trained_model import ModelInterface, TrainedModel

MOST_NEW_TOKENS = 65_536
PIECE_PROMPTS = 4  # continued in one piece: each takes a pass of the model for every token


@dataclass(frozen=True)
class Written:
    """A continuation. `num_tokens`: about as many as it has, counted as its text came. Not finite: the model gave no more."""

    text: str
    num_tokens: int
    is_finite: bool = True


@dataclass(frozen=True)
class Continuations:
    """A piece: prompts to continue, each up to the end of the text, the first `stop`, or as many tokens as `sampling` says.

    `first`: the number of the first of them in the task.
    """

    prompts: tuple[str, ...]
    sampling: Sampling
    stop: str | None
    first: int

    def answer(self, model: TrainedModel) -> list[Written]:
        """Raises: DataError when the tokenizer cannot encode a prompt."""
        generator = Generator(model)
        return [self._continued(generator, prompt, number) for number, prompt in enumerate(self.prompts, self.first)]

    def num_tokens(self, answer: list[Written]) -> int:
        return sum(written.num_tokens for written in answer)

    def _continued(self, generator: Generator, prompt: str, number: int) -> Written:
        sampling = replace(self.sampling, seed=seed_of(self.sampling.seed, number))
        text, num_tokens = "", 0
        try:
            for piece in generator.generate(prompt, sampling):
                text += piece
                num_tokens += 1
                if self.stop is not None and self.stop in text:
                    break
        except NotFiniteError:
            return Written(text, num_tokens, is_finite=False)
        return Written(text if self.stop is None else text.partition(self.stop)[0], num_tokens)


def continuations(prompts: Sequence[str], sampling: Sampling, stop: str | None) -> list[Continuations]:
    """Pieces for all prompts, in their order."""
    starts = range(0, len(prompts), PIECE_PROMPTS)
    return [Continuations(tuple(prompts[start : start + PIECE_PROMPTS]), sampling, stop, start) for start in starts]


def seed_of(seed: int, number: int) -> int:
    """Of the prompt of this number: one for all would draw them with the same chances, and write four copies of one text."""
    key = hashlib.blake2b(struct.pack("<qq", seed, number), digest_size=8).digest()
    return int.from_bytes(key, "little") >> 1


def num_cut(model: ModelInterface, prompts: Sequence[str]) -> int:
    """Prompts that the model reads without their beginning, because its context is shorter."""
    return sum(len(model.encoder.encode(prompt)) > model.max_tokens for prompt in prompts)
