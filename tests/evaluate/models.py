"""Models whose probabilities one can work out by hand. Every byte of a text is a token."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn

from elastic_lm.data.tokenizer import SMALLEST_VOCABULARY, TextEncoder, train
from elastic_lm.evaluate.result import Outcome
from elastic_lm.evaluate.tasks import Question
from elastic_lm.trained_model import TrainedModel

END = ""  # stands for the token between documents


@cache
def byte_encoder() -> TextEncoder:
    return train(["a"], SMALLEST_VOCABULARY)


def token(character: str) -> int:
    return byte_encoder().encode(character)[0]


class Bigrams(nn.Module):
    """Knows how likely a character is behind another; what is left over is spread over all others alike."""

    def __init__(self, chances: dict[tuple[str, str], float]) -> None:
        super().__init__()
        size = SMALLEST_VOCABULARY
        table_VV = torch.full((size, size), 1 / size, dtype=torch.float64)
        for before in {pair[0] for pair in chances}:
            known = {token(after): p for (b, after), p in chances.items() if b == before}
            table_VV[token(before)] = (1 - sum(known.values())) / (size - len(known))
            for after, p in known.items():
                table_VV[token(before), after] = p
        self.log_p_VV = table_VV.log()

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.log_p_VV[tokens_BT]


class Neighbours(nn.Module):
    """Fills in a hidden token by adding up what both of its neighbours say of it."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.left_VV, self.right_VV = torch.randn(2, SMALLEST_VOCABULARY, SMALLEST_VOCABULARY, generator=draw).double()

    def forward(self, tokens_BT: Tensor) -> Tensor:
        logits_BTV = torch.zeros(*tokens_BT.shape, SMALLEST_VOCABULARY, dtype=torch.float64)
        logits_BTV[:, 1:] += self.left_VV[tokens_BT[:, :-1]]
        logits_BTV[:, :-1] += self.right_VV[tokens_BT[:, 1:]]
        return logits_BTV


class Alike(nn.Module):
    """Finds every token as likely as any other."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return torch.zeros(*tokens_BT.shape, self.vocab_size)


def trained(module: nn.Module, objective: str = "causal", max_tokens: int = 16) -> TrainedModel:
    encoder = byte_encoder()
    return TrainedModel(encoder, encoder.special_ids, objective, max_tokens, encoder.vocab_size, module, 1, "0" * 64)


def bigrams(chances: dict[tuple[str, str], float], **more: int) -> TrainedModel:
    return trained(Bigrams(chances), **more)  # type: ignore[arg-type]


REST = math.log(1 / SMALLEST_VOCABULARY)  # of any character behind one that nothing is known of


def outcome_of(question: Question, model: TrainedModel) -> Outcome:
    """What the model comes to, all pieces answered here one after the other."""
    plan = question.plan(model)
    return plan.outcome([piece.answer(model) for piece in plan.pieces])
