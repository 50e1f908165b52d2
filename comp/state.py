"""The state of a running ``Pruner`` on disk, exact enough to go on bit-equal on one device.

``state.json`` holds records, strategy and plan and names the file with the weights, optimizer
moments and masks. It is replaced in one step after that file is complete, so that a process that
dies while it saves leaves the state before.
"""

import dataclasses
import json
import math
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from comp.collectives import like, whole
from comp.cost import Measurement
from comp.errors import CheckpointMismatch
from comp.modes import Stream
from comp.momentum import restored
from comp.results import CurvePoint, StageRecord
from comp.sharding import gather_, shard_
from comp.shrink import apply_plan_
from comp.tensor_file import write_tensors

if TYPE_CHECKING:
    from comp.pruner import Pruner

VERSION = 1
SAVES_MEMORY = ("accumulate", "eval_batch_size")  # may change in the middle of a run


def save_state(pruner: "Pruner", directory: Path, *, optimizer: bool = True) -> None:
    """Writes a pruner's state; see the module docstring.

    Args:
        pruner: Between two yields of ``run``.
        directory: Made if it is missing; a state in it is replaced.
        optimizer: Whether stages are to go on from it; a fine-tuning needs no moments.
    """
    directory.mkdir(parents=True, exist_ok=True)
    handle = pruner.handle
    target = directory / f"tensors-{secrets.token_hex(4)}.safetensors"
    tensors = tensors_of(pruner, optimizer=optimizer)
    write_tensors({k: v.cpu().contiguous().clone() for k, v in tensors}, target)
    state = {
        "version": VERSION,
        "tensors": target.name,
        "config": pruner.config.to_dict(),
        "plan": handle.plan(),
        "strategy": pruner.strategy.state(),
        "records": [record_to_dict(record) for record in pruner.records],
        "step": pruner._step,
        "num_passed": pruner._num_passed,
        "dense_macs": pruner._dense_macs,
        "macs": pruner._macs,
        "value": pruner._value,
        "resource": [pruner._resource, pruner._dense_resource],
        "cost": None if pruner._cost is None else dataclasses.asdict(pruner._cost),
    }
    manifest = directory / "state.json.new"
    manifest.write_text(json.dumps(state))
    manifest.replace(directory / "state.json")
    for old in directory.glob("tensors-*.safetensors"):
        if old != target:
            old.unlink()


def tensors_of(pruner: "Pruner", *, optimizer: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yields what ``save_state`` writes, by name; whole, so that all workers must ask for it.

    Args:
        pruner: As in ``save_state``.
        optimizer: As in ``save_state``.
    """
    handle = pruner.handle
    names = {id(p): name for name, p in pruner.model.named_parameters()}
    for name, tensor in pruner.model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.nn.Parameter) or names.get(id(tensor)) == name:
            yield f"model.{name}", whole(tensor.detach())
    for name, parameter in pruner.model.named_parameters() if optimizer else ():
        for key, value in pruner.optimizer.state.get(parameter, {}).items():
            yield f"optimizer.{key}.{name}", whole(torch.as_tensor(value))
    for name, mask in handle.masks.items():
        yield f"mask.{name}", mask
    for name, total in pruner.search.sums.items() if pruner.search is not None else ():
        yield f"gradient.{name}", total
    for name, tensor in handle.momentum.tensors().items() if handle.momentum is not None else ():
        yield f"momentum.{name}", tensor


def load_state(pruner: "Pruner", directory: Path) -> None:
    """Puts a saved state into a fresh pruner; see the module docstring.

    Args:
        pruner: Fresh, built from the same dense model and config.
        directory: What ``save_state`` wrote.

    Raises:
        FileNotFoundError: If there is no state.
        CheckpointMismatch: If it was saved under another config (``SAVES_MEMORY`` apart), version
            or model.
    """
    path = directory / "state.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no state.json; no stage was saved there")
    state = json.loads(path.read_text())
    if state["version"] != VERSION:
        raise CheckpointMismatch(
            f"{path} has version {state['version']}, but this comp reads version {VERSION}"
        )
    own = pruner.config.to_dict()
    changed = [
        key for key in own if key not in SAVES_MEMORY and own[key] != state["config"].get(key)
    ]
    if changed:
        raise CheckpointMismatch(
            f"{path} was saved under another config (differs in {', '.join(changed)}); "
            "use the same config or another directory"
        )
    if pruner.records:
        raise CheckpointMismatch(f"{path} can only be restored into a fresh pruner")
    handle = pruner.handle
    if state["plan"]["dense_units"] != handle.dense_units:
        raise CheckpointMismatch(f"{path} was saved for a model of other widths")
    gather_(handle)
    apply_plan_(handle, state["plan"]["kept"])
    handle.thresholds = {Stream(k): v for k, v in state["plan"]["thresholds"].items()}
    # Shards are made of weights and moments that wait on the CPU.
    place = torch.device("cpu") if handle.workers.shards else pruner.device
    tensors = load_file(directory / state["tensors"], device=str(place))
    weights = _under("model.", tensors)
    missing, unexpected = pruner.model.load_state_dict(weights, strict=False)
    tied = set(getattr(pruner.model, "all_tied_weights_keys", {}) or {})
    if unexpected or set(missing) - tied:
        raise CheckpointMismatch(f"{directory} does not fit the model: {missing} {unexpected}")
    shard_(handle)
    handle.masks = _moved(_under("mask.", tensors), pruner.device)
    if pruner.search is not None:
        pruner.search.sums = _moved(_under("gradient.", tensors), pruner.device)
    slow = _under("momentum.", tensors)
    handle.momentum = restored(pruner.model, slow) if slow else None
    pruner.optimizer = _restored_optimizer(pruner, tensors)
    pruner.strategy.restore(state["strategy"])
    pruner.records = [record_from_dict(values) for values in state["records"]]
    pruner._step = state["step"]
    pruner._num_passed = state["num_passed"]
    pruner._dense_macs = state["dense_macs"]
    pruner._macs = state["macs"]
    pruner._value = state["value"]
    pruner._resource, pruner._dense_resource = state["resource"]
    pruner._cost = None if state["cost"] is None else Measurement(**state["cost"])


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _moved(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _restored_optimizer(pruner: "Pruner", tensors: dict[str, Tensor]) -> torch.optim.AdamW:
    from comp.finetune import make_optimizer

    optimizer = make_optimizer(pruner.model, pruner.config)
    for name, parameter in pruner.model.named_parameters():
        entry = {
            key: like(tensors[f"optimizer.{key}.{name}"].to(parameter.device), parameter)
            for key in ("exp_avg", "exp_avg_sq")
            if f"optimizer.{key}.{name}" in tensors
        }
        if entry:
            entry["step"] = tensors[f"optimizer.step.{name}"].cpu()
            optimizer.state[parameter] = entry
    return optimizer


def record_to_dict(record: StageRecord | CurvePoint) -> dict[str, Any]:
    """Returns a record as JSON values with its kind."""
    kind = "stage" if isinstance(record, StageRecord) else "point"
    values = record.to_dict()
    if kind == "stage" and not math.isfinite(values["threshold"]):
        values["threshold"] = None
    return {"kind": kind, **values}


def record_from_dict(values: dict[str, Any]) -> StageRecord | CurvePoint:
    """The inverse of ``record_to_dict``."""
    values = dict(values)
    kind = values.pop("kind")
    if kind == "stage":
        if values["threshold"] is None:
            values["threshold"] = -math.inf
        return StageRecord.from_dict(values)
    return CurvePoint.from_dict(values)
