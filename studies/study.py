"""Optuna's side of a study for its driver: trials to run, and what they are told.

One driver is the only writer. A trial that a dead driver left RUNNING is adopted under its number,
because such trials bias the sampler and their work is on disk.
"""

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, Trial, TrialState

from comp.config import PruningConfig
from studies.errors import SpecError
from studies.folder import StudyFolder, check_same
from studies.matrix import CELL
from studies.requests import Requests
from studies.samplers import AskedGrid, StartingSampler, build_pruner, build_sampler
from studies.space import starting_point, suggest
from studies.spec import StudySpec, identity
from studies.specfile import spec_of
from studies.storages import explaining, open_storage
from studies.summary import counts_of, quiet
from studies.warm_start import WARM_START, copy_trials

IDENTITY = "spec"  # the attribute of an Optuna study that says what it is of
FOLDER = "folder"  # and the one that says which folder's driver writes it

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class OpenTrial:
    """A trial that waits to be told.

    Attributes:
        number: Optuna's number.
        config: What it tries.
        cell: The cell of the study's matrix, ``""`` without one.
        reported: Steps that already have an intermediate value.
    """

    number: int
    config: PruningConfig
    cell: str
    reported: set[int]
    _trial: Trial = field(repr=False)

    def note(self, **attrs: Any) -> None:
        """Writes user attributes, which dashboards show beside the trial."""
        for name, value in attrs.items():
            self._trial.set_user_attr(name, value)

    def report(self, step: int, value: float) -> None:
        """Reports an intermediate value, once a step."""
        if step not in self.reported:
            self.reported.add(step)
            self._trial.report(value, step)

    def should_prune(self) -> bool:
        """Asks the study's pruner about what was reported so far."""
        return self._trial.should_prune()

    def complete(self, values: Sequence[float], excess: Mapping[str, float]) -> None:
        """Tells the objectives, and by how much each constraint is broken (0 or less: kept)."""
        if self._is_finished:
            return
        for name, value in excess.items():
            self._trial.set_constraint(name, value)
        self._trial.study.tell(self._trial, list(values), skip_if_finished=True)

    def prune(self, reason: str) -> None:
        """Tells that the pruner stopped it, and where."""
        self.note(reason=reason)
        self._trial.study.tell(self._trial, state=TrialState.PRUNED)

    def fail(self, reason: str, kind: str) -> None:
        """Tells that there will be no value, and why."""
        self.note(reason=reason, failure=kind)
        self._trial.study.tell(self._trial, state=TrialState.FAIL)

    @property
    def _is_finished(self) -> bool:
        storage = self._trial.study._storage
        return storage.get_trial(self._trial._trial_id).state.is_finished()


