"""Where a model's prunable parts stand: attention, feed-forward, and their layers.

A family describes its layers as ``Block``s that point at the stock modules; nothing here runs
them (``comp.blocks`` does), except for the projections of a single site.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from comp.linear import masked_linear, spaced_linear
from comp.modes import PruningMode, Stream
from comp.packing import Packing, padded

UnitKind = Literal["head", "head_dim", "channel"]
"""What a unit may be: a head, one dimension of all heads of a module, or a hidden channel."""


@dataclass(frozen=True)
class LinearRef:
    """A Linear by its owner and attribute, so that it can be replaced by a smaller one."""

    owner: nn.Module
    attribute: str

    @property
    def linear(self) -> nn.Linear:
        """The Linear as it is now."""
        module = getattr(self.owner, self.attribute)
        assert isinstance(module, nn.Linear)
        return module

    def replace(self, linear: nn.Linear) -> None:
        """Puts another Linear in its place."""
        setattr(self.owner, self.attribute, linear)


@dataclass(frozen=True)
class AttentionSite:
    """The projections of one attention module.

    Attributes:
        name: Unique name, the module path in the dense model.
        mode: The parameter mode that prunes its units.
        layer: Layer index inside its encoder.
        inputs: Query, key and value projections, or one fused ``q | k | v``, head-major inside.
        out: Out-projection.
        head_dim: Width of one head in the dense model.
        scale: Factor on the logits; never changes, even where heads get narrower.
        queries_per_unit: Query heads that share one key/value head (1 without grouping).
        dropout: Probability of attention dropout while training.
        token_streams: Streams whose token counts its cost depends on.
        rotate: Turns queries and keys by ``TokenState.rotary``: ``(q, k, cos, sin) -> (q, k)``.
        fixed_heads: 0 if a unit is a head. Otherwise a unit is one dimension of all heads
            (UPop's), and this is their number, which never changes.
    """

    name: str
    mode: PruningMode
    layer: int
    inputs: tuple[LinearRef, ...]
    out: LinearRef
    head_dim: int
    scale: float
    queries_per_unit: int = 1
    dropout: float = 0.0
    token_streams: frozenset[Stream] = frozenset()
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    fixed_heads: int = 0

    @property
    def kind(self) -> UnitKind:
        """What a unit is."""
        return "head_dim" if self.fixed_heads else "head"

    @property
    def unit_width(self) -> int:
        """Columns of the out-projection that belong to one unit."""
        return self.fixed_heads or self.head_dim * self.queries_per_unit

    @property
    def key_width(self) -> int:
        """Rows of the key projection that belong to one unit."""
        return self.fixed_heads or self.head_dim

    @property
    def num_units(self) -> int:
        """Heads (or key/value groups, or dimensions of a head) that are physically there."""
        return self.out.linear.in_features // self.unit_width

    @property
    def head_width(self) -> int:
        """Width of one head as it physically is."""
        return self.num_units if self.fixed_heads else self.head_dim

    def over_columns(self, units: Tensor) -> Tensor:
        """Repeats what belongs to every unit, ``(units,)``, for every column it has."""
        return self._over(units, self.unit_width)

    def over_keys(self, units: Tensor) -> Tensor:
        """As ``over_columns``, for the rows of the key and the value projection."""
        return self._over(units, self.key_width)

    def _over(self, units: Tensor, width: int) -> Tensor:
        return units.repeat(width) if self.fixed_heads else units.repeat_interleave(width)

    def by_unit(self, columns: Tensor) -> Tensor:
        """Sorts what belongs to every column ``(a,)`` by units, ``(units, unit_width)``."""
        rows = self.fixed_heads or self.num_units
        grouped: Tensor = columns.unflatten(0, (rows, -1))
        return grouped.T if self.fixed_heads else grouped

    def head_factors(self, mask: Tensor) -> Tensor:
        """The soft mask of every query head for Eq. 7, ``(H,)``, from that of the units.

        A head that loses dimensions fades by their mean, which is the same for all heads.
        """
        if self.fixed_heads:
            return mask.mean().expand(self.fixed_heads)
        return mask.repeat_interleave(self.queries_per_unit)

    def project(
        self,
        hidden: Tensor,
        context: Tensor,
        mask: Tensor | None = None,
        own: Packing | None = None,
        others: Packing | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values, ``(B, heads, N, width)`` each.

        Args:
            hidden: Rows that ask, ``(B, N, D)`` or packed.
            context: Rows that are attended to; ``hidden`` itself if fused.
            mask: Soft mask of the units that multiplies all three (Eq. 2), ``(units,)``.
            own: How ``hidden`` is packed, if it is.
            others: How ``context`` is packed, if it is.
        """
        each = None if mask is None else self.over_keys(mask)
        if len(self.inputs) == 1:
            thrice = None if each is None else each.repeat(3)
            fused = padded(own, masked_linear(self.inputs[0].linear, hidden, thrice))
            parts = fused.unflatten(-1, (3, -1, self.head_width)).permute(2, 0, 3, 1, 4)
            return parts[0], parts[1], parts[2]
        _, key, value = self.inputs
        return (
            self.project_query(hidden, mask, own),
            self.heads(padded(others, masked_linear(key.linear, context, each))),
            self.heads(padded(others, masked_linear(value.linear, context, each))),
        )

    def project_query(
        self, hidden: Tensor, mask: Tensor | None = None, own: Packing | None = None
    ) -> Tensor:
        """Returns the queries alone of a site that is not fused; see ``project``."""
        each = None if mask is None else self.over_columns(mask)
        return self.heads(padded(own, masked_linear(self.inputs[0].linear, hidden, each)))

    def heads(self, rows: Tensor) -> Tensor:
        """Splits rows ``(B, N, heads * width)`` into ``(B, heads, N, width)``."""
        heads: Tensor = rows.unflatten(-1, (-1, self.head_width))
        return heads.transpose(1, 2)


@dataclass(frozen=True)
class FeedForwardSite:
    """The projections of one feed-forward module.

    Attributes:
        name: Unique name, the module path in the dense model.
        mode: The parameter mode that prunes its channels.
        layer: Layer index inside its encoder.
        inputs: First projection, or gate and up projections when gated.
        out: Out-projection.
        activation: The non-linearity; must map 0 to 0.
        token_streams: Streams whose token counts its cost depends on.
    """

    name: str
    mode: PruningMode
    layer: int
    inputs: tuple[LinearRef, ...]
    out: LinearRef
    activation: Callable[[Tensor], Tensor]
    token_streams: frozenset[Stream] = frozenset()

    kind: UnitKind = "channel"
    unit_width: int = 1

    @property
    def num_units(self) -> int:
        """Channels that are physically there."""
        return self.out.linear.in_features

    def by_unit(self, columns: Tensor) -> Tensor:
        """Sorts what belongs to every column ``(c,)`` by units, ``(units, 1)``."""
        return columns.unsqueeze(1)

    def hidden(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the activation that feeds the out-projection, ``(..., c)``.

        Args:
            rows: ``(..., D)``.
            mask: Soft mask before the non-linearity, or of the product when gated, ``(c,)``.
        """
        if len(self.inputs) == 2:
            gate, up = self.inputs
            product: Tensor = self.activation(gate.linear(rows)) * masked_linear(
                up.linear, rows, mask
            )
            return product
        linear = self.inputs[0].linear
        spaced = spaced_linear(linear, rows) if mask is None else None
        if spaced is not None:
            return self.activation(spaced)[..., : linear.out_features]
        return self.activation(masked_linear(linear, rows, mask))


UnitGroup = AttentionSite | FeedForwardSite
"""The units that compete in one module; each loses rows and columns together."""


@dataclass(frozen=True)
class SubLayer:
    """Where a sub-layer's norms and dropout stand: ``after(x + dropout(f(before(x))))``."""

    before: nn.Module | None = None
    after: nn.Module | None = None
    dropout: nn.Module | None = None

    def enter(self, hidden: Tensor) -> Tensor:
        """Applies the norm before the sub-layer, if there is one."""
        entered: Tensor = hidden if self.before is None else self.before(hidden)
        return entered

    def leave(self, hidden: Tensor, output: Tensor) -> Tensor:
        """Adds the residual and applies the norm after it, if there is one."""
        hidden = hidden + (output if self.dropout is None else self.dropout(output))
        left: Tensor = hidden if self.after is None else self.after(hidden)
        return left


@dataclass(frozen=True)
class CrossAttention:
    """Attention to other encoders' rows; several sites run side by side and are combined.

    Attributes:
        sites: One site per context.
        wrap: Norms and residual around the combination.
        combine: Joins the sites' outputs, each ``(B, N, D)``.
        combine_macs: Multiply-adds of ``combine`` per token.
    """

    sites: tuple[AttentionSite, ...]
    wrap: SubLayer
    combine: Callable[[list[Tensor]], Tensor] | None = None
    combine_macs: int = 0


@dataclass(frozen=True)
class Block:
    """One layer of an encoder or decoder.

    Attributes:
        encoder: Name of the encoder it belongs to, for reports.
        stream: The stream of tokens that runs through it.
        layer: Layer index.
        attention: Its self-attention.
        attention_wrap: Norms around it.
        feed_forward: Its feed-forward layer.
        feed_forward_wrap: Norms around it.
        cross: Its cross-attention, if any.
        drops_tokens: Whether tokens may be dropped here; only then are they scored.
        boundary: ``None``: tokens drop between attention and feed-forward by a relative
            threshold. A number s: they do not, and if s is at least 1, ``(1 - theta)^s`` of each
            stream's original tokens go on behind the layer (theta is clamped to 1).
        mixed: The streams that share the sequence, if there is more than one.
    """

    encoder: str
    stream: Stream
    layer: int
    attention: AttentionSite
    attention_wrap: SubLayer
    feed_forward: FeedForwardSite
    feed_forward_wrap: SubLayer
    cross: CrossAttention | None = None
    drops_tokens: bool = True
    boundary: int | None = None
    mixed: frozenset[Stream] = frozenset()

    @property
    def streams(self) -> frozenset[Stream]:
        """The streams of tokens that run through it."""
        return self.mixed or frozenset({self.stream})

    def groups(self) -> Iterator[UnitGroup]:
        """Yields the block's unit groups."""
        yield from self.parts().values()

    def parts(self) -> dict[str, UnitGroup]:
        """Returns the block's unit groups by what they are in it, in forward order."""
        sites = self.cross.sites if self.cross else ()
        names = ["cross"] if len(sites) == 1 else [f"cross{i}" for i in range(len(sites))]
        cross = dict(zip(names, sites, strict=True))
        return {"heads": self.attention, **cross, "channels": self.feed_forward}
