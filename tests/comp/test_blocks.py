"""The shared forward pass: against a naive one, and the invariances it owes its users."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from comp.blocks import _leave_out, unmetered
from comp.handle import PruningHandle
from comp.importance import ActivationStatistics
from comp.methods import Method
from comp.models import attach
from comp.modes import Stream
from comp.token_state import TokenState, real_rows
from tests.comp.naive_blip import NaiveBlip
from tests.tiny import (
    ENCODER_FAMILIES,
    FAMILIES,
    TinyFamily,
    TokenRecorder,
    measured,
    padded_further,
    random_masks,
    sample_of,
    total_macs,
)

THRESHOLDS = {Stream.VISION: 0.8, Stream.TEXT: 0.7}
BLIPS = [name for name in FAMILIES if name.startswith("blip")]
ENCODERS = [name for name in BLIPS if name != "blip-caption"]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> TinyFamily:
    return FAMILIES[request.param]


@pytest.fixture
def handle(family: TinyFamily) -> PruningHandle:
    """A model under everything at once: soft masks, thresholds, both corrections."""
    handle = attach(family.build(0))
    handle.stock_when_idle = False
    handle.masks = random_masks(handle, soft=True)
    handle.thresholds = dict(THRESHOLDS)
    return handle


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# --- nothing pruned ----------------------------------------------------------------------------


def test_an_idle_model_is_the_stock_model_bit_for_bit(family: TinyFamily) -> None:
    batch = family.batch(3, 0)
    model = family.build(0)
    stock = family.outputs(model, batch)
    attach(model)
    assert torch.equal(family.outputs(model, batch), stock)


def test_the_shared_forward_computes_what_the_stock_one_does(family: TinyFamily) -> None:
    model = family.build(0)
    batch = sample_of(family.batch(3, 0), 1)
    stock = family.outputs(model, batch)
    attach(model).stock_when_idle = False
    assert distance(family.outputs(model, batch), stock) <= 1e-5


@pytest.mark.parametrize("site", ["qkv", "context"])
def test_masks_of_ones_change_nothing(family: TinyFamily, site: Any) -> None:
    batch = family.batch(3, 0)
    handle = attach(family.build(0), mask_site=site)
    handle.stock_when_idle = False
    without = family.outputs(handle.model, batch)
    handle.masks = {name: torch.ones(g.num_units) for name, g in handle.groups.items()}
    assert distance(family.outputs(handle.model, batch), without) <= 1e-6


def test_a_threshold_of_zero_keeps_all_tokens(family: TinyFamily) -> None:
    batch = family.batch(3, 0)
    handle = attach(family.build(0))
    handle.stock_when_idle = False
    without, before = measured(handle, family, batch)
    handle.thresholds = {Stream.VISION: 0.0, Stream.TEXT: 0.0}
    outputs, after = measured(handle, family, batch)
    assert torch.equal(outputs, without)
    assert after.counts == before.counts


# --- against the naive model -------------------------------------------------------------------


def engine_against_naive(
    name: str, naive: NaiveBlip, handle: PruningHandle, *, size: int = 3
) -> tuple[TokenRecorder, float]:
    """Encodes a padded batch with both; returns the engine's counts and the largest error."""
    batch = FAMILIES[name].batch(size, 0)
    recorder = TokenRecorder()
    handle.meter = recorder
    pixels = batch["pixel_values"]
    model: Any = handle.model
    images = model.vision_model(pixel_values=pixels.reshape(-1, *pixels.shape[-3:]))
    rows = images.last_hidden_state
    contexts = (rows[0::2], rows[1::2]) if name == "blip-nlvr" else rows
    texts = model.text_encoder(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        encoder_hidden_states=contexts,
    ).last_hidden_state
    handle.meter = None
    flat = pixels.reshape(-1, *pixels.shape[-3:])
    seen = [naive.vision(image).left for image in flat]
    errors = [_distance_to(rows[i], seen[i]) for i in range(len(seen))]
    per_sample = len(seen) // size
    for b in range(size):
        words = int(batch["attention_mask"][b].sum())
        own = seen[b * per_sample : (b + 1) * per_sample]
        text = naive.text(batch["input_ids"][b, :words], own)
        errors.append(_distance_to(texts[b], text.left))
    return recorder, max(errors)


