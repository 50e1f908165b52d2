"""The multi-mode pruning strategy (MPS): which mode to prune next. Pure Python, no torch.

In plain text, with T the stage counter, T_m the stage in which mode m last ran and
I_m = T - T_m:

    Eq. 8   r   = (accuracy before - accuracy after) / share of dense FLOPs removed
    Eq. 9   explore with probability rho, mode m with probability softmax(I_m / tau)
    Eq. 10  R_m = lambda * R_m + (1 - lambda) * r,
            lambda = max(lambda_0 - lambda_0 / I_max * (I_m - 1), 0)

Otherwise the mode with the smallest R runs. Before that every mode runs once, in random order.

Two remedies are not the paper's: ``exploration_left``, a factor on rho that a loop lowers on its
way to the target, and ``stale`` with ``refresh``, by which a loop measures again what idle modes
would cost now.
"""

import math
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, Protocol

Choice = Literal["sweep", "explore", "greedy", "fixed"]


def history_weight(interval: int, history: float = 0.4, horizon: int = 5) -> float:
    """Returns the weight of the old cost after ``interval`` stages.

    Args:
        interval: Stages since the mode last ran, at least 1 (I_m).
        history: Weight after one stage (lambda_0).
        horizon: Decay horizon (I_max); the weight reaches 0 at ``horizon + 1``.

    Source: CoMP (arXiv 2604.02956), Eq. (10).
    """
    return max(history - history / horizon * (interval - 1), 0.0)


def exploration_probabilities(intervals: Sequence[int], temperature: float = 5.0) -> list[float]:
    """Returns the probability of exploring each mode, larger the longer it has been idle.

    Args:
        intervals: Stages since each mode last ran (I_m).
        temperature: Temperature of the softmax (tau); infinity makes it uniform.

    Source: CoMP (arXiv 2604.02956), Eq. (9).
    """
    top = max(intervals)
    weights = [math.exp((interval - top) / temperature) for interval in intervals]
    total = sum(weights)
    return [weight / total for weight in weights]


class Strategy(Protocol):
    """What the stage loop asks of any schedule."""

    choice: Choice

    @property
    def live(self) -> list[str]:
        """The modes that are not exhausted."""
        ...

    @property
    def costs(self) -> dict[str, float]:
        """The smoothed cost R of every mode that has run."""
        ...

    def choose(self, exclude: Collection[str] = ()) -> str:
        """Opens the next stage: its mode, or several joined by ``+`` that share its quantum."""
        ...

    def withdraw(self) -> None:
        """Takes the open stage back, as if it had not been chosen."""
        ...

    def record(self, mode: str, cost: float, share: float = 1.0) -> None:
        """Closes the stage with the measured cost r, of a share of what a stage is."""
        ...

    def exhaust(self, mode: str) -> None:
        """Retires a mode that has nothing left to give; an open stage is taken back."""
        ...

    def state(self) -> dict[str, Any]:
        """Returns the whole state as JSON values; ``restore`` is the inverse."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``state``'s output."""
        ...


