"""Saving and loading models, dense or pruned: safetensors, the dense config, and a JSON plan.

A pruned directory holds ``config.json`` of the dense model, ``model.safetensors`` of the shrunk
weights, ``pruning.json`` with the kept units and token thresholds, and the tokenizer. Loading
builds the dense class without weights, shrinks it to the plan and loads strictly. Nothing in a
directory is ever executed.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from comp.errors import CheckpointMismatch, UnsupportedModelError, misfit
from comp.handle import TEMPERATURE, PruningHandle, handle_of
from comp.methods import Method
from comp.modes import Stream
from comp.shrink import apply_plan_
from comp.tensor_file import write_tensors

if TYPE_CHECKING:
    from comp.models.dense import Dtype

WEIGHTS = "model.safetensors"
PLAN = "pruning.json"
_PLAN: dict[str, Any] = {
    "version": 1,
    "family": "",
    "dense_units": {},
    "kept": {},
    "thresholds": {},
    "min_tokens": {},
    "merge": "",
    "cip": True,
    "cit": True,
    "token_score": "",
}
"""What a plan must hold, with a value of the type; later keys are optional."""
_WIDEST = (("F32", torch.float32), ("BF16", torch.bfloat16), ("F16", torch.float16))


def save_pruned(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    card: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a model so that ``load_pruned`` rebuilds it in another process.

    Args:
        model: A dense or shrunk model; masks must be gone.
        directory: Made if it is missing; a model in it is replaced. ``pruning.json`` is
            written last.
        tokenizer: Saved beside it, if given.
        card: What is known of the model, saved as ``card.json``.
        dtype: Store floating weights in this type; loading turns them back into float32.

    Raises:
        ValueError: If masks are still in force.
    """
    handle = handle_of(model) if hasattr(model, "pruning") else None
    if handle is not None and handle.masks:
        raise ValueError(
            f"{len(handle.masks)} masks are in force; shrink the model before saving it"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for stale in (PLAN, "card.json"):
        (directory / stale).unlink(missing_ok=True)
    config: Any = model.config
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    write_tensors(_unique_tensors(model, dtype), directory / WEIGHTS)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    if card is not None:
        (directory / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    if handle is not None:
        (directory / PLAN).write_text(json.dumps(handle.plan()) + "\n")


def _unique_tensors(model: nn.Module, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The state without aliases of tied tensors, which loading ties again."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        value = tensor.detach().cpu().contiguous()
        tensors[name] = value.to(dtype) if dtype and value.is_floating_point() else value
    return tensors


def load_pruned(
    directory: str | Path, *, shared: bool = False, dtype: "Dtype" = torch.float32
) -> nn.Module:
    """Rebuilds a saved model, dense or pruned, in eval mode on the CPU.

    Args:
        directory: What ``save_pruned`` or ``save_pretrained`` wrote.
        shared: Use the pages of the mapped file where it holds the weights as they are, of which
            a machine keeps one copy for all processes. Who changes them gets pages of their own.
        dtype: Of the weights; ``"auto"`` is what they are stored in. Only float32 is for training:
            updates that are small beside a weight are lost in 16 bits.

    Returns:
        The model, attached if it is pruned.

    Raises:
        FileNotFoundError: If a file is missing.
        UnsupportedModelError: If no family knows the model's class.
        CheckpointMismatch: If plan, config and weights do not belong together.
    """
    from comp.models import attach, model_classes
    from comp.models.dense import WEIGHT_FILES, load_dense

    directory = Path(directory)
    plan_path = directory / PLAN
    weights = (WEIGHTS,) if plan_path.is_file() else WEIGHT_FILES
    for choice in (("config.json",), weights):
        if not any((directory / name).is_file() for name in choice):
            raise FileNotFoundError(f"{directory} holds no {choice[0]}; it is no saved model")
    config = json.loads((directory / "config.json").read_text())
    names = config.get("architectures") or ["(none)"]
    classes: dict[str, Any] = model_classes()
    if names[0] not in classes:
        raise UnsupportedModelError(
            f"{directory} holds a {names[0]}, which has no adapter; the classes known are "
            + ", ".join(sorted(classes))
        )
    model_class = classes[names[0]]
    if not plan_path.is_file():
        dense = load_dense(model_class, directory, dtype).eval()
        return _share_(dense, directory) if shared else dense
    model: nn.Module = model_class(model_class.config_class.from_pretrained(directory))
    plan = _read_plan(plan_path)
    later = ("token_threshold", "causal_mean", "head_reduce", "unit")  # not in the oldest plans
    switches = Method(
        cip=plan["cip"],
        cit=plan["cit"],
        schedule="mps",
        token_score=plan["token_score"],
        **{name: plan[name] for name in later if name in plan},
    )
    handle = attach(
        model,
        switches=switches,
        merge=plan["merge"],
        min_tokens={Stream(k): v for k, v in plan["min_tokens"].items()},
    )
    if plan["dense_units"] != handle.dense_units:
        raise CheckpointMismatch(
            f"{plan_path} was made for a {plan['family']} model of other widths than "
            f"{directory / 'config.json'} describes; the files do not belong together"
        )
    apply_plan_(handle, plan["kept"])
    handle.thresholds = {Stream(k): v for k, v in plan["thresholds"].items()}
    handle.static_tokens = _fitting_counts(handle, plan.get("static_tokens"), plan_path)
    _load_strictly(model, directory / WEIGHTS)
    _cast_(model, _stored_in(directory / WEIGHTS) if dtype == "auto" else dtype)
    return _share_(model.eval(), directory) if shared else model.eval()


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        plan: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointMismatch(f"{path} is no JSON ({error}); save the model again") from error
    version, own = plan.get("version"), _PLAN["version"]
    if version != own:
        raise CheckpointMismatch(
            f"{path} has version {version}, but this comp reads version {own}"
        )
    for key, kind in _PLAN.items():
        if not isinstance(plan.get(key), type(kind)):
            raise CheckpointMismatch(
                f"{path} must give {key!r} as {type(kind).__name__}, but has {plan.get(key)!r}; "
                "save the model again"
            )
    streams = [stream.value for stream in Stream]
    for name in (*plan["thresholds"], *plan["min_tokens"]):
        if name not in streams:
            raise CheckpointMismatch(
                f"{path} names the stream {name!r}, but there are {', '.join(streams)}"
            )
    return plan


def _fitting_counts(
    handle: PruningHandle, counts: dict[str, list[int]] | None, path: Path
) -> dict[str, list[int]] | None:
    layers = {name: len(blocks) for name, blocks in handle.structure.encoders.items()}
    for encoder, rows in (counts or {}).items():
        if len(rows) != layers.get(encoder) or min(rows) < 1:
            raise CheckpointMismatch(
                f"{path} fixes the token counts {rows} for {encoder!r}, but needs one count of at "
                f"least 1 for each layer of an encoder (layers: {layers})"
            )
    return counts


def _load_strictly(model: nn.Module, path: Path) -> None:
    state = {name: _float32(tensor) for name, tensor in load_file(path).items()}
    if TEMPERATURE in state and not hasattr(model, TEMPERATURE):
        model.register_parameter(TEMPERATURE, nn.Parameter(torch.empty(())))
    own = model.state_dict(keep_vars=True)
    first_alias: dict[int, str] = {}
    for name, tensor in own.items():
        first_alias.setdefault(id(tensor), name)
    missing = [n for n, t in own.items() if n not in state and first_alias[id(t)] not in state]
    unexpected = [name for name in state if name not in own]
    wrong = [n for n, t in state.items() if n in own and own[n].shape != t.shape]
    if missing or unexpected or wrong:
        raise CheckpointMismatch(
            f"{path} {misfit(type(model).__name__, missing, unexpected, wrong)}"
        )
    model.load_state_dict(state, strict=False)


def _stored_in(path: Path) -> torch.dtype:
    """The widest floating type of the tensors in a file."""
    with safe_open(path, framework="pt") as file:
        types = [file.get_slice(name).get_dtype() for name in file.keys()]  # noqa: SIM118
    return next((kind for name, kind in _WIDEST if name in types), torch.float32)


def _cast_(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the weights; buffers, as the frequencies of rotary positions, stay as they are."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def _share_(model: nn.Module, directory: Path) -> nn.Module:
    """Puts the pages of the weight files in the place of equal tensors."""
    own = model.state_dict(keep_vars=True)
    for path in directory.glob("*.safetensors"):
        for name, stored in load_file(path).items():
            tensor = own.get(name)
            if tensor is not None and _is_same(tensor, stored):
                tensor.data = stored
    return model


def _is_same(tensor: torch.Tensor, stored: torch.Tensor) -> bool:
    alike = tensor.dtype == stored.dtype and tensor.shape == stored.shape
    return alike and torch.equal(tensor, stored)


def _float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
