"""A model and an objective of one's own, for custom_model.yaml: gated causal convolutions, trained with a z-loss.

What the promise of equal bits asks of such code: the result depends on the arguments and on torch's generator alone (no
clock, no rank, no other randomness), and the model keeps no state outside its parameters: no BatchNorm, no persistent
buffers. Parameters are fp32; each call of `build` returns a new model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B batch, T tokens, S = T + 1, D model, V vocabulary

KERNEL = 4  # tokens that one layer looks back on, itself included
Z_WEIGHT = 1e-4  # as in PaLM (Chowdhery et al., 2022)


class GatedConvolution(nn.Module):
    """x + a * sigmoid(b), with a and b convolutions over the tokens up to the present one."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.padding = (KERNEL - 1) * dilation
        self.norm = nn.LayerNorm(width)
        self.convolution = nn.Conv1d(width, 2 * width, KERNEL, dilation=dilation)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BDT = F.pad(self.norm(x_BTD).transpose(1, 2), (self.padding, 0))  # on the left: nobody sees what follows
        return x_BTD + F.glu(self.convolution(x_BDT), dim=1).transpose(1, 2)


class ConvolutionalLM(nn.Module):
    """Layers with dilations 1, 2, 4 ...: the context doubles with each one."""

    def __init__(self, vocab_size: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = nn.Sequential(*(GatedConvolution(width, 2**layer) for layer in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)  # the first loss is near ln V, that of guessing

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embedding(tokens_BT))))


def build(vocab_size: int, max_tokens: int, *, width: int, num_layers: int) -> nn.Module:
    """`model.factory`: a new model. `max_tokens`, the longest sequence, does not bound a convolution."""
    return ConvolutionalLM(vocab_size, width, num_layers)


def causal_with_z_loss(model: nn.Module, tokens_BS: Tensor) -> tuple[Tensor, int]:
    """`objective.name`: next-token loss plus the squared log of the softmax's normaliser, which keeps logits small.

    Returns: the *sum* over targets and their number, never a mean: the mean is taken once, over the global batch.
    """
    logits_BTV = model(tokens_BS[:, :-1]).float()
    targets_BT = tokens_BS[:, 1:]
    loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")
    z_loss = Z_WEIGHT * torch.logsumexp(logits_BTV, dim=-1).square().sum()
    return loss + z_loss, targets_BT.numel()
