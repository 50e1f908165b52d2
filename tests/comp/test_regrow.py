"""Units that come back: stages that choose among all units of a mode, not only what is left."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from comp.config import PruningConfig
from comp.handle import PruningHandle
from comp.masks import RankedUnit, UnitChoice, bring_back_, exchange_units
from comp.models import attach
from comp.modes import PruningMode
from comp.pruner import Pruner
from comp.results import CurvePoint, StageRecord
from tests.tiny import FAMILIES, TinyTask

CLIP = FAMILIES["clip"]
MODE = PruningMode.VISION_PARAMS
CHANNELS = "vision_model.encoder.layers.0.mlp"


@pytest.fixture
def handle() -> PruningHandle:
    return attach(CLIP.build(0))


def exchange(handle: PruningHandle, order: list[int], mask: Tensor, **values: Any) -> Any:
    """Chooses anew among channels that are ranked in the given order and cost 3 each."""
    ranking = [RankedUnit(CHANNELS, unit, float(place)) for place, unit in enumerate(order)]
    arguments = {"quantum": 6.0, "min_heads": 1, "min_channels": 4} | values
    return exchange_units(ranking, handle.groups, {CHANNELS: mask}, {CHANNELS: 3.0}, **arguments)


def channel_mask(handle: PruningHandle, *zeros: int) -> Tensor:
    mask = torch.ones(handle.groups[CHANNELS].num_units)
    mask[list(zeros)] = 0.0
    return mask


def test_a_pruned_unit_that_ranks_high_comes_back_and_the_quantum_goes_beside(
    handle: PruningHandle,
) -> None:
    mask = channel_mask(handle, 0, 1)
    order = [1, 2, 3, 4, 0, *range(5, len(mask))]
    choice = exchange(handle, order, mask)
    assert choice == UnitChoice({CHANNELS: [2, 3, 4]}, 3.0, 6.0, {CHANNELS: [0]})
    assert choice.count == 2


def test_nothing_is_exchanged_if_the_quantum_cannot_go(handle: PruningHandle) -> None:
    mask = channel_mask(handle, 0, 1)
    order = list(range(len(mask)))
    assert exchange(handle, order, mask, min_channels=len(mask) - 3) is None
    assert exchange(handle, order, mask, min_channels=len(mask) - 4).count == 2


def test_a_mask_of_ones_is_dropped_when_the_last_unit_comes_back(handle: PruningHandle) -> None:
    handle.masks[CHANNELS] = channel_mask(handle, 0, 1)
    bring_back_(handle, UnitChoice({}, 0.0, 0.0, {CHANNELS: [1]}))
    assert torch.equal(handle.masks[CHANNELS], channel_mask(handle, 0))
    bring_back_(handle, UnitChoice({}, 0.0, 0.0, {CHANNELS: [0]}))
    assert handle.masks == {}


def test_units_cannot_come_back_once_they_are_removed() -> None:
    with pytest.raises(ValueError, match=r"regrow brings .*but shrink 'stage'.*use shrink 'end'"):
        PruningConfig(regrow=True)


def test_a_search_that_chooses_among_all_units_anyway_needs_no_regrow() -> None:
    with pytest.raises(ValueError, match=r"schedule 'sine' chooses among all.*leave regrow out"):
        PruningConfig(method="upop_sine", regrow=True, shrink="end")


def pruner_of(**values: Any) -> Pruner:
    options: dict[str, Any] = {
        "ratios": (0.3,),
        "modes": (MODE.value,),
        "stage_quantum": 0.06,
        "steps_per_stage": 2,
        "quantum_cap": 0.3,
        "fine_tune_steps": 0,
        "learning_rate": 1e-2,
        "batch_size": 4,
        "min_channels": 4,
        "eval_samples": 8,
        "test_samples": 2,
        "calibration_samples": 8,
        "shrink": "end",
        "regrow": True,
        "device": "cpu",
    }
    return Pruner(CLIP.build(0), TinyTask(CLIP), PruningConfig(**options | values))


@pytest.mark.parametrize("score", ["wanda", "gradient"])
def test_a_unit_is_scored_as_if_it_were_whole_and_its_return_is_paid_for(score: Any) -> None:
    pruner = pruner_of(parameter_score=score)
    pruner.measure_dense()
    quantum = 0.06 * pruner._dense_macs
    first = pruner.raising().pick([MODE], quantum, coarse=False)
    assert first is not None
    assert first.choice.returning == {}
    name, unit = next(
        (name, unit)
        for name, group in pruner.handle.groups.items()
        if group.mode is MODE and group.kind == "channel"
        for unit in range(group.num_units)
        if unit not in first.choice.units.get(name, [])
    )
    pruner.handle.masks[name] = torch.ones(pruner.handle.groups[name].num_units)
    pruner.handle.masks[name][unit] = 0.0
    pruner.measure(0.0)
    before = pruner._cost
    raised = pruner.raising().pick([MODE], quantum, coarse=False)
    assert raised is not None
    assert raised.choice.returning == {name: [unit]}
    for name, units in first.choice.units.items():
        assert set(units) <= set(raised.choice.units[name])
    pruner.train(raised.choice, 1)
    pruner.measure(raised.macs)
    assert before is not None
    assert pruner._cost is not None
    assert before.macs - pruner._cost.macs == pytest.approx(raised.macs, rel=1e-9)


def test_a_run_lets_units_come_back_and_ends_where_it_was_asked_to() -> None:
    pruner, zeros = pruner_of(), []
    for record in pruner.run():
        if isinstance(record, StageRecord):
            masks = pruner.handle.masks
            assert all(((mask == 0) | (mask == 1)).all() for mask in masks.values())
            gone = {(n, int(u)) for n, m in masks.items() for u in (m == 0).nonzero()}
            assert record.units == len(gone) - len(zeros[-1] if zeros else ())
            zeros.append(gone)
    assert any(before - after for before, after in pairwise(zeros))
    ratios = [stage.ratio for stage in pruner.stages]
    assert ratios == sorted(ratios)
    point = pruner.points[-1]
    assert isinstance(point, CurvePoint)
    assert 0.3 - pruner.config.tolerance <= point.ratio_reached <= 0.33
    assert point.params == pruner.stages[-1].params