def _distance_to(rows: Tensor, expected: Tensor) -> float:
    """Compares the real rows of a padded sample, order included."""
    real = rows[real_rows(rows[None])[0]]
    assert real.shape == expected.shape
    return distance(real.double(), expected)


@pytest.mark.equations("Eq. 2", "Eq. 6", "Eq. 7")
@pytest.mark.parametrize("merge", ["drop", "summary"])
@pytest.mark.parametrize("site", ["qkv", "context"])
@pytest.mark.parametrize("name", ENCODERS)
def test_gathering_tokens_equals_masking_them_at_full_length(
    name: str, site: Any, merge: Any
) -> None:
    handle = attach(FAMILIES[name].build(0), mask_site=site, merge=merge)
    handle.masks = random_masks(handle, soft=True)
    handle.thresholds = dict(THRESHOLDS)
    naive = NaiveBlip(handle.model, handle.masks, THRESHOLDS, merge=merge == "summary", site=site)
    recorder, error = engine_against_naive(name, naive, handle)
    assert {key: sorted(counts) for key, counts in recorder.counts.items()} == {
        key: sorted(counts) for key, counts in naive.counts.items()
    }
    assert error <= 1e-5


@pytest.mark.equations("Eq. 7")
@pytest.mark.parametrize("name", ENCODERS)
def test_the_naive_model_without_cit_is_another_one(name: str) -> None:
    handle = attach(FAMILIES[name].build(0))
    handle.masks = random_masks(handle)
    handle.thresholds = dict(THRESHOLDS)
    naive = NaiveBlip(handle.model, handle.masks, THRESHOLDS, cit=False)
    batch = FAMILIES[name].batch(2, 0)
    image = batch["pixel_values"].reshape(-1, *batch["pixel_values"].shape[-3:])[:1]
    rows: Any = handle.model.vision_model(pixel_values=image)  # type: ignore[operator]
    expected = naive.vision(image[0]).left
    real = rows.last_hidden_state[0]
    assert real.shape != expected.shape or distance(real.double(), expected) > 1e-3


@pytest.mark.parametrize("name", ["blip-caption", "blip-vqa"])
@pytest.mark.parametrize("site", ["qkv", "context"])
def test_the_decoder_equals_the_naive_one(name: str, site: Any) -> None:
    family = FAMILIES[name]
    handle = attach(family.build(0), mask_site=site)
    handle.masks = random_masks(handle, soft=True)
    handle.thresholds = dict(THRESHOLDS)
    naive = NaiveBlip(handle.model, handle.masks, THRESHOLDS, site=site)
    batch = family.batch(3, 0)
    outputs = family.outputs(handle.model, batch)
    for b in range(3):
        sample = sample_of(batch, b)
        context = naive.vision(sample["pixel_values"][0]).left
        ids = sample["input_ids"][0]
        if name == "blip-vqa":
            context = naive.text(ids, [context]).left
            ids = sample["decoder_input_ids"][0]
        logits = naive.decoder(ids, context)
        assert distance(outputs[b, : len(ids)].double(), logits) <= 2e-5


# --- collaborative importance ------------------------------------------------------------------


def collected(handle: PruningHandle, name: str, *, size: int = 3) -> dict[str, Tensor]:
    batch = FAMILIES[name].batch(size, 0)
    with handle.collecting() as statistics:
        FAMILIES[name].outputs(handle.model, batch)
    return statistics.sums


def naively_collected(naive: NaiveBlip, name: str, *, size: int = 3) -> dict[str, Tensor]:
    batch = FAMILIES[name].batch(size, 0)
    for b in range(size):
        sample = sample_of(batch, b)
        pixels = sample["pixel_values"][0]
        images = [
            naive.vision(image).left for image in (pixels if pixels.dim() == 4 else [pixels])
        ]
        ids = sample["input_ids"][0]
        if name == "blip-caption":
            naive.decoder(ids, images[0])
            continue
        text = naive.text(ids, images)
        if name == "blip-vqa":
            naive.decoder(sample["decoder_input_ids"][0], text.left)
    return naive.sums


