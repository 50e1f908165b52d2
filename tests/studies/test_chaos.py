"""Studies of real prunings on several nodes, while nodes, workers, drivers and MLflow fall."""

import contextlib
import dataclasses
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from orchestration import worker
from orchestration.cluster import _on_loopback
from orchestration.job import JobEnd, Record
from orchestration.store import Run, list_runs, read_run
from studies.specfile import write_spec
from tests.mlflow_server import Server
from tests.orchestration.tiny_trials import facts
from tests.orchestration.troubled_trials import OVERRIDES, RUNNER
from tests.studies.drivers import ROOT, start, summary_of, wait_until
from tests.studies.synthetic import make_spec

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.slow]

SPACE = (
    "space={exploration: {kind: categorical, choices: [0.1, 0.3]}, "
    "num_stages: {kind: categorical, choices: [3, 4]}}"
)


class Nodes:
    """A head that offers no CPUs, and nodes of one CPU each, all on this machine."""

    def __init__(self) -> None:
        with _on_loopback(True):
            self._cluster = Cluster(
                initialize_head=True,
                head_node_args={"num_cpus": 0, "include_dashboard": False},
            )
        self.address = str(self._cluster.address)

    def add(self) -> Any:
        with _on_loopback(True):
            return self._cluster.add_node(num_cpus=1, include_dashboard=False)

    def kill(self, node: Any) -> None:
        """Ends a node's raylet as a power cut would; its workers go with it."""
        self._cluster.remove_node(node, allow_graceful=False)

    @property
    def alive(self) -> list[Any]:
        return list(self._cluster.worker_nodes)

    def kill_head(self) -> None:
        self._cluster.head_node.kill_gcs_server()

    def end(self) -> None:
        self._cluster.shutdown()


def workers_of(node: Any) -> list[psutil.Process]:
    """The processes on a node that are pruning."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(node.all_processes["raylet"][0].process.pid).children(
            recursive=True
        ):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "PrunerActor.run" in " ".join(process.cmdline()):
                    found.append(process)
    return found


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    cluster = Nodes()
    for _ in range(2):
        cluster.add()
    yield cluster
    cluster.end()


def write_study(root: Path, *overrides: str) -> str:
    path = root / "study.yaml"
    path.write_text(write_spec(make_spec(root, *OVERRIDES, SPACE, *overrides)))
    return str(path)


def records_on_disk(root: Path) -> int:
    return len(list((root / "runs").glob("*/records/*.json"))) + 10 * len(
        list((root / "runs").glob("*/manifest.json"))
    )


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> "Calm":
    return Calm(tmp_path_factory.mktemp("calm"))


class Calm:
    """Undisturbed runs in this process, one for each of a study's configs."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[str, Run] = {}

    def numbers(self, run: Run) -> list[dict[str, object]]:
        """What the stages and points of a run must be."""
        key = run.job.content_id
        if key not in self._known:
            place = str(self._directory / key)
            job = dataclasses.replace(run.job, run_dir=place, fine_tune="inline")
            *_, end = worker.run(job)
            assert isinstance(end, JobEnd), end
            self._known[key] = read_run(job.run_dir)
        return numbers_of(self._known[key])


def numbers_of(run: Run) -> list[dict[str, object]]:
    """Stages, then points by ratio: fine-tunes that are jobs of their own end in any order."""

    def place(record: Record) -> float:
        return record.point.ratio_asked if record.point else -1.0

    return facts(tuple(sorted(run.records, key=place)))


def runs_under(root: Path) -> list[Run]:
    """All runs of a study, without those whose directory is being made at this moment."""
    found = []
    for location in list_runs(root / "runs"):
        with contextlib.suppress(FileNotFoundError):
            found.append(read_run(location))
    return found


def check_all(root: Path, num_trials: int, calm: Calm) -> list[Run]:
    """Every trial is complete, has one finished run, and the calm run's numbers."""
    trials = summary_of(root).trials
    assert [(t.number, t.state) for t in trials] == [(n, "complete") for n in range(num_trials)]
    runs = runs_under(root)
    names = [f"s-{number:04d}" for number in range(num_trials)]
    assert [run.job.run_id for run in runs] == [*names, "s-dense"]
    for run, trial in zip(runs, trials, strict=False):
        assert trial.runs == (run.job.run_id,)
        assert numbers_of(run) == calm.numbers(run)
        assert trial.value == max(run.points, key=lambda point: point.ratio_asked).val
    return runs


NO_RECORD = "it gave no record for 30 s"


