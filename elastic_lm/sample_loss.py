"""The loss of single samples with a run's weights: which text it is that the model finds hard."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from elastic_lm.config import RunConfig
from elastic_lm.data.manifest import Manifest
from elastic_lm.engine.measure import measure
from elastic_lm.engine.objectives import find_objective
from elastic_lm.errors import CheckpointError
from elastic_lm.experiment import standing
from elastic_lm.storage import Storage
from elastic_lm.trained_model import TrainedModel


class SampleLoss:
    """With the weights of the newest complete checkpoint that has not trained `before` yet; of the oldest where all have.

    On the CPU, in fp32, without dropout, each sample as a batch of its own: near what training saw, not its bits. What the masked
    objective hides is the same in every sample, and not what training hid. `folder`: where the run is now,
    whatever its config says. `step`: how long the weights were trained.
    Args: `at_most`: steps of weights that are of the same run, where it went back later; others do not count then.
    Raises: CheckpointError when there is no checkpoint; ConfigError, DataError, StorageError.
    """

    def __init__(
        self, folder: Storage, config: RunConfig, manifest: Manifest, before: int, at_most: int | None = None
    ) -> None:
        complete = [found.step for found in standing.complete(folder)]
        if not complete:
            raise CheckpointError(
                f"the run in {folder.url} has no complete checkpoint yet, and a loss takes weights; wait for one"
            )
        limit = before if at_most is None else min(before, at_most)
        if at_most is not None and min(complete) > limit:
            raise CheckpointError(
                f"the run in {folder.url} has no checkpoint of step {limit} or earlier any more, and later ones were trained "
                "after it went back; leave out --loss"
            )
        self.step = max((step for step in complete if step <= limit), default=min(complete))
        self._model = TrainedModel.load(folder, config, self.step)
        spec = config.engine_spec(manifest.vocab_size, manifest.special_ids)
        self._objective = find_objective(spec.objective, spec.masking)

    def of(self, ids: Sequence[int]) -> float:
        """Nats per target of a sample: sequence_length + 1 tokens."""
        found = measure(self._model.module, self._objective, torch.tensor([ids]), 0)
        return found.loss / max(1, found.num_targets)
