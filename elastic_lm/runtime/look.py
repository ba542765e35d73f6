"""A look at the cluster at RAY_ADDRESS, as one JSON object: `python -m elastic_lm.runtime.look`.

In a process of its own, because joining a cluster whose head hangs may take minutes, and only a process can be given up.
"""

from __future__ import annotations

import json
import sys

from elastic_lm.errors import ClusterError
from elastic_lm.runtime import cluster


def look() -> dict[str, str]:
    """Join for a moment.    Raises: ClusterError when that cannot be done."""
    with cluster.connected() as sentence:
        return {"sentence": sentence}


if __name__ == "__main__":
    try:
        print(json.dumps(look()))
    except ClusterError as error:
        sys.exit(str(error))
