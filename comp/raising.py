"""Opening a stage: which units go and how far thresholds rise for a quantum of FLOPs.

The quantum is ``min(dF, what is left to the target, max(kappa * F_mode, 1.5 eps_F F_0))``, see
docs/algorithm.md; ``last_quantum`` lets dF shrink on the way (``shrinking_quantum``).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from comp.config import PruningConfig
from comp.cost import Measurement
from comp.errors import BudgetUnreachable
from comp.evaluation import collect_statistics, measure_cost, to_device
from comp.handle import PruningHandle
from comp.masks import (
    RankedUnit,
    UnitChoice,
    alive_only,
    choose_units,
    exchange_units,
    obtainable_macs,
    rank_scores,
    scores_of,
)
from comp.modes import PruningMode, Stream
from comp.sites import UnitGroup
from comp.tasks.base import Batch, Task
from comp.thresholds import ThresholdSearch
from comp.upop import gradient_scores


@dataclass(frozen=True)
class Raise:
    """What a stage does before it trains.

    Attributes:
        choice: The units that fade.
        thresholds: The new token thresholds.
        threshold: The highest of these, or the standard score of the last chosen unit.
        macs: Mean multiply-adds that are expected to go.
        share: What share that is of a stage that no target cuts short, in [0, 1].
    """

    choice: UnitChoice
    thresholds: dict[Stream, float]
    threshold: float
    macs: float
    share: float = 1.0


def shrinking_quantum(reached: float, last_ratio: float, mean: float, last: float) -> float:
    """Returns what the next stage removes where quanta shrink geometrically on the way.

    With S = ``last_ratio / mean`` stages, of which each removes q times what the one before did
    and the last one ``last`` times what the first did,

        q = last^(1 / (S - 1))     first = last_ratio * (1 - q) / (1 - q^S)
        next = first - (1 - q) * reached

    so that S stages that remove what they are to make up the way, as S equal ones would. What a
    stage missed or overdid moves the rest; no quantum leaves the range of the first and the last.

    Args:
        reached: FLOPs ratio reached.
        last_ratio: The largest ratio of the run.
        mean: Quantum of stages that are all equal, a share of the dense FLOPs.
        last: The last quantum as a share of the first, in (0, 1]; 1 makes all equal.
    """
    stages = last_ratio / mean
    if last == 1.0 or stages <= 1.0:
        return mean
    factor = math.pow(last, 1 / (stages - 1))
    first = last_ratio * (1 - factor) / (1 - math.pow(factor, stages))
    return min(max(first - (1 - factor) * reached, last * first), first)


def steps_of(config: PruningConfig, share: float) -> int:
    """Returns for how many steps a stage trains.

    Args:
        config: Says what decides it (``steps_by``).
        share: Share of the dense FLOPs that the stage is to remove.
    """
    if config.switches.steps_by == "stage":
        return config.steps_per_stage
    return max(1, round(share / config.quantum * config.steps_per_stage))


class Raising:
    """What the next stage may take of the current model; made anew for every stage.

    Args:
        handle: The model's handle, its masks 0 or 1.
        task: Runs the passes.
        config: Quantum, minima, samples.
        cost: The model's cost on the validation subset.
        dense_macs: The dense model's mean multiply-adds on the same samples.

    Attributes:
        search: Searches token thresholds from where the model stands.
    """

    def __init__(
        self,
        handle: PruningHandle,
        task: Task,
        config: PruningConfig,
        cost: Measurement,
        dense_macs: float,
    ) -> None:
        self._handle, self._task, self._config = handle, task, config
        self._cost, self._dense_macs = cost, dense_macs
        self._device = next(handle.model.parameters()).device
        self.search = ThresholdSearch(
            handle,
            task,
            lambda: self._samples("train", config.probe_samples),
            mixed=config.autocast,
        )

    @property
    def smallest(self) -> float:
        """Multiply-adds below which a raise counts as nothing, except at the very end."""
        return self._config.min_quantum * self._dense_macs

    def pick(self, modes: Sequence[PruningMode], gap: float, *, coarse: bool) -> Raise | None:
        """Picks units and thresholds so that a stage's quantum of FLOPs goes.

        Args:
            modes: The stage's modes; parameters share one ranking, tokens one increment.
            gap: Multiply-adds left to the target.
            coarse: Accept a step that overshoots the target by more than the tolerance.

        Returns:
            What to do, or ``None`` if the modes cannot give what the stage needs.
        """
        own = sum(self._cost.mode_macs(self._handle.groups.values(), mode) for mode in modes)
        whole = min(
            self._share_of_stage() * self._dense_macs,
            max(self._config.quantum_cap * own, 1.5 * self.smallest),
        )
        quantum = min(whole, gap)
        tokens = [mode for mode in modes if mode.is_tokens]
        parameters = [mode for mode in modes if not mode.is_tokens]
        share = quantum / 2 if tokens and parameters else quantum
        choice, macs = UnitChoice({}, 0.0, 0.0), 0.0
        thresholds: dict[Stream, float] = {}
        if parameters:
            choice = self._pick_units(parameters, share)
            macs += choice.macs
        if tokens:
            streams = [mode.stream for mode in tokens]
            thresholds, drop = self.search.raise_by(streams, share, coarse=coarse)
            macs += drop
        last = quantum >= gap
        if macs <= 0 or (macs < self.smallest and not last):
            return None
        if not coarse and last and macs > gap + 2 * self._config.tolerance * self._dense_macs:
            return None
        threshold = max(thresholds.values()) if thresholds else choice.threshold
        return Raise(choice, thresholds, threshold, macs, min(macs / whole, 1.0) if last else 1.0)

    def _share_of_stage(self) -> float:
        """Share of the dense FLOPs that a stage is to remove from here on (dF)."""
        config = self._config
        reached = 1.0 - self._cost.macs / self._dense_macs
        return shrinking_quantum(reached, config.ratios[-1], config.quantum, config.last_quantum)

    def is_exhausted(self, mode: PruningMode) -> bool:
        """Whether a mode could not remove the smallest quantum even at its minima."""
        left = self.search.obtainable(mode.stream) if mode.is_tokens else self._units_left([mode])
        return left < self.smallest

    def check_reachable(self, modes: Sequence[PruningMode], ratio: float) -> None:
        """Refuses a ratio that the minima forbid, on the samples that decide whether it is met.

        Args:
            modes: All modes of the run.
            ratio: The largest FLOPs ratio that is asked for.

        Raises:
            BudgetUnreachable: If the modes cannot reach it; names the highest they can.
        """
        thresholds = dict(self._handle.thresholds)
        thresholds |= {mode.stream: math.inf for mode in modes if mode.is_tokens}
        samples = self._samples("val", self._config.eval_samples)
        with self._handle.with_thresholds(thresholds):
            fewest = measure_cost(
                self._handle.model, self._task, samples, mixed=self._config.autocast
            )
        removable = self._units_left(modes, fewest)
        highest = 1.0 - (fewest.macs - removable) / self._dense_macs
        if highest < ratio:
            names = ("min_heads", "min_channels", "min_vision_tokens", "min_text_tokens")
            floors = ", ".join(f"{name}={getattr(self._config, name)}" for name in names)
            raise BudgetUnreachable(
                f"ratio {ratio} cannot be reached: with {floors}, the modes {', '.join(modes)} "
                f"reach at most {highest:.4f}; lower the ratio or the minima",
                highest,
            )

    def _units_left(self, modes: Sequence[PruningMode], cost: Measurement | None = None) -> float:
        cost = cost or self._cost
        return obtainable_macs(
            self._groups(modes),
            cost.alive,
            cost.unit_macs,
            min_heads=self._config.min_heads,
            min_channels=self._config.min_channels,
        )

    def _groups(self, modes: Sequence[PruningMode]) -> list[UnitGroup]:
        return [group for group in self._handle.groups.values() if group.mode in modes]

    def _pick_units(self, modes: Sequence[PruningMode], quantum: float) -> UnitChoice:
        groups, handle = self._groups(modes), self._handle
        minima = {"min_heads": self._config.min_heads, "min_channels": self._config.min_channels}
        with handle.without_masks([g.name for g in groups] if self._config.regrow else []):
            ranking, cost = self._rank(groups)
        if self._config.regrow:
            cost = self._measure()
            anew = exchange_units(
                ranking, handle.groups, handle.masks, cost.unit_macs, quantum, **minima
            )
            if anew is not None:
                return anew
            ranking = alive_only(ranking, handle.masks)
        return choose_units(
            ranking, handle.groups, handle.alive(), cost.unit_macs, quantum, **minima
        )

    def _rank(self, groups: list[UnitGroup]) -> tuple[list[RankedUnit], Measurement]:
        """Ranks units by the method's score and measures what they cost on the same samples."""
        samples = self._samples("train", self._config.calibration_samples)
        if self._config.switches.parameter_score == "gradient":
            scores = gradient_scores(self._handle, self._task, samples)
            cost = self._measure()
            return self._ranking(groups, scores, cost), cost
        statistics, cost = collect_statistics(
            self._handle, self._task, samples, mixed=self._config.autocast
        )
        return self._ranking(groups, scores_of(groups, statistics), cost), cost

    def _ranking(
        self, groups: list[UnitGroup], scores: Mapping[str, Tensor], cost: Measurement
    ) -> list[RankedUnit]:
        return rank_scores(
            groups,
            scores,
            self._handle.masks,
            by_layer=self._config.switches.rank_norm == "layer",
            prices=cost.unit_macs if self._config.rank_by == "score_per_flop" else None,
        )

    def _measure(self) -> Measurement:
        """What the model costs on the samples behind the scores."""
        samples = self._samples("train", self._config.calibration_samples)
        return measure_cost(self._handle.model, self._task, samples, mixed=self._config.autocast)

    def _samples(self, split: str, count: int) -> Iterator[Batch]:
        """The same first samples of a split every time, without augmentation."""
        for batch in self._task.batches(
            split, batch_size=self._config.eval_batch_size, num_samples=count
        ):
            yield to_device(batch, self._device)
