"""Optuna's side of a study: its storage, its trials, what they were told.

One driver is the only writer. A trial that a dead driver left RUNNING is adopted under its number,
because such trials bias the sampler and their work is on disk.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from comp.config import PruningConfig
from studies.errors import SpecError
from studies.folder import StudyFolder, check_same
from studies.journal import FileJournal, ObjectJournal
from studies.space import starting_point, suggest
from studies.spec import StudySpec, identity
from studies.specfile import spec_of

JOURNAL = "optuna.journal"
IDENTITY = "spec"  # the attribute of an Optuna study that says what it is of


@dataclass(eq=False)
class OpenTrial:
    """A trial that waits to be told.

    Attributes:
        number: Optuna's number.
        config: What it tries.
        reported: Steps (ratio in per mille) that already have an intermediate value.
    """

    number: int
    config: PruningConfig
    reported: set[int]
    _trial: Trial = field(repr=False)

    def note(self, **attrs: Any) -> None:
        """Writes user attributes, which dashboards show beside the trial."""
        for name, value in attrs.items():
            self._trial.set_user_attr(name, value)

    def report(self, ratio: float, val: float) -> None:
        """Reports an intermediate value once; the step is the ratio in per mille."""
        step = round(1000 * ratio)
        if step not in self.reported:
            self.reported.add(step)
            self._trial.report(val, step)

    def complete(self, value: float) -> None:
        """Tells the objective."""
        self._trial.study.tell(self._trial, value, skip_if_finished=True)

    def fail(self, reason: str, kind: str) -> None:
        """Tells that there will be no value, and why."""
        self.note(reason=reason, failure=kind)
        self._trial.study.tell(self._trial, state=TrialState.FAIL)


class Study:
    """A study that may be written to.

    Args:
        spec: The checked spec; its folder must exist.

    Raises:
        SpecError: If the storage cannot be opened, or holds a study of this name and another
            spec, as a database that several people share may.
    """

    def __init__(self, spec: StudySpec) -> None:
        self.spec = spec
        _quiet()
        storage, self._journal = _storage(spec)
        self._study = optuna.create_study(
            storage=storage,
            study_name=spec.name,
            sampler=optuna.samplers.TPESampler(
                seed=spec.sampler.seed, n_startup_trials=spec.sampler.startup_trials
            ),
            direction="maximize",
            load_if_exists=True,
        )
        if IDENTITY in self._study.user_attrs:
            check_same(_stored_spec(self._study), spec)
        else:
            self._study.set_user_attr(IDENTITY, identity(spec))
        if not self._study.get_trials(deepcopy=False):
            start = starting_point(spec.pruning, spec.space)
            self._study.enqueue_trial(start, user_attrs={"start": "defaults"})

    def adopt(self) -> Iterator[OpenTrial]:
        """Yields the trials that an earlier driver left RUNNING."""
        for frozen in self._study.get_trials(states=(TrialState.RUNNING,)):
            trial = Trial(self._study, frozen._trial_id)
            yield self._open(trial, set(frozen.intermediate_values))

    def ask(self) -> OpenTrial | None:
        """Returns the next trial; ``None`` once the spec's ``n_trials`` were asked."""
        trials = self._study.get_trials(deepcopy=False)
        if sum(trial.state != TrialState.WAITING for trial in trials) >= self.spec.n_trials:
            return None
        return self._open(self._study.ask(), set())

    def _open(self, trial: Trial, reported: set[int]) -> OpenTrial:
        config = suggest(trial, self.spec.pruning, self.spec.space)
        trial.set_user_attr("config", json.dumps(config.to_dict()))
        self._make_durable()
        return OpenTrial(trial.number, config, reported, trial)

    def _make_durable(self) -> None:
        """Keeps a power cut from forgetting a trial whose jobs have written files."""
        if self._journal is not None:
            self._journal.sync()

    def counts(self) -> dict[str, int]:
        """Returns how many trials are in each state, by its name in lower case."""
        return _counts(self._study.get_trials(deepcopy=False))


