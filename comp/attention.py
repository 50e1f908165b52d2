"""Attention of one layer: the fused kernel, or by hand where token scores need probabilities.

Eq. 6 takes a maximum over heads for every pair of tokens, which no fused kernel gives. It is
formed for a few samples or queries at a time, so that no ``(B, H, N, N)`` is ever held; without
gradients the same probabilities give the context, and with gradients the fused kernel does, as
its backward pass needs no probabilities either.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from comp import kv_cache
from comp.dropping import drops_tokens
from comp.handle import PruningHandle
from comp.importance import mean_votes, normalise_scores, strongest_heads, vote_sums
from comp.madtp import aligned_importance
from comp.metering import active_meter, count_self_attention
from comp.sites import AttentionSite, Block
from comp.token_state import TokenState

_CACHED_NUMBERS = 2**20
"""Attention probabilities formed at a time on a CPU: what its caches hold."""
_DEVICE_NUMBERS = 2**27
"""The same on an accelerator, which wants large pieces."""


def self_attention(
    handle: PruningHandle, block: Block, state: TokenState, *, need_scores: bool
) -> tuple[Tensor, Tensor | None]:
    """Runs a layer's self-attention up to the out-projection.

    Args:
        handle: Masks and meter.
        block: The layer.
        state: The tokens that enter it.
        need_scores: Whether to score tokens.

    Returns:
        The context, which stands like ``state.hidden``, ``(..., a)``, and, if asked for, token
        scores ``(B, N)``.
    """
    site = block.attention
    rows = block.attention_wrap.enter(state.hidden)
    mask = input_mask(handle, site)
    query, key, value = site.project(rows, rows, mask, state.packing, state.packing)
    if site.rotate is not None and state.rotary is not None:
        query, key = site.rotate(query, key, *state.rotary)
    if state.cache is not None:
        key, value = kv_cache.extend(state.cache, site.layer, key, value)
    bias = state.bias if state.bias is not None else key_mask(state.valid)
    bias = kv_cache.with_cached(bias, key)
    meter = active_meter(handle)
    if meter is not None:
        voters = need_scores and drops_tokens(handle, block, state)
        count_self_attention(meter, site, state, kv_cache.visible_keys(bias, key), voters=voters)
    training = handle.model.training
    scores = None
    if need_scores and state.mixture is None:
        context, scores = _attend_scored(handle, site, state, query, key, value, bias)
    else:
        context = attend(site, query, key, value, bias, training=training)
    if need_scores and state.mixture is not None:
        valid = state.flags(state.valid, default=True)
        heads = handle.head_mask(site) if handle.switches.cit else None
        reduce = handle.switches.head_reduce
        scores = state.mixture.scores(query, key, site.scale, valid, heads, reduce=reduce)
    return state.pack(scale_context(handle, site, context)), scores


def _attend_scored(
    handle: PruningHandle,
    site: AttentionSite,
    state: TokenState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attends and scores the tokens by the method's score; context as a grid."""
    training = handle.model.training
    heads = handle.head_mask(site) if handle.switches.cit else None
    valid = state.flags(state.valid, default=True)
    protected = state.flags(state.protected, default=False)
    if state.logits is not None:
        context, probabilities = attend_explicitly(
            site, query, key, value, bias, training=training
        )
        context = scale_context(handle, site, context)
        return context, aligned_importance(
            probabilities, context, state.logits, valid, protected, state.pooled, heads
        )
    scored = valid & ~protected
    context, sums = attend_and_vote(
        site, query, key, value, bias, scored, heads, training=training
    )
    causal = bias is not None and bias.dtype == torch.bool and bias.shape[2] > 1
    if causal and handle.switches.causal_mean:
        assert bias is not None
        sums = mean_votes(sums, bias[:, 0], scored)
    return context, normalise_scores(sums, scored)


def attend(
    site: AttentionSite,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    *,
    training: bool,
) -> Tensor:
    """Attends by the fused kernel.

    Args:
        site: Scale and dropout.
        query: ``(B, H, Nq, d)``.
        key: ``(B, H / group, Nk, d)``.
        value: As ``key``.
        bias: Additive (float) or keep (bool) mask, broadcastable to ``(B, H, Nq, Nk)``.
        training: Whether dropout acts.

    Returns:
        ``(B, Nq, H * d)``.
    """
    key, value = _per_query_head(site, key), _per_query_head(site, value)
    if bias is not None and bias.is_floating_point():
        bias = bias.to(query.dtype)
    dropout = site.dropout if training else 0.0
    context = F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, dropout_p=dropout, scale=site.scale
    )
    return context.transpose(1, 2).flatten(2)


