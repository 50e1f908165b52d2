"""Ranking units, choosing the ones that meet a quantum, and letting their masks fade."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from comp.handle import PruningHandle
from comp.importance import ActivationStatistics
from comp.masks import (
    RankedUnit,
    UnitChoice,
    choose_units,
    fade_,
    mask_value,
    obtainable_macs,
    rank_scores,
    scores_of,
    standardise,
    unit_scores,
)
from comp.models import attach
from comp.modes import PruningMode
from tests.tiny import FAMILIES


@pytest.fixture
def handle() -> PruningHandle:
    return attach(FAMILIES["blip-nlvr"].build(0))


@pytest.fixture
def statistics(handle: PruningHandle) -> ActivationStatistics:
    family = FAMILIES["blip-nlvr"]
    with handle.collecting() as statistics, torch.no_grad():
        family.outputs(handle.model, family.batch(4, 0))
    statistics.num_samples = 4
    return statistics


def vision_groups(handle: PruningHandle) -> list:
    return [g for g in handle.groups.values() if g.mode is PruningMode.VISION_PARAMS]


# --- fading ------------------------------------------------------------------------------------


def test_masks_fade_along_a_sine_from_one_to_exactly_zero() -> None:
    values = [mask_value(step, 8) for step in range(12)]
    assert values[0] == 1.0
    assert values[4] == pytest.approx(1 - math.sin(math.pi / 4))
    assert values[8:] == [0.0] * 4
    assert all(a > b for a, b in itertools.pairwise(values[:9]))


def test_the_fade_has_upops_curve() -> None:
    for step in range(1, 9):
        upop = math.sqrt((1 - math.cos(math.pi * step / 8)) / 2)
        assert mask_value(step, 8) == pytest.approx(1 - upop)


def test_fading_touches_only_the_chosen_units(handle: PruningHandle) -> None:
    name = "vision_model.encoder.layers.1.mlp"
    fade_(handle, UnitChoice({name: [3, 5]}, 0.0, 0.0), 0.25)
    expected = torch.ones(48)
    expected[[3, 5]] = 0.25
    assert list(handle.masks) == [name]
    assert torch.equal(handle.masks[name], expected)


def test_fading_keeps_what_was_pruned_before(handle: PruningHandle) -> None:
    name = "vision_model.encoder.layers.1.self_attn"
    fade_(handle, UnitChoice({name: [0]}, 0.0, 0.0), 0.0)
    fade_(handle, UnitChoice({name: [2]}, 0.0, 0.0), 0.5)
    assert handle.masks[name].tolist() == [0.0, 1.0, 0.5, 1.0]


def rank_units(
    groups: list, statistics: ActivationStatistics, masks: dict[str, Tensor]
) -> list[RankedUnit]:
    return rank_scores(groups, scores_of(groups, statistics), masks)


# --- ranking -----------------------------------------------------------------------------------


@pytest.mark.equations("Eq. 4")
def test_a_heads_score_is_the_mean_of_its_channels(
    handle: PruningHandle, statistics: ActivationStatistics
) -> None:
    group = handle.groups["vision_model.encoder.layers.0.self_attn"]
    channels = statistics.scores(group.name, group.out.linear.weight)
    naive = [float(sum(channels[8 * h : 8 * (h + 1)]) / 8) for h in range(4)]
    assert unit_scores(group, statistics).tolist() == pytest.approx(naive)


def test_standard_scores_have_mean_zero_and_deviation_one() -> None:
    standard = standardise(torch.rand(50))
    assert float(standard.mean()) == pytest.approx(0, abs=1e-6)
    assert float(standard.std(unbiased=False)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("scores", [torch.tensor([3.0]), torch.full((4,), 2.0)])
def test_scores_without_variance_become_zero(scores: Tensor) -> None:
    assert standardise(scores).eq(0).all()


def test_the_ranking_ascends_and_holds_every_unit_once(
    handle: PruningHandle, statistics: ActivationStatistics
) -> None:
    ranking = rank_units(vision_groups(handle), statistics, {})
    scores = [entry.score for entry in ranking]
    assert scores == sorted(scores)
    assert len({(entry.group, entry.unit) for entry in ranking}) == 3 * (4 + 48)


def test_heads_and_channels_are_standardised_apart(
    handle: PruningHandle, statistics: ActivationStatistics
) -> None:
    ranking = rank_units(vision_groups(handle), statistics, {})
    for kind, count in (("head", 12), ("channel", 144)):
        scores = torch.tensor([e.score for e in ranking if handle.groups[e.group].kind == kind])
        assert len(scores) == count
        torch.testing.assert_close(scores, standardise(scores))


def test_the_ranking_does_not_depend_on_the_scale_or_the_offset_of_a_kind(
    handle: PruningHandle, statistics: ActivationStatistics
) -> None:
    groups = vision_groups(handle)
    scores = {group.name: unit_scores(group, statistics) for group in groups}
    affine = {
        g.name: 20 * scores[g.name] + 3 if g.kind == "head" else scores[g.name] for g in groups
    }
    before, after = (rank_scores(groups, given, {}) for given in (scores, affine))
    assert [(e.group, e.unit) for e in after] == [(e.group, e.unit) for e in before]


def test_pruned_units_leave_the_ranking(
    handle: PruningHandle, statistics: ActivationStatistics
) -> None:
    name = "vision_model.encoder.layers.2.self_attn"
    ranking = rank_units(
        vision_groups(handle), statistics, {name: torch.tensor([1.0, 0.0, 1.0, 0.0])}
    )
    assert sorted(e.unit for e in ranking if e.group == name) == [0, 2]


def test_groups_that_no_pass_went_through_are_not_ranked(
    handle: PruningHandle, statistics: ActivationStatistics
) -> None:
    groups = vision_groups(handle)
    del statistics.sums[groups[0].name]
    assert groups[0].name not in {e.group for e in rank_units(groups, statistics, {})}


# --- choosing ----------------------------------------------------------------------------------

HEADS, CHANNELS = "vision_model.encoder.layers.0.self_attn", "vision_model.encoder.layers.0.mlp"
PRICES = {HEADS: 100.0, CHANNELS: 3.0}


def choose(handle: PruningHandle, order: str, quantum: float, **minima: int) -> UnitChoice:
    """Chooses from a ranking written as letters: h for a head, c for a channel."""
    counters = {"h": 0, "c": 0}
    ranking = []
    for score, letter in enumerate(order):
        group = HEADS if letter == "h" else CHANNELS
        ranking.append(RankedUnit(group, counters[letter], float(score)))
        counters[letter] += 1
    return choose_units(
        ranking,
        handle.groups,
        {HEADS: 4, CHANNELS: 48},
        PRICES,
        quantum,
        min_heads=minima.get("min_heads", 1),
        min_channels=minima.get("min_channels", 16),
    )


def test_units_go_from_the_bottom_until_the_quantum_is_met(handle: PruningHandle) -> None:
    choice = choose(handle, "cchcccc", 105)
    assert choice.units == {CHANNELS: [0, 1], HEADS: [0]}
    assert choice.macs == 106
    assert choice.threshold == 2.0
    assert choice.count == 3


def test_a_head_that_overshoots_is_passed_over_for_channels(handle: PruningHandle) -> None:
    choice = choose(handle, "ccchccccc", 14)
    assert choice.units == {CHANNELS: [0, 1, 2, 3, 4]}
    assert choice.macs == 15


def test_the_quantum_is_missed_by_one_channel_at_most(handle: PruningHandle) -> None:
    for quantum in (1, 5, 50, 90, 104, 120, 230):
        choice = choose(handle, "cchcchcccccccc" + "c" * 22, quantum)
        assert quantum <= choice.macs <= quantum + PRICES[CHANNELS]


def test_if_only_heads_are_left_one_goes_anyway(handle: PruningHandle) -> None:
    choice = choose(handle, "hhh", 10)
    assert choice.units == {HEADS: [0]}
    assert choice.macs == 100


def test_the_minima_are_honoured(handle: PruningHandle) -> None:
    choice = choose(handle, "h" * 4 + "c" * 48, 1e9, min_heads=2, min_channels=40)
    assert {name: len(units) for name, units in choice.units.items()} == {HEADS: 2, CHANNELS: 8}


def test_units_that_cost_nothing_are_not_chosen(handle: PruningHandle) -> None:
    ranking = [RankedUnit("text_encoder.encoder.layer.0.mlp", 0, 0.0)]
    choice = choose_units(
        ranking,
        handle.groups,
        handle.alive(),
        {},
        10.0,
        min_heads=1,
        min_channels=1,
    )
    assert choice.count == 0
    assert choice.macs == 0


def test_obtainable_is_what_goes_at_the_minima(handle: PruningHandle) -> None:
    groups = [handle.groups[HEADS], handle.groups[CHANNELS]]
    alive = {HEADS: 4, CHANNELS: 10}
    left = obtainable_macs(groups, alive, PRICES, min_heads=1, min_channels=16)
    assert left == 3 * 100


def test_a_choice_over_all_units_drops_what_was_obtainable(
    handle: PruningHandle, statistics: ActivationStatistics
) -> None:
    groups = vision_groups(handle)
    prices = {group.name: 10.0 if group.kind == "head" else 1.0 for group in groups}
    arguments = {"min_heads": 2, "min_channels": 20}
    choice = choose_units(
        rank_units(groups, statistics, {}),
        handle.groups,
        handle.alive(),
        prices,
        1e9,
        **arguments,
    )
    assert choice.macs == obtainable_macs(groups, handle.alive(), prices, **arguments)
    assert choice.macs == 3 * (2 * 10 + 28)


def test_a_layer_of_small_scores_is_not_pruned_for_its_size(handle: PruningHandle) -> None:
    groups = [group for group in handle.groups.values() if group.kind == "channel"][:2]
    own = torch.rand(groups[0].num_units) + 0.5
    scores = {groups[0].name: own, groups[1].name: own[: groups[1].num_units] / 1000}
    first = {entry.group for entry in rank_scores(groups, scores, {})[: groups[1].num_units]}
    assert first == {groups[1].name}
    mixed = rank_scores(groups, scores, {}, by_layer=True)[: groups[1].num_units]
    assert {entry.group for entry in mixed} == {group.name for group in groups}
