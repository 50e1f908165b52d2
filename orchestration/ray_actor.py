"""The process behind one slot of the pool. It imports little, because it is started often."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import ray

from orchestration import gang, worker
from orchestration.job import Failure, FailureKind, Job, JobEnd

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore


@dataclass(frozen=True)
class Place:
    """Where an actor lives.

    Attributes:
        host: Host name.
        pid: Process id on that host.
    """

    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True)
class Retire:
    """Says, before the last item of a stream, that the actor should take no more jobs."""


class PrunerActor:
    """One slot of the pool: a process that keeps its models loaded between jobs."""

    def __init__(self, max_growth_mib: int | None = None) -> None:
        self._preempted = self._is_busy = False
        self._max_growth_mib = max_growth_mib
        self._first: dict[tuple[str, str, str | None], float] = {}  # MiB after the first such job
        self._store: TCPStore | None = None
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        """Lets the current stage become durable; there usually are 30 seconds left."""
        self._preempted = True
        if not self._is_busy:  # Ray looks for signals every few milliseconds, and takes this well
            raise SystemExit(0)

    def where(self) -> Place:
        """Returns where this actor lives, once it has nothing else to do."""
        return Place(socket.gethostname(), os.getpid())

    def open_store(self) -> gang.Place:
        """Returns where the peers of this actor find it."""
        util: Any = ray.util
        self._store = gang.open_store(util.get_node_ip_address())
        return self._store.host, self._store.port

    def run(self, job: Job, seat: gang.Seat | None = None) -> Iterator[worker.Item | Retire]:
        """Yields the job's stream; see ``worker.run``."""
        with self._at_work(seat):
            for item in worker.run(job, stop=self._stop):
                if isinstance(item, JobEnd) and self._has_grown(job):
                    yield Retire()
                yield item

    def follow(self, job: Job, seat: gang.Seat, place: gang.Place) -> Failure | None:
        """Does a peer's part of the job; see ``worker.follow``."""
        if self._store is None:
            self._store = gang.find_store(place)
        with self._at_work(seat):
            return worker.follow(job, stop=self._stop)

    @contextlib.contextmanager
    def _at_work(self, seat: gang.Seat | None) -> Iterator[None]:
        self._is_busy = True
        try:
            if seat is None:
                yield
            else:
                assert self._store is not None
                with gang.group(self._store, seat):
                    yield
        finally:
            self._is_busy = False
            if self._preempted:  # told to go after its last look: once the stream has closed
                threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()

    def _has_grown(self, job: Job) -> bool:
        """Tells whether the process keeps more memory than after its first job of this model."""
        if self._max_growth_mib is None:
            return False
        now = own_memory_mib()
        first = self._first.setdefault((job.model, job.task, job.data), now)
        return now > first + self._max_growth_mib

    def _stop(self) -> FailureKind | None:
        if self._preempted:
            return "preempted"
        return "cancelled" if ray.get_runtime_context().is_canceled() else None


def own_memory_mib() -> float:
    """Returns the memory that this process alone holds; shared and mapped pages do not count."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 1024
    return 0.0  # not on Linux: then nothing counts as grown
