"""Training the dense models that ship with the package: the recipes behind ``comp/zoo``.

The NLVR2 model starts from the VQA model's vision tower and text encoder, its cross-attention
duplicated for the two images, as BLIP does with its one-stream checkpoints.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from comp.align import align_
from comp.checkpoint import load_pruned, save_pruned
from comp.config import PruningConfig
from comp.data.openmoji import load_openmoji
from comp.evaluation import evaluate, resolve_device
from comp.finetune import train_step
from comp.handle import TEMPERATURE
from comp.models import attach, detach
from comp.models.blip_build import BlipShape
from comp.models.build import build_small
from comp.tasks import build_task, build_tokenizer
from comp.tasks.base import PreparingTask, Task
from comp.words import nearest

FIRST = 500  # test samples whose accuracy is on the card, too: enough to tell weights apart


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
        align_steps: Steps of ``comp.align`` on phrases about single images, before the task;
            NLVR2 only.
        tune_steps: Steps on the task alone afterwards, on new batches and with the learning rate
            of the beginning.
        seed: Seed of weights, data order and dropout.
        shape: Sizes of the model.
        family: Family of the model, see ``comp.models.build``.
    """

    task: str
    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.05
    init: str | None = None
    align_steps: int = 0
    tune_steps: int = 0
    seed: int = 0
    shape: BlipShape = field(default_factory=BlipShape)
    family: str = "blip"

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all parts."""
        return self.align_steps + self.steps + self.tune_steps


_ALIGNED_BATCH = 40  # images of a step that aligns, statements of a step that tunes

SMALL = BlipShape(heads=12, vision_layers=6, text_layers=4)
"""No head or channel of it holds more than half a percent of its FLOPs."""

_NLVR2 = Recipe(
    task="nlvr2",
    steps=5000,
    batch_size=24,
    learning_rate=7e-4,
    warmup=100,
    init="blip-tiny-vqa",
    align_steps=1500,
)

RECIPES: dict[str, Recipe] = {
    "blip-tiny-vqa": Recipe(task="vqa", steps=4000),
    "blip-tiny-nlvr2": _NLVR2,
    "blip-small-vqa": Recipe(task="vqa", steps=5000, shape=SMALL),
    "blip-small-nlvr2": replace(
        _NLVR2,
        init="blip-small-vqa",
        shape=SMALL,
        steps=4000,
        align_steps=700,
        tune_steps=3000,
    ),
    "blip-tiny-captioning": Recipe(task="captioning", steps=3000),
    "blip-tiny-retrieval": Recipe(task="retrieval", steps=3000),
    "clip-tiny-retrieval": Recipe(task="retrieval", steps=4000, batch_size=128, family="clip"),
    "clip-small-retrieval": Recipe(
        task="retrieval", steps=2000, init="blip-small-vqa", shape=SMALL, family="clip"
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
    mixed: bool = False,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Trains a dense model and saves it with tokenizer and card.

    Args:
        recipe: What to train.
        directory: Where the model goes.
        init: Directory of the model that ``recipe.init`` names.
        device: ``auto``, ``cpu``, ``cuda``, ...
        mixed: Run in bfloat16 autocast.
        on_step: Called with step, counted through all parts of the recipe, and loss.

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
    task = build_task(recipe.task, tokenizer=tokenizer, image_size=recipe.shape.image_size)
    model: Any = build_small(
        recipe.family, recipe.task, recipe.shape, tokenizer, seed=recipe.seed, init=init
    )
    model.to(target)
    attach(model).stock_when_idle = False
    if isinstance(task, PreparingTask):
        task.prepare_(model)
    if recipe.align_steps:
        _fit_aligned(model, task, recipe, tokenizer, on_step=on_step)
    else:
        _fit(model, task, recipe, mixed=mixed, on_step=on_step)
    _tune(model, task, recipe, mixed=mixed, on_step=on_step)
    if hasattr(model, TEMPERATURE):  # the stock class has no place for it but its config
        setattr(model.config, TEMPERATURE, float(getattr(model, TEMPERATURE)))
    detach(model)
    save_pruned(model, directory, tokenizer=tokenizer, dtype=torch.float16)
    card = {
        "task": recipe.task,
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": saved_accuracy(directory, task, target),
        "first": {
            "samples": FIRST,
            **saved_accuracy(directory, task, target, ["test"], num_samples=FIRST),
        },
        "seconds": round(time.perf_counter() - begin),
        "torch": torch.__version__,
        "license": "weights CC BY-SA 4.0: trained on OpenMoji drawings (openmoji.org)",
    }
    (directory / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    return card


def saved_accuracy(
    directory: Path,
    task: Task,
    device: torch.device,
    splits: Sequence[str] = ("val", "test"),
    *,
    num_samples: int | None = None,
) -> dict[str, float]:
    """Evaluates a model as it was saved, in half precision.

    Args:
        directory: Holds the model.
        task: The task.
        device: Where it runs.
        splits: Which splits.
        num_samples: The first so many samples of each, or all.

    Returns:
        Points of 100 by split.
    """
    model = load_pruned(directory).to(device)
    attach(model).stock_when_idle = False
    return {
        split: round(
            evaluate(model, task, split, device=device, num_samples=num_samples)[0].metric, 2
        )
        for split in splits
    }


def _fit_aligned(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    tokenizer: Any,
    *,
    on_step: Callable[[int, float], None] | None,
) -> None:
    """Trains on phrases about single images, then on statements about these and about pairs."""
    openmoji = load_openmoji(recipe.shape.image_size)
    phrases = Recipe(task=recipe.task, steps=recipe.align_steps, warmup=50)
    fit = partial(align_, model, openmoji.drawings, openmoji.pixels, tokenizer)
    fit(
        steps=phrases.steps,
        batch_size=phrases.batch_size,
        learning_rate=lambda step: schedule(step, phrases),
        templates=("{}",),
        seed=recipe.seed,
        on_step=on_step,
    )
    fit(
        steps=recipe.steps,
        batch_size=_ALIGNED_BATCH,
        learning_rate=lambda step: schedule(step, recipe),
        pairs=task.train_batches(batch_size=recipe.batch_size, seed=recipe.seed),
        seed=recipe.seed + 1,
        on_step=_after(recipe.align_steps, on_step),
    )


def _after(
    done: int, on_step: Callable[[int, float], None] | None
) -> Callable[[int, float], None] | None:
    """Lets a part of a recipe count on from the steps before it."""
    return on_step and (lambda step, loss: on_step(done + step, loss))


def _tune(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    *,
    mixed: bool,
    on_step: Callable[[int, float], None] | None,
) -> None:
    """Goes on with the task alone, if the recipe does, with as many samples a step as before."""
    size = _ALIGNED_BATCH if recipe.align_steps else recipe.batch_size
    alone = replace(recipe, steps=recipe.tune_steps, batch_size=size)
    before = recipe.align_steps + recipe.steps
    _fit(model, task, alone, mixed=mixed, start=recipe.steps, on_step=_after(before, on_step))


def _fit(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    *,
    mixed: bool,
    start: int = 0,
    on_step: Callable[[int, float], None] | None,
) -> None:
    config = PruningConfig(autocast=mixed, weight_decay=recipe.weight_decay)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    batches = task.train_batches(batch_size=recipe.batch_size, seed=recipe.seed, start=start)
    model.train()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, recipe)
        loss = train_step(model, task, batches, optimizer, config)
        if not math.isfinite(loss):
            raise ValueError(f"the loss became {loss} at step {step}; lower learning_rate")
        if on_step is not None:
            on_step(step, loss)
