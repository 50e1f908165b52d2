"""CLIP and SigLIP: what their adapters claim beyond what holds for every family."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)

from comp import cost
from comp.handle import PruningHandle
from comp.importance import token_importance
from comp.models import attach, detach
from comp.modes import PruningMode, Stream
from comp.shrink import shrink_
from comp.tasks.base import Batch
from comp.tokens import keep_above
from tests.tiny import (
    BOS,
    FAMILIES,
    PAD,
    SIGLIP,
    VOCABULARY,
    TinyFamily,
    clip_config,
    padded_further,
    randomise_,
    sample_of,
)

CLIP = FAMILIES["clip"]
BOTH = pytest.mark.parametrize("family", [CLIP, SIGLIP], ids=lambda family: family.name)
DROPPING = {Stream.VISION: 0.8, Stream.TEXT: 0.8}
FOUR_MODES = [mode for mode in PruningMode if mode is not PruningMode.CROSS_PARAMS]

VIT_L_14_336 = CLIPConfig(
    text_config={"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    vision_config={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "image_size": 336,
        "patch_size": 14,
    },
    projection_dim=768,
)


def mask_some_(handle: PruningHandle, seed: int = 0) -> None:
    """Masks a random third of every group's units, but never all."""
    generator = torch.Generator().manual_seed(seed)
    for name, group in handle.groups.items():
        mask = (torch.rand(group.num_units, generator=generator) > 0.33).float()
        mask[0] = 1.0
        handle.masks[name] = mask


def counted(
    handle: PruningHandle, family: TinyFamily, batch: Batch
) -> tuple[int, dict[str, float]]:
    """Multiply-adds and token counts by the meter."""
    with torch.no_grad(), handle.metering() as meter:
        family.outputs(handle.model, batch)
    meter.num_samples = len(batch["input_ids"])
    measured = meter.measurement(handle.groups.values(), handle.alive())
    return measured.total_macs, measured.tokens


