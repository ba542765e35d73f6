"""An evaluation: a run's model at a step, asked one task after another.

Invariant: nothing is asked before every task is known to be in order, and all answers are of the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace

from elastic_lm.config import RunConfig
from elastic_lm.errors import CheckpointError
from elastic_lm.evaluate import held_out, tasks
from elastic_lm.evaluate.pieces import Answer, Answerer, Subject, here, other_weights
from elastic_lm.evaluate.progress import Progress, Unseen, View
from elastic_lm.evaluate.result import Result
from elastic_lm.experiment.lineage import Lineage
from elastic_lm.experiment.rewinds import Rewinds
from elastic_lm.storage import Storage
from elastic_lm.trained_model import interface_of


def evaluate(
    run_storage: Storage,
    config: RunConfig,
    names: Sequence[str],
    *,
    step: int | None = None,
    max_samples: int | None = None,
    answerer: Answerer = here,
    view: View | None = None,
) -> Iterator[Result]:
    """The result of each task as soon as it is there; nothing is stored. `step` None: the newest complete checkpoint's.

    `answerer`: who computes; it has no say in the figures.
    Raises: ConfigError when a task cannot be answered; CheckpointError when there is no such checkpoint, or another took its
    place meanwhile; DataError, StorageError; and what the answerer raises.
    """
    view = view or Unseen()
    asked = tasks.find(names, config, max_samples)
    interface = interface_of(config)
    plans = [task.question.plan(interface) for task in asked]
    pieces = [piece for plan in plans for piece in plan.pieces]
    subject = Subject(run_storage, config, step)
    subject.pinned()  # a step that is not there is told before anybody is asked to come
    num_rewinds = len(Rewinds.load(run_storage))
    done = tokens = 0
    first: Answer | None = None
    view.show(Progress(asked[0].name, done, len(pieces), tokens))
    with closing(answerer(subject, pieces)) as answers:
        for task, plan in zip(asked, plans, strict=True):
            values = []
            for piece in plan.pieces:
                answer = next(answers)
                first = first or answer
                if (answer.step, answer.weights) != (first.step, first.weights):
                    raise other_weights(answer.step, first.weights, answer.weights)
                values.append(answer.value)
                done, tokens = done + 1, tokens + piece.num_tokens(answer.value)
                view.show(Progress(task.name, done, len(pieces), tokens))
            assert first is not None, "every task has a piece"
            outcome = plan.outcome(values)
            if task.kind == held_out.NAME and (known := _known_text(run_storage, config)):
                outcome = replace(outcome, method={**outcome.method, "corpus": known})
            yield Result(config.name, first.step, first.weights, task.name, task.kind, task.hash, outcome, num_rewinds)


def _known_text(run_storage: Storage, config: RunConfig) -> str | None:
    """Why held-out text may be known to the model; None where nobody has trained on it.    Raises: StorageError."""
    try:
        lineage = Lineage.load(run_storage)
    except CheckpointError as error:
        return f"whether an ancestor trained on this text is unknown: {error}"
    ancestors = [] if lineage is None else lineage.trained_elsewhere(str(config.data.manifest))
    if not ancestors:
        return None
    told = ", ".join(f"{ancestor.name} to step {ancestor.step:,}" for ancestor in ancestors)
    return f"another corpus, which may hold this text, was trained on by {told}"
