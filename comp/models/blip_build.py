"""Building small dense BLIP models: the shapes that the recipes of ``comp.train`` name."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    PreTrainedTokenizerFast,
)

from comp.checkpoint import load_pruned
from comp.models.blip_nlvr import BlipForNLVR


@dataclass(frozen=True)
class BlipShape:
    """Sizes of a small BLIP.

    Attributes:
        width: Hidden width of both towers.
        heads: Attention heads of both towers.
        vision_layers: Layers of the vision tower.
        text_layers: Layers of the text encoder (and decoder).
        image_size: Image side in pixels.
        patch_size: Patch side in pixels.
    """

    width: int = 96
    heads: int = 8
    vision_layers: int = 4
    text_layers: int = 3
    image_size: int = 64
    patch_size: int = 8


def blip_config(shape: BlipShape, tokenizer: PreTrainedTokenizerFast) -> BlipConfig:
    """Returns the stock config of a shape."""
    # The stock vision config asks for a standard deviation of 1e-10, which no one can train.
    shared = {
        "initializer_range": 0.5 * shape.width**-0.5,
        "hidden_size": shape.width,
        "intermediate_size": 4 * shape.width,
        "num_attention_heads": shape.heads,
    }
    return BlipConfig(
        text_config={
            **shared,
            "encoder_hidden_size": shape.width,
            "num_hidden_layers": shape.text_layers,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 64,
            "projection_dim": 64,
            "label_smoothing": 0.0,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            "sep_token_id": tokenizer.sep_token_id,
        },
        vision_config={
            **shared,
            "num_hidden_layers": shape.vision_layers,
            "image_size": shape.image_size,
            "patch_size": shape.patch_size,
        },
        projection_dim=64,
        image_text_hidden_size=64,
        initializer_range=0.5 * shape.width**-0.5,
    )


def build_blip(
    task: str,
    shape: BlipShape,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int = 0,
    init: Path | None = None,
) -> nn.Module:
    """Builds a dense model for a task.

    Args:
        task: ``"vqa"``, ``"nlvr2"``, ``"captioning"`` or ``"retrieval"``.
        shape: Its sizes.
        tokenizer: Gives vocabulary and special tokens.
        seed: Seed of fresh weights.
        init: For NLVR2, a saved one-stream BLIP of the same widths to start from.

    Raises:
        ValueError: If no BLIP class serves the task, or nothing can start from ``init``.
    """
    torch.manual_seed(seed)
    config = blip_config(shape, tokenizer)
    if task == "vqa":
        return BlipForQuestionAnswering(config)
    if task == "captioning":
        text: Any = config.text_config
        text.label_smoothing = 0.1
        return BlipForConditionalGeneration(config)
    if task == "retrieval":
        return BlipForImageTextRetrieval(config)
    if task != "nlvr2":
        raise ValueError(
            f"task must be vqa, nlvr2, captioning or retrieval for a small BLIP, but got {task!r}"
        )
    model = BlipForNLVR(config)
    return model if init is None else duplicate_cross_attention_(model, load_start(init, shape))


def load_start(init: Path, shape: BlipShape) -> Any:
    """Loads the BLIP whose towers a small model starts from.

    Args:
        init: Its directory.
        shape: Sizes of the small model.

    Raises:
        ValueError: If it is no BLIP with one image and a text encoder, or has other sizes.
    """
    source: Any = load_pruned(init)
    if isinstance(source, BlipForNLVR) or not hasattr(source, "text_encoder"):
        raise ValueError(
            f"a model can start from a BLIP for vqa or retrieval, but {init} holds "
            f"{type(source).__name__}; name another directory"
        )
    vision, text = source.config.vision_config, source.config.text_config
    sizes = BlipShape(
        width=vision.hidden_size,
        heads=vision.num_attention_heads,
        vision_layers=vision.num_hidden_layers,
        text_layers=text.num_hidden_layers,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
    )
    wrong = [
        f"{name} {value} instead of {getattr(shape, name)}"
        for name, value in asdict(sizes).items()
        if value != getattr(shape, name)
    ]
    if wrong:
        raise ValueError(
            f"a model can start from one of its own sizes, but {init} has {', '.join(wrong)}; "
            "name another directory"
        )
    return source


def duplicate_cross_attention_(model: BlipForNLVR, source: Any) -> BlipForNLVR:
    """Copies a one-stream BLIP into an NLVR model, in place.

    Args:
        model: Takes the vision tower, the text encoder, and the cross-attention twice.
        source: A BLIP model with ``vision_model`` and ``text_encoder`` of the same widths.

    Returns:
        ``model``. Its merge layers start as the mean of the two images.
    """
    model.vision_model.load_state_dict(source.vision_model.state_dict())
    state = {}
    for name, tensor in source.text_encoder.state_dict().items():
        if ".crossattention." not in name:
            state[name] = tensor
            continue
        for twin in ("0", "1"):
            renamed = name.replace(".crossattention.self.", f".crossattention.self{twin}.")
            renamed = renamed.replace(
                ".crossattention.output.dense.", f".crossattention.dense{twin}."
            ).replace(".crossattention.output.", ".crossattention.")
            state[renamed] = tensor
    own = model.text_encoder.state_dict()
    merges = {name for name in own if ".merge_layer." in name}
    assert set(own) == set(state) | merges
    model.text_encoder.load_state_dict(state, strict=False)
    merge_as_mean_(model)
    return model


def merge_as_mean_(model: BlipForNLVR) -> None:
    """Lets the merge layers of a model give the mean of the two images, in place."""
    encoder: Any = model.text_encoder.encoder
    with torch.no_grad():
        for layer in encoder.layer:
            merge = layer.crossattention.merge_layer
            if merge is not None:
                width = merge.out_features
                merge.weight.copy_(torch.eye(width).repeat(1, 2) / 2)
                merge.bias.zero_()