def attend_explicitly(
    site: AttentionSite,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    *,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """Attends as ``attend`` does, with the probabilities before dropout, ``(B, H, Nq, Nk)``."""
    key, value = _per_query_head(site, key), _per_query_head(site, value)
    probabilities = _probabilities(query * site.scale, key, _additive(bias, query.dtype))
    weights = F.dropout(probabilities, site.dropout, training).to(value.dtype)
    return torch.matmul(weights, value).transpose(1, 2).flatten(2), probabilities


def attend_and_vote(
    site: AttentionSite,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    votes: Tensor,
    head_mask: Tensor | None,
    *,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """Attends as ``attend`` does and sums what the strongest head of every query gives each key.

    Args:
        site: See ``attend``, as for the next four.
        query: ``(B, H, N, d)``.
        key: ``(B, H / group, N, d)``.
        value: As ``key``.
        bias: Mask.
        votes: Queries that count, ``(B, N)`` bool.
        head_mask: Soft head masks, ``(H,)``; ``None`` leaves Eq. 7 out.
        training: Whether dropout acts.

    Returns:
        The context ``(B, N, H * d)`` and the sums of Eq. 6 before they are normalised,
        ``(B, N)`` float32, detached.
    """
    if torch.compiler.is_compiling():  # a graph for any batch size has no loop over pieces
        grid, whole = attend_explicitly(site, query, key, value, bias, training=training)
        return grid, vote_sums(strongest_heads(whole, head_mask), votes)
    fused = query.requires_grad or (training and site.dropout > 0)
    context = attend(site, query, key, value, bias, training=training) if fused else None
    with torch.no_grad():
        batch, heads, length, width = query.shape
        key, value = _per_query_head(site, key), _per_query_head(site, value)
        scaled, additive = query * site.scale, _additive(bias, query.dtype)
        sums = query.new_zeros(batch, length, dtype=torch.float32)
        mixed = None if fused else value.new_empty(batch, length, heads, width)
        for some, part in _pieces(batch, heads, length, query.device):
            probabilities = _probabilities(
                scaled[some, :, part], key[some], _piece_of(additive, some, part)
            )
            strongest = strongest_heads(probabilities, head_mask)
            sums[some] += vote_sums(strongest, votes[some, part])
            if mixed is not None:
                weights = probabilities.to(value.dtype)
                mixed[some, part] = torch.matmul(weights, value[some]).transpose(1, 2)
    if context is None:
        assert mixed is not None
        context = mixed.flatten(2)
    return context, sums


def _pieces(
    batch: int, heads: int, length: int, device: torch.device
) -> Iterator[tuple[slice, slice]]:
    """Yields samples and queries whose probabilities are formed together."""
    most = _CACHED_NUMBERS if device.type == "cpu" else _DEVICE_NUMBERS
    one = heads * length * length
    samples = max(1, most // one)
    queries = length if one <= 2 * most else max(16, most // (heads * length))
    for first in range(0, batch, samples):
        for start in range(0, length, queries):
            yield slice(first, first + samples), slice(start, start + queries)


def _piece_of(bias: Tensor | None, some: slice, part: slice) -> Tensor | None:
    if bias is None:
        return None
    bias = bias if bias.shape[0] == 1 else bias[some]
    return bias if bias.shape[2] == 1 else bias[:, :, part]


def _probabilities(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax of the products of scaled queries and keys, float32."""
    logits = torch.matmul(query, key.transpose(-1, -2))
    if bias is not None:
        logits = logits + bias if logits.requires_grad else logits.add_(bias)
    return torch.softmax(logits, dim=-1, dtype=torch.float32)


def _additive(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as numbers to add to logits."""
    if bias is None or bias.is_floating_point():
        return bias
    numbers = torch.zeros_like(bias, dtype=dtype)
    return numbers.masked_fill(~bias, torch.finfo(dtype).min)


def _per_query_head(site: AttentionSite, heads: Tensor) -> Tensor:
    if site.queries_per_unit == 1:
        return heads
    return heads.repeat_interleave(site.queries_per_unit, dim=1)


def key_mask(valid: Tensor | None) -> Tensor | None:
    """Turns flags of real keys ``(B, N)`` into an attention mask ``(B, 1, 1, N)``."""
    return None if valid is None else valid[:, None, None, :]


def input_mask(handle: PruningHandle, site: AttentionSite) -> Tensor | None:
    """The mask on q, k and v (Eq. 2), unless it sits on the context."""
    return None if handle.mask_site == "context" else handle.masks.get(site.name)


def scale_context(handle: PruningHandle, site: AttentionSite, context: Tensor) -> Tensor:
    """Multiplies the masks of its units into a context ``(..., a)`` if that is where they sit."""
    mask = handle.masks.get(site.name)
    if mask is None or handle.mask_site == "qkv":
        return context
    return context * site.over_columns(mask.to(device=context.device, dtype=context.dtype))
