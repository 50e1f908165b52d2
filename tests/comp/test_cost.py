"""The closed form against torch's own counter, as exact integers, and what follows from it."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from comp.cost import (
    Meter,
    cross_attention_macs,
    feed_forward_macs,
    patch_macs,
    self_attention_macs,
    token_counts,
)
from comp.handle import PruningHandle
from comp.masks import UnitChoice, fade_
from comp.models import attach
from comp.modes import PruningMode, Stream
from comp.shrink import shrink_
from comp.tasks.base import Batch
from tests.tiny import FAMILIES, TinyFamily, measured, random_masks, sample_of, total_macs


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> TinyFamily:
    return FAMILIES[request.param]


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def single(family: TinyFamily, seed: int) -> Batch:
    """One sample without padding; a pair shows one image twice, so that both keep as many."""
    sample = sample_of(family.batch(1, seed), 0)
    if sample["pixel_values"].dim() == 5:
        sample["pixel_values"] = sample["pixel_values"][:, :1].expand(-1, 2, -1, -1, -1)
    return sample


def counted_by_torch(family: TinyFamily, model: Any, batch: Batch) -> int:
    """Half of torch's count; the fused kernel of the CPU is one that torch does not count."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        family.outputs(model, batch)
    total = counter.get_total_flops()
    assert total % 2 == 0
    # The product of an image's features with a text's, which no mode prunes, is not counted.
    return total // 2 - (16 if family.name == "blip-retrieval" else 0)


def counted_here(handle: PruningHandle, family: TinyFamily, batch: Batch) -> int:
    return total_macs(handle, measured(handle, family, batch)[1])


# --- against torch -----------------------------------------------------------------------------


def test_the_dense_cost_is_what_torch_counts_on_the_stock_model(family: TinyFamily) -> None:
    model = family.build(0)
    sample = single(family, 0)
    stock = counted_by_torch(family, model, sample)
    assert counted_here(attach(model), family, sample) == stock


@pytest.mark.parametrize("seed", range(3))
def test_random_structures_cost_what_torch_counts(family: TinyFamily, seed: int) -> None:
    handle = attach(family.build(seed))
    handle.masks = random_masks(handle, seed)
    sample = single(family, seed)
    masked = counted_here(handle, family, sample)
    shrink_(handle)
    assert counted_here(handle, family, sample) == masked
    assert counted_by_torch(family, handle.model, sample) == masked


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("theta", [0.6, 1.0])
def test_random_token_patterns_cost_what_torch_counts(
    family: TinyFamily, seed: int, theta: float
) -> None:
    handle = attach(family.build(seed))
    handle.masks = random_masks(handle, seed)
    shrink_(handle)
    sample = single(family, seed)
    before = counted_here(handle, family, sample)
    handle.thresholds = {Stream.VISION: theta, Stream.TEXT: theta}
    after = counted_here(handle, family, sample)
    assert counted_by_torch(family, handle.model, sample) == after < before


def test_collecting_statistics_costs_nothing(family: TinyFamily) -> None:
    handle = attach(family.build(0))
    handle.thresholds = {Stream.VISION: 0.8, Stream.TEXT: 0.7}
    sample = single(family, 0)
    plain = counted_here(handle, family, sample)
    with handle.collecting():
        assert counted_here(handle, family, sample) == plain


# --- means over samples ------------------------------------------------------------------------


def test_the_mean_is_of_squares_and_not_of_counts(family: TinyFamily) -> None:
    """Two samples of different lengths cost the mean of their costs, not the cost of the mean."""
    batch = family.batch(4, 0)
    lengths = batch["attention_mask"].sum(dim=1)
    rows = [int(lengths.argmin()), int(lengths.argmax())]
    assert lengths[rows[0]] < lengths[rows[1]]
    handle = attach(family.build(0))
    both = {name: value[rows] for name, value in batch.items()}
    together = counted_here(handle, family, both)
    alone = [counted_here(handle, family, sample_of(batch, row)) for row in rows]
    assert together == sum(alone)


def test_squares_of_counts_are_averaged() -> None:
    counts = torch.tensor([2, 10])
    mean_of_costs = self_attention_macs(counts, counts, 8, 8).float().mean()
    cost_of_mean = self_attention_macs(6, 6, 8, 8)
    assert mean_of_costs > cost_of_mean


def test_cost_falls_with_every_mask(family: TinyFamily) -> None:
    handle = attach(family.build(0))
    batch = family.batch(2, 0)
    _, recorder = measured(handle, family, batch)
    macs = total_macs(handle, recorder)
    for name, group in handle.groups.items():
        for unit in range(group.num_units - 1):
            fade_(handle, UnitChoice({name: [unit]}, 0.0, 0.0), 0.0)
            fewer = total_macs(handle, recorder)
            assert fewer < macs
            macs = fewer
    assert counted_here(handle, family, batch) == macs


def test_a_mask_that_still_fades_costs_in_full(family: TinyFamily) -> None:
    handle = attach(family.build(0))
    batch = family.batch(2, 0)
    dense = counted_here(handle, family, batch)
    handle.masks = {n: torch.full((g.num_units,), 0.01) for n, g in handle.groups.items()}
    assert counted_here(handle, family, batch) == dense


def test_cost_falls_with_every_token(family: TinyFamily) -> None:
    handle = attach(family.build(0), merge="drop")
    batch = family.batch(3, 0)
    costs = []
    for least in (17, 9, 5, 3, 1):
        handle.thresholds = {Stream.VISION: 1e9, Stream.TEXT: 1e9}
        handle.min_tokens = {Stream.VISION: least, Stream.TEXT: least}
        costs.append(counted_here(handle, family, batch))
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == len(costs)


