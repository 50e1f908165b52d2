"""Training the dense models that ship with the package: the recipes behind ``comp/zoo``.

The NLVR2 model starts from the VQA model's vision tower and text encoder, its cross-attention
duplicated for the two images, as BLIP does with its one-stream checkpoints.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BlipConfig, BlipForQuestionAnswering, PreTrainedTokenizerFast

from comp.checkpoint import load_pruned, save_pruned
from comp.config import PruningConfig, nearest
from comp.evaluation import evaluate, resolve_device
from comp.finetune import train_step
from comp.models import attach, detach
from comp.models.blip_nlvr import BlipForNLVR
from comp.tasks import build_task, build_tokenizer
from comp.tasks.base import Task


@dataclass(frozen=True)
class Recipe:
    """How a dense model is trained.

    Attributes:
        task: Task name.
        steps: Optimizer steps.
        batch_size: Samples per step.
        learning_rate: Peak of the schedule: linear warm-up, then cosine to zero.
        warmup: Warm-up steps.
        weight_decay: AdamW weight decay.
        init: Preset whose weights to start from, if any.
        seed: Seed of weights, data order and dropout.
        width: Hidden width of both towers.
        heads: Attention heads of both towers.
        vision_layers: Layers of the vision tower.
        text_layers: Layers of the text encoder (and decoder).
        image_size: Image side in pixels.
        patch_size: Patch side in pixels.
    """

    task: str
    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.05
    init: str | None = None
    seed: int = 0
    width: int = 96
    heads: int = 8
    vision_layers: int = 4
    text_layers: int = 3
    image_size: int = 64
    patch_size: int = 8


RECIPES: dict[str, Recipe] = {
    "blip-tiny-vqa": Recipe(task="vqa", steps=4000),
    "blip-tiny-nlvr2": Recipe(
        task="nlvr2", steps=4000, batch_size=48, init="blip-tiny-vqa", learning_rate=7e-4
    ),
}


def recipe_of(name: str) -> Recipe:
    """Returns a recipe by the name of its model preset.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in RECIPES:
        raise ValueError(
            f"recipe must be one of {', '.join(RECIPES)}, but got {name!r}"
            + nearest(name, list(RECIPES))
        )
    return RECIPES[name]


def blip_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> BlipConfig:
    """Returns the model config of a recipe."""
    shared = {
        "hidden_size": recipe.width,
        "intermediate_size": 4 * recipe.width,
        "num_attention_heads": recipe.heads,
    }
    return BlipConfig(
        text_config={
            **shared,
            "encoder_hidden_size": recipe.width,
            "num_hidden_layers": recipe.text_layers,
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
            "num_hidden_layers": recipe.vision_layers,
            "image_size": recipe.image_size,
            "patch_size": recipe.patch_size,
        },
        projection_dim=64,
        image_text_hidden_size=64,
    )


def build_dense(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, init: Path | None) -> Any:
    """Builds a recipe's model, with fresh weights or from another preset's directory."""
    torch.manual_seed(recipe.seed)
    config = blip_config(recipe, tokenizer)
    if recipe.task == "vqa":
        return BlipForQuestionAnswering(config)
    model = BlipForNLVR(config)
    if init is not None:
        duplicate_cross_attention_(model, load_pruned(init))
    return model


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
    with torch.no_grad():
        encoder: Any = model.text_encoder.encoder
        for layer in encoder.layer:
            merge = layer.crossattention.merge_layer
            if merge is not None:
                width = merge.out_features
                merge.weight.copy_(torch.eye(width).repeat(1, 2) / 2)
                merge.bias.zero_()
    return model


def schedule(step: int, recipe: Recipe) -> float:
    """Learning rate at a step: linear warm-up, then cosine to zero."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def train_dense(
    recipe: Recipe,
    directory: Path,
    *,
    init: Path | None = None,
    device: str = "auto",
    mixed: bool = True,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Trains a dense model and saves it with tokenizer and card.

    Args:
        recipe: What to train.
        directory: Where the model goes.
        init: Directory of the model that ``recipe.init`` names.
        device: ``auto``, ``cpu``, ``cuda``, ...
        mixed: Run in bfloat16 autocast.
        on_step: Called with step and loss.

    Returns:
        The card: recipe, accuracies, steps, seconds, versions.

    Raises:
        ValueError: If ``recipe.init`` is set and ``init`` is not, or the loss is not finite.
    """
    if recipe.init is not None and init is None:
        raise ValueError(f"this recipe starts from {recipe.init}; pass its directory as init")
    begin = time.perf_counter()
    target = resolve_device(device)
    tokenizer = build_tokenizer()
    task = build_task(recipe.task, tokenizer=tokenizer, image_size=recipe.image_size)
    model: Any = build_dense(recipe, tokenizer, init).to(target)
    attach(model).stock_when_idle = False
    _fit(model, task, recipe, mixed=mixed, on_step=on_step)
    card = {
        "task": recipe.task,
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": {
            split: round(evaluate(model, task, split, device=target)[0].metric, 2)
            for split in ("val", "test")
        },
        "seconds": round(time.perf_counter() - begin),
        "torch": torch.__version__,
        "license": "weights CC BY-SA 4.0: trained on OpenMoji drawings (openmoji.org)",
    }
    detach(model)
    save_pruned(model, directory, tokenizer=tokenizer, card=card, dtype=torch.float16)
    return card


def _fit(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    *,
    mixed: bool,
    on_step: Callable[[int, float], None] | None,
) -> None:
    config = PruningConfig(autocast=mixed, weight_decay=recipe.weight_decay)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    batches = task.train_batches(batch_size=recipe.batch_size, seed=recipe.seed)
    model.train()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, recipe)
        loss = train_step(model, task, next(batches), optimizer, config)
        if not math.isfinite(loss):
            raise ValueError(f"the loss became {loss} at step {step}; lower learning_rate")
        if on_step is not None:
            on_step(step, loss)
