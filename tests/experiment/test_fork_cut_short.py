"""No half of a fork is a run: the same command finishes it whenever it was killed, and what others do at once is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from elastic_lm.checkpoint import registry, transfer
from elastic_lm.checkpoint.layout import folder_of
from elastic_lm.config import RunConfig
from elastic_lm.errors import CheckpointError, ConfigError, ElasticLMError
from elastic_lm.experiment.lineage import Lineage
from elastic_lm.experiment.rewinds import Rewind, decide, with_skip
from elastic_lm.run import Run
from elastic_lm.runtime.plan import make_plan
from elastic_lm.storage import Storage
from tests.checkpoint.saved import flip, parts_of
from tests.experiment.conftest import AT, STEPS
from tests.experiment.killed import Killed, Mortal
from tests.experiment.parents import address_of, contents, forget, forked
from tests.solo import Solo

# -- killed at any moment ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_fork_that_is_killed_at_any_moment_is_no_run_and_is_finished_by_the_same_command(
    late: bool, parent: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    mortal = Mortal(monkeypatch, f"{parent.storage}/runs/new")
    forked(parent, "new-whole", step=AT)
    needed = mortal.count
    assert needed >= 7  # several parts, what finishes it, lineage, manifest, config, and what finishes it away
    for allowed in range(needed):
        name = f"new-{allowed}"
        mortal.left, mortal.late = allowed, late
        with pytest.raises(Killed):
            forked(parent, name, step=AT)
        mortal.left = 10**9
        folder = Storage.open(f"{parent.storage}/runs/{name}")
        is_whole = folder.exists("config.yaml")
        assert is_whole == (allowed >= needed - 1 - late)
        if is_whole:
            with pytest.raises(ConfigError, match="holds a run already"):
                forked(parent, name, step=AT)
        else:
            with pytest.raises(ElasticLMError, match="no run at"):
                Run.open(folder.url).address.config()
            if folder.exists("lineage.json") and not folder.exists(f"{folder_of(AT)}/manifest.json"):
                with pytest.raises(
                    CheckpointError, match=f"not finished; give the command .*: elastic-lm fork .*{name}, "
                ):
                    make_plan(parent.replace(f"name={name}"))
            forked(parent, name, step=AT)
        assert Run.open(folder.url).address.config().name == name
        assert registry.newest_complete(folder) is not None
        whole = contents(f"{parent.storage}/runs/new-whole")
        mine = contents(folder.url)
        assert {path for path in mine if "/fork-" not in path or not is_whole} == whole.keys()
        assert all(mine[path] == whole[path] for path in mine if path.endswith(".safetensors"))


def test_beginning_of_another_fork_is_not_finished_by_a_wrong_command(
    parent: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    mortal = Mortal(monkeypatch, f"{parent.storage}/runs/new")
    forked(parent, "new-whole", step=AT)
    mortal.left = mortal.count - 2  # all but config.yaml
    with pytest.raises(Killed):
        forked(parent, step=AT)
    mortal.left = 10**9
    for other in ({"step": STEPS}, {"step": AT, "overrides": ["training.seed=1"]}):
        with pytest.raises(
            ConfigError, match="holds a fork of parent at step 4 that is not finished, and this is another"
        ):
            forked(parent, **other)
    assert forked(parent).lineage.parent.step == AT  # the newest when it was begun, as far as anybody knows


def cut_short(parent: RunConfig, monkeypatch: pytest.MonkeyPatch, missing: int, **more: Any) -> Storage:
    """A fork whose last `missing` writing operations have not happened.    Returns: its folder."""
    mortal = Mortal(monkeypatch, f"{parent.storage}/runs/new")
    forked(parent, f"new-whole-{missing}", step=AT, **more)
    mortal.left = mortal.count - missing
    with pytest.raises(Killed):
        forked(parent, step=AT, **more)
    mortal.left = 10**9
    return Storage.open(f"{parent.storage}/runs/new")


BEFORE_CONFIG, BEFORE_MANIFEST, BEFORE_LINEAGE = 2, 3, 4  # operations that are missing


def change_operational(parent: RunConfig) -> None:
    changed = address_of(parent).stored_config().replace("checkpoint.keep=9")
    Storage.open(parent.run_url).write("config.yaml", changed.to_yaml().encode())


def go_back(parent: RunConfig) -> None:
    """To before the step of the fork, as far as the parent is concerned."""
    left_out = ((3, 5),)
    fingerprint = with_skip(parent, left_out).identity_fingerprint()
    decide(Storage.open(parent.run_url), Rewind(1, "loss", "a spike", AT, AT, 3, (), left_out, fingerprint))


def lose(parent: RunConfig) -> None:
    folder = Storage.open(parent.run_url)
    for path in folder.list():
        folder.delete(path)


def lose_the_step(parent: RunConfig) -> None:
    forget(parent, AT)


@pytest.mark.parametrize("happens", [lose, lose_the_step, change_operational, go_back])
@pytest.mark.parametrize("missing", [BEFORE_CONFIG, BEFORE_MANIFEST])
def test_beginning_is_finished_whatever_the_parent_has_become(
    missing: int, happens: Callable[[RunConfig], None], parent: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"overrides": ["checkpoint.keep=4", "optimizer.weight_decay=0.2"], "skip": ((6, 7),)}
    folder = cut_short(parent, monkeypatch, missing, **asked)
    happens(parent)
    for other in ({}, {**asked, "skip": ()}, {**asked, "overrides": ["checkpoint.keep=4"]}):
        with pytest.raises(
            ConfigError, match="not finished, and this is another; give that command again .*, or choose"
        ) as told:
            forked(parent, step=AT, **other)
        assert "delete" not in str(told.value)
    made = forked(parent, step=AT, **asked)
    whole, mine = contents(f"{folder.url}-whole-{missing}"), contents(folder.url)
    assert mine.keys() == whole.keys()
    assert all(mine[path] == whole[path] for path in mine if path.endswith(".safetensors"))
    assert made.config == RunConfig.from_yaml(whole["config.yaml"].decode(), "").replace("name=new")
    assert Solo(made.config).train().last_step == STEPS


def test_beginning_whose_state_is_damaged_is_finished_from_the_parent(
    parent: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"step": AT, "overrides": ["checkpoint.keep=4"]}
    folder = cut_short(parent, monkeypatch, BEFORE_MANIFEST, overrides=["checkpoint.keep=4"])
    flip(folder, parts_of(folder, AT)[1])
    stored = Storage.open(parent.run_url).read("config.yaml")
    change_operational(parent)
    with pytest.raises(CheckpointError, match="cannot be: parent has changed since; delete that folder, and fork"):
        forked(parent, **asked)
    Storage.open(parent.run_url).write("config.yaml", stored)
    forked(parent, **asked)
    assert contents(folder.url).keys() == contents(f"{folder.url}-whole-{BEFORE_MANIFEST}").keys()
    assert registry.is_whole(folder, AT)


def test_beginning_of_an_earlier_version_tells_another_request_from_another_parent(
    parent: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing but its lineage."""
    asked = ["checkpoint.keep=4", "optimizer.weight_decay=0.2"]
    folder = cut_short(parent, monkeypatch, BEFORE_MANIFEST, overrides=asked)
    (needed,) = (path for path in folder.list() if "/fork-" in path)
    folder.delete(needed)
    with pytest.raises(ConfigError, match="this is another"):
        forked(parent, step=AT, overrides=["checkpoint.keep=4", "optimizer.weight_decay=0.3"])
    change_operational(parent)
    with pytest.raises(CheckpointError, match="cannot be: parent has changed since"):
        forked(parent, step=AT, overrides=asked)
    stored = address_of(parent).stored_config().replace("checkpoint.keep=2")
    Storage.open(parent.run_url).write("config.yaml", stored.to_yaml().encode())
    assert forked(parent, step=AT, overrides=asked).config.checkpoint.keep == 4


