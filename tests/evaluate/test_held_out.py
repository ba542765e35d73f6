"""The task `held_out`: equal to what transformers says of the exported model, and to the batches added up by hand."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, normalizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from elastic_lm.config import RunConfig
from elastic_lm.data.held_out import HeldOut, HeldOutTokens
from elastic_lm.data.manifest import Manifest
from elastic_lm.data.tokenizer import TextEncoder
from elastic_lm.data.windows import read_block
from elastic_lm.errors import ConfigError
from elastic_lm.evaluate.held_out import Draws, HeldOutText
from elastic_lm.evaluate.intervals import ratio
from elastic_lm.experiment.target import Target
from elastic_lm.protocol import Measure
from elastic_lm.run import Run
from elastic_lm.storage import Storage
from elastic_lm.trained_model import TrainedModel
from tests.evaluate.models import outcome_of


def model_of(config: RunConfig) -> TrainedModel:
    return TrainedModel.load(Storage.open(config.run_url), config)


def held_out(config: RunConfig) -> tuple[HeldOut, Storage]:
    tokens = Storage.open(config.data.tokens)
    return HeldOut.of(Manifest.load(tokens), sequence_length=32, batch_size=1), tokens


def documents_of(config: RunConfig) -> list[int]:
    """Of each sample, in order, the document in which it begins: as many as have ended before, by their last tokens."""
    part, storage = held_out(config)
    tokens = np.concatenate([read_block(storage, part.part, block) for block in range(len(part.part.blocks))])
    end, found = part.part.special_ids["end_of_text"], []
    for number in range(part.num_batches):
        (start,) = part.first_tokens(number)
        assert (tokens[start : start + 33] == HeldOutTokens(storage, part).batch(number)[0]).all()
        found.append(int((tokens[:start] == end).sum()))
    seen = sorted({*found})
    return [seen.index(each) for each in found]


def test_figures_are_those_of_the_exported_model(causal_run: RunConfig, tmp_path: Path) -> None:
    outcome = outcome_of(HeldOutText(causal_run), model_of(causal_run))
    Run.open(causal_run).export_model(tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    part, tokens = held_out(causal_run)
    losses, hits, num_bytes = [], [], 0
    encoder = model_of(causal_run).encoder
    for number in range(part.num_batches):
        tokens_S = torch.from_numpy(HeldOutTokens(tokens, part).batch(number)[0].astype("int64"))
        with torch.no_grad():
            log_p_TV = theirs(tokens_S[None, :-1]).logits[0].double().log_softmax(-1)
        losses.append(-float(log_p_TV.gather(1, tokens_S[1:, None]).sum()))
        num_bytes += len(encoder.decode(tokens_S[1:].tolist()))  # of ASCII alone
        hits.append(int((log_p_TV.argmax(-1) == tokens_S[1:]).sum()))
    metrics, counts = outcome.metrics, outcome.counts
    assert counts == {
        "samples": part.num_samples, "batches": part.num_batches, "documents": 21, "targets": 32 * part.num_samples,
        "bytes": num_bytes,
    }  # fmt: skip
    in_document = documents_of(causal_run)
    assert {*in_document} == {*range(21)}
    by_document = [[loss for loss, each in zip(losses, in_document, strict=True) if each == d] for d in range(21)]
    expected = ratio([sum(each) for each in by_document], [32 * len(each) for each in by_document])
    for name, wanted in (
        ("loss", expected.value), ("perplexity", math.exp(expected.value)), ("accuracy", sum(hits) / counts["targets"]),
        ("bits_per_byte", sum(losses) / math.log(2) / num_bytes),
    ):  # fmt: skip
        assert metrics[name].value == pytest.approx(
            wanted, rel=2e-5
        )  # fp32 sums in another order, as in test_logits.py
    assert (metrics["loss"].low, metrics["loss"].high) == pytest.approx((expected.low, expected.high), rel=2e-4)
    assert metrics["perplexity"].high == pytest.approx(math.exp(metrics["loss"].high or 0))


class Knows(nn.Module):
    """Gives the last token again twice the chance of any other."""

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return nn.functional.one_hot(tokens_BT, 300).double() * math.log(2)


def test_figures_are_known_before_it_is_asked(causal_run: RunConfig, masked_run: RunConfig) -> None:
    for config in (causal_run, masked_run):
        task = HeldOutText(config, 2)
        assert task.figures == tuple(outcome_of(task, model_of(config)).metrics)
    assert HeldOutText(masked_run).figures == ("loss", "perplexity", "accuracy")


def test_figures_of_a_model_that_one_can_work_out(causal_run: RunConfig) -> None:
    """It gives 2/301 to a token like the one before, 1/301 to any other, and is right where they are alike."""
    part, tokens = held_out(causal_run)
    rows = [HeldOutTokens(tokens, part).batch(number)[0] for number in range(part.num_batches)]
    alike = sum(int((row[1:] == row[:-1]).sum()) for row in rows)
    number = 32 * len(rows)
    model = dataclasses.replace(model_of(causal_run), module=Knows())
    metrics = outcome_of(HeldOutText(causal_run), model).metrics
    assert metrics["loss"].value == pytest.approx(
        math.log(301) - alike / number * math.log(2), rel=1e-6
    )  # fp32 softmax
    assert metrics["accuracy"].value == pytest.approx(alike / number)


def test_bits_per_byte_of_a_text_that_the_tokenizer_changes_are_told(
    causal_run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = outcome_of(HeldOutText(causal_run), model_of(causal_run))
    assert "caution" not in kept.method
    tokenizer = Tokenizer.from_str(model_of(causal_run).encoder.json)
    tokenizer.normalizer = normalizers.Lowercase()
    model = dataclasses.replace(model_of(causal_run), encoder=TextEncoder(tokenizer.to_str()))
    changed = outcome_of(HeldOutText(causal_run), model)
    assert changed.method["caution"].startswith("bits per byte are of the text as the tokenizer changes it")
    assert changed.metrics == kept.metrics
    few = outcome_of(HeldOutText(causal_run, 2), model).method["caution"]
    assert "are few; bits per byte" in few or "at least; bits per byte" in few


class Broken(nn.Module):
    """As `Knows`, but of some tokens all that it says is NaN."""

    def forward(self, tokens_BT: Tensor) -> Tensor:
        logits_BTV = Knows()(tokens_BT)
        logits_BTV[tokens_BT == tokens_BT[0, 0]] = math.nan
        return logits_BTV


def test_model_that_is_not_finite_has_no_figures(causal_run: RunConfig, masked_run: RunConfig) -> None:
    """Its most probable token would be the one whose logit is NaN: right by chance, or wrong."""
    for config in (causal_run, masked_run):
        metrics = outcome_of(HeldOutText(config), dataclasses.replace(model_of(config), module=Broken())).metrics
        assert {metric.value for metric in metrics.values()} == {None}
        target = Target.parse("held_out.accuracy >= 0")
        figures = {"held_out": {name: metric.value for name, metric in metrics.items()}}
        assert not target.is_reached(target.score(figures)) and target.lacks(figures) == "not finite"


@pytest.mark.parametrize("size", [1, 4])
def test_figures_have_the_bits_of_the_batches_whatever_their_intervals_are_of(causal_run: RunConfig, size: int) -> None:
    config = causal_run.replace(f"batch.micro_batch_size={size}")
    task, model = HeldOutText(config), model_of(causal_run)
    answers = [measured for piece in task.plan(model).pieces for measured in piece.answer(model)]
    wholes = [whole for whole, _ in answers]
    metrics = outcome_of(task, model).metrics
    targets = [each.num_targets for each in wholes]
    assert metrics["loss"].value == ratio([each.loss for each in wholes], targets).value
    assert metrics["accuracy"].value == ratio([each.num_correct or 0 for each in wholes], targets).value
    for whole, samples in answers:
        assert whole.loss == pytest.approx(sum(each.loss for each in samples), rel=1e-12)  # fp64 in another order
        for name in ("num_targets", "num_correct", "num_bytes"):
            assert getattr(whole, name) == sum(getattr(each, name) for each in samples)


def test_samples_of_masked_text_add_up_to_their_batch(masked_run: RunConfig) -> None:
    task, model = HeldOutText(masked_run.replace("batch.micro_batch_size=4")), model_of(masked_run)
    for piece in task.plan(model).pieces:
        for whole, samples in piece.answer(model):
            assert whole.loss == pytest.approx(sum(each.loss for each in samples), rel=1e-12)
            assert whole.num_targets == sum(each.num_targets for each in samples)
            assert len({each.num_targets for each in samples}) > 1 or len(samples) < 4


@pytest.mark.parametrize(("num_documents", "samples_each"), [(128, 4), (64, 16), (20, 50)])
def test_interval_covers_the_truth_where_documents_are_longer_than_a_sample(
    num_documents: int, samples_each: int
) -> None:
    """Documents vary as much as samples within them. The shuffled batches as draws covered it in 0.78, 0.47 and 0.30 of cases."""
    draw = np.random.Generator(np.random.PCG64(3))
    clusters = np.repeat(np.arange(num_documents), samples_each)
    covered = 0
    for _ in range(300):
        losses = 3 + 0.3 * draw.standard_normal(num_documents)[clusters] + 0.3 * draw.standard_normal(len(clusters))
        measures = [Measure(0, loss, 1, 0) for loss in losses.tolist()]
        found = Draws(measures, clusters).ratio(lambda each: each.loss, lambda each: each.num_targets)
        covered += found.low < 3 < found.high  # type: ignore[operator]
    assert 0.91 <= covered / 300 <= 0.98


def test_few_documents_are_told(causal_run: RunConfig, tmp_path: Path) -> None:
    """Of one there is no interval. Without an index nobody knows where documents begin: batches are the draws."""
    model = model_of(causal_run)
    all_of_them, few, one = (outcome_of(HeldOutText(causal_run, number), model) for number in (None, 3, 1))
    assert "caution" not in all_of_them.method
    assert (
        few.method["caution"] == "the intervals may be too narrow: 3 documents are few" and few.counts["documents"] == 3
    )
    assert (one.counts["documents"], one.metrics["loss"].low) == (1, None)
    assert one.method["caution"] == "there are no intervals: they take two documents at least"
    shutil.copytree(causal_run.data.tokens.removeprefix("file://"), tmp_path / "tokens")
    (tmp_path / "tokens" / "documents.json").unlink()
    blind = outcome_of(HeldOutText(causal_run.replace(f"data.tokens=file://{tmp_path}/tokens")), model)
    assert "documents" not in blind.counts and blind.method == {"intervals": "ratio estimator over batches"}
    assert blind.metrics["loss"].value == all_of_them.metrics["loss"].value


def test_fewer_samples_are_asked_when_told(causal_run: RunConfig) -> None:
    few = HeldOutText(causal_run, 3)
    outcome = outcome_of(few, model_of(causal_run))
    assert (outcome.counts["samples"], outcome.counts["targets"]) == (3, 96)
    everything = HeldOutText(causal_run)
    assert few.hash != everything.hash and everything.hash == HeldOutText(causal_run, 10**9).hash


def test_task_is_the_same_with_z_loss(causal_run: RunConfig) -> None:
    plain, drifting = HeldOutText(causal_run), HeldOutText(causal_run.replace("objective.z_loss=0.5"))
    assert plain.hash == drifting.hash
    assert outcome_of(drifting, model_of(causal_run)) == outcome_of(plain, model_of(causal_run))


def test_masked_model_is_asked_for_what_is_hidden(masked_run: RunConfig) -> None:
    outcome = outcome_of(HeldOutText(masked_run), model_of(masked_run))
    assert outcome.metrics.keys() == {"loss", "perplexity", "accuracy"}  # no bits per byte: not every byte is asked for
    share = outcome.counts["targets"] / (32 * outcome.counts["samples"])
    assert share == pytest.approx(0.15, abs=0.05)
    assert outcome_of(HeldOutText(masked_run), model_of(masked_run)) == outcome


def half_squared(model: nn.Module, tokens_BS: Tensor) -> tuple[Tensor, int]:
    """An objective of the user's own, which is no likelihood."""
    return model(tokens_BS[:, :-1]).square().sum() / 2, 7


def test_users_objective_tells_its_loss_alone(causal_run: RunConfig) -> None:
    config = causal_run.replace(f"objective.name={__name__}:half_squared")
    outcome = outcome_of(HeldOutText(config), model_of(causal_run))
    assert outcome.metrics.keys() == {"loss"} == {*HeldOutText(config).figures}
    assert outcome.counts["targets"] == 7 * outcome.counts["batches"]


def test_corpus_that_holds_nothing_out_is_told(small_corpus: str, causal_run: RunConfig) -> None:
    config = causal_run.replace(f"data.tokens={small_corpus}", "data.manifest=null", "batch.sequence_length=4096")
    with pytest.raises(ConfigError, match="prepare a corpus with a larger --held-out and train a run on it"):
        HeldOutText(config)
