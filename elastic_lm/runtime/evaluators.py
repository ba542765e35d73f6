"""An evaluation on a Ray cluster: its pieces are answered by workers, each with a copy of the model.

Invariant: figures have the bits of one process in the same environment (PyTorch, device, threads), whatever happens to workers.
All answers are of the weights that the first worker has; the step is chosen once, when that one is there. A worker holds what
one of the run's holds in training, and no more than that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import ray

from elastic_lm.errors import ConfigError
from elastic_lm.evaluate.pieces import Answer, Piece, Subject
from elastic_lm.runtime import cluster
from elastic_lm.runtime.evaluation_crew import Crew, amounts, wanted

PATIENCE_S = 300.0  # for a first worker: an autoscaler's node takes minutes


@dataclass(frozen=True)
class OnCluster:
    """Answers pieces on up to `num_workers` workers of the Ray cluster at RAY_ADDRESS, or of a local one that is started for it.

    `tell` gets sentences for people; `patience_s`: how long nobody may come.
    """

    num_workers: int
    tell: Callable[[str], None] = lambda sentence: None
    patience_s: float = PATIENCE_S

    def __call__(self, subject: Subject, pieces: Sequence[Piece]) -> Generator[Answer, None, None]:
        """Raises: what a piece or the loading of the model raises, told as in one process; ClusterError, ConfigError."""
        num_workers, config = min(self.num_workers, len(pieces)), subject.config
        is_on_own_gpus = config.device == "cuda" and cluster.would_be_new()
        if is_on_own_gpus:
            _refuse_beside_training()
        with cluster.connected(num_workers * config.workers.num_cpus) as sentence:
            self.tell(sentence)
            self.tell(
                f"Evaluating with {num_workers} worker{'s' if num_workers > 1 else ''} of {amounts(wanted(config))} each, as "
                f"the run's have; free now: {amounts(ray.available_resources())}."
            )
            with contextlib.closing(
                Crew(subject, pieces, num_workers, tell=self.tell, patience_s=self.patience_s)
            ) as crew:
                for answer in crew.answers():
                    if is_on_own_gpus:
                        _refuse_beside_training()
                    yield answer


def _refuse_beside_training() -> None:
    """Of a cluster of our own on GPUs.    Raises: ConfigError when a run trains on this machine: it may need their memory."""
    if workers := cluster.training_here():
        raise ConfigError(
            f"process {workers[0]} trains a run on this machine, and a local cluster would take memory of its GPU; name the "
            "run's cluster with RAY_ADDRESS, which gives away what is free, or leave --workers out: the CPU computes then"
        )
