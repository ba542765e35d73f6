"""The command: every end has its exit code and one message, and nobody sees a traceback for what they mistyped.

`fit` is replaced where only its verdict matters; tests/runtime/test_fit.py trains through the real one.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from typer.main import get_command
from typer.testing import CliRunner

from elastic_lm import RunConfig, __version__
from elastic_lm import cli as command
from elastic_lm.data.manifest import Manifest
from elastic_lm.errors import (
    AccessDeniedError,
    CheckpointError,
    ClusterError,
    ConfigError,
    DataError,
    ElasticLMError,
    NotFoundError,
    StorageError,
)
from elastic_lm.result import RunResult
from elastic_lm.storage import Storage
from tests.conftest import Fake
from tests.data.corpora import texts, write_lines

SECRET = "wJalrXUtnFEMI"


commands_of = functools.cache(get_command)


def run(*arguments: str) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "typer.testing._get_command", commands_of
        )  # or each call would spend 35 ms on making all commands anew
        return CliRunner().invoke(command.app, list(arguments))


def write_config(folder: Path, **changes: object) -> str:
    values = {
        "name": "first",
        "storage": f"{folder}",
        "data": {"tokens": f"{folder}/tokens"},
        "model": {"preset": "tiny"},
        "batch": {"micro_batches": 8, "micro_batch_size": 2, "sequence_length": 16},
        "training": {"steps": 100},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({**values, **changes}))
    return str(file)


# -- ends and their codes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "code"),
    [
        ("done", 0),
        ("failed", 1),
        ("failed_bug", 1),
        ("poisoned", 1),
        ("a verdict of a later version", 1),
        ("refused", 2),
        ("data_error", 3),
        ("unavailable", 4),
        ("superseded", 4),
        ("stopped", 5),
    ],
)
def test_verdict_becomes_its_exit_code(verdict: str, code: int, fake_fit: Fake, tmp_path: Path) -> None:
    fake_fit(RunResult(verdict, "it is so", 7))
    result = run("train", write_config(tmp_path))
    assert result.exit_code == code
    assert f"verdict  {verdict}: it is so" in result.stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError, 2),
        (CheckpointError, 2),
        (ElasticLMError, 2),
        (DataError, 3),
        (NotFoundError, 2),  # what was named is not there
        (StorageError, 4),
        (AccessDeniedError, 4),
        (ClusterError, 4),
    ],
)
def test_error_becomes_one_message_and_its_exit_code(
    error: type[Exception], code: int, fake_fit: Fake, tmp_path: Path
) -> None:
    fake_fit(error("this is wrong; do that"))
    result = run("train", write_config(tmp_path))
    assert (result.exit_code, result.stderr) == (code, "elastic-lm: this is wrong; do that\n")


def test_bug_keeps_its_traceback(fake_fit: Fake, tmp_path: Path) -> None:
    fake_fit(ZeroDivisionError("ours"))
    result = run("train", write_config(tmp_path))
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_help_names_every_exit_code() -> None:
    told = " ".join(run("--help").stdout.split())
    for code in command.Exit:
        assert f"{code.value} " in told.partition("Exit codes:")[2]


@pytest.mark.parametrize("arguments", [["train"], ["trian", "run.yaml"], ["prepare", "x"], ["version", "--loud"]])
def test_misuse_of_the_command_is_a_usage_error(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == command.Exit.USAGE


def test_version_is_the_packages() -> None:
    assert run("version").stdout == f"{__version__}\n"


# -- train -----------------------------------------------------------------------------------------------------------


def test_figures_are_told_before_the_run_and_its_lines_as_they_come(fake_fit: Fake, tmp_path: Path) -> None:
    fake_fit(RunResult("done", "all steps"))
    lines = run("train", write_config(tmp_path)).stdout.splitlines()
    assert lines[0].startswith("Run first: 100 steps of 8 x 2 samples x 16 tokens = 256 tokens per step")
    assert lines[1] == "Step 1."


def test_overrides_reach_the_run_in_order(fake_fit: Fake, tmp_path: Path) -> None:
    configs = fake_fit(RunResult("done", "all steps"))
    file = write_config(tmp_path)
    changes = ["--set", "optimizer.learning_rate=3e-4", "--set", "training.steps=5", "--set", "training.steps=6"]
    assert run("train", file, *changes).exit_code == 0
    assert configs == [RunConfig.load(file, ["optimizer.learning_rate=3e-4", "training.steps=6"])]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.steps=none", ["training.steps='none'", "is not a whole number", "For example steps: 1000"]),
        ("optimizer.learning_rate=0", ["optimizer.learning_rate=0", "greater than 0", "For example"]),
        ("optimiser.betas=1", ["optimiser is not a field of the config", "did you mean optimizer?"]),
        ("workers.min=3", ["workers.min=3 is more than workers.max=1", "raise max to 3 or lower min"]),
        ("steps", ["override 'steps' is not a.b=value", "write e.g."]),
    ],
)
def test_mistaken_config_is_refused_with_field_value_rule_and_remedy(
    override: str, words: list[str], fake_fit: Fake, tmp_path: Path
) -> None:
    configs = fake_fit(RunResult("done", "all steps"))
    result = run("train", write_config(tmp_path), "--set", override)
    assert result.exit_code == command.Exit.USAGE
    assert result.stderr.startswith("elastic-lm: ")
    assert all(word in result.stderr for word in words), result.stderr
    assert result.stdout == "" and configs == []


def test_missing_config_file_is_named(tmp_path: Path) -> None:
    result = run("train", str(tmp_path / "absent.yaml"))
    assert (result.exit_code, result.stdout) == (command.Exit.USAGE, "")
    assert "absent.yaml: No such file" in result.stderr


def test_missing_corpus_is_bad_data_and_names_the_remedy(tmp_path: Path) -> None:
    result = run("train", write_config(tmp_path))
    assert result.exit_code == command.Exit.DATA
    assert "elastic-lm prepare" in result.stderr


def test_storage_that_gives_no_access_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "manifest.json").symlink_to("manifest.json")  # reading it fails, whoever asks
    result = run("train", write_config(tmp_path))
    assert result.exit_code == command.Exit.UNAVAILABLE
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("field", ["storage", "data"])
def test_secret_in_an_address_is_not_repeated(field: str, tmp_path: Path) -> None:
    address = f"s3://AKIA:{SECRET}@bucket/prefix"
    file = write_config(tmp_path, **{field: address if field == "storage" else {"tokens": address}})
    result = run("train", file)
    assert result.exit_code == command.Exit.USAGE
    assert SECRET not in result.output and "AWS_SECRET_ACCESS_KEY" in result.stderr


def test_secret_in_the_environment_is_not_told(fake_fit: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    fake_fit(StorageError("read s3://bucket/x: gave up"))
    assert SECRET not in run("train", write_config(tmp_path)).output


# -- prepare ---------------------------------------------------------------------------------------------------------


def test_prepare_makes_a_corpus_and_again_the_same(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "text.jsonl", texts(200))
    out = str(tmp_path / "tokens")
    arguments = ["prepare", source, "--out", out, "--vocab-size", "300", "--block-tokens", "65", "--local"]
    first = run(*arguments)
    assert first.exit_code == 0, first.stderr
    manifest = Manifest.load(Storage.open(out))
    assert (manifest.vocab_size, manifest.block_tokens) == (300, 65)
    assert f"tokens  {manifest.num_tokens:,} in {len(manifest.blocks)} blocks of 65, as uint16\n" in first.stdout
    assert f"manifest  {manifest.hash}\n" in first.stdout
    lines = [line for line in first.stdout.splitlines() if not line.startswith("       time  0:00:0")]
    assert len(lines) == len(first.stdout.splitlines()) - 1
    assert run("data", "info", out).stdout.splitlines() == lines
    assert run(*arguments).exit_code == 0 and Manifest.load(Storage.open(out)) == manifest


def test_preparation_leaves_the_corpus_and_nothing_else(tmp_path: Path) -> None:
    write_lines(tmp_path / "text.jsonl", texts(20))
    assert run("prepare", str(tmp_path), "--out", str(tmp_path / "tokens"), "--local").exit_code == 0
    names = {path.name for path in (tmp_path / "tokens").iterdir()}
    assert names == {"documents", "documents.json", "manifest.json", "shards", "summary.json", "tokenizer.json"}


def test_prepared_corpus_lends_its_tokenizer_to_another(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "text.jsonl", texts(50))
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert run("prepare", source, "--out", one, "--vocab-size", "290", "--local").exit_code == 0
    assert run("prepare", source, "--out", two, "--tokenizer", f"{one}/tokenizer.json", "--local").exit_code == 0
    assert Manifest.load(Storage.open(two)).hash == Manifest.load(Storage.open(one)).hash


def test_weight_behind_a_source_is_how_often_it_occurs(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "text.jsonl", texts(50))
    arguments = ["--local", "--vocab-size", "261", "--held-out", "0", "--out"]
    for name, weighted in (("one", source), ("three", f"{source}=3")):
        assert run("prepare", weighted, *arguments, f"{tmp_path}/{name}").exit_code == 0
    one, three = (Manifest.load(Storage.open(f"{tmp_path}/{name}")) for name in ("one", "three"))
    assert (three.counts["documents"], three.num_tokens) == (150, 3 * one.num_tokens)
    refused = run("prepare", f"{source}=0", *arguments, f"{tmp_path}/zero")
    assert refused.exit_code == command.Exit.USAGE and "weight=0 is not how often" in refused.stderr


def test_text_may_be_in_another_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "well"}')
    arguments = ["prepare", f"{tmp_path}/a.jsonl", "--out", f"{tmp_path}/out", "--local", "--held-out", "0"]
    assert run(*arguments, "--text-column", "body").exit_code == 0
    assert run(*arguments).exit_code == command.Exit.DATA


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"source": "absent"}, 2, "no such file"),
        ({"source": "s3://key:hunter2@bucket"}, 2, "credentials belong into AWS_* variables"),
        ({"out": "gs://bucket/tokens"}, 2, "gs:// is not supported; use s3://bucket/prefix"),
        ({"out": "s3://"}, 2, "names no bucket"),
        ({"out": "/dev/null/tokens"}, 2, "is a file, not a folder"),
        ({"out": ""}, 2, "write . for the one you are in"),
        ({"source": ""}, 2, "write . for the one you are in"),
        ({"--held-out": "1"}, 2, "held_out=1.0 is not a share"),
        ({"--vocab-size": "10"}, 2, "vocab_size=10 cannot hold"),
        ({"--vocab-size": "99999999999"}, 2, "use at most 4194304"),  # the library ended the process
        ({"--block-tokens": "1"}, 2, "block_tokens=1 holds no sample"),
        ({"--block-tokens": "300000000"}, 2, "block_tokens=300000000 is too much to be read at once"),
        ({"--tokenizer": "absent.json"}, 2, "absent.json: there is no such file; name a tokenizer.json"),
        ({"--tokenizer": "/dev/null"}, 2, "/dev/null: this is no tokenizer.json"),
        ({"--held-out": "0.999999"}, 3, "no text to train on: 20 held out; add documents"),
    ],
    ids=str,
)
def test_mistaken_preparation_is_refused(changes: dict[str, str], code: int, words: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "text.jsonl", texts(20))
    chosen = {"source": f"{tmp_path}/text.jsonl", "out": f"{tmp_path}/tokens", **changes}
    options = [word for name, value in chosen.items() if name.startswith("--") for word in (name, value)]
    result = run("prepare", chosen["source"], "--out", chosen["out"], "--local", *options)
    assert result.exit_code == code, result.output
    assert words in result.stderr and "hunter2" not in result.stderr
    assert result.stderr.count("\n") == 1


def test_line_that_is_no_document_is_bad_data_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "well"}\nnot json\n')
    result = run("prepare", str(tmp_path), "--out", str(tmp_path / "tokens"), "--local")
    assert result.exit_code == command.Exit.DATA
    assert "text.jsonl, byte 0 plus 1 lines: not JSON" in result.stderr


# -- the process -----------------------------------------------------------------------------------------------------


def test_interrupted_command_ends_beside_threads_that_do_not() -> None:
    """With what is to be done at exit, and without the end of an interpreter under them."""
    program = """
