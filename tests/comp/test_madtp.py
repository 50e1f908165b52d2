"""MADTP: its scores and thresholds against plain loops, its table as a part of the model."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from comp.checkpoint import load_pruned
from comp.config import PruningConfig
from comp.finetune import make_optimizer, train_step
from comp.handle import PruningHandle, handle_of
from comp.madtp import LOSS_WEIGHT, Alignment, aligned_importance, keep_aligned
from comp.methods import METHODS
from comp.models import attach, detach
from comp.modes import Stream
from comp.pruner import evaluate_dense
from tests.tiny import ENCODER_FAMILIES, FAMILIES, TinyFamily, TinyTask

MADTP = METHODS["madtp"]


def sample(seed: int = 0) -> dict[str, Tensor]:
    """Two samples of six tokens, two heads; the last token of the second is padding."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, 5] = False
    first = torch.zeros(2, 6, dtype=torch.bool)
    first[:, 0] = True
    raw = torch.randn(2, 2, 6, 6, generator=generator)
    attention = raw.masked_fill(~valid[:, None, None], -torch.inf).softmax(-1)
    return {
        "attention": attention,
        "context": torch.randn(2, 6, 8, generator=generator),
        "logits": torch.randn(2, 6, 3, generator=generator),
        "valid": valid,
        "protected": first,
        "pooled": first,
    }


def test_the_importance_is_the_mean_of_the_three_terms_computed_token_by_token() -> None:
    parts = sample()
    heads = torch.tensor([1.0, 0.25])
    found = aligned_importance(**parts, head_mask=heads)
    for b, tokens in ((0, range(1, 6)), (1, range(1, 5))):
        votes = parts["attention"][b] * heads[:, None, None]
        context = parts["context"][b].reshape(6, 2, 4)
        first = {i: sum(float(votes[:, n, i].max()) for n in tokens) for i in tokens}
        second = {i: max(float(parts["logits"][b, i].max()), 0.0) for i in tokens}
        third = {}
        for i in tokens:
            norms = [float(context[i, h].norm()) for h in range(2)]
            third[i] = sum(float(votes[h, 0, i]) * norms[h] / sum(norms) for h in range(2))
        for i in tokens:
            expected = sum(term[i] / sum(term.values()) for term in (first, second, third)) / 3
            assert float(found[b, i]) == pytest.approx(expected, rel=1e-5)
    assert found[:, 0].tolist() == [0, 0]
    assert found[1, 5] == 0
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2))


def test_the_threshold_is_the_smallest_mean_score_that_an_alignment_token_sees() -> None:
    parts = sample(1)
    scores = aligned_importance(**parts)
    keep = keep_aligned(scores, parts["logits"], 0.7, parts["valid"], parts["protected"], 1)
    for b, tokens in ((0, range(1, 6)), (1, range(1, 5))):
        means = []
        for t in range(3):
            weights = [math.exp(float(parts["logits"][b, i, t]) / 0.7) for i in tokens]
            own = [float(scores[b, i]) for i in tokens]
            means.append(sum(w * s for w, s in zip(weights, own, strict=True)) / sum(weights))
        survivors = [i for i in tokens if float(scores[b, i]) > min(means)]
        assert keep[b].nonzero().flatten().tolist() == [0, *survivors]


def test_no_temperature_keeps_all_and_an_infinite_one_the_tokens_above_the_mean() -> None:
    parts = sample(2)
    scores, rest = aligned_importance(**parts), (parts["valid"], parts["protected"], 1)
    assert keep_aligned(scores, parts["logits"], 0.0, *rest).equal(parts["valid"])
    kept = keep_aligned(scores, parts["logits"], math.inf, *rest)
    above = scores > 1 / (parts["valid"].sum(dim=1, keepdim=True) - 1)
    assert kept.equal(above | parts["protected"])


