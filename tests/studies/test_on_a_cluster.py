"""A head of ``comp cluster up``: who reaches it, studies on it, what they give away, its end."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestration.cluster import ClusterError
from orchestration.clusters.local import (
    AGENT_PORT,
    LOOPBACK,
    MARK,
    Running,
    _processes,
    find,
    start,
    stop,
)
from orchestration.ray_jobs import RayJobs
from orchestration.store import read_run
from studies.cli_cluster import exposed
from studies.errors import SpecError
from studies.specfile import load_study_for
from tests.studies.drivers import listen_to_ctrl_c

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SECRETS = {
    "MLFLOW_TRACKING_TOKEN": "planted-tracking-token",
    "MLFLOW_TRACKING_PASSWORD": "planted-tracking-password",
    "AWS_SECRET_ACCESS_KEY": "planted-storage-key",
    "HF_TOKEN": "planted-hub-token",
    "PGPASSWORD": "planted-database-password",
}
SMALL = (
    "name=jobbed",
    "n_trials=1",
    "parallel=1",
    "pruning.ratios=[0.1]",
    "objective={val_at: 0.1}",
    "pruning.eval_samples=8",
    "pruning.test_samples=8",
    "pruning.calibration_samples=8",
    "pruning.probe_samples=8",
    "pruning.steps_per_stage=1",
    "pruning.fine_tune_steps=1",
)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Plants the secrets into the environment that the cluster gets, and notes it elsewhere."""
    directory = tmp_path_factory.mktemp("state")
    changes = {**SECRETS, "COMP_STATE": str(directory), "PYTHONPATH": str(ROOT)}
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    yield directory
    for name, value in before.items():
        if value is None:
            os.environ.pop(name)
        else:
            os.environ[name] = value


@pytest.fixture(scope="module")
def head(state: Path) -> Iterator[Running]:
    """A cluster beside another Ray, which has the usual port of the agent that starts jobs."""
    with socket.socket() as other:
        with contextlib.suppress(OSError):  # another Ray has it really
            other.bind((LOOPBACK, AGENT_PORT))
            other.listen()
        running = start("test", num_cpus=2, num_gpus=0)
        yield running
    if find("test"):
        stop("test")


