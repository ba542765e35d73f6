"""Which checkpoint can be restored, when the newest one cannot: they are read whole, on a thread that nobody waits for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from elastic_lm.checkpoint import registry
from elastic_lm.checkpoint.registry import CheckpointInfo
from elastic_lm.errors import ElasticLMError, SupersededError, UnavailableError
from elastic_lm.experiment.lineage import check_fork_has_its_state
from elastic_lm.runtime.patience import Patience
from elastic_lm.storage import Storage

logger = logging.getLogger(__name__)


class RestorableSearch:
    """`check` raises unless this is still the run's owner: what is damaged loses its manifest.

    `on_found` gets the newest one whose every byte was read, and a sentence about each that was passed over; `on_failed` a
    verdict and its reason, when that could not be found out, or when the run is a fork and has nothing left to begin with.
    """

    def __init__(
        self,
        storage: Storage,
        timeout_s: float,
        check: Callable[[], None],
        on_found: Callable[[CheckpointInfo | None, list[str]], None],
        on_failed: Callable[[str, str], None],
        wanted: registry.Wanted = registry.any_of_them,
    ) -> None:
        self._storage, self._timeout_s, self._check = storage, timeout_s, check
        self._on_found, self._on_failed, self._wanted = on_found, on_failed, wanted

    def begin(self) -> None:
        threading.Thread(target=self._run, name="restorable", daemon=True).start()

    def _run(self) -> None:
        try:
            found = Patience(self._timeout_s).outlast(f"checkpoint in {self._storage.url}", lambda _: self._look())
        except SupersededError:
            return  # the coordinator hears of it, too
        except UnavailableError as error:
            self._on_failed("unavailable", str(error))
        except Exception as error:
            if not isinstance(error, ElasticLMError):
                logger.exception("It could not be found out which checkpoint can be restored.")
            self._on_failed("failed", str(error))  # whatever it is: the run waits for an answer
        else:
            self._on_found(*found)

    def _look(self) -> tuple[CheckpointInfo | None, list[str]]:
        self._check()
        skipped: list[str] = []
        newest = registry.newest_complete(
            self._storage, on_skipped=skipped.append, check=self._check, wanted=self._wanted
        )
        check_fork_has_its_state(self._storage, None if newest is None else newest.step, skipped)
        return newest, skipped
