"""`elastic-lm estimate` and `train --dry-run`: where the numbers are from, what is told without them, and that nothing starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from elastic_lm import RunConfig
from elastic_lm.checkpoint import store
from elastic_lm.events.types import EventKind
from elastic_lm.result import RunResult
from elastic_lm.runtime.plan import make_plan
from elastic_lm.storage import Storage
from tests.conftest import Fake
from tests.data.corpora import small_corpus
from tests.monitor.story import at
from tests.test_cli import run, write_config
from tests.test_cli_run import write_log

TINY = 100_672 + 300 * 64  # blocks and norms, and an embedding of 300 rows that is the head as well


def rows_of(output: str) -> list[list[str]]:
    """The table of workers."""
    lines = output.splitlines()
    start = next(number for number, line in enumerate(lines) if line.lstrip().startswith("workers  "))
    return [line.split() for line in lines[start + 1 : lines.index("", start)]]


def told(*arguments: str) -> dict[str, Any]:
    done = run("estimate", *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# -- the vocabulary --------------------------------------------------------------------------------------------------


def test_vocabulary_is_given_or_the_configs_or_the_corpuss(tmp_path: Path) -> None:
    file = write_config(tmp_path)
    assert told(file, "--vocab-size", "301")["num_parameters"] == TINY + 64
    assert told(file, "--set", "model.vocab_size=302")["num_parameters"] == TINY + 2 * 64
    _, manifest = small_corpus(tmp_path)
    assert manifest.vocab_size == 300
    assert told(file)["num_parameters"] == TINY


def test_without_a_vocabulary_it_is_said_what_to_do(tmp_path: Path) -> None:
    done = run("estimate", write_config(tmp_path))
    assert (done.exit_code, done.stdout) == (3, "")
    assert "elastic-lm prepare" in done.stderr and "--vocab-size" in done.stderr


def test_model_that_is_smaller_than_the_corpus_is_refused(tmp_path: Path) -> None:
    done = run("estimate", write_config(tmp_path), "--set", "model.vocab_size=10", "--vocab-size", "300")
    assert done.exit_code == 2
    assert "model.vocab_size=10 is smaller than the corpus's vocabulary of 300" in done.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [("--tokens-per-second", value) for value in ("0", "-1", "nan", "inf", "many")]
    + [("--vocab-size", value) for value in ("0", "-5", "1.5")],
)
def test_option_that_is_no_figure_is_refused(option: str, value: str, tmp_path: Path) -> None:
    done = run("estimate", write_config(tmp_path), option, value)
    assert done.exit_code == 2
    assert option in done.stderr and done.stdout == ""


# -- the model -------------------------------------------------------------------------------------------------------


def test_factory_is_found_in_the_folder_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n\ndef build(vocab_size, max_tokens, width):\n"
        "    print('building')\n    return nn.Embedding(vocab_size, width)\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    factory = {"factory": "my_models:build", "args": {"width": 7}}
    done = run("estimate", write_config(tmp_path, model=factory), "--vocab-size", "1000")
    assert done.exit_code == 0, done.stderr
    assert "parameters  7,000\n" in done.stdout and "building" not in done.stdout
    assert "not known for a model of your own" in done.stdout
    assert sys.path == path


def test_factory_that_fails_is_the_users_mistake(tmp_path: Path) -> None:
    factory = {"factory": "tests.engine.user_code:bag", "args": {"widht": 7}}
    done = run("estimate", write_config(tmp_path, model=factory), "--vocab-size", "1000")
    assert done.exit_code == 2
    assert "widht" in done.stderr and "Traceback" not in done.stderr


# -- the speed -------------------------------------------------------------------------------------------------------


def committed(step: int, step_s: float, world_size: int) -> Any:
    fields = {"num_targets": 256, "step_s": step_s, "world_size": world_size}
    return at(step, EventKind.STEP_COMMITTED, step=step, **fields)


def test_given_speed_gives_hours(tmp_path: Path) -> None:
    """32 tokens a second is a micro-batch a second: 8, 4 or 3 of them in each of 100 steps."""
    file = write_config(tmp_path, workers={"max": 3})
    found = told(file, "--vocab-size", "300", "--tokens-per-second", "32")
    assert [row["hours"] for row in found["workers"]] == pytest.approx([800 / 3600, 400 / 3600, 300 / 3600])
    text = run("estimate", file, "--vocab-size", "300", "--tokens-per-second", "32").stdout
    assert [row[-1] for row in rows_of(text)] == ["0.222", "0.111", "0.0833"]
    assert "Hours at 32 tokens/s of one worker, as given" in text


def test_speed_is_taken_from_the_runs_log(tmp_path: Path) -> None:
    """Three workers took 1.5 s for 3 micro-batches of 32 tokens each: 64 tokens/s of one. One odd step changes nothing."""
    write_log(tmp_path, *(committed(step, 9.0 if step == 1 else 1.5, 3) for step in range(5)))
    file = write_config(tmp_path, name="mine", workers={"max": 3})
    assert told(file, "--vocab-size", "300")["tokens_per_s_per_worker"] == pytest.approx(256 / 8 * 3 / 1.5)
    assert told(file, "--vocab-size", "300", "--tokens-per-second", "1")["tokens_per_s_per_worker"] == 1
    text = " ".join(run("estimate", file, "--vocab-size", "300").stdout.split())
    assert "Hours at 64 tokens/s of one worker, the median of the last 5 steps in its log" in text


def test_without_a_speed_it_is_said_how_to_give_one(tmp_path: Path) -> None:
    done = run("estimate", write_config(tmp_path), "--vocab-size", "300")
    assert "--tokens-per-second" in done.stdout
    assert [row[-1] for row in rows_of(done.stdout)] == ["-"]


def test_log_that_cannot_be_read_is_told_and_stops_nothing(tmp_path: Path) -> None:
    events = tmp_path / "runs" / "first" / "events"
    events.mkdir(parents=True)
    (events / "000000000000.jsonl").symlink_to("000000000000.jsonl")  # reading it fails, whoever asks
    done = run("estimate", write_config(tmp_path), "--vocab-size", "300")
    assert done.exit_code == 0
    assert "its log could not be read" in " ".join(done.stdout.split())


# -- what is told ----------------------------------------------------------------------------------------------------


def test_lines_fit_a_terminal(tmp_path: Path) -> None:
    changes = ["batch.micro_batches=4000", "workers.max=3999", "training.steps=1000000000", "model.preset=1.3b"]
    words = [word for change in changes for word in ("--set", change)]
    done = run("estimate", write_config(tmp_path), "--vocab-size", "50000", "--tokens-per-second", "0.5", *words)
    assert done.exit_code == 0, done.stderr
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    assert len(rows_of(done.stdout)) <= 12


def test_poor_split_is_answered_with_a_better_one_and_what_it_does(tmp_path: Path) -> None:
    file = write_config(tmp_path, workers={"max": 7})  # 8 x 2 samples: 57% with 7 workers
    text = " ".join(run("estimate", file, "--vocab-size", "300").stdout.split())
    assert "worst 57% with 7," in text
    assert "Better: batch.micro_batches=16 and batch.micro_batch_size=1" in text
    assert "the global batch stays at 16 samples" in text
    assert "Better: batch.micro_batches=15 " not in text  # 15/(7 x 3) is no better
    good = run("estimate", write_config(tmp_path, workers={"max": 4}), "--vocab-size", "300").stdout
    assert "Better" not in good


def test_changed_global_batch_is_told_with_both_sizes(tmp_path: Path) -> None:
    few = {"micro_batches": 8, "micro_batch_size": 1, "sequence_length": 16}
    file = write_config(tmp_path, batch=few, workers={"min": 3, "max": 3})
    text = " ".join(run("estimate", file, "--vocab-size", "300").stdout.split())
    assert "Better: batch.micro_batches=9 (worst 100%, mean 100%);" in text
    assert "the global batch becomes 9 samples in place of 8, +12%." in text


# -- train --dry-run -------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run over a small corpus. Nothing may start."""
    monkeypatch.setattr(ray, "init", lambda *args, **kwargs: pytest.fail("a cluster was started"))
    small_corpus(tmp_path)
    return write_config(tmp_path)


