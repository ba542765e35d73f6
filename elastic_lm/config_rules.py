"""Rules of a run's configuration that see more than one field. Each is told with the fields, the values and the remedy.

Invariant: nothing here needs the corpus or the cluster, so every broken rule is found before any actor starts, and all of
them at once. A rule yields a sentence for each way in which it is broken.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from elastic_lm import config_text, failpoints
from elastic_lm.engine.spec import CAUSAL, MASKED
from elastic_lm.errors import ConfigError
from elastic_lm.model.presets import PRESETS
from elastic_lm.model.spec import ModelSpec

if TYPE_CHECKING:
    from elastic_lm.config import ModelConfig, RunConfig

SECRET_NAME = re.compile(r"(^|_)(password|passwd|secret|api_?key|access_key|credentials?)(_|$)", re.IGNORECASE)
WANDB_KEY = re.compile(r"[0-9a-f]{40}|wandb_v\d", re.IGNORECASE)


def check(config: RunConfig) -> None:
    """Raises: ConfigError with a line for every rule that is broken."""
    rules = (
        _check_model, _check_objective, _check_optimizer, _check_schedule, _check_skip, _check_workers, _check_checkpoint,
        _check_spikes,
        _check_control, _check_metrics, _check_tracking, _check_failpoints,
    )  # fmt: skip
    if broken := [sentence for rule in rules for sentence in rule(config)]:
        raise ConfigError("\n".join(broken))


def _check_model(config: RunConfig) -> Iterator[str]:
    model, batch = config.model, config.batch
    if model.init is None and model.init_hash is not None:
        yield f"model.init_hash={model.init_hash[:12]} has no effect without model.init; set that, too, or remove it"
    if model.factory is not None:
        yield from _check_factory(model)
        if config.training.recompute:
            yield "training.recompute=true has no effect on a model of your own; remove it, or checkpoint activations there"
    else:
        yield from _check_shape(config)
    if model.max_tokens is not None and batch.sequence_length > model.max_tokens:
        yield (
            f"batch.sequence_length={batch.sequence_length} is longer than the model's context "
            f"model.max_tokens={model.max_tokens}; use at most {model.max_tokens}, or raise model.max_tokens"
        )


def _check_factory(model: ModelConfig) -> Iterator[str]:
    shape = {*ModelSpec.__dataclass_fields__, "document_masking", "init"} - {"vocab_size", "max_tokens"}
    for name, value in model:
        if name in {"preset", *shape} and value is not None:
            yield (f"model.factory builds the whole model, so model.{name} has no effect; remove one of the two")
    for name in config_text.flatten(model.args):
        if SECRET_NAME.search(name.rpartition(".")[2]):
            yield (
                f"model.args.{name} looks like a secret, and the config is stored with the run; rename it, or let the "
                "factory read it from the environment"
            )


def _check_shape(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.args:
        yield "model.args are for model.factory, which is not set; set it or remove model.args"
    if model.preset is not None and model.preset not in PRESETS:
        known = ", ".join(PRESETS)
        yield f"model.preset={model.preset!r} is unknown{config_text.hint(model.preset, PRESETS)}; known: {known}"
        return  # what it would have chosen is not known
    if model.is_open:
        return  # its folder says the rest
    if missing := [name for name in ("num_layers", "num_heads", "width") if name not in model.shape()]:
        yield (
            f"model.{missing[0]} is missing; set it, or choose model.preset ({', '.join(PRESETS)}), or give model.factory"
        )
        return
    try:
        config.model_spec(vocab_size=1)  # heads divide width, and the like
    except ConfigError as error:
        yield str(error)


def _check_objective(config: RunConfig) -> Iterator[str]:
    if config.objective.z_loss and config.objective.name not in (CAUSAL, MASKED):
        yield (
            f"objective.z_loss={config.objective.z_loss} has no effect with an objective of your own; remove it, or add it there"
        )
    if config.model.factory is not None or config.model.preset not in (None, *PRESETS):
        return  # what the model sees is not known
    attention = config.model.shape().get("attention")
    whence = f"model.preset={config.model.preset}" if config.model.attention is None else "model.attention"
    if config.objective.name == CAUSAL and attention == "bidirectional":
        yield (
            f"objective.name=causal predicts the next token, and with {whence} ({attention}) the model sees it; set "
            "objective.name: masked, or model.attention: causal"
        )
    if config.objective.name == MASKED and attention == "causal":
        yield (
            f"objective.name=masked predicts tokens from both sides, and with {whence} ({attention}) the model sees one; set "
            "model.attention: bidirectional, or objective.name: causal"
        )


def _check_schedule(config: RunConfig) -> Iterator[str]:
    schedule, total = config.schedule, config.schedule_steps
    where = "schedule.total_steps" if schedule.total_steps else "training.steps"
    if schedule.warmup_steps > total:
        yield (f"schedule.warmup_steps={schedule.warmup_steps} is more than {where}={total}; use at most {total}")
    if schedule.kind == "wsd" and not 1 <= schedule.decay_steps <= total - schedule.warmup_steps:
        yield (
            f"schedule.decay_steps={schedule.decay_steps} with kind wsd must be from 1 to {where} - warmup_steps = "
            f"{total - schedule.warmup_steps}; a tenth of the steps is usual"
        )
    if schedule.kind != "wsd" and schedule.decay_steps:
        yield (
            f"schedule.decay_steps={schedule.decay_steps} has no effect with kind {schedule.kind}; remove it or use kind: wsd"
        )


def _check_optimizer(config: RunConfig) -> Iterator[str]:
    optimizer = config.optimizer
    for index, beta in enumerate(optimizer.betas):
        if beta >= 1:
            yield f"optimizer.betas[{index}]={beta} is not below 1; 0.9 and 0.95 are usual"
    if optimizer.momentum is not None and optimizer.kind != "muon":
        yield (
            f"optimizer.momentum={optimizer.momentum} has no effect with kind {optimizer.kind}, whose decays are "
            "optimizer.betas; remove it or use kind: muon"
        )


def _check_skip(config: RunConfig) -> Iterator[str]:
    end = 0
    for index, (start, stop) in enumerate(config.training.skip):
        if not end <= start < stop:
            yield (
                f"training.skip[{index}]=[{start}, {stop}] is not a half-open range of batch indices that begins at or "
                f"after {end}; write ascending ranges [start, stop) with start < stop"
            )
        end = stop


def _check_workers(config: RunConfig) -> Iterator[str]:
    workers, micro_batches = config.workers, config.batch.micro_batches
    if workers.min > workers.max:
        yield (
            f"workers.min={workers.min} is more than workers.max={workers.max}; raise max to {workers.min} or lower min"
        )
    if workers.max > micro_batches:
        yield (
            f"workers.max={workers.max} is more than batch.micro_batches={micro_batches}: a worker without a micro-batch "
            f"has nothing to do; use at most {micro_batches} workers, or more and smaller micro-batches"
        )
    if workers.device == "cuda" and not workers.num_gpus:
        yield "workers.device=cuda needs workers.num_gpus above 0; set workers.num_gpus: 1"
    if config.training.precision == "tf32" and config.device != "cuda":
        yield f"training.precision=tf32 is for GPUs and workers compute on {config.device}; use fp32 or bf16"
    if workers.collectives == "nccl" and config.device != "cuda":
        yield "workers.collectives=nccl adds up on GPUs and workers compute on cpu; use gloo or auto"
    for name, amount in workers.resources.items():
        if not (math.isfinite(amount) and amount >= 0):
            yield f"workers.resources.{name}={amount} is not a finite amount from 0; write e.g. {name}: 1"


def _check_checkpoint(config: RunConfig) -> Iterator[str]:
    every, milestone = config.checkpoint.every_steps, config.checkpoint.keep_every
    if milestone is not None and (every is None or milestone % every):
        wanted = "set every_steps too" if every is None else f"use a multiple of {every}, e.g. {10 * every}"
        yield (
            f"checkpoint.keep_every={milestone} is not a multiple of checkpoint.every_steps={every}, so that most of what it "
            f"keeps is never saved; {wanted}"
        )
    if config.checkpoint.keep_best and every is None:
        yield (
            f"checkpoint.keep_best={config.checkpoint.keep_best} has no effect without checkpoint.every_steps: only the last "
            "step is saved; set that, too"
        )


def _check_spikes(config: RunConfig) -> Iterator[str]:
    spikes = config.spikes
    chosen = (("spikes.policy", spikes.policy), ("training.on_nonfinite", config.training.on_nonfinite))
    far = [f"{name}={policy}" for name, policy in chosen if policy == "rewind"]
    needed = spikes.rewind_steps + spikes.steps_in_a_row
    if far and spikes.skip_batches < needed:
        yield (
            f"spikes.skip_batches={spikes.skip_batches} ends before the spike does, {spikes.rewind_steps} batches later "
            f"(rewind_steps) and {spikes.steps_in_a_row} long (steps_in_a_row); use at least {needed}"
        )
    back = far or ([f"spikes.policy={spikes.policy}"] if spikes.goes_back else [])
    if back and config.checkpoint.every_steps is None:
        yield f"{back[0]} goes back to a checkpoint, and there is only one at the end; set checkpoint.every_steps"


def _check_control(config: RunConfig) -> Iterator[str]:
    control = config.control
    if control.heartbeat_timeout_s < 3 * control.heartbeat_interval_s:
        yield (
            f"control.heartbeat_timeout_s={control.heartbeat_timeout_s} is less than three beats of "
            f"control.heartbeat_interval_s={control.heartbeat_interval_s}, so one lost beat would evict a healthy worker; "
            f"use at least {3 * control.heartbeat_interval_s:g}"
        )
    if control.backoff_base_s > control.backoff_limit_s:
        yield (
            f"control.backoff_base_s={control.backoff_base_s} is more than control.backoff_limit_s="
            f"{control.backoff_limit_s}; use at most {control.backoff_limit_s:g}"
        )


def _check_metrics(config: RunConfig) -> Iterator[str]:
    certificate, key = config.metrics.tls_certificate, config.metrics.tls_key
    if (certificate is None) != (key is None):
        yield (
            f"metrics.tls_certificate={certificate} and metrics.tls_key={key} belong together; set both for an endpoint that "
            "speaks TLS, or neither"
        )


def _check_tracking(config: RunConfig) -> Iterator[str]:
    tracking = config.tracking
    writes = [
        field
        for field, wanted in (
            ("tensorboard=true", tracking.tensorboard),
            ("wandb_mode=offline", tracking.wandb_project and tracking.wandb_mode == "offline"),
        )
        if wanted
    ]
    if writes and tracking.folder is None and not config.storage.startswith("file://"):
        yield (
            f"tracking.{writes[0]} writes files, and the run is kept in {config.storage}; set tracking.folder to a folder on "
            "the head node"
        )
    if tracking.wandb_project is None and tracking.wandb_entity is not None:
        yield (
            f"tracking.wandb_entity={tracking.wandb_entity} has no effect without tracking.wandb_project; set that, too"
        )
    for field in ("wandb_project", "wandb_entity"):
        if WANDB_KEY.search(getattr(tracking, field) or ""):
            yield (
                f"tracking.{field} looks like a key, and the config is stored with the run; name the "
                f"{field.removeprefix('wandb_')}, and give the key by `wandb login` or WANDB_API_KEY on the head node"
            )


def _check_failpoints(config: RunConfig) -> Iterator[str]:
    for index, text in enumerate(config.failpoints):
        try:
            failpoints.parse(text)
        except ConfigError as error:
            yield f"failpoints[{index}]: {error}"
