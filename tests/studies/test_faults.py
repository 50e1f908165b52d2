"""Whole studies with real accidents: drivers killed, refused and watched; disks full; NaN."""

import contextlib
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestration.job import Record
from orchestration.store import Run, read_run
from studies.session import conduct_study
from studies.specfile import write_spec
from studies.summary import StudySummary
from tests.orchestration.troubled_trials import OVERRIDES, RUNNER, trouble
from tests.studies.drivers import ROOT, num_records, start, summary_of, wait_until
from tests.studies.synthetic import make_spec

pytestmark = pytest.mark.chaos

SPACE = "space={exploration: {kind: categorical, choices: [0.1, 0.3]}}"


def write_study(root: Path, *overrides: str) -> str:
    path = root / "study.yaml"
    path.write_text(write_spec(make_spec(root, *overrides)))
    return str(path)


def statuses(database: Path) -> dict[str, list[str]]:
    """Status of every MLflow run by its name."""
    with contextlib.closing(sqlite3.connect(database, timeout=30)) as connection:
        found: dict[str, list[str]] = {}
        for name, status in connection.execute("select name, status from runs"):
            found.setdefault(name, []).append(status)
    return found


def histories(database: Path, run: str) -> list[tuple[int, float]]:
    """Steps and values of a run's validation accuracy, in the order in which MLflow shows them."""
    query = (
        "select step, value from metrics join runs using (run_uuid) "
        "where name = ? and key = 'val' order by timestamp, step"
    )
    with contextlib.closing(sqlite3.connect(database, timeout=30)) as connection:
        return list(connection.execute(query, (run,)))


@dataclass
class Story:
    """What was seen of a study whose driver was killed while MLflow did not answer."""

    pid: int
    refused: int
    refusal: str
    watched: str
    told_before: set[int]
    records_before: dict[str, tuple[Record, ...]]
    mlflow_before: dict[str, list[str]]
    resumed: int
    summary: StudySummary
    runs: dict[str, Run]
    mlflow: dict[str, list[str]]
    histories: dict[str, list[tuple[int, float]]]


def records_of(root: Path) -> dict[str, tuple[Record, ...]]:
    found = {}
    for path in (root / "runs").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[path.name] = read_run(path).records
    return found


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, mlflow_tables: Path) -> Story:
    root = tmp_path_factory.mktemp("story")
    database = root / "mlflow.db"
    shutil.copy(mlflow_tables, database)
    holds = [root / "runs" / f"hold-s-000{number}" for number in (1, 2)]
    for hold in holds:
        hold.parent.mkdir(exist_ok=True)
        hold.touch()
    runner, where = "tests.studies.synthetic:prune_held", ("--root", str(root))
    words = ("study", "run", write_study(root, "n_trials=4"), "--inline")
    driver = start(runner, *words, log=root / "1.log")
    try:
        wait_until(lambda: statuses(database).get("s-0001") == ["RUNNING"], 180, "an MLflow run")
        second = start(runner, "study", "resume", "s", *where, log=root / "2.log")
        refused = second.wait(timeout=180)
        watcher = start(runner, "study", "watch", "s", *where, log=root / "3.log")
        wait_until(lambda: "trial 1" in (root / "3.log").read_text(), 180, "a watch")
        with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as held:
            held.execute("begin immediate")  # MLflow's database takes nothing from now on
            holds[0].unlink()
            wait_until(
                lambda: summary_of(root).counts.get("complete", 0) >= 2, 180, "trial 1 told"
            )
            wait_until(lambda: num_records(root / "runs" / "s-0002") == 3, 180, "trial 2 at work")
            driver.kill()
            driver.wait()
            held.execute("rollback")
        holds[1].unlink()
        told = {t.number for t in summary_of(root).trials if t.state == "complete"}
        watcher.wait(timeout=180)
        before, mlflow_before = records_of(root), statuses(database)
        resume = start(runner, "study", "resume", "s", "--inline", *where, log=root / "4.log")
        resumed = resume.wait(timeout=300)
    finally:
        driver.kill()
    runs = {path.name: read_run(path) for path in (root / "runs").iterdir()}
    return Story(
        pid=driver.pid,
        refused=refused,
        refusal=(root / "2.log").read_text(),
        watched=(root / "3.log").read_text(),
        told_before=told,
        records_before=before,
        mlflow_before=mlflow_before,
        resumed=resumed,
        summary=summary_of(root),
        runs=runs,
        mlflow=statuses(database),
        histories={name: histories(database, name) for name in runs},
    )