def dropping(family: TinyFamily) -> tuple[Any, PruningHandle]:
    model = family.build(0)
    handle = attach(model, switches=MADTP, min_tokens={Stream.VISION: 2, Stream.TEXT: 1})
    handle.thresholds = dict.fromkeys(handle.structure.widths(), 1.0)
    return model, handle


@pytest.mark.parametrize("name", ENCODER_FAMILIES)
def test_a_sample_alone_equals_itself_in_a_batch(name: str) -> None:
    family = FAMILIES[name]
    model, handle = dropping(family)
    batch = family.batch(3, 4)
    with torch.no_grad(), handle.metering() as meter:
        together = family.outputs(model, batch)
    for i in range(3):
        with torch.no_grad():
            alone = family.outputs(model, {k: v[i : i + 1] for k, v in batch.items()})
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-4)
    meter.num_samples = 3
    left = meter.measurement(handle.groups.values(), handle.alive()).last_tokens()
    assert left["vision"] < 16


def test_saving_keeps_the_table_and_the_thresholds(tmp_path: Path) -> None:
    family = FAMILIES["blip-nlvr"]
    model, _ = dropping(family)
    batch = family.batch(3, 5)
    model.save_pretrained(tmp_path)
    again = load_pruned(tmp_path)
    assert torch.equal(handle_of(again).alignment.table, model.alignment.table)  # type: ignore[union-attr]
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


def test_the_loss_pulls_the_modalities_together_and_reaches_the_table() -> None:
    family = FAMILIES["blip-nlvr"]
    task, config = TinyTask(family), PruningConfig(method="madtp", learning_rate=3e-3)
    model = family.build(0).train()
    handle = attach(model, switches=MADTP)
    handle.stock_when_idle = False
    table = handle.alignment
    assert table is not None
    before, optimizer = table.table.detach().clone(), make_optimizer(model, config)
    batch, apart = family.batch(8, 0), []
    for _ in range(15):
        train_step(model, task, iter([batch]), optimizer, config)
        task.loss(model, batch)
        apart.append(float(table.loss().detach()))
    assert apart[-1] < apart[0]
    assert not torch.equal(table.table, before)
    assert LOSS_WEIGHT > 0


def test_one_modality_alone_has_no_alignment_loss_and_odd_batches_are_refused() -> None:
    table = Alignment({Stream.VISION: 6, Stream.TEXT: 4}, num_tokens=5)
    table.note("vision", Stream.VISION, torch.randn(3, 5, 6))
    assert float(table.loss().detach()) == 0.0
    table.note("vision", Stream.VISION, torch.randn(3, 5, 6))
    table.note("text", Stream.TEXT, torch.randn(2, 5, 6))
    with pytest.raises(ValueError, match="3 images and 2 texts"):
        table.loss()


def test_scoring_costs_a_product_with_the_table_and_with_the_map_of_a_narrow_stream() -> None:
    table = Alignment({Stream.VISION: 6, Stream.TEXT: 4}, num_tokens=5)
    assert table.macs(7, Stream.VISION) == 7 * 5 * 6
    assert table.macs(7, Stream.TEXT) == 7 * (5 * 6 + 4 * 6)


def test_a_family_without_threshold_encoders_is_refused() -> None:
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration has not; use 'attention'"):
        attach(FAMILIES["llava"].build(0), switches=MADTP)


def test_detaching_takes_the_table_off_again() -> None:
    model = FAMILIES["blip-nlvr"].build(0)
    names = set(model.state_dict())
    attach(model, switches=MADTP)
    assert set(model.state_dict()) > names
    detach(model)
    assert set(model.state_dict()) == names


def test_the_dense_point_counts_the_model_without_the_table() -> None:
    model = FAMILIES["blip-nlvr"].build(0)
    own = sum(parameter.numel() for parameter in model.parameters())
    config = PruningConfig(method="madtp", eval_samples=8, test_samples=8, device="cpu")
    assert evaluate_dense(model, TinyTask(FAMILIES["blip-nlvr"]), config).params == own
