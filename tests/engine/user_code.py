"""What a user might hand to the engine by import path: models, objectives, and things that are neither."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUMBER = 3


class Bag(nn.Module):
    """The next token from the mean of those before it. `spare` is never used and so never has a gradient."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.spare = nn.Linear(3, 3)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT).cumsum(1)
        return self.head(x_BTD / torch.arange(1, tokens_BT.shape[1] + 1)[:, None])


def bag(vocab_size: int, max_tokens: int, width: int = 8) -> nn.Module:
    assert max_tokens > 0
    return Bag(vocab_size, width)


def no_module(vocab_size: int, max_tokens: int) -> object:
    return object()


def tied(vocab_size: int, max_tokens: int, width: int = 8) -> nn.Module:
    """Embedding and head are one matrix."""
    model = Bag(vocab_size, width)
    model.head.weight = model.embedding.weight
    return model


def value_reader(vocab_size: int, max_tokens: int, width: int = 8) -> nn.Module:
    """Looks at a tensor's value while it builds, as those do who spread dropout over the layers with linspace."""
    torch.linspace(0, 1, 3)[1].item()
    return Bag(vocab_size, width)


def every_second(model: nn.Module, tokens_BS: Tensor) -> tuple[Tensor, int]:
    """Only every second target counts."""
    logits_BTV, targets_BT = model(tokens_BS[:, :-1])[:, ::2], tokens_BS[:, 1::2]
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum"), targets_BT.numel()


def nan_loss(model: nn.Module, tokens_BS: Tensor) -> tuple[Tensor, int]:
    loss, num_targets = every_second(model, tokens_BS)
    return loss * float("nan"), num_targets


def infinite_gradient(model: nn.Module, tokens_BS: Tensor) -> tuple[Tensor, int]:
    """A finite loss whose gradient is not: the slope of a square root at zero."""
    loss, num_targets = every_second(model, tokens_BS)
    return loss + (loss - loss.detach()).sqrt(), num_targets


def loud(model: nn.Module, tokens_BS: Tensor) -> tuple[Tensor, int]:
    """A gradient that fp16 cannot hold unless it is made smaller. The value is as it was."""
    loss, num_targets = every_second(model, tokens_BS)
    return loss + (loss - loss.detach()) * 2.0**12, num_targets


def infinite_now_and_then(model: nn.Module, tokens_BS: Tensor) -> tuple[Tensor, int]:
    """Of some micro-batches: steps 1 and 5 of the synthetic tokens have one, or several."""
    loss, num_targets = every_second(model, tokens_BS)
    return loss * (float("inf") if int(tokens_BS.sum()) % 11 == 0 else 1.0), num_targets