# --- one stage's drop --------------------------------------------------------------------------


def test_pruned_units_drop_exactly_what_was_predicted(family: TinyFamily) -> None:
    handle = attach(family.build(0))
    batch = family.batch(4, 0)
    _, recorder = measured(handle, family, batch)
    before = recorder.measurement(handle.groups.values(), handle.alive())
    masks = random_masks(handle, 3)
    predicted = sum(
        int((masks[name] == 0).sum()) * int(recorder._unit_macs[name]) for name in masks
    )
    handle.masks = masks
    assert before.total_macs - counted_here(handle, family, batch) == predicted


@pytest.mark.parametrize("name", ["blip-nlvr", "clip"])
def test_with_token_counts_frozen_pruned_units_drop_what_was_predicted_too(name: str) -> None:
    family = FAMILIES[name]
    handle = attach(family.build(0))
    handle.static_tokens = {"vision": [14, 11, 9]}
    batch = family.batch(4, 0)
    _, recorder = measured(handle, family, batch)
    before = total_macs(handle, recorder)
    masks = random_masks(handle, 3)
    predicted = sum(
        int((masks[name] == 0).sum()) * int(recorder._unit_macs[name]) for name in masks
    )
    handle.masks = masks
    assert before < counted_here(attach(family.build(0)), family, batch)
    assert before - counted_here(handle, family, batch) == predicted


def test_units_behind_the_last_token_decision_drop_it_with_tokens_dropped_too() -> None:
    family = FAMILIES["blip-vqa"]
    handle = attach(family.build(0))
    handle.thresholds = {Stream.VISION: 0.8, Stream.TEXT: 0.7}
    batch = family.batch(4, 0)
    _, recorder = measured(handle, family, batch)
    before = total_macs(handle, recorder)
    masks = {n: m for n, m in random_masks(handle).items() if n.startswith("text_decoder")}
    predicted = sum(
        int((masks[name] == 0).sum()) * int(recorder._unit_macs[name]) for name in masks
    )
    handle.masks = masks
    assert before - counted_here(handle, family, batch) == predicted


# --- reports -----------------------------------------------------------------------------------


def test_a_parameter_mode_owns_its_units(family: TinyFamily) -> None:
    handle = attach(family.build(0))
    batch = family.batch(3, 0)
    _, recorder = measured(handle, family, batch)
    cost = recorder.measurement(handle.groups.values(), handle.alive())
    groups = list(handle.groups.values())
    parameters = [mode for mode in family.modes if not mode.is_tokens]
    owned = {mode: cost.mode_macs(groups, mode) for mode in parameters}
    fixed = recorder._fixed / 3
    assert sum(owned.values()) + fixed == pytest.approx(cost.macs)
    assert all(value > 0 for value in owned.values())


def test_a_token_mode_owns_what_its_tokens_run_through(family: TinyFamily) -> None:
    handle = attach(family.build(0))
    _, recorder = measured(handle, family, family.batch(3, 0))
    cost = recorder.measurement(handle.groups.values(), handle.alive())
    groups = list(handle.groups.values())
    vision = cost.mode_macs(groups, PruningMode.VISION_TOKENS)
    assert cost.mode_macs(groups, PruningMode.VISION_PARAMS) <= vision < cost.macs


def test_tokens_are_reported_as_means_by_layer() -> None:
    family = FAMILIES["blip-nlvr"]
    handle = attach(family.build(0))
    batch = family.batch(3, 0)
    _, recorder = measured(handle, family, batch)
    cost = recorder.measurement(handle.groups.values(), handle.alive())
    words = float(batch["attention_mask"].sum()) / 3
    assert cost.tokens["vision.2"] == 17
    assert cost.tokens["text.0"] == pytest.approx(words)
    assert cost.last_tokens() == {"vision": 17.0, "text": pytest.approx(words)}


def test_the_measurement_of_no_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="num_samples must be at least 1 to take a mean"):
        Meter().measurement([], {})


def test_measuring_leaves_the_model_as_it_was(family: TinyFamily) -> None:
    model = family.build(0)
    before = copy.deepcopy(model.state_dict())
    counted_here(attach(model), family, family.batch(2, 0))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# --- single formulas, in the words of their docstring ------------------------------------------


def test_self_attention_counts_four_projections_and_two_products() -> None:
    tokens, width, inner = 7, 5, 6
    projections = 3 * tokens * width * inner + tokens * inner * width
    assert self_attention_macs(tokens, tokens, width, inner) == (
        projections + 2 * tokens * tokens * inner
    )


def test_cross_attention_counts_keys_at_their_own_width() -> None:
    words, rows, width, key_width, inner = 3, 11, 5, 8, 6
    assert cross_attention_macs(words, rows, width, key_width, inner) == (
        words * width * inner
        + 2 * rows * key_width * inner
        + 2 * words * rows * inner
        + words * inner * width
    )


def test_a_gated_feed_forward_has_three_matrices() -> None:
    assert feed_forward_macs(7, 5, 11) == 2 * 7 * 5 * 11
    assert feed_forward_macs(7, 5, 11, matrices=3) == 3 * 7 * 5 * 11


def test_patches_cost_their_convolution() -> None:
    assert patch_macs(576, 16, 768) == 576 * 3 * 256 * 768


def test_padding_is_not_counted() -> None:
    hidden = torch.zeros(2, 4, 3)
    valid = torch.tensor([[True, True, False, False], [True, True, True, True]])
    assert token_counts(valid, hidden).tolist() == [2, 4]
    assert token_counts(None, hidden).tolist() == [4, 4]
