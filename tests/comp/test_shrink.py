"""A hard-masked model and its shrunk self are the same model; optimizers follow."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from comp.errors import CheckpointMismatch
from comp.handle import PruningHandle
from comp.methods import Method
from comp.models import attach
from comp.modes import Stream
from comp.shrink import apply_plan_, migrate_optimizer_, num_parameters, shrink_
from tests.tiny import (
    ENCODER_FAMILIES,
    FAMILIES,
    TinyFamily,
    check_shrinking,
    measured,
    random_masks,
)

THRESHOLDS = {Stream.VISION: 0.8, Stream.TEXT: 0.7}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> TinyFamily:
    return FAMILIES[request.param]


@pytest.fixture
def handle(family: TinyFamily) -> PruningHandle:
    return attach(family.build(0))


@pytest.fixture
def nlvr() -> PruningHandle:
    return attach(FAMILIES["blip-nlvr"].build(0))


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.equations("Eq. 2")
@pytest.mark.parametrize("site", ["qkv", "context"])
def test_a_hard_masked_model_equals_its_shrunk_self(family: TinyFamily, site: Any) -> None:
    handle = attach(family.build(0), mask_site=site)
    batch = family.batch(3, 0)
    dense = family.outputs(handle.model, batch)
    handle.masks = random_masks(handle)
    masked = family.outputs(handle.model, batch)
    shrink_(handle)
    assert distance(family.outputs(handle.model, batch), masked) <= 1e-5
    assert distance(dense, masked) > 1e-2


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_every_module_keeps_the_biases_of_what_is_left(family: TinyFamily, kind: str) -> None:
    """Masks one group at a time, with biases so large that a lost one would show."""
    batch = family.batch(2, 0)
    plain = attach(family.build(0))
    for name in [name for name, group in plain.groups.items() if group.kind == kind]:
        handle = attach(copy.deepcopy(plain.model))
        group = handle.groups[name]
        for ref in (*group.inputs, group.out):
            ref.linear.bias.add_(torch.randn_like(ref.linear.bias))
        handle.masks = {name: random_masks(handle)[name]}
        masked = family.outputs(handle.model, batch)
        shrink_(handle)
        assert distance(family.outputs(handle.model, batch), masked) <= 1e-5, name


@pytest.mark.equations("Eq. 7")
@pytest.mark.parametrize("merge", ["auto", "drop"])
@pytest.mark.parametrize("site", ["qkv", "context"])
def test_with_cit_the_shrunk_model_keeps_the_same_tokens(
    family: TinyFamily, site: Any, merge: Any
) -> None:
    handle = attach(family.build(0), mask_site=site, merge=merge)
    handle.masks = random_masks(handle)
    handle.thresholds = dict(THRESHOLDS)
    check_shrinking(handle, family)


@pytest.mark.equations("Eq. 7")
@pytest.mark.parametrize("family", ENCODER_FAMILIES, indirect=True)
def test_without_cit_the_shrunk_model_keeps_other_tokens(family: TinyFamily) -> None:
    handle = attach(family.build(0), switches=Method(cip=True, cit=False, schedule="mps"))
    handle.masks = random_masks(handle)
    handle.thresholds = dict(THRESHOLDS)
    batch = family.batch(4, 0)
    _, before = measured(handle, family, batch)
    shrink_(handle)
    _, after = measured(handle, family, batch)
    assert after.counts != before.counts


def test_shrinking_twice_equals_shrinking_once(family: TinyFamily) -> None:
    once, twice = attach(family.build(0)), attach(family.build(0))
    masks = random_masks(once)
    once.masks = dict(masks)
    shrink_(once)
    names = list(masks)
    for part in (names[::2], names[1::2]):
        twice.masks = {name: masks[name] for name in part}
        shrink_(twice)
    assert twice.kept == once.kept
    again = {}
    for name, group in once.groups.items():
        keep = torch.ones(group.num_units)
        keep[0] = 0 if group.num_units > 1 else 1
        again[name] = keep
    once.masks = again
    shrink_(once)
    for name, units in once.kept.items():
        before = masks[name].nonzero().flatten().tolist()
        assert units == (before[1:] if len(before) > 1 else before)


def test_widths_are_declared_as_they_are(handle: PruningHandle) -> None:
    handle.masks = random_masks(handle)
    shrink_(handle)
    for module in handle.model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
            assert module.bias is None or module.bias.shape == (module.out_features,)


def test_weights_get_fewer_and_their_count_was_known_before(handle: PruningHandle) -> None:
    dense = sum(p.numel() for p in handle.model.parameters())
    handle.masks = random_masks(handle)
    expected = num_parameters(handle.model, handle)
    shrink_(handle)
    assert sum(p.numel() for p in handle.model.parameters()) == expected < dense
    assert num_parameters(handle.model, handle) == expected


def test_masks_are_gone_after_the_shrink(handle: PruningHandle) -> None:
    handle.masks = random_masks(handle)
    kept = {name: int(mask.sum()) for name, mask in handle.masks.items()}
    shrink_(handle)
    assert handle.masks == {}
    assert handle.alive() == {**handle.dense_units, **kept}


def test_masks_of_ones_remove_nothing(handle: PruningHandle) -> None:
    handle.masks = {name: torch.ones(g.num_units) for name, g in handle.groups.items()}
    assert shrink_(handle) == []
    assert handle.kept == {}


def test_modules_without_units_stay_the_same_objects(nlvr: PruningHandle) -> None:
    model: Any = nlvr.model
    before = {name: p for name, p in model.named_parameters()}
    nlvr.masks = random_masks(nlvr)
    shrink_(nlvr)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, parameter in after.items():
        if any(part in name for part in ("embeddings", "Norm", "norm", "cls_head", "merge")):
            assert parameter is before[name]
        if name.endswith(("projection.bias", "fc2.bias", "output.dense.bias", "dense0.bias")):
            assert parameter is before[name]


def test_shrinking_leaves_training_mode_and_dtype(nlvr: PruningHandle) -> None:
    nlvr.model.train().bfloat16()
    nlvr.masks = random_masks(nlvr)
    shrink_(nlvr)
    assert all(module.training for module in nlvr.model.modules())
    assert {p.dtype for p in nlvr.model.parameters()} == {torch.bfloat16}


# --- optimizers --------------------------------------------------------------------------------


def steps_(handle: PruningHandle, optimizer: torch.optim.Optimizer, count: int) -> None:
    family = FAMILIES["blip-nlvr"]
    for step in range(count):
        with torch.enable_grad():
            loss = family.losses(handle.model, family.batch(4, step)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_an_optimizer_goes_on_with_sliced_moments(nlvr: PruningHandle) -> None:
    optimizer = torch.optim.AdamW(nlvr.model.parameters(), lr=1e-3)
    steps_(nlvr, optimizer, 2)
    nlvr.masks = random_masks(nlvr)
    moments = {p: dict(state) for p, state in optimizer.state.items()}
    slices = shrink_(nlvr)
    migrate_optimizer_(optimizer, slices)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in nlvr.model.parameters()}
    for entry in slices:
        old, new = moments[entry.old], optimizer.state[entry.new]
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(new[name], old[name].index_select(entry.dim, entry.index))
        assert new["step"] == old["step"] == 2
        assert entry.old not in optimizer.state
    steps_(nlvr, optimizer, 1)


def test_a_masked_and_a_shrunk_model_train_alike(nlvr: PruningHandle) -> None:
    """The step after the shrink is the one that the masked model would have taken."""
    masked = attach(copy.deepcopy(nlvr.model))
    handles = (masked, nlvr)
    optimizers = [torch.optim.AdamW(h.model.parameters(), lr=1e-3) for h in handles]
    for handle, optimizer in zip(handles, optimizers, strict=True):
        steps_(handle, optimizer, 2)
        handle.masks = random_masks(handle)
    migrate_optimizer_(optimizers[1], shrink_(nlvr))
    for handle, optimizer in zip(handles, optimizers, strict=True):
        steps_(handle, optimizer, 2)
    family = FAMILIES["blip-nlvr"]
    outputs = [family.outputs(handle.model, family.batch(3, 9)) for handle in handles]
    assert distance(*outputs) <= 1e-4


def test_an_optimizer_without_state_is_migrated_too(nlvr: PruningHandle) -> None:
    optimizer = torch.optim.AdamW(nlvr.model.parameters(), lr=1e-3)
    nlvr.masks = random_masks(nlvr)
    migrate_optimizer_(optimizer, shrink_(nlvr))
    assert not optimizer.state
    steps_(nlvr, optimizer, 1)


# --- plans -------------------------------------------------------------------------------------


def test_a_plan_shrinks_a_fresh_dense_model_alike(handle: PruningHandle) -> None:
    fresh = attach(copy.deepcopy(handle.model))
    handle.masks = random_masks(handle)
    shrink_(handle)
    apply_plan_(fresh, handle.kept)
    assert fresh.kept == handle.kept
    for (name, a), (other, b) in zip(
        handle.model.named_parameters(), fresh.model.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)


def test_a_mask_that_is_still_fading_is_refused(nlvr: PruningHandle) -> None:
    name = "vision_model.encoder.layers.0.mlp"
    nlvr.masks = {name: torch.full((48,), 0.5)}
    with pytest.raises(ValueError, match=f"the mask of '{name}' is still fading"):
        shrink_(nlvr)


def test_a_module_may_not_lose_all_its_units(nlvr: PruningHandle) -> None:
    name = "vision_model.encoder.layers.0.self_attn"
    nlvr.masks = {
        "vision_model.encoder.layers.1.self_attn": torch.tensor([1.0, 0, 0, 0]),
        name: torch.zeros(4),
    }
    with pytest.raises(ValueError, match=f"'{name}' would lose all 4 units; keep at least one"):
        shrink_(nlvr)
    assert nlvr.kept == {}


def test_a_plan_for_another_model_is_refused(nlvr: PruningHandle) -> None:
    with pytest.raises(CheckpointMismatch, match=r"names 'h\.0\.attn', which this blip model lac"):
        apply_plan_(nlvr, {"h.0.attn": [0]})


@pytest.mark.parametrize("units", [[], [1, 0], [0, 0], [-1, 2], [0, 4]])
def test_a_plan_with_impossible_units_is_refused(nlvr: PruningHandle, units: list[int]) -> None:
    name = "vision_model.encoder.layers.0.self_attn"
    with pytest.raises(CheckpointMismatch, match=rf"'{name}' must ascend within 0\.\.3, but got"):
        apply_plan_(nlvr, {name: units})
