"""A run's configuration: what can be chosen, what each choice means, and which choices go together.

Invariant: a `RunConfig` that exists is one that can be run; every rule that needs neither the corpus nor the cluster is
checked here, before any actor starts, and a broken rule is a `ConfigError` that names field, value and remedy. Fields
are *identity* (they change the bits of the result; see `identity`) or *operational*. No field holds a secret:
credentials come from the standard environment of the storage client, and addresses that contain some are refused.

`engine/` and `control/` do not know this file: it builds their stdlib dataclasses.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from elastic_lm import config_rules, config_text
from elastic_lm.control.spec import ControlSpec
from elastic_lm.engine.spec import CAUSAL, MASKED, EngineSpec, FactorySpec, MaskingSpec, OptimizerSpec, ScheduleSpec
from elastic_lm.errors import ConfigError
from elastic_lm.model.presets import PRESETS
from elastic_lm.model.spec import LATER, ModelSpec

SHAPE_NEEDS = {"num_layers", "num_heads", "width"}
CONFIG_FILE = "config.yaml"  # in the run's folder: what it was last trained with


IMPORT_PATH = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"


def _storage_address(url: str) -> str:
    """s3:// as it is, anything local as an absolute file:// address: workers run in folders of their own."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme == "file":
        folder = rest if separator else os.path.expanduser(url)
        if not folder.strip("/ ") or "\0" in folder or (separator and not rest.startswith("/")):
            raise ValueError("names no folder; write s3://bucket/prefix, file:///folder or a folder")
        return "file://" + os.path.abspath(folder)
    if scheme != "s3":
        raise ValueError(f"has the unknown scheme {scheme}://; write s3://bucket/prefix, file:///folder or a folder")
    bucket = rest.partition("/")[0]
    if "@" in rest or "?" in rest:
        raise ValueError(
            "may hold credentials (it has an @ or a ?), and the config is stored with the run; write the bare address "
            "and give credentials by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket):
        raise ValueError("names no bucket; write s3://bucket/prefix")
    return url.rstrip("/")


def _initial_weights(text: str) -> str:
    scheme, colon, folder = text.partition(":")
    if scheme != "hf" or not colon:
        raise ValueError("is no hf:FOLDER; write hf:/folder or hf:s3://bucket/prefix")
    return f"hf:{_storage_address(folder)}"


def _local_folder(path: str) -> str:
    scheme, separator, _ = path.partition("://")
    if separator and scheme != "file":
        raise ValueError("is no folder of a machine; write /folder or file:///folder")
    return _storage_address(path).removeprefix("file://")


def _import_path(path: str) -> str:
    if not re.fullmatch(IMPORT_PATH, path):
        raise ValueError("is not an import path; write package.module:function")
    return path


def _objective(name: str) -> str:
    if name in (CAUSAL, MASKED) or re.fullmatch(IMPORT_PATH, name):
        return name
    raise ValueError(f"is neither {CAUSAL} nor {MASKED} nor an import path; write package.module:function")


StorageAddress = Annotated[str, AfterValidator(_storage_address)]
InitialWeights = Annotated[str, AfterValidator(_initial_weights)]
LocalFolder = Annotated[str, AfterValidator(_local_folder)]
ObjectiveName = Annotated[str, AfterValidator(_objective)]
ImportPath = Annotated[str, AfterValidator(_import_path)]
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
Count = Annotated[int, Field(ge=1, le=2**40)]
Seconds = Annotated[float, Field(gt=0, le=1e7, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
BatchRange = Annotated[tuple[int, int], Field(strict=False)]


class Part(BaseModel):
    """A part of a configuration: strict (no guessing of types), frozen, unknown names refused."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)


class DataConfig(Part):
    """Where tokens come from and how they get to the workers."""

    tokens: StorageAddress = Field(examples=["s3://bucket/tokens"])
    """Address of a prepared corpus: what `elastic-lm prepare --out` was given."""
    manifest: str | None = Field(default=None, pattern=r"^[0-9a-f]{16,128}$", examples=["<hash from the manifest>"])
    """Hash of the corpus manifest. None: whatever is at `tokens`; the stored config holds what was found."""
    window_blocks: Count | None = None
    """Blocks that are read and shuffled together. None: chosen from the corpus; the stored config holds the choice."""
    readers: int = Field(default=2, ge=1, le=1024)
    """Reader actors. Two keep every window available while one is replaced; one feeds 8 GPUs at 124M parameters."""
    reader_num_cpus: Amount = 0.0
    """CPUs that the scheduler sets aside for each reader. A reader uses about 3 CPU seconds per GB of tokens."""
    prefetch_windows: int = Field(default=2, ge=1, le=64)
    """Windows that a reader fetches ahead of what was asked of it."""
    reader_timeout_s: Seconds = 5.0
    """A reader that is silent for this long is replaced, and its windows come from another."""
    storage_timeout_s: Seconds = 3600.0
    """Training waits this long for tokens, or the checkpoint it goes on from, that storage does not give; then the run ends,
    and the same command goes on with it. An hour outlasts most outages of object stores, and is what the event log can keep."""


class ModelConfig(Part):
    """The model: a preset, a shape, a preset with a changed shape, or a factory function of your own."""

    preset: str | None = Field(default=None, examples=["tiny"])
    """A known shape by name."""
    num_layers: int | None = Field(default=None, ge=1, le=10_000)
    """Transformer blocks."""
    num_heads: int | None = Field(default=None, ge=1, le=10_000)
    """Attention heads; they divide the width."""
    width: int | None = Field(default=None, ge=1, le=1_000_000)
    """Model dimension D."""
    hidden: int | None = Field(default=None, ge=1, le=4_000_000)
    """Width inside a feed-forward block. None: 4 D for GELU, 8/3 D rounded up to a multiple of 16 for SwiGLU."""
    position: Literal["learned", "sinusoidal", "rotary"] | None = None
    """How positions enter. None: the preset's, or rotary."""
    norm: Literal["rmsnorm", "layernorm"] | None = None
    """Normalisation. None: the preset's, or rmsnorm."""
    activation: Literal["swiglu", "gelu", "gelu_erf"] | None = None
    """Feed-forward activation; gelu is its approximation by tanh, gelu_erf the function itself. None: the preset's, or swiglu."""
    tied: bool | None = None
    """Whether the head shares the embedding's matrix. None: the preset's, or true."""
    bias: bool | None = None
    """Whether linear layers have a bias. None: the preset's, or false."""
    dropout: float | None = Field(default=None, ge=0, lt=1, allow_inf_nan=False)
    """Dropout probability. None: 0, the choice of today's pre-training."""
    attention: Literal["causal", "bidirectional"] | None = None
    """What each token sees: those before it, or all. None: the preset's, or what the objective needs."""
    num_kv_heads: int | None = Field(default=None, ge=1, le=10_000)
    """Heads of keys and values, each shared by a group of queries' (GQA). None: the preset's, or as many as num_heads."""
    qk_norm: bool | None = None
    """Whether queries and keys are normalised in each head, which keeps their products small. None: the preset's, or false."""
    norm_placement: Literal["pre", "post", "sandwich"] | None = None
    """Norms before each part of a block, after its sum, or on both sides of it. None: the preset's, or pre."""
    embedding_norm: bool | None = None
    """Whether there is a norm behind the embedding. None: the preset's, or false."""
    norm_eps: float | None = Field(default=None, gt=0, lt=1, allow_inf_nan=False)
    """What norms add to the mean square, against a division by zero. None: the preset's, or 1e-5."""
    head_transform: bool | None = None
    """Whether a layer, activation and norm stand before the head, as in BERT. None: the preset's, or false."""
    rope_theta: float | None = Field(default=None, gt=1, le=1e12, allow_inf_nan=False)
    """Base of rotary positions: the larger, the slower the slowest pair turns. None: 10000; 500000 is usual for long contexts."""
    rope_scaling: Literal["linear", "yarn", "llama3"] | None = None
    """How rotary positions are stretched to a context beyond the one that the model was trained with. None: they are not."""
    rope_factor: float | None = Field(default=None, ge=1, le=1e6, allow_inf_nan=False, examples=[8.0])
    """By how much rope_scaling stretches: the new context by the old one."""
    rope_original_tokens: Count | None = Field(default=None, examples=[8192])
    """The context that the model was trained with; for rope_scaling yarn and llama3."""
    document_masking: bool | None = None
    """Whether tokens see those of their own document only, where a sample holds several. None: false, they see all."""
    max_tokens: Count | None = None
    """Longest sequence the model can read (its context). None: batch.sequence_length."""
    vocab_size: Count | None = None
    """Rows of the embedding. None: the corpus's vocabulary. More is allowed: a multiple of 64 is faster on GPUs."""
    init: InitialWeights | None = Field(default=None, examples=["hf:s3://bucket/model"])
    """Weights to begin from: hf:FOLDER, one that transformers wrote (Llama, Qwen3, GPT-2, BERT), where every worker sees it. Its
    shape becomes the model's. None: random ones, by the seed."""
    init_hash: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """sha256 of the weights in `init`. None: whatever is there; the stored config holds what was found."""
    factory: ImportPath | None = Field(default=None, examples=["my_package.models:build"])
    """Your own model: package.module:function, called with vocab_size, max_tokens and `args`; returns an nn.Module."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for `factory`."""

    @property
    def is_open(self) -> bool:
        """Whether the shape is still to be read from the folder of `init`."""
        return self.init is not None and not self.shape().keys() >= SHAPE_NEEDS

    def shape(self) -> dict[str, Any]:
        """Fields of ModelSpec that the preset and this config choose."""
        chosen = {name: value for name, value in self if name in ModelSpec.__dataclass_fields__ and value is not None}
        return {**(PRESETS[self.preset].shape if self.preset else {}), **chosen}


class ObjectiveConfig(Part):
    """What the model learns to do."""

    name: ObjectiveName = CAUSAL
    """`causal` (predict the next token), `masked` (predict hidden ones from both sides, as BERT), or
    package.module:function with (model, tokens) -> (loss sum, targets)."""
    mask_ratio: float = Field(default=0.15, gt=0, lt=1, allow_inf_nan=False)
    """Share of the tokens that `masked` predicts: 80 % of them hidden, 10 % replaced, 10 % as they are."""

    z_loss: Amount = 0.0
    """Weight of log(Z)^2 beside the loss of `causal` or `masked`, Z being what the softmax divides by: keeps logits from drifting
    off. 1e-4 is usual (PaLM). The loss that is told is without it."""

    def identity(self) -> dict[str, Any]:
        """The choices that change bits."""
        unused = {name for name, used in (("mask_ratio", self.name == MASKED), ("z_loss", self.z_loss)) if not used}
        return self.model_dump(exclude=unused)


class BatchConfig(Part):
    """The global batch: `micro_batches` x `micro_batch_size` samples, whatever the number of workers."""

    micro_batches: int = Field(ge=1, le=65_536, examples=[8])
    """Micro-batches of every step (M): the atoms of work that are spread over the workers."""
    micro_batch_size: int = Field(ge=1, le=65_536, examples=[2])
    """Samples in a micro-batch: what one worker computes at a time, bounded by its memory."""
    sequence_length: int = Field(ge=1, le=2**24, examples=[256])
    """Targets per sample, in tokens (T)."""

    @property
    def samples(self) -> int:
        return self.micro_batches * self.micro_batch_size

    @property
    def tokens(self) -> int:
        return self.samples * self.sequence_length


class OptimizerConfig(Part):
    """How weights follow from gradients. Weight decay applies to matrices only."""

    kind: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon for the matrices within the model and AdamW for embeddings, head and vectors. Learning rates that suit one
    suit the other."""
    learning_rate: float = Field(default=3e-4, gt=0, allow_inf_nan=False)
    """Peak learning rate. The default suits models around 100M parameters."""
    betas: tuple[Share, Share] = Field(default=(0.9, 0.95), strict=False)
    """Decay of AdamW's two moments, each below 1. 0.95 is the usual choice for language models."""
    eps: float = Field(default=1e-8, gt=0, allow_inf_nan=False)
    """Added to the root of the second moment."""
    weight_decay: Amount = 0.1
    """Decoupled weight decay, per unit of learning rate."""
    clip_norm: float | None = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Largest global L2 norm of the gradient. None: no clipping."""
    momentum: float | None = Field(default=None, ge=0, lt=1, allow_inf_nan=False, examples=[0.9])
    """Decay of Muon's momentum, below 1. None: 0.95."""

    def spec(self) -> OptimizerSpec:
        """For the engine."""
        momentum = OptimizerSpec.momentum if self.momentum is None else self.momentum
        return OptimizerSpec(**{**dict(self), "momentum": momentum})

    def identity(self) -> dict[str, Any]:
        """Runs with AdamW are the ones that they were before there was another."""
        chosen = asdict(self.spec())
        if self.kind == "adamw":
            del chosen["kind"], chosen["momentum"]
        return chosen


class ScheduleConfig(Part):
    """The learning rate over steps."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine decay, or a plateau with a linear decay at the end (wsd), or the peak for ever."""
    warmup_steps: int = Field(default=0, ge=0, le=2**40)
    """Steps of linear warm-up."""
    decay_steps: int = Field(default=0, ge=0, le=2**40, examples=[10])
    """Steps of the final decay; wsd only."""
    final_ratio: Share = 0.1
    """Learning rate at the end, as a share of the peak."""
    total_steps: Count | None = None
    """Where the decay ends. None: training.steps. Set it to be able to change training.steps later."""


class TrainingConfig(Part):
    """How long, from which seed, in which precision."""

    steps: Count = Field(examples=[1000])
    """Optimizer updates."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Determines initial weights, order of samples and dropout."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Precision of matrix products; weights, moments and sums are fp32 or more in all. bf16 suits GPUs since Ampere, fp16 those
    before: its losses are scaled, and a step that overflows is computed again with half the scale. tf32: fp32 with products of
    fewer bits, GPUs since Ampere."""
    recompute: bool = False
    """Whether the insides of each block are computed again in backward instead of kept: about a third more work, and the memory
    of one block in place of all. The same bits, so it can be changed when a run is resumed."""
    compile: bool = False
    """Whether blocks are compiled (torch.compile), without run-time choice of kernels. Meant for GPUs, where it was not measured
    yet; on CPUs about as fast. A worker's start takes up to a minute longer, once per machine. Needs a C++ compiler on every
    node, on GPUs Triton."""
    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    """What a non-finite or out-of-range gradient does, before it touches the weights: stop the run, leave the step out, or go
    back and leave out batches as after a loss spike (see spikes). A run that leaves out 10 steps on end stops, too."""
    skip: tuple[BatchRange, ...] = Field(default=(), strict=False, examples=[[[500, 520]]])
    """Batches that are left out: half-open ranges of batch indices, ascending. The learning rate follows the step."""

    def identity(self) -> dict[str, Any]:
        """What changes the bits. Compilation came later: without it, runs have the fingerprint they had."""
        operational = {"steps", "recompute", "on_nonfinite"}
        return self.model_dump(exclude=operational if self.compile else {*operational, "compile"})


class ReductionConfig(Part):
    """How gradients are added up."""

    kind: Literal["exact", "fast"] = "exact"
    """`exact`: integer sums, the same bits for any workers. `fast`: fp32 sums, a few per cent faster, no promise."""


class WorkersConfig(Part):
    """The elastic set of workers and what each of them holds."""

    min: int = Field(default=1, ge=1, le=65_536)
    """Workers needed to start, or to start again after all were lost. Survivors go on below it."""
    max: int = Field(default=1, ge=1, le=65_536)
    """Workers wanted; more are never started."""
    num_cpus: Amount = 1.0
    """CPUs of the cluster that each worker holds."""
    num_gpus: Amount = 0.0
    """GPUs of the cluster that each worker holds."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom cluster resources that each worker holds."""
    threads: int = Field(default=1, ge=1, le=1024)
    """Compute threads per worker on CPU. Part of the environment that equal bits depend on."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where workers compute. auto: cuda when num_gpus is above 0, else cpu."""
    collectives: Literal["auto", "gloo", "nccl"] = "auto"
    """What adds up gradients. auto: nccl when every worker has a GPU of its own; on CPUs shared memory while all workers are
    on one machine; else gloo. Exact sums are the same."""


class CheckpointConfig(Part):
    """Saving. A checkpoint is needed only when every worker is lost; the last step is always saved."""

    every_steps: Count | None = None
    """Steps between checkpoints. None: only at the end."""
    timeout_s: Seconds = ControlSpec.checkpoint_timeout_s
    """One that is not stored after this long is given up, and the next one is tried. It is for a store that hangs: one that
    fails says so itself within about a minute."""
    fallback: LocalFolder | None = Field(default=None, examples=["/data/fallback"])
    """A folder on the nodes, where the last state goes, below runs/<name>, when the run ends and storage takes no checkpoint
    of it. None: it is lost then, back to the newest checkpoint."""
    keep: int = Field(default=2, ge=1, le=1_000_000)
    """Newest complete checkpoints that are kept."""
    keep_every: Count | None = None
    """Steps: a checkpoint of every multiple of this is kept for good. None: none is."""
    keep_best: int = Field(default=0, ge=0, le=1_000_000)
    """Checkpoints that are kept because their training loss, the mean of the 100 steps before, was lowest. 0: none is."""


class EvaluationConfig(Part):
    """How well the model predicts held-out text, while it is trained. It has no say in the weights."""

    every: Count | None = Field(default=None, examples=[500])
    """Steps between evaluations; one more comes at the end. Workers share each, between two steps. None: there are none."""
    samples: Count | None = 512
    """Held-out samples of batch.sequence_length tokens, at most; the same ones each time. None: all."""


class SpikesConfig(Part):
    """What a loss spike does (docs/spikes.md). Which batches it leaves out counts for a run's bits, these choices do not."""

    policy: Literal["ignore", "stop", "skip", "rewind"] = "ignore"
    """stop: end the run. rewind: go back to a checkpoint from before the spike, and leave out the batches around it. skip: the
    same, but leave out no more than the batches of the steps that stand out."""
    window_steps: int = Field(default=200, ge=20, le=5_000)
    """Steps that the next one is compared with."""
    loss_z: float = Field(default=6.0, gt=0, allow_inf_nan=False)
    """A loss stands out when it is so many robust standard deviations above the window's median."""
    gradient_z: float | None = Field(default=8.0, gt=0, allow_inf_nan=False)
    """The same for the logarithm of the gradient's norm. None: it is not looked at."""
    steps_in_a_row: int = Field(default=3, ge=1, le=1_000)
    """Steps on end that have to stand out to be a spike."""
    rewind_steps: int = Field(default=100, ge=0, le=5_000)
    """How many steps before its first step a run goes back."""
    skip_batches: Count = 300
    """How many batches are left out then, from there on."""
    max_rewinds: Count = 5
    """How often a run may go back. Another spike then stops it."""
    accept_until: Count | None = Field(default=None, examples=[4813])
    """What stands out, or was left out on end, before this step has been looked at, and no longer ends the run. None: nothing
    has. A run that ended for it says the number."""

    def accepts(self, step: int) -> bool:
        """Whether what came of this step was looked at."""
        return self.accept_until is not None and step < self.accept_until

    @property
    def goes_back(self) -> bool:
        return self.policy in ("skip", "rewind")


class ControlConfig(Part):
    """Deadlines and limits of the control path. The defaults suit one machine and one rack alike."""

    heartbeat_interval_s: Seconds = 0.2
    """How often a worker says that it lives."""
    heartbeat_timeout_s: Seconds = ControlSpec.heartbeat_timeout_s
    """Silence that makes a worker a suspect; a margin for the load of the machine is added."""
    lost_connection_grace_s: Seconds = ControlSpec.lost_connection_grace_s
    """A worker whose connection closed has this long to come back."""
    progress_timeout_s: Seconds = ControlSpec.progress_timeout_s
    """A worker that lives but gets nothing done for this long is replaced."""
    start_timeout_s: Seconds = ControlSpec.start_timeout_s
    """A worker that is placed has this long to import, build and warm up."""
    form_timeout_s: Seconds = 10.0
    """Last resort for forming a group; the coordinator's fence comes long before it."""
    retire_timeout_s: Seconds = 5.0
    """A worker that was asked to leave is ended after this long."""
    orphaned_after_s: Seconds = Field(default=60.0, ge=15.0)
    """A worker without a sign of life from any coordinator ends itself after this long; until then one may take it over."""
    join_batch_s: Seconds = ControlSpec.join_batch_s
    """Workers that become ready this close together enter together."""
    lease_steps: Count = ControlSpec.lease_steps
    """Steps of the longest lease. A lease ends early when something is to be changed, so long ones cost nothing."""
    backoff_base_s: Seconds = ControlSpec.backoff_base_s
    """Pause after a node's first crash; it doubles with each one."""
    backoff_limit_s: Seconds = ControlSpec.backoff_limit_s
    """Longest such pause."""
    quarantine_failures: int = Field(default=ControlSpec.quarantine_failures, ge=1, le=1_000_000)
    """A node with this many failures within quarantine_window_s gets no more workers."""
    quarantine_window_s: Seconds = ControlSpec.quarantine_window_s
    """See quarantine_failures."""
    straggler_factor: float = Field(default=ControlSpec.straggler_factor, gt=1, allow_inf_nan=False)
    """A worker slower than the median by this factor is named."""
    rebalance_gain: Share = ControlSpec.rebalance_gain
    """A running lease is ended early when another split would be faster by this share."""
    rebalance_every_s: Seconds = ControlSpec.rebalance_every_s
    """At most one such rebalancing in this time."""
    same_error_limit: int = Field(default=ControlSpec.same_error_limit, ge=1, le=1_000_000)
    """The same exception at the same step this many times stops the run."""


class MetricsConfig(Part):
    """What watchers get."""

    port: int | None = Field(default=9464, ge=0, le=65_535)
    """Port of the Prometheus endpoint; the next free one when it is taken, 0 for any, None for no endpoint."""
    host: str = "127.0.0.1"
    """Address that the endpoint listens on. 0.0.0.0 lets other machines scrape; there is no authentication."""
    tls_certificate: LocalFolder | None = Field(default=None, examples=["/etc/elastic-lm/tls.crt"])
    """PEM file on the head node, a chain that begins with the endpoint's certificate: it then speaks HTTPS alone."""
    tls_key: LocalFolder | None = Field(default=None, examples=["/etc/elastic-lm/tls.key"])
    """PEM file on the head node: the certificate's private key, without a passphrase."""
    interval_s: Seconds = 5.0
    """Time between two lines of progress."""


class TrackingConfig(Part):
    """Copies of the metrics in other tools (docs/tracking.md). Whatever becomes of them, training goes on."""

    tensorboard: bool = False
    """Write scalars for TensorBoard, to `tensorboard` in the run's folder. Needs elastic-lm[tensorboard]."""
    wandb_project: str | None = Field(default=None, pattern=r"^[^/\\#?%:]{1,128}$", examples=["my-project"])
    """Project at Weights & Biases; None: nothing goes there. Needs elastic-lm[wandb], and a key on the head node."""
    wandb_entity: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]{1,128}$")
    """User or team there; None: that of the key."""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline: into files in `wandb` in the run's folder, for `wandb sync`."""
    folder: LocalFolder | None = Field(default=None, examples=["/data/tracking"])
    """Where on the head node the files go instead, below the run's name. For runs that are kept in object storage."""


class RunConfig(Part):
    """One training run. Build it from a file (`RunConfig.load`) or from parts; either way it is checked whole."""

    name: str = Field(pattern=RUN_NAME, examples=["my-run"])
    """Name of the run: it resumes the run of that name if there is one."""
    storage: StorageAddress = Field(examples=["s3://bucket/prefix"])
    """Where runs are kept: the run's own folder is runs/<name> in it."""
    data: DataConfig
    """Where tokens come from."""
    model: ModelConfig
    """The model."""
    batch: BatchConfig
    """The global batch."""
    training: TrainingConfig
    """How long, from which seed, in which precision."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is learned."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW or Muon."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over steps."""
    reduction: ReductionConfig = ReductionConfig()
    """How gradients are added up."""
    workers: WorkersConfig = WorkersConfig()
    """The elastic set."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out text."""
    spikes: SpikesConfig = SpikesConfig()
    """What a loss spike does."""
    control: ControlConfig = ControlConfig()
    """Deadlines and limits."""
    metrics: MetricsConfig = MetricsConfig()
    """What watchers get."""
    tracking: TrackingConfig = TrackingConfig()
    """Copies of the metrics in other tools."""
    failpoints: tuple[str, ...] = Field(default=(), strict=False, examples=[["w2:optimizer.middle@7=kill"]])
    """Faults to inject, for tests: MEMBER:NAME@STEP=ACTION."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(config_text.sentences(error, type(self))) from None

    # -- reading and writing -----------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
        """The YAML file at `path`, with `a.b=value` overrides applied on top.    Raises: ConfigError."""
        return cls(**config_text.override(config_text.read(path), overrides))

    @classmethod
    def from_yaml(cls, text: str, source: str, overrides: Sequence[str] = ()) -> RunConfig:
        """The same from YAML text; `source` says in errors where it is from.    Raises: ConfigError."""
        return cls(**config_text.override(config_text.mapping(text, source), overrides))

    def replace(self, *overrides: str) -> RunConfig:
        """This config with `a.b=value` overrides, checked again.    Raises: ConfigError."""
        return RunConfig(**config_text.override(self.model_dump(mode="json"), overrides))

    def settled(self, *, manifest: str, window_blocks: int) -> RunConfig:
        """This config with what was left to the corpus filled in.    Raises: ConfigError when it named another corpus."""
        if self.data.manifest not in (None, manifest):
            raise ConfigError(
                f"data.manifest={self.data.manifest} is not the corpus at data.tokens={self.data.tokens}, whose manifest "
                f"has the hash {manifest}; point data.tokens at the right corpus or remove data.manifest"
            )
        data = self.data.model_dump() | {
            "manifest": manifest,
            "window_blocks": self.data.window_blocks or window_blocks,
        }
        return RunConfig(**{name: value for name, value in self if name != "data"}, data=DataConfig(**data))

    def to_yaml(self) -> str:
        """The resolved config, every field spelled out; `load` of it gives an equal one."""
        return config_text.dump(self.model_dump(mode="json"))

    # -- what follows from it ----------------------------------------------------------------------------------------

    def order_fields(self) -> dict[str, Any]:
        """What the order of samples depends on beside the corpus: arguments of `Manifest.order`."""
        return {
            "sequence_length": self.batch.sequence_length,
            "micro_batches": self.batch.micro_batches,
            "micro_batch_size": self.batch.micro_batch_size,
            "seed": self.training.seed,
            "window_blocks": self.data.window_blocks,
            "skip": self.training.skip,
        }

    @property
    def run_url(self) -> str:
        """Where everything about this run is kept."""
        return f"{self.storage}/runs/{self.name}"

    @property
    def device(self) -> str:
        if self.workers.device != "auto":
            return self.workers.device
        return "cuda" if self.workers.num_gpus else "cpu"

    @property
    def collectives(self) -> Literal["auto", "gloo", "nccl"]:
        if self.workers.collectives != "auto" or self.device == "cpu":
            return self.workers.collectives
        return "nccl" if self.workers.num_gpus >= 1 else "gloo"

    @property
    def schedule_steps(self) -> int:
        """Where the learning rate's schedule ends."""
        return self.schedule.total_steps or self.training.steps

    def model_spec(self, vocab_size: int, special_ids: Mapping[str, int] | None = None) -> ModelSpec | FactorySpec:
        """For the engine, with this many rows in the embedding; `special_ids` of the corpus are for document masking.

        Raises: ConfigError when the shape breaks a rule.
        """
        max_tokens = self.model.max_tokens or self.batch.sequence_length
        if self.model.factory is not None:
            return FactorySpec(self.model.factory, vocab_size, max_tokens, dict(self.model.args))
        if self.model.is_open:
            raise ConfigError(
                f"the model's shape is in the folder of model.init={self.model.init}, which was not read yet"
            )
        needed: dict[str, Any] = {"attention": "bidirectional"} if self.objective.name == MASKED else {}
        if self.model.document_masking and special_ids is not None:
            needed["document_separator"] = special_ids["end_of_text"]
        return ModelSpec(**{**needed, **self.model.shape(), "vocab_size": vocab_size, "max_tokens": max_tokens})

    def engine_spec(self, vocab_size: int, special_ids: Mapping[str, int] | None = None) -> EngineSpec:
        """For the engine. `vocab_size` and `special_ids` are the corpus's; the latter are for masks of any kind.

        Raises: ConfigError when the model's vocabulary is smaller.
        """
        if self.model.vocab_size is not None and self.model.vocab_size < vocab_size:
            raise ConfigError(
                f"model.vocab_size={self.model.vocab_size} is smaller than the corpus's vocabulary of {vocab_size} tokens; "
                f"use at least {vocab_size}, or remove it"
            )
        return EngineSpec(
            model=self.model_spec(self.model.vocab_size or vocab_size, special_ids),
            micro_batches=self.batch.micro_batches,
            micro_batch_size=self.batch.micro_batch_size,
            sequence_length=self.batch.sequence_length,
            optimizer=self.optimizer.spec(),
            schedule=ScheduleSpec(**{**dict(self.schedule), "total_steps": self.schedule_steps}),
            objective=self.objective.name,
            masking=self._masking(vocab_size, special_ids),
            z_loss=self.objective.z_loss,
            seed=self.training.seed,
            precision=self.training.precision,
            reduction=self.reduction.kind,
            on_nonfinite="skip" if self.training.on_nonfinite == "skip" else "stop",
            recompute=self.training.recompute,
            compile=self.training.compile,
            device=self.device,
            threads=self.workers.threads,
            collectives=self.collectives,
        )

    @property
    def predicted(self) -> float:
        """The share of tokens that the objective predicts; one of the user's own is taken to predict all."""
        return self.objective.mask_ratio if self.objective.name == MASKED else 1.0

    def _masking(self, vocab_size: int, special_ids: Mapping[str, int] | None) -> MaskingSpec | None:
        if self.objective.name != MASKED or special_ids is None:
            return None
        return MaskingSpec(
            self.objective.mask_ratio, special_ids["mask"], tuple(sorted(special_ids.values())), vocab_size
        )

    def control_spec(self) -> ControlSpec:
        """For the control path."""
        limits = {name: value for name, value in self.control if name in ControlSpec.__dataclass_fields__}
        return ControlSpec(
            min_workers=self.workers.min,
            max_workers=self.workers.max,
            num_micro_batches=self.batch.micro_batches,
            total_steps=self.training.steps,
            checkpoint_every=self.checkpoint.every_steps,
            checkpoint_timeout_s=self.checkpoint.timeout_s,
            exact=self.reduction.kind == "exact",
            evaluate_every=self.evaluation.every,
            **limits,
        )

    def identity(self) -> dict[str, Any]:
        """The choices that change the bits of the result, nested as in the file. A corpus is its manifest, not its place."""
        schedule = self.schedule.model_dump() | {"total_steps": self.schedule_steps}
        if self.schedule.kind == "constant":
            del schedule["total_steps"]
        corpus = {"manifest": self.data.manifest} if self.data.manifest else {"tokens": self.data.tokens}
        model = asdict(self.model_spec(0)) | {"vocab_size": self.model.vocab_size}
        model = {name: value for name, value in model.items() if LATER.get(name, ...) != value}
        if self.model.init is not None:  # what it holds, once that is known
            model |= {"init_hash": self.model.init_hash} if self.model.init_hash else {"init": self.model.init}
        if self.model.document_masking:  # by which token follows from the corpus
            model["document_masking"] = True
        if self.model.factory is not None:  # in the words of the file
            model["factory"], model["args"] = model.pop("path"), model.pop("arguments")
        return {
            "data": {**corpus, "window_blocks": self.data.window_blocks},
            "model": model,
            "objective": self.objective.identity(),
            "batch": self.batch.model_dump(),
            "optimizer": self.optimizer.identity(),
            "schedule": schedule,
            "training": self.training.identity(),
            "reduction": self.reduction.model_dump(),
        }

    @property
    def may_go_back(self) -> bool:
        """Something makes the run go back to a checkpoint by itself."""
        return self.spikes.goes_back or self.training.on_nonfinite == "rewind"

    def identity_fingerprint(self) -> str:
        """sha256 of `identity`, hex."""
        text = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def identity_changes(self, earlier: RunConfig) -> list[str]:
        """What would change the bits of a run that began as `earlier`: one `a.b: was -> is` per field."""
        found = config_text.differences(earlier.identity(), self.identity())
        return [f"{name}: {was!r} -> {now!r}" for name, was, now in found]

    def describe(self) -> str:
        """The derived figures that a user should see before the run starts."""
        batch, total = self.batch, self.batch.tokens * self.training.steps
        return (
            f"Run {self.name}: {self.training.steps:,} steps of {batch.micro_batches} x {batch.micro_batch_size} samples x "
            f"{batch.sequence_length} tokens = {batch.tokens:,} tokens per step, {total:,} in all; {self.workers.min} to "
            f"{self.workers.max} workers on {self.device}; reduction {self.reduction.kind}."
        )

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        config_rules.check(self)
        return self
