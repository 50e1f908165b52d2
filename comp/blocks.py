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

A padded row of a hidden state is exactly zero from the first token selection on. That is how a
later cross-attention, even after the stock code has repeated rows for beam search, knows which
rows are real.

Where several streams share one causal sequence (``Mixture``), tokens drop behind whole layers
instead, a fixed share at each boundary. A padded row's rotation and with it its key is exactly
zero there, which is how later decoding steps know the real rows of every layer's own cache.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from comp import cost
from comp.importance import token_importance, token_weights
from comp.madtp import aligned_importance, keep_aligned, seen_by_table
from comp.mixture import Mixture, causal_mask
from comp.modes import PruningMode, Stream
from comp.tokens import Selection, keep_above, select, select_count

if TYPE_CHECKING:
    from comp.handle import PruningHandle


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
        mode: The parameter mode that prunes its heads.
        layer: Layer index inside its encoder.
        inputs: Query, key and value projections, or one fused ``q | k | v``, head-major inside.
        out: Out-projection.
        head_dim: Width of one head; never changes.
        scale: Factor on the logits; never changes.
        queries_per_unit: Query heads that share one key/value head (1 without grouping).
        dropout: Probability of attention dropout while training.
        token_streams: Streams whose token counts its cost depends on.
        rotate: Turns queries and keys by ``TokenState.rotary``: ``(q, k, cos, sin) -> (q, k)``.
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

    kind: Literal["head", "channel"] = "head"

    @property
    def unit_width(self) -> int:
        """Columns of the out-projection that belong to one unit."""
        return self.head_dim * self.queries_per_unit

    @property
    def num_units(self) -> int:
        """Heads (or key/value groups) that are physically there."""
        return self.out.linear.in_features // self.unit_width

    def project(self, hidden: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values, each ``(B, heads, N, head_dim)``."""
        if len(self.inputs) == 1:
            fused = self.inputs[0].linear(hidden)
            parts = fused.unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
            return parts[0], parts[1], parts[2]
        query, key, value = self.inputs
        return (
            self._heads(query.linear(hidden)),
            self._heads(key.linear(context)),
            self._heads(value.linear(context)),
        )

    def _heads(self, rows: Tensor) -> Tensor:
        heads: Tensor = rows.unflatten(-1, (-1, self.head_dim))
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

    kind: Literal["head", "channel"] = "channel"
    unit_width: int = 1

    @property
    def num_units(self) -> int:
        """Channels that are physically there."""
        return self.out.linear.in_features

    def hidden(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the activation that feeds the out-projection, ``(B, N, c)``."""
        if len(self.inputs) == 2:
            gate, up = self.inputs
            product: Tensor = self.activation(gate.linear(rows)) * up.linear(rows)
            return product if mask is None else product * mask.to(product.dtype)
        before = self.inputs[0].linear(rows)
        masked = before if mask is None else before * mask.to(before.dtype)
        activated: Tensor = self.activation(masked)
        return activated


UnitGroup = AttentionSite | FeedForwardSite
"""A set of heads or channels that compete in one module; each loses rows and columns together."""


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


@dataclass
class TokenState:
    """The tokens that run through an encoder.

    Attributes:
        hidden: ``(B, N, D)``.
        valid: True for real tokens, ``(B, N)``; ``None`` means all.
        pooled: The token that stands for the sample (class token), ``(B, N)``; ``None``: none.
        protected: Tokens that are never dropped (pooled ones included), ``(B, N)``.
        bias: Additive or bool attention mask ``(B or 1, 1, Nq, Nk)`` beyond padding. A bool one
            that is shorter than the cached keys is extended by the real ones among them.
        cache: Key/value cache of a decoder, as the stock code passes it.
        rotary: Cosines and sines for ``AttentionSite.rotate``, ``(B, N, d)`` each.
        mixture: Which rows belong to which stream, if several share the sequence and its tokens
            may drop.
        logits: Products of the rows with MADTP's alignment tokens, ``(B, N, T)``.
        features: What these tokens have gathered in the layers so far, ``(B, T, D)``.
        origins: Where every row stood at first, -1 for a summary, ``(B, N)``; kept while a
            ``TokenTrace`` asks for it.
    """

    hidden: Tensor
    valid: Tensor | None = None
    pooled: Tensor | None = None
    protected: Tensor | None = None
    bias: Tensor | None = None
    cache: Any = None
    rotary: tuple[Tensor, Tensor] | None = None
    mixture: Mixture | None = None
    logits: Tensor | None = None
    features: Tensor | None = None
    origins: Tensor | None = None

    def flags(self, mask: Tensor | None, default: bool) -> Tensor:
        """Returns a mask as a tensor ``(B, N)``, filled with ``default`` if it is ``None``."""
        if mask is not None:
            return mask
        shape = self.hidden.shape[:2]
        return torch.full(shape, default, dtype=torch.bool, device=self.hidden.device)


@dataclass
class _Held:
    site: FeedForwardSite
    activation: Tensor


def real_rows(rows: Tensor) -> Tensor:
    """True where a row is a real token: padding is exactly zero. ``(B, N, D)`` to ``(B, N)``."""
    return (rows != 0).any(dim=-1)


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
    handle: "PruningHandle",
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
    valid_contexts = [real_rows(rows) for rows in contexts]
    held: _Held | None = None
    _begin_trace(handle, blocks[0], state)
    for block in blocks:
        run = partial(_run_block, handle, block, contexts=contexts, valid_contexts=valid_contexts)
        if _recomputes(handle, state):
            state, held = _run_again_later(run, state)
        else:
            state, held = run(state, held)
        if handle.trace is not None and state.origins is not None:
            handle.trace.note(block.layer, state.origins, state.valid)
    alignment = handle.alignment
    if alignment is not None and state.features is not None:
        alignment.note(blocks[0].encoder, blocks[0].stream, state.features)
    if state.valid is not None:
        state.hidden = state.hidden * state.valid.unsqueeze(-1).to(state.hidden.dtype)
    return state


def _begin_trace(handle: "PruningHandle", block: Block, state: TokenState) -> None:
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


def _recomputes(handle: "PruningHandle", state: TokenState) -> bool:
    """Whether to checkpoint: never where a second pass would count or store things twice."""
    collects = handle.statistics is not None or handle.meter is not None
    plain = not collects and state.cache is None
    return handle.recompute and handle.model.training and torch.is_grad_enabled() and plain


def _run_again_later(
    run: Callable[[TokenState, None], tuple[TokenState, _Held | None]], state: TokenState
) -> tuple[TokenState, _Held | None]:
    """Runs a block now without keeping its activations, and once more in the backward pass."""

    def fresh(hidden: Tensor) -> tuple[TokenState, _Held | None]:
        return run(replace(state, hidden=hidden), None)

    result: tuple[TokenState, _Held | None] = checkpoint(fresh, state.hidden, use_reentrant=False)
    return result


def _run_block(
    handle: "PruningHandle",
    block: Block,
    state: TokenState,
    held: _Held | None,
    contexts: Sequence[Tensor],
    valid_contexts: Sequence[Tensor],
) -> tuple[TokenState, _Held | None]:
    drops = _drops(handle, block, state)
    statistics = handle.statistics
    scored = drops or (_can_score(block, state) and statistics is not None and handle.switches.cip)

    if block.drops_tokens and block.boundary is None:
        _align(handle, block, state, scored=scored)
    context, scores = _self_attention(handle, block, state, need_scores=scored)
    if statistics is not None:
        weights = _row_weights(handle, state, scores)
        statistics.add(block.attention.name, context, weights)
        if held is not None:
            statistics.add(held.site.name, held.activation, weights)
    output = block.attention.out.linear(context)
    state.hidden = block.attention_wrap.leave(state.hidden, output)

    if drops and block.boundary is None and scores is not None:
        state, scores = _drop_tokens(handle, block, state, scores)
    counts = cost.token_counts(state.valid, state.hidden)

    weights = None if statistics is None else _row_weights(handle, state, scores)
    if block.cross is not None and contexts:
        _cross_attend(handle, block.cross, state, contexts, valid_contexts, weights)

    rows = block.feed_forward_wrap.enter(state.hidden)
    site = block.feed_forward
    if handle.meter is not None and not handle.meter.paused:
        one = cost.feed_forward_macs(counts, rows.shape[-1], 1, len(site.inputs) + 1)
        _count_units(handle.meter, site, state, counts, one)
    activation = site.hidden(rows, handle.masks.get(site.name))
    output = site.out.linear(activation)
    state.hidden = block.feed_forward_wrap.leave(state.hidden, output)
    held = None
    if statistics is not None:
        if block.drops_tokens and block.layer != handle.last_layer(block.encoder):
            held = _Held(site, activation.detach())
        else:
            statistics.add(site.name, activation, weights)
    if drops and block.boundary and scores is not None:
        state, held = _drop_behind(handle, block.boundary, state, scores, held)
    if handle.meter is not None and not handle.meter.paused:
        _count_tokens(handle.meter, block, state)
    return state, held


def _align(handle: "PruningHandle", block: Block, state: TokenState, *, scored: bool) -> None:
    """Shows the rows that enter a layer to MADTP's alignment tokens, if the model has them."""
    table, state.logits = handle.alignment, None
    if table is None or not (scored or handle.model.training):
        return
    mapped = table.map(state.hidden, block.stream)
    state.logits = table.logits(mapped)
    if handle.model.training:
        seen = seen_by_table(mapped, state.logits, state.flags(state.valid, default=True))
        state.features = seen if state.features is None else state.features + seen
    if handle.meter is not None and not handle.meter.paused:
        tokens = int(cost.token_counts(state.valid, state.hidden).sum())
        handle.meter.add_fixed(table.macs(tokens, block.stream))


def _can_score(block: Block, state: TokenState) -> bool:
    """Whether the block's tokens have scores: mixed ones only while their prompt is read."""
    return block.drops_tokens and (not block.mixed or state.mixture is not None)


def _drops(handle: "PruningHandle", block: Block, state: TokenState) -> bool:
    count = handle.static_count(block)
    if count is not None:
        return state.hidden.shape[1] > count
    return (
        block.boundary != 0
        and _can_score(block, state)
        and any(handle.thresholds.get(stream, 0.0) > 0 for stream in block.streams)
    )


def _count_units(
    meter: cost.Meter, site: UnitGroup, state: TokenState, counts: Tensor, one: Tensor
) -> None:
    """Counts what one unit costs, and how much of it each of several streams brings about."""
    meter.add_units(site.name, one)
    if state.mixture is not None:
        for stream, rows in state.mixture.droppable.items():
            meter.add_shared(
                site.name, stream, one.double() * rows.sum(dim=1) / counts.clamp(min=1)
            )


def _count_tokens(meter: cost.Meter, block: Block, state: TokenState) -> None:
    counts = cost.token_counts(state.valid, state.hidden)
    meter.add_tokens(block.encoder, block.layer, counts)
    if state.mixture is not None:
        for stream, rows in state.mixture.droppable.items():
            meter.add_tokens(f"{block.encoder}_{stream}", block.layer, rows.sum(dim=1))


def _self_attention(
    handle: "PruningHandle", block: Block, state: TokenState, *, need_scores: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns the context ``(B, N, a)`` and, if asked for, token scores ``(B, N)``."""
    site = block.attention
    rows = block.attention_wrap.enter(state.hidden)
    query, key, value = _apply_head_mask(handle, site, site.project(rows, rows))
    if site.rotate is not None and state.rotary is not None:
        query, key = site.rotate(query, key, *state.rotary)
    if state.cache is not None:
        key, value = _cached(state.cache, site.layer, key, value, cross=False)
    bias = state.bias if state.bias is not None else _key_mask(state.valid)
    bias = _with_cached(bias, key)
    mixture = state.mixture if need_scores else None
    explicit = need_scores and mixture is None
    context, probabilities = attend(
        site, query, key, value, bias, training=handle.model.training, explicit=explicit
    )
    context = _scale_context(handle, site, context)
    if handle.meter is not None and not handle.meter.paused:
        counts = cost.token_counts(state.valid, rows)
        keys = counts if state.cache is None else _visible_keys(bias, key)
        one = cost.self_attention_macs(
            counts, keys, rows.shape[-1], site.unit_width, site.head_dim
        )
        if mixture is not None and _drops(handle, block, state):
            one = one + mixture.voters.sum(dim=1) * keys * site.unit_width
        _count_units(handle.meter, site, state, counts, one)
    mask = handle.head_mask(site) if handle.switches.cit else None
    if mixture is not None:
        valid = state.flags(state.valid, default=True)
        return context, mixture.scores(query, key, site.scale, valid, mask)
    if probabilities is None:
        return context, None
    if state.logits is not None:
        valid = state.flags(state.valid, default=True)
        protected = state.flags(state.protected, default=False)
        return context, aligned_importance(
            probabilities, context, state.logits, valid, protected, state.pooled, mask
        )
    return context, token_importance(probabilities, mask, state.valid, state.protected)


def attend(
    site: AttentionSite,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    *,
    training: bool,
    explicit: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attends; the probabilities are formed only when somebody needs them.

    Args:
        site: Scale and dropout.
        query: ``(B, H, Nq, d)``.
        key: ``(B, H / group, Nk, d)``.
        value: As ``key``.
        bias: Additive (float) or keep (bool) mask, broadcastable to ``(B, H, Nq, Nk)``.
        training: Whether dropout acts.
        explicit: Form the probabilities instead of using the fused kernel.

    Returns:
        The context ``(B, Nq, H * d)`` and the probabilities before dropout
        ``(B, H, Nq, Nk)`` or ``None``.
    """
    if site.queries_per_unit > 1:
        key = key.repeat_interleave(site.queries_per_unit, dim=1)
        value = value.repeat_interleave(site.queries_per_unit, dim=1)
    dropout = site.dropout if training else 0.0
    if not explicit:
        if bias is not None and bias.is_floating_point():
            bias = bias.to(query.dtype)
        context = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=dropout, scale=site.scale
        )
        return context.transpose(1, 2).flatten(2), None
    logits = torch.matmul(query, key.transpose(-1, -2)) * site.scale
    if bias is not None:
        lowest = torch.finfo(logits.dtype).min
        logits = logits + bias if bias.is_floating_point() else logits.masked_fill(~bias, lowest)
    probabilities = torch.softmax(logits.float(), dim=-1)
    weights = F.dropout(probabilities, dropout, training).to(value.dtype)
    return torch.matmul(weights, value).transpose(1, 2).flatten(2), probabilities


def _with_cached(bias: Tensor | None, key: Tensor) -> Tensor | None:
    """Extends a bool mask over new rows by the real ones among the cached keys."""
    if bias is None or bias.dtype != torch.bool or bias.shape[-1] >= key.shape[2]:
        return bias
    past = key[:, :, : key.shape[2] - bias.shape[-1]].transpose(1, 2).flatten(2)
    real = real_rows(past)[:, None, None, :].expand(-1, -1, bias.shape[2], -1)
    return torch.cat([real, bias.expand(real.shape[0], -1, -1, -1)], dim=-1)


def _visible_keys(bias: Tensor | None, key: Tensor) -> Tensor:
    """Keys that the last query attends to, ``(B,)`` int64, of keys ``(B, H, Nk, d)``."""
    if bias is None:
        return torch.full((key.shape[0],), key.shape[2], device=key.device)
    last = bias[:, 0, -1]
    visible = last if last.dtype == torch.bool else last == 0
    return visible.sum(dim=1).expand(key.shape[0])


def _key_mask(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid[:, None, None, :]


def _apply_head_mask(
    handle: "PruningHandle", site: AttentionSite, heads: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Multiplies q, k and v by the head mask (Eq. 2) unless the mask sits on the context."""
    mask = handle.masks.get(site.name)
    if mask is None or handle.mask_site == "context":
        return heads
    query, key, value = heads
    mask = mask.to(device=query.device, dtype=query.dtype)
    per_query = mask.repeat_interleave(site.queries_per_unit)
    return query * per_query[:, None, None], key * mask[:, None, None], value * mask[:, None, None]


def _scale_context(handle: "PruningHandle", site: AttentionSite, context: Tensor) -> Tensor:
    mask = handle.masks.get(site.name)
    if mask is None or handle.mask_site == "qkv":
        return context
    return context * mask.to(device=context.device, dtype=context.dtype).repeat_interleave(
        site.unit_width
    )


def _row_weights(
    handle: "PruningHandle", state: TokenState, scores: Tensor | None
) -> Tensor | None:
    """Returns the weights of Eq. 4 for the rows of ``state``, or ones over real rows (Eq. 3)."""
    if not handle.switches.cip:
        return None if state.valid is None else state.valid.float()
    valid = state.flags(state.valid, default=True).float()
    uniform = valid / valid.sum(dim=1, keepdim=True).clamp(min=1)
    if scores is None:
        return uniform
    pooled = state.flags(state.pooled, default=False)
    weights = token_weights(scores, pooled) * valid
    if state.mixture is None:
        return weights
    return torch.where(scores.sum(dim=1, keepdim=True) > 0, weights, uniform)


def _drop_tokens(
    handle: "PruningHandle", block: Block, state: TokenState, scores: Tensor
) -> tuple[TokenState, Tensor]:
    threshold = handle.thresholds.get(block.stream, 0.0)
    valid = state.flags(state.valid, default=True)
    protected = state.flags(state.protected, default=False)
    merge = handle.merges(block.stream)
    count = handle.static_count(block)
    if count is not None:
        selection = select_count(count, scores, valid, protected, merge=merge)
        return gather_state(state, selection), selection.gather_scores(scores)
    fewest = handle.min_tokens[block.stream]
    if state.logits is not None:
        keep = keep_aligned(scores, state.logits, threshold, valid, protected, fewest)
    else:
        keep = keep_above(scores, threshold, valid, protected, fewest)
    selected = select(keep, scores, valid, merge=merge)
    if selected is None:
        return state, scores
    return gather_state(state, selected), selected.gather_scores(scores)


def _drop_behind(
    handle: "PruningHandle",
    boundary: int,
    state: TokenState,
    scores: Tensor,
    held: _Held | None,
) -> tuple[TokenState, _Held | None]:
    """Drops tokens of every stream of a mixed sequence behind a layer, the held rows with them.

    Raises:
        ValueError: If dropped tokens are to be merged.
    """
    if handle.merge == "summary":
        raise ValueError("a causal stream cannot merge tokens; set merge='drop'")
    mixture = state.mixture
    assert mixture is not None
    valid = state.flags(state.valid, default=True)
    keep = mixture.keep(scores, valid, handle.thresholds, handle.min_tokens, boundary)
    selection = select(keep, scores, valid, merge=False)
    if selection is None:
        return state, held
    state = gather_state(replace(state, bias=None), selection)
    state.bias = causal_mask(state.hidden.shape[1], state.valid, state.hidden.device)
    if held is not None:
        held = _Held(held.site, selection.gather(held.activation))
    return state, held


def gather_state(state: TokenState, selection: Selection) -> TokenState:
    """Applies a selection to everything that runs with the tokens."""
    return TokenState(
        hidden=selection.gather(state.hidden),
        valid=selection.all_valid,
        pooled=None if state.pooled is None else selection.gather_flags(state.pooled),
        protected=None if state.protected is None else selection.gather_flags(state.protected),
        bias=None if state.bias is None else _gather_bias(state.bias, selection),
        cache=state.cache,
        rotary=None if state.rotary is None else _gather_rotary(state.rotary, selection),
        mixture=None if state.mixture is None else state.mixture.gather(selection),
        features=state.features,
        origins=None if state.origins is None else selection.gather_origins(state.origins),
    )


def _gather_rotary(rotary: tuple[Tensor, Tensor], selection: Selection) -> tuple[Tensor, Tensor]:
    cosines, sines = rotary
    return selection.gather(cosines), selection.gather(sines)


def _gather_bias(bias: Tensor, selection: Selection) -> Tensor:
    """Gathers rows and columns of a mask ``(B or 1, 1, N, N)``, padding its own keys out.

    A bool mask ``(B or 1, 1, 1, N)`` is the same for every query; it may have a summary token.

    Raises:
        ValueError: If a summary token would need a row of its own.
    """
    index = selection.index
    batch, kept = index.shape
    bias = bias.expand(batch, *bias.shape[1:])
    if bias.shape[2] == 1 and bias.dtype == torch.bool:
        visible = bias[:, 0, 0].gather(1, index) & selection.valid
        return torch.cat([visible, selection.all_valid[:, kept:]], dim=1)[:, None, None, :]
    if selection.summary_weight is not None:
        raise ValueError("a causal stream cannot merge tokens; set merge='drop'")
    rows = index[:, None, :, None].expand(-1, bias.shape[1], -1, bias.shape[3])
    bias = bias.gather(2, rows)
    bias = bias.gather(3, index[:, None, None, :].expand(-1, bias.shape[1], kept, -1))
    keys = selection.valid[:, None, None, :]
    if bias.is_floating_point():
        return bias.masked_fill(~keys, torch.finfo(bias.dtype).min)
    return bias & keys


def _cross_attend(
    handle: "PruningHandle",
    cross: CrossAttention,
    state: TokenState,
    contexts: Sequence[Tensor],
    valid_contexts: Sequence[Tensor],
    weights: Tensor | None,
) -> None:
    rows = cross.wrap.enter(state.hidden)
    outputs = []
    for site, context, valid in zip(cross.sites, contexts, valid_contexts, strict=True):
        query, key, value = _cross_heads(handle, site, rows, context, state.cache)
        mixed, _ = attend(
            site,
            query,
            key,
            value,
            _key_mask(valid),
            training=handle.model.training,
            explicit=False,
        )
        mixed = _scale_context(handle, site, mixed)
        if handle.statistics is not None:
            handle.statistics.add(site.name, mixed, weights)
        outputs.append(site.out.linear(mixed))
        if handle.meter is not None and not handle.meter.paused:
            queries = cost.token_counts(state.valid, rows)
            one = cost.cross_attention_macs(
                queries, valid.sum(dim=1), rows.shape[-1], context.shape[-1], site.unit_width
            )
            handle.meter.add_units(site.name, one)
    output = outputs[0] if cross.combine is None else cross.combine(outputs)
    if handle.meter is not None and not handle.meter.paused and cross.combine_macs:
        tokens = int(cost.token_counts(state.valid, rows).sum())
        handle.meter.add_fixed(tokens * cross.combine_macs)
    state.hidden = cross.wrap.leave(state.hidden, output)


def _cross_heads(
    handle: "PruningHandle", site: AttentionSite, rows: Tensor, context: Tensor, cache: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Projects queries, and keys and values once per generated sequence."""
    if cache is not None and cache.is_updated.get(site.layer):
        query = site.inputs[0].linear(rows).unflatten(-1, (-1, site.head_dim)).transpose(1, 2)
        stored = cache.cross_attention_cache.layers[site.layer]
        query, _, _ = _apply_head_mask(handle, site, (query, query, query))
        return query, stored.keys, stored.values
    query, key, value = _apply_head_mask(handle, site, site.project(rows, context))
    if cache is not None:
        key, value = _cached(cache, site.layer, key, value, cross=True)
    return query, key, value


def _cached(
    cache: Any, layer: int, key: Tensor, value: Tensor, *, cross: bool
) -> tuple[Tensor, Tensor]:
    """Appends to the stock cache and returns everything it holds for the layer."""
    if cross:
        pair = cache.cross_attention_cache.update(key, value, layer)
        cache.is_updated[layer] = True
    else:
        part = getattr(cache, "self_attention_cache", cache)
        pair = part.update(key, value, layer)
    key, value = pair
    return key, value
