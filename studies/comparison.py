"""Runs side by side: the metric at asked ratios, mean and spread over seeds, area, differences."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from studies.curves import (
    Curve,
    Metric,
    Spread,
    area,
    check_comparable,
    check_measured,
    covers,
    pareto_curve_points,
    spread,
    value_at,
    write_points,
)
from studies.paired import Difference, paired_difference
from studies.sources import Source

By = Literal["settings", "method"]


@dataclass(frozen=True)
class ComparedRow:
    """Runs that differ in nothing but their seed, or all runs of a method.

    Attributes:
        name: The run, or the first of them; of a whole method its name.
        model: What was pruned.
        method: Method id.
        curves: The curves behind the row.
        values: The metric at every ratio of the comparison; ``None`` where a run does not reach.
        area: Mean height of the curves over the ratios that all compared runs cover.
    """

    name: str
    model: str
    method: str
    curves: tuple[Curve, ...]
    values: tuple[Spread | None, ...]
    area: Spread

    @property
    def seeds(self) -> list[int]:
        """The seeds behind the row, ascending."""
        return sorted({curve.last.seed for curve in self.curves})


@dataclass(frozen=True)
class PairedRow:
    """How a row differs from the baseline, seed by seed.

    Attributes:
        name: The row.
        seeds: The seeds that both have.
        values: The difference at every ratio; ``None`` where one of the two does not reach.
        area: Of the areas.
    """

    name: str
    seeds: tuple[int, ...]
    values: tuple[Difference | None, ...]
    area: Difference


@dataclass(frozen=True)
class Reading:
    """What of a curve is compared.

    Attributes:
        values: The metric at every ratio; ``None`` where the run does not reach.
        area: Mean height over the common ratios.
    """

    values: tuple[float | None, ...]
    area: float


Readings = dict[int, Reading]  # by id of the curve: run ids of two roots may be equal


@dataclass(frozen=True)
class Comparison:
    """Runs of one task side by side.

    Attributes:
        sources: The runs that have a curve.
        curves: Their curves.
        skipped: Ids of runs without a finished ratio.
        metric: ``"val"`` or ``"test"``.
        ratios: Where the curves were read.
        span: The ratios between which areas were taken.
        rows: The table, best area first.
        baseline: Name of the row that the others are compared to.
        paired: The differences of the rows that share at least one seed with it.
    """

    sources: tuple[Source, ...]
    curves: tuple[Curve, ...]
    skipped: tuple[str, ...]
    metric: Metric
    ratios: tuple[float, ...]
    span: tuple[float, float]
    rows: tuple[ComparedRow, ...]
    baseline: str
    paired: tuple[PairedRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return {
            "metric": self.metric,
            "task": self.curves[0].last.task,
            "ratios": list(self.ratios),
            "span": list(self.span),
            "rows": [_row_dict(row) for row in self.rows],
            "baseline": self.baseline,
            "paired": [_paired_dict(row) for row in self.paired],
            "pareto": [
                {"run": curve.run, **point.to_dict()}
                for curve, point in pareto_curve_points(self.curves, self.metric)
            ],
            "skipped": list(self.skipped),
        }

    def write(
        self, *, csv: Path | None = None, parquet: Path | None = None, plot: Path | None = None
    ) -> list[Path]:
        """Writes what is asked for and returns what was written.

        Args:
            csv: Where all points go as CSV.
            parquet: The same as Parquet.
            plot: Where the curves go, ``.png`` or ``.svg``; the other one is written beside it.

        Raises:
            ValueError: If a file name ends in something else than it should.
        """
        ends = ((csv, (".csv",)), (parquet, (".parquet",)), (plot, (".png", ".svg")))
        for path, suffixes in ends:
            if path is not None and path.suffix not in suffixes:
                raise ValueError(f"the file must end in {' or '.join(suffixes)}, but got {path}")
        written = []
        for path in (csv, parquet):
            if path is not None:
                rows = [source.run or source.curve for source in self.sources]
                write_points([row for row in rows if row is not None], path)
                written.append(path)
        if plot is not None:
            from studies.plots import plot_runs

            plot.parent.mkdir(parents=True, exist_ok=True)
            title = f"{len(self.curves)} runs on {self.curves[0].last.task}"
            target = plot.with_suffix("")
            written += plot_runs(self.curves, target, title=title, metric=self.metric)
        return written


def compare_sources(
    sources: Sequence[Source],
    ratios: Sequence[float],
    metric: Metric,
    *,
    by: By = "settings",
    baseline: str = "",
) -> Comparison:
    """Reads curves at ratios, groups them, and pairs the groups by seed.

    Args:
        sources: Runs of one task.
        ratios: Where to read; those that at least half of the runs were asked for if empty.
        metric: ``"val"`` or ``"test"``.
        by: ``"settings"``: a row is runs that differ in their seed alone; ``"method"``: a row is
            all runs of a model and method.
        baseline: A run or method whose row the others are compared to; the first row of the
            sources if empty.

    Raises:
        ValueError: If the runs are of several tasks, none has a curve, some lack the metric, no
            run reaches a ratio that was named, or there is no such baseline.
    """
    able = [source for source in sources if source.curve is not None]
    if not able:
        raise ValueError(
            f"none of {len(sources)} runs has a finished ratio yet; wait for the first one"
        )
    curves = [source.curve for source in able if source.curve is not None]
    check_comparable(curves)
    check_measured(curves, metric)
    _check_ratios(curves, ratios)
    at = tuple(ratios) or common_ratios(curves)
    span = common_span(curves)
    groups: dict[tuple[object, ...], list[Curve]] = {}
    for curve in curves:
        groups.setdefault(_key(curve, by), []).append(curve)
    read = {id(curve): _read(curve, at, span, metric) for curve in curves}
    rows = [_row(group, read, by) for group in groups.values()]
    reference = _find_baseline(rows, baseline)
    rows.sort(key=_by_area)
    theirs = _by_seed(reference, read)
    paired = [_pair(row, reference, theirs, read) for row in rows if row is not reference]
    return Comparison(
        sources=tuple(able),
        curves=tuple(curves),
        skipped=tuple(source.name for source in sources if source.curve is None),
        metric=metric,
        ratios=at,
        span=span,
        rows=tuple(rows),
        baseline=reference.name,
        paired=tuple(pair for pair in paired if pair is not None),
    )


def _by_area(row: ComparedRow) -> float:
    return -row.area.mean


def _check_ratios(curves: Sequence[Curve], ratios: Sequence[float]) -> None:
    for ratio in ratios:
        if not any(covers(curve, ratio) for curve in curves):
            highest = max(curve.ratios[-1] for curve in curves)
            raise ValueError(f"no run reaches ratio {ratio:g}; the highest is {highest:.3f}")


def common_ratios(curves: Sequence[Curve]) -> tuple[float, ...]:
    """Returns the ratios that at least half of the runs were asked for, ascending.

    If there are none, those that most runs were asked for.
    """
    asked = Counter(r for c in curves for r in {p.ratio_asked for p in c.points} if r > 0)
    most = min(max(asked.values()), len(curves) / 2)
    return tuple(sorted(ratio for ratio, count in asked.items() if count >= most))


def common_span(curves: Sequence[Curve]) -> tuple[float, float]:
    """Returns the range of ratios that all curves cover.

    Raises:
        ValueError: If there is none.
    """
    low = max(curve.ratios[0] for curve in curves)
    high = min(curve.ratios[-1] for curve in curves)
    if not low < high:
        raise ValueError("the runs cover no common range of ratios; compare fewer of them")
    return low, high


def _key(curve: Curve, by: By) -> tuple[object, ...]:
    last = curve.last
    if by == "method":
        return last.model, last.method
    settings = frozenset(curve.settings.items())
    return curve.study, curve.trial, last.model, last.method, settings


def _read(
    curve: Curve, ratios: Sequence[float], span: tuple[float, float], metric: Metric
) -> Reading:
    """Reads a curve at every ratio that it covers, and its area."""
    values = [value_at(curve, r, metric) if covers(curve, r) else None for r in ratios]
    return Reading(tuple(values), area(curve, *span, metric))


def _row(group: Sequence[Curve], read: Readings, by: By) -> ComparedRow:
    last, readings = group[0].last, [read[id(curve)] for curve in group]
    columns = zip(*(reading.values for reading in readings), strict=True)
    return ComparedRow(
        name=f"{last.method} on {last.model}" if by == "method" else group[0].run,
        model=last.model,
        method=last.method,
        curves=tuple(group),
        values=tuple(map(_mean_of, columns)),
        area=spread([reading.area for reading in readings]),
    )


def _mean_of(values: Sequence[float | None]) -> Spread | None:
    """Returns mean and spread, ``None`` if a run does not reach so far."""
    known = [value for value in values if value is not None]
    return spread(known) if len(known) == len(values) else None


def _find_baseline(rows: Sequence[ComparedRow], name: str) -> ComparedRow:
    if not name:
        return rows[0]
    for row in rows:
        if name in (row.name, *(curve.run for curve in row.curves)):
            return row
    methods = [row for row in rows if row.method == name]
    if methods:
        return methods[0]
    known = sorted({row.name for row in rows} | {row.method for row in rows})
    raise ValueError(
        f"--baseline names {name!r}, which is not among the compared runs; they are "
        + ", ".join(known[:10])
    )


def _pair(
    row: ComparedRow, reference: ComparedRow, theirs: dict[int, list[float]], read: Readings
) -> PairedRow | None:
    """Subtracts the baseline's mean from the row's, seed by seed; ``None`` if none is shared."""
    mine = _by_seed(row, read)
    seeds = sorted(mine.keys() & theirs.keys())
    if not seeds:
        return None
    both = zip(row.values, reference.values, strict=True)
    values = [
        paired_difference([mine[s][index] - theirs[s][index] for s in seeds])
        if own is not None and other is not None
        else None
        for index, (own, other) in enumerate(both)
    ]
    areas = paired_difference([mine[seed][-1] - theirs[seed][-1] for seed in seeds])
    return PairedRow(row.name, tuple(seeds), tuple(values), areas)


def _by_seed(row: ComparedRow, read: Readings) -> dict[int, list[float]]:
    """Returns the means of a row's values, and last of its areas, over the runs of each seed.

    A value that some run does not reach is no number.
    """
    found: dict[int, list[list[float]]] = {}
    for curve in row.curves:
        reading = read[id(curve)]
        values = [math.nan if value is None else value for value in reading.values]
        found.setdefault(curve.last.seed, []).append([*values, reading.area])
    return {
        seed: [sum(column) / len(runs) for column in zip(*runs, strict=True)]
        for seed, runs in found.items()
    }


def _row_dict(row: ComparedRow) -> dict[str, Any]:
    return {
        "run": row.name,
        "runs": [curve.run for curve in row.curves],
        "model": row.model,
        "method": row.method,
        "num_seeds": len(row.seeds),
        "values": [None if value is None else value.mean for value in row.values],
        "std": [None if value is None else value.std for value in row.values],
        "area": row.area.mean,
    }


def _paired_dict(row: PairedRow) -> dict[str, Any]:
    def shown(value: Difference | None) -> dict[str, Any] | None:
        return None if value is None else dataclasses.asdict(value)

    return {
        "run": row.name,
        "seeds": list(row.seeds),
        "values": [shown(value) for value in row.values],
        "area": shown(row.area),
    }
