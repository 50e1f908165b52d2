"""The one forward pass that all families share: masks, statistics, token dropping, counting.

A family describes its layers as ``Block``s that point at the stock modules; ``run_blocks`` runs
them. Data flow in one layer, with the paper's Eq. 5 in the two marked lines:

    attention with head masks          -> probabilities A, context
    token scores from A                (only if tokens are dropped or statistics collected)
    statistics of this attention       <- this layer's scores          (Eq. 5)
    statistics of the FFN below        <- this layer's scores, too     (Eq. 5)
    token selection, gather
    cross-attention                    statistics with the gathered scores
    feed-forward with channel masks    its activation waits for the next layer's scores

Inside, samples of different lengths are packed (``comp.packing``). A padded row of what leaves is
exactly zero. That is how a later cross-attention, even after the stock code has repeated rows for
beam search, knows which rows are real.

Where several streams share one causal sequence (``Mixture``), tokens drop behind whole layers
instead, a fixed share at each boundary. A padded row's rotation and with it its key is exactly
zero there, which is how later decoding steps know the real rows of every layer's own cache.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from comp.attention import self_attention
from comp.cross_attention import Context, cross_attend_, read_context
from comp.dropping import can_score, drop_behind, drop_tokens, drops_tokens, row_weights
from comp.handle import PruningHandle
from comp.madtp import seen_by_table
from comp.metering import active_meter, count_feed_forward, count_tokens
from comp.modes import Stream
from comp.sites import Block, FeedForwardSite
from comp.token_state import TokenState


@dataclass
class _Held:
    site: FeedForwardSite
    activation: Tensor


@contextmanager
def unmetered(model: nn.Module) -> Iterator[None]:
    """Runs forward passes that deployment would not run: neither counted nor collected."""
    handle = getattr(model, "pruning", None)
    if handle is None:
        yield
        return
    before = handle.meter, handle.statistics
    handle.statistics = None
    if handle.meter is not None:
        handle.meter.paused = True
    try:
        yield
    finally:
        handle.meter, handle.statistics = before
        if handle.meter is not None:
            handle.meter.paused = False


def run_blocks(
    handle: PruningHandle,
    blocks: Sequence[Block],
    state: TokenState,
    contexts: Sequence[Tensor] = (),
) -> TokenState:
    """Runs an encoder's layers under the handle's masks and thresholds.

    Args:
        handle: Masks, thresholds, collectors.
        blocks: The layers, in order.
        state: The tokens that enter.
        contexts: What the cross-attention sites attend to, one ``(B, N_v, D_v)`` each; padded
            rows are zero.

    Returns:
        The tokens that leave; padded rows are zero if any token was dropped.
    """
    if not (torch.compiler.is_compiling() or handle.static_tokens):
        state.pack_padding_away()
    read = [read_context(rows) for rows in contexts]
    held: _Held | None = None
    _begin_trace(handle, blocks[0], state)
    for block in blocks:
        run = partial(_run_or_run_again, handle, block)
        part = None if handle.sharding is None else handle.sharding.part_of(block)
        if part is None:
            state, held = run(state, held, read)
        else:
            state, held = part(partial(_run_in_part, run), state, held, read)
        if handle.trace is not None and state.origins is not None:
            handle.trace.note(block.layer, state.origins, state.valid)
    alignment = handle.alignment
    if alignment is not None and state.features is not None:
        alignment.note(blocks[0].encoder, blocks[0].stream, state.features)
    state.pad_again()
    return state


def _begin_trace(handle: PruningHandle, block: Block, state: TokenState) -> None:
    """Says where the patches stand, if they run through these blocks and somebody asks."""
    if handle.trace is None or Stream.VISION not in block.streams:
        return
    if state.mixture is not None:
        patches = state.mixture.droppable[Stream.VISION]
    elif not block.mixed:
        patches = ~state.flags(state.protected, default=False)
    else:
        return  # a decoding step: its prompt has been read
    rows = torch.arange(patches.shape[1], device=patches.device)
    state.origins = rows.expand_as(patches)
    handle.trace.begin(block.encoder, patches)


def _recomputes(handle: PruningHandle, state: TokenState) -> bool:
    """Whether to checkpoint: never where a second pass would count or store things twice."""
    collects = handle.statistics is not None or handle.meter is not None
    plain = not collects and state.cache is None
    return handle.recompute and handle.model.training and torch.is_grad_enabled() and plain


def _run_or_run_again(
    handle: PruningHandle,
    block: Block,
    state: TokenState,
    held: _Held | None,
    contexts: Sequence[Context],
) -> tuple[TokenState, _Held | None]:
    """Runs a block; with checkpoints without keeping activations, and again in the backward."""
    if not _recomputes(handle, state):
        return _run_block(handle, block, state, held, contexts)

    def fresh(hidden: Tensor) -> tuple[TokenState, _Held | None]:
        return _run_block(handle, block, replace(state, hidden=hidden), None, contexts)

    result: tuple[TokenState, _Held | None] = checkpoint(fresh, state.hidden, use_reentrant=False)
    return result


def _run_in_part(
    run: Callable[..., tuple[TokenState, _Held | None]],
    state: TokenState,
    held: _Held | None,
    contexts: Sequence[Context],
) -> tuple[TokenState, _Held | None]:
    """Runs a block inside of what gathers its weights, which hooks into no views."""
    state, held = run(state, held, contexts)
    if state.hidden._is_view():
        state.hidden = state.hidden.clone()
    return state, held


def _run_block(
    handle: PruningHandle,
    block: Block,
    state: TokenState,
    held: _Held | None,
    contexts: Sequence[Context],
) -> tuple[TokenState, _Held | None]:
    drops = drops_tokens(handle, block, state)
    statistics = handle.statistics
    scored = drops or (can_score(block, state) and statistics is not None and handle.switches.cip)
    if block.drops_tokens and block.boundary is None:
        _align(handle, block, state, scored=scored)
    context, scores = self_attention(handle, block, state, need_scores=scored)
    if statistics is not None:
        weights = row_weights(handle, state, scores)
        statistics.add(block.attention.name, state.pad(context), weights)
        if held is not None:
            statistics.add(held.site.name, state.pad(held.activation), weights)
    output = _leave_out(handle, block, state, block.attention.out.linear(context))
    state.hidden = block.attention_wrap.leave(state.hidden, output)
    if drops and block.boundary is None and scores is not None:
        state, scores = drop_tokens(handle, block, state, scores)
    weights = None if statistics is None else row_weights(handle, state, scores)
    if block.cross is not None and contexts:
        cross_attend_(handle, block.cross, state, contexts, weights)
    held = _feed_forward(handle, block, state, weights)
    if drops and block.boundary and scores is not None:
        activation = None if held is None else held.activation
        state, activation = drop_behind(handle, block.boundary, state, scores, activation)
        held = None if held is None or activation is None else _Held(held.site, activation)
    meter = active_meter(handle)
    if meter is not None:
        count_tokens(meter, block, state)
    return state, held


def _feed_forward(
    handle: PruningHandle, block: Block, state: TokenState, weights: Tensor | None
) -> _Held | None:
    """Runs the feed-forward layer; its activation, if wanted, may wait for the next scores."""
    site, statistics, meter = block.feed_forward, handle.statistics, active_meter(handle)
    if meter is not None:
        count_feed_forward(meter, site, state)
    activation = site.hidden(
        block.feed_forward_wrap.enter(state.hidden), handle.masks.get(site.name)
    )
    output = _leave_out(handle, block, state, site.out.linear(activation))
    state.hidden = block.feed_forward_wrap.leave(state.hidden, output)
    if statistics is None:
        return None
    if block.drops_tokens and block.layer != handle.last_layer(block.encoder):
        return _Held(site, activation.detach())
    statistics.add(site.name, state.pad(activation), weights)
    return None


def _leave_out(handle: PruningHandle, block: Block, state: TokenState, output: Tensor) -> Tensor:
    """Leaves an image layer's sub-layer out for some samples while training (stochastic depth).

    Source: arXiv 1603.09382, its linear rule; what stays is scaled up so that means stay.
    """
    last = handle.last_layer(block.encoder)
    rate = handle.drop_path * block.layer / max(last, 1)
    if not handle.model.training or rate <= 0 or block.streams != {Stream.VISION}:
        return output
    batch, length = state.shape
    stays = (torch.rand(batch, device=output.device) >= rate).to(output.dtype) / (1 - rate)
    if state.packing is not None:
        return output * stays[state.packing.places // length].unsqueeze(-1)
    return output * stays[:, None, None]


def _align(handle: PruningHandle, block: Block, state: TokenState, *, scored: bool) -> None:
    """Shows the rows that enter a layer to MADTP's alignment tokens, if the model has them."""
    table, state.logits = handle.alignment, None
    if table is None or not (scored or handle.model.training):
        return
    mapped = table.map(state.pad(state.hidden), block.stream)
    state.logits = table.logits(mapped)
    if handle.model.training:
        seen = seen_by_table(mapped, state.logits, state.flags(state.valid, default=True))
        state.features = seen if state.features is None else state.features + seen
    meter = active_meter(handle)
    if meter is not None:
        meter.add_fixed(table.macs(int(state.counts().sum()), block.stream))
