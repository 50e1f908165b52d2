"""Dropping tokens: decide once (``select``), then apply to any tensor (``Selection``).

The relative threshold keeps token i of a sample iff ``N' * S_i > theta`` where ``N'`` counts the
sample's scored tokens, so theta = 0 keeps all and theta = 1 keeps the tokens above the mean.
Every sample keeps its own number; a batch is padded to the largest, and the padding is carried
as a validity mask, so a sample's result never depends on its batch mates. Where shapes have to be
known beforehand, ``select_count`` keeps the same number in every sample instead.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from comp.packing import Packing, padded


@dataclass
class Selection:
    """Which rows of a batch survive, in their old order.

    Attributes:
        index: Rows to gather, ``(B, K)``; rows beyond a sample's own count are arbitrary.
        valid: True where the gathered row is a real token, ``(B, K)``.
        summary_weight: Weights that merge the dropped rows into one summary token, ``(B, N)``,
            rows sum to 1 or to 0 where a sample dropped nothing; ``None`` when dropped rows are
            discarded or nobody dropped any.
        padding: Whether some sample has padded places or no summary; ``None`` where it is not
            known, because shapes must not depend on values.
    """

    index: Tensor
    valid: Tensor
    summary_weight: Tensor | None
    padding: bool | None = None

    def gather(self, rows: Tensor) -> Tensor:
        """Gathers hidden states ``(B, N, D)`` into ``(B, K, D)``, padded rows being zero.

        With a summary token the result is ``(B, K + 1, D)``, the summary last.
        """
        index = self.index.unsqueeze(-1).expand(-1, -1, rows.shape[-1])
        kept = rows.gather(1, index) * self.valid.unsqueeze(-1).to(rows.dtype)
        if self.summary_weight is None:
            return kept
        summary = (self.summary_weight.unsqueeze(-1).to(rows.dtype) * rows).sum(dim=1)
        return torch.cat([kept, summary.unsqueeze(1)], dim=1)

    def gather_rows(self, rows: Tensor, packing: Packing | None) -> tuple[Tensor, Packing | None]:
        """Gathers hidden states without padding them.

        Args:
            rows: ``(B, N, D)``, or ``(T, D)`` as ``packing`` says.
            packing: How the rows are packed, if they are.

        Returns:
            The rows that stay, with the summary tokens, and how they are packed; in the grid
            ``(B, K, D)`` or ``(B, K + 1, D)`` if every sample keeps equally many.
        """
        batch, kept = self.index.shape
        if self.padding is None:
            return self.gather(padded(packing, rows)), None
        flat = rows if packing is not None else rows.flatten(0, 1)
        length = rows.shape[1] if packing is None else packing.length
        places = self.index + length * torch.arange(batch, device=rows.device).unsqueeze(1)
        if packing is not None:
            places = packing.rows_at()[places]
        summary = None if self.summary_weight is None else self._summaries(flat, packing)
        if not self.padding:
            grid = flat.index_select(0, places.flatten()).view(batch, kept, -1)
            return grid if summary is None else torch.cat([grid, summary.unsqueeze(1)], 1), None
        width = kept + (summary is not None)
        grid_places = torch.arange(batch * width, device=rows.device).view(batch, width)
        stay = [flat.index_select(0, places[self.valid])]
        where = [grid_places[:, :kept][self.valid]]
        if summary is not None:
            has = self._has_summary()
            stay.append(summary[has])
            where.append(grid_places[has, kept])
        return torch.cat(stay), Packing(torch.cat(where), batch, width)

    def _summaries(self, flat: Tensor, packing: Packing | None) -> Tensor:
        """One merged row per sample, ``(B, D)``, of rows ``(T, D)``."""
        assert self.summary_weight is not None
        weight = self.summary_weight.to(flat.dtype)
        merged = weight > 0
        ends = merged.sum(dim=1).cumsum(0)
        places = merged.flatten().nonzero().flatten()
        own = weight.flatten()[places]
        if packing is not None:
            places = packing.rows_at()[places]
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        return F.embedding_bag(places, flat, starts, mode="sum", per_sample_weights=own)

    def gather_flags(self, flags: Tensor) -> Tensor:
        """Gathers a bool mask ``(B, N)``; padding and the summary token are False."""
        kept = flags.gather(1, self.index) & self.valid
        if self.summary_weight is None:
            return kept
        return torch.cat([kept, torch.zeros_like(kept[:, :1])], dim=1)

    def gather_positions(self, positions: Tensor) -> Tensor:
        """Gathers position ids ``(B, N)``; the summary token takes the last kept one's."""
        kept = positions.gather(1, self.index)
        if self.summary_weight is None:
            return kept
        return torch.cat([kept, kept[:, -1:]], dim=1)

    def gather_origins(self, origins: Tensor) -> Tensor:
        """Gathers where rows stood at first ``(B, N)``; the summary token stood nowhere: -1."""
        kept = origins.gather(1, self.index)
        if self.summary_weight is None:
            return kept
        return torch.cat([kept, torch.full_like(kept[:, :1], -1)], dim=1)

    def gather_scores(self, scores: Tensor) -> Tensor:
        """Gathers scores ``(B, N)``; the summary token gets the sum of what it merged."""
        kept = scores.gather(1, self.index) * self.valid
        if self.summary_weight is None:
            return kept
        merged = (scores.sum(dim=1, keepdim=True) - kept.sum(dim=1, keepdim=True)).clamp(min=0)
        return torch.cat([kept, merged * self._has_summary().unsqueeze(1)], dim=1)

    def _has_summary(self) -> Tensor:
        assert self.summary_weight is not None
        return self.summary_weight.sum(dim=1) > 0

    @property
    def all_valid(self) -> Tensor:
        """``valid`` with the summary token's flag appended, ``(B, K)`` or ``(B, K + 1)``."""
        if self.summary_weight is None:
            return self.valid
        return torch.cat([self.valid, self._has_summary().unsqueeze(1)], dim=1)


