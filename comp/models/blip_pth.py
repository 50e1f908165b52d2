"""The BLIP authors' own checkpoints, ``{"model": state_dict}``, to directories of comp.

The text towers have the same names here and there. The vision tower is timm's and is renamed. A
checkpoint with one cross-attention a layer becomes one for NLVR2 with both copies of it, as
BLIP's own loader makes it. Sizes are read off the shapes; heads are 64 wide in all of BLIP's
models. The file is read as data: nothing in it is executed.

Source: https://github.com/salesforce/BLIP, ``models/blip*.py`` and ``models/vit.py``.
"""

import math
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
)

from comp.checkpoint import save_pruned
from comp.directories import complete_directory, refuse_existing
from comp.errors import CheckpointMismatch, UnsupportedModelError
from comp.handle import TEMPERATURE
from comp.models.bert_tokenizer import bert_tokenizer
from comp.models.blip_build import merge_as_mean_
from comp.models.blip_nlvr import BlipForNLVR

HEAD_DIM = 64
"""Width of a head in ViT-B, ViT-L and BERT, which shapes do not tell."""


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint.

    Attributes:
        model_class: What it becomes.
        task: The task it was trained for.
        first_token: What its texts begin with.
    """

    model_class: type[Any]
    task: str
    first_token: str


KINDS = {
    "blip-nlvr": Kind(BlipForNLVR, "nlvr2", "[ENC]"),
    "blip-vqa": Kind(BlipForQuestionAnswering, "vqa", "[ENC]"),
    "blip-caption": Kind(BlipForConditionalGeneration, "captioning", "[CLS]"),
    "blip-retrieval": Kind(BlipForImageTextRetrieval, "retrieval", "[CLS]"),
}

_VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "blocks.": "encoder.layers.",
    "norm.": "post_layernorm.",
}
_LAYER_NAMES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
}
# Whole parts of BLIP: one that the wanted model lacks is left out and named.
_PARTS = re.compile(
    r"(visual_encoder|text_encoder|text_decoder|vision_proj|text_proj|itm_head)(_m)?\.|"
    r"(image_queue|text_queue|idx_queue|ptr_queue|queue_ptr|temp)$"
)
_PRUNED = re.compile(r"\.alpha$|(^|\.)space_dict$")


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        directory: Where the model lies.
        parameters: How many numbers it has.
        image_size: Side of its images in pixels.
        new: Parameters that the checkpoint lacks, which have fresh values and need training.
        left_out: Parts of the checkpoint that the model has no use for.
    """

    directory: Path
    parameters: int
    image_size: int
    new: tuple[str, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        """One line, and one each for what is new and what was left out."""
        lines = [
            f"{self.directory}: {self.parameters / 1e6:.1f} M parameters, {self.image_size} px"
        ]
        if self.new:
            lines.append(
                f"new, to be trained: {_some(self.new)}; the checkpoint had one cross-attention "
                "a layer, which stands for both images now"
            )
        if self.left_out:
            lines.append(f"left out: {', '.join(self.left_out)}")
        return "\n".join(lines)


def convert_blip(
    kind: str,
    file: Path,
    out: Path,
    *,
    image_size: int | None = None,
    tokenizer: str | None = "google-bert/bert-base-uncased",
) -> Conversion:
    """Turns a checkpoint of BLIP's authors into a directory that ``load_model`` takes.

    Args:
        kind: One of ``KINDS``.
        file: The ``.pth`` file.
        out: The directory to make; it appears when it is complete.
        image_size: Side of the images in pixels; position embeddings are interpolated to it. What
            the checkpoint was made for by default.
        tokenizer: Where BERT's vocabulary is: a ``vocab.txt``, a directory with one, or a
            repository of the hub. ``None`` leaves the tokenizer away.

    Raises:
        ValueError: If the kind is unknown, or the file holds something else.
        UnsupportedModelError: If the checkpoint is pruned already.
        CheckpointMismatch: If keys are missing or unexpected; lists them.
        FileExistsError: If ``out`` exists.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, but got {kind!r}")
    refuse_existing(out)
    spec = KINDS[kind]
    state = read_state(file)
    _refuse_pruned(state, file.name)
    config = infer_config(state, file.name, image_size=image_size)
    text: Any = config.text_config
    words = None
    if tokenizer is not None:
        words = bert_tokenizer(
            tokenizer,
            first_token=spec.first_token,
            max_length=text.max_position_embeddings,
            vocab_size=text.vocab_size,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = spec.model_class(config)
    vision: Any = config.vision_config
    image = int(vision.image_size)
    mapped, left_out = rename(state, model, patches=(image // vision.patch_size) ** 2)
    new = _load(model, mapped, file.name)
    card: dict[str, Any] = {"task": spec.task, "source": f"{file.name} by the BLIP authors"}
    if "temp" in state:
        card["temperature"] = float(state["temp"])
        setattr(model.config, TEMPERATURE, card["temperature"])  # what attaching starts from
    with complete_directory(out) as part:
        save_pruned(model, part, tokenizer=words, card=card)
    parameters = sum(p.numel() for p in model.parameters())
    return Conversion(out, parameters, image, new, left_out)


def read_state(file: Path) -> dict[str, Tensor]:
    """Reads the state dict of a checkpoint, executing nothing.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, or one that asks to run code.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}; check the path")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{file.name} is no checkpoint that can be read without running code ({reason}); "
            "nothing in it was executed"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (
            str(error).strip().splitlines()[0].split(". ")[0] if str(error).strip() else "empty"
        )
        raise ValueError(
            f"{file.name} is no PyTorch checkpoint ({reason}); check that it is complete"
        ) from None
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        have = (
            ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        )
        raise ValueError(
            f"{file.name} must hold a state dict under 'model', as BLIP's checkpoints do, but "
            f"has {have:.80}"
        )
    return state


