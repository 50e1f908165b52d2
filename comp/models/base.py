"""What a family file provides, and how its structure is put on a model instance."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from comp.data.images import ImageTransform
from comp.handle import (
    ALIGNMENT,
    TEMPERATURE,
    PruningHandle,
    Structure,
    handle_of,
    restore_forwards,
    stock_forward,
    swap_forward,
)
from comp.madtp import Alignment
from comp.methods import Method, check_site
from comp.modes import Stream
from comp.units import with_unit


class Adapter(Protocol):
    """One model family: the only place that knows its module names.

    Attributes:
        name: Name of the family.
        classes: Model classes it serves, by class name; ``load_model`` builds them.
        tasks: The task that a class is for, where there is one.
    """

    name: str
    classes: dict[str, type[nn.Module]]
    tasks: dict[str, str]

    def structure(self, model: nn.Module) -> Structure:
        """Returns the blocks of a model that is an instance of one of ``classes``."""
        ...

    def swap_forwards(self, handle: PruningHandle) -> None:
        """Swaps the encoder forwards of ``handle.model`` by ``comp.handle.swap_forward``."""
        ...


@dataclass(frozen=True)
class LoadedModel:
    """A model with what belongs to it.

    Attributes:
        model: The module, dense or pruned.
        tokenizer: Its tokenizer.
        name: Preset name or directory name.
        family: Name of the family.
        task: The task it was trained for or its class is for, ``""`` if unknown.
        transform: How its images are made.
        card: The model card: recipe, seed, measured accuracy.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    family: str
    task: str
    transform: ImageTransform
    card: dict[str, Any]

    @property
    def image_size(self) -> int:
        """Side of its input images in pixels."""
        return self.transform.size


def attach_with(
    adapter: Adapter,
    model: nn.Module,
    *,
    switches: Method | None = None,
    mask_site: Literal["qkv", "context"] = "qkv",
    merge: Literal["auto", "summary", "drop"] = "auto",
    min_tokens: dict[Stream, int] | None = None,
) -> PruningHandle:
    """Puts a handle on a model, or updates the options of the one that is there."""
    unit = None if switches is None else switches.unit
    existing = getattr(model, "pruning", None)
    if isinstance(existing, PruningHandle):
        handle = existing
        _check_merge(handle.structure, merge)
        check_site(unit or handle.structure.unit, mask_site)
        if unit is not None and unit != handle.structure.unit:
            _check_whole(handle, unit)
            handle.take_structure(with_unit(adapter.structure(model), unit))
    else:
        structure = adapter.structure(model)
        _check_merge(structure, merge)
        check_site(unit or "head", mask_site)
        if unit is not None:
            structure = with_unit(structure, unit)
        handle = PruningHandle(model, structure)
        swap_forward(handle, model, _save_pretrained, name="save_pretrained")
        adapter.swap_forwards(handle)
    if switches is not None:
        handle.switches = switches
    if min_tokens is not None:
        handle.min_tokens = dict(min_tokens)
    handle.mask_site = mask_site
    handle.merge = merge
    if handle.switches.token_score == "madtp" and not hasattr(model, ALIGNMENT):
        _add_alignment(handle)
    return handle


def _check_merge(structure: Structure, merge: str) -> None:
    """Refuses to merge what only drops: a summary token has no place in a causal sequence."""
    causal = [
        mode.stream.value
        for mode in structure.modes()
        if mode.is_tokens and mode.stream not in structure.merges
    ]
    if merge == "summary" and causal:
        raise ValueError(
            f"merge 'summary' cannot be: {' and '.join(causal)} tokens of {structure.family} run "
            "in a causal sequence, which has no place for a summary; use 'auto', which merges "
            "where it can, or 'drop'"
        )


def _check_whole(handle: PruningHandle, unit: str) -> None:
    """Refuses another kind of unit for a model that has lost some."""
    if handle.kept or handle.masks:
        raise ValueError(
            f"unit {unit!r} comes too late: {type(handle.model).__name__} is pruned by "
            f"{handle.structure.unit!r} already; keep that, or start from the dense model"
        )


def _add_alignment(handle: PruningHandle) -> None:
    """Gives a model the alignment tokens of ``comp.madtp``, as parameters of its own."""
    widths = handle.structure.widths()
    if not widths:
        raise ValueError(
            f"token_score 'madtp' needs encoders whose tokens drop by a threshold, which "
            f"{type(handle.model).__name__} has not; use 'attention'"
        )
    device = next(handle.model.parameters()).device
    setattr(handle.model, ALIGNMENT, Alignment(widths).to(device))


def detach(model: nn.Module) -> None:
    """Restores the stock forwards.

    Raises:
        ValueError: If units are already removed, which the stock forward cannot run.
    """
    handle = handle_of(model)
    if handle.kept:
        raise ValueError(
            f"{len(handle.kept)} modules have lost units, which the stock forward cannot run; "
            "keep the model attached"
        )
    restore_forwards(handle)
    for added in (ALIGNMENT, TEMPERATURE):
        if hasattr(model, added):
            delattr(model, added)


def counted_linear(self: Any, rows: Tensor) -> Tensor:
    """The forward of a Linear that no mode prunes: it counts its rows where it runs."""
    meter = self.pruning.meter
    if meter is not None and not meter.paused:
        meter.add_fixed(rows.numel() * self.out_features)
    output: Tensor = stock_forward(self, rows)
    return output


def _save_pretrained(self: Any, save_directory: Any, **kwargs: Any) -> None:
    """Writes what ``comp.load_pruned`` reads; the stock method would lose the structure."""
    from comp.checkpoint import save_pruned

    save_pruned(self, save_directory, **kwargs)
