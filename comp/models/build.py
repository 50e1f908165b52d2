"""Small dense models with fresh weights, by the name of their family."""

from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerFast

from comp.models.blip_build import BlipShape, build_blip
from comp.models.clip_build import build_clip


def build_small(
    family: str,
    task: str,
    shape: BlipShape,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int = 0,
    init: Path | None = None,
) -> nn.Module:
    """Builds a dense model with fresh weights.

    Args:
        family: ``"blip"`` or ``"clip"``.
        task: What it is for; decides BLIP's class.
        shape: Its sizes.
        tokenizer: Gives vocabulary and special tokens.
        seed: Seed of the weights.
        init: Directory of a BLIP to start from, for NLVR2 and CLIP.

    Raises:
        ValueError: If no class of the family serves the task, or nothing can start from ``init``.
    """
    if family == "clip":
        return build_clip(shape, tokenizer, seed=seed, init=init)
    return build_blip(task, shape, tokenizer, seed=seed, init=init)
