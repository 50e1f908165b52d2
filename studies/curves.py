"""Accuracy against FLOPs ratio: interpolation, area, Pareto front, spread over seeds.

A curve is the dense model at ratio 0 and the points of one run, joined by straight lines over the
ratio that was *reached*. Nothing is extrapolated beyond ``SLACK``.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from comp.results import CurvePoint
from orchestration.store import Run
from orchestration.store_tables import CURVE_SCHEMA, tables_of
from orchestration.tracked import params_of

SLACK = 0.01  # runs end within the config's tolerance of the asked ratio, so 0.7975 stands for 0.8

# Student's t, 97.5 %, for 1, 2, ... degrees of freedom.
_T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)

Metric = Literal["val", "test", "gmacs", "params", "latency_ms", "speed_up"]


@dataclass(frozen=True)
class Curve:
    """The points of one run.

    Attributes:
        run: Run id.
        points: The dense model first, then ascending ratios.
        study: Name of the study, ``""`` for a run of its own.
        trial: Optuna's trial number, -1 outside a study.
        settings: What decides the run's result beside its seed, as text by name.
    """

    run: str
    points: tuple[CurvePoint, ...]
    study: str = ""
    trial: int = -1
    settings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError(f"run {self.run!r} has no points yet, so it has no curve")
        ordered = tuple(sorted(self.points, key=lambda point: point.ratio_reached))
        object.__setattr__(self, "points", ordered)

    @property
    def last(self) -> CurvePoint:
        """The most pruned point."""
        return self.points[-1]

    @property
    def dense(self) -> CurvePoint | None:
        """The dense model, if the run has measured it."""
        return self.points[0] if self.points[0].method == "dense" else None

    @cached_property
    def ratios(self) -> tuple[float, ...]:
        """Ratios reached, ascending."""
        return tuple(point.ratio_reached for point in self.points)

    def values(self, metric: Metric = "val") -> tuple[float, ...]:
        """Returns the metric of every point."""
        return tuple(float(getattr(point, metric)) for point in self.points)


def value_at(curve: Curve, ratio: float, metric: Metric = "val") -> float:
    """Reads a curve at one ratio.

    Raises:
        ValueError: If the ratio is more than ``SLACK`` outside what the run covers.
    """
    return _interpolate(curve, [ratio], metric)[0]


def area(curve: Curve, low: float, high: float, metric: Metric = "val") -> float:
    """Returns the mean height of a curve between two ratios, in the metric's own points.

    It is the exact area under the straight lines, divided by ``high - low``, so that a model that
    loses nothing scores its dense accuracy.

    Raises:
        ValueError: If ``low`` is not below ``high``, or the run does not cover both.
    """
    if not low < high:
        raise ValueError(f"low must be below high, but got {low:g} and {high:g}")
    inner = [ratio for ratio in curve.ratios if low < ratio < high]
    knots = [low, *inner, high]
    heights = _interpolate(curve, knots, metric)
    pieces = zip(knots, heights, knots[1:], heights[1:], strict=False)  # the last knot begins none
    return sum((x1 - x0) * (y1 + y0) / 2 for x0, y0, x1, y1 in pieces) / (high - low)


def _interpolate(curve: Curve, ratios: Sequence[float], metric: Metric) -> list[float]:
    """Reads a curve at ratios; a curve has so few points that numpy would take longer."""
    known, heights = curve.ratios, curve.values(metric)
    lowest, highest = min(ratios), max(ratios)
    if lowest < known[0] - SLACK or highest > known[-1] + SLACK:
        wrong = lowest if lowest < known[0] - SLACK else highest
        raise ValueError(
            f"run {curve.run!r} covers ratios {known[0]:.3f} to {known[-1]:.3f}, so it has no "
            f"{metric} at {wrong:g}"
        )
    return [_height_at(ratio, known, heights) for ratio in ratios]


def _height_at(ratio: float, known: Sequence[float], heights: Sequence[float]) -> float:
    """Reads straight lines between points at a ratio; beyond the ends, the height of the end."""
    right = bisect_right(known, ratio)
    if right == 0:
        return heights[0]
    x0, y0 = known[right - 1], heights[right - 1]
    if right == len(known) or x0 == ratio:
        return y0
    return y0 + (heights[right] - y0) / (known[right] - x0) * (ratio - x0)


def best_curve(curves: Sequence[Curve], ratio: float, metric: Metric = "val") -> Curve | None:
    """Returns the curve that is highest at a ratio; ``None`` if none reaches it."""
    able = [curve for curve in curves if covers(curve, ratio)]
    return max(able, key=lambda curve: value_at(curve, ratio, metric), default=None)


def covers(curve: Curve, ratio: float) -> bool:
    """Tells whether a curve may be read at a ratio."""
    return bool(curve.ratios[0] - SLACK <= ratio <= curve.ratios[-1] + SLACK)


def pareto_front(points: Iterable[CurvePoint], metric: Metric = "val") -> list[CurvePoint]:
    """Returns the points that no other beats in both cost and metric, cheapest first.

    Of points that are equal in both, the first stays.
    """
    front: list[CurvePoint] = []
    for point in sorted(points, key=lambda p: (p.gmacs, -getattr(p, metric))):
        if not front or getattr(point, metric) > getattr(front[-1], metric):
            front.append(point)
    return front


def pareto_curve_points(
    curves: Sequence[Curve], metric: Metric = "val"
) -> list[tuple[Curve, CurvePoint]]:
    """Returns the Pareto front over all points of some curves, each with the curve it is of."""
    owners = {id(point): curve for curve in curves for point in curve.points}
    points = [point for curve in curves for point in curve.points]
    return [(owners[id(point)], point) for point in pareto_front(points, metric)]


@dataclass(frozen=True)
class Spread:
    """Mean and spread of one value over seeds.

    Attributes:
        mean: The mean.
        std: The sample standard deviation (n - 1); 0 for a single value.
        num: Number of values.
    """

    mean: float
    std: float
    num: int

    @property
    def half_interval(self) -> float | None:
        """Half the width of the mean's 95 % confidence interval (Student's t); ``None`` for one.

        It says how well the mean over seeds is known, for values that scatter normally.
        """
        if self.num < 2:
            return None
        freedom = self.num - 1
        quantile = (
            _T_QUANTILES[freedom - 1] if freedom <= len(_T_QUANTILES) else 1.96 + 2.4 / freedom
        )
        return quantile * self.std / math.sqrt(self.num)

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + (f" ± {self.std:.2f}" if self.num > 1 else "")


def spread(values: Sequence[float]) -> Spread:
    """Returns mean and spread of values.

    Raises:
        ValueError: If there are none.
    """
    if not values:
        raise ValueError("mean and spread need at least one value, but got none")
    if len(values) == 1:  # which numpy would take ten times as long for
        return Spread(mean=float(values[0]), std=0.0, num=1)
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)), num=len(values))


def check_measured(curves: Sequence[Curve], metric: Metric) -> None:
    """Raises a ``ValueError`` if a point of some curve has no value of the metric."""
    without = [curve.run for curve in curves if not all(map(math.isfinite, curve.values(metric)))]
    if without:
        other = "val" if metric == "test" else "test"
        shown = ", ".join(without[:5]) + (", ..." if len(without) > 5 else "")
        raise ValueError(
            f"{len(without)} of {len(curves)} runs lack {metric} at some ratio ({shown}); compare "
            f"{other} instead, or leave these runs out"
        )


def check_comparable(curves: Sequence[Curve]) -> None:
    """Raises a ``ValueError`` if curves of different tasks would share an axis."""
    tasks = sorted({curve.last.task for curve in curves})
    if len(tasks) > 1:
        raise ValueError(
            f"curves of one plot must be of one task, but got {', '.join(tasks)}; "
            "compare the runs of each task on their own"
        )


def curve_of(run: Run) -> Curve | None:
    """Returns the curve of a run, ``None`` while it has no finished ratio."""
    points = tuple(run.points)
    if all(point.method == "dense" for point in points) and run.job.kind == "prune":
        return None
    if not points:
        return None
    job = run.job
    return Curve(job.run_id, points, job.study, job.trial, settings_of(params_of(run)))


def settings_of(params: Mapping[str, object]) -> dict[str, str]:
    """Returns all of a run's parameters but its seed, in MLflow's spelling."""
    return {name: str(value) for name, value in params.items() if name != "seed"}


def points_of_curve(curve: Curve) -> pa.Table:
    """Returns a curve in the columns of ``curve.parquet``; places of records are null."""
    own = {"study": curve.study, "trial": curve.trial, "run_id": curve.run}
    rows = [own | point.to_dict() for point in curve.points]
    return pa.Table.from_pylist(rows, schema=CURVE_SCHEMA)


def write_points(runs: Sequence[Run | Curve], path: Path) -> int:
    """Writes the points of runs as one table in the columns of ``curve.parquet``.

    Args:
        runs: Runs, finished or not, or curves whose runs lie elsewhere.
        path: Ends in ``.csv`` or ``.parquet``.

    Returns:
        The number of rows.

    Raises:
        ValueError: If the path ends in something else, or there is no run.
    """
    if not runs or path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"a table needs runs and a .csv or .parquet file, but got {path}")
    table = pa.concat_tables(
        points_of_curve(run)
        if isinstance(run, Curve)
        else tables_of(run.job, run.records)["curve"]
        for run in runs
    )
    temporary = path.with_name(f".{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        nested = [field.name for field in table.schema if pa.types.is_nested(field.type)]
        pa.csv.write_csv(table.drop_columns(nested), temporary)  # CSV has no such columns
    else:
        pa.parquet.write_table(table, temporary, compression="zstd")
    temporary.replace(path)
    return int(table.num_rows)


def removed_macs(stages: Iterable[tuple[str, float]], dense_macs: float) -> dict[str, float]:
    """Returns the multiply-adds that the stages of a run took away, by mode.

    What a stage removed is the fall of the measured multiply-adds over it; modes that a stage
    prunes together share a name, such as ``vision_params+vision_tokens``.

    Args:
        stages: Mode and multiply-adds left after every stage, in order.
        dense_macs: What the first stage started from.
    """
    removed: dict[str, float] = {}
    before = dense_macs
    for mode, macs in stages:
        removed[mode] = removed.get(mode, 0.0) + before - macs
        before = macs
    return removed
