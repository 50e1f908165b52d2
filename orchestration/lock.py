"""One driver per study: a lock on the study's directory that ends with its holder's process.

On a local disk the kernel keeps it. In an object store it is a file that its holder writes anew
every few seconds; it is free once it has not changed for a while. Two drivers that start within
the same second on a store that is slow to agree with itself could both believe to be alone; then
the runs keep them apart, because every run directory has one owner (``store.Fenced``).
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestration.storage import Storage, StorageError, explaining

LOCK, LEASE = "driver.lock", "driver.json"
BEAT_SECONDS = 10.0  # between two signs of life in an object store
SILENT_BEATS = 4  # after so many without one the holder counts as dead

_log = logging.getLogger(__name__)


class LockHeld(RuntimeError):
    """Another driver runs the study.

    Attributes:
        study: The study.
        host: Where its driver runs.
        pid: The driver's process id there.
    """

    def __init__(self, study: str, host: str, pid: int) -> None:
        super().__init__(study, host, pid)
        self.study, self.host, self.pid = study, host, pid

    def __str__(self) -> str:
        return (
            f"study {self.study!r} is being run by process {self.pid} on {self.host}; wait for it "
            "or stop it there"
        )


@contextlib.contextmanager
def hold_location(location: str, study: str) -> Iterator[None]:
    """Keeps other drivers off a directory, on a local disk or behind a URI.

    Raises:
        LockHeld: If another process has it.
        StorageError: If the store cannot be written.
    """
    storage = Storage(location)
    with (
        hold_storage(storage, study)
        if storage.local is None
        else hold_directory(storage.local, study)
    ):
        yield


@contextlib.contextmanager
def hold_directory(directory: Path, study: str) -> Iterator[None]:
    """Keeps other drivers on the same file system off a study directory.

    The kernel drops the lock when the process ends, however it ends, so nothing goes stale.

    Args:
        directory: The study's directory; created if need be.
        study: Its name, for the message.

    Raises:
        LockHeld: If another process, or this one, holds it already.
        StorageError: If the disk is full, read-only or otherwise unwilling.
    """
    with explaining(directory):
        directory.mkdir(parents=True, exist_ok=True)
        opened = (directory / LOCK).open("a+")
    with opened as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            owner = json.loads(stream.read() or "{}")
            raise LockHeld(study, owner.get("host", "this host"), owner.get("pid", 0)) from None
        with explaining(directory):
            stream.truncate(0)
            stream.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
            stream.flush()
        try:
            yield
        finally:
            stream.truncate(0)  # see ``owner_of``


@contextlib.contextmanager
def hold_storage(storage: Storage, study: str, *, beat: float = BEAT_SECONDS) -> Iterator[None]:
    """Keeps other drivers off a directory in an object store.

    Args:
        storage: The study's directory.
        study: Its name, for the message.
        beat: Seconds between two signs of life.

    Raises:
        LockHeld: If another process shows signs of life there.
        StorageError: If the store cannot be written.
    """
    _wait_for_death(storage, study, beat)
    lease = {"token": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
    storage.write(LEASE, json.dumps({**lease, "beat": 0}).encode())
    time.sleep(min(1.0, beat / 4))  # another that saw the same silence has written by now
    holder = _holder(storage)
    if holder.get("token") != lease["token"]:
        raise LockHeld(study, holder.get("host", "another host"), holder.get("pid", 0))
    done = threading.Event()

    def keep_alive() -> None:
        number = 0
        while not done.wait(beat):
            number += 1
            try:
                if _holder(storage).get("token") != lease["token"]:
                    _log.warning("another driver has taken %s over", storage.location)
                    return
                storage.write(LEASE, json.dumps({**lease, "beat": number}).encode())
            except StorageError as error:
                _log.warning("no sign of life could be left: %s", error)

    thread = threading.Thread(target=keep_alive, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(StorageError):
            if _holder(storage).get("token") == lease["token"]:
                storage.remove(LEASE)


def _wait_for_death(storage: Storage, study: str, beat: float) -> None:
    """Returns once nobody holds the directory; watching takes as long as a few beats."""
    seen = _holder(storage)
    if not seen or (seen.get("host") == socket.gethostname() and not is_alive(seen["pid"])):
        return
    if seen.get("host") != socket.gethostname():
        seconds = SILENT_BEATS * beat
        _log.warning("waiting up to %.0f s to see whether %s is at work", seconds, seen["host"])
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(beat / 4)
            now = _holder(storage)
            if now != seen:
                break
        else:
            return
        if not now:
            return
    raise LockHeld(study, seen.get("host", "another host"), seen.get("pid", 0))


def owner_of(location: str) -> tuple[str, int] | None:
    """Returns host and process id of a study's driver, without disturbing it.

    A driver on another host counts as alive: from here nobody can tell.

    Args:
        location: The study's directory.

    Returns:
        ``None`` if no driver runs the study.
    """
    storage = Storage(location)
    name = LEASE if storage.local is None else LOCK
    try:
        seen = json.loads(storage.read(name) or b"{}")
    except (FileNotFoundError, ValueError):  # being written
        seen = {}
    if not seen or (seen["host"] == socket.gethostname() and not is_alive(seen["pid"])):
        return None
    return seen["host"], seen["pid"]


def is_alive(pid: int) -> bool:
    """Tells whether a process of this host runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _holder(storage: Storage) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(storage.read(LEASE))
    except FileNotFoundError:
        return {}
    return values