def test_dry_run_tells_the_estimate_and_starts_nothing(file: str, fake_fit: Fake, tmp_path: Path) -> None:
    configs = fake_fit(RunResult("done", "all steps"))
    done = run("train", file, "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith(run("estimate", file).stdout.rstrip())
    assert done.stdout.endswith("Nothing was started.\nThe run would begin at step 0.\n")
    assert configs == []
    assert not (tmp_path / "runs").exists()


def test_dry_run_says_where_the_run_would_go_on(file: str) -> None:
    config = make_plan(RunConfig.load(file)).config
    meta = {"fingerprint": config.identity_fingerprint(), "config": config.model_dump(mode="json")}
    store.save(Storage.open(config.run_url), 7, {"parameters/x": torch.zeros(2)}, meta)
    assert "would begin with the checkpoint of step 7" in run("train", file, "--dry-run").stdout
    refused = run("train", file, "--dry-run", "--set", "training.seed=5")
    assert refused.exit_code == 2
    assert "trained with other settings: training.seed: 0 -> 5" in refused.stderr


def test_dry_run_refuses_what_training_would(tmp_path: Path) -> None:
    done = run("train", write_config(tmp_path), "--dry-run")
    assert done.exit_code == 3
    assert "elastic-lm prepare" in done.stderr
    assert run("train", write_config(tmp_path), "--dry-run", "--set", "nmae=x").exit_code == 2


def test_dry_run_finds_a_damaged_corpus(file: str, tmp_path: Path) -> None:
    for shard in (tmp_path / "tokens" / "shards").iterdir():
        shard.write_bytes(bytes(shard.stat().st_size))
    done = run("train", file, "--dry-run")
    assert done.exit_code == 3
    assert "checksum" in done.stderr
