"""``comp models`` and ``train``: dense models that ship, are converted or are trained here."""

from pathlib import Path
from typing import Any

import click

from studies.cli_base import answer, common, device_option, example, mistakes, say


@click.group(
    invoke_without_command=True,
    epilog=example(
        "comp models", "comp models convert blip-nlvr model_base_nlvr.pth --out blip-nlvr"
    ),
)
@common
@click.pass_context
def models(context: click.Context, as_json: bool) -> None:
    """List the models that ship with their weights, or convert others."""
    if context.invoked_subcommand is None:
        _list_models(as_json)


def _list_models(as_json: bool) -> None:
    import json

    from comp.models.presets import MODEL_PRESETS, preset_directory

    found: dict[str, dict[str, Any]] = {}
    for name, preset in MODEL_PRESETS.items():
        card = preset_directory(name) / "card.json"
        known = json.loads(card.read_text(encoding="utf-8")) if card.is_file() else {}
        found[name] = {"task": preset.task, "description": preset.description, "card": known}
    width = max(map(len, found))
    lines = [
        f"{name:{width}} {entry['description']}; {_accuracy_text(entry['card'])}"
        for name, entry in found.items()
    ]
    answer(as_json, {"models": found}, "\n".join(lines))


def _accuracy_text(card: dict[str, Any]) -> str:
    if "accuracy" not in card:
        return "no card"
    measured = ", ".join(f"{split} {value:.2f}" for split, value in card["accuracy"].items())
    return f"{card['parameters'] / 1e6:.2f} M parameters, {measured}"


@models.command(
    epilog=example(
        "comp models convert blip-nlvr model_base_nlvr.pth --out blip-nlvr",
        "comp models convert blip-nlvr model_base.pth --image-size 384 --out blip-start",
    )
)
@click.argument(
    "kind", type=click.Choice(["blip-nlvr", "blip-vqa", "blip-caption", "blip-retrieval"])
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The directory to make."
)
@click.option(
    "--image-size",
    type=click.IntRange(min=1),
    help="Pixels; position embeddings are interpolated. Those of the checkpoint by default.",
)
@click.option(
    "--tokenizer",
    default="google-bert/bert-base-uncased",
    show_default=True,
    help="BERT's vocabulary: a vocab.txt, a directory with one, or a hub id.",
)
@common
def convert(
    kind: str, file: Path, out: Path, image_size: int | None, tokenizer: str, as_json: bool
) -> None:
    """Turn a .pth of the BLIP authors into a directory that every command takes."""
    import dataclasses

    from comp.models.blip_pth import convert_blip

    with mistakes():
        done = convert_blip(kind, file, out, image_size=image_size, tokenizer=tokenizer)
    answer(as_json, {**dataclasses.asdict(done), "directory": str(out)}, str(done))


@click.command(epilog=example("comp train blip-tiny-vqa --output models/my-vqa"))
@click.argument("recipe")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the model goes; models/RECIPE by default.",
)
@click.option("--steps", type=click.IntRange(min=1), help="Override the recipe's steps.")
@click.option("--seed", type=click.IntRange(min=0), help="Override the recipe's seed.")
@click.option("--init", help="The model that the recipe starts from, if not the one it names.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; all by default.")
@device_option
@common
def train(
    recipe: str,
    output: Path | None,
    steps: int | None,
    seed: int | None,
    init: str | None,
    threads: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Train one of the dense models again, by its recipe."""
    import dataclasses

    import torch

    from comp.evaluation import resolve_device
    from comp.models.presets import MODEL_PRESETS, preset_directory
    from comp.train import recipe_of, train_dense

    with mistakes():
        plan = recipe_of(recipe)
        resolve_device(device)
        start = init or plan.init
        source = preset_directory(start) if start in MODEL_PRESETS else Path(start or ".")
        if start and not (source / "config.json").is_file():
            raise ValueError(f"there is no model to start from at {source}; train {start} first")
    plan = dataclasses.replace(
        plan,
        steps=plan.steps if steps is None else steps,
        seed=plan.seed if seed is None else seed,
    )
    if threads:
        torch.set_num_threads(threads)
    target = output or Path("models") / recipe

    def on_step(step: int, loss: float) -> None:
        if step % 100 == 0 or step == plan.total_steps - 1:
            say(f"step {step + 1}/{plan.total_steps}, loss {loss:.4f}")

    card = train_dense(
        plan, target, init=source if start else None, device=device, on_step=on_step
    )
    answer(as_json, {"model": str(target), **card}, f"{target}: {_accuracy_text(card)}")
