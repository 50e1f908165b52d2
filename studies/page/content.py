"""What the page shows, as JSON values."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from comp.modes import PruningMode
from comp.results import CurvePoint, StageRecord
from comp.tasks.names import METRIC_NAMES
from orchestration.storage import parent
from studies.comparison import Comparison, PairedRow
from studies.curves import Curve, Metric, pareto_curve_points, removed_macs
from studies.folder import StudyFolder
from studies.page.pictures import pictures_of
from studies.plots import LABELS
from studies.sources import Source

MAX_CURVES = 400  # in the chart; further rows are left out, the lowest ones
MAX_RUNS = 40  # whose stages and layers are shown


def content_of(comparison: Comparison, *, num_images: int = 4) -> dict[str, Any]:
    """Collects what the page shows.

    Args:
        comparison: The runs.
        num_images: Validation images to show the kept patches of; 0 loads no model.
    """
    rows, metric = comparison.rows, comparison.metric
    task = comparison.curves[0].last.task
    shown = [(i, curve) for i, row in enumerate(rows) for curve in row.curves][:MAX_CURVES]
    left = len(comparison.curves) - len(shown)
    owner = {id(source.curve): source for source in comparison.sources}  # names may be equal
    best = [owner[id(curve)] for _, curve in shown]
    specs = differing_settings([curve for _, curve in shown])
    name = METRIC_NAMES.get(task, "metric")
    models = sorted({curve.last.model for curve in comparison.curves})
    return {
        "title": f"{', '.join(models)} on {task}: accuracy against FLOPs removed",
        "subtitle": _subtitle(comparison, left),
        "axis": f"{LABELS[metric]} {name} (points of 100)",
        "unit": f"points of {name} ({metric})",
        "metric": metric,
        "ratios": comparison.ratios,
        "span": comparison.span,
        "dense": _dense(comparison),
        "baseline": comparison.baseline,
        "rows": [
            {
                "name": row.name,
                "method": row.method,
                "seeds": len(row.seeds),
                "values": ["-" if value is None else str(value) for value in row.values],
                "area": str(row.area),
            }
            for row in rows[:MAX_CURVES]
        ],
        "paired": [_paired(row) for row in comparison.paired[:MAX_CURVES]],
        "front": [
            [
                curve.run if p.method != "dense" else "dense",
                f"{p.gmacs:.4g}",
                f"{getattr(p, metric):.2f}",
                f"{p.ratio_reached:.3f}",
            ]
            for curve, p in pareto_curve_points(comparison.curves, metric)
        ],
        "curves": [
            _curve(curve, i, spec, metric) for (i, curve), spec in zip(shown, specs, strict=True)
        ],
        "modes": [mode.value for mode in PruningMode],
        "runs": [
            _run(source, spec)
            for source, spec in zip(best[:MAX_RUNS], specs[:MAX_RUNS], strict=True)
        ],
        "importances": importances_of(comparison.sources),
        "examples": pictures_of(best, num_images),
        "made": "GFLOPs count a multiply-add as one. The numbers are those of the runs' "
        "curve.parquet and stages.parquet.",
    }


def _subtitle(comparison: Comparison, left: int) -> str:
    runs, rows = len(comparison.curves), len(comparison.rows)
    text = f"{runs} runs in {rows} rows, {comparison.metric} split."
    if left:
        text += f" The chart has the {runs - left} runs of the highest rows."
    if comparison.skipped:
        text += f" Without a finished ratio: {', '.join(comparison.skipped[:10])}."
    return text


def differing_settings(curves: Sequence[Curve]) -> list[str]:
    """Returns, for every run, the settings in which the runs differ, in one line."""
    names = dict.fromkeys(name for curve in curves for name in curve.settings)
    hidden = {"model", "task", "method", "kind"}
    varied = [
        name
        for name in names
        if name not in hidden and len({curve.settings.get(name) for curve in curves}) > 1
    ]
    return [
        ", ".join(
            f"{name} {_short(curve.settings[name])}" for name in varied if name in curve.settings
        )
        for curve in curves
    ]


def _short(value: str) -> str:
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value


def _dense(comparison: Comparison) -> float | None:
    """The dense model's value, if all runs have the same one."""
    values = {
        round(float(getattr(curve.dense, comparison.metric)), 6)
        for curve in comparison.curves
        if curve.dense
    }
    return values.pop() if len(values) == 1 else None


def _paired(row: PairedRow) -> list[str]:
    values = ["-" if value is None else str(value) for value in row.values]
    return [row.name, str(len(row.seeds)), *values, str(row.area)]


def _curve(curve: Curve, row: int, spec: str, metric: Metric) -> dict[str, Any]:
    return {
        "row": row,
        "run": curve.run,
        "method": curve.last.method,
        "seed": curve.last.seed,
        "spec": spec,
        "points": [_point(point, metric) for point in curve.points],
    }


def _point(point: CurvePoint, metric: Metric) -> dict[str, Any]:
    speed_up = point.speed_up if point.latency_ms > 0 else math.nan
    values = {
        "ratio": round(point.ratio_reached, 5),
        "value": round(float(getattr(point, metric)), 4),
        "gmacs": point.gmacs,
        "params": point.params,
        "speed_up": round(speed_up, 3),
    }
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _run(source: Source, spec: str) -> dict[str, Any]:
    curve = source.curve
    assert curve is not None
    points = [point for point in curve.points if point.method != "dense"]
    return {
        "run": curve.run,
        "method": curve.last.method,
        "seed": curve.last.seed,
        "spec": spec,
        "stages": [_stage(stage) for stage in source.stages],
        "shares": removed_by_mode(source.stages, curve.dense),
        "dense": curve.dense.layers if curve.dense else {},
        "points": [
            {"ratio": point.ratio_reached, "layers": _rounded(point.layers)} for point in points
        ],
    }


def _stage(stage: StageRecord) -> dict[str, Any]:
    names = ("stage", "mode", "choice", "ratio", "val", "cost")
    values = {name: getattr(stage, name) for name in names}
    bad = [k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)]
    return values | dict.fromkeys(bad)


def _rounded(layers: Mapping[str, float]) -> dict[str, float]:
    return {name: round(count, 2) for name, count in layers.items()}


def removed_by_mode(stages: Sequence[StageRecord], dense: CurvePoint | None) -> dict[str, float]:
    """Returns each mode's share of the multiply-adds that the stages removed; they sum to 1."""
    if not stages or dense is None:
        return {}
    removed = removed_macs([(stage.mode, stage.macs) for stage in stages], dense.gmacs * 1e9)
    total = sum(removed.values())
    shares = {mode: macs / total if total else 0.0 for mode, macs in removed.items()}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def importances_of(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Returns the parameter importances of the studies that the runs belong to."""
    from studies.importances import parameter_importances

    places = dict.fromkeys(
        (parent(source.run.location, 2), source.run.job.study)
        for source in sources
        if source.run is not None and source.run.job.trial >= 0
    )
    found = []
    for root, name in places:
        folder = StudyFolder(root, name)
        values = parameter_importances(folder) if folder.is_started else {}
        if values:
            found.append({"study": name, "values": list(values.items())})
    return found
