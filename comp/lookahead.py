"""Trials from one snapshot: what modes would cost now.

Three options ask for them: the ``lookahead`` schedule before every stage, ``init: probe`` and
``rehearsal`` before the first, and ``refresh_after`` for modes that have been idle. Each trial
runs on a copy of the loop and leaves the loop as it is, so that trials are independent of each
other and may run side by side.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from comp.modes import modes_in
from comp.sharding import shard_
from comp.strategy import Choice

if TYPE_CHECKING:
    from comp.stages import StageLoop


class TrialPlan(NamedTuple):
    """The trials that a stage opens with.

    Attributes:
        modes: The modes that are tried.
        gap: Multiply-adds left to the target.
        steps: Training steps of a trial; with none its units go at once.
    """

    modes: tuple[str, ...]
    gap: float
    steps: int


class Trials(Protocol):
    """Tries modes of a loop, here or elsewhere; like ``trial_costs``."""

    def __call__(self, loop: "StageLoop", plan: TrialPlan) -> dict[str, float]:
        """Returns the cost of every mode that has something to give, in the plan's order."""
        ...


def trial_cost(loop: "StageLoop", mode: str, gap: float, steps: int) -> float | None:
    """Tries one mode on a copy of the current state and returns its cost r.

    Args:
        loop: Between two stages.
        mode: The mode to try, or several joined by ``+`` that share a step.
        gap: Multiply-adds left to the target.
        steps: Training steps while the chosen units fade; with none they go at once.

    Returns:
        Accuracy lost per share of dense FLOPs removed, or ``None`` if the mode has nothing
        to give.
    """
    trial = fork(loop)
    raised = trial.raising().pick(modes_in(mode), gap, coarse=True)
    if raised is None:
        return None
    trial.take(raised, steps)
    return trial.measure(raised.macs)[1]


def trial_costs(loop: "StageLoop", plan: TrialPlan) -> dict[str, float]:
    """Tries all modes of a plan; one that has nothing to give is left out."""
    tried = {m: trial_cost(loop, m, plan.gap, plan.steps) for m in plan.modes}
    return {mode: cost for mode, cost in tried.items() if cost is not None}


def fork(loop: "StageLoop") -> "StageLoop":
    """Returns an independent copy that shares what a stage does not change, and the controls."""
    shared = (
        *(loop.task, loop.yardstick, loop.config, loop.trials, loop.teacher),
        loop.controls,
    )
    twin = copy.deepcopy(loop, {id(value): value for value in shared})
    shard_(twin.handle, twin.optimizer)
    return twin


class LookaheadStrategy:
    """Takes the mode whose trial from the current snapshot cost least. Not the paper's.

    The loop tries every live mode and calls ``offer`` before it chooses, so no cost is ever
    stale and none is confounded with the recovery from an earlier stage.

    Args:
        modes: The modes to choose from, in the order that breaks ties.

    Raises:
        ValueError: If ``modes`` is empty.
    """

    def __init__(self, modes: Sequence[str]) -> None:
        if not modes:
            raise ValueError("modes must name at least one mode, but got none")
        self._live = list(modes)
        self._costs: dict[str, float] = {}
        self._open: str | None = None
        self.stage = 0
        self.choice: Choice = "greedy"

    @property
    def live(self) -> list[str]:
        """The modes that are not exhausted."""
        return list(self._live)

    @property
    def costs(self) -> dict[str, float]:
        """The costs of the latest trials."""
        return dict(self._costs)

    def offer(self, costs: Mapping[str, float]) -> None:
        """Takes the costs of this stage's trials; a mode without one is not chosen."""
        self._costs = dict(costs)

    def choose(self, exclude: Collection[str] = ()) -> str:
        """Opens the next stage and returns the cheapest mode.

        Raises:
            RuntimeError: If no mode with a trial is left.
        """
        candidates = [m for m in self._live if m not in exclude and m in self._costs]
        if not candidates:
            raise RuntimeError("every mode is exhausted; there is nothing left to choose")
        self.stage += 1
        self._open = min(candidates, key=self._costs.__getitem__)
        return self._open

    def withdraw(self) -> None:
        """Takes the open stage back, as if it had not been chosen."""
        self._open = None
        self.stage -= 1

    def record(self, mode: str, cost: float, share: float = 1.0) -> None:
        """Closes the stage; the next one is decided by new trials."""
        self._open = None

    def exhaust(self, mode: str) -> None:
        """Retires a mode; if its stage is open, the stage is taken back."""
        if mode in self._live:
            self._live.remove(mode)
        if mode == self._open:
            self.withdraw()

    def state(self) -> dict[str, Any]:
        """Returns the whole state as JSON values; ``restore`` is the inverse."""
        return {"live": self._live, "stage": self.stage}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``state``'s output."""
        self._live = list(state["live"])
        self.stage = state["stage"]
