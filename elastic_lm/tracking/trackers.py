"""Which trackers a run's config asks for, where they write, and all of them together while it trains.

Nothing here raises into training, and with no tracker asked for nothing here costs anything.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from elastic_lm.config import RunConfig
from elastic_lm.errors import ConfigError, TrackingError
from elastic_lm.events.types import Event
from elastic_lm.tracking.feed import Feed, fill, opened
from elastic_lm.tracking.sink import Sink, reason_of
from elastic_lm.tracking.tensorboard import TensorBoard
from elastic_lm.tracking.wandb import WeightsAndBiases

CLOSE_S = 15.0  # all trackers together, at a run's end
FINISH_S = 10.0  # of them, for what is still on its way to a server
EXPORT_S = 600.0  # the same where somebody waits for just that
KEYS = (TensorBoard.key, WeightsAndBiases.key)
NEEDS = {  # key -> (the field that asks for it, the package, the extra)
    TensorBoard.key: ("tracking.tensorboard", "tensorboardX", "tensorboard"),
    WeightsAndBiases.key: ("tracking.wandb_project", "wandb", "wandb"),
}


def wanted_by(config: RunConfig) -> list[str]:
    """Keys of the trackers that a run is to feed."""
    asked = {TensorBoard.key: config.tracking.tensorboard, WeightsAndBiases.key: config.tracking.wandb_project}
    return [key for key in KEYS if asked[key]]


def check_installed(keys: Iterable[str]) -> None:
    """Raises: ConfigError naming the package that a tracker needs and this environment lacks."""
    for key in keys:
        field, package, extra = NEEDS[key]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"{field} needs the package {package}: pip install 'elastic-lm[{extra}]'")


def sink_of(config: RunConfig, key: str, *, finish_s: float) -> Sink:
    """The tracker, not begun.    Raises: ConfigError when the config does not say where it is to write."""
    folder = _folder_of(config)
    if key == TensorBoard.key:
        if folder is None:
            raise ConfigError(
                f"TensorBoard reads files, and the run is kept in {config.storage}; "
                "set tracking.folder to a folder on this machine"
            )
        return TensorBoard(folder / "tensorboard")
    if config.tracking.wandb_project is None:
        raise ConfigError("tracking.wandb_project is not set; name the project that the run is to appear in")
    return WeightsAndBiases(config, folder, finish_s=finish_s)


def _folder_of(config: RunConfig) -> Path | None:
    """Where a run's trackers write; None: no folder was named, and the run's own is in object storage."""
    if config.tracking.folder is not None:
        return Path(config.tracking.folder, config.name)
    scheme, _, path = config.run_url.partition("://")
    return Path(path) if scheme == "file" else None


def refill(config: RunConfig, key: str, events: Iterable[Event]) -> None:
    """Write a stored log into a tracker: what is missing there is there afterwards, and nothing twice.

    Raises: ConfigError; TrackingError when it does not take it.
    """
    check_installed([key])
    sink = sink_of(config, key, finish_s=EXPORT_S)
    try:
        with opened(sink):
            fill(sink, events)
    except ConfigError:
        raise
    except Exception as error:
        raise TrackingError(f"{sink.title} did not take the run: {reason_of(error)}") from error


class Trackers:
    """Those of one attempt, each on its feed.    Args: `past` gives what earlier attempts logged."""

    def __init__(self, config: RunConfig, past: Callable[[], Iterable[Event]]) -> None:
        self._told: set[str] = set()
        self._feeds = []
        for key in wanted_by(config):
            sink = sink_of(config, key, finish_s=FINISH_S)
            advice = f" To fill in what it missed: elastic-lm export {config.run_url} --to {key}"
            self._feeds.append(Feed(sink, past, advice=advice))

    def offer(self, events: list[Event]) -> None:
        """More of the log. Neither blocks nor raises."""
        for feed in self._feeds:
            feed.offer(events)

    def new_problems(self) -> list[str]:
        """Sentences about trackers that were given up, each told once."""
        found = [feed.problem for feed in self._feeds if feed.problem is not None and feed.problem not in self._told]
        self._told.update(found)
        return found

    def close(self) -> None:
        """Let all of them write what they were offered, for at most `CLOSE_S` together."""
        deadline = time.monotonic() + CLOSE_S
        for feed in self._feeds:
            feed.end()
        for feed in self._feeds:
            feed.join(max(0.0, deadline - time.monotonic()))
