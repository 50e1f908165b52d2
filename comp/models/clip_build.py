"""Building a small dense CLIP from the same sizes as ``comp.models.blip_build``."""

import torch
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from comp.models.blip_build import BlipShape


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
            "num_hidden_layers": shape.vision_layers,
            "image_size": shape.image_size,
            "patch_size": shape.patch_size,
        },
        projection_dim=64,
    )


def build_clip(
    shape: BlipShape, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0
) -> CLIPModel:
    """Builds a dense CLIP with fresh weights.

    Args:
        shape: Its sizes.
        tokenizer: Gives vocabulary and special tokens.
        seed: Seed of the weights.
    """
    torch.manual_seed(seed)
    return CLIPModel(clip_config(shape, tokenizer))
