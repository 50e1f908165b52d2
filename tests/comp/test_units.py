"""Units that are dimensions of heads: removed and costed exactly, refused where they cannot be."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from comp.checkpoint import load_pruned
from comp.config import PruningConfig
from comp.handle import PruningHandle
from comp.importance import ActivationStatistics
from comp.masks import unit_scores
from comp.methods import METHODS, Method
from comp.models import attach
from comp.modes import Stream
from comp.pruner import Pruner
from comp.shrink import shrink_
from comp.sites import AttentionSite
from tests.tiny import (
    ENCODER_FAMILIES,
    FAMILIES,
    SIGLIP,
    TinyFamily,
    TinyTask,
    check_shrinking,
    measured,
    random_masks,
    sample_of,
    total_macs,
)

BY_DIMENSION = dataclasses.replace(METHODS["comp"], unit="head_dim")
THRESHOLDS = {Stream.VISION: 0.8, Stream.TEXT: 0.7}
NARROWED = [*ENCODER_FAMILIES, "siglip"]


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def family_of(name: str) -> TinyFamily:
    return SIGLIP if name == "siglip" else FAMILIES[name]


def narrowed(family: TinyFamily, switches: Method = BY_DIMENSION) -> PruningHandle:
    handle = attach(family.build(0), switches=switches)
    handle.masks = random_masks(handle)
    return handle


def attention_of(handle: PruningHandle) -> AttentionSite:
    site = next(iter(handle.groups.values()))
    assert isinstance(site, AttentionSite)
    return site


@pytest.mark.equations("Eq. 2")
@pytest.mark.parametrize("name", NARROWED)
def test_masked_dimensions_and_removed_ones_give_the_same_outputs_tokens_and_flops(
    name: str,
) -> None:
    family = family_of(name)
    handle = narrowed(family)
    handle.thresholds = dict(THRESHOLDS)
    check_shrinking(handle, family)


@pytest.mark.parametrize("name", ["blip-vqa", "blip-caption", "clip"])
def test_narrowed_heads_cost_what_torch_counts(name: str) -> None:
    family = FAMILIES[name]
    handle = narrowed(family)
    shrink_(handle)
    sample = sample_of(family.batch(2, 0), 0)
    here = total_macs(handle, measured(handle, family, sample)[1])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        family.outputs(handle.model, sample)
    assert 2 * here == counter.get_total_flops()


@pytest.mark.parametrize("name", ["blip-nlvr", "clip"])  # a fused q, k, v and separate ones
def test_a_dimension_goes_out_of_every_head_and_the_scale_stays(name: str) -> None:
    handle = attach(FAMILIES[name].build(0), switches=BY_DIMENSION)
    site = attention_of(handle)
    scale = site.scale
    heads = site.fixed_heads
    before = [ref.linear.weight.clone() for ref in site.inputs]
    out = site.out.linear.weight.clone()
    mask = torch.ones(site.num_units)
    mask[3] = 0
    handle.masks = {site.name: mask}
    shrink_(handle)
    left = [j for j in range(site.head_dim) if j != 3]
    for old, ref in zip(before, site.inputs, strict=True):
        split = old.unflatten(0, (-1, heads, site.head_dim))[:, :, left].flatten(0, 2)
        assert torch.equal(ref.linear.weight, split)
    expected = out.unflatten(1, (heads, site.head_dim))[:, :, left].flatten(1)
    assert torch.equal(site.out.linear.weight, expected)
    assert (site.scale, site.head_width) == (scale, site.head_dim - 1)


def test_a_dimensions_score_is_the_mean_over_the_heads() -> None:
    site = attention_of(attach(FAMILIES["clip"].build(0), switches=BY_DIMENSION))
    statistics = ActivationStatistics()
    columns = site.fixed_heads * site.head_dim
    statistics.add(site.name, torch.randn(2, 3, columns), None)
    statistics.num_samples = 2
    by_column = statistics.scores(site.name, site.out.linear.weight)
    by_hand = torch.stack([by_column[j :: site.head_dim].mean() for j in range(site.head_dim)])
    torch.testing.assert_close(unit_scores(site, statistics), by_hand)


@pytest.mark.equations("Eq. 7")
def test_cit_changes_no_token_where_all_heads_fade_alike() -> None:
    family = FAMILIES["blip-nlvr"]
    outputs: list[Tensor] = []
    for cit in (True, False):
        handle = narrowed(family, dataclasses.replace(BY_DIMENSION, cit=cit))
        handle.masks = random_masks(handle, soft=True)
        handle.thresholds = dict(THRESHOLDS)
        outputs.append(measured(handle, family, family.batch(4, 0))[0])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-6)


def test_a_narrowed_model_is_saved_and_loaded(tmp_path: Path) -> None:
    family = FAMILIES["blip-vqa"]
    handle = narrowed(family)
    shrink_(handle)
    model: Any = handle.model
    batch = family.batch(3, 0)
    before = family.outputs(model, batch)
    model.save_pretrained(tmp_path)
    again = load_pruned(tmp_path)
    torch.testing.assert_close(family.outputs(again, batch), before, rtol=0, atol=1e-5)


def test_the_loop_prunes_dimensions_to_the_ratio_and_keeps_one_in_every_module() -> None:
    family = FAMILIES["blip-nlvr"]
    config = PruningConfig(
        ratios=(0.3,),
        method="param",
        unit="head_dim",
        num_stages=3,
        steps_per_stage=2,
        quantum_cap=0.5,
        fine_tune_steps=1,
        batch_size=4,
        min_channels=4,
        eval_samples=8,
        test_samples=8,
        calibration_samples=8,
        probe_samples=8,
        device="cpu",
    )
    with torch.enable_grad():
        pruner = Pruner(family.build(0), TinyTask(family), config)
        point = list(pruner.run())[-1]
    lost = [n for n in pruner.handle.kept if pruner.handle.groups[n].kind == "head_dim"]
    assert point.to_dict()["ratio_reached"] == pytest.approx(0.3, abs=0.03)
    assert lost
    assert min(pruner.handle.alive().values()) >= 1


def test_a_model_that_rotates_pairs_of_dimensions_is_refused_and_stays_as_it_was() -> None:
    model: Any = FAMILIES["llava"].build(0)
    with pytest.raises(ValueError, match=r"rotates pairs of dimensions.*use unit 'head'"):
        attach(model, switches=BY_DIMENSION)
    assert not hasattr(model, "pruning")


def test_masks_on_the_context_are_refused_because_logits_would_keep_the_dimension() -> None:
    with pytest.raises(ValueError, match=r"cannot go with unit 'head_dim'.*use 'qkv'"):
        PruningConfig(unit="head_dim", mask_site="context")
    with pytest.raises(ValueError, match=r"cannot go with unit 'head_dim'.*use 'qkv'"):
        attach(FAMILIES["clip"].build(0), switches=BY_DIMENSION, mask_site="context")


def test_another_unit_is_refused_once_some_are_gone() -> None:
    handle = narrowed(FAMILIES["clip"])
    shrink_(handle)
    with pytest.raises(ValueError, match=r"unit 'head' comes too late.*by 'head_dim' already"):
        attach(handle.model, switches=METHODS["comp"])
    assert handle.structure.unit == "head_dim"


def test_a_dense_model_may_change_its_unit_and_change_back() -> None:
    handle = attach(FAMILIES["clip"].build(0), switches=BY_DIMENSION)
    assert attention_of(handle).num_units == attention_of(handle).head_dim
    attach(handle.model, switches=METHODS["comp"])
    site = attention_of(handle)
    assert (site.kind, handle.dense_units[site.name]) == ("head", site.num_units)
