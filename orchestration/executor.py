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

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, Self

from orchestration.job import Failure, Job, JobEnd, Notice, Record


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
