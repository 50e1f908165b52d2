"""BLIP: the NLVR2 class, padded questions and images, and generation from pruned models."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BlipForQuestionAnswering

from comp.errors import UnsupportedModelError
from comp.handle import PruningHandle
from comp.models import attach
from comp.models.blip_nlvr import BlipForNLVR, TwinCrossAttention
from comp.modes import PruningMode, Stream
from comp.shrink import shrink_
from comp.tasks.base import Batch
from tests.tiny import BOS, FAMILIES, SEP, blip_config, random_masks, sample_of

GENERATORS = ["blip-caption", "blip-vqa"]
STYLES = {
    "greedy": {"num_beams": 1},
    "beams": {"num_beams": 3},
}


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=GENERATORS)
def pruned(request: pytest.FixtureRequest) -> PruningHandle:
    """A shrunk generator that drops tokens."""
    handle = attach(FAMILIES[request.param].build(0))
    handle.masks = random_masks(handle)
    shrink_(handle)
    handle.thresholds = {Stream.VISION: 0.8, Stream.TEXT: 0.7}
    return handle


def prompt_of(model: Any, batch: Batch) -> Batch:
    """What ``generate`` gets: questions with their mask, or images alone."""
    if "decoder_input_ids" in batch:
        return {k: batch[k] for k in ("pixel_values", "input_ids", "attention_mask")}
    return {"pixel_values": batch["pixel_values"]}


def generate(model: Any, batch: Batch, *, use_cache: bool = True, **style: Any) -> Tensor:
    words: Tensor = model.generate(
        **prompt_of(model, batch),
        max_new_tokens=4,
        min_new_tokens=3,
        use_cache=use_cache,
        **style,
    )
    return words


def family_of(handle: PruningHandle) -> Any:
    return FAMILIES["blip-vqa" if "text" in handle.structure.encoders else "blip-caption"]


# --- generation --------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_generation_with_a_cache_equals_generation_without(
    pruned: PruningHandle, style: str
) -> None:
    batch = family_of(pruned).batch(3, 0)
    cached = generate(pruned.model, batch, **STYLES[style])
    assert torch.equal(cached, generate(pruned.model, batch, use_cache=False, **STYLES[style]))
    assert cached.shape[1] >= 4


@pytest.mark.parametrize("style", ["greedy", "beams"])
def test_a_sample_generates_alone_what_it_does_in_a_batch(
    pruned: PruningHandle, style: str
) -> None:
    batch = family_of(pruned).batch(3, 0)
    together = generate(pruned.model, batch, **STYLES[style])
    for row in range(3):
        alone = generate(pruned.model, sample_of(batch, row), **STYLES[style])[0]
        assert torch.equal(together[row, : len(alone)], alone)
        assert together[row, len(alone) :].eq(0).all()


@pytest.mark.parametrize("style", ["greedy", "beams"])
@pytest.mark.parametrize("name", GENERATORS)
def test_masked_and_shrunk_models_generate_alike(name: str, style: str) -> None:
    handle = attach(FAMILIES[name].build(0))
    handle.masks = random_masks(handle)
    handle.thresholds = {Stream.VISION: 0.8, Stream.TEXT: 0.7}
    batch = FAMILIES[name].batch(3, 0)
    masked = generate(handle.model, batch, **STYLES[style])
    shrink_(handle)
    assert torch.equal(generate(handle.model, batch, **STYLES[style]), masked)


def test_greedy_generation_is_the_likeliest_next_word_again_and_again() -> None:
    family = FAMILIES["blip-caption"]
    handle = attach(family.build(0))
    handle.masks = random_masks(handle)
    handle.thresholds = {Stream.VISION: 0.8}
    batch = sample_of(family.batch(1, 0), 0)
    words = torch.tensor([[BOS]])
    for _ in range(3):
        logits = handle.model(pixel_values=batch["pixel_values"], input_ids=words).logits[0, -1]
        logits[SEP] = -torch.inf  # min_new_tokens
        words = torch.cat([words, logits.argmax()[None, None]], dim=1)
    generated = generate(handle.model, batch, num_beams=1)
    assert torch.equal(generated[:, :4], words)


@pytest.mark.parametrize("name", GENERATORS)
def test_an_idle_model_generates_what_the_stock_model_does(name: str) -> None:
    model, batch = FAMILIES[name].build(0), FAMILIES[name].batch(3, 0)
    stock = generate(model, batch, num_beams=3)
    attach(model)
    assert torch.equal(generate(model, batch, num_beams=3), stock)


def test_a_cached_decoder_costs_only_its_new_words() -> None:
    family = FAMILIES["blip-caption"]
    handle = attach(family.build(0))
    batch = family.batch(2, 0)
    with handle.metering() as meter:
        words = generate(handle.model, batch, num_beams=1)
        meter.num_samples = 2
        cached = meter.measurement(handle.groups.values(), handle.alive())
    with handle.metering() as meter:
        generate(handle.model, batch, use_cache=False, num_beams=1)
        meter.num_samples = 2
        whole = meter.measurement(handle.groups.values(), handle.alive())
    steps = words.shape[1] - 1
    assert cached.macs < whole.macs
    assert cached.tokens["decoder.0"] == 1
    assert whole.tokens["decoder.0"] == pytest.approx((steps + 1) / 2)


# --- padding that the stock code forgets -------------------------------------------------------


def test_the_answer_decoder_ignores_padded_questions() -> None:
    family = FAMILIES["blip-vqa"]
    handle = attach(family.build(0))
    handle.stock_when_idle = False
    batch = family.batch(3, 0)
    outputs = family.outputs(handle.model, batch)
    for row in range(3):
        alone = family.outputs(handle.model, sample_of(batch, row))
        assert (outputs[row] - alone[0]).abs().max() <= 1e-5


def test_the_stock_answer_decoder_does_not() -> None:
    """The defect that the adapter mends; if the library mends it, this says so."""
    family = FAMILIES["blip-vqa"]
    model, batch = family.build(0), family.batch(3, 0)
    row = int(batch["attention_mask"].sum(dim=1).argmin())
    alone = family.outputs(model, sample_of(batch, row))
    assert (family.outputs(model, batch)[row] - alone[0]).abs().max() > 1e-3


def test_cross_attention_ignores_padded_image_rows() -> None:
    family = FAMILIES["blip-retrieval"]
    handle = attach(family.build(0))
    handle.stock_when_idle = False
    model: Any = handle.model
    batch = family.batch(2, 0)
    text = {k: batch[k] for k in ("input_ids", "attention_mask")}
    images = model.vision_model(pixel_values=batch["pixel_values"]).last_hidden_state
    plain = model.text_encoder(**text, encoder_hidden_states=images).last_hidden_state
    padded = torch.nn.functional.pad(images, (0, 0, 0, 5))
    again = model.text_encoder(**text, encoder_hidden_states=padded).last_hidden_state
    assert (again - plain).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["blip-nlvr", "blip-vqa", "blip-caption"])
def test_the_models_own_loss_runs_pruned(name: str) -> None:
    family = FAMILIES[name]
    handle = attach(family.build(0))
    handle.masks = random_masks(handle)
    handle.thresholds = {Stream.VISION: 0.8, Stream.TEXT: 0.7}
    batch = family.batch(3, 0)
    if name == "blip-vqa":
        batch["labels"] = batch["decoder_input_ids"]
        expected = family.losses(handle.model, batch).mean()
    elif name == "blip-nlvr":
        expected = family.losses(handle.model, batch).mean()
    else:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        batch["labels"] = ids.masked_fill(mask == 0, -100)
        weights = (mask.sum(dim=1) - 1) / (mask.sum() - len(mask))
        expected = (family.losses(handle.model, batch) * weights).sum()
    assert handle.model(**batch).loss == pytest.approx(float(expected), abs=1e-5)


# --- NLVR2 -------------------------------------------------------------------------------------


def test_nlvr_averages_in_the_lower_half_and_merges_in_the_upper() -> None:
    model = BlipForNLVR(blip_config())
    layers: Any = model.text_encoder.encoder.layer
    merges = [layer.crossattention.merge_layer for layer in layers]
    assert [merge is None for merge in merges] == [True, False]
    assert (merges[1].in_features, merges[1].out_features) == (48, 24)


def test_the_twins_average_and_their_merge_are_what_they_say() -> None:
    config = blip_config().text_config
    left, right = torch.randn(1, 3, 24), torch.randn(1, 3, 24)
    average = TwinCrossAttention(config, 0, merge=False)
    torch.testing.assert_close(average.combine([left, right]), (left + right) / 2)
    merging = TwinCrossAttention(config, 1, merge=True)
    assert merging.merge_layer is not None
    weight, bias = merging.merge_layer.weight, merging.merge_layer.bias
    naive = left @ weight[:, :24].T + right @ weight[:, 24:].T + bias
    torch.testing.assert_close(merging.combine([left, right]), naive)


def test_the_order_of_the_images_matters() -> None:
    family = FAMILIES["blip-nlvr"]
    model, batch = family.build(0), family.batch(2, 0)
    swapped = {**batch, "pixel_values": batch["pixel_values"].flip(1)}
    assert (family.outputs(model, batch) - family.outputs(model, swapped)).abs().max() > 1e-2


def test_nlvr_gives_a_loss_only_with_labels() -> None:
    family = FAMILIES["blip-nlvr"]
    model, batch = family.build(0), family.batch(4, 0)
    output = model(**batch)
    naive = -output.logits.log_softmax(dim=1)[range(4), batch["labels"]].mean()
    torch.testing.assert_close(output.loss, naive)
    assert model(**{k: v for k, v in batch.items() if k != "labels"}).loss is None


def test_nlvr_gives_its_word_embeddings() -> None:
    model = BlipForNLVR(blip_config())
    assert model.get_input_embeddings() is model.text_encoder.embeddings.word_embeddings


# --- structure ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("blip")])
def test_every_module_belongs_to_the_mode_of_the_papers_table(name: str) -> None:
    handle = attach(FAMILIES[name].build(0))
    for path, group in handle.groups.items():
        if path.startswith("vision_model"):
            assert group.mode is PruningMode.VISION_PARAMS
        elif ".crossattention" in path:
            assert group.mode is PruningMode.CROSS_PARAMS
        else:
            assert group.mode is PruningMode.LANGUAGE_PARAMS


@pytest.mark.parametrize(
    ("name", "attentions", "feed_forwards"),
    [
        ("blip-nlvr", 3 + 2 + 2 * 2, 3 + 2),
        ("blip-retrieval", 3 + 2 + 2, 3 + 2),
        ("blip-caption", 3 + 2 + 2, 3 + 2),
        ("blip-vqa", 3 + 4 + 4, 3 + 2 + 2),
    ],
)
def test_no_attention_or_feed_forward_is_forgotten(
    name: str, attentions: int, feed_forwards: int
) -> None:
    kinds = [group.kind for group in attach(FAMILIES[name].build(0)).groups.values()]
    assert kinds.count("head") == attentions
    assert kinds.count("channel") == feed_forwards


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_the_modes_that_the_paper_gives_it(name: str) -> None:
    assert tuple(attach(FAMILIES[name].build(0)).structure.modes()) == FAMILIES[name].modes


def test_a_text_model_without_cross_attention_is_refused() -> None:
    config = copy.deepcopy(FAMILIES["blip-vqa"].build(0).config)
    config.text_config.is_decoder = False  # type: ignore[union-attr]
    with pytest.raises(UnsupportedModelError, match=r"no cross-attention.*set it to True"):
        attach(BlipForQuestionAnswering(config))
