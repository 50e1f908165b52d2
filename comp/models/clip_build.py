"""Building a small dense CLIP from the same sizes as ``comp.models.blip_build``."""

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from comp.models.blip_build import BlipShape, load_start


def clip_config(shape: BlipShape, tokenizer: PreTrainedTokenizerFast) -> CLIPConfig:
    """Returns the stock config of a shape; texts end with the tokenizer's ``[SEP]``."""
    shared = {
        "hidden_size": shape.width,
        "intermediate_size": 4 * shape.width,
        "num_attention_heads": shape.heads,
    }
    return CLIPConfig(
        text_config={
            **shared,
            "num_hidden_layers": shape.text_layers,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 64,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.sep_token_id,
        },
        vision_config={
            **shared,
            "hidden_act": "gelu",  # as BLIP's, whose tower it may start from
            "num_hidden_layers": shape.vision_layers,
            "image_size": shape.image_size,
            "patch_size": shape.patch_size,
        },
        projection_dim=64,
    )


def build_clip(
    shape: BlipShape,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int = 0,
    init: Path | None = None,
) -> CLIPModel:
    """Builds a dense CLIP with fresh weights.

    Args:
        shape: Its sizes.
        tokenizer: Gives vocabulary and special tokens.
        seed: Seed of the weights.
        init: A saved BLIP of the same sizes and vocabulary whose image tower it starts from.

    Raises:
        ValueError: If there is no such BLIP.
    """
    torch.manual_seed(seed)
    model = CLIPModel(clip_config(shape, tokenizer))
    return model if init is None else start_from_blip_(model, load_start(init, shape))


@torch.no_grad()
def start_from_blip_(model: CLIPModel, source: Any) -> CLIPModel:
    """Copies a BLIP's image tower and word embeddings into a CLIP of the same widths, in place.

    BLIP has no norm in front of its layers and CLIP has one, so that gets the scale of BLIP's
    embeddings, which is measured on patches of one colour each. A bias of the patches, which CLIP
    lacks, goes into their positions.

    Args:
        model: Takes the tower.
        source: A BLIP model with ``vision_model`` and ``text_encoder``.

    Returns:
        ``model``.
    """
    tower: Any = model.vision_model
    ours, theirs = tower.embeddings, source.vision_model.embeddings
    ours.class_embedding.copy_(theirs.class_embedding.flatten())
    ours.patch_embedding.weight.copy_(theirs.patch_embedding.weight)
    ours.position_embedding.weight.copy_(theirs.position_embedding[0])
    ours.position_embedding.weight[1:] += theirs.patch_embedding.bias
    state = {}
    for name, tensor in source.vision_model.state_dict().items():
        if name.startswith("embeddings."):
            continue
        head, found, kind = name.partition(".qkv.")
        if found:
            for part, values in zip("qkv", tensor.chunk(3), strict=True):
                state[f"{head}.{part}_proj.{kind}"] = values
        else:
            state[name.replace(".projection.", ".out_proj.")] = tensor
    missing, unexpected = tower.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith(("embeddings.", "pre_layrnorm.")) for name in missing)
    side = theirs.image_size // theirs.patch_size
    colours = torch.randn(8, 3, side, side).repeat_interleave(theirs.patch_size, -1)
    embedded = theirs(colours.repeat_interleave(theirs.patch_size, -2))
    tower.pre_layrnorm.weight.fill_(float(embedded[:, 1:].std(-1).mean()))
    words: Any = source.text_encoder.embeddings.word_embeddings
    text: Any = model.text_model
    text.embeddings.token_embedding.weight.copy_(words.weight)
    return model
