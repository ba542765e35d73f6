"""A real Prometheus that scrapes one target with the scrape config and the rules of cluster/prometheus."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from elastic_lm.monitor.rules import rules
from elastic_lm.monitor.scraping import JOB, prometheus_config
from elastic_lm.runtime.cluster import wait_for

TRIES = 3  # for a port that is free when it is looked for and taken when it is wanted
WAIT_S = 60.0
SCRAPE_S = 1
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # to this machine, whatever the environment says


@dataclass(frozen=True)
class Series:
    """Labels and values of one line."""

    labels: dict[str, str]
    values: tuple[float, ...]


def has_data(series: list[Series]) -> bool:
    return any(math.isfinite(value) for line in series for value in line.values)


class Prometheus:
    """Asked through its HTTP interface."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._began_s = time.time()

    def get(self, path: str, **query: str) -> Any:
        """The `data` of an answer."""
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with DIRECT.open(url, timeout=30) as answer:
            return json.load(answer)["data"]

    def now(self, expression: str) -> list[Series]:
        """As a panel that shows one moment asks."""
        found = self.get("query", query=expression)["result"]
        return [Series(line["metric"], (float(line["value"][1]),)) for line in found]

    def since_start(self, expression: str) -> list[Series]:
        """As a graph of all that was scraped asks."""
        span = {"start": str(self._began_s), "end": str(time.time()), "step": str(SCRAPE_S)}
        found = self.get("query_range", query=expression, **span)["result"]
        return [Series(line["metric"], tuple(float(value) for _, value in line["values"])) for line in found]

    def query(self, expression: str) -> dict[tuple[tuple[str, str], ...], float]:
        """Value by labels, now."""
        return {tuple(sorted(series.labels.items())): series.values[0] for series in self.now(expression)}

    def value(self, expression: str) -> float | None:
        """Of the only series; None when there is none."""
        found = self.now(expression)
        assert len(found) <= 1, found
        return found[0].values[0] if found else None

    def await_value(self, expression: str) -> float:
        """As soon as there is one."""
        look = lambda: [value] if (value := self.value(expression)) is not None else None  # noqa: E731
        return float(wait_for(look, timeout_s=WAIT_S, what=expression)[0])

    def rules(self) -> list[dict[str, Any]]:
        """What became of every rule when it was evaluated."""
        return [rule for group in self.get("rules")["groups"] for rule in group["rules"]]

    def is_ready(self) -> bool:
        try:
            with DIRECT.open(f"http://{self._address}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError):
            return False


@contextmanager
def scraping(target: tuple[str, int], folder: Path, scrape_s: int = SCRAPE_S) -> Iterator[Prometheus]:
    """A Prometheus that looks at the target so often, and waits no longer for it, as long as the block lasts."""
    config = prometheus_config()
    config["global"] = {"scrape_interval": f"{scrape_s}s", "evaluation_interval": f"{scrape_s}s"}
    job = next(job for job in config["scrape_configs"] if job["job_name"] == JOB)
    job["static_configs"] = [{"targets": ["{}:{}".format(*target)]}]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules()))
    process, address = _start(folder)
    try:
        yield Prometheus(address)
    finally:
        process.terminate()
        process.wait(30)


def _start(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    for _ in range(TRIES):
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [
            shutil.which("prometheus") or "prometheus",
            f"--config.file={folder}/prometheus.yaml",
            f"--storage.tsdb.path={folder}/series",
            f"--web.listen-address={address}",
        ]
        log = folder / "prometheus.log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        prometheus = Prometheus(address)

        def settled(process: Any = process, prometheus: Prometheus = prometheus) -> bool:
            return process.poll() is not None or prometheus.is_ready()

        wait_for(settled, timeout_s=WAIT_S, what=f"Prometheus at {address}")
        if process.poll() is None:
            return process, address
    raise AssertionError(f"Prometheus does not start: {log.read_text()}")
