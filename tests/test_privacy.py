"""Masked texts: who the user is and what is secret stays out, everything else stays in."""

from __future__ import annotations

import os

import pytest

from elastic_lm.privacy import Privacy, variables

ALICE = Privacy("/home/alice", "alice")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("file:///home/alice/runs", "file://~/runs"),
        ("/home/alice", "~"),
        ("'/home/alice/x': no", "'~/x': no"),
        ("/home/alice2/x", "/home/alice2/x"),  # somebody else's
        ("/scratch/alice/x", "/scratch/***/x"),
        ("s3://bucket/alice: access denied", "s3://bucket/***: access denied"),
        ("s3://alice-bucket/x", "s3://alice-bucket/x"),
        ("s3://key:hunter2@bucket/x", "s3://***@bucket/x"),
        ("RAY_ADDRESS=ray://alice@head:10001", "RAY_ADDRESS=ray://***@head:10001"),
        ("RAY_ADDRESS=alice@10.0.0.1:6379", "RAY_ADDRESS=***@10.0.0.1:6379"),
        ("GET https://host/x?sig=hunter2 failed", "GET https://host/x?*** failed"),
        ("what? nothing at all", "what? nothing at all"),
        ("2 nodes, 4 CPUs @ 2.4 GHz", "2 nodes, 4 CPUs @ 2.4 GHz"),
    ],
)
def test_text_is_masked_where_it_tells_of_somebody(text: str, masked: str) -> None:
    assert ALICE.mask(text) == masked


def test_root_is_nobody_and_the_root_folder_no_home() -> None:
    assert Privacy("/home/r", "root").mask("/home/r/x and /srv/root") == "~/x and /srv/root"
    assert Privacy("/", "").mask("/srv//x") == "/srv//x"


def test_this_user_is_known_even_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setattr(os, "getuid", lambda: 987_654)  # nobody has it
    assert Privacy.of_this_user().mask("/home/somebody/x") == "~/x"


def test_variables_that_matter_are_named_and_harmless_ones_shown() -> None:
    environment = {
        "OMP_NUM_THREADS": "1",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "AWS_ENDPOINT_URL": "http://key:hunter2@host",
        "AWS_REGION": "eu-north-1",
        "RAY_ADDRESS": "head:6379",
        "RAY_JOB_CONFIG_JSON_ENV_VAR": "hunter2",
        "NCCL_DEBUG": "INFO",
        "NCCL_SECRET_THING": "hunter2",
        "https_proxy": "http://hunter2@proxy",
        "PYTHONPATH": "/x",
        "EDITOR": "vi",
        "MY_AWS_KEY": "hunter2",
    }
    assert variables(environment) == [
        "AWS_ENDPOINT_URL", "AWS_REGION=eu-north-1", "AWS_SECRET_ACCESS_KEY", "NCCL_DEBUG=INFO", "NCCL_SECRET_THING",
        "OMP_NUM_THREADS=1", "PYTHONPATH", "RAY_ADDRESS=head:6379", "RAY_JOB_CONFIG_JSON_ENV_VAR", "https_proxy",
    ]  # fmt: skip


def test_value_is_shown_in_one_short_line() -> None:
    [shown] = variables({"NCCL_IB_HCA": "a\nb" + 100 * "x"})
    assert shown.startswith("NCCL_IB_HCA='a\\nbxxx") and shown.endswith("...")
    assert len(shown) < 75
