"""Which units a stage prunes and how their masks fade.

Scores of heads and of channels are not comparable as they are, so each kind is standardised
over all layers of the mode before the two are ranked together (UPop's unified ranking).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from comp.collectives import whole
from comp.handle import PruningHandle
from comp.importance import ActivationStatistics
from comp.sites import UnitGroup, UnitKind


class RankedUnit(NamedTuple):
    """One unit in a ranking.

    Attributes:
        group: Name of its group.
        unit: Its index as the group physically is.
        score: Standardised score; low is pruned first.
    """

    group: str
    unit: int
    score: float


@dataclass(frozen=True)
class UnitChoice:
    """What a stage prunes.

    Attributes:
        units: Group name to the selected units.
        threshold: Standard score of the last selected unit (theta of a parameter mode).
        macs: Mean multiply-adds per sample that go with them, less those that come back.
        returning: Group name to units that an earlier stage pruned and that come back.
    """

    units: dict[str, list[int]]
    threshold: float
    macs: float
    returning: dict[str, list[int]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of selected units, less those that come back."""
        gone, back = self.units.values(), self.returning.values()
        return sum(map(len, gone)) - sum(map(len, back))


def mask_value(step: int, decay_steps: int) -> float:
    """Returns the mask of fading units after ``step`` of ``decay_steps`` steps.

    The curve is UPop's, ``1 - sin(pi * step / (2 * decay_steps))``: 1 before the first step and
    exactly 0 from the last one on.

    Args:
        step: Optimizer steps done in this stage.
        decay_steps: Steps until the mask is 0.
    """
    if step >= decay_steps:
        return 0.0
    return 1.0 - math.sin(math.pi * step / (2 * decay_steps))


def unit_scores(group: UnitGroup, statistics: ActivationStatistics) -> Tensor:
    """Returns one score per unit, the mean of its columns', ``(units,)``."""
    channels = statistics.scores(group.name, whole(group.out.linear.weight.detach()))
    return group.by_unit(channels).mean(dim=1)


def standardise(scores: Tensor) -> Tensor:
    """Returns standard scores; zeros if there is one element or no variance."""
    deviation = scores.std(unbiased=False)
    if scores.numel() < 2 or not bool(deviation > 0):
        return torch.zeros_like(scores)
    return (scores - scores.mean()) / deviation


def scores_of(groups: Sequence[UnitGroup], statistics: ActivationStatistics) -> dict[str, Tensor]:
    """Returns the scores of all units that a pass went through, by group."""
    return {g.name: unit_scores(g, statistics) for g in groups if g.name in statistics.sums}


def rank_scores(
    groups: Sequence[UnitGroup],
    scores: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    by_layer: bool = False,
    prices: Mapping[str, float] | None = None,
) -> list[RankedUnit]:
    """Ranks the alive units of some groups by given scores, lowest first.

    Every kind of unit is standardised for itself, over all groups that compete. With prices, what
    is standardised is a score divided by the FLOPs that go with its unit, so that of two equally
    unimportant heads the one that more tokens pass goes first. Between kinds prices change
    nothing: a head costs hundreds of times what a channel does, and its score, a mean over its
    channels, is no sum that would grow likewise. That is not the paper's.

    Args:
        groups: The groups that compete.
        scores: Group name to scores ``(units,)``; a group without scores is left out.
        masks: Masks that are in force; units at 0 are left out.
        by_layer: Divide scores by the mean size of their group's before, so that no layer is
            pruned for having small activations as a whole.
        prices: Mean multiply-adds of one unit, by group.

    Source: UPop (arXiv 2301.13741), the unified ranking.
    """
    parts: list[tuple[str, Tensor, Tensor]] = []  # group, its alive units, their standard scores
    for kind in get_args(UnitKind):
        rivals = [group for group in groups if group.kind == kind and group.name in scores]
        if rivals:
            units = [_alive_units(group, masks) for group in rivals]
            own = [
                _own_scores(
                    scores[group.name].cpu()[alive],
                    by_layer=by_layer,
                    price=None if prices is None else prices.get(group.name),
                )
                for group, alive in zip(rivals, units, strict=True)
            ]
            standard = standardise(torch.cat(own)).split([len(alive) for alive in units])
            parts += zip([group.name for group in rivals], units, standard, strict=True)
    if not parts:
        return []
    parts.sort(key=lambda part: part[0])  # of equal scores the first group's first unit leads
    names = [name for name, alive, _ in parts for _ in range(len(alive))]
    values = torch.cat([part[2] for part in parts])
    order = values.argsort(stable=True)
    places, found = order.tolist(), torch.cat([part[1] for part in parts])[order].tolist()
    return list(map(RankedUnit, map(names.__getitem__, places), found, values[order].tolist()))


def alive_only(ranking: Sequence[RankedUnit], masks: Mapping[str, Tensor]) -> list[RankedUnit]:
    """Returns a ranking without its units at 0."""
    alive = {name: (mask != 0).tolist() for name, mask in masks.items()}
    return [e for e in ranking if e.group not in alive or alive[e.group][e.unit]]


def _alive_units(group: UnitGroup, masks: Mapping[str, Tensor]) -> Tensor:
    if group.name in masks:
        return masks[group.name].cpu().nonzero().flatten()
    return torch.arange(group.num_units)


def _own_scores(scores: Tensor, *, by_layer: bool, price: float | None) -> Tensor:
    size = scores.abs().mean()
    scores = scores / size if by_layer and bool(size > 0) else scores
    return scores / price if price else scores


