"""A command that a run does not answer ends with a sentence and a remedy."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError

from elastic_lm.errors import ClusterError
from elastic_lm.runtime import cluster, remote


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (GetTimeoutError("Get timed out"), "run a-run has not answered within 10 s, .* Give the command again"),
        (
            ActorDiedError(),
            "run a-run could not be told: ActorDiedError, .* elastic-lm status tells whether it still trains",
        ),
    ],
)
def test_run_that_does_not_answer_is_told_with_a_remedy(
    error: RayError, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_answer(*_: object, **__: object) -> None:
        raise error

    method = SimpleNamespace(remote=lambda *_: None)
    mailbox = SimpleNamespace(post=method, status=method)
    monkeypatch.setenv("RAY_ADDRESS", "nowhere:6379")
    monkeypatch.setattr(cluster, "connected", contextlib.nullcontext)
    monkeypatch.setattr(remote, "find_mailbox", lambda run: mailbox)
    monkeypatch.setattr(ray, "get", no_answer)
    with pytest.raises(ClusterError, match=told):
        remote.command("a-run", "stop", {"reason": "enough"})
    with pytest.raises(ClusterError, match=told):
        remote.run_url("a-run")
