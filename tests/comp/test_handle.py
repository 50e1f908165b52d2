"""What pruning puts on a model instance, and that it comes off without a trace."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from comp.cost import Meter
from comp.handle import PruningHandle, handle_of
from comp.models import attach, detach
from comp.modes import PruningMode, Stream
from comp.shrink import shrink_
from tests.tiny import FAMILIES, TinyFamily, random_masks


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> TinyFamily:
    return FAMILIES[request.param]


@pytest.fixture
def nlvr() -> TinyFamily:
    return FAMILIES["blip-nlvr"]


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def prune_(handle: PruningHandle) -> None:
    handle.masks = random_masks(handle, soft=True)
    handle.thresholds = {Stream.VISION: 0.8, Stream.TEXT: 0.7}


def attributes(model: nn.Module) -> list[tuple[str, list[str]]]:
    return [(name, sorted(module.__dict__)) for name, module in model.named_modules()]


def test_attaching_and_detaching_leaves_the_model_bit_identical(family: TinyFamily) -> None:
    model, batch = family.build(0), family.batch(2, 0)
    outputs = family.outputs(model, batch)
    before, state = attributes(model), copy.deepcopy(model.state_dict())
    handle = attach(model)
    prune_(handle)
    assert not torch.equal(family.outputs(model, batch), outputs)
    detach(model)
    assert attributes(model) == before
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(family.outputs(model, batch), outputs)


def test_attaching_adds_nothing_to_the_state(family: TinyFamily) -> None:
    model = family.build(0)
    names, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    handle = attach(model)
    prune_(handle)
    assert list(model.state_dict()) == names
    assert [id(p) for p in model.parameters()] == parameters
    assert len(list(model.buffers())) == len(list(family.build(0).buffers()))


def test_two_models_in_one_process_do_not_meet(family: TinyFamily) -> None:
    batch = family.batch(2, 0)
    first, second = family.build(0), family.build(1)
    stock = family.outputs(second, batch)
    handle = attach(first)
    prune_(handle)
    pruned = family.outputs(first, batch)
    assert torch.equal(family.outputs(second, batch), stock)
    attach(second).thresholds = {Stream.VISION: 0.5}
    family.outputs(second, batch)
    assert torch.equal(family.outputs(first, batch), pruned)
    detach(second)
    assert torch.equal(family.outputs(second, batch), stock)


def test_a_deep_copy_is_independent(family: TinyFamily) -> None:
    model, batch = family.build(0), family.batch(2, 0)
    handle = attach(model)
    handle.masks = random_masks(handle)
    handle.thresholds = {Stream.VISION: 0.8}
    before = family.outputs(model, batch)
    clone = copy.deepcopy(model)
    assert torch.equal(family.outputs(clone, batch), before)
    twin = handle_of(clone)
    assert twin is not handle
    assert twin.model is clone
    shrink_(twin)
    twin.thresholds = {}
    for parameter in clone.parameters():
        parameter.zero_()
    assert handle.masks
    assert not handle.kept
    assert torch.equal(family.outputs(model, batch), before)


def test_a_deep_copy_outlives_its_original(nlvr: TinyFamily) -> None:
    model, batch = nlvr.build(0), nlvr.batch(2, 0)
    prune_(attach(model))
    clone = copy.deepcopy(model)
    before = nlvr.outputs(clone, batch)
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    assert torch.equal(nlvr.outputs(clone, batch), before)


def test_attaching_again_keeps_the_handle_and_takes_the_options(nlvr: TinyFamily) -> None:
    model = nlvr.build(0)
    handle = attach(model)
    handle.thresholds = {Stream.TEXT: 0.4}
    again = attach(model, merge="drop", mask_site="context", min_tokens={Stream.VISION: 7})
    assert again is handle
    assert (handle.merge, handle.mask_site) == ("drop", "context")
    assert handle.min_tokens == {Stream.VISION: 7}
    assert handle.thresholds == {Stream.TEXT: 0.4}


def test_an_attached_model_says_so(nlvr: TinyFamily) -> None:
    model = nlvr.build(0)
    handle = attach(model)
    assert handle_of(model) is handle is model.pruning
    detach(model)
    with pytest.raises(ValueError, match="BlipForNLVR carries no pruning handle; call comp"):
        handle_of(model)


def test_a_shrunk_model_cannot_be_detached(nlvr: TinyFamily) -> None:
    handle = attach(nlvr.build(0))
    handle.masks = random_masks(handle)
    shrink_(handle)
    with pytest.raises(ValueError, match=r"\d+ modules have lost units.*keep the model attached"):
        detach(handle.model)
    nlvr.outputs(handle.model, nlvr.batch(1, 0))


@pytest.mark.parametrize("reason", ["masks", "kept", "thresholds", "statistics", "meter"])
def test_anything_that_acts_ends_idleness(nlvr: TinyFamily, reason: str) -> None:
    handle = attach(nlvr.build(0))
    assert handle.idle
    values = {
        "masks": {"vision_model.encoder.layers.0.mlp": torch.ones(48)},
        "kept": {"vision_model.encoder.layers.0.mlp": [0]},
        "thresholds": {Stream.VISION: 0.1},
        "statistics": object(),
        "meter": Meter(),
    }
    setattr(handle, reason, values[reason])
    assert not handle.idle


def test_thresholds_of_zero_are_idle(nlvr: TinyFamily) -> None:
    handle = attach(nlvr.build(0))
    handle.thresholds = {Stream.VISION: 0.0, Stream.TEXT: 0.0}
    assert handle.idle
    handle.stock_when_idle = False
    assert not handle.idle


def test_collectors_are_taken_off_again(nlvr: TinyFamily) -> None:
    handle = attach(nlvr.build(0))
    with pytest.raises(TypeError), handle.metering(), handle.collecting():
        handle.model(7)
    assert handle.meter is None
    assert handle.statistics is None


def test_other_thresholds_last_as_long_as_asked(nlvr: TinyFamily) -> None:
    handle = attach(nlvr.build(0))
    handle.thresholds = {Stream.VISION: 0.3}
    with handle.with_thresholds({Stream.TEXT: 9.0}):
        assert handle.thresholds == {Stream.TEXT: 9.0}
    assert handle.thresholds == {Stream.VISION: 0.3}


def test_alive_counts_what_is_not_masked_to_zero(nlvr: TinyFamily) -> None:
    handle = attach(nlvr.build(0))
    name = "vision_model.encoder.layers.0.self_attn"
    handle.masks = {name: torch.tensor([1.0, 0.0, 0.2, 0.0])}
    alive = handle.alive()
    assert alive[name] == 2
    assert alive["vision_model.encoder.layers.0.mlp"] == 48


@pytest.mark.parametrize(
    ("merge", "expected"), [("auto", True), ("summary", True), ("drop", False)]
)
def test_dropped_tokens_merge_as_asked(nlvr: TinyFamily, merge: str, expected: bool) -> None:
    handle = attach(nlvr.build(0), merge=merge)  # type: ignore[arg-type]
    assert handle.merges(Stream.VISION) is expected
    assert handle.merges(Stream.TEXT) is expected


def test_a_plan_holds_what_a_dense_model_needs(nlvr: TinyFamily) -> None:
    handle = attach(nlvr.build(0), merge="drop")
    handle.masks = random_masks(handle)
    handle.thresholds = {Stream.VISION: 0.5}
    shrink_(handle)
    plan = handle.plan()
    assert plan["family"] == "blip"
    assert plan["kept"] == handle.kept
    assert plan["thresholds"] == {"vision": 0.5}
    assert plan["merge"] == "drop"
    assert (plan["cip"], plan["cit"]) == (True, True)


def test_masks_get_no_gradient_and_are_in_no_optimizer(family: TinyFamily) -> None:
    model = family.build(0)
    handle = attach(model)
    prune_(handle)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    before = {name: mask.clone() for name, mask in handle.masks.items()}
    with torch.enable_grad():
        family.losses(model, family.batch(2, 0)).mean().backward()
    optimizer.step()
    for name, mask in handle.masks.items():
        assert not isinstance(mask, nn.Parameter)
        assert mask.grad is None
        assert id(mask) not in held
        assert torch.equal(mask, before[name])


def test_modes_come_in_their_fixed_order(family: TinyFamily) -> None:
    modes = attach(family.build(0)).structure.modes()
    assert modes == [mode for mode in PruningMode if mode in modes]


def test_group_names_are_module_paths(family: TinyFamily) -> None:
    """A plan must mean the same in every process, so that names may not depend on order."""
    groups = attach(family.build(0)).groups
    assert list(groups) == list(attach(family.build(1)).groups)
    assert all(isinstance(group.out.linear.weight, Tensor) for group in groups.values())


@pytest.mark.parametrize(("family", "streams"), [("clip", "text"), ("llava", "vision and text")])
def test_a_summary_token_is_refused_where_tokens_run_in_a_causal_sequence(
    family: str, streams: str
) -> None:
    model = FAMILIES[family].build(0)
    with pytest.raises(
        ValueError, match=f"merge 'summary' cannot be: {streams} tokens of {family}"
    ):
        attach(model, merge="summary")
    assert not hasattr(model, "pruning")
    assert attach(FAMILIES["blip-nlvr"].build(0), merge="summary").merges(Stream.TEXT)