class Study:
    """A study that may be written to.

    Args:
        spec: The checked spec; its folder must exist.

    Raises:
        SpecError: If the storage holds a study of this name and another spec or of another
            folder, as a database that several people share may; or if there is nothing to start
            from where the spec has a ``warm_start``.
        StorageUnreachable: If the storage cannot be opened.
    """

    def __init__(self, spec: StudySpec) -> None:
        self.spec = spec
        quiet()
        self._sampler = build_sampler(spec)
        opened = open_storage(spec)
        self._journal = opened.journal
        self._requests = Requests(StudyFolder.of(spec))
        with explaining(spec.storage):
            self._study = optuna.create_study(
                storage=opened.optuna,
                study_name=spec.name,
                sampler=self._sampler,
                pruner=build_pruner(spec),
                directions=["maximize" if m.maximize else "minimize" for m in spec.objective],
                load_if_exists=True,
            )
            if IDENTITY in self._study.user_attrs:
                check_same(_stored_spec(self._study), spec)
            if opened.is_shared:
                self._claim()
            self._set_up()
            trials = self._study.get_trials(deepcopy=False)
            self._num_copied = len(trials) - len(_own(trials))

    def _claim(self) -> None:
        """Keeps drivers of other folders off a study in a database.

        Within one folder they are kept apart by its lock.
        """
        mine = StudyFolder.of(self.spec).uid
        owner = self._study.user_attrs.get(FOLDER)
        if owner is None:
            self._study.set_user_attr(FOLDER, mine)
        elif owner != mine:
            raise SpecError(
                f"study {self.spec.name!r} in storage {self.spec.storage} is written from another "
                "root; go on with it there or give this study another name"
            )

    def _set_up(self) -> None:
        """Writes what a new study begins with; a driver that died amid it left a part."""
        if IDENTITY not in self._study.user_attrs:
            self._study.set_user_attr(IDENTITY, identity(self.spec))
            with warnings.catch_warnings():  # they name the axes of the Optuna dashboard
                warnings.simplefilter("ignore", ExperimentalWarning)
                self._study.set_metric_names([goal.name for goal in self.spec.objective])
        number = len(self._study.get_trials(deepcopy=False))
        start = starting_point(self.spec.pruning, self.spec.space)
        first = [(start, "defaults"), *((labels, "spec") for labels in self.spec.enqueue)]
        if WARM_START not in self._study.user_attrs:
            for labels, origin in first[number:]:
                self._enqueue(labels, {"start": origin})
            copy_trials(self.spec, self._study)

    def _enqueue(self, labels: Mapping[str, Any], attrs: Mapping[str, Any]) -> None:
        self._study.enqueue_trial(dict(labels), user_attrs=dict(attrs))

    def adopt(self) -> Iterator[OpenTrial]:
        """Yields the trials that an earlier driver left RUNNING."""
        for frozen in self._study.get_trials(states=(TrialState.RUNNING,)):
            trial = Trial(self._study, frozen._trial_id)
            opened = self._open(trial, set(frozen.intermediate_values))
            if opened is not None:
                yield opened

    def ask(self) -> OpenTrial | None:
        """Returns the next trial; ``None`` once there is none left to ask."""
        while True:
            trials = self._take_requests()
            num_waiting = sum(trial.state == TrialState.WAITING for trial in trials)
            if len(trials) - num_waiting - self._num_copied >= self.spec.n_trials:
                return None
            if not num_waiting and self._is_used_up(trials):
                return None
            opened = self._open(self._study.ask(), set())
            if opened is not None:
                return opened

    def _is_used_up(self, trials: Sequence[FrozenTrial]) -> bool:
        """Tells whether the sampler has nothing to propose beyond what was enqueued."""
        if isinstance(self._sampler, AskedGrid):
            return self._sampler.is_used_up(_own(trials))
        return isinstance(self._sampler, StartingSampler)

    def _take_requests(self) -> list[FrozenTrial]:
        """Enqueues what people asked for since the last time, and returns all trials."""
        trials = self._study.get_trials(deepcopy=False)
        requests = self._requests.read()
        if not requests:
            return trials
        taken = {trial.user_attrs.get("request") for trial in trials}
        for request, labels in requests.items():
            if request not in taken:
                self._enqueue(labels, {"start": "request", "request": request})
            self._requests.remove(request)
        return self._study.get_trials(deepcopy=False)

    def _open(self, trial: Trial, reported: set[int]) -> OpenTrial | None:
        try:
            cell = self._choose_cell(trial)
            config = suggest(trial, self.spec.in_cell(cell).pruning, self.spec.space)
        except ValueError as error:
            trial.set_user_attr("reason", f"its settings do not fit together: {error}")
            self._study.tell(trial, state=TrialState.FAIL)
            logger.warning("trial %d failed: %s", trial.number, error)
            return None
        trial.set_user_attr("config", json.dumps(config.to_dict()))
        self._make_durable()
        return OpenTrial(trial.number, config, cell, reported, trial)

    def _choose_cell(self, trial: Trial) -> str:
        """Asks for the cell first, because the other keys start from its config."""
        if self.spec.matrix is None:
            return ""
        return str(trial.suggest_categorical(CELL, list(self.spec.cells)))

    def _make_durable(self) -> None:
        """Keeps a power cut from forgetting a trial whose jobs have written files."""
        if self._journal is not None:
            self._journal.sync()

    def counts(self) -> dict[str, int]:
        """Returns how many trials are in each state, by its name in lower case."""
        return counts_of(self._study.get_trials(deepcopy=False))


def _own(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Returns the trials that a warm start did not copy."""
    return [trial for trial in trials if WARM_START not in trial.user_attrs]


def _stored_spec(study: optuna.Study) -> StudySpec:
    spec = spec_of(study.user_attrs[IDENTITY], f"study {study.study_name!r} in its storage")
    if not isinstance(spec, StudySpec):
        raise SpecError(f"study {study.study_name!r} in its storage is of kind {spec.kind!r}")
    return spec
