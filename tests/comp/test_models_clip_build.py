"""Small dense CLIPs: an image tower that begins as a BLIP's."""

from pathlib import Path
from typing import Any

import torch

from comp.checkpoint import save_pruned
from comp.models.blip_build import BlipShape, build_blip
from comp.models.build import build_small

SHAPE = BlipShape(width=32, heads=4, vision_layers=2, text_layers=2, image_size=32, patch_size=8)


def test_from_equal_embeddings_a_copied_tower_gives_what_blips_gives(
    tokenizer: Any, tmp_path: Path
) -> None:
    source: Any = build_blip("vqa", SHAPE, tokenizer, seed=3)
    torch.nn.init.normal_(source.vision_model.embeddings.patch_embedding.bias)
    save_pruned(source, tmp_path)
    model: Any = build_small("clip", "retrieval", SHAPE, tokenizer, init=tmp_path)
    ours, theirs = model.vision_model.eval(), source.vision_model.eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embedded = theirs.embeddings(pixels)
        assert (ours.embeddings(pixels) - embedded).abs().max() <= 1e-5
        expected = theirs.encoder(embedded).last_hidden_state
        found = ours.encoder(embedded).last_hidden_state
    assert (found - expected).abs().max() <= 1e-5
    words = source.text_encoder.embeddings.word_embeddings.weight
    assert torch.equal(model.text_model.embeddings.token_embedding.weight, words)


def test_the_norm_before_the_layers_has_the_scale_of_the_embeddings(
    tokenizer: Any, tmp_path: Path
) -> None:
    source: Any = build_blip("vqa", SHAPE, tokenizer, seed=3)
    source.vision_model.embeddings.patch_embedding.weight.data *= 20
    save_pruned(source, tmp_path)
    model: Any = build_small("clip", "retrieval", SHAPE, tokenizer, init=tmp_path)
    embeddings = source.vision_model.embeddings
    colours = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    pixels = colours.repeat_interleave(8, -1).repeat_interleave(8, -2)
    with torch.no_grad():
        scale = float(embeddings(pixels)[:, 1:].std(-1).mean())
    weight = model.vision_model.pre_layrnorm.weight
    assert weight.unique().numel() == 1
    assert abs(float(weight[0].detach()) / scale - 1) < 0.2
