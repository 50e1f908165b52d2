"""Runs side by side: the metric at asked ratios, mean and spread over seeds, area."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comp.config import nearest
from orchestration.storage import Storage, join, parent
from orchestration.store import Run, list_runs, read_run
from studies.curves import (
    Curve,
    Metric,
    Spread,
    area,
    check_comparable,
    covers,
    curve_of,
    spread,
    value_at,
    write_points,
)
from studies.errors import SpecError
from studies.plots import plot_runs
from studies.report import columns


@dataclass(frozen=True)
class ComparedRow:
    """Runs that differ in nothing but their seed.

    Attributes:
        name: The run, or the first of them.
        method: Method id.
        values: The metric at every ratio of the comparison; ``None`` where a run does not reach.
        area: Mean height of the curves over the ratios that all compared runs cover.
    """

    name: str
    method: str
    values: tuple[Spread | None, ...]
    area: Spread

    @property
    def num_seeds(self) -> int:
        """Runs behind the row."""
        return self.area.num


@dataclass(frozen=True)
class Comparison:
    """Runs of one task side by side.

    Attributes:
        runs: The runs that have a curve.
        curves: Their curves.
        skipped: Ids of runs without a finished ratio.
        metric: ``"val"`` or ``"test"``.
        ratios: Where the curves were read.
        rows: The table, best area first.
    """

    runs: tuple[Run, ...]
    curves: tuple[Curve, ...]
    skipped: tuple[str, ...]
    metric: Metric
    ratios: tuple[float, ...]
    rows: tuple[ComparedRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return {
            "metric": self.metric,
            "ratios": list(self.ratios),
            "rows": [_row_dict(row) for row in self.rows],
            "skipped": list(self.skipped),
        }

    def to_text(self) -> str:
        """Returns the table that a terminal shows."""
        names = [f"{self.metric} at {ratio:g}" for ratio in self.ratios]
        head = ["run", "method", "seeds", *names, "area"]
        lines = columns([head, *(_row_cells(row) for row in self.rows)])
        if self.skipped:
            lines.append(f"without a finished ratio: {', '.join(self.skipped)}")
        if any(value is None for row in self.rows for value in row.values):
            lines.append("-: the run does not reach this ratio")
        return "\n".join(lines)

    def write(self, *, csv: Path | None, parquet: Path | None, png: Path | None) -> list[Path]:
        """Writes what is asked for and returns what was written.

        Raises:
            ValueError: If a file name ends in something else than it should.
        """
        written = []
        for path, suffix in ((csv, ".csv"), (parquet, ".parquet"), (png, ".png")):
            if path is not None and path.suffix != suffix:
                raise ValueError(f"the file must end in {suffix}, but got {path}")
        for path in (csv, parquet):
            if path is not None:
                write_points(self.runs, path)
                written.append(path)
        if png is not None:
            png.parent.mkdir(parents=True, exist_ok=True)
            title = f"{len(self.curves)} runs on {self.curves[0].last.task}"
            target = png.with_suffix("")
            written += plot_runs(self.curves, target, title=title, metric=self.metric)
        return written


def find_runs(names: Sequence[str], root: str | Path) -> list[Run]:
    """Finds runs by directory, run id or study, each once and in the order named.

    Raises:
        SpecError: If a name is none of these.
    """
    found: dict[str, Run] = {}
    for name in names:
        for location in _locations(name, root):
            run = read_run(location)
            if run.job.kind == "prune":
                found.setdefault(run.location, run)
    if not found:
        raise SpecError(f"no runs found for {', '.join(names)}; name a study or run directories")
    return list(found.values())


def _locations(name: str, root: str | Path) -> list[str]:
    for place in (name, join(root, "runs", name)):
        if Storage(place).exists("job.json"):
            return [place]
    for place in (name, join(root, "studies", name)):
        if Storage(place).exists("study.json"):
            study = json.loads(Storage(place).read("study.json"))["name"]
            runs = list_runs(join(parent(place, 2), "runs"))
            return [location for location in runs if read_run(location).job.study == study]
    if name not in ("", ".") and Storage(name).exists("runs"):
        return list_runs(join(name, "runs"))
    known = [*Storage(join(root, "studies")).names(), *Storage(join(root, "runs")).names()]
    raise SpecError(
        f"{name!r} is no run directory, and no run or study under {root}{nearest(name, known)}"
    )


def compare_runs(runs: Sequence[Run], ratios: Sequence[float], metric: Metric) -> Comparison:
    """Reads the curves of runs at ratios and groups runs that differ in their seed alone.

    Args:
        runs: Runs of one task.
        ratios: Where to read; those that any run was asked for if empty.
        metric: ``"val"`` or ``"test"``.

    Raises:
        ValueError: If the runs are of several tasks, none has a curve, or no run reaches a ratio
            that was named.
    """
    pairs = [(run, curve_of(run)) for run in runs]
    able = [(run, curve) for run, curve in pairs if curve is not None]
    if not able:
        raise ValueError(
            f"none of {len(runs)} runs has a finished ratio yet; wait for the first one"
        )
    curves = [curve for _, curve in able]
    check_comparable(curves)
    for ratio in ratios:
        if not any(covers(curve, ratio) for curve in curves):
            highest = max(float(curve.ratios[-1]) for curve in curves)
            raise ValueError(f"no run reaches ratio {ratio:g}; the highest is {highest:.3f}")
    asked = {p.ratio_asked for c in curves for p in c.points if p.method != "dense"}
    at = tuple(ratios) or tuple(sorted(asked))
    groups: dict[str, list[Curve]] = {}
    for run, curve in able:
        groups.setdefault(_all_but_seed(run), []).append(curve)
    low = max(float(curve.ratios[0]) for curve in curves)
    high = min(float(curve.ratios[-1]) for curve in curves)
    if not low < high:
        raise ValueError("the runs cover no common range of ratios; compare fewer of them")
    methods = {curve.run: run.job.method for run, curve in able}
    rows = [
        _row(group, methods[group[0].run], at, (low, high), metric) for group in groups.values()
    ]
    rows.sort(key=lambda row: -row.area.mean)
    skipped = tuple(run.job.run_id for run, curve in pairs if curve is None)
    return Comparison(
        tuple(run for run, _ in able), tuple(curves), skipped, metric, at, tuple(rows)
    )


def _all_but_seed(run: Run) -> str:
    job = run.job
    config = {key: value for key, value in job.config.items() if key != "seed"}
    return json.dumps([job.study, job.trial, job.model, job.data, config], sort_keys=True)


def _row(
    group: Sequence[Curve],
    method: str,
    ratios: Sequence[float],
    span: tuple[float, float],
    metric: Metric,
) -> ComparedRow:
    values = [
        spread([value_at(curve, ratio, metric) for curve in group])
        if all(covers(curve, ratio) for curve in group)
        else None
        for ratio in ratios
    ]
    areas = spread([area(curve, *span, metric) for curve in group])
    return ComparedRow(group[0].run, method, tuple(values), areas)


def _row_cells(row: ComparedRow) -> list[str]:
    values = ["-" if value is None else str(value) for value in row.values]
    return [row.name, row.method, str(row.num_seeds), *values, str(row.area)]


def _row_dict(row: ComparedRow) -> dict[str, Any]:
    return {
        "run": row.name,
        "method": row.method,
        "num_seeds": row.num_seeds,
        "values": [None if value is None else value.mean for value in row.values],
        "std": [None if value is None else value.std for value in row.values],
        "area": row.area.mean,
    }
