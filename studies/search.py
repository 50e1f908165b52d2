"""The sections of a spec that say how Optuna searches: its samplers and its pruners.

:mod:`studies.samplers` turns them into Optuna's objects.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from studies.domains import Number, Section

Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
Count = Annotated[int, Field(strict=True, ge=0)]


class _SeededSampler(Section):
    """What all samplers have.

    Attributes:
        seed: Seed of the proposals. With several trials at a time the order in which they end
            matters too, so a repeat is exact only with ``parallel: 1`` and no interruption.
    """

    seed: Seed = 0


class TpeSampler(_SeededSampler):
    """Optuna's tree-structured Parzen estimator; several objectives and constraints as well.

    Attributes:
        startup_trials: Trials drawn at random before the estimator takes over.
    """

    kind: Literal["tpe"] = "tpe"
    startup_trials: Count = 10


class GpSampler(_SeededSampler):
    """A Gaussian process: for few, expensive trials; several objectives and constraints as well.

    Attributes:
        startup_trials: Trials drawn at random before the process takes over.
    """

    kind: Literal["gp"]
    startup_trials: Count = 10


class CmaesSampler(_SeededSampler):
    """CMA-ES: for numbers only, categorical keys being drawn at random; one objective.

    Attributes:
        startup_trials: Trials drawn at random before the evolution begins.
        population: Trials of one generation; ``null`` lets the number of keys decide.
    """

    kind: Literal["cmaes"]
    startup_trials: Count = 1
    population: Annotated[int, Field(strict=True, ge=2)] | None = None


class Nsga2Sampler(_SeededSampler):
    """NSGA-II: a genetic algorithm for several objectives and many trials.

    Attributes:
        population: Trials of one generation; the first one is random.
    """

    kind: Literal["nsga2"]
    population: Annotated[int, Field(strict=True, ge=2)] = 50


class GridSampler(_SeededSampler):
    """Every combination once, in an order that the seed shuffles; floats need a ``step``."""

    kind: Literal["grid"]


class RandomSampler(_SeededSampler):
    """Independent draws: the baseline of every other sampler."""

    kind: Literal["random"]


class StartSampler(Section):
    """Draws nothing: a key that ``enqueue`` leaves out has its value of trial 0.

    So a study tries what it lists and no more: changes each alone, or chosen combinations.
    """

    kind: Literal["start"]


def _sampler_kind(values: Any) -> str:
    is_mapping = isinstance(values, Mapping)
    kind = values.get("kind", "tpe") if is_mapping else getattr(values, "kind", values)
    return str(kind)


Sampler = Annotated[
    Annotated[TpeSampler, Tag("tpe")]
    | Annotated[GpSampler, Tag("gp")]
    | Annotated[CmaesSampler, Tag("cmaes")]
    | Annotated[Nsga2Sampler, Tag("nsga2")]
    | Annotated[GridSampler, Tag("grid")]
    | Annotated[RandomSampler, Tag("random")]
    | Annotated[StartSampler, Tag("start")],
    Discriminator(_sampler_kind),
]


class _StagePruner(Section):
    """A pruner that compares trials at the same FLOPs ratio.

    Attributes:
        every: Validation accuracy is reported whenever a run has passed a multiple of this ratio,
            read off the line between the stages around it and before any fine-tuning.
    """

    every: Annotated[Number, Field(gt=0, le=0.5)] = 0.05


class MedianPruner(_StagePruner):
    """Stops a trial that has kept less accuracy so far than the median of the earlier ones.

    Optuna compares the best value that a trial has reported, and accuracy falls as the ratio
    rises, so what is reported is the area under the curve up to a ratio, in points of accuracy.

    Attributes:
        startup_trials: Trials that must have ended before any is stopped.
        warmup_ratio: No trial is stopped before this ratio.
    """

    kind: Literal["median"]
    startup_trials: Count = 5
    warmup_ratio: Annotated[Number, Field(ge=0, lt=1)] = 0.0


class HyperbandPruner(_StagePruner):
    """Successive halving with several brackets; the resource is the ratio.

    Attributes:
        reduction_factor: One of so many trials goes on at every rung.
    """

    kind: Literal["hyperband"]
    reduction_factor: Annotated[int, Field(strict=True, ge=2)] = 3


class PatiencePruner(_StagePruner):
    """Stops a trial that stays far below where it was.

    Attributes:
        drop: Points of accuracy below the best report (near the dense model's) that are too many.
        patience: Further reports below it that are tolerated.
    """

    kind: Literal["patience"]
    drop: Annotated[Number, Field(gt=0)]
    patience: Count = 2


class WilcoxonPruner(Section):
    """Compares trials seed by seed: a trial is stopped once it is significantly worse.

    Attributes:
        p: The largest p value of the signed-rank test that stops a trial.
        startup_seeds: Seeds that must have ended before any trial is stopped.
    """

    kind: Literal["wilcoxon"]
    p: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    startup_seeds: Count = 2


Pruner = Annotated[
    MedianPruner | HyperbandPruner | PatiencePruner | WilcoxonPruner,
    Field(discriminator="kind"),
]


def check_pruner(pruner: Any, num_objectives: int, num_seeds: int) -> None:
    """Raises a ``ValueError`` if a pruner could not work in a study.

    Args:
        pruner: A ``Pruner``, or ``None``.
        num_objectives: Measures of the study's objective.
        num_seeds: Runs of a trial.
    """
    if pruner is None:
        return
    if num_objectives > 1:
        raise ValueError(
            "pruner must be left out of a study with several objectives, because Optuna cannot "
            "rank unfinished trials there; keep one objective and bound the others with "
            "constraints"
        )
    if isinstance(pruner, WilcoxonPruner):
        first = max(pruner.startup_seeds, _fewest_ranks(pruner.p))
        if num_seeds <= first:
            raise ValueError(
                f"a wilcoxon pruner with p {pruner.p:g} can stop a trial after {first} seeds at "
                f"the earliest, so seeds must be more than that, but got {num_seeds}"
            )


def _fewest_ranks(p: float) -> int:
    """Returns how many pairs a one-sided signed-rank test needs to come below ``p``."""
    number = 1
    while 0.5**number >= p:
        number += 1
    return number
