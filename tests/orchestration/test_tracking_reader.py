"""Reading a tracking server: what was sent comes back, and strangers get a sentence."""

import contextlib
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from orchestration import worker
from orchestration.store import read_run
from orchestration.tracked import TrackingError
from orchestration.tracking import MlflowTracker
from orchestration.tracking_reader import read_tracked
from studies.comparison import compare_sources
from studies.sources import find_sources
from tests.orchestration.trials import make_job


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of ours and one of somebody else in an SQLite store."""
    root = tmp_path_factory.mktemp("reader")
    uri = f"sqlite:///{root}/mlflow.db"
    tracker = MlflowTracker(uri, "ours", send_models=False)
    for number in (0, 1):
        job = make_job(root / "runs", run=f"s-000{number}")
        list(worker.run(job))
        tracker.sync(job.run_dir)
    client = MlflowClient(uri)
    other = client.create_experiment("theirs", (root / "other").as_uri())
    client.log_metric(client.create_run(other).info.run_id, "val", 1.0, step=500)
    return root


@pytest.fixture
def uri(root: Path) -> str:
    return f"sqlite:///{root}/mlflow.db"


def test_points_and_stages_come_back_as_they_were_sent(root: Path, uri: str) -> None:
    first, _ = sorted(read_tracked(uri, with_stages=True), key=lambda run: run.name)
    run = read_run(root / "runs" / "s-0000")
    assert (first.name, first.study, first.trial, first.status) == ("s-0000", "s", 0, "FINISHED")
    sent = [{**p.to_dict(), "layers": {}} for p in run.points]
    assert [p.to_dict() for p in first.points] == sent
    assert list(first.stages) == run.stages


def test_a_server_and_directories_compare_alike(root: Path, uri: str) -> None:
    local = compare_sources(find_sources([str(root)], root), [0.5], "val").to_dict()
    remote = compare_sources(find_sources([uri], root, experiments=["ours"]), [0.5], "val")
    by_run = {row["run"]: row["values"] for row in local["rows"]}
    assert {row["run"]: row["values"] for row in remote.to_dict()["rows"]} == by_run


def test_runs_without_our_tags_are_counted_and_refused(uri: str) -> None:
    with pytest.raises(ValueError, match=r"has 1 runs, but none with the tag comp\.kind=prune"):
        read_tracked(uri, ["theirs"])


def test_an_unknown_experiment_names_those_there(uri: str) -> None:
    with pytest.raises(ValueError, match=r"no experiment 'our'; did you mean 'ours'"):
        read_tracked(uri, ["our"])


def test_a_file_that_is_missing_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names no file"):
        read_tracked(f"sqlite:///{tmp_path}/no.db")
    assert list(tmp_path.iterdir()) == []


def test_another_database_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("create table birds (name text)")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is a database, but holds no MLflow runs"):
        read_tracked(f"sqlite:///{path}")
    assert path.read_bytes() == before
    path.write_text("no database at all")
    with pytest.raises(ValueError, match="cannot be read as a database"):
        read_tracked(f"sqlite:///{path}")


def test_a_store_of_another_mlflow_version_is_refused(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "older.db"
    shutil.copy(root / "mlflow.db", path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("update alembic_version set version_num = '451aebb31d03'")
        connection.commit()
    with pytest.raises(ValueError, match="was written by another version of MLflow"):
        read_tracked(f"sqlite:///{path}")


@contextlib.contextmanager
def answering(status: int, body: str) -> Iterator[str]:
    """An HTTP server that gives the same answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (404, "", r"is no MLflow tracking server \(its /version gives status 404\)"),
        (200, "<html>a bakery</html>", r"is no MLflow tracking server \(its /version is no ver"),
        (200, "1.30.0", r"runs MLflow 1\.30\.0, but this program reads 2\.x and 3\.x"),
        (200, "4.0.0rc1", r"runs MLflow 4\.0\.0rc1, but .* 3\.x; compare run directories instead"),
    ],
)
def test_a_server_that_is_no_mlflow_of_ours_is_refused(
    status: int, body: str, reason: str
) -> None:
    with answering(status, body) as url, pytest.raises(ValueError, match=reason):
        read_tracked(url)


def test_a_server_that_does_not_answer_is_a_failure() -> None:
    with pytest.raises(TrackingError, match=r"no MLflow answers at http://127\.0\.0\.1:9 "):
        read_tracked("http://127.0.0.1:9")
