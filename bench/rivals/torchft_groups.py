"""torchft's fault-tolerant data parallelism: a manager for each replica group, a group of one process under torchrun.

A step whose sum failed is not applied, and its batch is not trained again: the loader has moved on. A group always
computes its own half of the batch, so that the global batch is smaller while a group is missing.
Gradients are added by `Manager.allreduce`, all in one: with torchft 0.2.0's DistributedDataParallel on gloo the survivor of a
kill ends too, by an assertion in the hook that awaits the failed sum. Needs the packages of requirements.txt.

TORCHFT_LIGHTHOUSE=http://HOST:PORT REPLICA_GROUP_ID=0 python -m torch.distributed.run --standalone bench/rivals/torchft_groups.py
"""

from __future__ import annotations

import itertools
import os
import time
from datetime import timedelta

import torch
import work
from torchft import Manager, Optimizer, ProcessGroupGloo

NUM_GROUPS = 2


def flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    """One buffer of which every parameter's gradient is a part, as in DDP's buckets."""
    parameters = list(model.parameters())
    flat = torch.zeros(sum(parameter.numel() for parameter in parameters))
    for parameter, part in zip(parameters, flat.split([parameter.numel() for parameter in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
    return flat


def main() -> None:
    arguments = work.arguments(__doc__)
    group_id = int(os.environ["REPLICA_GROUP_ID"])
    replica = work.Work(work.Workload.of(arguments))
    # Timeouts are those of torchft's own example for DDP.
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=5)),
        load_state_dict=replica.load_state_dict,
        state_dict=replica.state_dict,
        min_replica_size=1,
        replica_id=f"rival_{group_id}",
        timeout=timedelta(seconds=30),
    )
    gradient = flat_gradient(replica.model)
    optimizer = Optimizer(manager, replica.optimizer)
    teller = work.Teller(arguments.steps, group_id, NUM_GROUPS)
    for batch in itertools.count():
        began = time.monotonic()
        step = manager.current_step()
        optimizer.zero_grad(set_to_none=False)
        replica.gradient(replica.model, batch, replica.split(group_id, NUM_GROUPS))
        manager.allreduce(gradient).wait()
        replica.clip()
        optimizer.step()
        applied = manager.current_step() > step
        teller.tell(manager.current_step() - applied, began, world_size=manager.num_participants(), applied=applied)


if __name__ == "__main__":
    main()
