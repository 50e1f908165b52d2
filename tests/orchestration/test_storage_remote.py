"""Storage and locks in an object store: a real client against a local S3 server."""

import http.server
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestration.executor import InlineExecutor
from orchestration.job import JobEnd
from orchestration.lock import LEASE, LockHeld, hold_location, hold_storage
from orchestration.storage import Storage, StorageError, _filesystem, absolute, join, parent
from orchestration.store import list_runs, read_run
from tests.object_store import ObjectStore, environment, serving
from tests.orchestration.trials import make_job, numbers


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with serving() as server:
        yield server


@pytest.fixture
def storage(store: ObjectStore, request: pytest.FixtureRequest) -> Iterator[Storage]:
    yield Storage(join(store.root, request.node.name))
    store.trust()


def fill(target: Path) -> None:
    (target / "deep").mkdir(parents=True)
    (target / "deep" / "a.bin").write_bytes(b"abc")
    (target / "manifest.json").write_text("{}")


def test_files_and_trees_are_read_back(storage: Storage) -> None:
    storage.write("sub/file", b"two")
    storage.write_tree("state/1", fill)
    assert storage.read("sub/file") == b"two"
    assert storage.names() == ["state", "sub"]
    assert storage.sizes("state") == {"state/1/deep/a.bin": 3, "state/1/manifest.json": 2}
    with storage.tree("state/1") as path:
        assert (path / "deep" / "a.bin").read_bytes() == b"abc"
    storage.remove("state")
    assert storage.names() == ["sub"]
    with pytest.raises(FileNotFoundError):
        storage.read("state/1/manifest.json")


def test_a_run_in_an_object_store_equals_one_on_a_disk(storage: Storage, tmp_path: Path) -> None:
    places = (str(tmp_path / "s-0000"), join(storage.location, "s-0000"))
    for place in places:
        with InlineExecutor() as executor:
            executor.submit(make_job(tmp_path, run_dir=place))
            assert isinstance([event.body for event in executor.events()][-1], JobEnd)
    disk, remote = (read_run(place) for place in places)
    assert remote.outcome == "finished"
    assert numbers(remote.records) == numbers(disk.records)
    assert list_runs(storage.location) == [remote.location]
    assert not storage.exists("s-0000/state")


def test_a_store_that_denies_is_named_and_what_was_written_stays(
    store: ObjectStore, storage: Storage
) -> None:
    storage.write("x", b"old")
    store.check_keys()
    with pytest.raises(StorageError) as caught:
        storage.write("x", b"new")
    assert str(caught.value).startswith(f"cannot write {storage.location}/x: the store does not")
    assert "AWS_ACCESS_KEY_ID" in str(caught.value)
    with pytest.raises(StorageError, match=f"cannot read {storage.location}/x: access is denied"):
        storage.read("x")
    store.trust()
    assert storage.read("x") == b"old"


def test_a_bucket_that_is_not_there_is_named(store: ObjectStore) -> None:
    with pytest.raises(StorageError, match=r"s3://nowhere/a.*the bucket does not exist; make it"):
        Storage("s3://nowhere/a").write("x", b"1")


class Full(http.server.BaseHTTPRequestHandler):
    """Answers as MinIO does when its disks are full."""

    protocol_version = "HTTP/1.1"

    def _refuse(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b"<Error><Code>XMinioStorageFull</Code><Message>no space</Message></Error>"
        self.send_response(507)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_POST = _refuse

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_full_store_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Full) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, value in environment(f"http://127.0.0.1:{server.server_port}").items():
            monkeypatch.setenv(name, value)
        _filesystem.cache_clear()
        try:
            with pytest.raises(StorageError, match="the store is full; free some space there and"):
                Storage("s3://bucket/full?region=us-east-1").write("x", b"1")
        finally:
            _filesystem.cache_clear()
            server.shutdown()


@pytest.mark.slow
def test_a_store_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment("http://127.0.0.1:1").items():
        monkeypatch.setenv(name, value)
    _filesystem.cache_clear()
    try:
        with pytest.raises(StorageError, match=r"s3://b-1/a.* cannot be reached; check the netw"):
            Storage("s3://b-1/a?region=us-east-1").write("x", b"1")
    finally:
        _filesystem.cache_clear()


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA:hunter2@bucket/a",
        "s3://bucket/a?secret_key=hunter2",
        "abfs://container:hunter2@me.dfs.core.windows.net/a",
        "abfs://container@me.dfs.core.windows.net/a?sas_token=hunter2",
    ],
)
def test_a_key_in_a_uri_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ValueError, match=r"must not hold a key.*AWS_SECRET_ACCESS_KEY") as caught:
        Storage(uri)
    assert "hunter2" not in str(caught.value)


def test_a_container_before_the_account_is_no_key() -> None:
    uri = "abfs://container@me.dfs.core.windows.net/a"
    assert absolute(uri) == uri
    assert Storage(uri)._inside("x") == "container/a/x"


@pytest.mark.parametrize("uri", ["s3://bucket/../other", "s3:///x", "gopher://x/y"])
def test_a_uri_that_names_no_place_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="storage"):
        absolute(uri)


def test_options_stay_behind_the_path() -> None:
    assert join("s3://b/a/?region=x", "runs", "r") == "s3://b/a/runs/r?region=x"
    assert parent("s3://b/a/runs/r?region=x", 2) == "s3://b/a?region=x"


def test_a_study_in_an_object_store_has_one_driver(storage: Storage) -> None:
    with hold_storage(storage, "s", beat=0.1):
        with pytest.raises(LockHeld) as caught, hold_location(storage.location, "s"):
            pytest.fail("two drivers")
        assert caught.value.pid == os.getpid()
    with hold_storage(storage, "s", beat=0.1):
        pass
    assert not storage.exists(LEASE)


def lease(storage: Storage, host: str, pid: int) -> None:
    values = {"token": "theirs", "host": host, "pid": pid, "beat": 7}
    storage.write(LEASE, json.dumps(values).encode())


def test_a_driver_that_died_here_or_elsewhere_is_succeeded(storage: Storage) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    for host in (os.uname().nodename, "elsewhere"):
        lease(storage, host, dead.pid)
        with hold_storage(storage, "s", beat=0.1):
            pass


def test_a_driver_elsewhere_that_shows_life_is_respected(storage: Storage) -> None:
    lease(storage, "elsewhere", 7)
    # Padded: the test server replaces an object in place, and a reader may get the old length.
    sign = b'{"token": "theirs", "beat": 8}'.ljust(400)
    beats = threading.Timer(0.1, storage.write, [LEASE, sign])
    beats.start()
    with (
        pytest.raises(LockHeld, match="process 7 on elsewhere"),
        hold_storage(storage, "s", beat=0.2),
    ):
        pytest.fail("two drivers")
    beats.join()
