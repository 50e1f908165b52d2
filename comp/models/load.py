"""Loading models and attaching to them. ``ADAPTERS`` is the table of families."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from comp.data.images import ImageTransform, transform_of
from comp.errors import UnsupportedModelError
from comp.handle import PruningHandle
from comp.methods import Method
from comp.models.base import Adapter, LoadedModel, attach_with
from comp.models.bert_tokenizer import with_blip_tokens
from comp.models.blip import BlipAdapter
from comp.models.clip import ClipAdapter
from comp.models.dense import Dtype
from comp.models.hub import find_repository, is_repository
from comp.models.llava import LlavaAdapter
from comp.models.presets import MODEL_PRESETS, preset_directory
from comp.models.siglip import SiglipAdapter
from comp.modes import Stream
from comp.words import nearest

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.txt", "tokenizer.model")
_KEPT = ("size", "do_center_crop", "crop_size", "image_mean", "image_std")

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


def load_model(
    source: str | Path,
    *,
    shared: bool = False,
    trust_remote_code: bool = False,
    dtype: Dtype = torch.float32,
) -> LoadedModel:
    """Loads a model with its tokenizer and the way its images are made.

    Args:
        source: A preset name, a directory written by ``save_pretrained``, dense or pruned, or a
            repository of the Hugging Face hub, which is looked up on this disk first.
        shared: Share the weights with other processes, see ``load_pruned``.
        trust_remote_code: Run the tokenizer's code out of the model's own directory, if it brings
            some. A model's own code is never run: only known classes can be pruned.
        dtype: Of the weights, see ``load_pruned``.

    Raises:
        ValueError: If the source is none of these.
        UnsupportedModelError: If the directory holds a model of another class, or a tokenizer that
            is a program of its own and ``trust_remote_code`` is off.
    """
    directory = find_directory(str(source))
    from comp.checkpoint import load_pruned

    model: Any = load_pruned(directory, shared=shared, dtype=dtype)
    card = _read_json(directory / "card.json")
    adapter = adapter_of(model)
    tokenizer = None
    if any((directory / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = _load_tokenizer(directory, model, trust_remote_code)
    name = str(source)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=directory.name if Path(source).is_dir() else name,
        family=adapter.name,
        task=str(card.get("task") or adapter.tasks.get(type(model).__name__, "")),
        transform=_load_transform(directory, model),
        card=card,
    )


def find_directory(source: str) -> Path:
    """Returns the directory of a preset, of a path, or of a repository of the hub.

    Raises:
        ValueError: If the source is none of these, or a directory without a model.
    """
    if source in MODEL_PRESETS:
        return preset_directory(source)
    if (Path(source) / "config.json").is_file():
        return Path(source)
    if is_repository(source):
        return find_repository(source)
    raise ValueError(
        f"{source!r} is neither a model preset ({', '.join(MODEL_PRESETS)}) nor a directory with "
        f"a config.json nor a repository of the hub{nearest(source, list(MODEL_PRESETS))}"
    )


def _load_transform(directory: Path, model: Any) -> ImageTransform:
    """Reads how images are made, and notes it in the config, which goes with a pruned model."""
    config = model.config
    size = int(getattr(getattr(config, "vision_config", config), "image_size", 0) or 0)
    processor = getattr(config, "image_processor", None)
    if processor is None:
        processor = _read_json(directory / "preprocessor_config.json")
        whole = _read_json(directory / "processor_config.json")
        processor = processor or whole.get("image_processor", {})
        if processor:
            config.image_processor = {key: processor[key] for key in _KEPT if key in processor}
    return transform_of(processor, size)


def _load_tokenizer(directory: Path, model: Any, trust_remote_code: bool) -> Any:
    """Loads a tokenizer of a known class, or a trusted one that brings its own code."""
    from transformers import AutoTokenizer

    # With the config at hand transformers runs no code that config.json names.
    own = {"config": model.config} if _runs_own_code(directory, trust_remote_code) else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=bool(own), local_files_only=True, **own
        )
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the tokenizer in {directory} cannot be loaded ({reason})") from error
    return with_blip_tokens(tokenizer, model) if adapter_of(model).name == "blip" else tokenizer


def _runs_own_code(directory: Path, trust_remote_code: bool) -> bool:
    """Tells whether a tokenizer is a program of its own.

    Raises:
        UnsupportedModelError: If it is one and not trusted, or lies in another repository.
    """
    mapped = _read_json(directory / "tokenizer_config.json").get("auto_map")
    if mapped is None:
        return False
    if "--" in str(mapped):  # OWNER/NAME--module.Class
        raise UnsupportedModelError(
            f"the tokenizer in {directory} asks to run code of another repository (auto_map in "
            "tokenizer_config.json), which this program never does; copy that code into the "
            "directory"
        )
    if not trust_remote_code:
        raise UnsupportedModelError(
            f"the tokenizer in {directory} asks to run code out of that directory (auto_map in "
            "tokenizer_config.json); read that code and allow it with --trust-remote-code, or "
            "save it as a tokenizer of transformers"
        )
    return True


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    values: dict[str, Any] = json.loads(path.read_text())
    return values
