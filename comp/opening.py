"""Opening a stage: trials where an option asks for some, then a mode that can give something."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from comp.errors import BudgetUnreachable
from comp.fixed_strategy import FixedStrategy
from comp.lookahead import LookaheadStrategy, TrialPlan
from comp.modes import modes_in
from comp.raising import Raise
from comp.strategy import MultiModeStrategy

if TYPE_CHECKING:
    from comp.stages import StageLoop


@dataclass(frozen=True)
class Opening:
    """A stage that has been opened.

    Attributes:
        modes: Its mode, or several joined by ``+``.
        raised: What it does before it trains.
        refreshed: New costs of modes that had been idle, by mode.
    """

    modes: str
    raised: Raise
    refreshed: dict[str, float] = field(default_factory=dict)


def open_stage(loop: "StageLoop", ratio: float) -> Opening:
    """Opens a stage; only if no mode can take a step that fits, one that overshoots may.

    Args:
        loop: Between two stages.
        ratio: The ratio that the stage is on its way to.

    Raises:
        BudgetUnreachable: If no mode has anything left to give.
    """
    strategy = loop.strategy
    if isinstance(strategy, MultiModeStrategy) and loop.config.switches.fade_exploration:
        strategy.exploration_left = way_left(loop.ratio, loop.config.ratios[-1])
    refreshed = _hold_trials(loop, ratio)
    raising, gap = loop.raising(), loop.gap(ratio)
    for coarse in (False, True):
        refused: set[str] = set()
        while True:
            try:
                name = strategy.choose(refused)
            except RuntimeError:
                break
            raised = raising.pick(modes_in(name), gap, coarse=coarse)
            if raised is not None:
                return Opening(name, raised, refreshed)
            strategy.withdraw()
            # A fixed schedule joins what is left of its groups; others choose a name as a whole.
            for part in name.split("+") if isinstance(strategy, FixedStrategy) else [name]:
                if all(raising.is_exhausted(mode) for mode in modes_in(part)):
                    strategy.exhaust(part)
                else:
                    refused.add(part)
    raise BudgetUnreachable(
        f"ratio {ratio} cannot be reached: every mode is exhausted at {loop.ratio:.4f}; "
        "lower the ratio or the minima",
        loop.ratio,
    )


def way_left(reached: float, last: float) -> float:
    """Returns the share of the way from 0 to the last FLOPs ratio that is left, in [0, 1]."""
    return min(max(1.0 - reached / last, 0.0), 1.0)


def trials_before(loop: "StageLoop", ratio: float) -> TrialPlan | None:
    """Returns the trials that open the next stage, ``None`` without any.

    Args:
        loop: Between two stages.
        ratio: The ratio that the stage is on its way to.
    """
    strategy, config, gap = loop.strategy, loop.config, loop.gap(ratio)
    live = tuple(strategy.live)
    if isinstance(strategy, LookaheadStrategy):
        return TrialPlan(live, gap, config.lookahead_steps)
    if not isinstance(strategy, MultiModeStrategy):
        return None
    if config.init != "sweep" and not loop.stages:
        steps = config.steps_per_stage if config.init == "rehearsal" else 0
        return TrialPlan(live, gap, steps)
    stale = strategy.stale(config.refresh_after) if config.refresh_after else []
    return TrialPlan(tuple(stale), gap, 0) if stale else None


def _hold_trials(loop: "StageLoop", ratio: float) -> dict[str, float]:
    """Holds the trials before a stage, if any; returns the costs that these refreshed."""
    plan, strategy = trials_before(loop, ratio), loop.strategy
    if plan is None:
        return {}
    costs = loop.trials(loop, plan)
    if isinstance(strategy, LookaheadStrategy):
        strategy.offer(costs)
    elif isinstance(strategy, MultiModeStrategy) and loop.stages:
        strategy.refresh(plan.modes, costs)
        return costs
    elif isinstance(strategy, MultiModeStrategy):
        strategy.begin_with(costs)
    return {}