def infer_config(
    state: Mapping[str, Tensor], name: str, *, image_size: int | None = None
) -> BlipConfig:
    """Reads a model's sizes off the shapes of its state.

    Args:
        state: BLIP's state dict.
        name: Of the file, for messages.
        image_size: Side of the images; that of the state by default.

    Raises:
        CheckpointMismatch: If the tensors that tell the sizes are missing.
        ValueError: If a size is impossible.
    """
    text = "text_encoder" if _has(state, "text_encoder.") else "text_decoder.bert"
    needed = (
        "visual_encoder.patch_embed.proj.weight",
        "visual_encoder.pos_embed",
        "visual_encoder.blocks.0.mlp.fc1.weight",
        f"{text}.embeddings.word_embeddings.weight",
        f"{text}.embeddings.position_embeddings.weight",
        f"{text}.encoder.layer.0.intermediate.dense.weight",
    )
    missing = [key for key in needed if key not in state]
    if missing:
        raise CheckpointMismatch(
            f"{name} is no checkpoint of BLIP: it lacks {_some(missing)} and has "
            f"{_some(sorted(state))}"
        )
    patches, positions, fc1, words, places, dense = (state[key] for key in needed)
    width, patch = patches.shape[0], patches.shape[-1]
    own_size = math.isqrt(positions.shape[1] - 1) * patch
    if image_size is not None and (image_size < patch or image_size % patch):
        raise ValueError(
            f"image_size must be a multiple of the patch side {patch}, but got {image_size}"
        )
    projection = state.get("vision_proj.weight")
    projection_dim = HEAD_DIM if projection is None else projection.shape[0]
    return BlipConfig(
        text_config={
            "hidden_size": words.shape[1],
            "encoder_hidden_size": width,
            "intermediate_size": dense.shape[0],
            "num_hidden_layers": _layers(state, f"{text}.encoder.layer."),
            "num_attention_heads": _heads(words.shape[1], "text", name),
            "vocab_size": words.shape[0],
            "max_position_embeddings": places.shape[0],
            "projection_dim": projection_dim,
            "hidden_dropout_prob": 0.1,  # BLIP's med_config.json
            "attention_probs_dropout_prob": 0.1,
            "bos_token_id": words.shape[0] - 2,
            "eos_token_id": 102,
            "sep_token_id": 102,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": width,
            "intermediate_size": fc1.shape[0],
            "num_hidden_layers": _layers(state, "visual_encoder.blocks."),
            "num_attention_heads": _heads(width, "image", name),
            "image_size": image_size or own_size,
            "patch_size": patch,
            "layer_norm_eps": 1e-6,  # BLIP's vit.py; transformers has 1e-5
        },
        projection_dim=projection_dim,
        image_text_hidden_size=projection_dim,
    )


