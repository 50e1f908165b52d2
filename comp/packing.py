"""Batches without padding: only real rows are computed, in a grid only where shapes ask for it.

Samples keep different numbers of tokens. Norms, projections and feed-forward layers act on each
row by itself, so they run on the real rows of all samples, one below the other; attention, which
needs one matrix per sample, pads them into the grid ``(B, N)`` and packs its result again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the rows of a packed batch stand in its grid.

    Attributes:
        places: Place of every row in the flattened grid, ``(T,)``, all different.
        batch: Samples (B).
        length: Places per sample (N).
    """

    places: Tensor
    batch: int
    length: int

    def pad(self, rows: Tensor) -> Tensor:
        """Puts rows ``(T, D)`` into the grid, zeros elsewhere, ``(B, N, D)``."""
        grid = rows.new_zeros(self.batch * self.length, rows.shape[-1])
        grid.index_copy_(0, self.places, rows)
        return grid.view(self.batch, self.length, -1)

    def pack(self, grid: Tensor) -> Tensor:
        """Takes the rows out of a grid ``(B, N, D)``, ``(T, D)``."""
        return grid.flatten(0, 1).index_select(0, self.places)

    def rows_at(self) -> Tensor:
        """Row that stands at every place, ``(B * N,)``; 0 where there is none."""
        rows = self.places.new_zeros(self.batch * self.length)
        rows[self.places] = torch.arange(len(self.places), device=rows.device)
        return rows


def packing_of(valid: Tensor) -> Packing | None:
    """Returns how to pack a grid whose real rows are flagged, or ``None`` if all are real.

    Args:
        valid: ``(B, N)`` bool.
    """
    places = valid.flatten().nonzero().flatten()
    if len(places) == valid.numel():
        return None
    return Packing(places, *valid.shape)


def padded(packing: Packing | None, rows: Tensor) -> Tensor:
    """``packing.pad(rows)``, or the rows ``(B, N, D)`` themselves without a packing."""
    return rows if packing is None else packing.pad(rows)


def packed(packing: Packing | None, grid: Tensor) -> Tensor:
    """``packing.pack(grid)``, or the grid itself without a packing."""
    return grid if packing is None else packing.pack(grid)