class MultiModeStrategy:
    """Chooses modes by cost, history and exploration.

    ``choose`` opens a stage and ``record`` closes it; ``exhaust`` retires a mode and takes an
    open stage back, so that a failed attempt costs nothing.

    Args:
        modes: The modes to choose from, in the order that breaks ties.
        exploration: Probability of exploring once every mode has run (rho).
        temperature: Temperature of the exploration softmax (tau); ``math.inf`` explores
            uniformly.
        history: Weight of the old cost one stage later (lambda_0); 0 forgets it at once.
        horizon: Decay horizon of that weight (I_max).
        seed: Seed of the sweep order and of exploration.

    Attributes:
        choice: Why the open stage's mode was chosen.
        stage: The stage counter T.
        exploration_left: What rho is multiplied by; whoever knows how far the target is sets it.

    Raises:
        ValueError: If ``modes`` is empty or repeats a mode, or a number is out of bounds.

    Source: CoMP (arXiv 2604.02956), Eq. (8)-(10) and Algorithm 1.
    """

    def __init__(
        self,
        modes: Sequence[str],
        *,
        exploration: float = 0.2,
        temperature: float = 5.0,
        history: float = 0.4,
        horizon: int = 5,
        seed: int = 0,
    ) -> None:
        if not modes or len(set(modes)) != len(modes):
            raise ValueError(f"modes must be distinct and at least one, but got {list(modes)}")
        for name, value, low, high in (
            ("exploration", exploration, 0.0, 1.0),
            ("history", history, 0.0, 1.0),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name} must be in [{low:g}, {high:g}], but got {value}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, but got {temperature}")
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, but got {horizon}")
        self._modes = list(modes)
        self._exploration = exploration
        self._temperature = temperature
        self._history = history
        self._horizon = horizon
        self._random = random.Random(seed)
        self._sweep = self._random.sample(self._modes, len(self._modes))
        self._costs: dict[str, float] = {}
        self._last_run = dict.fromkeys(self._modes, 0)
        self._measured = dict.fromkeys(self._modes, 0)  # stage of the last run or refresh
        self._live = list(self._modes)
        self._open: str | None = None
        self.stage = 0
        self.choice: Choice = "sweep"
        self.exploration_left = 1.0

    @property
    def costs(self) -> dict[str, float]:
        """The smoothed cost R of every mode that has run."""
        return dict(self._costs)

    @property
    def live(self) -> list[str]:
        """The modes that are not exhausted."""
        return list(self._live)

    def begin_with(self, costs: Mapping[str, float]) -> None:
        """Takes first costs R that were measured otherwise; modes without one are swept.

        Raises:
            RuntimeError: If a stage has been opened already.
        """
        if self.stage:
            raise RuntimeError(f"first costs come too late in stage {self.stage}")
        self._costs = {mode: cost for mode, cost in costs.items() if mode in self._modes}

    @property
    def explore_probability(self) -> float:
        """Probability that the next stage explores, once every mode has a cost."""
        return self._exploration * self.exploration_left

    def stale(self, after: int) -> list[str]:
        """Returns the live modes whose cost has been neither paid nor refreshed for some stages.

        Args:
            after: Stages between the one that measured the cost and the one that opens next, from
                which on it is stale; at least 1.
        """
        since = {mode: self.stage - self._measured[mode] for mode in self._live}
        return [mode for mode in self._live if mode in self._costs and since[mode] >= after]

    def refresh(self, modes: Collection[str], costs: Mapping[str, float]) -> None:
        """Puts costs that were measured without a stage in the place of R; no history is kept.

        Args:
            modes: The modes that were tried; they are not stale for a while.
            costs: What they would cost now; one without keeps its old R.

        Raises:
            RuntimeError: If a stage is open, which decides by the costs that were there.
        """
        if self._open is not None:
            raise RuntimeError(f"costs cannot be refreshed inside stage {self.stage}")
        self._costs.update(costs)
        self._measured.update(dict.fromkeys(modes, self.stage))

    def choose(self, exclude: Collection[str] = ()) -> str:
        """Opens the next stage and returns its mode.

        Args:
            exclude: Modes that this one stage must not take.

        Raises:
            RuntimeError: If a stage is already open or no mode is left to choose.
        """
        if self._open is not None:
            raise RuntimeError(f"stage {self.stage} ({self._open}) is open; record it first")
        candidates = [mode for mode in self._live if mode not in exclude]
        if not candidates:
            raise RuntimeError("every mode is exhausted; there is nothing left to choose")
        self.stage += 1
        self._open = self._pick(candidates)
        return self._open

    def _pick(self, candidates: list[str]) -> str:
        unseen = [mode for mode in self._sweep if mode in candidates and mode not in self._costs]
        if unseen:
            self.choice = "sweep"
            return unseen[0]
        if self._random.random() < self.explore_probability:
            self.choice = "explore"
            intervals = [self.stage - self._last_run[mode] for mode in candidates]
            weights = exploration_probabilities(intervals, self._temperature)
            return self._random.choices(candidates, weights)[0]
        self.choice = "greedy"
        order = {mode: i for i, mode in enumerate(self._modes)}
        return min(candidates, key=lambda m: (self._costs[m], self._last_run[m], order[m]))

    def withdraw(self) -> None:
        """Takes the open stage back, as if it had not been chosen.

        Raises:
            RuntimeError: If no stage is open.
        """
        if self._open is None:
            raise RuntimeError("no stage is open; there is nothing to withdraw")
        self._open = None
        self.stage -= 1

    def record(self, mode: str, cost: float, share: float = 1.0) -> None:
        """Closes the open stage with the cost r that was measured.

        Args:
            mode: The mode that ran.
            cost: Accuracy lost per share of dense FLOPs removed; negative if accuracy rose.
            share: How much of a stage it was, in [0, 1]; a cost counts for as much of what it
                would in Eq. 10, and in full where it is the mode's first.

        Raises:
            ValueError: If ``mode`` is not the open one or ``cost`` is not a finite number.
        """
        if mode != self._open:
            raise ValueError(f"stage {self.stage} is open for {self._open!r}, but got {mode!r}")
        if not math.isfinite(cost):
            raise ValueError(f"the cost of {mode!r} must be a finite number, but got {cost}")
        interval = self.stage - self._last_run[mode]
        weight = 1 - (1 - history_weight(interval, self._history, self._horizon)) * share
        old = self._costs.get(mode)
        self._costs[mode] = cost if old is None else weight * old + (1 - weight) * cost
        self._last_run[mode] = self._measured[mode] = self.stage
        self._open = None

    def exhaust(self, mode: str) -> None:
        """Retires a mode; if its stage is open, the stage is taken back.

        Raises:
            ValueError: If the mode is unknown.
        """
        if mode not in self._modes:
            raise ValueError(f"mode must be one of {self._modes}, but got {mode!r}")
        if mode in self._live:
            self._live.remove(mode)
        if mode == self._open:
            self._open = None
            self.stage -= 1

    def state(self) -> dict[str, Any]:
        """Returns the whole state as JSON values; ``restore`` is the inverse."""
        version, internal, gauss = self._random.getstate()
        return {
            "random": [version, list(internal), gauss],
            "sweep": self._sweep,
            "costs": self._costs,
            "last_run": self._last_run,
            "measured": self._measured,
            "live": self._live,
            "open": self._open,
            "stage": self.stage,
            "choice": self.choice,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``state``'s output."""
        version, internal, gauss = state["random"]
        self._random.setstate((version, tuple(internal), gauss))
        self._sweep = list(state["sweep"])
        self._costs = dict(state["costs"])
        self._last_run = dict(state["last_run"])
        self._measured = dict(state["measured"])
        self._live = list(state["live"])
        self._open = state["open"]
        self.stage = state["stage"]
        self.choice = state["choice"]
