"""Storage: all or nothing, on a disk and behind pyarrow's file systems, and what it says."""

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs

from orchestration.storage import Storage, StorageError


@pytest.fixture(params=["disk", "uri", "object store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "disk":
        return Storage(tmp_path / "root")
    if request.param == "uri":
        return Storage(f"file://{tmp_path}/root")
    return Storage("mock://root", fs._MockFileSystem(), "root")


def fill(target: Path) -> None:
    (target / "deep").mkdir(parents=True)
    (target / "deep" / "a.bin").write_bytes(b"abc")
    (target / "manifest.json").write_text("{}")


def test_files_are_read_back(storage: Storage) -> None:
    storage.write("sub/file", b"one")
    storage.write("sub/file", b"two")
    assert storage.read("sub/file") == b"two"
    assert storage.names("sub") == ["file"]
    assert storage.exists("sub/file")
    assert not storage.exists("sub/other")


def test_trees_are_read_back(storage: Storage) -> None:
    storage.write_tree("state/1", fill)
    with storage.tree("state/1") as path:
        assert (path / "deep" / "a.bin").read_bytes() == b"abc"
    assert storage.sizes("state") == {"state/1/deep/a.bin": 3, "state/1/manifest.json": 2}


def test_a_tree_replaces_the_one_before(storage: Storage) -> None:
    storage.write_tree("t", fill)
    storage.write_tree("t", fill)
    assert storage.names("t") == ["deep", "manifest.json"]


def test_removing_what_is_not_there_is_fine(storage: Storage) -> None:
    storage.write_tree("t", fill)
    for name in ("t", "t", "never"):
        storage.remove(name)
    assert storage.names() == []


def test_a_child_is_a_directory_inside(storage: Storage) -> None:
    storage.child("runs").write("x", b"1")
    assert storage.read("runs/x") == b"1"
    assert storage.child("runs").location.endswith("root/runs")


def test_missing_things_are_file_not_found(storage: Storage) -> None:
    storage.write("x", b"")
    with pytest.raises(FileNotFoundError):
        storage.read("y")
    with pytest.raises(FileNotFoundError), storage.tree("z") as path:
        pytest.fail(f"{path} cannot be there")


def test_a_tree_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    def break_off(target: Path) -> None:
        fill(target)
        raise KeyboardInterrupt

    storage = Storage(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        storage.write_tree("t", break_off)
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def small_files_only() -> Iterator[None]:
    """No fixture: pytest's own output may go to a file, which is then too large as well."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_does_not_fit_is_named_and_leaves_the_old_one(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.write("x", b"old")
    with (
        pytest.raises(StorageError, match=f"cannot write {tmp_path}/x: file too large"),
        small_files_only(),
    ):
        storage.write("x", b"0" * 10_000)
    assert storage.read("x") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@contextlib.contextmanager
def somebody_else() -> Iterator[None]:
    """Gives up root's right to write everywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    refused = "permission denied; choose a directory that can be"
    with pytest.raises(StorageError, match=refused), somebody_else():
        Storage(tmp_path).write("runs/x", b"1")


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(StorageError, match="runs/x: file exists; move the file"):
        Storage(tmp_path).write("runs/x", b"1")


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="but got 'gopher://x/y'"):
        Storage("gopher://x/y")
