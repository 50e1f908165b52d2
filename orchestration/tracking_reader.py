"""Runs as an MLflow tracking server has them: the other half of ``tracking``.

A run is ours if it has the tag ``comp.kind``. Its curve is rebuilt from its metrics, which are
there while it is still going on and when its artifacts are out of reach; its stages come from the
``stages.parquet`` among its artifacts.
"""

import contextlib
import math
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comp.results import CurvePoint, StageRecord
from comp.words import nearest
from orchestration.store_tables import from_parquet
from orchestration.tracked import POINT_METRICS, TrackingError, prepare_client, redact

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

_OURS = "tags.`comp.kind` = 'prune'"
_PAGE = 500
_SIDE_BY_SIDE = 8  # requests at a time
_TIMEOUT = 10  # seconds


@dataclass(frozen=True)
class TrackedRun:
    """A pruning run as MLflow has it.

    Attributes:
        name: Its run id here (MLflow's run name).
        study: Name of the study.
        trial: Optuna's trial number, -1 outside a study.
        status: MLflow's: ``RUNNING``, ``FINISHED``, ``FAILED``, ``KILLED``.
        params: Its parameters.
        points: The dense model and the finished ratios; NaN where a metric is missing.
        stages: Its stages, if they were asked for and are there.
    """

    name: str
    study: str
    trial: int
    status: str
    params: Mapping[str, str]
    points: tuple[CurvePoint, ...]
    stages: tuple[StageRecord, ...]


def read_tracked(
    uri: str, experiments: Sequence[str] = (), *, with_stages: bool = False
) -> list[TrackedRun]:
    """Reads all pruning runs of a tracking server.

    Args:
        uri: ``http://HOST:PORT``, ``sqlite:///PATH`` or another database.
        experiments: Names of the experiments to read; all if empty.
        with_stages: Fetch the stages too, one file a run.

    Raises:
        ValueError: If there is no MLflow at the address, an incompatible one, no such experiment,
            or no run of ours.
        TrackingError: If it does not answer.
    """
    place = redact(uri)
    _check_address(uri)
    with _explained(place):
        prepare_client()
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=uri)
        ids = _experiment_ids(client, place, experiments)
        found = list(_search(client, ids, _OURS)) if ids else []
        if not found:
            others = sum(1 for _ in _search(client, ids, "")) if ids else 0
            raise ValueError(
                f"{place} has {others} runs, but none with the tag comp.kind=prune, which this "
                "program puts on its pruning runs; name run directories or another server"
            )
        with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
            return list(pool.map(lambda run: _tracked(client, run, with_stages), found))


def _check_address(uri: str) -> None:
    if uri.startswith(("http://", "https://")):
        _check_server(uri)
    elif uri.startswith("sqlite:") and not Path(uri.split(":///", 1)[-1]).is_file():
        raise ValueError(f"{uri} names no file; give the path of an mlflow.db that exists")
    elif not uri.startswith("databricks"):
        _check_database(uri)


def _check_server(uri: str) -> None:
    """Asks an HTTP server for its MLflow version.

    Raises:
        ValueError: If it is no MLflow, or one of another generation than the client.
        TrackingError: If nobody answers.
    """
    place = redact(uri)
    no_mlflow = f"{place} answers, but is no MLflow tracking server"
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/version", timeout=_TIMEOUT) as answer:
            version = answer.read(100).decode(errors="replace").strip()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # it wants a login, which the client brings and we do not
            return
        raise ValueError(f"{no_mlflow} (its /version gives status {error.code})") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise TrackingError(f"no MLflow answers at {place} ({reason}); is it running?") from None
    major = version.partition(".")[0]
    if not major.isdigit() or len(version) > 30:
        raise ValueError(f"{no_mlflow} (its /version is no version)")
    import mlflow

    own = int(mlflow.__version__.partition(".")[0])
    if int(major) not in (own - 1, own):
        raise ValueError(
            f"{place} runs MLflow {version}, but this program reads {own - 1}.x and {own}.x; "
            "compare run directories instead"
        )


