"""The tokens that run through an encoder, and what a selection does to all that runs with them."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from comp.mixture import Mixture
from comp.packing import Packing, packed, packing_of, padded
from comp.tokens import Selection


@dataclass
class TokenState:
    """The tokens that run through an encoder.

    Attributes:
        hidden: ``(B, N, D)``, or ``(T, D)``, the real rows alone, while ``packing`` is set.
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
        first_count: Scored tokens that the first layer had, ``(B,)``, for absolute thresholds.
        packing: How ``hidden`` is packed; ``None`` while it is a grid.
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
    first_count: Tensor | None = None
    packing: Packing | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Samples and places per sample, ``(B, N)``."""
        if self.packing is not None:
            return self.packing.batch, self.packing.length
        return self.hidden.shape[0], self.hidden.shape[1]

    def flags(self, mask: Tensor | None, default: bool) -> Tensor:
        """Returns a mask as a tensor ``(B, N)``, filled with ``default`` if it is ``None``."""
        if mask is not None:
            return mask
        return torch.full(self.shape, default, dtype=torch.bool, device=self.hidden.device)

    def counts(self) -> Tensor:
        """Real tokens of every sample, ``(B,)`` int64."""
        if self.valid is not None:
            return self.valid.sum(dim=1)
        batch, length = self.shape
        return torch.full((batch,), length, dtype=torch.int64, device=self.hidden.device)

    def pad(self, rows: Tensor) -> Tensor:
        """Brings rows that stand like ``hidden`` into the grid ``(B, N, ...)``."""
        return padded(self.packing, rows)

    def pack(self, grid: Tensor) -> Tensor:
        """Brings a grid ``(B, N, ...)`` to where ``hidden`` stands."""
        return packed(self.packing, grid)

    def pack_padding_away(self) -> None:
        """Packs the rows if some are padding."""
        if self.valid is not None and self.packing is None:
            self.packing = packing_of(self.valid)
            self.hidden = self.pack(self.hidden)

    def pad_again(self) -> None:
        """Returns to the grid; padded rows are zero."""
        if self.packing is None and self.valid is not None:
            self.hidden = self.hidden * self.valid.unsqueeze(-1).to(self.hidden.dtype)
        self.hidden, self.packing = self.pad(self.hidden), None


def real_rows(rows: Tensor) -> Tensor:
    """True where a row is a real token: padding is exactly zero. ``(B, N, D)`` to ``(B, N)``."""
    return rows.abs().amax(dim=-1) != 0  # several times faster than any(), and NaN stays real


def gather_state(state: TokenState, selection: Selection) -> TokenState:
    """Applies a selection to everything that runs with the tokens."""
    hidden, packing = selection.gather_rows(state.hidden, state.packing)
    return replace(
        state,
        hidden=hidden,
        packing=packing,
        valid=None if selection.padding is False else selection.all_valid,
        pooled=None if state.pooled is None else selection.gather_flags(state.pooled),
        protected=None if state.protected is None else selection.gather_flags(state.protected),
        bias=None if state.bias is None else _gather_bias(state.bias, selection),
        rotary=None if state.rotary is None else _gather_rotary(state.rotary, selection),
        mixture=None if state.mixture is None else state.mixture.gather(selection),
        logits=None,
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
