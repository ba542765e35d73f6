"""The masked objective: predict tokens that were hidden, from both sides (Devlin et al. 2019, BERT).

Of all tokens but the special ones a share is chosen; of these 80 % become the mask, 10 % any ordinary token, and 10 % stay.
Invariant: which ones follows from the generator that the replica has seeded for this (seed, step, micro-batch), which names
samples and epoch; it is drawn on the host, so neither the device nor who computes the micro-batch has a say.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from elastic_lm.engine.cross_entropy import Targets, loss_at
from elastic_lm.engine.spec import MaskingSpec

HIDDEN, REPLACED = 0.8, 0.1  # of those that are chosen; the rest stay as they are


class Masked:
    """Minimise the sum of -log P(x_t | the corrupted sequence) over the chosen t. Of S = T + 1 tokens the first T are read."""

    def __init__(self, spec: MaskingSpec, z_loss: float = 0.0) -> None:
        self._spec, self._z_loss = spec, z_loss
        special = torch.zeros(spec.vocab_size, dtype=torch.bool)
        special[list(spec.special_ids)] = True
        self._special, self._ordinary = special, torch.nonzero(~special).flatten()

    def __call__(self, model: nn.Module, tokens_BS: Tensor) -> tuple[Tensor, int]:
        """Returns: the summed negative log-likelihood in nats (fp32 scalar), and how many tokens were chosen."""
        inputs_BT, targets_N, chosen_N = self.targets(tokens_BS)
        return loss_at(model, inputs_BT, targets_N, chosen_N, z_loss=self._z_loss), targets_N.numel()

    def targets(self, tokens_BS: Tensor) -> Targets:
        """What is read, what is to be predicted, and where; drawn from torch's host generator."""
        tokens_BT = tokens_BS[:, :-1].cpu()  # they were sent a moment ago, and nothing else is under way
        inputs_BT, chosen_N = self.corrupt(tokens_BT)
        device = tokens_BS.device
        return inputs_BT.to(device), tokens_BT.flatten()[chosen_N].to(device), chosen_N.to(device)

    def corrupt(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(what the model reads, places of the chosen tokens in the flattened batch), drawn from torch's host generator."""
        chance_BT, fate_BT = torch.rand(tokens_BT.shape), torch.rand(tokens_BT.shape)
        others_BT = self._ordinary[torch.randint(len(self._ordinary), tokens_BT.shape)]
        chosen_BT = (chance_BT < self._spec.ratio) & ~self._special[tokens_BT]
        inputs_BT = torch.where(chosen_BT & (fate_BT < HIDDEN), self._spec.mask_id, tokens_BT)
        replaced_BT = chosen_BT & (fate_BT >= HIDDEN) & (fate_BT < HIDDEN + REPLACED)
        return torch.where(replaced_BT, others_BT, inputs_BT), torch.nonzero(chosen_BT.flatten()).flatten()