def _check_database(uri: str) -> None:
    """Looks for MLflow's tables, because its client would make them where there are none.

    Raises:
        ValueError: If the database is none of MLflow's.
        TrackingError: If it cannot be opened.
    """
    import sqlalchemy

    try:
        engine = sqlalchemy.create_engine(uri)
        with contextlib.closing(engine.connect()) as connection:
            tables = set(sqlalchemy.inspect(connection).get_table_names())
        engine.dispose()
    except sqlalchemy.exc.OperationalError as error:
        reason = str(error.orig or error).splitlines()[0]
        raise TrackingError(redact(f"{uri} cannot be opened ({reason})")) from None
    except sqlalchemy.exc.DatabaseError as error:
        reason = str(error.orig or error).splitlines()[0]
        raise ValueError(f"{redact(uri)} cannot be read as a database ({reason})") from None
    except ImportError as error:
        raise ValueError(
            f"{redact(uri)} needs a database driver that is not installed ({error})"
        ) from None
    if not {"experiments", "runs", "metrics"} <= tables:
        raise ValueError(f"{redact(uri)} is a database, but holds no MLflow runs")


def _experiment_ids(client: "MlflowClient", place: str, names: Sequence[str]) -> list[str]:
    known = {one.name: one.experiment_id for one in client.search_experiments(max_results=1000)}
    for name in names:
        if name not in known:
            raise ValueError(
                f"{place} has no experiment {name!r}{nearest(name, list(known))}; it has "
                + ", ".join(sorted(known)[:10])
            )
    return [known[name] for name in names or known]


def _search(client: "MlflowClient", ids: list[str], query: str) -> Iterator["Run"]:
    token = None
    while True:
        page = client.search_runs(
            ids,
            query,
            max_results=_PAGE,
            order_by=["attributes.start_time ASC"],
            page_token=token,
        )
        yield from page
        token = page.token
        if not token:
            return


def _tracked(client: "MlflowClient", run: "Run", with_stages: bool) -> TrackedRun:
    tags = run.data.tags
    stages = _stages(client, run.info.run_id) if with_stages else ()
    trial = tags.get("comp.trial", "")
    return TrackedRun(
        name=run.info.run_name,
        study=tags.get("comp.study", ""),
        trial=int(trial) if trial.lstrip("-").isdigit() else -1,
        status=run.info.status,
        params=run.data.params,
        points=_points(client, run),
        stages=stages,
    )


def _points(client: "MlflowClient", run: "Run") -> tuple[CurvePoint, ...]:
    """Rebuilds the points from the metrics, whose step is the asked ratio in per mille."""
    at: dict[int, dict[str, float]] = {}
    for name in (*POINT_METRICS, "params_m"):
        if name in run.data.metrics:
            for entry in client.get_metric_history(run.info.run_id, name):
                at.setdefault(entry.step, {})[name] = entry.value
    complete = {step: values for step, values in at.items() if "ratio_reached" in values}
    return tuple(_point(run, step, complete[step]) for step in sorted(complete))


def _point(run: "Run", step: int, values: Mapping[str, float]) -> CurvePoint:
    params, tags = run.data.params, run.data.tags
    known: dict[str, Any] = {name: values.get(name, math.nan) for name in POINT_METRICS}
    seed = str(params.get("seed", tags.get("comp.seed", "0")))
    return CurvePoint(
        model=params.get("model", tags.get("comp.model", "")),
        task=params.get("task", tags.get("comp.task", "")),
        method=params.get("method", tags.get("comp.method", "")) if step else "dense",
        seed=int(seed) if seed.isdigit() else 0,
        ratio_asked=step / 1000,
        params=round(1e6 * values.get("params_m", 0.0)),
        **known | {"fine_tuned": int(values.get("fine_tuned", 0))},
    )


def _stages(client: "MlflowClient", run_id: str) -> tuple[StageRecord, ...]:
    """Fetches the stages; none while the run goes on or where the artifacts are out of reach."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(Exception):
        path = client.download_artifacts(run_id, "stages.parquet", scratch)
        records = from_parquet(Path(path).read_bytes(), StageRecord)
        return tuple(r.body for r in records if isinstance(r.body, StageRecord))
    return ()


@contextlib.contextmanager
def _explained(place: str) -> Iterator[None]:
    """Turns whatever MLflow's client raises into a sentence."""
    try:
        yield
    except (ValueError, TrackingError):
        raise
    except Exception as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        if "database schema" in reason:
            raise ValueError(
                f"{place} was written by another version of MLflow ({reason})"
            ) from error
        raise TrackingError(redact(f"MLflow at {place} cannot be read ({reason})")) from error
