"""The masked objective: predict tokens that were hidden, from both sides (Devlin et al. 2019, BERT).

Of all tokens but the special ones a share is chosen; of these 80 % become the mask, 10 % any ordinary token, and 10 % stay.
Invariant: which ones follows from the generator that the replica has seeded for this (seed, step, micro-batch), which names
samples and epoch; it is drawn on the host, so neither the device nor who computes the micro-batch has a say.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_lm.engine.spec import MaskingSpec
from elastic_lm.model.transformer import GPT

HIDDEN, REPLACED = 0.8, 0.1  # of those that are chosen; the rest stay as they are


class Masked:
    """Minimise the sum of -log P(x_t | the corrupted sequence) over the chosen t. Of S = T + 1 tokens the first T are read."""

    def __init__(self, spec: MaskingSpec) -> None:
        self._spec = spec
        special = torch.zeros(spec.vocab_size, dtype=torch.bool)
        special[list(spec.special_ids)] = True
        self._special, self._ordinary = special, torch.nonzero(~special).flatten()

    def __call__(self, model: nn.Module, tokens_BS: Tensor) -> tuple[Tensor, int]:
        """Returns: the summed negative log-likelihood in nats (fp32 scalar), and how many tokens were chosen."""
        tokens_BT = tokens_BS[:, :-1].cpu()  # they were sent a moment ago, and nothing else is under way
        inputs_BT, chosen_N = self.corrupt(tokens_BT)
        device = tokens_BS.device
        logits_NV = _logits_at(model, inputs_BT.to(device), chosen_N.to(device))
        targets_N = tokens_BT.flatten()[chosen_N].to(device)
        return F.cross_entropy(logits_NV.float(), targets_N, reduction="sum"), chosen_N.numel()

    def corrupt(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(what the model reads, places of the chosen tokens in the flattened batch), drawn from torch's host generator."""
        chance_BT, fate_BT = torch.rand(tokens_BT.shape), torch.rand(tokens_BT.shape)
        others_BT = self._ordinary[torch.randint(len(self._ordinary), tokens_BT.shape)]
        chosen_BT = (chance_BT < self._spec.ratio) & ~self._special[tokens_BT]
        inputs_BT = torch.where(chosen_BT & (fate_BT < HIDDEN), self._spec.mask_id, tokens_BT)
        replaced_BT = chosen_BT & (fate_BT >= HIDDEN) & (fate_BT < HIDDEN + REPLACED)
        return torch.where(replaced_BT, others_BT, inputs_BT), torch.nonzero(chosen_BT.flatten()).flatten()


def _logits_at(model: nn.Module, inputs_BT: Tensor, places_N: Tensor) -> Tensor:
    """Ours computes no others: the head is half of a small model's work. A user's model gives all of them."""
    if isinstance(model, GPT):
        logits_NV: Tensor = model(inputs_BT, places_N)
        return logits_NV
    return model(inputs_BT).flatten(0, 1)[places_N]