def test_a_second_driver_is_refused_with_the_owners_host_and_pid(story: Story) -> None:
    assert story.refused == 3
    assert f"is being run by process {story.pid} on {socket.gethostname()}" in story.refusal
    assert "comp study watch s --root" in story.refusal


def test_whoever_was_refused_can_watch_until_the_driver_ends(story: Story) -> None:
    assert f"driver: process {story.pid} on {socket.gethostname()}" in story.watched
    assert "trial 1 complete" in story.watched
    assert story.watched.endswith("no driver is at work; 'comp study resume s' goes on\n")


def test_after_a_killed_driver_no_trial_is_lost_or_left_running(story: Story) -> None:
    assert story.told_before == {0, 1}
    assert story.resumed == 0
    assert [(t.number, t.state) for t in story.summary.trials] == [
        (number, "complete") for number in range(4)
    ]


def test_after_a_killed_driver_no_record_is_computed_again(story: Story) -> None:
    assert len(story.records_before["s-0002"]) == 3
    for name, records in story.records_before.items():
        assert story.runs[name].records[: len(records)] == records


def test_mlflow_runs_of_told_trials_are_ended_by_the_next_driver(story: Story) -> None:
    assert story.mlflow_before["s-0001"] == ["RUNNING"]  # its trial was told before the kill
    names = ["s-0000", "s-0001", "s-0002", "s-0003", "s-dense"]
    assert story.mlflow == {name: ["FINISHED"] for name in [*names, "study s"]}


def test_what_mlflow_missed_is_there_once_and_in_order(story: Story) -> None:
    for name, run in story.runs.items():
        expected = [(round(1000 * point.ratio_asked), point.val) for point in run.points]
        assert story.histories[name] == expected


FULL = """
import subprocess, sys
from pathlib import Path
from orchestration.storage import StorageError
from orchestration.store import read_run
from studies.driver import StudyFailed
from studies.session import conduct_study
from tests.studies.synthetic import make_spec

disk = Path(sys.argv[1])
def mount(*options):
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(disk)], check=True)

def attempt():
    spec = make_spec(disk, "n_trials=2", "tracking.enabled=false")
    try:
        outcome = conduct_study(spec, inline=True, runner="tests.studies.synthetic:prune_heavily")
        print(outcome.counts)
    except (StudyFailed, StorageError) as error:
        print(f"{type(error).__name__}: {error}")

mount("-o", "size=3m")
attempt()
kept = read_run(disk / "runs" / "s-0001").records
print(read_run(disk / "runs" / "s-0000").outcome, len(kept))
mount("-o", "remount,ro")
attempt()
mount("-o", "remount,rw,size=64m")
attempt()
print(read_run(disk / "runs" / "s-0001").records[: len(kept)] == kept)
"""


def test_a_full_disk_and_a_read_only_one_are_named_and_cost_nothing_that_is_finished(
    tmp_path: Path,
) -> None:
    unshare = ["unshare", "--map-root-user", "--mount"]
    trial = [*unshare, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run(trial, check=False).returncode:
        pytest.skip("this system lets nobody mount a small disk of his own")
    done = subprocess.run(
        [*unshare, sys.executable, "-c", FULL, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    full, kept, read_only, after, same = done.stdout.splitlines()
    assert full.startswith(f"StudyFailed: run s-0001: cannot write {tmp_path}/runs/s-0001/")
    assert "no space left on device; free some space there and give the same command" in full
    assert kept.startswith("finished ")
    assert int(kept.split()[1]) >= 1
    assert read_only.startswith(f"StorageError: cannot write {tmp_path}/studies/s")
    assert "read-only file system; choose a directory that can be written" in read_only
    assert (after, same) == ("{'complete': 2}", "True"), done.stderr


def test_nan_fails_its_trial_with_the_stage_and_the_study_goes_on(tmp_path: Path) -> None:
    trouble(tmp_path / "runs", "s-0001", "nan 5")  # the second of the second stage's three steps
    spec = make_spec(tmp_path, "n_trials=3", "tracking.enabled=false", *OVERRIDES, SPACE)
    conduct_study(spec, inline=True, runner=RUNNER)
    trials = summary_of(tmp_path).trials
    assert [trial.state for trial in trials] == ["complete", "fail", "complete"]
    assert trials[1].reason.startswith("run s-0001: the training loss became nan in stage 2, step")
    assert "the state after stage 1 is intact" in trials[1].reason
    assert len(read_run(tmp_path / "runs" / "s-0001").stages) == 1
