"""The MLflow mirror: what it shows, and that it can be down, back, or asked twice."""

import logging
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from orchestration import worker
from orchestration.job import Failure, Job, Record
from orchestration.storage import Storage
from orchestration.store import read_run, write_failure
from orchestration.tracked import metrics_of
from orchestration.tracking import (
    MlflowTracker,
    NullTracker,
    TrackingError,
)
from tests.mlflow_server import Server
from tests.orchestration.trials import disturb, make_job, make_point, make_stage

MIRROR = """
import sys
from orchestration.tracking import MlflowTracker
tracker = MlflowTracker(sys.argv[1], "first")
tracker.touch(sys.argv[2])
sys.exit(len(tracker.close(timeout=600)))
"""


@pytest.fixture(scope="module")
def first_touch(tmp_path_factory: pytest.TempPathFactory) -> "subprocess.CompletedProcess[str]":
    """A fresh SQLite store, made by a process that sends one run and ends; args[-2] is its URI.

    Another process before it was killed while it made the store.
    """
    root = tmp_path_factory.mktemp("mlflow")
    job = finished(make_job(root))
    command = [sys.executable, "-c", MIRROR, f"sqlite:///{root}/mlflow.db", job.run_dir]
    with subprocess.Popen(command) as killed:
        while not (root / ".mlflow.db.new").exists() and killed.poll() is None:
            time.sleep(0.01)
        killed.kill()
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def store(first_touch: "subprocess.CompletedProcess[str]") -> str:
    return str(first_touch.args[-2])


@pytest.fixture
def experiment(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)[:100]


def finished(job: Job) -> Job:
    list(worker.run(job))
    return job


def only_run(store: str, experiment: str) -> Any:
    client = MlflowClient(store)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    (run,) = client.search_runs([found.experiment_id])
    return run


def history(store: str, run: Any, key: str) -> list[tuple[int, float]]:
    points = MlflowClient(store).get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.value) for point in points)


def test_the_ratio_in_per_mille_is_the_step() -> None:
    stage = {name: step for name, _, _, step in metrics_of(Record(1, make_stage(3), 2.0))}
    point = {name: step for name, _, _, step in metrics_of(Record(1, make_point(0.5), 2.0))}
    assert set(stage.values()) == {375}
    assert {"stage/val", "stage/ratio", "stage/macs", "stage/cost", "stage/mode_cost"} <= set(
        stage
    )
    assert set(point.values()) == {500}
    assert {"val", "test", "gmacs", "params_m", "latency_ms", "speed_up"} <= set(point)


def test_numbers_that_are_none_are_left_out() -> None:
    point = make_point(0.0, val_before_tuning=float("nan"), latency_ms=0.0)
    names = {name for name, *_ in metrics_of(Record(0, point, 1.0))}
    assert not names & {"val_before_tuning", "speed_up"}


@pytest.mark.chaos
def test_a_store_is_made_without_a_word_even_after_a_kill_while_it_was_made(
    first_touch: "subprocess.CompletedProcess[str]",
) -> None:
    assert (first_touch.returncode, first_touch.stdout, first_touch.stderr) == (0, "", "")
    assert only_run(first_touch.args[-2], "first").info.status == "FINISHED"


def test_a_finished_run_is_mirrored_whole(tmp_path: Path, store: str, experiment: str) -> None:
    job = finished(make_job(tmp_path))
    Storage(job.run_dir).write("plots/curve.png", b"png")
    Storage(job.run_dir).write("scores.json", b'{"curve_auc": 0.7}')
    MlflowTracker(store, experiment).sync(job.run_dir)

    run = only_run(store, experiment)
    points = read_run(job.run_dir).points
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "s-0000"
    assert history(store, run, "val") == [(round(p.ratio_asked * 1000), p.val) for p in points]
    assert len(history(store, run, "stage/val")) == 4
    assert run.data.metrics["test_at_500"] == points[-1].test
    assert run.data.metrics["curve_auc"] == 0.7
    assert run.data.params["method"] == "comp"
    assert run.data.params["num_stages"] == "4"
    tags = {"comp.study": "s", "comp.trial": "0", "comp.task": "vqa", "comp.seed": "0"}
    assert tags.items() <= run.data.tags.items()
    assert "comp.env.torch" in run.data.tags
    artifacts = {a.path for a in MlflowClient(store).list_artifacts(run.info.run_id)}
    assert {"spec.yaml", "report.json", "curve.parquet", "plots"} <= artifacts


