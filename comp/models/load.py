"""Loading models and attaching to them. ``ADAPTERS`` is the table of families."""

import json
from pathlib import Path
from typing import Any, Literal

from torch import nn

from comp.config import Method, nearest
from comp.errors import UnsupportedModelError
from comp.handle import PruningHandle
from comp.models.base import Adapter, LoadedModel, attach_with
from comp.models.blip import BlipAdapter
from comp.models.clip import ClipAdapter
from comp.models.llava import LlavaAdapter
from comp.models.presets import MODEL_PRESETS, preset_directory
from comp.models.siglip import SiglipAdapter
from comp.modes import Stream

ADAPTERS: tuple[Adapter, ...] = (BlipAdapter(), ClipAdapter(), SiglipAdapter(), LlavaAdapter())


def adapter_of(model: nn.Module) -> Adapter:
    """Returns the adapter of a model's family.

    Raises:
        UnsupportedModelError: If no family knows the model's class.
    """
    for adapter in ADAPTERS:
        if isinstance(model, tuple(adapter.classes.values())):
            return adapter
    raise UnsupportedModelError(
        f"{type(model).__name__} has no adapter; the classes known are "
        + ", ".join(sorted(model_classes()))
    )


def model_classes() -> dict[str, type[nn.Module]]:
    """All model classes that some family serves, by name."""
    return {name: cls for adapter in ADAPTERS for name, cls in adapter.classes.items()}


def attach(
    model: nn.Module,
    *,
    switches: Method | None = None,
    mask_site: Literal["qkv", "context"] = "qkv",
    merge: Literal["auto", "summary", "drop"] = "auto",
    min_tokens: dict[Stream, int] | None = None,
) -> PruningHandle:
    """Puts masks, thresholds and collectors on one model instance; ``detach`` undoes it.

    Args:
        model: An instance of one of ``model_classes()``; changed in place.
        switches: Which corrections act; ``None`` leaves them.
        mask_site: See ``PruningConfig``.
        merge: See ``PruningConfig``.
        min_tokens: Unprotected tokens kept in every layer, by stream.

    Returns:
        The handle, also found at ``model.pruning``.

    Raises:
        UnsupportedModelError: If no family knows the model's class.
    """
    return attach_with(
        adapter_of(model),
        model,
        switches=switches,
        mask_site=mask_site,
        merge=merge,
        min_tokens=min_tokens,
    )


def load_model(source: str | Path) -> LoadedModel:
    """Loads a model with its tokenizer.

    Args:
        source: A preset name or a directory written by ``save_pretrained``, dense or pruned.

    Raises:
        ValueError: If the source is neither.
        UnsupportedModelError: If the directory holds a model of another class, or a tokenizer that
            is a program of its own: no code out of a model's directory is ever run.
    """
    directory = preset_directory(str(source)) if str(source) in MODEL_PRESETS else Path(source)
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"{str(source)!r} is neither a model preset ({', '.join(MODEL_PRESETS)}) nor a "
            f"directory with a config.json{nearest(str(source), list(MODEL_PRESETS))}"
        )
    from comp.checkpoint import load_pruned

    config = json.loads((directory / "config.json").read_text())
    model = load_pruned(directory)
    card = _read_json(directory / "card.json")
    has_tokenizer = (directory / "tokenizer_config.json").is_file()
    return LoadedModel(
        model=model,
        tokenizer=_load_tokenizer(directory) if has_tokenizer else None,
        name=str(source) if str(source) in MODEL_PRESETS else directory.name,
        family=adapter_of(model).name,
        task=str(card.get("task", "")),
        image_size=int(config.get("vision_config", {}).get("image_size", 0)),
        card=card,
    )


def _load_tokenizer(directory: Path) -> Any:
    """Loads a tokenizer of a known class; one that brings its own code is refused."""
    from transformers import AutoTokenizer

    if "auto_map" in _read_json(directory / "tokenizer_config.json"):
        raise UnsupportedModelError(
            f"the tokenizer in {directory} asks to run code out of that directory (auto_map in "
            "tokenizer_config.json), which this program does not do; save it as a tokenizer of "
            "transformers"
        )
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    values: dict[str, Any] = json.loads(path.read_text())
    return values
