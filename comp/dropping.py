"""Which tokens a layer drops, and how much those that stay weigh in parameter scores."""

from dataclasses import replace

import torch
from torch import Tensor

from comp.handle import PruningHandle
from comp.importance import token_weights
from comp.madtp import keep_aligned
from comp.mixture import causal_mask
from comp.sites import Block
from comp.token_state import TokenState, gather_state
from comp.tokens import keep_above, select, select_count


def can_score(block: Block, state: TokenState) -> bool:
    """Whether the block's tokens have scores: mixed ones only while their prompt is read."""
    return block.drops_tokens and (not block.mixed or state.mixture is not None)


def drops_tokens(handle: PruningHandle, block: Block, state: TokenState) -> bool:
    """Whether the block may drop tokens that enter it now."""
    count = handle.static_count(block)
    if count is not None:
        return state.shape[1] > count
    return (
        block.boundary != 0
        and can_score(block, state)
        and any(handle.thresholds.get(stream, 0.0) > 0 for stream in block.streams)
    )


def row_weights(handle: PruningHandle, state: TokenState, scores: Tensor | None) -> Tensor | None:
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


def drop_tokens(
    handle: PruningHandle, block: Block, state: TokenState, scores: Tensor
) -> tuple[TokenState, Tensor]:
    """Drops what a threshold or a fixed count says; returns the rest and its scores ``(B, K)``."""
    threshold = handle.thresholds.get(block.stream, 0.0)
    valid = state.flags(state.valid, default=True)
    protected = state.flags(state.protected, default=False)
    merge = handle.merges(block.stream)
    fixed = handle.static_count(block)
    if fixed is not None:
        selection = select_count(fixed, scores, valid, protected, merge=merge)
        return gather_state(state, selection), selection.gather_scores(scores)
    fewest = handle.min_tokens[block.stream]
    if state.logits is not None:
        keep = keep_aligned(scores, state.logits, threshold, valid, protected, fewest)
    else:
        count = None
        if handle.switches.token_threshold == "absolute":
            if state.first_count is None:
                state.first_count = (valid & ~protected).sum(dim=1)
            count = state.first_count
        keep = keep_above(scores, threshold, valid, protected, fewest, count)
    selected = select(keep, scores, valid, merge=merge)
    if selected is None:
        return state, scores
    return gather_state(state, selected), selected.gather_scores(scores)


def drop_behind(
    handle: PruningHandle,
    boundary: int,
    state: TokenState,
    scores: Tensor,
    activation: Tensor | None,
) -> tuple[TokenState, Tensor | None]:
    """Drops tokens of every stream of a mixed sequence behind a layer.

    Args:
        handle: Thresholds and minima.
        boundary: Which boundary it is, from 1.
        state: The tokens that leave the layer.
        scores: Their scores, ``(B, N)``.
        activation: Rows that wait for the next layer's scores, if any; they are gathered alike.

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
        return state, activation
    if activation is not None:
        activation, _ = selection.gather_rows(activation, state.packing)
    state = gather_state(replace(state, bias=None), selection)
    state.bias = causal_mask(state.shape[1], state.valid, state.hidden.device)
    return state, activation
