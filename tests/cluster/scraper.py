"""A Prometheus of a test's own, and what Grafana would ask it."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from elastic_lm.runtime.cluster import wait_for

SCRAPE_S = 1
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # to this machine, whatever the environment says


@dataclass(frozen=True)
class Series:
    """Labels and values of one line."""

    labels: dict[str, str]
    values: tuple[float, ...]


class Prometheus:
    """One that scrapes a target every second."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._began_s = time.time()

    def is_ready(self) -> bool:
        try:
            with DIRECT.open(f"{self._url}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def now(self, expression: str) -> list[Series]:
        """As a panel that shows one moment asks."""
        found = self._get("query", query=expression)
        return [Series(line["metric"], (float(line["value"][1]),)) for line in found]

    def since_start(self, expression: str) -> list[Series]:
        """As a graph of all that was scraped asks."""
        found = self._get("query_range", query=expression, start=self._began_s, end=time.time(), step=SCRAPE_S)
        return [Series(line["metric"], tuple(float(value) for _, value in line["values"])) for line in found]

    def _get(self, what: str, **parameters: Any) -> list[dict[str, Any]]:
        with DIRECT.open(f"{self._url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}", timeout=30) as answer:
            return list(json.load(answer)["data"]["result"])


def has_data(series: list[Series]) -> bool:
    return any(math.isfinite(value) for line in series for value in line.values)


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def prometheus(target_port: int, folder: Path) -> Iterator[Prometheus]:
    """Runs while the context lasts; its data are in the folder."""
    scrape = {"job_name": "elastic-lm", "static_configs": [{"targets": [f"127.0.0.1:{target_port}"]}]}
    config = folder / "prometheus.yaml"
    config.write_text(
        yaml.safe_dump({"global": {"scrape_interval": f"{SCRAPE_S}s"}, "scrape_configs": [scrape]}), encoding="utf-8"
    )
    address = f"127.0.0.1:{free_port()}"
    with open(folder / "prometheus.log", "wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'prometheus'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        server = Prometheus(f"http://{address}")
        wait_for(
            server.is_ready, timeout_s=30, what=f"Prometheus ready (its log is {folder}/prometheus.log)", poll_s=0.1
        )
        yield server
    finally:
        process.terminate()
        process.wait(timeout=30)
