"""FLOPs in closed form, counted as multiply-adds (one per multiply-add, as fvcore and the papers).

Per sample and layer, with a = heads * head width and c = channels:

    self-attention on N tokens          3 N D a + 2 N^2 a + N a D
        with shared keys and values     N D (a + 2 a_kv) + 2 N^2 a + N a D
    cross-attention, L queries, N keys  L D a + 2 N D_v a + 2 L N a + L a D
    feed-forward on N tokens            2 N D c      (3 N D c when gated)

All are linear in the number of heads or channels, so a ``Meter`` keeps, per unit group, what one
unit costs, summed over samples from each sample's own token counts (mean of squares, never the
square of a mean). Not counted: biases, norms, softmax, activations, gathers and the selection of
tokens. ``torch.utils.flop_counter`` counts two per multiply-add, so its total is exactly twice
this one on a shrunk model.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from comp.modes import PruningMode

if TYPE_CHECKING:
    from comp.sites import UnitGroup

N = TypeVar("N", int, Tensor)

LAYERNORM_FLOPS = 5
"""What fvcore counts per element of a LayerNorm, to reproduce published dense numbers."""


def self_attention_macs(
    queries: N, keys: N, width: int, inner: int, kv_inner: int | None = None
) -> N:
    """Multiply-adds of self-attention with ``inner`` = heads times head width.

    ``kv_inner`` is the same product of the key and value heads where several queries share one.
    """
    both = inner + (inner if kv_inner is None else kv_inner)
    return 2 * queries * width * both + 2 * queries * keys * inner


def cross_attention_macs(queries: N, keys: N, width: int, key_width: int, inner: int) -> N:
    """Multiply-adds of cross-attention from ``queries`` tokens to ``keys`` tokens."""
    return 2 * queries * width * inner + 2 * keys * key_width * inner + 2 * queries * keys * inner


def feed_forward_macs(tokens: N, width: int, channels: int, matrices: int = 2) -> N:
    """Multiply-adds of a feed-forward layer; ``matrices`` is 3 for a gated one."""
    return matrices * tokens * width * channels


def patch_macs(num_patches: int, patch_size: int, width: int, channels: int = 3) -> int:
    """Multiply-adds of the convolution that embeds ``num_patches`` patches."""
    return num_patches * channels * patch_size**2 * width


class Meter:
    """Adds up what the forward passes of a model cost, sample by sample.

    ``comp.blocks`` feeds it; ``measurement`` reads it.
    """

    def __init__(self) -> None:
        self._unit_macs: dict[str, Tensor] = {}
        self._shared_macs: dict[tuple[str, str], Tensor] = {}
        self._fixed: int = 0
        self._tokens: dict[tuple[str, int], Tensor] = {}
        self._rows: dict[tuple[str, int], int] = {}
        self.num_samples = 0
        self.paused = False

    def add_units(self, group: str, macs_of_one_unit: Tensor) -> None:
        """Adds what one unit of a group costs in this batch, ``(B,)`` int64."""
        batch = macs_of_one_unit.sum()
        old = self._unit_macs.get(group)
        self._unit_macs[group] = batch if old is None else old + batch

    def add_shared(self, group: str, stream: str, macs_of_one_unit: Tensor) -> None:
        """Notes a stream's share of ``add_units`` where streams share one sequence, ``(B,)``."""
        key = (group, stream)
        batch = macs_of_one_unit.sum()
        old = self._shared_macs.get(key)
        self._shared_macs[key] = batch if old is None else old + batch

    def add_fixed(self, macs: int) -> None:
        """Adds multiply-adds that no mode can remove, already summed over the batch."""
        self._fixed += macs

    def add_tokens(self, encoder: str, layer: int, counts: Tensor) -> None:
        """Notes how many tokens of every sample leave a layer, ``(B,)`` int64."""
        key = (encoder, layer)
        old = self._tokens.get(key)
        self._tokens[key] = counts.sum() if old is None else old + counts.sum()
        self._rows[key] = self._rows.get(key, 0) + counts.shape[0]

    def numbers(self) -> "Meter":
        """Returns a copy that holds numbers instead of tensors, which may go anywhere."""
        return joined_meters([self])

    def measurement(self, groups: Iterable["UnitGroup"], alive: dict[str, int]) -> "Measurement":
        """Divides by the samples seen.

        Args:
            groups: All unit groups of the model.
            alive: Units of each group that are not pruned.

        Raises:
            ValueError: If no sample was counted.
        """
        if self.num_samples < 1:
            raise ValueError("num_samples must be at least 1 to take a mean, but got 0")
        unit = {
            group.name: int(self._unit_macs[group.name])
            for group in groups
            if group.name in self._unit_macs
        }
        total = self._fixed + sum(alive[name] * macs for name, macs in unit.items())
        streams: dict[str, float] = {}
        for (name, stream), macs in self._shared_macs.items():
            own = alive[name] * float(macs) / self.num_samples
            streams[stream] = streams.get(stream, 0.0) + own
        tokens = {
            f"{encoder}.{layer}": int(total_tokens) / self._rows[encoder, layer]
            for (encoder, layer), total_tokens in self._tokens.items()
        }
        return Measurement(
            total_macs=total,
            num_samples=self.num_samples,
            unit_macs={name: macs / self.num_samples for name, macs in unit.items()},
            alive=dict(alive),
            tokens=tokens,
            stream_macs=streams,
        )