def comp(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "studies.cli", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def open_ports(running: Running) -> set[str]:
    """The addresses that processes of a cluster listen on."""
    found = set()
    for process in _processes(running):
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add(connection.laddr.ip.removeprefix("::ffff:"))
    return found


def wait_for_workers(running: Running) -> None:
    done = comp("cluster", "status", "--name", running.name, "--wait-nodes", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["total"]["CPU"] == 2


def files_with(secret: bytes, *places: Path) -> list[Path]:
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    assert len(files) > 20
    return [path for path in files if secret in path.read_bytes()]


def test_nobody_outside_this_machine_reaches_any_port_of_the_cluster(head: Running) -> None:
    wait_for_workers(head)
    assert open_ports(head) == {"127.0.0.1"}
    assert Path(head.scratch).stat().st_mode & 0o077 == 0


def test_a_study_submitted_as_a_job_gives_no_secret_away(head: Running, tmp_path: Path) -> None:
    changes = [word for change in SMALL for word in ("--set", change)]
    words = ["smoke", "--root", str(tmp_path), "--inline", "--json", *changes]
    done = comp("study", "run", *words, "--address", head.dashboard_url)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["counts"] == {"complete": 1}
    assert read_run(tmp_path / "runs" / "jobbed-0000").outcome == "finished"
    assert (tmp_path / "mlflow.db").is_file()

    jobs = RayJobs(head.dashboard_url)
    job = jobs.find("jobbed")
    assert job is not None
    assert (job.status, job.exit_code) == ("SUCCEEDED", 0)
    shown: list[Any] = [done.stdout, done.stderr, jobs._client.list_jobs()]
    for secret in SECRETS.values():
        assert secret not in str(shown)
        assert files_with(secret.encode(), tmp_path, Path(head.scratch)) == []


def test_a_loopback_address_that_is_a_tunnel_is_not_taken_for_this_machine(
    head: Running,
) -> None:
    spec = load_study_for(head.dashboard_url, "smoke", ())
    assert spec.root == str(Path("comp-runs").absolute())
    with pytest.raises(SpecError, match="root must be a URI or an absolute path that the machi"):
        load_study_for("http://127.0.0.1:1", "smoke", ())


def test_an_ended_job_is_found_and_its_output_shown_again(head: Running) -> None:
    done = comp("study", "attach", "jobbed", "--address", head.dashboard_url)
    assert done.returncode == 0, done.stderr
    assert "trial 0" in done.stdout


ON_IT = """
import sys
from pathlib import Path
from studies.session import conduct_study
from tests.studies.synthetic import make_spec
spec = make_spec(Path(sys.argv[1]), "n_trials=2", "parallel=2", "tracking.enabled=false")
print(conduct_study(spec, runner="tests.studies.test_on_a_cluster:prune_here").counts)
"""


def prune_here(job: Any, directory: Any) -> Iterator[Any]:
    """Notes in whose cluster it runs, and whether the secrets came along."""
    from tests.studies.synthetic import prune

    place = Path(job.run_dir) / "seen.json"
    came = all(os.environ.get(name) == value for name, value in SECRETS.items())
    place.write_text(json.dumps({"mark": os.environ.get(MARK), "secrets": came}))
    yield from prune(job, directory)


def test_the_cluster_that_ray_address_names_does_the_work_and_stays(
    head: Running, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ON_IT, str(tmp_path)],
        env={**os.environ, **head.environment()},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "{'complete': 2}\n", done.stderr
    for run in ("s-dense", "s-0000", "s-0001"):
        seen = json.loads((tmp_path / "runs" / run / "seen.json").read_text())
        assert seen == {"mark": head.mark, "secrets": True}
    assert find("test") == head


def test_ctrl_c_detaches_and_a_second_one_stops_the_job(head: Running, tmp_path: Path) -> None:
    jobs = RayJobs(head.dashboard_url)
    long = [word for c in (*SMALL, "name=long", "n_trials=500") for word in ("--set", c)]
    words = ["study", "run", "smoke", "--root", str(tmp_path), "--inline", *long]
    words += ["--set", "tracking.enabled=false", "--address", head.dashboard_url]
    process = subprocess.Popen(
        [sys.executable, "-m", "studies.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listen_to_ctrl_c,
    )
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    assert process.stdout is not None
    assert process.stderr is not None
    for line in process.stdout:
        if "Running entrypoint" in line:
            break
    second = comp(*words)
    assert second.returncode == 3
    assert "is being run by job comp-long-" in second.stderr
    process.send_signal(2)
    for line in process.stderr:
        if "press Ctrl-C again" in line:
            break
    state = jobs.find("long")
    assert state is not None
    assert state.status == "RUNNING"
    process.send_signal(2)
    assert process.wait(timeout=30) == 130
    watchdog.cancel()
    deadline = time.monotonic() + 30
    while not jobs.state(state.job).has_ended and time.monotonic() < deadline:
        time.sleep(0.1)
    assert jobs.state(state.job).status == "STOPPED"


def test_a_taken_port_and_a_taken_name_are_refused(head: Running) -> None:
    with pytest.raises(ValueError, match=f"port {head.gcs} is in use by another program"):
        start("another", port=head.gcs)
    done = comp("cluster", "up", "--name", "test")
    assert (done.returncode, "runs already at" in done.stderr) == (1, True)


def test_the_end_ends_what_was_started_and_nothing_else(head: Running) -> None:
    def sleeper(**environment: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            ["sleep", "300"], env={**os.environ, **environment}, start_new_session=True
        )

    stranger, other, orphan = sleeper(), sleeper(**{MARK: "other"}), sleeper(**{MARK: head.mark})
    try:
        done = comp("cluster", "down", "--name", "test")
        assert done.returncode == 0, done.stderr
        assert orphan.wait(timeout=10) != 0
        assert stranger.poll() is None
        assert other.poll() is None
    finally:
        for process in (stranger, other, orphan):
            process.kill()
            process.wait()
    assert not psutil.pid_exists(head.pid) or _processes(head) == []
    assert not Path(head.scratch).exists()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", head.gcs)) != 0
    done = comp("cluster", "status", "--name", "test", "--json")
    assert json.loads(done.stdout) == {"running": False}


def test_a_cluster_open_to_others_warns_and_asks_for_a_token(state: Path) -> None:
    words = ["up", "--name", "open", "--bind", "0.0.0.0", "--num-cpus", "2", "--json"]
    done = comp("cluster", *words)
    try:
        assert done.returncode == 0, done.stderr
        assert "open to other machines" in done.stderr
        values = json.loads(done.stdout)
        assert values["auth"] == "token"
        token = Path(values["token_file"])
        assert token.stat().st_mode & 0o077 == 0
        with pytest.raises(ClusterError, match="asks for a token; set RAY_AUTH_MODE=token"):
            RayJobs(values["dashboard"])
        running = find("open")
        assert running is not None
        wait_for_workers(running)
        for token_of_theirs in ("", "wrong"):
            words = ["cluster", "status", "--address", running.address]
            refused = comp(*words, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token_of_theirs)
            assert refused.returncode == 1
            assert f"at {running.address} asks for a token" in refused.stderr
        assert files_with(token.read_bytes(), Path(running.scratch)) == []
    finally:
        comp("cluster", "down", "--name", "open")
    assert not token.exists()


def test_the_warning_names_the_danger_and_the_remedy() -> None:
    text = exposed("10.0.0.1", 8265, "disabled")
    assert "10.0.0.1:8265" in text
    assert "They ask for no token" in text
    assert "SSH tunnel" in text