import atexit, os, signal, sys, threading
import typer
from elastic_lm import cli

class Global:
    def __del__(self):
        os.write(1, b"the interpreter has ended")

def hang():
    print("said")
    threading.Thread(target=threading.Event().wait).start()
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait(30)

kept = Global()
atexit.register(print, "done at exit")
cli.app = typer.Typer()
cli.app.command()(hang)
sys.argv = ["elastic-lm"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (130, "said\ndone at exit\n"), done.stderr


def process(*arguments: str, **streams: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "elastic_lm", *arguments], text=True, timeout=60, **streams)  # type: ignore[call-overload, no-any-return]


def test_process_ends_with_the_code_and_no_traceback(tmp_path: Path) -> None:
    done = process("train", str(tmp_path / "absent.yaml"), capture_output=True)
    assert done.returncode == command.Exit.USAGE
    assert done.stderr.startswith("elastic-lm: cannot read the config") and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["version"], ["config", "schema"], ["--help"], ["data", "show", "--help"]])
def test_output_that_a_full_disk_does_not_take_is_an_error(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = process(*arguments, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == command.Exit.UNAVAILABLE
    assert done.stderr.startswith("elastic-lm: the output could not be written: No space left on device")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code"), [(["version"], 0), (["data", "info", "absent"], 2), (["absent"], 2), ([], 2)], ids=str
)
@pytest.mark.parametrize("number", [0, 1, 2], ids=["stdin", "stdout", "stderr"])
def test_stream_that_was_closed_before_changes_no_exit_code(arguments: list[str], code: int, number: int) -> None:
    done = process(*arguments, preexec_fn=lambda: os.close(number), stderr=None if number == 2 else subprocess.PIPE)
    assert done.returncode == code
    assert "Traceback" not in (done.stderr or "")


def test_nothing_that_a_terminal_acts_on_gets_into_a_message() -> None:
    told = run("data", "info", "no\x1b[31mthing")
    assert told.exit_code == command.Exit.USAGE
    assert "\x1b" not in told.stderr and "no\\x1b[31mthing" in told.stderr


@pytest.mark.parametrize(
    ("stream", "kind"), [("stdout", "closed pipe"), ("stderr", "closed pipe"), ("stderr", "full device")]
)
def test_stream_that_takes_nothing_changes_no_exit_code(stream: str, kind: str, tmp_path: Path) -> None:
    if kind == "closed pipe":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open("/dev/full", os.O_WRONLY)
    other = {"stdout": "stderr", "stderr": "stdout"}[stream]
    arguments = ["version"] if stream == "stdout" else ["train", str(tmp_path / "absent.yaml")]
    try:
        done = process(*arguments, **{stream: write, other: subprocess.PIPE})
    finally:
        os.close(write)
    assert done.returncode == (command.Exit.DONE if stream == "stdout" else command.Exit.USAGE)
    assert not getattr(done, other)


def test_preparation_whose_output_nobody_takes_ends_with_its_corpus(tmp_path: Path) -> None:
    source, out = write_lines(tmp_path / "text.jsonl", texts(50)), f"{tmp_path}/tokens"
    read, write = os.pipe()
    os.close(read)
    try:
        done = process("prepare", source, "--out", out, "--vocab-size", "261", "--local", stdout=write, stderr=-1)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (command.Exit.DONE, "")
    assert Manifest.load(Storage.open(out)).num_tokens > 0
