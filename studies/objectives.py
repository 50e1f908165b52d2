"""What Optuna is told of a trial: numbers of its validation curves, never of the test split."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from studies.curves import Curve, Metric, Spread, area, spread, value_at
from studies.goals import AREA, Bound, Measure

_QUANTITIES: dict[str, Metric] = {
    "val_at": "val",
    "drop_at": "val",
    "gflops_at": "gmacs",
    "params_at": "params",
    "latency_at": "latency_ms",
    "speed_up_at": "speed_up",
}


@dataclass(frozen=True)
class Verdict:
    """What the curves of a trial come to.

    Attributes:
        values: One a measure of the objective, the mean over seeds.
        by_seed: The same for every seed.
        excess: By how much the mean over seeds breaks a constraint, by its name; 0 or less where
            it is kept.
    """

    values: tuple[float, ...]
    by_seed: dict[int, tuple[float, ...]]
    excess: dict[str, float]


def judge(
    objective: Sequence[Measure], constraints: Sequence[Bound], curves: Mapping[int, Curve]
) -> Verdict:
    """Reads a trial's curves, one a seed.

    Raises:
        ValueError: If a curve does not reach far enough, or holds a value that is no number.
    """
    by_seed = {
        seed: tuple(measure_curve(measure, curve) for measure in objective)
        for seed, curve in curves.items()
    }
    values = tuple(spread(column).mean for column in zip(*by_seed.values(), strict=True))
    excess = {
        bound.name: bound.excess(over_seeds(bound.measure, curves).mean) for bound in constraints
    }
    return Verdict(values, by_seed, excess)


def over_seeds(measure: Measure, curves: Mapping[int, Curve]) -> Spread:
    """Returns a measure's mean and spread over a trial's curves."""
    return spread([measure_curve(measure, curve) for curve in curves.values()])


def measure_curve(measure: Measure, curve: Curve) -> float:
    """Reads one measure off the curve of one run.

    Raises:
        ValueError: If the curve does not reach far enough, has no dense point to compare with,
            or holds a value that is no number.
    """
    value = _read(measure, curve)
    if not math.isfinite(value):
        raise ValueError(
            f"{measure.name} of run {curve.run!r} is {value}, which is no number; see the run's "
            "validation values"
        )
    return value


def _read(measure: Measure, curve: Curve) -> float:
    if measure.kind == AREA:
        assert isinstance(measure.at, tuple)
        return area(curve, *measure.at)
    at = curve.last.ratio_reached if isinstance(measure.at, str) else measure.at
    assert isinstance(at, float)
    value = value_at(curve, at, _QUANTITIES[measure.kind])
    if measure.kind == "params_at":
        return value / 1e6
    if measure.kind != "drop_at":
        return value
    if curve.dense is None:
        raise ValueError(f"run {curve.run!r} has no dense point to be compared with")
    return curve.dense.val - value
