"""The schedules of the joint baselines: which modes share a stage is fixed. No torch."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from comp.strategy import Choice


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

    def record(self, mode: str, cost: float, share: float = 1.0) -> None:
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
