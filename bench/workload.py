"""The work that both sides of a comparison do: a model, a batch, a precision. The defaults are those of the published figures."""

from __future__ import annotations

import argparse
import resource
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from elastic_lm.model.flops import peak_flops, training_flops_per_token
from elastic_lm.model.presets import PRESETS
from elastic_lm.model.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


def _option(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class Workload:
    """A step of a benchmark; synthetic tokens, each micro-batch a pure function of its place."""

    preset: str = _option("10m", "shape of the model", choices=tuple(PRESETS))
    vocab_size: int = _option(256, "tokens of the vocabulary")
    sequence_length: int = _option(256, "tokens of a sample")
    micro_batches: int = _option(8, "of a step, over all processes")
    micro_batch_size: int = _option(2, "samples of a micro-batch")
    precision: str = _option("fp32", "of matrix products", choices=PRECISIONS)
    device: str = _option("cpu", "cpu or cuda")

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """An option for each field."""
        for name, option in cls.__dataclass_fields__.items():
            told = {"type": type(option.default), "default": option.default, **option.metadata}
            parser.add_argument("--" + name.replace("_", "-"), **{**told, "help": f"{told['help']} ({option.default})"})

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Workload:
        """Out of what `add_to` parsed."""
        return cls(**{name: getattr(arguments, name) for name in cls.__dataclass_fields__})

    def options(self) -> list[str]:
        """The command line that says this."""
        return [part for name, value in asdict(self).items() for part in ("--" + name.replace("_", "-"), str(value))]

    @cached_property
    def model(self) -> ModelSpec:
        return ModelSpec(vocab_size=self.vocab_size, max_tokens=self.sequence_length, **PRESETS[self.preset].shape)

    @property
    def tokens_per_step(self) -> int:
        return self.micro_batches * self.micro_batch_size * self.sequence_length

    def tokens(self, step: int, micro_batch: int) -> NDArray[np.uint16]:
        """[micro_batch_size, sequence_length + 1]."""
        import numpy as np

        shape = (self.micro_batch_size, self.sequence_length + 1)
        return np.random.default_rng([step, micro_batch]).integers(0, self.vocab_size, shape, dtype=np.uint16)

    def flops_per_s(self, tokens_per_s: float) -> float:
        """Of the model's mathematics: what is computed twice does not count."""
        return tokens_per_s * training_flops_per_token(self.model, self.sequence_length)

    def peak_flops(self) -> float | None:
        """Of one device, by its data sheet; None where there is none (CPUs)."""
        if self.device == "cpu":
            return None
        import torch

        return peak_flops(torch.cuda.get_device_name(self.device), self.precision)


def peak_memory(device: str) -> int:
    """Bytes that this process had at most: on a GPU those of tensors, else its resident memory."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    import torch

    return torch.cuda.max_memory_allocated(device)


DEFAULT = Workload()
