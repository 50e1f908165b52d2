"""What a layer tells the meter: the cost of one unit of each of its groups, and its tokens."""

from torch import Tensor

from comp import cost
from comp.handle import PruningHandle
from comp.sites import AttentionSite, Block, CrossAttention, FeedForwardSite
from comp.token_state import TokenState


def active_meter(handle: PruningHandle) -> cost.Meter | None:
    """The meter, if one counts now."""
    meter = handle.meter
    return None if meter is None or meter.paused else meter


def count_self_attention(
    meter: cost.Meter, site: AttentionSite, state: TokenState, visible: Tensor, *, voters: bool
) -> None:
    """Counts a self-attention, with its ranking of mixed tokens if ``voters``.

    Args:
        meter: Counts.
        site: The attention.
        state: The tokens that enter it.
        visible: Keys that the last query of every sample attends to, ``(B,)``.
        voters: Whether the voters' attention is formed once more.
    """
    counts = state.counts()
    keys = counts if state.cache is None else visible
    one = cost.self_attention_macs(
        counts, keys, state.hidden.shape[-1], site.unit_width, site.key_width
    )
    if voters and state.mixture is not None:
        one = one + state.mixture.voters.sum(dim=1) * keys * site.unit_width
    _count_units(meter, site.name, state, counts, one)


def count_cross_attention(
    meter: cost.Meter, site: AttentionSite, state: TokenState, keys: Tensor, width: int
) -> None:
    """Counts a cross-attention to ``keys`` real rows per sample, ``(B,)``, of a width."""
    one = cost.cross_attention_macs(
        state.counts(), keys, state.hidden.shape[-1], width, site.unit_width
    )
    meter.add_units(site.name, one)


def count_combination(meter: cost.Meter, cross: CrossAttention, state: TokenState) -> None:
    """Counts what joins several cross-attentions."""
    if cross.combine_macs:
        meter.add_fixed(int(state.counts().sum()) * cross.combine_macs)


def count_feed_forward(meter: cost.Meter, site: FeedForwardSite, state: TokenState) -> None:
    """Counts a feed-forward layer."""
    counts = state.counts()
    one = cost.feed_forward_macs(counts, state.hidden.shape[-1], 1, len(site.inputs) + 1)
    _count_units(meter, site.name, state, counts, one)


def count_tokens(meter: cost.Meter, block: Block, state: TokenState) -> None:
    """Notes how many tokens leave a layer."""
    meter.add_tokens(block.encoder, block.layer, state.counts())
    if state.mixture is not None:
        for stream, rows in state.mixture.droppable.items():
            meter.add_tokens(f"{block.encoder}_{stream}", block.layer, rows.sum(dim=1))


def _count_units(
    meter: cost.Meter, name: str, state: TokenState, counts: Tensor, one: Tensor
) -> None:
    """Counts what one unit costs, and how much of it each of several streams brings about."""
    meter.add_units(name, one)
    if state.mixture is not None:
        for stream, rows in state.mixture.droppable.items():
            meter.add_shared(name, stream, one.double() * rows.sum(dim=1) / counts.clamp(min=1))
