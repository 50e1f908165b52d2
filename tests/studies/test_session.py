"""What stands around a study: MLflow, progress lines, scores, single runs, Ctrl-C."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestration.job import Failure, JobEnd
from orchestration.lock import LockHeld, hold_directory
from orchestration.store import read_run
from orchestration.tracking import UNSYNCED
from studies.cli import cli
from studies.folder import StudyFolder
from studies.pool import gpu_share
from studies.session import conduct_run, conduct_study, sync_study
from studies.spec import PruneSpec
from studies.specfile import spec_of, tracking_uri
from studies.summary import summarize
from tests.studies.synthetic import RUNNER, make_spec
from tests.studies.test_driver import PRUNED

ROOT = Path(__file__).parents[2]


def prune_spec(root: Path, **changes: object) -> PruneSpec:
    values = {
        "kind": "prune",
        "name": "one",
        "model": "blip-tiny-vqa",
        "task": "vqa",
        "pruning": {"ratios": [0.5, 0.8]},
        "tracking": {"enabled": False},
        "root": str(root),
    }
    spec = spec_of(values | changes)
    assert isinstance(spec, PruneSpec)
    return spec


def test_a_single_run_ends_in_its_directory(tmp_path: Path) -> None:
    end = conduct_run(prune_spec(tmp_path), runner=RUNNER)
    assert isinstance(end, JobEnd)
    assert read_run(tmp_path / "runs" / "one").outcome == "finished"


def test_a_single_run_of_another_spec_is_refused_in_its_directory(tmp_path: Path) -> None:
    conduct_run(prune_spec(tmp_path), runner=RUNNER)
    end = conduct_run(prune_spec(tmp_path, pruning={"ratios": [0.6]}), runner=RUNNER)
    assert isinstance(end, Failure)
    assert "belongs to another spec" in end.message


def test_a_single_run_has_one_process(tmp_path: Path) -> None:
    with hold_directory(tmp_path / "runs" / "one", "one"), pytest.raises(LockHeld):
        conduct_run(prune_spec(tmp_path), runner=RUNNER)


def test_finished_runs_have_scores_and_a_plot(tmp_path: Path) -> None:
    conduct_study(
        make_spec(tmp_path, "n_trials=1", "tracking.enabled=false"), inline=True, runner=RUNNER
    )
    run = tmp_path / "runs" / "s-0000"
    scores = json.loads((run / "scores.json").read_text())
    assert scores["objective"] == pytest.approx(read_run(run).points[-1].val)
    assert scores["objective"] < scores["curve_auc"] < 80
    assert (run / "plots" / "curve.png").stat().st_size > 10_000


def test_progress_goes_to_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conduct_study(
        make_spec(tmp_path, "n_trials=1", "tracking.enabled=false"), inline=True, runner=RUNNER
    )
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "trial 0" in captured.err
    assert "ratio 0.800" in captured.err


def test_mlflow_is_where_the_spec_says_or_the_environment_or_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracking_uri(make_spec(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
    assert tracking_uri(make_spec(tmp_path)) == "http://there:5000"
    assert tracking_uri(make_spec(tmp_path, "tracking.uri=http://here")) == "http://here"


@pytest.mark.parametrize(
    ("gpus", "parallel", "share"), [(0, 2, 0), (1, 1, 1), (1, 2, 0.5), (2, 3, 0.5), (4, 2, 1)]
)
def test_gpus_are_shared_so_that_all_runs_fit(gpus: float, parallel: int, share: float) -> None:
    assert gpu_share(gpus, parallel) == share


@pytest.mark.slow
def test_what_a_dead_server_missed_is_sent_later_unless_a_driver_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("studies.session.CLOSE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    dead = f"tracking.uri=http://127.0.0.1:{port}"
    conduct_study(make_spec(tmp_path, "n_trials=1", dead), inline=True, runner=RUNNER)
    folder = StudyFolder.of(make_spec(tmp_path))
    assert (tmp_path / "runs" / "s-0000" / UNSYNCED).exists()
    folder.freeze(make_spec(tmp_path, "n_trials=1"))
    with folder.hold():
        command = ["study", "sync", "s", "--root", str(tmp_path)]
        assert cli.main(command, standalone_mode=False) == 3
    assert f"is being run by process {os.getpid()} on" in capsys.readouterr().err
    assert sync_study(folder) == (["s-0000", "s-dense"], 2)
    assert sync_study(folder) == ([], 2)

    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("s")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"s-0000", "s-dense"}
    history = client.get_metric_history(runs["s-0000"].info.run_id, "val")
    assert [metric.step for metric in history] == [0, 500, 800]
    artifacts = {item.path for item in client.list_artifacts(runs["s-0000"].info.run_id)}
    assert {"plots", "spec.yaml", "curve.parquet"} <= artifacts


def test_mlflow_shows_a_trial_that_the_pruner_stopped_as_killed_and_why(
    tmp_path: Path, mlflow_tables: Path
) -> None:
    from mlflow.tracking import MlflowClient

    shutil.copy(mlflow_tables, tmp_path / "mlflow.db")
    conduct_study(make_spec(tmp_path, *PRUNED), inline=True, runner=RUNNER)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("s")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    status = {name: run.info.status for name, run in runs.items()}
    ended = ("s-dense", "s-0000", "study s")
    assert status == dict.fromkeys(ended, "FINISHED") | {"s-0001": "KILLED"}
    reason = runs["s-0001"].data.tags["comp.failure"]
    assert reason == "stopped by the median pruner at ratio 0.1"


INTERRUPTED = """
import sys
from pathlib import Path
from tests.studies.synthetic import make_spec
from studies.session import conduct_study
spec = make_spec(Path(sys.argv[1]), "n_trials=50", "tracking.enabled=false")
print(conduct_study(spec, inline=True, runner="tests.studies.synthetic:prune_slowly").why)
"""


def test_ctrl_c_stops_after_the_record_under_way_and_the_next_driver_goes_on(
    tmp_path: Path,
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    records = tmp_path / "runs" / "s-0001" / "records"
    deadline = time.monotonic() + 60
    while not records.is_dir() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "interrupted\n"), err
    spec = make_spec(tmp_path, "n_trials=3", "tracking.enabled=false")
    assert summarize(StudyFolder.of(spec)).counts["running"] == 1
    outcome = conduct_study(spec, inline=True, runner="tests.studies.synthetic:prune_slowly")
    assert outcome.counts == {"complete": 3}
