"""Begins a study with the finished trials of an earlier one.

A trial is copied if this study could have made it: every setting that this study searches lies in
its domain, and every other one is what this study has.
"""

import dataclasses
import json
import logging
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from comp.config import PruningConfig
from orchestration.storage import last_name, parent
from studies.domains import ChoiceDomain, Domain, FixedDomain, FloatDomain, IntDomain
from studies.errors import SpecError
from studies.folder import StudyFolder
from studies.space import Space, base_value, config_of, is_active, label_of, values_of
from studies.spec import StudySpec
from studies.storages import explaining, open_storage

WARM_START = "warm_start"  # of a trial: where it is from; of a study: how many were copied
SAME = ("model", "task", "data", "seeds", "objective", "constraints")

logger = logging.getLogger(__name__)


def copy_trials(spec: StudySpec, study: optuna.Study) -> int:
    """Copies what fits from the study that a spec's ``warm_start`` names, once.

    Returns:
        The number of copied trials.

    Raises:
        SpecError: If there is no such study, it looked for something else, or no trial fits.
    """
    if spec.warm_start is None:
        study.set_user_attr(WARM_START, 0)
        return 0
    folder = find_earlier(spec, spec.warm_start)
    earlier = folder.read_spec()
    check_alike(spec, earlier)
    with explaining(earlier.storage):
        try:
            source = optuna.load_study(
                study_name=earlier.name, storage=open_storage(earlier).optuna
            )
        except KeyError:
            raise SpecError(f"warm_start: study {earlier.name!r} has no trials yet") from None
        finished = source.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    fitting, reason = [], ""
    for trial in finished:
        try:
            fitting.append(_translate(spec, trial, folder.name))
        except ValueError as error:
            reason = f"trial {trial.number}: {error}"
    if not fitting:
        why = f"none of its {len(finished)} finished trials lies in this space ({reason})"
        raise SpecError(
            f"warm_start: study {folder.name!r} cannot be used: "
            + (why if finished else "it has no finished trial")
            + "; widen the space or leave warm_start out"
        )
    have = {trial.user_attrs.get(WARM_START) for trial in study.get_trials(deepcopy=False)}
    study.add_trials(trial for trial in fitting if trial.user_attrs[WARM_START] not in have)
    study.set_user_attr(WARM_START, len(fitting))
    logger.warning(
        "%d of %d finished trials of study %r lie in this space and were copied",
        len(fitting),
        len(finished),
        folder.name,
    )
    return len(fitting)


def find_earlier(spec: StudySpec, place: str) -> StudyFolder:
    """Returns the folder of a study that is named, or whose directory is given.

    Raises:
        SpecError: If there is none.
    """
    if place == spec.name:
        raise SpecError(f"warm_start: study {place!r} cannot start from itself")
    if "/" in place.rstrip("/"):
        return StudyFolder.find(parent(place.rstrip("/"), 2), last_name(place.rstrip("/")))
    return StudyFolder.find(spec.root, place)


def check_alike(spec: StudySpec, earlier: StudySpec) -> None:
    """Refuses an earlier study whose values mean something else.

    Raises:
        SpecError: With the first key that differs.
    """
    new, old = spec.model_dump(mode="json"), earlier.model_dump(mode="json")
    for key in SAME:
        if new[key] != old[key]:
            raise SpecError(
                f"warm_start: study {earlier.name!r} has {key} = {json.dumps(old[key])}, but this "
                f"one has {json.dumps(new[key])}, so their values cannot be compared; leave "
                "warm_start out"
            )


def _translate(spec: StudySpec, trial: FrozenTrial, study: str) -> FrozenTrial:
    """Returns a trial as this study would have made it.

    Raises:
        ValueError: If it could not have.
    """
    config = PruningConfig.from_dict(json.loads(trial.user_attrs["config"]))
    labels = _labels(spec.space, config)
    again = config_of(spec.pruning, values_of(spec.space, labels))
    _check_equal(again, config)
    searched = {k: v for k, v in labels.items() if not isinstance(spec.space[k], FixedDomain)}
    copy = optuna.trial.create_trial(
        state=TrialState.COMPLETE,
        values=trial.values,
        params=searched,
        distributions={key: distribution_of(spec.space[key]) for key in searched},
        user_attrs={**trial.user_attrs, WARM_START: f"{study}#{trial.number}"},
    )
    for name, excess in trial.constraints.items():
        copy.set_constraint(name, excess)
    return copy


def _labels(space: Space, config: PruningConfig) -> dict[str, Any]:
    labels: dict[str, Any] = {}
    for key, domain in space.items():
        if not is_active(domain, labels):
            continue
        try:
            labels[key] = label_of(domain, base_value(config, key))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    return labels


def _check_equal(one: PruningConfig, other: PruningConfig) -> None:
    for item in dataclasses.fields(PruningConfig):
        if item.name == "seed":
            continue
        here, there = getattr(one, item.name), getattr(other, item.name)
        if here != there:
            raise ValueError(f"{item.name} is {there!r} there and {here!r} here")


def distribution_of(domain: Domain) -> BaseDistribution:
    """Returns Optuna's distribution of a searched domain.

    Raises:
        TypeError: If it is a fixed one.
    """
    match domain:
        case IntDomain():
            return IntDistribution(domain.low, domain.high, log=domain.log, step=domain.step)
        case FloatDomain():
            return FloatDistribution(domain.low, domain.high, log=domain.log, step=domain.step)
        case ChoiceDomain():
            return CategoricalDistribution(domain.labels)
    raise TypeError(f"a fixed domain has no distribution, but got {domain!r}")