def keep_above(
    scores: Tensor,
    threshold: float,
    valid: Tensor,
    protected: Tensor,
    min_tokens: int,
    count: Tensor | None = None,
) -> Tensor:
    """Decides which tokens survive a relative threshold.

    Args:
        scores: Token importance, 0 on padding and on protected tokens, ``(B, N)``.
        threshold: Relative threshold theta, at least 0. A token survives iff its score times the
            number of scored tokens exceeds it.
        valid: True for real tokens, ``(B, N)``.
        protected: Tokens that always survive, ``(B, N)``.
        min_tokens: Unprotected tokens kept at least; the highest-scored ones fill up.
        count: What scores are multiplied by instead, ``(B,)``: the scored tokens of the first
            layer make the threshold absolute.

    Returns:
        True for the survivors, ``(B, N)`` bool.

    Source: CoMP (arXiv 2604.02956), Eq. (1) for tokens.
    """
    if threshold <= 0:
        return valid
    if count is None:
        count = (valid & ~protected).sum(dim=1)
    relative = scores.float() * count.unsqueeze(1)
    return keep_if(relative > threshold, relative, valid, protected, min_tokens)


def keep_if(
    above: Tensor, scores: Tensor, valid: Tensor, protected: Tensor, min_tokens: int
) -> Tensor:
    """Completes what a threshold says by the tokens that have to stay.

    Args:
        above: True where a token passes the threshold, ``(B, N)``.
        scores: Token importance, ``(B, N)``.
        valid: True for real tokens, ``(B, N)``.
        protected: Tokens that always survive, ``(B, N)``.
        min_tokens: Unprotected tokens kept at least; the highest-scored ones fill up.

    Returns:
        True for the survivors, ``(B, N)`` bool.
    """
    scored = valid & ~protected
    above = above & scored
    if torch.compiler.is_exporting() or bool((above.sum(dim=1) < min_tokens).any()):
        above = above | (scored & (_ranks(scores, scored) < min_tokens))
    return above | (protected & valid)