def joined_meters(meters: Sequence[Meter]) -> Meter:
    """Returns one meter of everything that some have counted."""
    whole = Meter()
    for meter in meters:
        for sums, more in (
            (whole._unit_macs, meter._unit_macs),
            (whole._shared_macs, meter._shared_macs),
            (whole._tokens, meter._tokens),
            (whole._rows, meter._rows),
        ):
            _add(sums, more)
        whole._fixed += meter._fixed
        whole.num_samples += meter.num_samples
    return whole


def _add(sums: dict[Any, Any], more: Mapping[Any, Any]) -> None:
    for key, value in more.items():
        sums[key] = sums.get(key, 0) + int(value)


@dataclass(frozen=True)
class Measurement:
    """What a model costs on a set of samples.

    Attributes:
        total_macs: Multiply-adds summed over all samples, exact.
        num_samples: Samples behind the sum.
        unit_macs: Mean multiply-adds per sample of one unit, by group.
        alive: Unpruned units by group.
        tokens: Mean tokens that leave a layer, by ``encoder.layer``.
        stream_macs: Mean multiply-adds per sample that are a stream's own share of sequences in
            which it is not alone.
    """

    total_macs: int
    num_samples: int
    unit_macs: dict[str, float]
    alive: dict[str, int]
    tokens: dict[str, float] = field(default_factory=dict)
    stream_macs: dict[str, float] = field(default_factory=dict)

    @property
    def macs(self) -> float:
        """Mean multiply-adds per sample."""
        return self.total_macs / self.num_samples

    def mode_macs(self, groups: Iterable["UnitGroup"], mode: PruningMode) -> float:
        """Mean multiply-adds that a mode can act on (F_mode of docs/algorithm.md).

        For a parameter mode these are its units' own; for a token mode everything whose cost
        depends on the number of tokens of its stream, or its share of a mixed sequence.
        """
        if mode.is_tokens and mode.stream.value in self.stream_macs:
            return self.stream_macs[mode.stream.value]

        def belongs(group: "UnitGroup") -> bool:
            return mode.stream in group.token_streams if mode.is_tokens else group.mode is mode

        return sum(
            self.alive[group.name] * self.unit_macs.get(group.name, 0.0)
            for group in groups
            if belongs(group)
        )

    def last_tokens(self) -> dict[str, float]:
        """Mean tokens that leave the last layer of each encoder."""
        last: dict[str, tuple[int, float]] = {}
        for key, count in self.tokens.items():
            encoder, layer = key.rsplit(".", 1)
            if encoder not in last or int(layer) > last[encoder][0]:
                last[encoder] = (int(layer), count)
        return {encoder: count for encoder, (_, count) in last.items()}


def token_counts(valid: Tensor | None, hidden: Tensor) -> Tensor:
    """Valid tokens of every sample, ``(B,)`` int64, of hidden states ``(B, N, D)``."""
    if valid is None:
        return torch.full(
            (hidden.shape[0],), hidden.shape[1], dtype=torch.int64, device=hidden.device
        )
    return valid.sum(dim=1)
