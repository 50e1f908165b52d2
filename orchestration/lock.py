"""One driver per study: a lock on the study's directory that ends with its holder's process."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path


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
def hold_directory(directory: Path, study: str) -> Iterator[None]:
    """Keeps other drivers on the same file system off a study directory.

    The kernel drops the lock when the process ends, however it ends, so nothing goes stale.

    Args:
        directory: The study's directory; created if need be.
        study: Its name, for the message.

    Raises:
        LockHeld: If another process, or this one, holds it already.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "driver.lock").open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            owner = json.loads(stream.read() or "{}")
            raise LockHeld(study, owner.get("host", "this host"), owner.get("pid", 0)) from None
        stream.truncate(0)
        stream.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        stream.flush()
        yield
