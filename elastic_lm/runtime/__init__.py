"""The cluster side: the only package that imports ray."""

import os

# Ray prints a paragraph to the driver for every worker and node that dies. A run tells it in one line of its own.
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed while executing|has been marked dead because the detector"
)
