"""MLflow as a mirror of run directories: it can be down, slow or emptied, and nothing is lost.

Whoever changes a run directory says so with ``touch``; a thread of the driver then reads the
directory and sends what MLflow lacks. Sending again what MLflow has is harmless, because every
point carries the time at which it was made and MLflow drops exact repetitions. A run directory
holds an ``unsynced`` file for as long as MLflow may lack something of it.

Only this file writes to MLflow; ``tracking_reader`` reads it. It is imported at the first send, in
the thread.
"""

import contextlib
import fcntl
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from comp.lazy import without_collection
from orchestration.forks import ratio_name
from orchestration.storage import Storage, StorageError
from orchestration.store import Run, read_run
from orchestration.tracked import (
    TRACKING_SCHEMES,
    TrackingError,
    is_tracking_uri,
    metrics_of,
    params_of,
    prepare_client,
    redact,
    summary_of,
    tags_of,
)

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
    from mlflow.tracking import MlflowClient

_log = logging.getLogger(__name__)

UNSYNCED = "unsynced"
PLOTS = "plots"

_BATCH = 1000  # metrics that MLflow accepts in one request
_LONGEST_PAUSE = 5.0  # seconds between attempts to reach a server that is down
_PERMANENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE")


class Tracker(Protocol):
    """Something that mirrors run directories."""

    def touch(self, location: str) -> None:
        """Says that there is news in a run directory. Never waits for anybody."""
        ...

    def close(self, *, timeout: float = 30.0) -> list[str]:
        """Sends what is left and returns the run directories of which something is not sent.

        Args:
            timeout: Seconds without any progress after which it gives up.
        """
        ...


class NullTracker:
    """Mirrors nothing."""

    def touch(self, location: str) -> None:
        """Does nothing."""

    def close(self, *, timeout: float = 30.0) -> list[str]:
        """Has nothing to send."""
        return []


@dataclass
class _Sent:
    """What MLflow has of a run: its id there, how many records, and whether the models."""

    run_id: str
    num_records: int = 0
    models: bool = False
    open: bool = True


