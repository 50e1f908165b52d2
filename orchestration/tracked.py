"""What MLflow is told of a run, in plain values: metrics, parameters and tags.

What is sent and what is read stand side by side, and nothing here imports MLflow.
"""

import contextlib
import importlib.metadata
import json
import logging
import math
import os
import re

from comp.results import CurvePoint, StageRecord
from orchestration.job import Record
from orchestration.storage import Storage
from orchestration.store import Run

SCORES = "scores.json"

TRACKING_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks")
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the defaults wait four minutes for a dead server
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}

Metric = tuple[str, float, int, int]  # key, value, time in milliseconds, step


class TrackingError(RuntimeError):
    """MLflow does not answer as it should. What it should have been told is on disk.

    Attributes:
        permanent: Whether trying again would fail again.
    """

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


def is_tracking_uri(text: str) -> bool:
    """Tells whether a text is the address of a store that MLflow can keep runs in."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme.partition("+")[0] in TRACKING_SCHEMES


def prepare_client() -> None:
    """Makes MLflow's client quick to give up and quiet; call it before importing MLflow."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def redact(text: str) -> str:
    """Blots out user and password of addresses."""
    return re.sub(r"//[^/@\s]*@", "//***@", text)


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
    names = ("val", "val_loss", "train_loss", "ratio", "macs", "cost", "mode_cost")
    times = ("seconds", "train_seconds", "eval_seconds")
    values = {name: getattr(stage, name) for name in (*names, *times)}
    values["params_m"] = stage.params / 1e6
    return values | {f"tokens_{stream}": count for stream, count in stage.tokens.items()}


POINT_METRICS = (
    "val",
    "test",
    "val_before_tuning",
    "gmacs",
    "latency_ms",
    "dense_latency_ms",
    "ratio_reached",
    "test_ratio",
    "fine_tuned",
)
"""Fields of a point that are metrics of the same name; ``params`` is sent in millions."""


def _point_values(point: CurvePoint) -> dict[str, float]:
    values = {name: getattr(point, name) for name in POINT_METRICS}
    values |= {"params_m": point.params / 1e6, "speed_up": _speed_up(point)}
    return values | {f"test_{name}": value for name, value in point.details.items()}


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


_TAGGED = ("study", "trial", "kind", "model", "task", "method", "seed", "trust_remote_code")
