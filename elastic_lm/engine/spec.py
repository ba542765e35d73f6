"""What the engine needs to know about a run, as stdlib dataclasses: it works where neither pydantic nor ray is installed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from elastic_lm.model.spec import ModelSpec

CAUSAL, MASKED = "causal", "masked"  # the objectives that are ours
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Collectives = Literal["auto", "gloo", "nccl"]  # auto: shared memory where all members are on one machine, else gloo


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW (Loshchilov and Hutter, 2019), or Muon (Jordan et al. 2024) for the matrices within a model and AdamW for the rest.

    Weight decay applies to matrices, not to vectors. `betas` and `eps` are AdamW's, `momentum` is Muon's.
    """

    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    kind: Literal["adamw", "muon"] = "adamw"
    momentum: float = 0.95


@dataclass(frozen=True)
class ScheduleSpec:
    """The learning rate over steps: linear warm-up, then `kind`, down to `final_ratio` of the peak.

    `cosine` decays over all remaining steps; `wsd` stays at the peak and decays linearly over the last `decay_steps`;
    `constant` stays.
    """

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 0
    total_steps: int = 1
    decay_steps: int = 0
    final_ratio: float = 0.1


@dataclass(frozen=True)
class FactorySpec:
    """A user's model: `path` is `package.module:function`, called with vocab_size, max_tokens and `arguments`."""

    path: str
    vocab_size: int
    max_tokens: int
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MaskingSpec:
    """What the masked objective hides. `vocab_size`: of the corpus. Special ids are neither hidden nor put in another's place."""

    ratio: float
    mask_id: int
    special_ids: tuple[int, ...]
    vocab_size: int


@dataclass(frozen=True)
class EngineSpec:
    """One run, as far as its bits are concerned, and the device it runs on.

    `objective` is `causal` or `masked` (which takes `masking`), both with `z_loss`; or an import path
    `package.module:function` with (model, tokens [m, T+1]) -> (loss sum, number of targets). A batch is `micro_batches` x
    `micro_batch_size` samples of `sequence_length` tokens. `recompute`: a block's insides are computed again in backward
    instead of kept; the same bits. `compile`: blocks are compiled; other bits. `on_nonfinite`: what becomes of a
    step with values that are not finite or out of range: an exception, or nothing but the next step.
    """

    model: ModelSpec | FactorySpec
    micro_batches: int
    micro_batch_size: int
    sequence_length: int
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    objective: str = CAUSAL
    masking: MaskingSpec | None = None
    z_loss: float = 0.0
    seed: int = 0
    precision: Precision = "fp32"
    reduction: Literal["exact", "fast"] = "exact"
    on_nonfinite: Literal["stop", "skip"] = "stop"
    recompute: bool = False
    compile: bool = False
    device: str = "cpu"
    threads: int = 1
    collectives: Collectives = "auto"

    @property
    def targets_per_batch(self) -> int:
        """At the most; of a masked objective about as many."""
        tokens = self.micro_batches * self.micro_batch_size * self.sequence_length
        return tokens if self.masking is None else max(1, round(self.masking.ratio * tokens))
