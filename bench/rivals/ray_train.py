"""Ray Train's elastic trainer, as its documentation has one write it: on a failure or another size, all workers restart.

Joins the cluster at RAY_ADDRESS, begins with as many workers as there is room for, and trains until ended.

RAY_ADDRESS=HOST:PORT python bench/rivals/ray_train.py --steps FOLDER --storage FOLDER
"""

from __future__ import annotations

import itertools
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch

MAX_WORKERS = 2


def train(options: dict[str, Any]) -> None:
    """What every worker runs, from its start or from the newest checkpoint."""
    import work

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    replica = work.Work(work.Workload(**options["workload"]))
    start = 0
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            start = replica.restore(Path(folder) / "state.pt")
    wrapped = ray.train.torch.prepare_model(replica.model)
    teller = work.Teller(Path(options["steps"]), rank, world_size)
    for step in itertools.count(start):
        began = time.monotonic()
        replica.gradient(wrapped, step, replica.split(rank, world_size))
        replica.update()
        teller.tell(step, began)
        if (step + 1) % work.CHECKPOINT_STEPS == 0:
            with tempfile.TemporaryDirectory() as folder:
                saved = None
                if rank == 0:
                    replica.save(Path(folder) / "state.pt", step + 1)
                    saved = ray.train.Checkpoint.from_directory(folder)
                ray.train.report({"step": step}, checkpoint=saved)


def main() -> None:
    import work

    arguments = work.arguments(__doc__, "--storage")
    trainer = ray.train.torch.TorchTrainer(
        train,
        train_loop_config={"workload": asdict(work.Workload.of(arguments)), "steps": str(arguments.steps)},
        scaling_config=ray.train.ScalingConfig(num_workers=(1, MAX_WORKERS)),
        run_config=ray.train.RunConfig(
            name="rival",
            storage_path=str(arguments.storage),
            failure_config=ray.train.FailureConfig(max_failures=-1),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
