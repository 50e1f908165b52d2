"""Physical removal of masked units, and rebuilding a shrunk model from its plan.

Removing a head, or a dimension of all heads, takes its rows out of the query, key and value
projections (biases too) and its columns out of the out-projection; removing a channel takes its
rows out of the first projection(s) and its column out of the second. Out-projection biases and
softmax scale stay as they are, so a hard-masked model and its shrunk self give the same output.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from comp.collectives import like, whole
from comp.errors import CheckpointMismatch
from comp.handle import PruningHandle
from comp.sites import AttentionSite, FeedForwardSite, LinearRef, UnitGroup


@dataclass(frozen=True)
class Slice:
    """One parameter that was replaced by some of its rows or columns.

    Attributes:
        old: The parameter before.
        new: The parameter now.
        dim: The sliced dimension.
        index: Kept positions, ``(K,)``.
    """

    old: nn.Parameter
    new: nn.Parameter
    dim: int
    index: Tensor


def shrink_(handle: PruningHandle) -> list[Slice]:
    """Removes every unit whose mask is zero, in place, from a slow copy of the model, too.

    Args:
        handle: Its masks must be exactly 0 or 1; they are cleared.

    Returns:
        The replaced parameters, for ``migrate_optimizer_``.

    Raises:
        ValueError: If a mask is still fading or a module would lose all its units.
    """
    slices: list[Slice] = []
    for name, mask in handle.masks.items():
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"the mask of {name!r} is still fading; finish the stage first")
        if not bool(mask.any()):
            raise ValueError(f"{name!r} would lose all {mask.numel()} units; keep at least one")
    for name, mask in list(handle.masks.items()):
        keep = mask.nonzero().flatten().cpu()
        if keep.numel() < mask.numel():
            slices += remove_units_(handle.groups[name], keep)
            if handle.momentum is not None:
                handle.momentum.remove_units_(name, keep)
            before = handle.kept.get(name, list(range(handle.dense_units[name])))
            handle.kept[name] = [before[i] for i in keep.tolist()]
        del handle.masks[name]
    return slices


def remove_units_(group: UnitGroup, keep: Tensor) -> list[Slice]:
    """Keeps only some units of a group, in place.

    Args:
        group: The group.
        keep: Kept units, ascending, ``(K,)``.

    Returns:
        The replaced parameters.
    """
    if isinstance(group, FeedForwardSite):
        slices = [s for ref in group.inputs for s in _slice_linear(ref, 0, keep)]
        return slices + _slice_linear(group.out, 1, keep)
    return _remove_from_attention_(group, keep)


def unit_parameters(group: UnitGroup) -> int:
    """Parameters that go with one unit: rows of the in-projections, columns of the other."""
    units = group.num_units
    inner = sum(p.numel() for ref in group.inputs for p in ref.linear.parameters())
    return (inner + group.out.linear.weight.numel()) // units


def num_parameters(model: nn.Module, handle: PruningHandle) -> int:
    """Parameters of a model once its masked units are removed."""
    alive = handle.alive()
    masked = sum(
        (handle.groups[name].num_units - alive[name]) * unit_parameters(handle.groups[name])
        for name in handle.masks
    )
    return sum(parameter.numel() for parameter in model.parameters()) - masked


def _remove_from_attention_(site: AttentionSite, keep: Tensor) -> list[Slice]:
    stays = torch.zeros(site.num_units, dtype=torch.bool)
    stays[keep] = True
    columns = site.over_columns(stays).nonzero().flatten()
    rows = site.over_keys(stays).nonzero().flatten()
    if len(site.inputs) == 1:
        part = site.out.linear.in_features
        fused = torch.cat([rows + i * part for i in range(3)])
        slices = _slice_linear(site.inputs[0], 0, fused)
    else:
        query, key, value = site.inputs
        slices = _slice_linear(query, 0, columns)
        slices += _slice_linear(key, 0, rows) + _slice_linear(value, 0, rows)
    return slices + _slice_linear(site.out, 1, columns)


def _slice_linear(ref: LinearRef, dim: int, index: Tensor) -> list[Slice]:
    old = ref.linear
    index = index.to(old.weight.device)
    sizes = [old.in_features, old.out_features]
    sizes[1 - dim] = index.numel()
    new = nn.Linear(
        sizes[0], sizes[1], bias=old.bias is not None, device="meta", dtype=old.weight.dtype
    )
    new.train(old.training)
    slices = []
    for name, parameter in old.named_parameters():
        if name == "bias" and dim == 1:
            setattr(new, name, parameter)
            continue
        kept = nn.Parameter(
            parameter.detach().index_select(dim, index).clone(), parameter.requires_grad
        )
        setattr(new, name, kept)
        slices.append(Slice(parameter, kept, dim, index))
    ref.replace(new)
    return slices


def migrate_optimizer_(optimizer: torch.optim.Optimizer, slices: Iterable[Slice]) -> None:
    """Lets an optimizer go on with shrunk parameters, its moments sliced alike.

    Args:
        optimizer: Changed in place.
        slices: What ``shrink_`` returned.
    """
    for entry in slices:
        for group in optimizer.param_groups:
            group["params"] = [entry.new if p is entry.old else p for p in group["params"]]
        state = optimizer.state.pop(entry.old, None)
        if state is None:
            continue
        optimizer.state[entry.new] = {
            key: like(whole(value).index_select(entry.dim, entry.index).clone(), value)
            if isinstance(value, Tensor) and value.shape == entry.old.shape
            else value
            for key, value in state.items()
        }


def apply_plan_(handle: PruningHandle, kept: dict[str, list[int]]) -> None:
    """Shrinks a dense model to a saved plan, in place.

    Args:
        handle: The handle of a dense model.
        kept: Group name to kept units of the dense model.

    Raises:
        CheckpointMismatch: If the plan does not fit the model.
    """
    for name, units in kept.items():
        group = handle.groups.get(name)
        if group is None:
            raise CheckpointMismatch(
                f"the plan names {name!r}, which this {handle.structure.family} model lacks; "
                "the plan belongs to another model"
            )
        dense = handle.dense_units[name]
        ascending = units == sorted(set(units))
        if not units or not ascending or units[0] < 0 or units[-1] >= dense:
            raise CheckpointMismatch(
                f"the plan's kept units of {name!r} must ascend within 0..{dense - 1}, "
                f"but got {units[:8]}{'...' if len(units) > 8 else ''}"
            )
        remove_units_(group, torch.tensor(units))
        handle.kept[name] = list(units)
