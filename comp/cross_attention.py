"""Cross-attention of one layer to other encoders' rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from comp import kv_cache
from comp.attention import attend, input_mask, key_mask, scale_context
from comp.handle import PruningHandle
from comp.metering import active_meter, count_combination, count_cross_attention
from comp.packing import Packing, packed, packing_of
from comp.sites import AttentionSite, CrossAttention
from comp.token_state import TokenState, real_rows


@dataclass(frozen=True)
class Context:
    """Rows that cross-attention attends to.

    Attributes:
        rows: ``(B, N_v, D_v)``, or the real ones alone, ``(T, D_v)``.
        packing: How they are packed, if they are.
        valid: True for real rows, ``(B, N_v)``; ``None`` means all.
    """

    rows: Tensor
    packing: Packing | None
    valid: Tensor | None

    def counts(self) -> Tensor:
        """Real rows of every sample, ``(B,)`` int64."""
        if self.valid is not None:
            return self.valid.sum(dim=1)
        batch, length = self.rows.shape[:2]
        return torch.full((batch,), length, device=self.rows.device)


def read_context(rows: Tensor) -> Context:
    """Finds the real rows among ``(B, N_v, D_v)``: padding is exactly zero."""
    valid = real_rows(rows)
    if torch.compiler.is_compiling():
        return Context(rows, None, valid)
    packing = packing_of(valid)
    return Context(packed(packing, rows).contiguous(), packing, valid if packing else None)


def cross_attend_(
    handle: PruningHandle,
    cross: CrossAttention,
    state: TokenState,
    contexts: Sequence[Context],
    weights: Tensor | None,
) -> None:
    """Runs a layer's cross-attentions and adds what they give to ``state.hidden``.

    Args:
        handle: Masks and collectors.
        cross: The cross-attention.
        state: The tokens that ask; changed in place.
        contexts: One per site.
        weights: Weights of the tokens for the statistics, ``(B, N)``; ``None`` means ones.
    """
    rows = cross.wrap.enter(state.hidden)
    meter = active_meter(handle)
    outputs = []
    for site, context in zip(cross.sites, contexts, strict=True):
        query, key, value = _cross_heads(handle, site, rows, state, context)
        grid = attend(
            site, query, key, value, key_mask(context.valid), training=handle.model.training
        )
        mixed = state.pack(scale_context(handle, site, grid))
        if handle.statistics is not None:
            handle.statistics.add(site.name, state.pad(mixed), weights)
        outputs.append(site.out.linear(mixed))
        if meter is not None:
            count_cross_attention(meter, site, state, context.counts(), context.rows.shape[-1])
    output = outputs[0] if cross.combine is None else cross.combine(outputs)
    if meter is not None:
        count_combination(meter, cross, state)
    state.hidden = cross.wrap.leave(state.hidden, output)


def _cross_heads(
    handle: PruningHandle, site: AttentionSite, rows: Tensor, state: TokenState, context: Context
) -> tuple[Tensor, Tensor, Tensor]:
    """Projects queries, and keys and values once per generated sequence."""
    mask = input_mask(handle, site)
    stored = kv_cache.stored_cross(state.cache, site.layer)
    if stored is not None:
        return site.project_query(rows, mask, state.packing), *stored
    query, key, value = site.project(rows, context.rows, mask, state.packing, context.packing)
    if state.cache is not None:
        key, value = kv_cache.store_cross(state.cache, site.layer, key, value)
    return query, key, value
