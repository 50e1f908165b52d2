"""Trials from one snapshot: what every live mode would cost now.

Each trial runs on a copy of the pruner and leaves the pruner as it is, so that trials are
independent of each other and may run side by side.
"""

import copy
from typing import TYPE_CHECKING

from comp.modes import PruningMode

if TYPE_CHECKING:
    from comp.pruner import Pruner


def trial_cost(pruner: "Pruner", mode: PruningMode, gap: float, steps: int) -> float | None:
    """Tries one mode on a copy of the current state and returns its cost r.

    Args:
        pruner: Between two stages.
        mode: The mode to try.
        gap: Multiply-adds left to the target.
        steps: Training steps while the chosen units fade; with none they go at once.

    Returns:
        Accuracy lost per share of dense FLOPs removed, or ``None`` if the mode has nothing
        to give.
    """
    trial = _fork(pruner)
    raised = trial.raising().pick([mode], gap, coarse=True)
    if raised is None:
        return None
    trial.handle.thresholds.update(raised.thresholds)
    trial.train(raised.choice, steps)
    return trial.measure(raised.macs)[1]


def trial_costs(pruner: "Pruner", gap: float, steps: int) -> dict[str, float]:
    """Tries all live modes; a mode that has nothing to give is left out."""
    tried = {m: trial_cost(pruner, PruningMode(m), gap, steps) for m in pruner.strategy.live}
    return {mode: cost for mode, cost in tried.items() if cost is not None}


def _fork(pruner: "Pruner") -> "Pruner":
    """Returns an independent copy that shares only the task, the yardstick and the config."""
    shared = (pruner.task, pruner.yardstick, pruner.config)
    return copy.deepcopy(pruner, {id(value): value for value in shared})