def rename(
    state: Mapping[str, Tensor], model: nn.Module, *, patches: int
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Gives a state the names of a model.

    Args:
        state: BLIP's state dict.
        model: Takes it.
        patches: Patches of the model's images.

    Returns:
        The renamed tensors, and the parts that the model lacks.
    """
    twins = isinstance(model, BlipForNLVR)
    own_parts = {name.split(".")[0] for name in model.state_dict()}
    mapped: dict[str, Tensor] = {}
    left_out: dict[str, None] = {}
    for key, tensor in state.items():
        part = key.split(".")[0]
        if key.endswith(".position_ids"):
            continue
        if part == "visual_encoder":
            mapped[_vision_name(key)] = tensor
        elif _PARTS.match(key) and part not in own_parts:
            left_out[part] = None
        else:
            for name in _twin_names(key) if twins else (key,):
                mapped[name] = tensor
    place = "vision_model.embeddings.position_embedding"
    if place in mapped:
        mapped[place] = interpolate_positions(mapped[place], patches)
    return mapped, tuple(left_out)


def interpolate_positions(positions: Tensor, patches: int) -> Tensor:
    """Resizes position embeddings to another square of patches, as BLIP's loader does.

    Args:
        positions: ``(1, 1 + N, D)``, the class token's first.
        patches: The new ``N``, a square number.

    Returns:
        ``(1, 1 + patches, D)``; the class token's is kept.
    """
    old, new = math.isqrt(positions.shape[1] - 1), math.isqrt(patches)
    if old == new:
        return positions
    grid = positions[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, D, H, W)
    resized = functional.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], resized.flatten(2).mT], dim=1)


def _vision_name(key: str) -> str:
    rest = key.removeprefix("visual_encoder.")
    for old, new in _VISION_NAMES.items():
        if rest.startswith(old):
            rest = new + rest.removeprefix(old)
            break
    match = re.fullmatch(r"(encoder\.layers\.\d+)\.(.+)\.(weight|bias)", rest)
    if match:
        layer, module, leaf = match.groups()
        rest = f"{layer}.{_LAYER_NAMES.get(module, module)}.{leaf}"
    return f"vision_model.{rest}"


def _twin_names(key: str) -> tuple[str, ...]:
    """Names for NLVR2: one of an own twin, two of a cross-attention that stands for both."""
    key = key.replace(".crossattention.output.", ".crossattention.")
    for single, pattern in (
        ("self", ".crossattention.self."),
        ("dense", ".crossattention.dense."),
    ):
        if pattern in key:
            return tuple(key.replace(pattern, f".crossattention.{single}{i}.") for i in (0, 1))
    return (key,)


def _load(model: Any, state: dict[str, Tensor], name: str) -> tuple[str, ...]:
    """Loads a renamed state strictly and returns what was new in a one-stream checkpoint."""
    own = model.state_dict(keep_vars=True)
    given = {id(own[key]) for key in state if key in own}  # a tied tensor needs one name only
    missing = [key for key, tensor in own.items() if id(tensor) not in given]
    unexpected = [key for key in state if key not in own]
    new: list[str] = []
    if isinstance(model, BlipForNLVR) and not _has(state, "cls_head."):
        new = [key for key in missing if key.startswith("cls_head.") or ".merge_layer." in key]
        missing = [key for key in missing if key not in new]
    if missing or unexpected:
        raise CheckpointMismatch(
            f"{name} does not make a {type(model).__name__}: {len(missing)} keys are missing "
            f"({_some(missing)}) and {len(unexpected)} unexpected ({_some(unexpected)}); is it of "
            "another kind?"
        )
    wrong = [
        f"{key} is {tuple(state[key].shape)} and not {tuple(own[key].shape)}"
        for key in state
        if own[key].shape != state[key].shape
    ]
    if wrong:
        raise CheckpointMismatch(f"{name} has tensors of other shapes: {_some(wrong)}")
    model.load_state_dict({key: tensor.float() for key, tensor in state.items()}, strict=False)
    if new:
        merge_as_mean_(model)
    model.eval()
    return tuple(new)


def _refuse_pruned(state: Mapping[str, Tensor], name: str) -> None:
    marks = [key for key in state if _PRUNED.search(key)]
    if marks:
        found = _some(marks)
    else:
        thin = {key: tensor for key, tensor in state.items() if _is_thin(key, tensor, state)}
        if not thin:
            return
        found = _some([f"{key} is {tuple(tensor.shape)}" for key, tensor in thin.items()])
    raise UnsupportedModelError(
        f"{name} was pruned already, by UPop, MADTP or the like ({found}): their layers have "
        "widths of their own that no config tells, and comp prunes dense models; convert the "
        "dense checkpoint instead"
    )


def _is_thin(key: str, tensor: Tensor, state: Mapping[str, Tensor]) -> bool:
    """Whether an attention or feed-forward layer is narrower than in a dense model."""
    if key.endswith("attn.qkv.weight"):
        return tensor.shape[0] != 3 * tensor.shape[1]
    if re.search(r"\.self[01]?\.query\.weight$", key):
        return tensor.shape[0] != tensor.shape[1]
    match = re.fullmatch(r"(.+\.)(\d+)(\.mlp\.fc1\.weight|\.intermediate\.dense\.weight)", key)
    if match is None:
        return False
    first = state.get(f"{match[1]}0{match[3]}")
    return first is not None and first.shape != tensor.shape


def _layers(state: Mapping[str, Tensor], prefix: str) -> int:
    numbers = {int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix)}
    return len(numbers)


def _heads(width: int, tower: str, name: str) -> int:
    if width % HEAD_DIM:
        raise ValueError(
            f"{name}: the {tower} tower is {width} wide, which is no multiple of {HEAD_DIM}, the "
            "width of BLIP's heads; is it a checkpoint of BLIP?"
        )
    return width // HEAD_DIM


def _has(state: Iterable[str], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in state)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    return (", ".join(listed[:8]) or "none") + more
