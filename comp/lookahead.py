"""Trials from one snapshot: what every live mode would cost now.

Each trial runs on a copy of the loop and leaves the loop as it is, so that trials are
independent of each other and may run side by side.
"""

import copy
from typing import TYPE_CHECKING, Protocol

from comp.modes import PruningMode

if TYPE_CHECKING:
    from comp.stages import StageLoop


class Trials(Protocol):
    """Tries the live modes of a loop, here or elsewhere; like ``trial_costs``."""

    def __call__(self, loop: "StageLoop", gap: float, steps: int) -> dict[str, float]:
        """Returns the cost of every mode that has something to give, in the order of ``live``."""
        ...


def trial_cost(loop: "StageLoop", mode: PruningMode, gap: float, steps: int) -> float | None:
    """Tries one mode on a copy of the current state and returns its cost r.

    Args:
        loop: Between two stages.
        mode: The mode to try.
        gap: Multiply-adds left to the target.
        steps: Training steps while the chosen units fade; with none they go at once.

    Returns:
        Accuracy lost per share of dense FLOPs removed, or ``None`` if the mode has nothing
        to give.
    """
    trial = _fork(loop)
    raised = trial.raising().pick([mode], gap, coarse=True)
    if raised is None:
        return None
    trial.handle.thresholds.update(raised.thresholds)
    trial.train(raised.choice, steps)
    return trial.measure(raised.macs)[1]


def trial_costs(loop: "StageLoop", gap: float, steps: int) -> dict[str, float]:
    """Tries all live modes; a mode that has nothing to give is left out."""
    tried = {m: trial_cost(loop, PruningMode(m), gap, steps) for m in loop.strategy.live}
    return {mode: cost for mode, cost in tried.items() if cost is not None}


def _fork(loop: "StageLoop") -> "StageLoop":
    """Returns an independent copy; task, yardstick, config and who tries are shared."""
    shared = (loop.task, loop.yardstick, loop.config, loop.trials)
    return copy.deepcopy(loop, {id(value): value for value in shared})
