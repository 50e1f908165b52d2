"""UPop's gradient scores, held against derivatives by hand, and the baseline in the loop."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from comp.config import PruningConfig
from comp.handle import PruningHandle, Structure
from comp.masks import rank_scores
from comp.methods import METHODS
from comp.models import attach
from comp.modes import PARAMETER_MODES, PruningMode
from comp.pruner import Pruner
from comp.results import StageRecord
from comp.sites import FeedForwardSite, LinearRef
from comp.tasks.base import Batch
from comp.upop import PENALTIES, gradient_scores, mask_gradients
from tests.tiny import ENCODER_FAMILIES, FAMILIES, TinyFamily, TinyTask

NLVR = FAMILIES["blip-nlvr"]
CONFIG = PruningConfig(
    ratios=(0.2, 0.3),
    method="upop",
    num_stages=4,
    steps_per_stage=3,
    quantum_cap=0.5,
    fine_tune_steps=2,
    batch_size=8,
    min_channels=2,
    eval_samples=8,
    test_samples=8,
    calibration_samples=8,
    probe_samples=8,
    device="cpu",
)


class Line(nn.Module):
    """Predicts y = sum of v_c * m_c * w_c * x over three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(1, 3, bias=False), nn.Linear(3, 1, bias=False)
        with torch.no_grad():
            self.into.weight.copy_(torch.tensor([[1.0], [2.0], [0.5]]))
            self.out.weight.copy_(torch.tensor([[1.0, -1.0, 2.0]]))


class LineTask(TinyTask):
    """Squared error of ``Line``."""

    def __init__(self) -> None:
        super().__init__(NLVR, samples=1)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        handle = model.pruning
        site = handle.groups["line"]
        hidden = site.hidden(batch["x"], handle.masks.get("line"))
        return (site.out.linear(hidden) - batch["y"]).square().mean()


def line_handle() -> PruningHandle:
    model = Line()
    handle = PruningHandle(model, Structure("line", {}))
    handle.groups = {
        "line": FeedForwardSite(
            name="line",
            mode=PruningMode.VISION_PARAMS,
            layer=0,
            inputs=(LinearRef(model, "into"),),
            out=LinearRef(model, "out"),
            activation=lambda rows: rows,
        )
    }
    object.__setattr__(model, "pruning", handle)
    return handle


LINE_BATCHES = [
    {"x": torch.tensor([[1.0], [2.0]]), "y": torch.tensor([[0.0], [1.0]])},
    {"x": torch.tensor([[3.0]]), "y": torch.tensor([[4.0]])},
]
# The prediction is x * (1 - 2 + 1) = 0, so d/dm_c = mean of 2 * (0 - y) * v_c * w_c * x with
# v * w = (1, -2, 1) and the mean of y * x = (0 + 2 + 12) / 3.
LINE_GRADIENT = torch.tensor([1.0, -2.0, 1.0]) * (-2 * 14 / 3)


def tiny_handle(family: TinyFamily = NLVR, seed: int = 0) -> PruningHandle:
    handle = attach(family.build(seed))
    handle.stock_when_idle = False
    return handle


def test_mask_gradients_are_those_worked_out_by_hand() -> None:
    found = mask_gradients(line_handle(), LineTask(), LINE_BATCHES)["line"]

    torch.testing.assert_close(found, LINE_GRADIENT)


@pytest.mark.parametrize("name", ENCODER_FAMILIES)
def test_mask_gradients_are_finite_differences_of_the_loss(name: str) -> None:
    family = FAMILIES[name]
    handle = tiny_handle(family)
    handle.model.double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in family.batch(4, 1).items()}
    task = TinyTask(family)
    gradients = mask_gradients(handle, task, [batch])

    step = 1e-3  # masks are float32
    for group, unit in [(group, 0) for group in gradients]:
        losses = []
        for sign in (1, -1):
            mask = torch.ones_like(gradients[group])
            mask[unit] += sign * step
            handle.masks = {group: mask}
            with torch.no_grad():
                losses.append(float(task.loss(handle.model, batch)))
        slope = (losses[0] - losses[1]) / (2 * step)
        assert slope == pytest.approx(float(gradients[group][unit]), rel=1e-2, abs=1e-5)


def test_the_unit_with_the_largest_positive_gradient_is_pruned_first() -> None:
    handle = line_handle()
    scores = gradient_scores(handle, LineTask(), LINE_BATCHES)
    ranking = rank_scores(list(handle.groups.values()), scores, {})

    assert int(LINE_GRADIENT.argmax()) == 1
    assert [entry.unit for entry in ranking] == [1, 0, 2]


def test_scores_are_minus_the_gradient_with_the_penalty_added() -> None:
    scores = gradient_scores(
        line_handle(), LineTask(), LINE_BATCHES, penalties={"head": 9.0, "channel": 0.5}
    )

    torch.testing.assert_close(scores["line"], -(LINE_GRADIENT + 0.5))