def flops_of(run: Any) -> int:
    """FLOPs of a call by torch's own counter."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def outputs(family: TinyFamily, model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return family.outputs(model, batch)


def text_output(model: Any, batch: Batch) -> Any:
    with torch.no_grad():
        return model.text_model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        )


@BOTH
def test_both_have_the_four_modes_without_cross_attention(family: TinyFamily) -> None:
    assert attach(family.build(0)).structure.modes() == FOUR_MODES


@BOTH
def test_an_idle_model_gives_the_stock_output_bit_for_bit(family: TinyFamily) -> None:
    model, batch = family.build(0), family.batch(4, 0)
    stock = model(**batch).logits_per_image
    attach(model)
    assert torch.equal(model(**batch).logits_per_image, stock)


@BOTH
@pytest.mark.parametrize("with_mask", [True, False])
def test_the_own_forward_equals_the_stock_one(family: TinyFamily, with_mask: bool) -> None:
    model, batch = family.build(0), CLIP.batch(4, 0)  # texts with padding, for SigLIP too
    batch["attention_mask"] = batch["attention_mask"] if with_mask else None
    stock = outputs(family, model, batch)
    attach(model).stock_when_idle = False
    torch.testing.assert_close(outputs(family, model, batch), stock, rtol=0, atol=1e-6)


def test_the_own_forward_pools_at_the_largest_id_where_the_config_says_2() -> None:
    model, batch = randomise_(CLIPModel(clip_config(end=2)), 0), CLIP.batch(4, 0)
    batch["input_ids"][:, 3] = VOCABULARY - 1  # an earlier one: both ways take the first
    stock = outputs(CLIP, model, batch)
    attach(model).stock_when_idle = False
    torch.testing.assert_close(outputs(CLIP, model, batch), stock, rtol=0, atol=1e-6)


def test_the_own_forward_pools_an_end_that_the_mask_calls_padding() -> None:
    model, batch = CLIP.build(0), CLIP.batch(4, 0)
    batch["attention_mask"] = (batch["input_ids"] % (VOCABULARY - 1) != PAD).long()
    stock = outputs(CLIP, model, batch)
    attach(model).stock_when_idle = False
    torch.testing.assert_close(outputs(CLIP, model, batch), stock, rtol=0, atol=1e-6)


@BOTH
def test_a_masked_model_equals_its_shrunk_self(family: TinyFamily) -> None:
    model, batch = family.build(0), family.batch(6, 0)
    handle = attach(model)
    handle.thresholds = dict(DROPPING)
    mask_some_(handle)
    masked, (_, tokens) = outputs(family, model, batch), counted(handle, family, batch)
    shrink_(handle)
    torch.testing.assert_close(outputs(family, model, batch), masked, rtol=0, atol=1e-5)
    assert counted(handle, family, batch)[1] == tokens


@BOTH
def test_tokens_are_dropped_in_both_streams(family: TinyFamily) -> None:
    handle, batch = attach(family.build(0)), family.batch(6, 0)
    _, dense = counted(handle, family, batch)
    handle.thresholds = dict(DROPPING)
    _, tokens = counted(handle, family, batch)
    assert tokens["vision.2"] < dense["vision.2"]
    assert tokens["text.1"] < dense["text.1"]


@BOTH
@pytest.mark.parametrize("row", range(4))
def test_a_sample_alone_gives_its_row_of_the_batch(family: TinyFamily, row: int) -> None:
    model, batch = family.build(0), family.batch(4, 0)
    handle = attach(model)
    handle.thresholds = dict(DROPPING)
    alone = outputs(family, model, sample_of(batch, row))[0]
    torch.testing.assert_close(alone, outputs(family, model, batch)[row], rtol=0, atol=1e-5)


@BOTH
def test_the_batch_has_the_tokens_of_its_samples(family: TinyFamily) -> None:
    handle, batch = attach(family.build(0)), family.batch(4, 0)
    handle.thresholds = dict(DROPPING)
    alone = [counted(handle, family, sample_of(batch, row))[0] for row in range(4)]
    assert counted(handle, family, batch)[0] == sum(alone)


def test_padding_behind_a_clip_text_changes_nothing() -> None:
    model, batch = CLIP.build(0), CLIP.batch(4, 0)
    handle = attach(model)
    handle.thresholds = dict(DROPPING)
    further = padded_further(batch, 5)
    assert counted(handle, CLIP, further) == counted(handle, CLIP, batch)
    torch.testing.assert_close(
        outputs(CLIP, model, further), outputs(CLIP, model, batch), rtol=0, atol=1e-5
    )


@BOTH
@pytest.mark.parametrize("seed", range(3))
def test_the_meter_agrees_with_torch_on_pruned_models(family: TinyFamily, seed: int) -> None:
    model, batch = family.build(seed), family.batch(1, seed)
    handle = attach(model)
    mask_some_(handle, seed)
    shrink_(handle)
    handle.thresholds = dict(DROPPING)
    single = sample_of(batch, 0)
    macs, _ = counted(handle, family, single)
    assert flops_of(lambda: family.outputs(model, single)) == 2 * macs


@pytest.mark.parametrize(
    ("model_class", "section", "argument", "modes"),
    [
        (CLIPTextModelWithProjection, "text_config", "input_ids", ["language_params"]),
        (CLIPVisionModelWithProjection, "vision_config", "pixel_values", ["vision_params"]),
    ],
)
def test_one_encoder_with_its_projection_is_served_too(
    model_class: Any, section: str, argument: str, modes: list[str]
) -> None:
    config = getattr(clip_config(), section)
    config.projection_dim = 16
    model = randomise_(model_class(config), 0)
    handle = attach(model)
    batch = {argument: CLIP.batch(1, 0)[argument]}
    with torch.no_grad(), handle.metering() as meter:
        model(**batch)
    meter.num_samples = 1
    measured = meter.measurement(handle.groups.values(), handle.alive())
    assert flops_of(lambda: model(**batch)) == 2 * measured.total_macs
    assert handle.structure.modes()[:1] == modes


def test_start_and_end_of_a_clip_text_survive_any_threshold() -> None:
    model, batch = CLIP.build(0), CLIP.batch(4, 0)
    handle = attach(model, min_tokens={Stream.VISION: 1, Stream.TEXT: 0})
    handle.thresholds = {Stream.TEXT: float("inf")}
    hidden = text_output(model, batch).last_hidden_state
    reference = CLIP.build(0)
    attach(reference).stock_when_idle = False
    only = {
        "input_ids": torch.tensor([[BOS, VOCABULARY - 1]] * 4),
        "attention_mask": torch.ones(4, 2, dtype=torch.long),
    }
    assert hidden.shape == text_output(reference, only).last_hidden_state.shape


def test_the_clip_feature_is_read_at_the_end_tokens_new_row() -> None:
    model, batch = CLIP.build(0), CLIP.batch(4, 0)
    handle = attach(model, min_tokens={Stream.VISION: 1, Stream.TEXT: 2})
    handle.thresholds = {Stream.TEXT: float("inf")}
    output = text_output(model, batch)
    ends = batch["attention_mask"].sum(dim=1) - 1
    assert bool((ends > 3).all())  # behind what is left: start, two words, end
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 3])


def masked_reference(model: Any, batch: Batch, threshold: float) -> tuple[Tensor, list[int]]:
    """CLIP's text feature at full length, dropped words being masked and never gathered."""
    tower, ids = model.text_model, batch["input_ids"]
    num_tokens = ids.shape[1]
    alive = batch["attention_mask"].bool()
    ends = alive.sum(dim=1) - 1
    protected = torch.arange(num_tokens) == ends[:, None]
    protected[:, 0] = True
    causal = torch.ones(num_tokens, num_tokens).tril().bool()
    hidden, counts = tower.embeddings(input_ids=ids), []
    for layer in tower.encoder.layers:
        rows, attention = layer.layer_norm1(hidden), layer.self_attn
        query, key, value = (
            projection(rows).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        logits = query @ key.mT * attention.scale
        hide = ~(causal & alive[:, None, :])[:, None]
        weights = logits.masked_fill(hide, -1e30).softmax(dim=-1)
        hidden = hidden + attention.out_proj((weights @ value).transpose(1, 2).flatten(2))
        scores = token_importance(weights, None, alive, protected)
        alive = keep_above(scores, threshold, alive, protected, 2)
        counts.append(int(alive.sum()))
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    return tower.final_layer_norm(hidden)[torch.arange(len(ids)), ends], counts


def test_dropping_words_equals_masking_them_at_full_length() -> None:
    model, batch = CLIP.build(0), CLIP.batch(6, 0)
    with torch.no_grad():
        feature, counts = masked_reference(model, batch, 0.8)
    handle = attach(model)
    handle.thresholds = {Stream.TEXT: 0.8}
    torch.testing.assert_close(text_output(model, batch).pooler_output, feature, rtol=0, atol=1e-5)
    _, tokens = counted(handle, CLIP, batch)
    assert [round(6 * tokens[f"text.{i}"]) for i in range(2)] == counts


def test_a_later_word_changes_no_clip_state_before_it() -> None:
    model, batch = CLIP.build(0), CLIP.batch(4, 0)
    attach(model).stock_when_idle = False
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, 4] = 7
    before, after = (text_output(model, one).last_hidden_state for one in (batch, changed))
    assert torch.equal(before[:, :4], after[:, :4])


