"""How a driver gets jobs done: one protocol, and the executor that runs them in its own process.

A driver's loop needs nothing else::

    with executor:
        while executor.free_slots and (job := next_job()):
            executor.submit(job)
        for event in executor.events():
            consume(event)
            while executor.free_slots and (job := next_job()):
                executor.submit(job)
"""

import contextlib
import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

from orchestration import worker
from orchestration.job import Failure, Job, JobEnd, Notice, Record, canonical_json
from orchestration.retry import Retries


@dataclass(frozen=True)
class Resources:
    """What one slot of a pool asks of the cluster.

    Attributes:
        cpus: CPU cores, fractions allowed.
        gpus: GPUs; a fraction is bookkeeping and shares one device.
        memory_mib: Host memory, ``None`` to not ask for any.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    memory_mib: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("cpus", self.cpus), ("gpus", self.gpus)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, but got {value}")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus above 1 must be a whole number, but got {self.gpus}")

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPUs"]
        parts += [f"{self.gpus:g} GPUs"] if self.gpus else []
        parts += [f"{self.memory_mib} MiB of memory"] if self.memory_mib else []
        return ", ".join(parts)


@dataclass(eq=False)
class Handle:
    """A submitted job. Compared and hashed by identity.

    Attributes:
        job: The job as it was last sent out (its ``attempt`` grows).
        num_records: Records delivered so far.
        done: Whether a ``JobEnd`` or a ``Failure`` was delivered.
    """

    job: Job
    num_records: int = 0
    done: bool = False
    _sha: "hashlib._Hash" = field(default_factory=hashlib.sha256, repr=False)


@dataclass(frozen=True)
class Event:
    """Something that happened to a job.

    Attributes:
        handle: The job it happened to.
        body: A ``Record`` (every index exactly once and in order, also across retries), a
            ``Notice``, or the last event of the job: ``JobEnd`` or ``Failure``.
    """

    handle: Handle
    body: Record | Notice | JobEnd | Failure


class Executor(Protocol):
    """Runs jobs and hands back their records as they become durable."""

    @property
    def num_slots(self) -> int:
        """Jobs that are meant to run at a time."""
        ...

    @property
    def free_slots(self) -> int:
        """Jobs that may be submitted before others must end; never negative."""
        ...

    def submit(self, job: Job) -> Handle:
        """Accepts a job and returns at once. More than ``free_slots`` jobs queue up.

        Raises:
            ValueError: If a job with this run id is already under way.
        """
        ...

    def poll(self, timeout: float) -> list[Event]:
        """Waits up to ``timeout`` seconds for events; an empty list if nothing happened."""
        ...

    def events(self) -> Iterator[Event]:
        """Yields events until every submitted job has ended; jobs may be submitted meanwhile."""
        ...

    def cancel(self, handle: Handle) -> None:
        """Asks for an early end: the job's last event is a ``Failure`` of kind ``"cancelled"``.

        Records on disk stay, and the same job submitted again goes on after them.
        """
        ...

    def hold(self, study: str) -> AbstractContextManager[None]:
        """Keeps other drivers off a study for as long as the context lasts.

        Raises:
            LockHeld: If another driver has it (on entry).
        """
        ...

    def close(self) -> None:
        """Stops every worker. Unfinished jobs stay resumable. May be called twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc_info: object) -> None: ...


class StreamBroken(RuntimeError):
    """A worker's stream has a gap, ends early or contradicts what it gave before."""


def accept(handle: Handle, item: worker.Item) -> Event | None:
    """Books an item of a worker's stream on its job.

    Returns:
        The event to deliver, or ``None`` for a replayed record that was delivered before.

    Raises:
        StreamBroken: If the item cannot follow what came before; the attempt is then worthless.
    """
    if isinstance(item, Record):
        if item.index < handle.num_records:
            return None
        if item.index > handle.num_records:
            raise StreamBroken(f"record {item.index} came where {handle.num_records} was due")
        handle.num_records += 1
        handle._sha.update(canonical_json(item.to_dict()).encode())
        return Event(handle, item)
    if isinstance(item, JobEnd):
        delivered = JobEnd(handle.num_records, handle._sha.hexdigest()[:16])
        if item != delivered:
            raise StreamBroken(f"the worker reports {item}, but {delivered} arrived")
    handle.done = True
    return Event(handle, item)


class InlineExecutor:
    """Runs jobs one after the other in this process: for tests, debuggers and single runs."""

    def __init__(self) -> None:
        self._waiting: deque[Handle] = deque()
        self._current: tuple[Handle, Iterator[worker.Item], Retries] | None = None
        self._cancelled: set[Handle] = set()

    @property
    def num_slots(self) -> int:
        """Always one."""
        return 1

    @property
    def free_slots(self) -> int:
        """One if nothing is under way."""
        return int(self._current is None and not self._waiting)

    def submit(self, job: Job) -> Handle:
        """Accepts a job; nothing runs before ``poll`` or ``events``."""
        under_way = [*self._waiting, *([self._current[0]] if self._current else [])]
        check_not_under_way(job, under_way)
        handle = Handle(job)
        self._waiting.append(handle)
        return handle

    def poll(self, timeout: float) -> list[Event]:
        """Runs the current job up to its next record, however long that takes."""
        if self._current is None:
            if not self._waiting:
                return []
            handle = self._waiting.popleft()
            self._current = handle, worker.run(handle.job), Retries()
            return [Event(handle, Notice("started", "runs in this process"))]
        handle, stream, retries = self._current
        cancelled = handle in self._cancelled
        item = Failure("cancelled", "cancelled") if cancelled else next(stream)
        if isinstance(item, Failure):
            if again := retries.next(handle.job, item.kind):
                handle.job = again.job
                self._current = handle, worker.run(handle.job), retries
                text = f"{again.label} after its last stage: {item.message}"
                return [Event(handle, Notice("retrying", text, handle.job.attempt))]
            item = replace(item, message=retries.verdict(item.kind, item.message))
        event = accept(handle, item)
        if handle.done:
            self._current = None
            self._cancelled.discard(handle)
        return [event] if event else []

    def events(self) -> Iterator[Event]:
        """Yields events until every submitted job has ended; jobs may be submitted meanwhile."""
        while self._current or self._waiting:
            yield from self.poll(0)

    def cancel(self, handle: Handle) -> None:
        """Ends a job at its next record."""
        if not handle.done:
            self._cancelled.add(handle)

    @contextlib.contextmanager
    def hold(self, study: str) -> Iterator[None]:
        """Does nothing: one process cannot see others. Directory locks still hold."""
        yield

    def close(self) -> None:
        """Forgets what is unfinished."""
        self._waiting.clear()
        self._current = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def check_not_under_way(job: Job, handles: Iterable[Handle]) -> None:
    """Refuses a second job for a run directory that one is filling.

    Raises:
        ValueError: If a handle has the job's run directory.
    """
    if any(handle.job.run_dir == job.run_dir for handle in handles):
        raise ValueError(f"run {job.run_id} is already under way in {job.run_dir}")