def choose_units(
    ranking: Sequence[RankedUnit],
    groups: Mapping[str, UnitGroup],
    alive: Mapping[str, int],
    unit_macs: Mapping[str, float],
    quantum: float,
    *,
    min_heads: int,
    min_channels: int,
) -> UnitChoice:
    """Takes units from the bottom of a ranking until a quantum of FLOPs is reached.

    A unit that would overshoot the quantum by more than one channel's cost is passed over for
    cheaper ones further up; if that leaves nothing at all, the lowest unit is taken anyway.

    Args:
        ranking: Least important first.
        groups: All unit groups by name.
        alive: Units left in each group.
        unit_macs: Mean multiply-adds of one unit, by group.
        quantum: Multiply-adds to remove.
        min_heads: Heads, or their dimensions, kept in every attention.
        min_channels: Channels kept in every feed-forward layer.
    """
    left = dict(alive)
    floor = floors(min_heads, min_channels)
    channels = [name for name in {e.group for e in ranking} if groups[name].kind == "channel"]
    slack = max((unit_macs.get(name, 0.0) for name in channels), default=0.0)
    chosen: dict[str, list[int]] = {}
    first: RankedUnit | None = None
    total, threshold = 0.0, -math.inf
    for entry in ranking:
        price = unit_macs.get(entry.group, 0.0)
        if left[entry.group] <= floor[groups[entry.group].kind] or price <= 0:
            continue
        first = first or entry
        if total + price > quantum + slack:
            continue
        chosen.setdefault(entry.group, []).append(entry.unit)
        left[entry.group] -= 1
        total += price
        threshold = max(threshold, entry.score)
        if total >= quantum:
            break
    if not chosen and first is not None:
        return UnitChoice({first.group: [first.unit]}, first.score, unit_macs[first.group])
    return UnitChoice({name: sorted(u) for name, u in chosen.items()}, threshold, total)


def exchange_units(
    ranking: Sequence[RankedUnit],
    groups: Mapping[str, UnitGroup],
    masks: Mapping[str, Tensor],
    unit_macs: Mapping[str, float],
    quantum: float,
    *,
    min_heads: int,
    min_channels: int,
) -> UnitChoice | None:
    """Takes units from the bottom of a ranking of all, so that units pruned earlier may come back.

    Args:
        ranking: Least important first, units at 0 among them.
        groups: All unit groups by name.
        masks: Masks that are in force, 0 or 1.
        unit_macs: Mean multiply-adds of one unit, by group.
        quantum: Multiply-adds to remove beyond those of the units at 0.
        min_heads: Heads, or their dimensions, kept in every attention.
        min_channels: Channels kept in every feed-forward layer.

    Returns:
        What changes, or ``None`` if a set of units chosen anew removes less than the quantum.

    Source: Eq. (1) of CoMP (arXiv 2604.02956) taken at its word, and UPop (arXiv 2301.13741),
    which selects anew at every update.
    """
    names = {entry.group for entry in ranking}
    zeros = {
        name: set((masks[name] == 0).nonzero().flatten().tolist()) for name in names & {*masks}
    }
    saved = sum(len(units) * unit_macs.get(name, 0.0) for name, units in zeros.items())
    anew = choose_units(
        ranking,
        groups,
        {name: groups[name].num_units for name in names},
        unit_macs,
        quantum + saved,
        min_heads=min_heads,
        min_channels=min_channels,
    )
    macs = anew.macs - saved
    if macs < quantum * (1 - 1e-6):  # rounding of the sums
        return None
    going = {
        name: [u for u in own if u not in zeros.get(name, ())] for name, own in anew.units.items()
    }
    returning = {name: sorted(own - {*anew.units.get(name, ())}) for name, own in zeros.items()}
    return UnitChoice(_filled(going), anew.threshold, macs, _filled(returning))


def _filled(units: Mapping[str, list[int]]) -> dict[str, list[int]]:
    return {name: own for name, own in units.items() if own}


def floors(min_heads: int, min_channels: int) -> dict[UnitKind, int]:
    """Returns how many units of every kind a module keeps at least."""
    return {"head": min_heads, "head_dim": min_heads, "channel": min_channels}


def obtainable_macs(
    groups: Sequence[UnitGroup],
    alive: Mapping[str, int],
    unit_macs: Mapping[str, float],
    *,
    min_heads: int,
    min_channels: int,
) -> float:
    """Returns the multiply-adds that go when every group is pruned to its minimum."""
    floor = floors(min_heads, min_channels)
    return sum(
        max(alive[group.name] - floor[group.kind], 0) * unit_macs.get(group.name, 0.0)
        for group in groups
    )


def bring_back_(handle: PruningHandle, choice: UnitChoice) -> None:
    """Sets the masks of the units that come back to 1, in place; masks of ones are dropped."""
    for name, units in choice.returning.items():
        mask = handle.masks[name].clone()
        mask[torch.tensor(units, device=mask.device)] = 1.0
        handle.masks[name] = mask
        if bool((mask == 1).all()):
            del handle.masks[name]


def fade_(handle: PruningHandle, choice: UnitChoice, value: float) -> None:
    """Sets the masks of the chosen units to ``value``, in place; others keep theirs."""
    for name, units in choice.units.items():
        group = handle.groups[name]
        device = group.out.linear.weight.device
        mask = handle.masks.get(name)
        if mask is None:
            mask = torch.ones(group.num_units, device=device)
        mask = mask.clone()
        mask[torch.tensor(units, device=device)] = value
        handle.masks[name] = mask
