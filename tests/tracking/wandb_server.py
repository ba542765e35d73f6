"""As much of a Weights & Biases server as one run needs: it takes history in numbered lines, and tells a client that comes
again how far it got. What it answers was found by watching wandb 0.31 ask."""

from __future__ import annotations

import contextlib
import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    """What was sent: history by line, and the names of the questions that were asked."""

    def __init__(self) -> None:
        self.lines: dict[int, str] = {}
        self.asked: list[str] = []
        self.paths: set[str] = set()
        self.bucket: dict[str, Any] | None = None
        self.url = ""

    @property
    def history(self) -> list[dict[str, Any]]:
        assert sorted(self.lines) == list(range(len(self.lines)))  # no gap
        return [json.loads(self.lines[number]) for number in sorted(self.lines)]

    def post(self, path: str, body: dict[str, Any]) -> Any:
        self.paths.add(path)
        if path == "/graphql":
            self.asked.append(body["operationName"])
            answer = getattr(self, f"_{body['operationName']}", lambda variables: {})
            return {"data": answer(body.get("variables") or {})}
        for name, content in (body.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                self.lines.update({content["offset"] + number: line for number, line in enumerate(content["content"])})
        return {}

    def _RunResumeStatus(self, variables: dict[str, Any]) -> Any:  # noqa: N802 - wandb's name for it
        if self.bucket is None:
            return {"model": None}
        told = {
            **self.bucket,
            "summaryMetrics": "{}",
            "logLineCount": 0,
            "historyLineCount": len(self.lines),
            "eventsLineCount": 0,
            "historyTail": json.dumps([self.lines[len(self.lines) - 1]] if self.lines else []),
            "eventsTail": "[]",
            "config": "{}",
            "tags": [],
            "notes": None,
            "wandbConfig": json.dumps({"t": {"1": []}}),  # without it a run counts as never begun
        }
        return {"model": {"id": "p", "name": "my-project", "entity": {"id": "e", "name": "me"}, "bucket": told}}

    def _UpsertBucket(self, variables: dict[str, Any]) -> Any:  # noqa: N802
        project = {"id": "p", "name": "my-project", "entity": {"id": "e", "name": "me"}}
        known = self.bucket is not None
        self.bucket = {"id": "b", "name": variables["name"], "displayName": variables.get("displayName")}
        told = {**self.bucket, "description": None, "config": "{}", "sweepName": None, "project": project}
        return {"upsertBucket": {"bucket": {**told, "historyLineCount": len(self.lines)}, "inserted": not known}}

    def _CreateRunFiles(self, variables: dict[str, Any]) -> Any:  # noqa: N802
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}


@contextlib.contextmanager
def serving() -> Iterator[WandbServer]:
    """A server at `url`, on this machine, to the end of the block."""
    state = WandbServer()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            with lock:
                self._answer(state.post(self.path, json.loads(body or b"{}")))

        def do_GET(self) -> None:
            self._answer({})

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with lock:
                state.paths.add(self.path)
            self._answer({})

        def _answer(self, told: Any) -> None:
            data = json.dumps(told).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Nobody reads it."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