def test_data_set_and_models_are_of_mlflows_own_types(
    tmp_path: Path, store: str, experiment: str
) -> None:
    job = finished(make_job(tmp_path, data="/data/vqa"))
    for _ in range(2):  # sent twice, there once
        MlflowTracker(store, experiment).sync(job.run_dir)
    client = MlflowClient(store)
    run = only_run(store, experiment)
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, "/data/vqa" in data.dataset.source) == ("vqa", True)
    found = client.search_logged_models([run.info.experiment_id], "metrics.`model/val` > 0")
    assert {model.name for model in found} == {"ratio-250", "ratio-500"}
    assert {str(model.status) for model in found} == {"READY"}
    assert {model.source_run_id for model in found} == {run.info.run_id}
    assert {output.model_id for output in run.outputs.model_outputs} == {m.model_id for m in found}


def test_a_study_has_a_run_of_its_own_with_system_metrics(
    tmp_path: Path, store: str, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    job = finished(make_job(tmp_path))
    tracker = MlflowTracker(store, experiment, study=True, system_metrics=True)
    tracker.touch(job.run_dir)
    client = MlflowClient(store)

    def own() -> Any:
        found = client.get_experiment_by_name(experiment)
        ids = [found.experiment_id] if found else []
        runs = client.search_runs(ids, "tags.`comp.kind` = 'study'") if ids else []
        return runs[0] if runs else None

    key = "system/cpu_utilization_percentage"
    deadline = time.monotonic() + 60
    while (own() is None or key not in own().data.metrics) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert own().info.status == "RUNNING"
    assert tracker.close() == []
    (tmp_path / "report.md").write_text("# s")
    tracker.send_study([tmp_path / "report.md"], {"best": 70.5})
    assert (own().info.status, own().info.run_name) == ("FINISHED", f"study {experiment}")
    assert own().data.metrics["best"] == 70.5
    assert 0 <= own().data.metrics[key] <= 100
    assert [a.path for a in client.list_artifacts(own().info.run_id)] == ["report.md"]


def test_sending_twice_changes_nothing(tmp_path: Path, store: str, experiment: str) -> None:
    job = finished(make_job(tmp_path))
    for _ in range(2):
        MlflowTracker(store, experiment).sync(job.run_dir)
    run = only_run(store, experiment)
    assert len(history(store, run, "val")) == 3
    assert len(history(store, run, "stage/val")) == 4


def test_a_run_of_the_same_name_in_a_new_directory_is_another_run(
    tmp_path: Path, store: str, experiment: str
) -> None:
    for root in ("a", "b"):
        MlflowTracker(store, experiment).sync(finished(make_job(tmp_path / root)).run_dir)
    with pytest.raises(ValueError, match="too many values to unpack"):
        only_run(store, experiment)


@pytest.mark.parametrize(("kind", "status"), [("algorithm", "FAILED"), ("cancelled", "KILLED")])
def test_a_run_that_failed_says_why(
    tmp_path: Path, store: str, experiment: str, kind: Any, status: str
) -> None:
    disturb(tmp_path, "s-0000", "raise", 4)
    job = finished(make_job(tmp_path))
    write_failure(job.run_dir, Failure(kind, "loss is nan"))
    MlflowTracker(store, experiment).sync(job.run_dir)
    run = only_run(store, experiment)
    assert run.info.status == status
    assert run.data.tags["comp.failure"] == "loss is nan"


def test_a_run_left_by_its_driver_is_killed_and_goes_on_as_the_same_run(
    tmp_path: Path, store: str, experiment: str
) -> None:
    job = make_job(tmp_path)
    stream = worker.run(job)
    tracker = MlflowTracker(store, experiment)
    for _ in range(3):
        next(stream)
        tracker.touch(job.run_dir)
    stream.close()
    tracker.close()
    assert only_run(store, experiment).info.status == "KILLED"
    assert (tmp_path / "s-0000" / "unsynced").exists()

    tracker = MlflowTracker(store, experiment)
    for _ in worker.run(job):
        tracker.touch(job.run_dir)
    assert tracker.close() == []
    run = only_run(store, experiment)
    assert run.info.status == "FINISHED"
    assert len(history(store, run, "val")) == 3
    assert not (tmp_path / "s-0000" / "unsynced").exists()


def test_a_touch_never_waits(tmp_path: Path) -> None:
    job = finished(make_job(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never answers
        tracker = MlflowTracker(f"http://127.0.0.1:{silent.getsockname()[1]}", "hung")
        began = time.monotonic()
        for _ in range(100):
            tracker.touch(job.run_dir)
        assert time.monotonic() - began < 5.0
        assert tracker.close(timeout=0.5) == [job.run_dir]
        assert time.monotonic() - began < 5.0
    assert (tmp_path / "s-0000" / "unsynced").exists()


def test_what_is_not_there_yet_is_not_an_error(tmp_path: Path, store: str) -> None:
    tracker = MlflowTracker(store, "nothing")
    tracker.touch(str(tmp_path / "later"))
    assert tracker.close() == []


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/x", "gopher://x"])
def test_an_address_that_keeps_no_runs_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match=r"must start with one of sqlite, .* but got"):
        MlflowTracker(uri, "x")


def test_a_password_in_the_address_is_not_repeated(tmp_path: Path) -> None:
    job = finished(make_job(tmp_path))
    tracker = MlflowTracker("http://me:secret@127.0.0.1:9", "x")
    with pytest.raises(TrackingError, match="does not take results") as caught:
        tracker.sync(job.run_dir)
    assert "secret" not in str(caught.value)


def test_the_null_tracker_has_nothing_left() -> None:
    tracker = NullTracker()
    tracker.touch("anywhere")
    assert tracker.close() == []


def until_sent(job: Job) -> None:
    deadline = time.monotonic() + 90
    while (Path(job.run_dir) / "unsynced").exists():
        assert time.monotonic() < deadline, f"{job.run_id} is not sent"
        time.sleep(0.1)


@pytest.mark.chaos
def test_a_server_that_is_down_then_back_then_slow_then_down_loses_nothing(
    tmp_path: Path, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(store.removeprefix("sqlite:///"), tmp_path / "server.db")  # saves migrations
    server = Server(tmp_path)
    first, second, third = (make_job(tmp_path, run=f"s-000{number}") for number in range(3))
    tracker = MlflowTracker(server.url, "chaos")
    with caplog.at_level(logging.WARNING):
        tracker.touch(finished(first).run_dir)
        time.sleep(1.0)
    assert caplog.text.count("results go on to disk") == 1
    assert (tmp_path / "s-0000" / "unsynced").exists()

    with server:
        until_sent(first)
        server.send(signal.SIGSTOP)  # takes connections and answers none
        for _ in worker.run(second):
            began = time.monotonic()
            tracker.touch(second.run_dir)
            assert time.monotonic() - began < 1.0
        time.sleep(1.0)
        server.send(signal.SIGCONT)
        until_sent(second)
        found = MlflowClient(server.url).get_experiment_by_name("chaos")
        assert found is not None
        runs = MlflowClient(server.url).search_runs([found.experiment_id])
        assert {run.info.run_name for run in runs} == {"s-0000", "s-0001"}
        for run in runs:
            assert run.info.status == "FINISHED"
            points = MlflowClient(server.url).get_metric_history(run.info.run_id, "val")
            in_time = sorted(points, key=lambda point: point.timestamp)
            assert [point.step for point in in_time] == [0, 250, 500]

    tracker.touch(finished(third).run_dir)
    assert tracker.close(timeout=5.0) == [third.run_dir]
    assert (tmp_path / "s-0002" / "unsynced").exists()
    assert read_run(third.run_dir).outcome == "finished"