def test_beginning_that_cannot_be_finished_says_what_to_do(parent: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cut_short(parent, monkeypatch, BEFORE_CONFIG)
    (needed,) = (path for path in folder.list() if "/fork-" in path)
    folder.write(needed, b"{}")
    forget(parent, AT)
    with pytest.raises(
        CheckpointError, match=r"cannot be: .*no checkpoint of step 4.*; choose another --name, and keep"
    ):
        forked(parent, step=AT)
    folder.delete(parts_of(folder, AT)[0])
    with pytest.raises(CheckpointError, match=r"cannot be: .*no checkpoint of step 4.*; delete that folder"):
        forked(parent, step=AT)


def test_what_finishes_one_fork_does_not_finish_another(parent: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lineage of a second fork comes into a folder where a first one was cut short before its own."""
    folder = cut_short(parent, monkeypatch, BEFORE_LINEAGE, overrides=["training.seed=1"])
    assert any("/fork-" in path for path in folder.list())
    made = forked(parent, step=AT)
    assert made.config.training.seed != 1
    assert not any("/fork-" in path for path in folder.list())
    assert registry.manifest_of(folder, AT).meta["fingerprint"] == made.lineage.fingerprint


def test_parts_of_an_earlier_attempt_are_swept(parent: RunConfig) -> None:
    folder = Storage.open(f"{parent.storage}/runs/new")
    folder.write(f"{folder_of(7)}/part-00000-000-{'0' * 16}.safetensors", b"x")
    made = forked(parent, step=AT)
    assert [found.step for found in registry.found(Storage.open(made.url))] == [AT]


# -- others at once ----------------------------------------------------------------------------------------------------


def before_each(monkeypatch: pytest.MonkeyPatch, verb: str, path: str, act: Callable[[Storage], None]) -> None:
    """Somebody else acts on the folder right before its next `verb` on this path, once."""
    real, waiting = getattr(Storage, verb), [act]

    def operation(storage: Storage, name: str, *data: bytes) -> None:
        if name == path and waiting:
            waiting.pop()(storage)
        return real(storage, name, *data)

    monkeypatch.setattr(Storage, verb, operation)


def test_forks_of_one_name_that_are_made_at_once_do_not_mix(parent: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one's lineage comes right before this one's."""
    asked = ["training.seed=1", "model.num_layers=2"]
    folder = cut_short(parent, monkeypatch, BEFORE_MANIFEST, overrides=asked)
    others = contents(folder.url)
    for path in others:
        folder.delete(path)
    before_each(
        monkeypatch, "create", "lineage.json", lambda there: [there.write(*each) for each in others.items()] and None
    )
    with pytest.raises(ConfigError, match="not finished, and this is another"):
        forked(parent, step=AT)
    assert len([path for path in folder.list() if "/fork-" in path]) == 2
    lose(parent)
    made = forked(parent, step=AT, overrides=asked)
    assert (made.config.training.seed, made.config.model.num_layers) == (1, 2)
    assert contents(folder.url).keys() == contents(f"{folder.url}-whole-{BEFORE_MANIFEST}").keys()
    assert registry.verified(folder, AT).meta["fingerprint"] == made.config.identity_fingerprint()


def test_same_fork_made_twice_at_once_keeps_its_lineage(parent: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other command finishes as soon as this one has written the lineage."""
    real, waiting = Storage.create, [True]

    def create(storage: Storage, name: str, data: bytes) -> None:
        real(storage, name, data)
        if name == "lineage.json" and waiting:
            waiting.pop()
            forked(parent, step=AT)

    monkeypatch.setattr(Storage, "create", create)
    with pytest.raises(ConfigError, match="holds a run already"):
        forked(parent, step=AT)
    assert make_plan(parent.replace("name=new")).resume_step == AT
    assert Lineage.load(Storage.open(f"{parent.storage}/runs/new")) is not None


def test_checkpoints_of_a_run_that_trains_at_once_are_not_swept(
    parent: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = f"{folder_of(7)}/manifest.json"
    before_each(monkeypatch, "create", "config.yaml", lambda folder: folder.write(later, b"of step 7"))
    real = registry.publish

    def publish(folder: Storage, *given: Any, **more: Any) -> Any:
        info = real(folder, *given, **more)
        folder.write(f"{folder_of(6)}/part", b"of step 6")
        return info

    monkeypatch.setattr(registry, "publish", publish)
    made = forked(parent, step=AT)
    assert {later, f"{folder_of(6)}/part"} <= contents(made.url).keys()


def test_run_that_begins_before_the_lineage_is_written_is_not_claimed(
    parent: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = transfer.copy_parts

    def copy_parts(origin: Storage, manifest: Any, folder: Storage) -> None:
        real(origin, manifest, folder)
        folder.write("owner/00000001.json", b"somebody")

    monkeypatch.setattr(transfer, "copy_parts", copy_parts)
    created: list[bytes] = []
    before_each(monkeypatch, "create", "lineage.json", lambda folder: created.append(b""))
    with pytest.raises(ConfigError, match="holds a run already"):
        forked(parent, step=AT)
    assert not created and not Storage.open(f"{parent.storage}/runs/new").exists("lineage.json")


def test_lineage_is_taken_back_where_a_run_has_begun_meanwhile(
    parent: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_each(monkeypatch, "create", "lineage.json", lambda folder: folder.write("owner/00000001.json", b"somebody"))
    with pytest.raises(ConfigError, match="holds a run already"):
        forked(parent, step=AT)
    there = contents(f"{parent.storage}/runs/new").keys()
    assert "owner/00000001.json" in there and "lineage.json" not in there
    assert not any(path.endswith("manifest.json") for path in there)