class Monkey:
    """Strikes one thing after the other, each time that the study has got a little further."""

    def __init__(self, root: Path, nodes: Nodes, server: Server) -> None:
        self.root, self.nodes, self.server = root, nodes, server
        self.log = root / "log"
        self.struck: list[str] = []
        self.kept: dict[str, tuple[Record, ...]] = {}
        self.driver = self._start("run", str(root / "study.yaml"))

    def _start(self, *words: str) -> "subprocess.Popen[bytes]":
        address = {"RAY_ADDRESS": self.nodes.address}
        return start(RUNNER, "study", *words, "--root", str(self.root), log=self.log, **address)

    def _signal_worker(self, number: int) -> bool:
        for node in self.nodes.alive:
            for process in workers_of(node):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
                    return True
        return False

    def stop_worker(self) -> bool:
        return self._signal_worker(signal.SIGSTOP)

    def kill_worker(self) -> bool:
        return self._signal_worker(signal.SIGKILL)

    def preempt_worker(self) -> bool:
        return self._signal_worker(signal.SIGTERM)

    def kill_node(self) -> bool:
        self.nodes.kill(self.nodes.alive[0])
        self.nodes.add()
        return True

    def kill_driver(self) -> bool:
        self.driver.kill()
        self.driver.wait()
        self.driver = self._start("resume", "s")
        return True

    def hang_mlflow(self) -> bool:
        self.server.send(signal.SIGSTOP)
        return True

    def wake_mlflow(self) -> bool:
        self.server.send(signal.SIGCONT)
        return True

    def end_mlflow(self) -> bool:
        self.server.end()
        return True

    def begin_mlflow(self) -> bool:
        self.server.begin()
        return True

    @property
    def mlflow_is_away(self) -> bool:
        done = [name for name in self.struck if name.endswith("mlflow")]
        return done[-1:] in (["hang_mlflow"], ["end_mlflow"])

    def _may_strike(self) -> bool:
        """A stopped worker is left to the time limit: another strike might end it first."""
        return self.struck[-1:] != ["stop_worker"] or NO_RECORD in self.log.read_text()

    def rage(self, seconds: float) -> None:
        """Strikes until the driver has ended by itself."""
        strikes = cycle(
            (
                self.kill_worker,
                self.hang_mlflow,
                self.kill_driver,
                self.wake_mlflow,
                self.preempt_worker,
                self.end_mlflow,
                self.kill_node,
                self.begin_mlflow,
                self.stop_worker,  # last: until the time limit the other slot goes on alone
            )
        )
        strike, seen = next(strikes), records_on_disk(self.root)
        deadline = time.monotonic() + seconds
        while self.driver.poll() is None:
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.2)
            if records_on_disk(self.root) >= seen + 10 and self._may_strike() and strike():
                self.struck.append(strike.__name__)
                self.kept |= {run.job.run_id: run.records for run in runs_under(self.root)}
                strike, seen = next(strikes), records_on_disk(self.root)


def test_a_study_under_constant_fire_ends_as_a_calm_one(
    nodes: Nodes, calm: Calm, tmp_path: Path, mlflow_tables: Path
) -> None:
    shutil.copy(mlflow_tables, tmp_path / "server.db")
    with Server(tmp_path) as server:
        write_study(
            tmp_path,
            "n_trials=12",
            "stage_timeout_minutes=0.5",
            "sampler.startup_trials=12",
            f"tracking.uri={server.url}",
        )
        monkey = Monkey(tmp_path, nodes, server)
        try:
            monkey.rage(500)
        finally:
            monkey.driver.kill()
        text = monkey.log.read_text()
        assert monkey.driver.returncode == 0, text[-3000:]
        assert len(set(monkey.struck)) == 9, monkey.struck
        assert NO_RECORD in text
        assert "its machine is being taken away" in text
        assert "retrying (1/5) after its last stage; lost process" in text
        runs = check_all(tmp_path, 12, calm)
        for run in runs:
            kept = monkey.kept.get(run.job.run_id, ())
            assert run.records[: len(kept)] == kept  # with their times: none was computed again
        if monkey.mlflow_is_away:
            server.end()
            server.begin()
        server.wait()
        sync = start(RUNNER, "study", "sync", "s", "--root", str(tmp_path), log=monkey.log)
        assert sync.wait(timeout=300) == 0, monkey.log.read_text()[-3000:]
    check_mlflow(tmp_path / "server.db", runs)


def check_mlflow(database: Path, runs: list[Run]) -> None:
    """Every run is there once, ended, and with every stage and point once."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        found = connection.execute("select name, status from runs").fetchall()
        mine = sorted(row for row in found if row[0] != "study s")
        assert mine == [(run.job.run_id, "FINISHED") for run in runs]
        query = (
            "select key, count(*) from metrics join runs using (run_uuid) "
            "where name = ? and key in ('val', 'stage/val') group by key"
        )
        for run in runs:
            counts = dict(connection.execute(query, (run.job.run_id,)))
            assert counts.get("val") == len(run.points)
            assert counts.get("stage/val", 0) == len(run.stages)


STUCK = """
import sys, time
from orchestration.cluster import HeadWatch, connect
with connect():
    watch = HeadWatch(patience=1.0)
    print("watching", flush=True)
    time.sleep(300)
"""


def test_a_driver_whose_cluster_loses_its_head_says_so_and_the_same_command_goes_on(
    nodes: Nodes, calm: Calm, tmp_path: Path
) -> None:
    """The last test of this file: it takes the cluster with it."""
    spec = write_study(tmp_path, "n_trials=2", "parallel=1", "tracking.enabled=false")
    log, stuck_log = tmp_path / "log", tmp_path / "stuck"
    driver = start(RUNNER, "study", "run", spec, log=log, RAY_ADDRESS=nodes.address)
    with stuck_log.open("wb") as stream:
        stuck = subprocess.Popen(
            [sys.executable, "-c", STUCK],
            env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": nodes.address},
            stdout=stream,
            stderr=stream,
        )
    try:
        wait_until(lambda: "watching" in stuck_log.read_text(), 240, "a watch")
        wait_until(lambda: list(tmp_path.glob("runs/s-000*/records/00001.json")), 240, "a stage")
        nodes.kill_head()
        assert driver.wait(timeout=180) == 1
        assert stuck.wait(timeout=180) == 1  # its main thread never came to ask
    finally:
        driver.kill()
        stuck.kill()
    sentence = f"comp: the head node of the Ray cluster at {nodes.address} is gone; start it again"
    for text in (log.read_text(), stuck_log.read_text()):
        assert sentence in text
        assert "Traceback" not in text
    before = sum(len(run.records) for run in runs_under(tmp_path))
    assert before >= 3
    again = start(RUNNER, "study", "run", spec, "--inline", log=log)
    assert again.wait(timeout=300) == 0, log.read_text()
    check_all(tmp_path, 2, calm)