def test_the_penalty_cancels_in_the_ranking() -> None:
    handle, task = tiny_handle(), TinyTask(NLVR)
    groups = list(handle.groups.values())
    batches = list(task.batches("train", batch_size=8, num_samples=8))
    plain, penalised = (
        rank_scores(groups, gradient_scores(handle, task, batches, penalties=penalties), {})
        for penalties in ({"head": 0.0, "channel": 0.0}, PENALTIES)
    )

    by_unit = {(entry.group, entry.unit): entry.score for entry in plain}
    assert all(
        entry.score == pytest.approx(by_unit[entry.group, entry.unit], abs=1e-3)
        for entry in penalised
    )


def test_kinds_are_standardised_over_all_modalities_together() -> None:
    handle, task = tiny_handle(), TinyTask(NLVR)
    groups = list(handle.groups.values())
    batches = list(task.batches("train", batch_size=8, num_samples=8))
    ranking = rank_scores(groups, gradient_scores(handle, task, batches), {})

    for kind in ("head", "channel"):
        scores = torch.tensor([e.score for e in ranking if handle.groups[e.group].kind == kind])
        assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
        assert float(scores.std(unbiased=False)) == pytest.approx(1, abs=1e-4)
    assert {handle.groups[entry.group].mode for entry in ranking} == set(PARAMETER_MODES)


def test_gradients_do_not_depend_on_the_split_into_batches() -> None:
    handle, task = tiny_handle(), TinyTask(NLVR)
    whole, pieces = (
        mask_gradients(handle, task, task.batches("train", batch_size=size, num_samples=8))
        for size in (8, 3)
    )

    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name], rtol=1e-4, atol=1e-6)


def test_gradients_are_the_same_to_the_bit_under_autocast() -> None:
    handle, task = tiny_handle(), TinyTask(NLVR)
    batches = list(task.batches("train", batch_size=4, num_samples=8))
    full = mask_gradients(handle, task, batches)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = mask_gradients(handle, task, batches)

    assert all(torch.equal(full[name], mixed[name]) for name in full)


def test_collecting_gradients_leaves_masks_parameters_and_mode_alone() -> None:
    handle, task = tiny_handle(), TinyTask(NLVR)
    handle.model.train()
    name = next(iter(handle.groups))
    mask = torch.ones(handle.groups[name].num_units)
    mask[0] = 0
    handle.masks = masks = {name: mask}
    before = copy.deepcopy(handle.model.state_dict())
    mask_gradients(handle, task, task.batches("train", batch_size=8, num_samples=8))

    assert handle.masks is masks
    assert not mask.requires_grad
    assert handle.model.training
    assert all(parameter.grad is None for parameter in handle.model.parameters())
    assert all(torch.equal(before[k], v) for k, v in handle.model.state_dict().items())


def run(**values: Any) -> Pruner:
    pruner = Pruner(NLVR.build(0), TinyTask(NLVR), PruningConfig(**{**CONFIG.__dict__, **values}))
    for record in pruner.run():
        if isinstance(record, StageRecord):
            assert all(bool(((m == 0) | (m == 1)).all()) for m in pruner.handle.masks.values())
            alive = pruner.handle.alive()
            for name, group in pruner.handle.groups.items():
                assert alive[name] >= (1 if group.kind == "head" else CONFIG.min_channels)
    return pruner


@pytest.mark.parametrize("shrink", ["stage", "end"])
def test_upop_runs_to_the_ratio_with_whole_masks_and_a_unit_in_every_module(shrink: str) -> None:
    pruner = run(shrink=shrink)

    assert [point.method for point in pruner.points] == ["dense", "upop", "upop"]
    for point in pruner.points[1:]:
        assert point.ratio_reached == pytest.approx(point.ratio_asked, abs=0.03)
    assert {stage.mode for stage in pruner.stages} == {"+".join(map(str, PARAMETER_MODES))}
    assert all(stage.units > 0 for stage in pruner.stages)


def test_upop_and_wanda_prune_different_units() -> None:
    kept = [run(method=method, ratios=(0.2,)).handle.kept for method in ("upop", "param")]

    assert kept[0] != kept[1]


def test_upop_prunes_no_tokens_and_uses_neither_correction() -> None:
    method = METHODS["upop"]

    assert (method.cip, method.cit, method.tokens) == (False, False, False)


def test_the_score_can_be_switched_for_any_method() -> None:
    config = PruningConfig(method="comp", parameter_score="gradient")

    assert config.switches.parameter_score == "gradient"
    assert PruningConfig.from_dict(config.to_dict()) == config


def test_an_unknown_score_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="parameter_score must be one of wanda, gradient"):
        PruningConfig(parameter_score="magnitude")  # type: ignore[arg-type]
