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
from typing import Literal, Protocol, Self

from orchestration import worker
from orchestration.job import (
    Failure,
    Fork,
    Job,
    JobEnd,
    Notice,
    Record,
    Suspended,
    canonical_json,
)
from orchestration.retry import Retries
from orchestration.storage import StorageError
from orchestration.store import write_failure


@dataclass(frozen=True)
class Resources:
    """What one slot of a pool asks of the cluster.

    Attributes:
        cpus: CPU cores, fractions allowed.
        gpus: GPUs; a fraction is bookkeeping and shares one device.
        memory_mib: Host memory, ``None`` to not ask for any.
        workers: Processes that share each job; each of them takes the amounts above.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    memory_mib: int | None = None
    workers: int = 1

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, but got {self.workers}")
        for name, value in (("cpus", self.cpus), ("gpus", self.gpus)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, but got {value}")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus above 1 must be a whole number, but got {self.gpus}")

    def joined(self, other: Self) -> Self:
        """Returns what is enough for either."""
        memory = max(self.memory_mib or 0, other.memory_mib or 0) or None
        return type(self)(
            max(self.cpus, other.cpus),
            max(self.gpus, other.gpus),
            memory,
            max(self.workers, other.workers),
        )

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPUs"]
        parts += [f"{self.gpus:g} GPUs"] if self.gpus else []
        parts += [f"{self.memory_mib} MiB of memory"] if self.memory_mib else []
        one = ", ".join(parts)
        return one if self.workers == 1 else f"{self.workers} workers of {one} each"


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


def accept(handle: Handle, item: Record | JobEnd | Failure) -> Event | None:
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


class Family:
    """Which forks are under way beside which jobs. Drivers see the jobs only."""

    def __init__(self) -> None:
        self._parents: dict[Handle, Handle] = {}  # by the fork
        self._suspended: set[Handle] = set()

    def add(self, parent: Handle, fork: Fork) -> Handle | None:
        """Returns the handle of a new fork, or ``None`` if it is under way already."""
        if any(handle.job.run_dir == fork.job.run_dir for handle in self._parents):
            return None
        handle = Handle(fork.job)
        self._parents[handle] = parent
        return handle

    def head(self, handle: Handle) -> Handle:
        """Returns the job that drivers know: the one that a fork was forked off, or itself."""
        return self._parents.get(handle, handle)

    def is_fork(self, handle: Handle) -> bool:
        """Tells whether drivers do not know a job."""
        return handle in self._parents

    def forks_of(self, parent: Handle) -> list[Handle]:
        """Returns the forks of a job that are under way."""
        return [fork for fork, other in self._parents.items() if other is parent]

    def suspend(self, parent: Handle) -> bool:
        """Notes that a job waits for its forks; says whether it still has to."""
        waits = bool(self.forks_of(parent))
        if waits:
            self._suspended.add(parent)
        return waits

    def end(self, fork: Handle) -> Handle | None:
        """Notes that a fork has its point; returns its job if that waited for no other."""
        parent = self._parents.pop(fork)
        if parent not in self._suspended or self.forks_of(parent):
            return None
        self._suspended.discard(parent)
        return parent

    def forget(self, parent: Handle) -> list[Handle]:
        """Notes that a job goes on no more; returns the forks that have become pointless."""
        self._suspended.discard(parent)
        forks = self.forks_of(parent)
        for fork in forks:
            del self._parents[fork]
        return forks

    @property
    def num_suspended(self) -> int:
        """Jobs that need no worker at present."""
        return len(self._suspended)

    def clear(self) -> None:
        """Forgets everything."""
        self._parents.clear()
        self._suspended.clear()


class InlineExecutor:
    """Runs jobs one after the other in this process: for tests, debuggers and single runs."""

    def __init__(self) -> None:
        self._waiting: deque[Handle] = deque()
        self._family = Family()
        self._current: tuple[Handle, Iterator[worker.Item]] | None = None
        self._retries: dict[Handle, Retries] = {}
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
            self._current = handle, worker.run(handle.job)
            kind: Literal["started", "forked"] = (
                "forked" if self._family.is_fork(handle) else "started"
            )
            return [Event(self._family.head(handle), Notice(kind, "runs in this process"))]
        handle, stream = self._current
        is_cancelled = handle in self._cancelled
        item = Failure("cancelled", "cancelled") if is_cancelled else next(stream)
        if isinstance(item, Failure):
            retries = self._retries.setdefault(handle, Retries())
            if again := retries.next(handle.job, item.kind):
                handle.job = again.job
                self._current = handle, worker.run(handle.job)
                text = f"{again.label} after its last stage: {item.message}"
                notice = Notice("retrying", text, handle.job.attempt)
                return [Event(self._family.head(handle), notice)]
            item = replace(item, message=retries.verdict(item.kind, item.message))
        return self._take(handle, item)

    def _take(self, handle: Handle, item: worker.Item) -> list[Event]:
        if isinstance(item, Fork):
            if item.job.kind == "probe":  # for others to take over, and here is nobody else
                return []
            fork = self._family.add(handle, item)
            self._waiting.extend([fork] if fork else [])
            return []
        if isinstance(item, Suspended):
            self._current = None
            if not self._family.suspend(handle):
                self._waiting.appendleft(handle)
            return []
        event = accept(handle, item)
        if handle.done:
            self._current = None
            self._retries.pop(handle, None)
        if self._family.is_fork(handle):
            return self._end_fork(handle, item) if handle.done else []
        if handle.done:
            self._drop_forks(handle)
        return [event] if event else []

    def _end_fork(self, fork: Handle, item: worker.Item) -> list[Event]:
        job = self._family.head(fork)
        if isinstance(item, Failure):
            self._drop_forks(job)
            with contextlib.suppress(StorageError):
                write_failure(job.job.run_dir, item)
            event = accept(job, item)
            return [event] if event else []
        waiting = self._family.end(fork)
        self._waiting.extendleft([waiting] if waiting else [])
        return []

    def _drop_forks(self, handle: Handle) -> None:
        self._cancelled.discard(handle)
        for fork in self._family.forget(handle):
            if fork in self._waiting:
                self._waiting.remove(fork)

    def events(self) -> Iterator[Event]:
        """Yields events until every submitted job has ended; jobs may be submitted meanwhile."""
        while self._current or self._waiting:
            yield from self.poll(0)

    def cancel(self, handle: Handle) -> None:
        """Ends a job at its next record."""
        if handle.done:
            return
        self._cancelled.add(handle)
        for fork in self._family.forks_of(handle):
            if fork in self._waiting:
                self._waiting.remove(fork)
                self._waiting.extendleft(filter(None, [self._family.end(fork)]))

    @contextlib.contextmanager
    def hold(self, study: str) -> Iterator[None]:
        """Does nothing: one process cannot see others. Directory locks still hold."""
        yield

    def close(self) -> None:
        """Forgets what is unfinished."""
        self._waiting.clear()
        self._family.clear()
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
