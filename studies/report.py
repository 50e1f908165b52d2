"""What came out of a study: a table for people, JSON for programs, the plot of the curves."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comp.results import CurvePoint
from orchestration.store import Run, read_run
from studies.curves import Curve, Spread, curve_of, pareto_front, spread, write_points
from studies.folder import StudyFolder, write_atomically
from studies.goals import Measure, objective_name
from studies.run_index import read_point_runs
from studies.spec import StudySpec
from studies.summary import StudySummary, TrialSummary, summarize
from studies.text_table import columns


@dataclass(frozen=True)
class RatioRow:
    """One ratio of the best trial, over its seeds.

    Attributes:
        ratio_asked: 0 for the dense model.
        ratio: FLOPs ratio reached.
        gmacs: Giga multiply-adds per sample.
        params: Parameters.
        val: Validation metric.
        test: Test metric.
        dense_latency_ms: Latency of the dense model.
        latency_ms: Latency of this one.
        speed_up: The former over the latter.
    """

    ratio_asked: float
    ratio: Spread
    gmacs: Spread
    params: Spread
    val: Spread
    test: Spread
    dense_latency_ms: Spread
    latency_ms: Spread
    speed_up: Spread

    @classmethod
    def of(cls, points: Sequence[CurvePoint]) -> "RatioRow":
        """Summarizes points of one asked ratio, one a seed."""

        def over_seeds(name: str) -> Spread:
            return spread([float(getattr(point, name)) for point in points])

        return cls(
            points[0].ratio_asked,
            ratio=over_seeds("ratio_reached"),
            **{f.name: over_seeds(f.name) for f in dataclasses.fields(cls)[2:]},
        )


@dataclass(frozen=True)
class StudyReport:
    """A study with its curves.

    Attributes:
        spec: What was asked.
        summary: The trials.
        runs: The runs of all trials that have a point, the dense reference left out; those of
            the best trial alone if no others were asked for.
        curves: Their curves, in the same order.
        best: The curves of the best trial, one a seed.
        rows: The table of the best trial, the dense model first.
    """

    spec: StudySpec
    summary: StudySummary
    runs: tuple[Run, ...]
    curves: tuple[Curve, ...]
    best: tuple[Curve, ...]
    rows: tuple[RatioRow, ...]

    @property
    def points(self) -> list[CurvePoint]:
        """All points of all trials, without the dense ones."""
        return [p for curve in self.curves for p in curve.points if p.method != "dense"]

    @property
    def table(self) -> list[dict[str, Any]]:
        """The rows as plain JSON values."""
        return [dataclasses.asdict(row) for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        best = self.summary.best
        return {
            "study": self.spec.name,
            "model": self.spec.model,
            "task": self.spec.task,
            "objective": objective_name(self.spec.objective),
            "n_trials": self.spec.n_trials,
            "counts": self.summary.counts,
            "best": trial_dict(best) if best else None,
            "table": self.table,
            "front": [trial.number for trial in self.summary.front],
            "trials": [trial_dict(trial) for trial in self.summary.trials],
            "pareto": [point.to_dict() for point in pareto_front(self.points)],
        }

    def to_text(self) -> str:
        """Returns the table that a terminal shows."""
        best = self.summary.best
        if best is None:
            return self.summary.why_no_best
        objective = self.spec.objective
        first = f"{objective[0].name} {value_text(best, 0)}"
        among = f"{self.summary.counts.get('complete', 0)} trials"
        head = f"best of {among}: trial {best.number}, {first} ({params_text(best)})"
        if len(objective) > 1:
            head = f"{len(self.summary.front)} of {among} are on the Pareto front:"
            front = columns(trial_cells(self.summary.front, objective))
            head = "\n".join(
                [head, "", *front, "", f"trial {best.number}, with the best {first}:"]
            )
        notes = [NOTE, *([INTERVAL_NOTE] if len(self.spec.seeds) > 1 else [])]
        return "\n".join([head, "", *columns(_cells(self.rows)), *notes])

    def to_markdown(self, plot: str) -> str:
        """Returns the report as a Markdown page.

        Args:
            plot: File name of the plot, relative to the page.
        """
        cells = _cells(self.rows)
        best = self.summary.best
        lines = [
            f"# Study {self.spec.name}",
            "",
            f"{self.spec.model} on {self.spec.task}; objective: "
            f"{objective_name(self.spec.objective)}; seeds {list(self.spec.seeds)}; trials "
            + ", ".join(f"{count} {state}" for state, count in self.summary.counts.items())
            + ".",
            "",
            f"![Accuracy against FLOPs ratio]({plot})",
            "",
        ]
        if best is not None:
            lines += [f"## Best: trial {best.number}", "", f"`{params_text(best)}`", ""]
            lines += [*_markdown_table(cells), "", NOTE, ""]
        if len(self.spec.objective) > 1:
            front = trial_cells(self.summary.front, self.spec.objective)
            lines += ["## Pareto front", "", *_markdown_table(front), ""]
        trials = trial_cells(self.summary.trials, self.spec.objective)
        lines += ["## Trials", "", *_markdown_table(trials), ""]
        return "\n".join(lines)


INTERVAL_NOTE = (
    "± of an objective: 95 % confidence interval of its mean over seeds; of the table: standard "
    "deviation"
)
NOTE = "GFLOPs with multiply-add = 1, per validation sample; latency of one evaluation batch"


def read_report(folder: StudyFolder, *, best_alone: bool = False) -> StudyReport:
    """Reads a study and the curves of its trials from disk.

    Args:
        folder: The study.
        best_alone: Leave out the curves of all trials but the best.
    """
    spec = folder.read_spec()
    summary = summarize(folder, spec)
    have = {} if best_alone else {run.job.run_id: run for run in read_point_runs(folder)}
    found = {}
    for trial in summary.front[:1] if best_alone else summary.trials:
        for run_id in trial.runs:
            run = have.get(run_id) or _read_alone(folder, run_id)
            curve = curve_of(run) if run else None
            if run is not None and curve is not None:
                found[run_id] = (run, curve)
    best_runs = summary.best.runs if summary.best else ()
    best = tuple(found[run_id][1] for run_id in best_runs if run_id in found)
    return StudyReport(
        spec=spec,
        summary=summary,
        runs=tuple(run for run, _ in found.values()),
        curves=tuple(curve for _, curve in found.values()),
        best=best,
        rows=ratio_rows(best),
    )


def _read_alone(folder: StudyFolder, run_id: str) -> Run | None:
    """Reads one run, also of an earlier study, whose trials a warm start has copied."""
    try:
        return read_run(folder.run(run_id))
    except FileNotFoundError:
        return None


def write_report(folder: StudyFolder, report: StudyReport) -> list[str]:
    """Writes the plot, the points and the report into the study's folder.

    Returns:
        ``curves.png``, ``curves.svg``, ``curves.parquet``, ``report.json`` and ``report.md``;
        nothing if no run has a point.
    """
    from studies.plots import plot_study

    if not report.curves:
        return []
    spec = report.spec
    title = f"{spec.name}: {spec.model} on {spec.task}"

    def fill(directory: Path) -> list[Path]:
        plots = plot_study(report.curves, report.best, directory / "curves", title=title)
        table = directory / "curves.parquet"
        write_points(report.runs, table)
        values, page = directory / "report.json", directory / "report.md"
        write_atomically(values, json.dumps(report.to_dict(), indent=1) + "\n")
        write_atomically(page, report.to_markdown(plots[0].name))
        return [*plots, table, values, page]

    return folder.write_files(fill)


def report_metrics(report: StudyReport) -> dict[str, float]:
    """Returns what a study is sorted by: its best value and its trials by state."""
    best = report.summary.best
    values = {f"trials_{state}": float(count) for state, count in report.summary.counts.items()}
    return values | ({"best": best.value} if best and best.value is not None else {})


def ratio_rows(curves: Sequence[Curve]) -> tuple[RatioRow, ...]:
    """Returns one row for every asked ratio that all curves have, ascending."""
    by_ratio: dict[float, list[CurvePoint]] = {}
    for curve in curves:
        for point in curve.points:
            by_ratio.setdefault(point.ratio_asked, []).append(point)
    shared = [points for points in by_ratio.values() if len(points) == len(curves)]
    return tuple(RatioRow.of(points) for points in sorted(shared, key=lambda p: p[0].ratio_asked))


def trial_dict(trial: TrialSummary) -> dict[str, Any]:
    """Returns a trial as plain JSON values."""
    return {
        "number": trial.number,
        "state": trial.state,
        "value": trial.value,
        "values": list(trial.values),
        "half_intervals": [one.half_interval for one in trial.spreads],
        "by_seed": [list(values) for values in trial.by_seed],
        "excess": trial.excess,
        "params": trial.params,
        "runs": list(trial.runs),
        "reason": trial.reason,
        "minutes": trial.minutes,
        "copied_from": trial.copied_from,
    }


def params_text(trial: TrialSummary) -> str:
    """Returns what Optuna chose, in one line."""
    shown = (
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in trial.params.items()
    )
    return ", ".join(shown)


def value_text(trial: TrialSummary, index: int) -> str:
    """Returns an objective of a trial, with its confidence interval if there are several seeds."""
    if not trial.values:
        return ""
    half = trial.spreads[index].half_interval
    return _number(trial.values[index]) + ("" if half is None else f" ± {_number(half)}")


def _number(value: float) -> str:
    """Returns two decimals, or three digits of what is less than one: GFLOPs of a small model."""
    return f"{value:.2f}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"


def trial_cells(trials: Sequence[TrialSummary], objective: Sequence[Measure]) -> list[list[str]]:
    """Returns trials as the cells of a table, the head first."""
    names = ["value"] if len(objective) == 1 else [measure.label for measure in objective]
    head = ["trial", "state", *names, "minutes", "chosen"]
    return [head, *(_trial_row(trial, len(objective)) for trial in trials)]


def _trial_row(trial: TrialSummary, num_values: int) -> list[str]:
    broken = [f"{name} is exceeded by {x:.3g}" for name, x in trial.excess.items() if x > 0]
    origin = [f"copied from {trial.copied_from}"] if trial.copied_from else []
    remarks = [params_text(trial), *origin, *broken, trial.reason]
    return [
        str(trial.number),
        trial.state,
        *(value_text(trial, index) for index in range(num_values)),
        "" if trial.minutes is None else f"{trial.minutes:.1f}",
        "; ".join(remark for remark in remarks if remark),
    ]


def _cells(rows: Sequence[RatioRow]) -> list[list[str]]:
    head = ["ratio", "GFLOPs", "parameters", "validation", "test", "latency ms", "speed-up"]
    return [head, *(_row_cells(row) for row in rows)]


def _row_cells(row: RatioRow) -> list[str]:
    name = "dense" if row.ratio_asked == 0 else f"{row.ratio.mean:.3f}"
    return [
        name,
        f"{row.gmacs.mean:.4g}",
        f"{row.params.mean / 1e6:.3f} M",
        str(row.val),
        str(row.test),
        f"{row.dense_latency_ms.mean:.1f} -> {row.latency_ms.mean:.1f}",
        f"{row.speed_up.mean:.2f}x",
    ]


def _markdown_table(cells: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], "|" + " --- |" * len(cells[0]), *lines[1:]]