def keep_share(
    scores: Tensor, candidates: Tensor, original: Tensor, share: float, min_tokens: int
) -> Tensor:
    """Decides which tokens survive when a share of the original ones is to stay.

    Args:
        scores: Token importance, ``(B, N)``.
        candidates: The tokens in question, ``(B, N)`` bool.
        original: Number of candidates that every sample had at the start, ``(B,)``.
        share: Share of ``original`` that stays, in [0, 1]; counts are rounded to the nearest.
        min_tokens: Candidates kept at least.

    Returns:
        True for the surviving candidates, ``(B, N)`` bool. Of equal ones the first survives.
    """
    wanted = (original.double() * share + 0.5).floor().clamp(min=min_tokens)
    return candidates & (_ranks(scores.float(), candidates) < wanted.unsqueeze(1))


def _ranks(scores: Tensor, among: Tensor) -> Tensor:
    """Place of every token by falling score, those outside ``among`` last, ``(B, N)``."""
    order = scores.masked_fill(~among, -1.0).argsort(dim=1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )


def select(keep: Tensor, scores: Tensor, valid: Tensor, *, merge: bool) -> Selection | None:
    """Turns a keep mask into a gather plan.

    Args:
        keep: True for survivors, ``(B, N)``.
        scores: Token importance that weighs the merged rows, ``(B, N)``.
        valid: True for real tokens, ``(B, N)``.
        merge: Whether dropped tokens are merged into a summary token at the end.

    Returns:
        The plan, or ``None`` if no sample drops a token. A sample that drops none gets a
        summary slot that is not valid.

    Raises:
        ValueError: If the pass is being exported, for which shapes must not depend on values.
    """
    if torch.compiler.is_exporting():
        raise ValueError(
            "tokens are dropped by a threshold, so their number differs from sample to sample and "
            "cannot be exported; fix it with comp.export.freeze_token_counts or tokens='static'"
        )
    counts = keep.sum(dim=1)
    dropped = valid & ~keep
    missing = dropped.sum(dim=1)
    kept, gone = counts.tolist(), missing.tolist()
    if not any(gone):
        return None
    num_kept = max(kept)
    kept_valid = torch.arange(num_kept, device=keep.device) < counts.unsqueeze(1)
    index = torch.zeros_like(kept_valid, dtype=torch.int64)
    index[kept_valid] = keep.nonzero()[:, 1]
    padding = min(kept) < num_kept or (merge and not all(gone))
    return Selection(index, kept_valid, _merging(scores, dropped) if merge else None, padding)


def select_count(
    count: int, scores: Tensor, valid: Tensor, protected: Tensor, *, merge: bool
) -> Selection:
    """Makes a gather plan whose shape does not depend on values: the same for every sample.

    Args:
        count: Rows that are left, the summary token included; less than ``N``.
        scores: Token importance, 0 on padding and on protected tokens, at most 1, ``(B, N)``.
        valid: True for real tokens, ``(B, N)``.
        protected: Tokens that always survive, ``(B, N)``; fewer than ``count`` in every sample.
        merge: Whether dropped tokens are merged into a summary token at the end.

    Returns:
        The plan: protected tokens and those with the highest scores, the first of equal ones. A
        sample with fewer real tokens keeps them all and is padded.
    """
    num_kept = count - 1 if merge else count
    priority = (scores.float() + 2.0 * protected).masked_fill(~valid, -1.0)
    order = torch.arange(scores.shape[1], device=scores.device)
    mine, other = priority.unsqueeze(2), priority.unsqueeze(1)
    # Places by counting who is ahead: ONNX knows no stable sort.
    ahead = (other > mine) | ((other == mine) & (order < order.unsqueeze(1)))  # (B, N, N)
    keep = ahead.sum(dim=2) < num_kept
    index = (keep * (len(order) - order)).topk(num_kept, dim=1).indices
    weight = _merging(scores, valid & ~keep) if merge else None
    return Selection(index, valid.gather(1, index), weight)


def _merging(scores: Tensor, dropped: Tensor) -> Tensor:
    """Weights that merge the dropped rows of every sample into one, ``(B, N)``."""
    weight = scores.float() * dropped
    total = weight.sum(dim=1, keepdim=True)
    uniform = dropped.float() / dropped.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(total > 0, weight / total.clamp(min=1e-30), uniform)
