"""The state that pruning puts on a model: masks, thresholds, kept units, collectors.

``attach`` puts a handle on one model instance and swaps that instance's encoder forwards;
``detach`` restores them. Nothing is changed on classes, so two models in one process never meet.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from comp.cost import Measurement, Meter
from comp.importance import ActivationStatistics
from comp.madtp import Alignment
from comp.methods import Method
from comp.modes import PARAMETER_MODES, PruningMode, Stream
from comp.sites import AttentionSite, Block, UnitGroup
from comp.trace import TokenTrace
from comp.workers import ALONE, Workers

if TYPE_CHECKING:
    from comp.momentum import Momentum
    from comp.sharding import Sharding

ALIGNMENT = "alignment"
"""Attribute of a model that holds its alignment tokens (``comp.madtp``)."""
TEMPERATURE = "itc_temperature"  # "temperature" is a setting of generation to transformers
"""Attribute of a model that holds the learned temperature which its stock class lacks."""


@dataclass
class Structure:
    """What a family says about one model.

    Attributes:
        family: Name of the family.
        encoders: Encoder name to its blocks.
        merges: Streams whose dropped tokens are merged into a summary token by default.
        unit: What a unit of its attentions is, see ``PruningConfig``.
    """

    family: str
    encoders: dict[str, list[Block]]
    merges: frozenset[Stream] = frozenset({Stream.VISION, Stream.TEXT})
    unit: Literal["head", "head_dim"] = "head"

    def groups(self) -> list[UnitGroup]:
        """All unit groups, in forward order."""
        return [group for blocks in self.encoders.values() for b in blocks for group in b.groups()]

    def widths(self) -> dict[Stream, int]:
        """Width of the hidden states of every stream whose tokens drop by a threshold."""
        return {
            block.stream: block.attention.out.linear.out_features
            for blocks in self.encoders.values()
            for block in blocks
            if block.drops_tokens and block.boundary is None
        }

    def modes(self) -> list[PruningMode]:
        """The modes that this model has, in their fixed order."""
        have = {group.mode for group in self.groups()}
        streams = {
            stream
            for blocks in self.encoders.values()
            for block in blocks
            if block.drops_tokens
            for stream in block.streams
        }
        return [
            mode
            for mode in PruningMode
            if (mode in have if mode in PARAMETER_MODES else mode.stream in streams)
        ]


@dataclass
class PruningHandle:
    """Masks, thresholds and collectors of one model; ``model.pruning`` holds it.

    Attributes:
        model: The model it belongs to.
        structure: Its blocks and unit groups.
        switches: Which corrections act.
        mask_site: Where head masks act, see ``PruningConfig``.
        merge: ``auto``, ``summary`` or ``drop``, see ``PruningConfig``.
        min_tokens: Unprotected tokens kept in every layer, by stream.
        masks: Group name to soft mask ``(units,)``; a missing group is all ones and costs no
            multiplication.
        thresholds: Relative token threshold by stream; 0 keeps everything.
        static_tokens: By encoder, how many rows leave each of its layers: the fixed counts that
            take the thresholds' place there, see ``comp.export.freeze_token_counts``.
        kept: Group name to the kept units' indices in the dense model, for shrunk groups.
        dense_units: Group name to the units of the dense model.
        statistics: Collects activations while it is set.
        meter: Counts multiply-adds while it is set.
        trace: Notes which patches stay in every layer while it is set.
        stock_when_idle: Run the stock forward, bit for bit, while nothing is pruned. Training
            turns this off, so that padding is masked from the first step on.
        drop_path: Probability with which the last image layer is left out while training.
        recompute: Keep only each block's input for the backward pass (gradient checkpointing).
        momentum: The slow copy that a contrastive task trains against, see ``comp.momentum``.
        workers: The processes that share the samples of every pass, see ``comp.workers``.
        sharding: Gathers the weights where these processes hold shards, see ``comp.sharding``.
        originals: The swapped forwards, for ``restore_forwards``.
    """

    model: nn.Module
    structure: Structure
    switches: Method = field(default_factory=lambda: Method(cip=True, cit=True, schedule="mps"))
    mask_site: Literal["qkv", "context"] = "qkv"
    merge: Literal["auto", "summary", "drop"] = "auto"
    min_tokens: dict[Stream, int] = field(
        default_factory=lambda: {Stream.VISION: 4, Stream.TEXT: 2}
    )
    masks: dict[str, Tensor] = field(default_factory=dict)
    thresholds: dict[Stream, float] = field(default_factory=dict)
    static_tokens: dict[str, list[int]] | None = None
    kept: dict[str, list[int]] = field(default_factory=dict)
    dense_units: dict[str, int] = field(default_factory=dict)
    statistics: ActivationStatistics | None = None
    meter: Meter | None = None
    trace: TokenTrace | None = None
    stock_when_idle: bool = True
    recompute: bool = False
    drop_path: float = 0.0
    momentum: "Momentum | None" = None
    workers: Workers = ALONE
    sharding: "Sharding | None" = None
    originals: list[tuple[nn.Module, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._last = {name: blocks[-1].layer for name, blocks in self.structure.encoders.items()}
        self.take_structure(self.structure)

    def take_structure(self, structure: Structure) -> None:
        """Puts another structure of the same dense model in the place of its own."""
        self.structure = structure
        self.groups: dict[str, UnitGroup] = {g.name: g for g in structure.groups()}
        self.dense_units = {name: g.num_units for name, g in self.groups.items()}

    @property
    def alignment(self) -> Alignment | None:
        """MADTP's alignment tokens, a part of the model, if they score its tokens."""
        table = getattr(self.model, ALIGNMENT, None)
        wanted = self.switches.token_score == "madtp"
        return table if wanted and isinstance(table, Alignment) else None

    @property
    def idle(self) -> bool:
        """Whether the stock forward gives the same result, so that it may run instead."""
        return self.stock_when_idle and not (
            self.masks
            or self.kept
            or any(theta > 0 for theta in self.thresholds.values())
            or self.static_tokens
            or self.statistics is not None
            or self.meter is not None
        )

    def last_layer(self, encoder: str) -> int:
        """Index of an encoder's last layer."""
        return self._last[encoder]

    def merges(self, stream: Stream) -> bool:
        """Whether dropped tokens of a stream are merged into a summary token."""
        if self.merge == "auto":
            return stream in self.structure.merges
        return self.merge == "summary"

    def static_count(self, block: Block) -> int | None:
        """Rows that leave a block if its count is fixed, or ``None`` if thresholds decide."""
        counts = (self.static_tokens or {}).get(block.encoder)
        return None if counts is None else counts[block.layer]

    def left_in_layers(self, cost: Measurement) -> dict[str, float]:
        """Returns units and mean tokens left, by ``encoder.layer.part``.

        The parts are ``heads`` (or their dimensions, if these are the units), ``channels``,
        ``cross`` (the same of cross-attention; ``cross0`` and ``cross1`` where two run side by
        side) and ``tokens``.

        Args:
            cost: What this model was last measured to cost.
        """
        left: dict[str, float] = {}
        for encoder, blocks in self.structure.encoders.items():
            for block in blocks:
                for part, group in block.parts().items():
                    left[f"{encoder}.{block.layer}.{part}"] = cost.alive[group.name]
        return left | {f"{layer}.tokens": count for layer, count in cost.tokens.items()}

    def head_mask(self, site: AttentionSite) -> Tensor | None:
        """The soft mask of every query head, for Eq. 7, or ``None`` if all are whole."""
        mask = self.masks.get(site.name)
        return None if mask is None else site.head_factors(mask)

    def alive(self) -> dict[str, int]:
        """Units of each group that are neither masked to zero nor removed."""
        return {
            name: int((self.masks[name] > 0).sum()) if name in self.masks else group.num_units
            for name, group in self.groups.items()
        }

    @contextmanager
    def metering(self) -> Iterator[Meter]:
        """Counts the multiply-adds of the forward passes inside."""
        before, self.meter = self.meter, Meter()
        try:
            yield self.meter
        finally:
            self.meter = before

    @contextmanager
    def collecting(self) -> Iterator[ActivationStatistics]:
        """Collects the activations of the forward passes inside."""
        before, self.statistics = self.statistics, ActivationStatistics()
        try:
            yield self.statistics
        finally:
            self.statistics = before

    @contextmanager
    def with_thresholds(self, thresholds: dict[Stream, float]) -> Iterator[None]:
        """Uses other token thresholds inside."""
        before, self.thresholds = self.thresholds, dict(thresholds)
        try:
            yield
        finally:
            self.thresholds = before

    @contextmanager
    def without_masks(self, groups: Collection[str]) -> Iterator[None]:
        """Lets all units of some groups count as whole inside."""
        before = self.masks
        self.masks = {name: mask for name, mask in before.items() if name not in groups}
        try:
            yield
        finally:
            self.masks = before

    def plan(self) -> dict[str, Any]:
        """Returns what a fresh dense model needs to become this one, as JSON values."""
        return {
            "version": 1,
            "family": self.structure.family,
            "dense_units": self.dense_units,
            "kept": self.kept,
            "thresholds": {stream.value: theta for stream, theta in self.thresholds.items()},
            "min_tokens": {stream.value: count for stream, count in self.min_tokens.items()},
            "static_tokens": self.static_tokens,
            "merge": self.merge,
            "cip": self.switches.cip,
            "cit": self.switches.cit,
            "token_score": self.switches.token_score,
            "token_threshold": self.switches.token_threshold,
            "causal_mean": self.switches.causal_mean,
            "head_reduce": self.switches.head_reduce,
            "unit": self.structure.unit,
        }


def handle_of(model: nn.Module) -> PruningHandle:
    """Returns the handle of an attached model.

    Raises:
        ValueError: If the model is not attached.
    """
    handle = getattr(model, "pruning", None)
    if not isinstance(handle, PruningHandle):
        raise ValueError(
            f"{type(model).__name__} carries no pruning handle; call comp.models.attach first"
        )
    return handle


def swap_forward(
    handle: PruningHandle, module: nn.Module, forward: Any, *, name: str = "forward"
) -> None:
    """Puts ``forward(module, ...)`` on one instance; ``restore_forwards`` takes it off again."""
    module.__dict__["pruning"] = handle
    module.__dict__[name] = forward.__get__(module)
    handle.originals.append((module, name))


def restore_forwards(handle: PruningHandle) -> None:
    """Takes every swapped forward off again."""
    for module, attribute in handle.originals:
        module.__dict__.pop(attribute, None)
        module.__dict__.pop("pruning", None)
    handle.originals.clear()


def stock_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Runs the forward that the module's class defines."""
    return type(module).forward(module, *args, **kwargs)
