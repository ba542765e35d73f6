"""Forks with a model of another shape: what is kept, what is new, the same loss where it is to be, and no half of a run."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_lm.checkpoint import registry, store
from elastic_lm.checkpoint.layout import folder_of
from elastic_lm.config import RunConfig
from elastic_lm.engine.state import digest_of
from elastic_lm.errors import ConfigError, ElasticLMError
from elastic_lm.experiment.fork import Draft, Request, fork
from elastic_lm.experiment.lineage import Lineage
from elastic_lm.run import Run
from elastic_lm.runtime.plan import make_plan
from elastic_lm.storage import Storage
from tests.experiment.killed import Killed, Mortal
from tests.experiment.parents import address_of, contents, cut_small, forget, forked, step_fields, trained
from tests.solo import Solo, solo_config
from tests.test_cli import run

STEPS, AT = 8, 4
DEEPER = "model.num_layers=3"
ROUNDING = 1e-6  # of a loss of about 6
KINDS = ("parameters", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def parents(small_corpus: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    """Runs of eight steps, with checkpoints at steps 4 and 8."""
    storage = f"file://{tmp_path_factory.mktemp('parents')}"
    shape = {"num_layers": 2, "num_heads": 2, "width": 16}
    kinds: dict[str, dict[str, Any]] = {
        "causal": {"model": shape},
        "untied": {"model": {**shape, "tied": False, "norm_placement": "sandwich"}},
        "masked": {
            "model": {**shape, "position": "learned", "norm": "layernorm", "activation": "gelu", "num_kv_heads": 1},
            "objective": {"name": "masked", "mask_ratio": 0.3},
        },
        "muon": {"model": shape, "optimizer": {"kind": "muon"}},
    }
    configs = {
        name: solo_config(small_corpus, storage, name, steps=STEPS, **changes) for name, changes in kinds.items()
    }
    for config in configs.values():
        trained(config, AT)
        cut_small(config, AT)
    return configs


@pytest.fixture
def parent(parents: dict[str, RunConfig]) -> RunConfig:
    return parents["causal"]


_NUMBERS = itertools.count()


def altered(parent: RunConfig, *overrides: str, step: int = AT) -> Any:
    """A fork of a name that no other test has."""
    return forked(parent, f"{parent.name}-{next(_NUMBERS)}", step=step, overrides=list(overrides))


def moved(parent: RunConfig, folder: Path, *, part_bytes: int) -> RunConfig:
    """A copy of the run that a test may spoil, with its checkpoint of step 4 in parts of another size."""
    config = parent.replace(f"storage=file://{folder}")
    here, there = Storage.open(parent.run_url), Storage.open(config.run_url)
    for path in here.list():
        there.write(path, here.read(path))
    cut_small(config, AT, part_bytes)
    return config


def tensors(config: RunConfig, step: int = AT) -> dict[str, torch.Tensor]:
    return store.load(Storage.open(config.run_url), step).tensors


# -- the loss and the state ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "overrides", "tolerance"),
    [
        ("causal", [DEEPER], 0.0),  # x + 0 is x
        ("causal", ["model.tied=false"], 0.0),
        ("causal", ["model.hidden=80"], ROUNDING),
        ("causal", ["model.bias=true"], ROUNDING),
        ("untied", [DEEPER], 0.0),
        ("untied", ["model.hidden=80"], ROUNDING),
        ("masked", [DEEPER, "model.max_tokens=50"], 0.0),
        ("masked", ["model.hidden=80", "model.num_kv_heads=2"], ROUNDING),
        ("muon", [DEEPER, "model.hidden=80"], ROUNDING),
    ],
)
def test_first_step_of_the_fork_has_the_loss_that_its_parent_has_there(
    kind: str, overrides: list[str], tolerance: float, parents: dict[str, RunConfig]
) -> None:
    parent = parents[kind]
    made = altered(parent, *overrides)
    assert made.lineage.surgery is not None and made.lineage.surgery.differs == ()
    assert Solo(made.config).train().last_step == STEPS
    mine, theirs = step_fields(made.config), step_fields(parent)
    assert mine[AT]["sample_hash"] == theirs[AT]["sample_hash"]
    assert mine[AT]["loss"] == pytest.approx(theirs[AT]["loss"], abs=tolerance, rel=0)
    assert mine[AT + 1]["loss"] != theirs[AT + 1]["loss"]  # what is new has learned


@pytest.mark.parametrize(
    "change",
    ["model.qk_norm=true", "model.embedding_norm=true", "model.norm_placement=sandwich", "model.num_layers=1"],
)
def test_fork_that_computes_something_else_trains(change: str, parent: RunConfig) -> None:
    made = altered(parent, change)
    assert made.lineage.surgery is not None and made.lineage.surgery.differs
    assert Solo(made.config).train().last_step == STEPS
    assert step_fields(made.config)[AT]["loss"] != step_fields(parent)[AT]["loss"]


def test_what_is_kept_is_kept_to_the_bit_with_its_moments(parents: dict[str, RunConfig]) -> None:
    for kind in ("causal", "muon"):
        parent = parents[kind]
        made = altered(parent, DEEPER, "model.qk_norm=true")
        was, now = tensors(parent), tensors(made.config)
        assert was.keys() <= now.keys()
        assert all(torch.equal(now[name], was[name]) for name in was)
        new = now.keys() - was.keys()
        assert {name.partition("/")[0] for name in new} == set(KINDS)
        assert not any(now[name].any() for name in new if not name.startswith("parameters/"))
        assert "exp_avg_sq/blocks.2.attention.qkv.weight" in now or kind == "muon"


def test_wider_matrix_keeps_the_moments_of_what_it_had(parents: dict[str, RunConfig]) -> None:
    parent = parents["muon"]
    was, now = tensors(parent), tensors(altered(parent, "model.hidden=80").config)
    name = "exp_avg/blocks.0.feed_forward.residual.weight"
    old = was[name].shape[1]
    assert was[name].any() and torch.equal(now[name][:, :old], was[name]) and not now[name][:, old:].any()


def test_head_of_its_own_goes_on_with_the_moments_of_the_embedding(parent: RunConfig) -> None:
    now = tensors(altered(parent, "model.tied=false").config)
    assert all(torch.equal(now[f"{kind}/head.weight"], now[f"{kind}/embedding.weight"]) for kind in KINDS)
    assert now["exp_avg_sq/head.weight"].any()


# -- the checkpoint and the lineage -------------------------------------------------------------------------------------


def test_parts_are_copies_but_for_those_with_what_is_changed(parents: dict[str, RunConfig]) -> None:
    parent = parents["masked"]
    made = altered(parent, "model.max_tokens=50")
    here, there = (registry.manifest_of(Storage.open(url), AT) for url in (parent.run_url, made.url))
    kept = {part.name for part in here.parts} & {part.name for part in there.parts}
    changed = [part for part in here.parts if part.name not in kept]
    assert kept and all(any("positions.weight" in name for name in part.tensors) for part in changed)
    assert there.tensors.keys() == here.tensors.keys()


def test_checkpoint_names_the_state_that_it_holds(parent: RunConfig) -> None:
    made = altered(parent, DEEPER)
    folder = Storage.open(made.url)
    manifest = registry.verified(folder, AT)
    now = tensors(made.config)
    weights = {name: tensor for name, tensor in now.items() if name.startswith("parameters/")}
    assert manifest.meta["digest"] == {"state": digest_of(now, AT), "weights": digest_of(weights, AT)}
    assert manifest.meta["digest"] != made.lineage.parent.digest
    assert manifest.meta["fingerprint"] == made.config.identity_fingerprint()
    assert make_plan(made.config).resume_step == AT


def test_fork_that_keeps_the_shape_is_a_copy(parent: RunConfig) -> None:
    made = altered(parent, "optimizer.learning_rate=1e-3", "model.dropout=0.1")
    assert made.lineage.surgery is None
    here, there = (registry.manifest_of(Storage.open(url), AT) for url in (parent.run_url, made.url))
    assert there.parts == here.parts and there.meta["digest"] == here.meta["digest"]


def test_same_fork_has_the_same_bits_however_its_parent_is_cut(parent: RunConfig, tmp_path: Path) -> None:
    first, second = altered(parent, DEEPER), altered(parent, DEEPER)
    safetensors = [
        {path: data for path, data in contents(made.url).items() if path.endswith(".safetensors")}
        for made in (first, second)
    ]
    assert safetensors[0] == safetensors[1] != {}
    third = altered(moved(parent, tmp_path, part_bytes=20_000), DEEPER)
    digests = {
        registry.manifest_of(Storage.open(made.url), AT).meta["digest"]["state"] for made in (first, second, third)
    }
    assert len(digests) == 1
    other = altered(parent, DEEPER, "training.seed=1")
    now, others = tensors(first.config), tensors(other.config)
    is_same = {name: torch.equal(now[name], others[name]) for name in now}
    assert not is_same["parameters/blocks.2.attention.qkv.weight"]
    assert all(same for name, same in is_same.items() if "blocks.2" not in name)


def test_lineage_keeps_the_account_over_generations(parent: RunConfig) -> None:
    first = altered(parent, DEEPER)
    trained(first.config, 6)
    second = altered(first.config, "model.num_layers=1", "model.hidden=64", step=6)
    loaded = Lineage.load(Storage.open(second.url))
    assert loaded == second.lineage
    newer, older = (link.surgery for link in loaded.chain())
    assert newer is not None and older is not None
    assert (newer.matched, {fate.kind for fate in newer.fates}) == (6, {"padded", "dropped"})
    assert (older.matched, {fate.begins for fate in older.fates}) == (14, {"zero", "one", "as in a new model"})
    assert Solo(second.config).train().last_step == STEPS


def test_commands_tell_what_became_of_the_parameters(parent: RunConfig) -> None:
    name = f"told-{next(_NUMBERS)}"
    overrides = ("--set", "model.num_layers=4", "--set", "model.qk_norm=true")
    told = run("fork", f"{parent.run_url}@{AT}", "--name", name, *overrides)
    assert told.exit_code == 0, told.stderr
    lines = [" ".join(line.split()) for line in told.stdout.splitlines()]
    assert lines[1:3] == ["model.num_layers: 2 -> 4", "model.qk_norm: None -> True"]
    assert lines[3] == "Parameters: 14 matched, 20 added."
    assert "added blocks.[0:4].attention.q_norm.weight [8] one" in lines
    assert "added blocks.[2:4].feed_forward.residual.weight [16, 48] zero" in lines
    assert lines[-2].endswith("than its parent's: the norms of queries and keys begin.")
    shown = [
        " ".join(line.split()) for line in run("runs", "show", f"{parent.storage}/runs/{name}").stdout.splitlines()
    ]
    assert set(lines[1:-1]) <= set(shown)


def test_account_is_told_before_anything_is_written(parent: RunConfig) -> None:
    name = f"{parent.name}-{next(_NUMBERS)}"
    drafts: list[Draft] = []

    def on_draft(draft: Draft) -> None:
        assert not Storage.open(f"{parent.storage}/runs/{name}").list()
        drafts.append(draft)

    made = fork(Request(address_of(parent), name, AT, None, [DEEPER]), on_draft)
    assert drafts[0].lineage.surgery == made.lineage.surgery is not None


# -- cut short at any moment, and a parent that trains -------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_surgery_that_is_killed_at_any_moment_is_finished_by_the_same_command(
    late: bool, parent: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = moved(parent, tmp_path, part_bytes=40_000)
    overrides = [DEEPER, "model.tied=false", "model.hidden=64"]
    mortal = Mortal(monkeypatch, f"{parent.storage}/runs/killed-{late}")
    forked(parent, f"killed-{late}-whole", step=AT, overrides=overrides)
    whole, needed = contents(f"{parent.storage}/runs/killed-{late}-whole"), mortal.count
    assert needed >= 8
    for allowed in range(needed):
        name = f"killed-{late}-{allowed}"
        mortal.left, mortal.late = allowed, late
        with pytest.raises(Killed):
            forked(parent, name, step=AT, overrides=overrides)
        mortal.left = 10**9
        folder = Storage.open(f"{parent.storage}/runs/{name}")
        if folder.exists("config.yaml"):
            assert allowed >= needed - 1 - late
            continue
        with pytest.raises(ElasticLMError, match="no run at"):
            Run.open(folder.url).address.config()
        forked(parent, name, step=AT, overrides=overrides)
        mine = contents(folder.url)
        assert mine.keys() == whole.keys()
        assert all(mine[path] == whole[path] for path in mine if path.endswith(".safetensors"))


def test_surgery_that_was_cut_short_needs_its_parent_no_more(
    parent: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = moved(parent, tmp_path, part_bytes=40_000)
    mortal = Mortal(monkeypatch, f"{parent.storage}/runs/new")
    whole = forked(parent, "new-whole", step=AT, overrides=[DEEPER])
    mortal.left = mortal.count - 3  # all but the manifest and config.yaml
    with pytest.raises(Killed):
        forked(parent, step=AT, overrides=[DEEPER])
    mortal.left = 10**9
    forget(parent, AT)
    told: list[Draft] = []
    made = fork(Request(address_of(parent), "new", AT, None, [DEEPER]), told.append)
    assert told[0].lineage.surgery == made.lineage.surgery == whole.lineage.surgery is not None
    here, there = (registry.verified(Storage.open(each.url), AT) for each in (made, whole))
    assert here.parts == there.parts and here.meta["digest"] == there.meta["digest"]


def test_parts_of_another_surgery_that_was_cut_short_are_swept(
    parent: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{parent.name}-{next(_NUMBERS)}"
    mortal = Mortal(monkeypatch, f"{parent.storage}/runs/{name}")
    mortal.left = 5  # parts, and no lineage
    with pytest.raises(Killed):
        forked(parent, name, step=AT, overrides=["model.hidden=64"])
    mortal.left = 10**9
    made = forked(parent, name, step=AT, overrides=[DEEPER])
    there = {path for path in contents(made.url) if path.endswith(".safetensors")}
    named = {f"{folder_of(AT)}/{part.name}" for part in registry.manifest_of(Storage.open(made.url), AT).parts}
    assert there == named


def test_surgery_that_is_another_does_not_finish_the_first(parent: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{parent.name}-{next(_NUMBERS)}"
    mortal = Mortal(monkeypatch, f"{parent.storage}/runs/{name}")
    forked(parent, f"{name}-whole", step=AT, overrides=[DEEPER])
    mortal.left = mortal.count - 2  # all but config.yaml
    with pytest.raises(Killed):
        forked(parent, name, step=AT, overrides=[DEEPER])
    mortal.left = 10**9
    with pytest.raises(ConfigError, match="that is not finished, and this is another"):
        forked(parent, name, step=AT, overrides=["model.num_layers=4"])
    assert forked(parent, name, step=AT, overrides=[DEEPER]).lineage.surgery is not None


def test_checkpoint_that_is_deleted_meanwhile_is_replaced_by_the_newest_then(parent: RunConfig, tmp_path: Path) -> None:
    parent = moved(parent, tmp_path, part_bytes=40_000)
    drafts: list[int] = []

    def on_draft(draft: Draft) -> None:
        drafts.append(draft.origin.step)
        if draft.origin.step == STEPS:
            forget(parent, STEPS)

    overrides = [DEEPER, "training.steps=20", "schedule.total_steps=8"]
    made = fork(Request(address_of(parent), "new", overrides=overrides), on_draft)
    assert drafts == [STEPS, AT]
    assert registry.newest_complete(Storage.open(made.url)) is not None


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([DEEPER, "optimizer.betas=[0.0, 0.9999]"], "betas=[0.0, 0.9999] its first updates are up to 3.0 learning rates"),
        ([DEEPER], None),
        (["model.num_layers=1", "optimizer.betas=[0.0, 0.9999]"], None),  # nothing is new
        (["model.tied=false", "optimizer.betas=[0.0, 0.9999]"], None),  # a copy, with its moments
        (["model.hidden=80", "optimizer.betas=[0.3, 0.9999]"], "2.1 learning rates long; a second beta of 0.95 avoids that."),
        (["model.hidden=80", "optimizer.betas=[0.0, 0.95]"], "are up to 2.7 learning rates long."),  # and there is no remedy
    ],
)  # fmt: skip
def test_long_first_updates_of_what_is_new_are_told(overrides: list[str], told: str | None, parent: RunConfig) -> None:
    assert_note(parent, overrides, told)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("model.hidden=80", None),  # in matrices that Muon updates
        ("model.num_layers=3", "its first updates are up to 3.0 learning rates long"),  # its norms
    ],
)
def test_update_of_muon_is_not_said_to_be_long(change: str, told: str | None, parents: dict[str, RunConfig]) -> None:
    assert_note(parents["muon"], [change, "optimizer.betas=[0.0, 0.9999]"], told)


def assert_note(parent: RunConfig, overrides: list[str], told: str | None) -> None:
    note = Draft.of(Request(address_of(parent), "new", STEPS, None, [*overrides, "training.steps=20"]), STEPS).note
    assert note is None if told is None else told in str(note)
