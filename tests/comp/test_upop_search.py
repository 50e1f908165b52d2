"""UPop's search: its schedule, its sums of gradients, its shares, its masks at the end."""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from comp.config import PruningConfig
from comp.handle import PruningHandle
from comp.methods import METHODS
from comp.models import attach
from comp.pruner import Pruner
from comp.results import StageRecord
from comp.shrink import unit_parameters
from comp.upop import mask_gradients
from comp.upop_search import Removal, UpopSearch, removal_of, searched_share
from tests.tiny import FAMILIES, TinyFamily, TinyTask

CLIP = FAMILIES["clip"]  # its layers have no dropout
CONFIG = PruningConfig(
    ratios=(0.3,),
    method="upop_sine",
    num_stages=3,
    steps_per_stage=2,
    fine_tune_steps=1,
    batch_size=4,
    min_channels=2,
    eval_samples=8,
    test_samples=8,
    calibration_samples=8,
    probe_samples=8,
    device="cpu",
)


def pruner_of(family: TinyFamily = CLIP, **values: Any) -> Pruner:
    config = dataclasses.replace(CONFIG, **values)
    return Pruner(family.build(0), TinyTask(family), config)


def handle_of(family: TinyFamily = CLIP) -> PruningHandle:
    return attach(family.build(0), switches=METHODS["upop_sine"])


def random_removal(handle: PruningHandle, **floors: int) -> Removal:
    groups = list(handle.groups.values())
    scores = {group.name: torch.randn(group.num_units) for group in groups}
    prices = {group.name: float(1 + i) for i, group in enumerate(groups)}
    return removal_of(groups, scores, prices, **{"min_heads": 1, "min_channels": 2, **floors})


def test_the_share_rises_along_upops_curve_to_exactly_p() -> None:
    for t in range(7):
        published = 0.6 * math.sqrt((1 - math.cos(math.pi * (t + 1) / 7)) / 2)
        assert searched_share(0.6, t, 7) == pytest.approx(published)
    assert searched_share(0.6, 6, 7) == 0.6


@pytest.mark.parametrize("name", ["blip-nlvr", "clip"])
def test_selected_masks_are_one_minus_pi_over_p_and_hard_at_the_end(name: str) -> None:
    pruner = pruner_of(FAMILIES[name])
    stages = 0
    for record in pruner.run():
        if not isinstance(record, StageRecord):
            continue
        value = 1 - math.sin(math.pi * (stages + 1) / 6)
        masks = torch.cat(list(pruner.handle.masks.values()))
        assert set(masks.tolist()) <= {1.0, float(torch.tensor(value))}
        assert int((masks < 1).sum()) == record.units > 0
        stages += 1
    assert stages == 3
    assert set(masks.tolist()) == {0.0, 1.0}
    assert min(pruner.handle.alive().values()) >= 1
    assert pruner.points[-1].ratio_reached == pytest.approx(0.3, abs=0.01)
    assert pruner.points[-1].params < pruner.points[0].params


def test_nothing_is_removed_before_the_last_update() -> None:
    pruner = pruner_of()
    list(pruner.run())
    assert [stage.ratio > 0 for stage in pruner.stages] == [False, False, True]


def test_the_bisected_share_is_the_smallest_that_removes_enough() -> None:
    removal = random_removal(handle_of())
    for macs in (1.0, 0.3 * removal.macs[-1], 0.9 * removal.macs[-1]):
        by_hand = next(i for i, sum_ in enumerate(removal.macs, start=1) if sum_ >= macs)
        assert removal.count(removal.share_for(macs)) == by_hand


def test_a_share_counts_the_true_parameters_of_units() -> None:
    handle = handle_of(FAMILIES["blip-vqa"])
    removal = random_removal(handle)
    count = removal.count(0.4)
    sizes = [unit_parameters(handle.groups[entry.group]) for entry in removal.units]
    prunable = sum(unit_parameters(g) * g.num_units for g in handle.groups.values())
    assert sum(sizes[: count - 1]) < 0.4 * prunable <= sum(sizes[:count])
    assert len(set(sizes)) == 2


