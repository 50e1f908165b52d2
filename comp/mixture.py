"""Several streams in one causal sequence: who votes, who may be dropped, what stays.

A language model that reads an image reads its tokens and the words in one sequence. They drop
behind whole layers, at boundaries: behind boundary s, ``(1 - theta)^s`` of a stream's original
tokens go on, those with the highest scores. The scores are Eq. 6 with a few voting queries (the
last token of an instruction) instead of all, and with Eq. 7's head masks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from comp.importance import voted_importance
from comp.modes import Stream
from comp.tokens import Selection, keep_share


@dataclass
class Mixture:
    """Which rows of a sequence belong to which stream.

    Attributes:
        droppable: By stream, its rows that may be dropped, ``(B, N)`` bool.
        original: By stream, how many of them every sample had at the start, ``(B,)``.
        voters: The rows whose attention ranks the droppable ones, ``(B, N)`` bool.
        columns: Where every row stood in the whole sequence, ``(B, N)``.
    """

    droppable: dict[Stream, Tensor]
    original: dict[Stream, Tensor]
    voters: Tensor
    columns: Tensor

    @property
    def scored(self) -> Tensor:
        """The rows that are scored: those that some stream may drop, ``(B, N)``."""
        return torch.stack(list(self.droppable.values())).any(dim=0)

    def gather(self, selection: Selection) -> "Mixture":
        """Applies a selection."""
        return Mixture(
            {stream: selection.gather_flags(rows) for stream, rows in self.droppable.items()},
            self.original,
            selection.gather_flags(self.voters),
            selection.gather_positions(self.columns),
        )

    def restore(self, rows: Tensor, length: int) -> Tensor:
        """Puts rows ``(B, K, D)`` back where they stood, zeros elsewhere, ``(B, length, D)``.

        Padded rows, which are zero, are added to some column.
        """
        whole = rows.new_zeros(rows.shape[0], length, rows.shape[2])
        return whole.scatter_add(1, self.columns.unsqueeze(-1).expand_as(rows), rows)

    def scores(
        self,
        query: Tensor,
        key: Tensor,
        scale: float,
        valid: Tensor,
        head_mask: Tensor | None,
        *,
        reduce: str = "max",
    ) -> Tensor:
        """Scores the droppable rows; attention is formed for the voters' rows only.

        Args:
            query: Queries of all rows, ``(B, H, N, d)``.
            key: Keys, ``(B, H / group, N, d)``.
            scale: Factor on the logits.
            valid: True for real rows, ``(B, N)``.
            head_mask: Soft head masks, ``(H,)``, or ``None``.
            reduce: How heads become one, ``"max"`` or ``"mean"``.

        Returns:
            ``(B, N)``, float32; see ``comp.importance.voted_importance``.
        """
        most = int(self.voters.sum(dim=1).max())
        rows = (~self.voters).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]  # (B, V)
        index = rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        logits = torch.matmul(query.gather(2, index), key.transpose(-1, -2)) * scale
        order = torch.arange(key.shape[2], device=rows.device)
        visible = (order <= rows.unsqueeze(2)) & valid.unsqueeze(1)  # (B, V, N)
        logits = logits.float().masked_fill(~visible.unsqueeze(1), torch.finfo(torch.float32).min)
        votes = self.voters.gather(1, rows)
        return voted_importance(
            logits.softmax(dim=-1), votes, self.scored, head_mask, reduce=reduce
        )

    def keep(
        self,
        scores: Tensor,
        valid: Tensor,
        thresholds: Mapping[Stream, float],
        min_tokens: Mapping[Stream, int],
        boundary: int,
    ) -> Tensor:
        """Decides which rows go on behind a boundary.

        Args:
            scores: Of all rows, ``(B, N)``.
            valid: True for real rows, ``(B, N)``.
            thresholds: By stream, the share of its tokens that each boundary drops; values
                above 1 count as 1.
            min_tokens: By stream, droppable rows kept at least.
            boundary: Which boundary it is, from 1.

        Returns:
            True for the rows that go on, ``(B, N)``.
        """
        keep = valid & ~self.scored
        for stream, rows in self.droppable.items():
            share = (1.0 - min(thresholds.get(stream, 0.0), 1.0)) ** boundary
            original, least = self.original[stream], min_tokens[stream]
            keep = keep | keep_share(scores, rows, original, share, least)
        return keep


def causal_mask(length: int, valid: Tensor | None, device: torch.device) -> Tensor:
    """What every row may look at: the real rows up to itself, or itself if there are none.

    Args:
        length: Number of rows N.
        valid: True for real rows, ``(B, N)``; ``None`` means all.
        device: Where the mask goes.

    Returns:
        ``(B or 1, 1, N, N)`` bool.
    """
    before = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if valid is None:
        return before[None, None]
    real = before & valid[:, None, None, :]
    return real | (before.triu() & ~real.any(dim=-1, keepdim=True))
