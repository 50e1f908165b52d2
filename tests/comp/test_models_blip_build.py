"""Small dense BLIPs: their shape, their initial weights, and NLVR2 from a one-stream model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from comp.checkpoint import save_pruned
from comp.models.blip_build import (
    BlipShape,
    blip_config,
    build_blip,
    duplicate_cross_attention_,
)
from comp.models.blip_nlvr import BlipForNLVR
from comp.models.build import build_small
from comp.models.presets import preset_directory
from tests.tiny import FAMILIES
from tests.tiny import blip_config as tiny_config

SHAPE = BlipShape(width=32, heads=4, vision_layers=2, text_layers=2, image_size=32, patch_size=8)


def test_the_shape_is_built(tokenizer: Any) -> None:
    config: Any = blip_config(SHAPE, tokenizer)
    assert config.text_config.vocab_size == len(tokenizer)
    assert config.text_config.encoder_hidden_size == config.vision_config.hidden_size == 32
    assert config.vision_config.image_size == 32


def test_the_same_seed_builds_the_same_weights(tokenizer: Any) -> None:
    models = [build_blip("vqa", SHAPE, tokenizer, seed=seed) for seed in (1, 1, 2)]
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    name = "vision_model.encoder.layers.0.self_attn.qkv.weight"
    assert not torch.equal(states[0][name], states[2][name])
    assert float(states[0][name].std()) > 0.01


def test_an_unknown_task_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"task must be vqa, .* retrieval .*'caption'"):
        build_blip("caption", SHAPE, tokenizer)


def test_nlvr_starts_from_a_saved_one_stream_model(tokenizer: Any, tmp_path: Path) -> None:
    source: Any = build_blip("vqa", SHAPE, tokenizer, seed=3)
    save_pruned(source, tmp_path)
    model: Any = build_blip("nlvr2", SHAPE, tokenizer, init=tmp_path)
    ours, theirs = model.vision_model.state_dict(), source.vision_model.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_with_one_image_twice_the_duplicate_is_the_source() -> None:
    """Averaging two equal attentions, and merging with halves, is the one-stream layer."""
    source: Any = FAMILIES["blip-retrieval"].build(0)
    model: Any = duplicate_cross_attention_(BlipForNLVR(tiny_config()), source).eval()
    batch = FAMILIES["blip-retrieval"].batch(2, 0)
    text = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        image = source.vision_model(batch["pixel_values"]).last_hidden_state
        one = source.text_encoder(**text, encoder_hidden_states=image).last_hidden_state
        two = model.text_encoder(**text, encoder_hidden_states=(image, image)).last_hidden_state
    assert (one - two).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["blip", "clip"])
@pytest.mark.parametrize(
    ("start", "why"),
    [
        ("blip-tiny-nlvr2", "holds BlipForNLVR; name another directory"),
        ("blip-small-vqa", "has heads 12 instead of 8, vision_layers 6 instead of 4"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(
    tokenizer: Any, family: str, start: str, why: str
) -> None:
    task = {"blip": "nlvr2", "clip": "retrieval"}[family]
    with pytest.raises(ValueError, match=why):
        build_small(family, task, BlipShape(), tokenizer, init=preset_directory(start))