@pytest.mark.equations("Eq. 3", "Eq. 4", "Eq. 5")
@pytest.mark.parametrize("cip", [True, False])
@pytest.mark.parametrize("merge", ["drop", "summary"])
@pytest.mark.parametrize("name", ["blip-nlvr", "blip-vqa", "blip-caption"])
def test_statistics_weigh_rows_by_the_scores_of_the_right_layer(
    name: str, merge: Any, cip: bool
) -> None:
    switches = Method(cip=cip, cit=True, schedule="mps")
    handle = attach(FAMILIES[name].build(0), merge=merge, switches=switches)
    handle.masks = random_masks(handle, soft=True)
    handle.thresholds = dict(THRESHOLDS)
    naive = NaiveBlip(handle.model, handle.masks, THRESHOLDS, merge=merge == "summary", cip=cip)
    sums, expected = collected(handle, name), naively_collected(naive, name)
    assert sums.keys() == expected.keys() == handle.groups.keys()
    for group in sums:
        torch.testing.assert_close(sums[group].double(), expected[group], rtol=1e-4, atol=1e-6)


@pytest.mark.equations("Eq. 4", "Eq. 5")
@pytest.mark.parametrize("name", ["blip-nlvr", "blip-vqa"])
def test_cip_works_without_dropping_tokens(name: str) -> None:
    handle = attach(FAMILIES[name].build(0))
    sums, naive = collected(handle, name), NaiveBlip(handle.model)
    for group, expected in naively_collected(naive, name).items():
        torch.testing.assert_close(sums[group].double(), expected, rtol=1e-4, atol=1e-6)


def test_switching_cip_off_changes_every_ranked_module(family: TinyFamily) -> None:
    sums = []
    for cip in (True, False):
        handle = attach(family.build(0), switches=Method(cip=cip, cit=True, schedule="mps"))
        with handle.collecting() as statistics:
            family.outputs(handle.model, family.batch(3, 0))
        sums.append(statistics.sums)
    for group in sums[0]:
        ratio = sums[0][group] / sums[1][group]
        assert group.startswith("text_decoder") or float(ratio.std() / ratio.mean()) > 0.01


def test_statistics_do_not_depend_on_batch_mates(
    family: TinyFamily, handle: PruningHandle
) -> None:
    batch = family.batch(3, 0)
    with handle.collecting() as together:
        family.outputs(handle.model, batch)
    with handle.collecting() as alone:
        for row in range(3):
            family.outputs(handle.model, sample_of(batch, row))
    assert together.sums.keys() == alone.sums.keys()
    for group in together.sums:
        torch.testing.assert_close(together.sums[group], alone.sums[group], rtol=1e-4, atol=1e-6)


