"""A head and its cross-entropy in one, by chunks of rows, so that a micro-batch's logits are never held whole.

Of a vocabulary of 50,000 the logits of 8,192 tokens take 1.6 GB in fp32, and their gradient as much again: more than all else
that a small model keeps. Here forward computes a chunk's logits, their loss and its gradient, multiplies that with features
and matrix, and drops it; backward has nothing left to do. No product is computed twice.

Invariant: the chunks follow from the shape alone, so that every worker adds in the same order. Loss and softmax are fp32;
products are in autocast's precision where there is one, as the head's would be.

Shapes: N rows, D features, V vocabulary. Source of the idea: Hsu et al. 2024 (Liger kernels), Wijmans et al. 2024.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from elastic_lm.model.transformer import GPT

# Logits at a time. The matrix's gradient is gone through once per chunk, so that few rows of a large vocabulary cost more than
# what a CPU's cache gains (measured in bench/README.md): 32 MB on a CPU, 512 MB on a GPU.
CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27}


# inputs [B, T], targets [N], their places in the flattened batch (None: all)
Targets = tuple[Tensor, Tensor, Tensor | None]


def loss_at(
    model: nn.Module,
    inputs_BT: Tensor,
    targets_N: Tensor,
    places_N: Tensor | None = None,
    *,
    z_loss: float = 0.0,
) -> Tensor:
    """`head_loss` of a model for these inputs, at all places or at some of the flattened batch.

    Ours computes no other logits: the head is half of a small model's work. A user's model gives all of them.
    """
    if isinstance(model, GPT):
        return head_loss(model.head, model.features(inputs_BT, places_N).flatten(0, -2), targets_N, z_loss)
    logits_NV = model(inputs_BT).flatten(0, 1)
    return loss_of_logits(logits_NV if places_N is None else logits_NV[places_N], targets_N, z_loss)


@dataclass(frozen=True)
class Hits:
    """Of N targets the negative log-likelihood in nats (fp64), and whether each is the most probable token.

    `loss`: the sum, added up chunk by chunk.
    """

    loss: float
    loss_N: Tensor
    hit_N: Tensor


@torch.no_grad()
def hits_at(model: nn.Module, inputs_BT: Tensor, targets_N: Tensor, places_N: Tensor | None = None) -> Hits:
    """At the same places."""
    if isinstance(model, GPT):
        features_ND = model.features(inputs_BT, places_N).flatten(0, -2)
        rows = _rows(features_ND.device, model.head.out_features)
        pairs = _pairs(features_ND, targets_N, rows)
        chunks: Iterator[tuple[Tensor, Tensor]] = ((model.head(part), wanted) for part, wanted in pairs)
    else:
        logits_NV = model(inputs_BT).flatten(0, 1)
        logits_NV = logits_NV if places_N is None else logits_NV[places_N]
        chunks = _pairs(logits_NV, targets_N, _rows(logits_NV.device, logits_NV.shape[-1]))
    loss = torch.zeros((), dtype=torch.float64, device=targets_N.device)
    losses, hits = [loss.new_empty(0)], [targets_N.new_empty(0, dtype=torch.bool)]
    for logits_CV, wanted_C in chunks:
        logits_CV = logits_CV.float()
        found_C = logits_CV.gather(1, wanted_C[:, None])[:, 0]
        losses.append((logits_CV.logsumexp(-1) - found_C).double())
        hits.append(is_first(logits_CV, wanted_C, found_C, logits_CV.amax(-1)))
        loss += losses[-1].sum()
    return Hits(float(loss), torch.cat(losses), torch.cat(hits))


def is_first(logits_CV: Tensor, wanted_C: Tensor, found_C: Tensor, most_C: Tensor) -> Tensor:
    """Whether the wanted token is argmax's. `found_C`: its logit; `most_C`: the largest of the row.

    Only where these are the same has it to be looked for: that takes ten times as long as the largest value on a CPU.
    """
    is_first_C = found_C == most_C
    (rows,) = is_first_C.nonzero(as_tuple=True)
    is_first_C[rows] = logits_CV[rows].argmax(-1) == wanted_C[rows]
    return is_first_C


def _pairs(rows_ND: Tensor, targets_N: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(rows_ND.split(size), targets_N.split(size), strict=True)


def head_loss(head: nn.Linear, features_ND: Tensor, targets_N: Tensor, z_loss: float = 0.0) -> Tensor:
    """The summed negative log-likelihood of the targets, in nats (fp32 scalar).

    With `z_loss` the gradient is that of the loss plus z_loss · Σ log(Z)², Z the softmax's divisor (Chowdhery et al. 2022); the
    value is the loss alone.
    """
    kind = features_ND.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    if dtype == torch.float16:
        return _head_loss_in_fp16(head, features_ND, targets_N, z_loss)
    loss: Tensor = _HeadLoss.apply(features_ND, head.weight, head.bias, targets_N, z_loss, dtype)
    return loss


def loss_of_logits(logits_NV: Tensor, targets_N: Tensor, z_loss: float = 0.0) -> Tensor:
    """The same of logits that are there already: those of a model that is not ours."""
    logits_NV = logits_NV.float()
    loss = F.cross_entropy(logits_NV, targets_N, reduction="sum")
    if not z_loss:
        return loss
    drift = z_loss * logits_NV.logsumexp(-1).square().sum()
    return loss + (drift - drift.detach())


def _head_loss_in_fp16(head: nn.Linear, features_ND: Tensor, targets_N: Tensor, z_loss: float) -> Tensor:
    """By the same chunks, their logits computed again in backward: only there is the loss's scale known, without which a
    softmax's small values would be zero.
    """

    def part(features_CD: Tensor, targets_C: Tensor) -> Tensor:
        return loss_of_logits(head(features_CD), targets_C, z_loss)

    rows = _rows(features_ND.device, head.out_features)
    losses = [checkpoint(part, *pair, use_reentrant=False) for pair in _pairs(features_ND, targets_N, rows)]
    return torch.stack(losses).sum() if losses else features_ND.sum()  # of nothing: zero, with a gradient


def _rows(device: torch.device, vocab_size: int) -> int:
    """Of a chunk."""
    return max(1, CHUNK_ELEMENTS.get(device.type, 1 << 27) // vocab_size)


class _HeadLoss(torch.autograd.Function):
    """features, weight, bias -> loss. The gradients are made in forward; backward hands them out."""

    @staticmethod
    def forward(
        ctx: Any,
        features_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        z_loss: float,
        dtype: torch.dtype,
    ) -> Tensor:
        trains = any(ctx.needs_input_grad)
        low_VD, low_V = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=features_ND.device)
        if trains:
            d_features_ND, d_weight_VD = torch.empty_like(features_ND), torch.zeros_like(weight_VD)
            d_bias_V = None if bias_V is None else torch.zeros_like(bias_V)
            ctx.gradients = d_features_ND, d_weight_VD, d_bias_V
        rows = _rows(features_ND.device, len(weight_VD))
        for start in range(0, len(features_ND), rows):
            chunk = slice(start, start + rows)
            low_CD, targets_C1 = features_ND[chunk].to(dtype), targets_N[chunk, None]
            logits_CV = F.linear(low_CD, low_VD, low_V).float()
            log_p_CV = logits_CV.log_softmax(-1)
            log_p_C1 = log_p_CV.gather(1, targets_C1)
            loss -= log_p_C1.sum()
            if not trains:
                continue
            d_logits_CV = log_p_CV.exp_()
            if z_loss:
                d_logits_CV *= 1 + 2 * z_loss * (logits_CV.gather(1, targets_C1) - log_p_C1)
            right_C = targets_C1[:, 0] + torch.arange(len(low_CD), device=low_CD.device) * len(weight_VD)
            d_logits_CV.view(-1)[right_C] -= 1
            if d_bias_V is not None:
                d_bias_V += d_logits_CV.sum(0)
            d_low_CV = d_logits_CV.to(dtype)
            d_features_ND[chunk] = d_low_CV @ low_VD
            if dtype == weight_VD.dtype:
                d_weight_VD.addmm_(d_low_CV.T, low_CD)
            else:
                d_weight_VD += d_low_CV.T @ low_CD
        return loss

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if gradient is None else gradient.mul_(scales[0]) for gradient in gradients), None, None, None