def test_the_end_token_counts_fully_in_parameter_scores() -> None:
    model, batch = CLIP.build(0), CLIP.batch(4, 0)
    handle = attach(model)
    site = handle.structure.encoders["text"][-1].feed_forward
    seen: list[Tensor] = []
    site.inputs[0].linear.register_forward_hook(lambda *call: seen.append(call[2]))
    with handle.collecting() as statistics:
        text_output(model, batch)
    ends = batch["attention_mask"].sum(dim=1).cumsum(dim=0) - 1  # the rows of all texts in a row
    pooled = site.activation(seen[0])[ends].square().sum(dim=0)
    assert bool((statistics.sums[site.name] >= pooled * (1 - 1e-5)).all())


def test_the_last_siglip_token_survives_any_threshold_and_is_pooled() -> None:
    model, batch = SIGLIP.build(0), SIGLIP.batch(4, 0)
    handle = attach(model, merge="drop", min_tokens={Stream.VISION: 1, Stream.TEXT: 1})
    handle.thresholds = {Stream.TEXT: float("inf")}
    output = text_output(model, batch)
    assert output.last_hidden_state.shape[1] == 2  # one word, and the last token behind it
    with torch.no_grad():
        pooled = model.text_model.head(output.last_hidden_state[:, 1])
    assert torch.equal(output.pooler_output, pooled)


def test_siglip_merges_words_beside_a_mask() -> None:
    model, batch = SIGLIP.build(0), CLIP.batch(4, 0)
    handle = attach(model, merge="summary")
    handle.thresholds = {Stream.TEXT: 0.8}
    feature = text_output(model, batch).pooler_output
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 9)
    batch["input_ids"][:, -1] = CLIP.batch(4, 0)["input_ids"][:, -1]  # pooled, padding or not
    torch.testing.assert_close(text_output(model, batch).pooler_output, feature, rtol=0, atol=1e-6)


def test_siglips_pooling_head_sees_no_padded_row() -> None:
    model, batch = SIGLIP.build(0), SIGLIP.batch(4, 0)
    attach(model, merge="drop").thresholds = {Stream.VISION: 0.5}
    with torch.no_grad():
        together = model.vision_model(batch["pixel_values"])
        alone = [model.vision_model(image) for image in batch["pixel_values"].split(1)]
    assert len({one.last_hidden_state.shape[1] for one in alone}) > 1
    pooled = torch.cat([one.pooler_output for one in alone])
    torch.testing.assert_close(together.pooler_output, pooled, rtol=0, atol=1e-5)


def test_vit_l_14_at_336_costs_197_608_gmacs_and_its_projections() -> None:
    """The published 197.61 has the projections; the encoders alone are 197.608."""
    with torch.device("meta"):
        model = CLIPModel(VIT_L_14_336).eval()
        image, text = torch.empty(1, 3, 336, 336), torch.empty(1, 77, dtype=torch.long)
    structure = attach(model).structure
    closed = cost.patch_macs(576, 14, 1024)
    for blocks, tokens in ((structure.encoders["vision"], 577), (structure.encoders["text"], 77)):
        for block in blocks:
            out = block.attention.out.linear
            width = out.out_features
            closed += cost.self_attention_macs(tokens, tokens, width, out.in_features)
            closed += cost.feed_forward_macs(tokens, width, block.feed_forward.num_units)
    detach(model)
    counted = flops_of(lambda: (model.get_image_features(image), model.get_text_features(text)))
    assert counted == 2 * (closed + 1024 * 768 + 768 * 768)
    assert closed == 197_608_359_936


@BOTH
def test_detaching_restores_the_stock_model(family: TinyFamily) -> None:
    model, batch = family.build(0), family.batch(4, 0)
    stock = outputs(family, model, batch)
    handle = attach(model)
    handle.thresholds = dict(DROPPING)
    outputs(family, model, batch)
    detach(model)
    assert torch.equal(outputs(family, model, batch), stock)
    assert not [m for m in model.modules() if {"pruning", "forward"} & set(m.__dict__)]