class MlflowTracker:
    """Mirrors run directories into an MLflow experiment, one flat run each."""

    def __init__(
        self,
        uri: str,
        experiment: str,
        *,
        send_models: bool = True,
        study: bool = False,
        system_metrics: bool = False,
    ) -> None:
        """Checks the address; nothing is sent before the first ``touch`` or ``sync``.

        Args:
            uri: ``sqlite:///PATH``, ``http://HOST:PORT`` or another database or server.
            experiment: Name of the experiment, made if it is missing.
            send_models: Whether finished models are sent.
            study: Whether the experiment is a study, which gets a run of its own beside those of
                its trials.
            system_metrics: Whether CPU, memory, disk, network and GPUs of this machine are
                sampled into the study's run while the tracker is open.

        Raises:
            ValueError: If MLflow could not keep runs there.
        """
        if not is_tracking_uri(uri):
            raise ValueError(
                f"the MLflow address must start with one of {', '.join(TRACKING_SCHEMES)}, "
                f"but got {redact(uri)!r}; pass sqlite:///PATH/mlflow.db to keep runs in a file"
            )
        self._uri, self._experiment = uri, experiment
        self._send_models = send_models
        self._study = study
        self._system_metrics = system_metrics
        self._study_run = ""
        self._monitor: SystemMetricsMonitor | None = None
        self._client: MlflowClient | None = None
        self._experiment_id = ""
        self._sent: dict[str, _Sent] = {}
        self._marked: set[str] = set()
        self._sending = threading.Lock()  # held while the thread or ``sync`` talks to MLflow
        self._changed = threading.Condition()
        self._dirty: dict[str, int] = {}  # how often each was touched since it was sent
        self._closing = False
        self._thread: threading.Thread | None = None
        self._last_success = 0.0
        self._warned = False

    def touch(self, location: str) -> None:
        """Says that there is news in a run directory; returns at once."""
        if location not in self._marked:
            self._marked.add(location)
            with contextlib.suppress(StorageError):  # then the records fail too, and say so
                Storage(location).write(UNSYNCED, b"MLflow may lack something of this run.\n")
        with self._changed:
            self._dirty[location] = self._dirty.get(location, 0) + 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def sync(self, location: str) -> None:
        """Sends everything of a run directory, now and in this thread.

        Raises:
            TrackingError: If MLflow does not take it.
            FileNotFoundError: If there is no run.
        """
        with self._sending, self._explained():
            self._send(read_run(location))

    def close(self, *, timeout: float = 30.0) -> list[str]:
        """Sends what is left; runs that are not finished are shown as killed."""
        with self._changed:
            self._closing = True
            self._last_success = time.monotonic()
            self._changed.notify_all()
        thread = self._thread
        while thread and thread.is_alive() and time.monotonic() - self._last_success < timeout:
            thread.join(0.05)
        with self._changed:
            left = list(self._dirty)
        if left:
            place = redact(self._uri)
            _log.warning("%d runs are on disk but not yet in MLflow at %s", len(left), place)
        return left

    # --- the thread ------------------------------------------------------------------------

    def _work(self) -> None:
        pause = 0.5
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._dirty or self._closing)
                if not self._dirty:
                    break
                location, touches = next(iter(self._dirty.items()))
            if self._sent_or_hopeless(location):
                pause = 0.5
                with self._changed:
                    if self._dirty[location] == touches:
                        del self._dirty[location]
                continue
            with self._changed:
                self._dirty[location] = self._dirty.pop(location)  # to the end
                if self._closing:
                    return
                self._changed.wait_for(lambda: self._closing, timeout=pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        with contextlib.suppress(TrackingError), self._sending, self._explained():
            self._close_open_runs()

    def _sent_or_hopeless(self, location: str) -> bool:
        """Sends one run; says whether there is no point in trying again."""
        try:
            self.sync(location)
        except FileNotFoundError:
            return True  # the worker has not made it yet, and will be heard of
        except TrackingError as error:
            if error.permanent or not self._warned:
                self._warned = True
                _log.warning("%s; results go on to disk", error)
            return error.permanent
        self._last_success = time.monotonic()
        return True

    def _close_open_runs(self) -> None:
        """Shows runs that a driver leaves unfinished as killed; resuming opens them again."""
        left = any(sent.open for sent in self._sent.values())
        if self._monitor is not None:
            self._monitor.finish()
        if self._study_run and self._client:
            self._client.set_terminated(self._study_run, "KILLED" if left else "FINISHED")
        for sent in self._sent.values():
            if sent.open and self._client:
                self._client.set_terminated(sent.run_id, "KILLED")
                sent.open = False

    # --- one run ---------------------------------------------------------------------------

    def _send(self, run: Run) -> None:
        client = self._connect()
        sent = self._sent.get(run.uid)
        if sent is None or not sent.open:
            sent = self._open_run(client, run, sent)
            self._sent[run.uid] = sent
        metrics = [m for record in run.records[sent.num_records :] for m in metrics_of(record)]
        if run.outcome != "unfinished":
            metrics += summary_of(run)
        entities = [_metric(*metric) for metric in metrics]
        for start in range(0, len(entities), _BATCH):
            client.log_batch(sent.run_id, metrics=entities[start : start + _BATCH])
        sent.num_records = len(run.records)
        if run.outcome != "unfinished":
            self._finish_run(client, run, sent)
            Storage(run.location).remove(UNSYNCED)
            self._marked.discard(run.location)

    def _connect(self) -> "MlflowClient":
        """Opens the store and the experiment; a fresh SQLite file gets its tables here, once."""
        if self._client is not None:
            return self._client
        prepare_client()
        with without_collection():
            from mlflow.tracking import MlflowClient

        artifacts = None
        with _only_one_process(self._uri) as database:
            if database is not None:
                artifacts = (database.parent / "mlflow-artifacts").absolute().as_uri()
                _make_tables(database)
            client = MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)
            found = client.get_experiment_by_name(self._experiment)
            if found is None:
                tags = {"comp.study": self._experiment}
                self._experiment_id = client.create_experiment(
                    self._experiment,
                    f"{artifacts}/{self._experiment}" if artifacts else None,
                    tags | {"mlflow.experimentKind": "custom_model_development"},
                )
            elif found.lifecycle_stage != "active":
                raise TrackingError(
                    f"MLflow experiment {self._experiment!r} is deleted; restore it there or "
                    "give the study another name",
                    permanent=True,
                )
            else:
                self._experiment_id = found.experiment_id
        self._client = client
        if self._study:
            self._open_study(client)
        return client

    def _open_study(self, client: "MlflowClient") -> None:
        """Finds the study's own run or makes it, and samples this machine into it if asked to."""
        self._study_run = study_run(client, self._experiment_id, self._experiment)
        client.update_run(self._study_run, status="RUNNING")
        if self._system_metrics:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            monitor = SystemMetricsMonitor(
                self._study_run, resume_logging=True, tracking_uri=self._uri
            )
            monitor.start()
            self._monitor = monitor

    def send_study(self, files: Sequence[Path], metrics: Mapping[str, float]) -> None:
        """Puts a study's report into its own run, now and in this thread.

        Args:
            files: What to show as artifacts.
            metrics: Numbers by name.

        Raises:
            TrackingError: If MLflow does not take it.
        """
        with self._sending, self._explained():
            client = self._connect()
            run_id = self._study_run or study_run(client, self._experiment_id, self._experiment)
            for path in files:
                client.log_artifact(run_id, str(path))
            now = int(1000 * time.time())
            entities = [_metric(name, value, now, 0) for name, value in metrics.items()]
            client.log_batch(run_id, metrics=entities)

    def _open_run(self, client: "MlflowClient", run: Run, sent: _Sent | None) -> _Sent:
        """Finds the run in MLflow by its uid, or makes it, with its parameters and tags."""
        from mlflow.entities import Param, RunTag

        if sent is not None:
            run_id = sent.run_id
        else:
            query = f"tags.`comp.uid` = '{run.uid}'"
            found = client.search_runs([self._experiment_id], query, max_results=1)
            if found:
                run_id = found[0].info.run_id
            else:
                made = client.create_run(
                    self._experiment_id,
                    start_time=int(run.created * 1000),
                    tags={"comp.uid": run.uid},
                    run_name=run.job.run_id,
                )
                run_id = made.info.run_id
        client.update_run(run_id, status="RUNNING")
        from orchestration.tracking_entities import data_set

        client.log_inputs(run_id, [data_set(run.job.data)])
        params = [Param(name, str(value)) for name, value in params_of(run).items()]
        tags = [RunTag(name, value) for name, value in tags_of(run).items()]
        client.log_batch(run_id, params=params, tags=tags)
        return _Sent(run_id, models=bool(sent and sent.models))

    def _finish_run(self, client: "MlflowClient", run: Run, sent: _Sent) -> None:
        with Storage(run.location).tree() as directory:
            names = ["spec.yaml", "report.json", "stages.parquet", "curve.parquet"]
            for name in names:
                if (directory / name).is_file():
                    client.log_artifact(sent.run_id, str(directory / name))
            if (directory / PLOTS).is_dir():
                client.log_artifacts(sent.run_id, str(directory / PLOTS), PLOTS)
            if self._send_models and not sent.models:
                self._log_models(client, run, sent.run_id, directory / "model")
            sent.models = True
        status = "FINISHED"
        if run.failure is not None:
            status = "KILLED" if run.failure.kind == "cancelled" else "FAILED"
            client.set_tag(sent.run_id, "comp.failure", run.failure.message)
        end = run.records[-1].time if run.records else run.created
        client.set_terminated(sent.run_id, status, end_time=int(end * 1000))
        sent.open = False

    def _log_models(self, client: "MlflowClient", run: Run, run_id: str, models: Path) -> None:
        from orchestration.tracking_entities import Place, log_model

        place = Place(self._experiment_id, run_id)
        for point in run.points:
            directory = models / ratio_name(point.ratio_asked)
            if directory.is_dir():
                log_model(client, place, directory, point, tags=tags_of(run))

    def register(self, location: str, ratio: float, name: str) -> str:
        """Registers the model that a finished run has at an asked ratio.

        Args:
            location: The run directory.
            ratio: The asked ratio.
            name: The registered model; made if it is missing.

        Returns:
            The version. It is the old one if this model has one under the name.

        Raises:
            TrackingError: If MLflow does not take it.
            FileNotFoundError: If the run has saved no model at the ratio.
        """
        self.sync(location)
        run = read_run(location)
        with self._sending, self._explained():
            from orchestration.tracking_entities import Place, log_model, register

            client, place = self._connect(), Place(self._experiment_id, self._sent[run.uid].run_id)
            point = next(p for p in run.points if round(1000 * (p.ratio_asked - ratio)) == 0)
            with Storage(location).tree(f"model/{ratio_name(ratio)}") as directory:
                model = log_model(client, place, directory, point, tags=tags_of(run))
            return register(client, model, name, place.run_id)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, TrackingError):
            raise
        except Exception as error:
            code = str(getattr(error, "error_code", ""))
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise TrackingError(
                redact(f"MLflow at {self._uri} does not take results ({reason})"),
                permanent=code in _PERMANENT,
            ) from error


