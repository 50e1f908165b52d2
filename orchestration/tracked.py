"""What MLflow is told of a run, in plain values: metrics, parameters and tags."""

import contextlib
import importlib.metadata
import json
import math

from comp.results import CurvePoint, StageRecord
from orchestration.job import Record
from orchestration.storage import Storage
from orchestration.store import Run

SCORES = "scores.json"

Metric = tuple[str, float, int, int]  # key, value, time in milliseconds, step


def metrics_of(record: Record) -> list[Metric]:
    """Returns a record's metrics as key, value, time in milliseconds and step.

    The step is the FLOPs ratio in per mille, so that MLflow's line charts draw accuracy against
    ratio: the measured ratio for a stage, the asked one for a point.
    """
    body = record.body
    if isinstance(body, StageRecord):
        values = {f"stage/{name}": value for name, value in _stage_values(body).items()}
        step = round(body.ratio * 1000)
    else:
        values, step = _point_values(body), round(body.ratio_asked * 1000)
    time_ms = int(record.time * 1000)
    return [(k, float(v), time_ms, step) for k, v in values.items() if math.isfinite(v)]


def _stage_values(stage: StageRecord) -> dict[str, float]:
    names = ("val", "val_loss", "train_loss", "ratio", "macs", "cost", "mode_cost", "seconds")
    values = {name: getattr(stage, name) for name in names}
    values["params_m"] = stage.params / 1e6
    return values | {f"tokens_{stream}": count for stream, count in stage.tokens.items()}


def _point_values(point: CurvePoint) -> dict[str, float]:
    names = ("val", "test", "val_before_tuning", "gmacs", "latency_ms", "ratio_reached")
    values = {name: getattr(point, name) for name in names}
    return values | {"params_m": point.params / 1e6, "speed_up": _speed_up(point)}


def _speed_up(point: CurvePoint) -> float:
    return point.speed_up if point.latency_ms > 0 else math.nan


def summary_of(run: Run) -> list[Metric]:
    """Returns one metric per ratio, such as ``test_at_700``, and the run's scores, to sort by."""
    time_ms = int((run.records[-1].time if run.records else run.created) * 1000)
    values: dict[str, float] = {}
    for point in run.points:
        at = f"at_{round(point.ratio_asked * 1000):03d}"
        own = {"test": point.test, "val": point.val, "speed_up": _speed_up(point)}
        values |= {f"{name}_{at}": value for name, value in own.items()}
    with contextlib.suppress(FileNotFoundError):
        values |= json.loads(Storage(run.location).read(SCORES))
    return [(k, float(v), time_ms, 0) for k, v in values.items() if math.isfinite(v)]


def params_of(run: Run) -> dict[str, object]:
    """Returns what decides the run's result; equal whenever it is asked for."""
    job = run.job
    own = {"model": job.model, "task": job.task, "data": job.data or "embedded", "kind": job.kind}
    return own | job.config | {"method": job.method, "seed": job.seed}


def tags_of(run: Run) -> dict[str, str]:
    """Returns what one filters and groups runs by."""
    job = run.job
    tags = {f"comp.{name}": str(getattr(job, name)) for name in _TAGGED}
    tags |= {"comp.run": job.run_id, "comp.content_id": job.content_id}
    tags |= {"comp.mlflow": importlib.metadata.version("mlflow")}
    tags |= {f"comp.env.{name}": value for name, value in run.environment.items()}
    if "git_commit" in run.environment:
        tags["mlflow.source.git.commit"] = run.environment["git_commit"]
    return tags


_TAGGED = ("study", "trial", "kind", "model", "task", "method", "seed")
