"""torchft's fault-tolerant DDP, as its README has one write it: one replica group, a process of its own under torchrun.

A step whose sum failed is not applied, and its batch is not trained again: the loader has moved on. A group always
computes its own half of the batch, so that the global batch is smaller while a group is missing. Needs the packages of
requirements.txt.

TORCHFT_LIGHTHOUSE=http://HOST:PORT REPLICA_GROUP_ID=0 python -m torch.distributed.run --standalone bench/rivals/torchft_ddp.py
"""

from __future__ import annotations

import itertools
import os
import time
from datetime import timedelta

import work
from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo

NUM_GROUPS = 2


def main() -> None:
    arguments = work.arguments(__doc__)
    group_id = int(os.environ["REPLICA_GROUP_ID"])
    replica = work.Work(arguments.vocab_size, arguments.device)
    # Timeouts are those of torchft's own example for DDP.
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=5)),
        load_state_dict=replica.load_state_dict,
        state_dict=replica.state_dict,
        min_replica_size=1,
        replica_id=f"rival_{group_id}",
        timeout=timedelta(seconds=30),
    )
    wrapped = DistributedDataParallel(manager, replica.model)
    optimizer = Optimizer(manager, replica.optimizer)
    teller = work.Teller(arguments.steps, group_id, NUM_GROUPS)
    for batch in itertools.count():
        began = time.monotonic()
        step = manager.current_step()
        optimizer.zero_grad()
        replica.gradient(wrapped, batch, work.split(group_id, NUM_GROUPS))
        replica.clip()
        optimizer.step()
        applied = manager.current_step() > step
        teller.tell(manager.current_step() - applied, began, world_size=manager.num_participants(), applied=applied)


if __name__ == "__main__":
    main()