def test_the_best_units_of_every_module_cannot_go() -> None:
    handle = handle_of()
    removal = random_removal(handle, min_channels=5)
    assert removal.count(1.0) == len(removal.units)
    for name, group in handle.groups.items():
        own = [entry.score for entry in removal.units if entry.group == name]
        assert len(own) == group.num_units - (5 if group.kind == "channel" else 1)


@pytest.mark.parametrize("mixed", [False, True])
def test_gradients_add_up_over_all_steps_with_or_without_mixed_precision(mixed: bool) -> None:
    pruner = pruner_of(learning_rate=0.0, weight_decay=0.0, autocast=mixed, steps_per_stage=3)
    assert pruner.search is not None
    steps = itertools.islice(pruner.task.train_batches(batch_size=4, seed=0), 3)
    alone = [mask_gradients(pruner.handle, pruner.task, [batch]) for batch in steps]
    records = pruner.run()
    next(records)
    pruner.search._penalties = dict.fromkeys(("head_dim", "channel"), 0.0)
    next(records)
    total = torch.cat([pruner.search.sums[name] for name in alone[0]])
    batches = [torch.cat(list(gradients.values())) for gradients in alone]
    expected = torch.stack(batches).sum(dim=0)

    def error(found: Tensor) -> float:
        return float((found - expected).norm() / expected.norm())

    assert error(total) < (0.15 if mixed else 1e-5)
    assert min(map(error, batches)) > 0.5  # what one batch alone would be
    assert total.dtype == torch.float32


def update(search: UpopSearch, handle: PruningHandle, t: int) -> dict[str, Tensor]:
    prices = dict.fromkeys(handle.groups, 1.0)
    search.update_(t, prices, 40.0, min_heads=1, min_channels=2)
    return {name: mask.clone() for name, mask in handle.masks.items()}


def searching(penalties: dict[str, float], seed: int = 0) -> tuple[UpopSearch, PruningHandle]:
    handle = handle_of()
    search = UpopSearch(handle, list(handle.groups.values()), 4, penalties)
    generator = torch.Generator().manual_seed(seed)
    search.watch_()
    for mask in handle.masks.values():
        mask.grad = torch.randn(mask.shape, generator=generator)
    search.gather_(steps=5)
    return search, handle


def test_penalties_change_no_selection() -> None:
    masks = []
    for weight in (0.0, 1.0):
        search, handle = searching({"head_dim": 3 * weight, "channel": weight})
        masks.append(update(search, handle, 1))
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_the_penalty_is_added_once_a_step() -> None:
    sums = [searching({"head_dim": w, "channel": w})[0].sums for w in (0.0, 0.25)]
    for name, total in sums[0].items():
        torch.testing.assert_close(sums[1][name] - total, torch.full_like(total, 1.25))


def test_a_unit_comes_back_when_its_gradients_turn() -> None:
    search, handle = searching({"head_dim": 0.0, "channel": 0.0})
    before = update(search, handle, 1)
    search.sums = {name: -total for name, total in search.sums.items()}
    after = update(search, handle, 2)
    back = sum(int(((before[n] < 1) & (after[n] == 1)).sum()) for n in before)
    assert back > 0


def test_a_search_goes_on_from_disk_to_the_same_bits(tmp_path: Path) -> None:
    pruner = pruner_of()
    for record in pruner.run():
        if isinstance(record, StageRecord) and record.stage == 1:
            pruner.save(tmp_path)
    again = pruner_of()
    again.restore(tmp_path)
    list(again.run())
    assert [s.val_loss for s in again.stages] == [s.val_loss for s in pruner.stages]
    assert all(torch.equal(again.handle.masks[n], m) for n, m in pruner.handle.masks.items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ratios": (0.3, 0.5)}, r"searches for one ratio.*start a run for each"),
        ({"method": "comp", "schedule": "sine"}, r"drops no tokens.*use method 'upop_sine'"),
        ({"parameter_score": "wanda"}, r"search by gradients.*use method 'upop_sine'"),
    ],
)
def test_what_the_search_cannot_do_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **values)
