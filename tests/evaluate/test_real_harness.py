"""The real lm-evaluation-harness: its figures are those of our own tasks, and of its own way to run the exported model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from elastic_lm.config import RunConfig
from elastic_lm.evaluate import tasks
from elastic_lm.evaluate.intervals import Z
from elastic_lm.evaluate.result import Result
from elastic_lm.run import Run
from elastic_lm.storage import Storage
from elastic_lm.trained_model import TrainedModel
from tests.evaluate.models import outcome_of

ANIMALS = ("cow", "dog", "cat", "ant", "river", "then", "over", "lazy", "quick", "a", "slowly", "under")
CHOICES = [" dog", " cat", " the river", " slowly"]
ITEMS = [{"context": f"the {name} and", "choices": CHOICES, "answer": n % 4} for n, name in enumerate(ANIMALS)]
PAIRS = [
    {"more": f"the {one} runs over the {other}", "less": f"the {other} runs over the {one}"}
    for one, other in zip(ANIMALS, ANIMALS[1:], strict=False)
]
TEXTS = [{"text": "the quick dog runs over a lazy river and then " * n} for n in (1, 4, 9)]

HARNESS_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
target_delimiter: ""
metadata: {{version: 1.0}}
"""
KINDS = {
    "animals": """
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "sentences": """
output_type: multiple_choice
doc_to_text: ""
doc_to_choice: "{{[more, less]}}"
doc_to_target: 0
metric_list: [{metric: acc}]
""",
    "next_words": """
output_type: loglikelihood
doc_to_text: "{{text[:20]}}"
doc_to_target: "{{text[20:40]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "whole_texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "written": """
output_type: generate_until
doc_to_text: "{{text[:20]}}"
doc_to_target: "{{text[20:40]}}"
generation_kwargs: {until: ["xyz"], max_gen_toks: 8}
metric_list: [{metric: chrf}]
""",
}
GROUP = "group: zoo\ntask: [animals]\naggregate_metric_list: [{metric: acc}]\nmetadata: {version: 1.0}\n"


@pytest.fixture(scope="module")
def harness_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tasks of the harness, and the same items as a task of ours."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in (("items", ITEMS), ("pairs", PAIRS), ("texts", TEXTS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind in KINDS.items():
        data = folder / {"animals": "items.jsonl", "sentences": "pairs.jsonl"}.get(name, "texts.jsonl")
        (folder / f"{name}.yaml").write_text(HARNESS_TASK.format(name=name, data=data) + kind)
    (folder / "zoo.yaml").write_text(GROUP)
    (folder / "ours").mkdir()
    (folder / "ours" / "choices.yml").write_text("kind: choices\ndata: ../items.jsonl\n")
    (folder / "ours" / "pairs.yml").write_text("kind: pairs\ndata: ../pairs.jsonl\n")
    return folder


@pytest.fixture(scope="module")
def real(causal_run: RunConfig, harness_tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """What the real harness finds out, without a network."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _offline(tmp_path_factory.mktemp("cache")).items():
            patch.setenv(name, value)
        found = Run.open(causal_run).evaluate_harness(
            "zoo",
            "sentences",
            "next_words",
            "whole_texts",
            "written",
            include=str(harness_tasks),
        )
        return {result.task.removeprefix("harness-"): result for result in found}


def _offline(cache: Path) -> dict[str, str]:
    return {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@pytest.mark.slow
def test_harness_counts_as_our_own_tasks(real: dict[str, Result], causal_run: RunConfig, harness_tasks: Path) -> None:
    model = TrainedModel.load(Storage.open(causal_run.run_url), causal_run)
    choices, pairs = (
        outcome_of(tasks.load(str(harness_tasks / "ours" / f"{kind}.yml"), "causal").question, model).metrics
        for kind in ("choices", "pairs")
    )
    animals = real["animals"].outcome
    p, n = choices["accuracy"].value, len(ITEMS)
    assert p is not None and 0 < p < 1
    assert animals.metrics["acc"].value == p
    assert animals.metrics["acc"].high == pytest.approx(p + Z * math.sqrt(p * (1 - p) / (n - 1)))
    assert animals.metrics["acc_norm"].value == choices["accuracy_per_byte"].value
    assert animals.counts == {"items": n, "cut_contexts": 0}
    assert real["zoo"].outcome.metrics["acc"] == animals.metrics["acc"]
    assert 0 < (pairs["share_more"].value or 0) < 1
    assert real["sentences"].outcome.metrics["acc"].value == pairs["share_more"].value
    assert real["animals"].weights == model.digest


# The harness's own class for models of transformers, in the harness's Python; PyTorch and transformers are those of ours.
REFERENCE = """
import json, sys
sys.path.append(sys.argv[1])
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
manager = TaskManager(include_path=sys.argv[3], include_defaults=False)
found = {}
# It puts a first token before whole texts itself, so that one more there would be another text.
for first, names in ((True, ["animals", "sentences", "next_words", "written"]), (False, ["whole_texts"])):
    model = HFLM(pretrained=sys.argv[2], device="cpu", dtype="float32", add_bos_token=first)
    found |= simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0)["results"]
def figures(each):
    return {key.removesuffix(",none"): float(value) for key, value in each.items() if key.endswith(",none") and value != "N/A"}
print(json.dumps({name: figures(each) for name, each in found.items()}))
"""


@pytest.mark.slow
def test_harness_finds_the_same_of_the_exported_model(
    real: dict[str, Result], causal_run: RunConfig, harness_tasks: Path, tmp_path: Path
) -> None:
    """To 1e-5 of the figure: fp32 sums in another order differ by about 1e-7 of it."""
    Run.open(causal_run).export_model(tmp_path / "model")
    packages = Path(torch.__file__).parents[1]
    python = sys.executable
    done = subprocess.run(
        [python, "-I", "-c", REFERENCE, str(packages), str(tmp_path / "model"), str(harness_tasks)],
        env=_offline(tmp_path / "cache"),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    reference = json.loads(done.stdout.splitlines()[-1])
    compared = {
        (name, metric): value
        for name, each in reference.items()
        for metric, value in each.items()
        if "stderr" not in metric
    }
    assert len(compared) == 8
    for (name, metric), value in compared.items():
        assert real[name].outcome.metrics[metric].value == pytest.approx(value, rel=1e-5), (name, metric)