class _RowRecorder(ActivationStatistics):
    """Notes how many rows of every sample count in each group."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, list[int]] = {}

    def add(self, group: str, activation: Tensor, token_weight: Tensor | None) -> None:
        assert token_weight is not None
        assert token_weight.shape == activation.shape[:2]
        self.rows[group] = (token_weight > 0).sum(dim=1).tolist()


@pytest.mark.equations("Eq. 5")
@pytest.mark.parametrize("family", ENCODER_FAMILIES, indirect=True)
def test_a_feed_forward_layer_is_weighed_on_the_rows_that_enter_the_next_attention(
    family: TinyFamily, handle: PruningHandle
) -> None:
    handle.statistics = recorder = _RowRecorder()
    family.outputs(handle.model, family.batch(3, 0))
    handle.statistics = None
    for blocks in handle.structure.encoders.values():
        for block, after in itertools.pairwise(blocks):
            own, entering = (recorder.rows[b.attention.name] for b in (block, after))
            assert recorder.rows[block.feed_forward.name] == entering
            assert block.stream is not Stream.VISION or own != entering


def test_collecting_does_not_change_the_outputs(family: TinyFamily, handle: PruningHandle) -> None:
    batch = family.batch(2, 0)
    before = family.outputs(handle.model, batch)
    with handle.collecting():
        during = family.outputs(handle.model, batch)
    assert distance(during, before) <= 1e-5


# --- batches and padding -----------------------------------------------------------------------


def test_a_sample_alone_gives_the_same_as_in_a_batch(
    family: TinyFamily, handle: PruningHandle
) -> None:
    batch = family.batch(4, 0)
    outputs, together = measured(handle, family, batch)
    parts = [measured(handle, family, sample_of(batch, row)) for row in range(4)]
    for row, (alone, _) in enumerate(parts):
        same = outputs[row : row + 1]
        if same.shape != alone.shape:
            same = same[:, : alone.shape[1]]
        assert distance(same, alone) <= 1e-5
    assert total_macs(handle, together) == sum(total_macs(handle, one) for _, one in parts)
    for layer, counts in together.counts.items():
        assert sorted(counts) == sorted(c for _, one in parts for c in one.counts[layer])


@pytest.mark.parametrize("family", ENCODER_FAMILIES, indirect=True)
def test_the_test_above_meets_samples_of_different_counts(
    family: TinyFamily, handle: PruningHandle
) -> None:
    _, recorder = measured(handle, family, family.batch(4, 0))
    assert len(set(recorder.counts["vision.1"])) > 1
    if family.drops_text:
        assert len(set(recorder.counts["text.1"])) > 1


def test_padding_changes_nothing(family: TinyFamily, handle: PruningHandle) -> None:
    batch = family.batch(3, 0)
    outputs, before = measured(handle, family, batch)
    wider, after = measured(handle, family, padded_further(batch, 4))
    if wider.shape != outputs.shape:
        wider = wider[:, : outputs.shape[1]]
    assert distance(wider, outputs) <= 1e-5
    assert after.counts == before.counts
    assert total_macs(handle, after) == total_macs(handle, before)


def test_padding_changes_no_statistics(family: TinyFamily, handle: PruningHandle) -> None:
    sums = []
    for batch in (family.batch(3, 0), padded_further(family.batch(3, 0), 4)):
        with handle.collecting() as statistics:
            family.outputs(handle.model, batch)
        sums.append(statistics.sums)
    assert sums[0].keys() == sums[1].keys()
    for group in sums[0]:
        torch.testing.assert_close(sums[1][group], sums[0][group], rtol=1e-5, atol=1e-7)


def test_what_stands_in_padded_places_changes_nothing(
    family: TinyFamily, handle: PruningHandle
) -> None:
    batch = family.batch(3, 0)
    outputs, _ = measured(handle, family, batch)
    other = {
        **batch,
        "input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 7),
    }
    assert distance(measured(handle, family, other)[0], outputs) <= 1e-5


# --- tokens ------------------------------------------------------------------------------------


def test_token_counts_never_grow_from_layer_to_layer(
    family: TinyFamily, handle: PruningHandle
) -> None:
    _, recorder = measured(handle, family, family.batch(3, 0))
    # A summary token may stand for a single dropped one, so that a count can stay.
    for layer, counts in recorder.counts.items():
        encoder, index = layer.split(".")
        after = recorder.counts.get(f"{encoder}.{int(index) + 1}", counts)
        assert all(b <= a for a, b in zip(counts, after, strict=True))


@pytest.mark.parametrize("family", ENCODER_FAMILIES, indirect=True)
def test_the_minima_hold_under_any_threshold(family: TinyFamily, handle: PruningHandle) -> None:
    handle.thresholds = {Stream.VISION: 1e9, Stream.TEXT: 1e9}
    handle.merge = "drop"
    handle.min_tokens = {Stream.VISION: 5, Stream.TEXT: 3}
    _, recorder = measured(handle, family, family.batch(3, 0))
    assert set(recorder.counts["vision.0"]) == {1 + 5}
    if family.drops_text:
        assert min(recorder.counts["text.0"]) >= 1 + 3


@pytest.mark.parametrize("family", ENCODER_FAMILIES, indirect=True)
def test_feed_forward_layers_see_the_kept_rows_and_no_padding(
    family: TinyFamily, handle: PruningHandle
) -> None:
    rows: list[int] = []
    last = handle.structure.encoders["vision"][-1].feed_forward.out.linear
    hook = last.register_forward_hook(
        lambda m, args, out: rows.append(args[0].numel() // args[0].shape[-1])
    )
    _, recorder = measured(handle, family, family.batch(3, 0))
    hook.remove()
    counts = recorder.counts["vision.2"]
    assert sum(rows) == sum(counts) < 17 * len(counts)


@pytest.mark.parametrize("name", ["clip", "llava"])
def test_a_causal_stream_cannot_merge_its_tokens(name: str) -> None:
    family = FAMILIES[name]
    handle = attach(family.build(0))
    handle.merge = "summary"  # attach would have refused it
    handle.thresholds = dict(THRESHOLDS)
    with pytest.raises(ValueError, match="a causal stream cannot merge tokens; set merge='drop'"):
        family.outputs(handle.model, family.batch(3, 0))


def test_the_decoder_of_a_pruned_model_stays_causal() -> None:
    family = FAMILIES["blip-caption"]
    handle = attach(family.build(0))
    handle.masks = random_masks(handle)
    handle.thresholds = {Stream.VISION: 0.8}
    batch = family.batch(2, 0)
    before = family.outputs(handle.model, batch)
    batch["input_ids"][:, 4:] = 9
    after = family.outputs(handle.model, batch)
    assert distance(before[:, :4], after[:, :4]) <= 1e-6
    assert distance(before[:, 4:6], after[:, 4:6]) > 1e-3


def test_gradients_do_not_flow_through_scores_or_masks(family: TinyFamily) -> None:
    handle = attach(family.build(0))
    handle.masks = random_masks(handle, soft=True)
    handle.thresholds = dict(THRESHOLDS)
    with torch.enable_grad():
        family.losses(handle.model, family.batch(2, 0)).mean().backward()
    assert all(mask.grad is None and not mask.requires_grad for mask in handle.masks.values())
    assert any(p.grad is not None for p in handle.model.parameters())


def test_unmetered_passes_are_neither_counted_nor_collected(
    family: TinyFamily, handle: PruningHandle
) -> None:
    batch = family.batch(2, 0)
    with handle.metering() as meter, handle.collecting() as statistics:
        family.outputs(handle.model, batch)
        once = dict(statistics.sums)
        with unmetered(handle.model):
            family.outputs(handle.model, batch)
        meter.num_samples = 2
        counted = meter.measurement(handle.groups.values(), handle.alive()).total_macs
        assert all(torch.equal(once[g], statistics.sums[g]) for g in once)
    _, recorder = measured(handle, family, batch)
    assert counted == total_macs(handle, recorder)


def test_unmetered_leaves_a_stock_model_alone(family: TinyFamily) -> None:
    model = family.build(0)
    with unmetered(model):
        family.outputs(model, family.batch(1, 0))


# --- stochastic depth --------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_image_layers_are_left_out_for_whole_samples_more_often_the_deeper_they_lie(
    layer: int,
) -> None:
    handle = attach(FAMILIES["blip-vqa"].build(0).train())
    handle.drop_path = 0.4
    block = handle.structure.encoders["vision"][layer]
    state = TokenState(torch.ones(4000, 3, 2), valid=torch.ones(4000, 3, dtype=torch.bool))
    state.valid[0, 1] = False  # type: ignore[index]
    state.pack_padding_away()
    rows = state.pad(_leave_out(handle, block, state, state.hidden))
    rate = 0.2 * layer
    assert rows[1:].unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)] if layer else [1.0])
    assert bool((rows[1:] == rows[1:, :1, :1]).all())
    assert float((rows[1:, 0, 0] == 0).float().mean()) == pytest.approx(rate, abs=0.04)


def test_no_layer_is_left_out_in_eval_mode_or_of_a_text() -> None:
    handle = attach(FAMILIES["blip-vqa"].build(0).train())
    handle.drop_path = 0.9
    state = TokenState(torch.ones(50, 3, 2))
    text, image = (handle.structure.encoders[name][-1] for name in ("text", "vision"))
    assert _leave_out(handle, text, state, state.hidden) is state.hidden
    handle.model.eval()
    assert _leave_out(handle, image, state, state.hidden) is state.hidden
