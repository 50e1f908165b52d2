"""A study as it is read: trials, the best one, the Pareto front. Nothing here writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from studies.curves import Spread, spread
from studies.folder import StudyFolder
from studies.goals import Measure
from studies.spec import StudySpec
from studies.storages import JOURNAL, OpenStorage, explaining, open_storage

ENDED = ("complete", "pruned", "fail")


@dataclass(frozen=True)
class TrialSummary:
    """A trial as a person reads it.

    Attributes:
        number: Optuna's number.
        state: ``"complete"``, ``"pruned"``, ``"fail"``, ``"running"`` or ``"waiting"``.
        values: One a measure of the objective, the mean over seeds; empty if it has none.
        by_seed: The same for every seed.
        excess: By how much each constraint is broken, by its name; 0 or less where it is kept.
        params: What Optuna chose.
        runs: Run ids.
        reason: Why it failed or was stopped, ``""`` if it was not.
        minutes: Time from ask to tell, ``None`` before the latter.
        copied_from: Where a trial of a warm start is from, ``""`` for the study's own.
    """

    number: int
    state: str
    values: tuple[float, ...]
    by_seed: tuple[tuple[float, ...], ...]
    excess: dict[str, float]
    params: dict[str, Any]
    runs: tuple[str, ...]
    reason: str
    minutes: float | None
    copied_from: str = ""

    @property
    def value(self) -> float | None:
        """The first objective, ``None`` if it has none."""
        return self.values[0] if self.values else None

    @property
    def is_feasible(self) -> bool:
        """Whether it has values and keeps every constraint."""
        return bool(self.values) and all(excess <= 0 for excess in self.excess.values())

    @property
    def spreads(self) -> tuple[Spread, ...]:
        """Mean and spread of every objective over the seeds."""
        if not self.by_seed:
            return tuple(spread([value]) for value in self.values)
        return tuple(spread(column) for column in zip(*self.by_seed, strict=True))


@dataclass(frozen=True)
class StudySummary:
    """A study as a person reads it.

    Attributes:
        name: Its name.
        n_trials: Trials it is to have.
        counts: Trials by state.
        trials: All of them, by number.
        objective: What is bettered.
        front: The trials that no other beats in every objective, among those that keep all
            constraints; for a single objective the best one.
    """

    name: str
    n_trials: int
    counts: dict[str, int]
    trials: tuple[TrialSummary, ...]
    objective: tuple[Measure, ...]
    front: tuple[TrialSummary, ...] = ()

    @property
    def best(self) -> TrialSummary | None:
        """The trial of the front that is best in the first objective, ``None`` without a front."""
        return self.front[0] if self.front else None

    @property
    def num_ended(self) -> int:
        """Trials of this study's own that are over, whatever came out."""
        return sum(t.state in ENDED and not t.copied_from for t in self.trials)

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to run."""
        return self.num_ended >= self.n_trials and not self.counts.get("running")

    @property
    def why_no_best(self) -> str:
        """A sentence for a study without a best trial."""
        broken = [trial for trial in self.trials if trial.values]
        if not broken:
            return f"study {self.name!r} has no complete trial yet"
        nearest = min(broken, key=lambda trial: max(trial.excess.values()))
        excess = {name: value for name, value in nearest.excess.items() if value > 0}
        shown = ", ".join(f"{name} is exceeded by {value:.3g}" for name, value in excess.items())
        return (
            f"none of {len(broken)} complete trials of study {self.name!r} keeps the constraints; "
            f"the nearest is trial {nearest.number}, where {shown}"
        )


class StudyReader:
    """Reads a study again and again, which costs only what was added since.

    Args:
        folder: Where the study was started.
        spec: What to measure progress by; the frozen spec by default.
    """

    def __init__(self, folder: StudyFolder, spec: StudySpec | None = None) -> None:
        self.folder = folder
        self.spec = spec or folder.read_spec()
        self._opened: OpenStorage | None = None

    def read(self) -> StudySummary:
        """Returns the study as it is now.

        Raises:
            StorageUnreachable: If its storage cannot be read.
        """
        quiet()
        spec = self.spec
        nothing = StudySummary(spec.name, spec.n_trials, {}, (), spec.objective)
        if spec.storage == "journal" and not self.folder.storage.exists(JOURNAL):
            return nothing
        if self._opened is None:
            self._opened = open_storage(spec)
        with explaining(spec.storage):
            try:
                study = optuna.load_study(study_name=spec.name, storage=self._opened.optuna)
            except KeyError:
                return nothing
            trials = study.get_trials(deepcopy=False)
            front = _front(study, trials)
        summaries = tuple(map(summary_of, trials))
        found = [summaries[number] for number in front]
        sign = -1 if spec.objective[0].maximize else 1
        found.sort(key=lambda trial: sign * trial.values[0])
        return StudySummary(
            spec.name, spec.n_trials, counts_of(trials), summaries, spec.objective, tuple(found)
        )


def summarize(folder: StudyFolder, spec: StudySpec | None = None) -> StudySummary:
    """Reads a study once; see ``StudyReader``."""
    return StudyReader(folder, spec).read()


def _front(study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[int]:
    """Returns the numbers of the best trials among those that keep all constraints."""
    feasible = [
        trial
        for trial in trials
        if trial.state == TrialState.COMPLETE and all(x <= 0 for x in trial.constraints.values())
    ]
    if not feasible:
        return []
    if len(study.directions) > 1:
        return [trial.number for trial in study.best_trials]
    is_up = study.direction == optuna.study.StudyDirection.MAXIMIZE
    best = (max if is_up else min)(feasible, key=lambda trial: trial.value or 0.0)
    return [best.number]


def summary_of(trial: FrozenTrial) -> TrialSummary:
    """Returns a trial of Optuna's as a person reads it."""
    is_complete = trial.state == TrialState.COMPLETE
    by_seed: dict[str, list[float]] = trial.user_attrs.get("by_seed", {})
    return TrialSummary(
        number=trial.number,
        state=trial.state.name.lower(),
        values=tuple(trial.values) if is_complete else (),
        by_seed=tuple(tuple(values) for values in by_seed.values()) if is_complete else (),
        excess=dict(trial.constraints),
        params=dict(trial.params),
        runs=tuple(trial.user_attrs.get("runs", ())),
        reason=str(trial.user_attrs.get("reason", "")),
        minutes=trial.duration.total_seconds() / 60 if trial.duration else None,
        copied_from=str(trial.user_attrs.get("warm_start", "")),
    )


def counts_of(trials: Sequence[FrozenTrial]) -> dict[str, int]:
    """Returns how many trials are in each state, by its name in lower case."""
    counts: dict[str, int] = {}
    for trial in trials:
        name = trial.state.name.lower()
        counts[name] = counts.get(name, 0) + 1
    return counts


def quiet() -> None:
    """Keeps Optuna from telling every trial's values."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
