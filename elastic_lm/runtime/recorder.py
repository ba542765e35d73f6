"""The recorder: what happened goes into the event log, and from there to everybody who watches.

Control's decisions and the members' step records become events with a time; each is written to the log, counted by the
exporter, and told as a line to whoever follows the mailbox. Nothing here can raise into training.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, replace
from typing import Any

from elastic_lm.config import RunConfig
from elastic_lm.events import log as event_log
from elastic_lm.events.types import Event, EventKind
from elastic_lm.monitor.exporter import Exporter
from elastic_lm.monitor.goodput import Goodput
from elastic_lm.monitor.progress import Progress
from elastic_lm.protocol import StepRecord
from elastic_lm.runtime.ledger import Ledger
from elastic_lm.storage import Storage

logger = logging.getLogger(__name__)

PUBLISH_S = 0.5  # a publication costs about 1 ms of CPU on each side
