"""The multi-mode pruning strategy (MPS): which mode to prune next. Pure Python, no torch.

In plain text, with T the stage counter, T_m the stage in which mode m last ran and
I_m = T - T_m:

    Eq. 8   r   = (accuracy before - accuracy after) / share of dense FLOPs removed
    Eq. 9   explore with probability rho, mode m with probability softmax(I_m / tau)
    Eq. 10  R_m = lambda * R_m + (1 - lambda) * r,
            lambda = max(lambda_0 - lambda_0 / I_max * (I_m - 1), 0)

Otherwise the mode with the smallest R runs. Before that every mode runs once, in random order.
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

    def record(self, mode: str, cost: float) -> None:
        """Closes the stage with the measured cost r."""
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
        self._live = list(self._modes)
        self._open: str | None = None
        self.stage = 0
        self.choice: Choice = "sweep"

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
        if self._random.random() < self._exploration:
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

    def record(self, mode: str, cost: float) -> None:
        """Closes the open stage with the cost r that was measured.

        Args:
            mode: The mode that ran.
            cost: Accuracy lost per share of dense FLOPs removed; negative if accuracy rose.

        Raises:
            ValueError: If ``mode`` is not the open one or ``cost`` is not a finite number.
        """
        if mode != self._open:
            raise ValueError(f"stage {self.stage} is open for {self._open!r}, but got {mode!r}")
        if not math.isfinite(cost):
            raise ValueError(f"the cost of {mode!r} must be a finite number, but got {cost}")
        interval = self.stage - self._last_run[mode]
        weight = history_weight(interval, self._history, self._horizon)
        old = self._costs.get(mode)
        self._costs[mode] = cost if old is None else weight * old + (1 - weight) * cost
        self._last_run[mode] = self.stage
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
        self._live = list(state["live"])
        self._open = state["open"]
        self.stage = state["stage"]
        self.choice = state["choice"]


class FixedStrategy:
    """Prunes all its groups of modes in every stage, or one group after the other.

    The joint baselines (SJP and its one-sided forms) prune parameters of all modalities by one
    ranking and tokens of both streams by one threshold; a group is a set of modes that shares a
    ranking.

    Args:
        groups: Mode groups, in the order of use when ``sequential``.
        sequential: Finish one group's share of the way before the next begins; the loop calls
            ``advance`` at the turn.

    Raises:
        ValueError: If there is no mode at all.
    """

    def __init__(self, groups: Sequence[Sequence[str]], *, sequential: bool = False) -> None:
        self._groups = [list(group) for group in groups if group]
        if not self._groups:
            raise ValueError("groups must name at least one mode, but got none")
        self._sequential = sequential
        self._position = 0
        self.stage = 0
        self.choice: Choice = "fixed"

    @property
    def live(self) -> list[str]:
        """The modes that are not exhausted."""
        return [mode for group in self._groups for mode in group]

    @property
    def costs(self) -> dict[str, float]:
        """Empty: a fixed schedule asks for no cost."""
        return {}

    def choose(self, exclude: Collection[str] = ()) -> str:
        """Opens the next stage and returns all modes that are pruned in it, joined by ``+``.

        Args:
            exclude: Modes that this one stage must not take.

        Raises:
            RuntimeError: If no mode is left to choose.
        """
        groups = [[mode for mode in group if mode not in exclude] for group in self._groups]
        if not any(groups):
            raise RuntimeError("every mode is exhausted; there is nothing left to choose")
        self.stage += 1
        if self._sequential:
            later = groups[self._position :] + groups[: self._position]
            return "+".join(next(group for group in later if group))
        return "+".join(mode for group in groups for mode in group)

    def withdraw(self) -> None:
        """Takes the open stage back, as if it had not been chosen."""
        self.stage -= 1

    def advance(self) -> None:
        """Moves on to the next group, if there is one with a live mode."""
        if any(self._groups[self._position + 1 :]):
            self._position += 1

    def record(self, mode: str, cost: float) -> None:
        """Closes the stage; the cost changes nothing."""

    def exhaust(self, mode: str) -> None:
        """Retires a mode."""
        for group in self._groups:
            if mode in group:
                group.remove(mode)
        if self._sequential and self.live and not any(self._groups[self._position :]):
            self._position = 0

    def state(self) -> dict[str, Any]:
        """Returns the whole state as JSON values; ``restore`` is the inverse."""
        return {"groups": self._groups, "position": self._position, "stage": self.stage}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``state``'s output."""
        self._groups = [list(group) for group in state["groups"]]
        self._position = state["position"]
        self.stage = state["stage"]


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

    def record(self, mode: str, cost: float) -> None:
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
