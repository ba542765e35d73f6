"""One name for a state, whoever hashed its tensors."""

from __future__ import annotations

from elastic_lm.checkpoint.layout import Entry
from elastic_lm.engine.digest import checkpoint_digests, state_digest

WEIGHT, MOMENT = "parameters/head", "exp_avg/head"
TENSORS = {MOMENT: Entry("F32", (2, 3), "b" * 64), WEIGHT: Entry("F32", (2, 3), "a" * 64)}


def test_digest_is_the_same_in_whatever_order_tensors_come() -> None:
    named = [(name, entry.shape, entry.sha256) for name, entry in TENSORS.items()]
    assert state_digest(7, named) == state_digest(7, reversed(named)) != state_digest(8, named)


def test_checkpoint_tells_the_weights_apart_from_the_state() -> None:
    digests = checkpoint_digests(7, TENSORS)
    assert digests["state"] == state_digest(7, [(name, (2, 3), TENSORS[name].sha256) for name in (WEIGHT, MOMENT)])
    assert digests["weights"] == state_digest(7, [(WEIGHT, (2, 3), "a" * 64)])
    other_moment = {**TENSORS, MOMENT: Entry("F32", (2, 3), "c" * 64)}
    assert checkpoint_digests(7, other_moment)["weights"] == digests["weights"]
    assert checkpoint_digests(7, other_moment)["state"] != digests["state"]
