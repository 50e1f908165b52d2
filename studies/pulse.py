"""A sign of life that a study's driver leaves beside it for whoever watches from elsewhere."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from orchestration.storage import StorageError
from studies.folder import StudyFolder

PULSE = "pulse.json"
SECONDS = 10.0
LEAVE_SECONDS = 2.0


@dataclass(frozen=True)
class Pulse:
    """What a driver says of itself.

    Attributes:
        time: Unix time of the sign.
        began: Unix time when the driver began.
        host: Where it runs.
        pid: Its process id there.
        resources: By name, what the cluster has in use and in all; empty without a cluster.
    """

    time: float
    began: float
    host: str
    pid: int
    resources: dict[str, tuple[float, float]]

    @property
    def is_fresh(self) -> bool:
        """Whether the driver was alive a moment ago."""
        return time.time() - self.time < 3 * SECONDS


@contextlib.contextmanager
def leaving_pulse(
    folder: StudyFolder, resources: Callable[[], dict[str, tuple[float, float]]]
) -> Iterator[None]:
    """Writes a sign of life every few seconds for as long as the context lasts, and takes it away.

    Args:
        folder: The study, which this process drives.
        resources: Asked for what the cluster has; what it raises is passed over.
    """
    began, done = time.time(), threading.Event()

    def beat() -> None:
        while True:
            have: dict[str, tuple[float, float]] = {}
            with contextlib.suppress(Exception):  # a cluster that is gone is the driver's matter
                have = resources()
            if done.is_set():
                return
            pulse = Pulse(time.time(), began, socket.gethostname(), os.getpid(), have)
            with contextlib.suppress(StorageError, OSError):
                data = json.dumps(asdict(pulse)).encode()
                folder.storage.write(PULSE, data, durable=False)
            if done.wait(SECONDS):
                return

    thread = threading.Thread(target=beat, name="pulse", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(LEAVE_SECONDS)  # it may stand still: Ray waits a minute for a lost head
        with contextlib.suppress(StorageError, OSError):
            folder.storage.remove(PULSE)


def read_pulse(folder: StudyFolder) -> Pulse | None:
    """Returns the last sign of life, ``None`` if no driver is at work."""
    try:
        values = json.loads(folder.storage.read(PULSE))
    except (FileNotFoundError, ValueError):
        return None
    have = {name: (used, total) for name, (used, total) in values.pop("resources").items()}
    return Pulse(**values, resources=have)
