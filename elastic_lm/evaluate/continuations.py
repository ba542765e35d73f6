"""What a model writes behind prompts, for the tasks that judge a text and not its likelihood."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from elastic_lm.generation import Generator, Sampling
from elastic_lm.trained_model import TrainedModel

MOST_NEW_TOKENS = 65_536


def continuations(model: TrainedModel, prompts: Sequence[str], sampling: Sampling, stop: str | None) -> Iterator[str]:
    """One for each prompt, up to the end of the text, the first `stop`, or as many tokens as `sampling` says."""
    generator = Generator(model)
    for prompt in prompts:
        text = ""
        for piece in generator.generate(prompt, sampling):
            text += piece
            if stop is not None and stop in text:
                break
        yield text if stop is None else text.partition(stop)[0]


def num_cut(model: TrainedModel, prompts: Sequence[str]) -> int:
    """Prompts that the model reads without their beginning, because its context is shorter."""
    return sum(len(model.encoder.encode(prompt)) > model.max_tokens for prompt in prompts)
