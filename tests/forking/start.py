"""`ray start`, whose node starts workers through `launcher.py`: `python -m tests.forking.start OPTIONS`."""

from __future__ import annotations

import functools

from ray._private import parameter
from ray.scripts import scripts

from tests.forking import launcher

if __name__ == "__main__":
    parameter.RayParams = functools.partial(parameter.RayParams, setup_worker_path=launcher.__file__)
    scripts.start()
