"""Optuna's samplers and pruners, as a spec asks for them."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from studies.errors import SpecError
from studies.search import (
    CmaesSampler,
    GpSampler,
    GridSampler,
    HyperbandPruner,
    MedianPruner,
    Nsga2Sampler,
    PatiencePruner,
    RandomSampler,
    StartSampler,
    TpeSampler,
    WilcoxonPruner,
)
from studies.space import grid_of, is_close, starting_point
from studies.spec import StudySpec


class AskedGrid(optuna.samplers.GridSampler):
    """A grid for a loop that asks and tells; Optuna's own would stop a loop that is not there.

    A trial that was enqueued counts for the combination that it is of, which Optuna's own would
    ask for once more.
    """

    @property
    def size(self) -> int:
        """Number of combinations."""
        return self._n_min_trials

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Gives a trial its combination: the enqueued one, or the next that is left."""
        if "grid_id" in trial.system_attrs:
            return
        enqueued = trial.system_attrs.get("fixed_params")
        if enqueued is None:
            place: int | None = min(self._get_unvisited_grid_ids(study))
        else:
            place = self._place_of(enqueued)
        if place is None:
            return
        attrs: dict[str, Any] = {"search_space": self._search_space, "grid_id": place}
        for name, value in attrs.items():
            study._storage.set_trial_system_attr(trial._trial_id, name, value)

    def _place_of(self, labels: Mapping[str, Any]) -> int | None:
        if set(labels) != set(self._param_names):
            return None
        for place, combination in enumerate(self._all_grids):
            if all(
                labels[name] == value or is_close(labels[name], value)
                for name, value in zip(self._param_names, combination, strict=True)
            ):
                return place
        return None

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Does nothing: whoever asks looks at ``is_used_up`` first."""

    def is_used_up(self, trials: Sequence[FrozenTrial]) -> bool:
        """Tells whether every combination was asked for."""
        asked = {trial.system_attrs.get("grid_id") for trial in trials} - {None}
        return len(asked) >= self.size


class StartingSampler(BaseSampler):
    """Gives every key that is not asked for the value of trial 0.

    Args:
        labels: The parameters of trial 0.
    """

    def __init__(self, labels: Mapping[str, Any]) -> None:
        self._labels = labels

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Returns nothing: keys do not depend on each other."""
        return {}

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """Returns nothing, see above."""
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Returns the value of trial 0; a key that is not active there takes its first one."""
        if param_name in self._labels:
            return self._labels[param_name]
        first: Any = param_distribution
        return first.choices[0] if isinstance(first, CategoricalDistribution) else first.low


def build_sampler(spec: StudySpec) -> BaseSampler:
    """Returns Optuna's sampler.

    Raises:
        SpecError: If it needs a package that is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return _sampler(spec)
    except ImportError as error:
        raise SpecError(
            f"sampler {spec.sampler.kind!r} needs a package that is not installed ({error}); pip "
            "install it or take another sampler"
        ) from None


def _sampler(spec: StudySpec) -> BaseSampler:
    section = spec.sampler
    match section:
        case TpeSampler():
            # Keys that come and go with others are modelled group by group.
            is_conditional = any(domain.when for domain in spec.space.values())
            return optuna.samplers.TPESampler(
                seed=section.seed,
                n_startup_trials=section.startup_trials,
                group=is_conditional,
                multivariate=True,
            )
        case GpSampler():
            return optuna.samplers.GPSampler(
                seed=section.seed,
                n_startup_trials=section.startup_trials,
                warn_independent_sampling=False,
            )
        case CmaesSampler():
            import cmaes  # noqa: F401 - Optuna would miss it only at the second trial

            return optuna.samplers.CmaEsSampler(
                seed=section.seed,
                n_startup_trials=section.startup_trials,
                popsize=section.population,
                warn_independent_sampling=False,
            )
        case Nsga2Sampler():
            return optuna.samplers.NSGAIISampler(
                seed=section.seed, population_size=section.population
            )
        case GridSampler():
            return AskedGrid(grid_of(spec.space), seed=section.seed)
        case RandomSampler():
            return optuna.samplers.RandomSampler(seed=section.seed)
        case StartSampler():
            return StartingSampler(starting_point(spec.pruning, spec.space))


def build_pruner(spec: StudySpec) -> BasePruner:
    """Returns Optuna's pruner; steps are ratios in per mille, or the numbers of seeds."""
    if spec.pruner is None:
        return optuna.pruners.NopPruner()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return _pruner(spec.pruner, largest_ratio(spec))


def _pruner(section: Any, largest: float) -> BasePruner:
    match section:
        case MedianPruner():
            return optuna.pruners.MedianPruner(
                n_startup_trials=section.startup_trials,
                n_warmup_steps=round(1000 * section.warmup_ratio),
            )
        case HyperbandPruner():
            steps = math.floor(largest / section.every + 1e-9)
            step = round(1000 * section.every)
            return optuna.pruners.HyperbandPruner(
                min_resource=step,
                max_resource=max(step, step * steps),
                reduction_factor=section.reduction_factor,
            )
        case PatiencePruner():
            return optuna.pruners.PatientPruner(
                None, patience=section.patience, min_delta=section.drop
            )
        case WilcoxonPruner():
            return optuna.pruners.WilcoxonPruner(
                p_threshold=section.p, n_startup_steps=section.startup_seeds
            )
    raise TypeError(f"no such pruner: {section!r}")


def largest_ratio(spec: StudySpec) -> float:
    """Returns the largest ratio that a trial of a study may be asked for."""
    from studies.domains import TARGET_RATIO, ChoiceDomain, FixedDomain

    found = [spec.pruning.ratios[-1]]
    for key, domain in spec.space.items():
        if key not in (TARGET_RATIO, "ratios"):
            continue
        if isinstance(domain, ChoiceDomain):
            values = [domain.value_of(label) for label in domain.labels]
        else:
            values = [domain.value if isinstance(domain, FixedDomain) else domain.high]
        found += [max(v) if isinstance(v, (list, tuple)) else float(v) for v in values]
    return max(found)