@dataclass(frozen=True)
class TrialSummary:
    """A trial as a person reads it.

    Attributes:
        number: Optuna's number.
        state: ``"complete"``, ``"fail"``, ``"running"`` or ``"waiting"``.
        value: The objective, ``None`` if it has none.
        params: What Optuna chose.
        runs: Run ids.
        reason: Why it failed, ``""`` if it did not.
        minutes: Time from ask to tell, ``None`` before the latter.
    """

    number: int
    state: str
    value: float | None
    params: dict[str, Any]
    runs: tuple[str, ...]
    reason: str
    minutes: float | None


@dataclass(frozen=True)
class StudySummary:
    """A study as a person reads it.

    Attributes:
        name: Its name.
        n_trials: Trials it is to have.
        counts: Trials by state.
        trials: All of them, by number.
    """

    name: str
    n_trials: int
    counts: dict[str, int]
    trials: tuple[TrialSummary, ...]

    @property
    def best(self) -> TrialSummary | None:
        """The complete trial with the highest value, ``None`` if there is none."""
        done = [trial for trial in self.trials if trial.value is not None]
        return max(done, key=lambda trial: trial.value or 0.0, default=None)

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to run."""
        ended = self.counts.get("complete", 0) + self.counts.get("fail", 0)
        return ended >= self.n_trials and not self.counts.get("running")


def summarize(folder: StudyFolder, spec: StudySpec | None = None) -> StudySummary:
    """Reads a study without writing to it.

    Args:
        folder: Where the study was started.
        spec: What to measure progress by; the frozen spec by default.

    Raises:
        SpecError: If its storage cannot be read.
    """
    spec = spec or folder.read_spec()
    _quiet()
    if spec.storage == "journal" and not folder.storage.exists(JOURNAL):
        return StudySummary(spec.name, spec.n_trials, {}, ())
    try:
        study = optuna.load_study(study_name=spec.name, storage=_storage(spec)[0])
    except KeyError:
        return StudySummary(spec.name, spec.n_trials, {}, ())
    trials = study.get_trials(deepcopy=False)
    return StudySummary(spec.name, spec.n_trials, _counts(trials), tuple(map(_summary, trials)))


def _summary(trial: FrozenTrial) -> TrialSummary:
    is_complete = trial.state == TrialState.COMPLETE
    return TrialSummary(
        number=trial.number,
        state=trial.state.name.lower(),
        value=trial.value if is_complete else None,
        params=dict(trial.params),
        runs=tuple(trial.user_attrs.get("runs", ())),
        reason=str(trial.user_attrs.get("reason", "")),
        minutes=trial.duration.total_seconds() / 60 if trial.duration else None,
    )


def _counts(trials: list[FrozenTrial]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for trial in trials:
        name = trial.state.name.lower()
        counts[name] = counts.get(name, 0) + 1
    return counts


def _stored_spec(study: optuna.Study) -> StudySpec:
    spec = spec_of(study.user_attrs[IDENTITY], f"study {study.study_name!r} in its storage")
    if not isinstance(spec, StudySpec):
        raise SpecError(f"study {study.study_name!r} in its storage is of kind {spec.kind!r}")
    return spec


def _storage(spec: StudySpec) -> tuple[optuna.storages.BaseStorage, FileJournal | None]:
    """Opens a study's storage, and its journal file if that is what it is."""
    if spec.storage == "journal":
        journal = StudyFolder.of(spec).storage.child(JOURNAL)
        if journal.local is None:
            return optuna.storages.JournalStorage(ObjectJournal(journal)), None
        file = FileJournal(journal.local)
        return optuna.storages.JournalStorage(file), file
    try:
        return optuna.storages.RDBStorage(spec.storage), None
    except ImportError as error:
        scheme = spec.storage.partition("://")[0]
        raise SpecError(
            f"storage {scheme}:// needs a database driver that is not installed ({error}); "
            "pip install psycopg2-binary, or leave storage out for a journal file"
        ) from None


def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
