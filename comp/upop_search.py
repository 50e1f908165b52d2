"""UPop's progressive search, a baseline: gradients by all masks add up while selected units fade.

In plain text, with t the update, T the number of updates and p the share of the prunable
parameters that is to go:

    g     += d(task loss) / dm + w * sign(m)         at every training step, never cleared
    pi_t   = p * sin(pi * (t + 1) / (2 T))           t = 0 .. T - 1
    m      = 1 - pi_t / p of the selected units, 1 of all others

An update ranks all units, selected or not, by g (largest first, standardised per kind) and selects
from the top until their parameters are the share pi_t. A unit may come back at any update. After
the last one every mask is exactly 0 or 1.

p is what FLOPs ask for: at each update a bisection finds the smallest share whose structure, were
the search over now, has the target's multiply-adds; the last update's p is the one that counts.

What differs from the released code: the share counts a unit's true parameters (theirs takes 36
channels for a dimension of all heads in every model); the sum of gradients does not depend on
mixed precision (theirs keeps one batch there); an update comes at the end of every stage.

Source: UPop (arXiv 2301.13741), Section 3.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from comp.handle import PruningHandle
from comp.masks import RankedUnit, UnitChoice, floors, rank_scores
from comp.shrink import unit_parameters
from comp.sites import UnitGroup
from comp.upop import PENALTIES


def searched_share(share: float, update: int, updates: int) -> float:
    """Returns pi_t: which share of the parameters is selected at an update.

    Args:
        share: The share that is to go (p).
        update: Which update, from 0 (t).
        updates: How many there are (T); at the last one the result is exactly ``share``.
    """
    return share * math.sin(math.pi * (update + 1) / (2 * updates))


@dataclass(frozen=True)
class Removal:
    """All units that may go, in the order in which they go.

    Attributes:
        units: Lowest score first; the best units of every module, its minimum, are left out.
        parameters: Parameters of the units so far, one entry a unit.
        macs: Mean multiply-adds of the units so far, one entry a unit.
        total: Parameters of all prunable units.
    """

    units: Sequence[RankedUnit]
    parameters: Sequence[int]
    macs: Sequence[float]
    total: int

    def count(self, share: float) -> int:
        """Units that are selected for a share of the parameters: the fewest that reach it."""
        if share <= 0:
            return 0
        return min(bisect_left(self.parameters, share * self.total) + 1, len(self.units))

    def macs_of(self, count: int) -> float:
        """Multiply-adds that go with the first ``count`` units."""
        return self.macs[count - 1] if count else 0.0

    def share_for(self, macs: float) -> float:
        """Bisects for the smallest share of the parameters that removes so many multiply-adds."""
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            if self.macs_of(self.count(middle)) < macs:
                low = middle
            else:
                high = middle
        return high


def removal_of(
    groups: Sequence[UnitGroup],
    scores: Mapping[str, Tensor],
    unit_macs: Mapping[str, float],
    *,
    min_heads: int,
    min_channels: int,
) -> Removal:
    """Ranks the units of a dense model for their removal.

    Args:
        groups: The groups that compete.
        scores: Group name to scores ``(units,)``, low goes first.
        unit_macs: Mean multiply-adds of one unit, by group.
        min_heads: Heads, or their dimensions, kept in every attention.
        min_channels: Channels kept in every feed-forward layer.
    """
    by_name = {group.name: group for group in groups}
    floor = floors(min_heads, min_channels)
    left = {group.name: group.num_units for group in groups}
    units = []
    for entry in rank_scores(groups, scores, {}):
        if left[entry.group] > floor[by_name[entry.group].kind]:
            left[entry.group] -= 1
            units.append(entry)
    parameters = {name: unit_parameters(group) for name, group in by_name.items()}
    return Removal(
        units,
        list(accumulate(parameters[e.group] for e in units)),
        list(accumulate(unit_macs.get(e.group, 0.0) for e in units)),
        sum(parameters[group.name] * group.num_units for group in groups),
    )


class UpopSearch:
    """The sums and masks of one search; ``watch_``, train, ``gather_``, ``update_``, again.

    Args:
        handle: The handle of a dense model.
        groups: The groups that compete.
        updates: How many updates there will be (T).
        penalties: Weight of the L1 term by kind of unit. It is the same for all units of a kind,
            since no mask is 0 before the end, so that it cancels when they are standardised.

    Attributes:
        sums: Group name to the gradients so far, ``(units,)`` float32.
    """

    def __init__(
        self,
        handle: PruningHandle,
        groups: Sequence[UnitGroup],
        updates: int,
        penalties: Mapping[str, float] = PENALTIES,
    ) -> None:
        self._handle, self._groups = handle, groups
        self._updates, self._penalties = updates, penalties
        self.sums: dict[str, Tensor] = {}

    def watch_(self) -> None:
        """Lets the backward passes that follow leave gradients on the masks."""
        for group in self._groups:
            mask = self._handle.masks.get(group.name)
            if mask is None:
                mask = torch.ones(group.num_units, device=group.out.linear.weight.device)
            self._handle.masks[group.name] = mask.detach().clone().requires_grad_()

    def gather_(self, steps: int) -> None:
        """Adds the gradients of so many steps to the sums and makes masks plain numbers again."""
        masks = self._handle.masks
        own = {g.name: masks[g.name].grad for g in self._groups}
        sums = self._handle.workers.sum_tensors(
            {name: gradient.float() for name, gradient in own.items() if gradient is not None}
        )
        for group in self._groups:
            mask = masks[group.name]
            if group.name in sums:
                penalty = steps * self._penalties[group.kind] * mask.detach().sign()
                gathered = sums[group.name] + penalty
                self.sums[group.name] = self.sums.get(group.name, 0.0) + gathered
            self._handle.masks[group.name] = mask.detach()

    def update_(
        self,
        update: int,
        unit_macs: Mapping[str, float],
        macs: float,
        *,
        min_heads: int,
        min_channels: int,
    ) -> UnitChoice:
        """Selects units anew and sets all masks.

        Args:
            update: Which update, from 0.
            unit_macs: Mean multiply-adds of one unit, by group.
            macs: Multiply-adds that are to be gone in the end.
            min_heads: Heads, or their dimensions, kept in every attention.
            min_channels: Channels kept in every feed-forward layer.

        Returns:
            All units that are selected now.
        """
        removal = removal_of(
            self._groups,
            {name: -total for name, total in self.sums.items()},
            unit_macs,
            min_heads=min_heads,
            min_channels=min_channels,
        )
        share = removal.share_for(macs)
        count = removal.count(searched_share(share, update, self._updates))
        value = 1.0 - searched_share(1.0, update, self._updates)  # 1 - pi_t / p
        chosen: dict[str, list[int]] = {}
        for entry in removal.units[:count]:
            chosen.setdefault(entry.group, []).append(entry.unit)
        for group in self._groups:
            mask = torch.ones_like(self._handle.masks[group.name])
            mask[chosen.get(group.name, [])] = value
            self._handle.masks[group.name] = mask
        threshold = removal.units[count - 1].score if count else -math.inf
        units = {name: sorted(own) for name, own in chosen.items()}
        return UnitChoice(units, threshold, removal.macs_of(count))
