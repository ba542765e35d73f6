"""A run that goes back, as it lies in storage at each point of that."""

from __future__ import annotations

from elastic_lm.checkpoint.layout import folder_of
from elastic_lm.config import RunConfig
from elastic_lm.experiment import rewinds
from elastic_lm.experiment.rewinds import Rewind, Rewinds
from elastic_lm.experiment.spikes import Spike
from elastic_lm.runtime.plan import make_plan
from elastic_lm.storage import Storage
from tests.solo import Solo, solo_config


def spike(first: int, last: int | None = None) -> Spike:
    return Spike(first, first + 2 if last is None else last, "loss", "the loss stands out")


def decided(tokens: str, storage: str) -> RunConfig:
    """Trained to step 2 and then to 4, with checkpoints there, and back to step 2 for a spike in step 3; not resumed."""
    chosen = {"policy": "rewind", "rewind_steps": 1, "skip_batches": 4, "steps_in_a_row": 1}
    config = solo_config(tokens, storage, spikes=chosen, checkpoint={"every_steps": 2})
    Solo(config).train(2)
    Solo(config).train(4)
    rewinds.decide(Storage.open(config.run_url), Rewind.of(spike(3, 3), make_plan(config).config, number=1))
    return config


def late(config: RunConfig) -> Storage:
    """What was cleared away comes back: its manifest was on its way."""
    folder = Storage.open(config.run_url)
    kept = {path: folder.read(path) for path in folder.list(folder_of(4))}
    rewinds.clear(folder, Rewinds.load(folder), lambda: None)
    for path, data in kept.items():
        folder.write(path, data)
    return folder