def study_run(client: "MlflowClient", experiment_id: str, study: str) -> str:
    """Returns the id of a study's own run, which is made if it is missing."""
    found = client.search_runs([experiment_id], "tags.`comp.kind` = 'study'", max_results=1)
    if found:
        return str(found[0].info.run_id)
    tags = {"comp.kind": "study", "comp.study": study}
    made = client.create_run(experiment_id, tags=tags, run_name=f"study {study}")
    client.set_terminated(made.info.run_id)
    return str(made.info.run_id)


def _metric(key: str, value: float, time_ms: int, step: int) -> "Metric":
    from mlflow.entities import Metric

    return Metric(key, value, time_ms, step)


@contextlib.contextmanager
def _only_one_process(uri: str) -> Iterator[Path | None]:
    """Gives the file of an SQLite store, locked against other processes of ours."""
    if not uri.startswith("sqlite:"):
        yield None
        return
    database = Path(uri.split(":///", 1)[1])
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f".{database.name}.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield database


def _make_tables(database: Path) -> None:
    """Makes a fresh SQLite store under another name and then gives it its own.

    MLflow's migrations take seconds, and neither a second process nor an end in the middle does
    them any good: what is left then cannot be opened again.
    """
    if database.exists():
        return
    from mlflow.tracking import MlflowClient

    unfinished = database.with_name(f".{database.name}.new")
    unfinished.unlink(missing_ok=True)
    MlflowClient(tracking_uri=f"sqlite:///{unfinished}").search_experiments(max_results=1)
    unfinished.rename(database)
