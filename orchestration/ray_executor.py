"""An elastic pool of warm Ray actors that run jobs and stream their records back.

Any ready actor of a job's size takes it; nothing ever waits for a given one. Where actors of one
size hold what one of another size waits for, they make way as their jobs end.

The driver owns retries: actors and their tasks have none of Ray's own, because Ray matches a
retried stream with the first by index and cuts it off without an error where they differ.
"""

import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Self

import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayError, RayTaskError

from orchestration import worker
from orchestration.cluster import (
    ClusterError,
    HeadWatch,
    check_fits,
    describe_room,
    hold_study,
    total_cpus,
)
from orchestration.executor import (
    Event,
    Family,
    Handle,
    Resources,
    StreamBroken,
    accept,
    check_not_under_way,
)
from orchestration.job import Failure, FailureKind, Fork, Job, Notice, Suspended
from orchestration.ray_actor import Place, PrunerActor, Retire
from orchestration.ray_crew import Crew, last_line
from orchestration.retry import RULES, Retries, Rule, describe_kill, spoils_process
from orchestration.storage import StorageError
from orchestration.store import write_failure

_log = logging.getLogger(__name__)

MAX_GROWTH_MIB = 2048
START_SECONDS = 5.0  # after which an actor that is not up waits for room rather than for a core
TOP_UP_PAUSE = 0.05  # seconds between two looks at whether more actors may start
RESTART_PAUSE = 1.0  # seconds before another actor is started after one that did not come up


@dataclass(eq=False)
class _Slot:
    """An actor, with its peers, and what it is doing.

    Attributes:
        crew: The actor and its peers.
        size: What it asks of the cluster.
        since: Monotonic time of its start, or of the last sign of life while it runs a job.
        place: Where it lives, once it has answered.
        handle: The job it runs.
        warm_for: Model, task and data of its last job.
        num_jobs: Jobs it has taken.
        num_items: Items of its present job's stream that have come.
        retires: Whether it has grown too large to take another.
    """

    crew: Crew
    size: Resources
    since: float
    place: Place | None = None
    handle: Handle | None = None
    warm_for: tuple[str, str, str | None] | None = None
    num_jobs: int = 0
    num_items: int = 0
    retires: bool = False


class RayExecutor:
    """Runs jobs on a Ray cluster that the process is connected to (``cluster.connect``)."""

    def __init__(
        self,
        num_slots: int,
        resources: Resources | Callable[[Job], Resources] = Resources(),
        *,
        rules: Mapping[FailureKind, Rule] = RULES,
        stage_timeout: float | None = None,
        recycle_after: int | None = None,
        max_growth_mib: int | None = MAX_GROWTH_MIB,
        start_timeout: float = 60.0,
        cancel_grace: float = 10.0,
        make_way_after: float = 60.0,
    ) -> None:
        """Starts nothing; the first actors start with the first jobs.

        Args:
            num_slots: Jobs that run at a time, if the cluster has room.
            resources: What one slot asks for: any, or that of a job and its forks; such sizes are
                to be checked before (``cluster.check_fits``).
            rules: What is tried again, and how often.
            stage_timeout: Longest time between two records of a job in seconds, loading and
                fine-tuning included; a worker that is silent for longer counts as lost.
            recycle_after: Jobs after which an actor is replaced; ``None`` for never.
            max_growth_mib: Host memory that an actor may keep beyond what it kept after its first
                job of the same model, before it is replaced; ``None`` for any amount.
            start_timeout: Seconds to wait for room on the cluster while nothing else runs.
            cancel_grace: Seconds that a cancelled job's worker has to finish its stage before it
                is replaced.
            make_way_after: Seconds that a job waits while none of its size runs, before actors of
                other sizes end for it one after the other, each when its job has.

        Raises:
            ClusterError: If no node could hold a slot of the one size.
            ValueError: If a number is out of bounds.
        """
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, but got {num_slots}")
        self._num_slots = num_slots
        self._size_of = resources if callable(resources) else lambda job: resources
        self._rules = rules
        self._stage_timeout = stage_timeout
        self._recycle_after = recycle_after
        self._max_growth_mib = max_growth_mib
        self._start_timeout = start_timeout
        self._cancel_grace = cancel_grace
        self._make_way_after = make_way_after
        self._pending: deque[Handle] = deque()
        self._queued: dict[Handle, float] = {}  # of those, since when
        self._start_seconds = 0.0  # that the last actor took to come up
        self._resting: dict[Handle, float] = {}  # pending ones, until when they pause
        self._retries: dict[Handle, Retries] = {}  # of every unfinished job and fork
        self._family = Family()
        self._starting: dict[Any, _Slot] = {}  # by the reference that tells it is free
        self._idle: list[_Slot] = []
        self._busy: dict[Any, _Slot] = {}  # by its stream
        self._outbox: list[Event] = []
        self._last_progress = time.monotonic()
        self._next_start = 0.0
        self._actor_class = PrunerActor
        self._head = HeadWatch()
        if isinstance(resources, Resources):
            check_fits(resources)

    def _start(self, size: Resources) -> None:
        crew = Crew(self._actor_class, size, self._max_growth_mib)
        self._starting[crew.where()] = _Slot(crew, size, time.monotonic())

    @property
    def num_slots(self) -> int:
        """Jobs that run at a time, if the cluster has room."""
        return self._num_slots

    @property
    def free_slots(self) -> int:
        """Jobs that may be submitted before others must end."""
        return max(0, self._num_slots - self._num_active)

    @property
    def _num_active(self) -> int:
        """Jobs and forks that have a worker or wait for one; probes only take what is free."""
        num_waiting_probes = sum(_is_probe(handle) for handle in self._pending)
        return len(self._retries) - self._family.num_suspended - num_waiting_probes

    @property
    def places(self) -> list[tuple[Place, str | None]]:
        """Where the ready actors live, and the run id of the job that each is running."""
        ready = [*self._idle, *self._busy.values()]
        return [
            (slot.place, slot.handle.job.run_id if slot.handle else None)
            for slot in ready
            if slot.place
        ]

    def submit(self, job: Job) -> Handle:
        """Accepts a job and returns at once."""
        check_not_under_way(job, self._retries)
        handle = Handle(job)
        if not self._retries:
            self._last_progress = time.monotonic()
        self._retries[handle] = Retries(self._rules)
        self._enqueue(handle, first=False)
        return handle

    def events(self) -> Iterator[Event]:
        """Yields events until every submitted job has ended; jobs may be submitted meanwhile.

        Raises:
            ClusterError: If no worker can be started.
        """
        while self._retries or self._outbox:
            yield from self.poll(1.0)

    def poll(self, timeout: float) -> list[Event]:
        """Waits up to ``timeout`` seconds for events.

        Raises:
            ClusterError: If no worker can be started.
            HeadLost: If the cluster's head node is gone.
        """
        self._head.check()
        self._drop_silent()
        self._drop_torn()
        self._top_up()
        self._dispatch()
        waiting = [*self._busy, *self._starting]
        if waiting:
            ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
            if not ready and not self._outbox:
                ready, _ = ray.wait(waiting, num_returns=1, timeout=timeout)
            for reference in ready:
                if reference in self._starting:
                    self._join(reference)
                elif reference in self._busy:
                    self._advance(reference)
        elif self._pending and not self._outbox:
            time.sleep(min(timeout, RESTART_PAUSE))
        self._check_room()
        events, self._outbox = self._outbox, []
        return events

    def _enqueue(self, handle: Handle, *, first: bool = True) -> None:
        """Lets a job or fork wait for a worker, before the others or behind them."""
        (self._pending.appendleft if first else self._pending.append)(handle)
        self._queued[handle] = time.monotonic()

    def _top_up(self) -> None:
        """Starts as many actors as there are jobs to run, up to the number of slots."""
        waiting = self._waiting_sizes()
        self._make_way(waiting)
        free = self._num_slots - self._num_actors
        if not waiting or free <= 0 or time.monotonic() < self._next_start:
            return
        starved = self._starved()
        if starved is not None:
            waiting = [starved] if starved in waiting else []
        sizes = [size for size in waiting[:free] if self._is_worth_a_start(size)]
        if not sizes:
            return  # Ray is asked for its cores only when an actor is to start
        for size in sizes[: max(0, self._starts_at_once())]:
            self._next_start = time.monotonic() + TOP_UP_PAUSE
            self._start(size)

    def _make_way(self, waiting: list[Resources]) -> None:
        """Ends idle actors that hold what one of another size waits for, or the last slot."""
        if not self._idle:
            return
        pending = {self._size_of(handle.job) for handle in self._pending}
        late = self._late_to_start()
        for slot in list(self._idle):
            is_full = bool(waiting) and self._num_actors >= self._num_slots
            is_spare = slot.size not in pending and (is_full or late not in (None, slot.size))
            if is_spare or self._must_go(slot):
                self._idle.remove(slot)
                slot.crew.end()

    @property
    def _num_actors(self) -> int:
        return len(self._starting) + len(self._idle) + len(self._busy)

    def _waiting_sizes(self) -> list[Resources]:
        """Returns the size of every waiting job that has no actor to come, in their order."""
        coming = Counter(slot.size for slot in (*self._idle, *self._starting.values()))
        sizes = []
        for handle in self._pending:
            size = self._size_of(handle.job)
            coming[size] -= 1
            if coming[size] < 0:
                sizes.append(size)
        return sizes

    def _starved(self) -> Resources | None:
        """Returns the size of the job that waits for too long while none of its size runs."""
        running = {slot.size for slot in self._busy.values()}
        since = time.monotonic() - self._make_way_after
        for handle in self._pending:
            size = self._size_of(handle.job)
            if self._queued[handle] < since and size not in running:
                return size
        return None

    def _late_to_start(self) -> Resources | None:
        """Returns the size of an actor that seems to wait for room."""
        since = time.monotonic() - min(START_SECONDS, self._make_way_after)
        new = (slot for slot in self._starting.values() if slot.place is None)
        return next((slot.size for slot in new if slot.since < since), None)

    def _must_go(self, slot: _Slot) -> bool:
        """Tells whether a free actor is in the way of a job of another size."""
        starved = self._starved()
        if starved in (None, slot.size):
            return False
        is_coming = any(one.size == starved for one in self._starting.values())
        return not is_coming or self._late_to_start() == starved

    def _is_worth_a_start(self, size: Resources) -> bool:
        """Tells whether a job has waited for longer than an actor takes to start.

        Where jobs last for milliseconds, those that run soon take the ones that wait.
        """
        if not any(slot.size == size for slot in (*self._idle, *self._busy.values())):
            return True
        of_size = (handle for handle in self._pending if self._size_of(handle.job) == size)
        oldest = min((self._queued[handle] for handle in of_size), default=None)
        return oldest is not None and time.monotonic() - oldest > self._start_seconds

    def _starts_at_once(self) -> int:
        """Returns how many actors may start now, so that they come up one by one and not all late.

        A process that starts keeps a core busy for most of a second. More of them at once than
        there are cores all come up together at the end, and their jobs wait for so long.
        """
        cores = total_cpus()
        now = time.monotonic()
        young = sum(
            slot.place is None and now - slot.since < START_SECONDS
            for slot in self._starting.values()
        )
        return max(2, round(cores)) - young if cores else self._num_slots

    def _join(self, reference: Any) -> None:
        """Makes an actor that has started, or finished a cancelled job, available."""
        slot = self._starting.pop(reference)
        try:
            is_new = slot.place is None
            slot.place = ray.get(reference)
        except RayError as error:
            _log.warning("a worker did not start: %s", last_line(error))
            self._next_start = time.monotonic() + RESTART_PAUSE
            return
        self._last_progress = time.monotonic()
        if is_new:
            self._start_seconds = self._last_progress - slot.since
        self._idle.append(slot)
        self._dispatch()

    def _dispatch(self) -> None:
        while self._idle and (handle := self._next_pending()) is not None:
            slot = self._take_idle(handle.job)
            slot.handle, slot.since = handle, time.monotonic()
            slot.num_jobs, slot.num_items = slot.num_jobs + 1, 0
            stream = slot.crew.run(handle.job)
            self._busy[stream] = slot
            if not _is_probe(handle):
                self._outbox.append(self._started(handle, slot))

    def _started(self, handle: Handle, slot: _Slot) -> Event:
        head, attempt = self._family.head(handle), handle.job.attempt
        if head is handle:
            peers = f" with {slot.crew.num_peers} more" if slot.crew.num_peers else ""
            return Event(head, Notice("started", f"runs in {slot.place}{peers}", attempt))
        text = f"ratio {handle.job.ratio:g} is fine-tuned in {slot.place}"
        return Event(head, Notice("forked", text, attempt))

    def _next_pending(self) -> Handle | None:
        """Takes the first job that an idle actor fits and that does not pause before a retry.

        Probes come after all others.
        """
        now, sizes = time.monotonic(), {slot.size for slot in self._idle}
        due = (handle for handle in self._pending if self._resting.get(handle, 0.0) <= now)
        fitting = (one for one in due if self._size_of(one.job) in sizes)
        handle = min(fitting, key=_is_probe, default=None)
        if handle is not None:
            self._pending.remove(handle)
            self._resting.pop(handle, None)
            self._queued.pop(handle, None)
        return handle

    def _take_idle(self, job: Job) -> _Slot:
        """Prefers an actor that has the job's model loaded."""
        key, size = (job.model, job.task, job.data), self._size_of(job)
        fitting = [slot for slot in self._idle if slot.size == size]
        slot = next((slot for slot in fitting if slot.warm_for == key), fitting[-1])
        self._idle.remove(slot)
        slot.warm_for = key
        return slot

    def _advance(self, stream: Any) -> None:
        """Takes the next item of a stream that has one."""
        slot = self._busy[stream]
        assert slot.handle is not None
        slot.since = self._last_progress = time.monotonic()
        try:
            item: worker.Item | Retire = ray.get(next(stream))
            slot.num_items += 1
            if isinstance(item, Failure) and self._is_lost(stream, slot.crew.cause(item)):
                return
            if isinstance(item, Retire):
                slot.retires = True
                return
            if isinstance(item, (Fork, Suspended)):
                self._branch(stream, slot.handle, item)
                return
            event = accept(slot.handle, item)
        except StopIteration:
            self._lose(stream, "its stream ended early")
        except StreamBroken as error:
            self._lose(stream, f"its stream is broken: {error}")
        except RayTaskError as error:
            self._lose(stream, f"it failed outside the run: {last_line(error)}")
        except OutOfMemoryError as error:  # Ray ends a process before its machine is full
            self._lose(stream, describe_kill(str(error)), "memory")
        except RayError as error:
            # A worker that has done jobs and dies before it begins another was idle when it went:
            # no fault of the job. New workers have done none, so this cannot go on for ever.
            was_idle = isinstance(error, ActorDiedError) and slot.num_jobs > 1 > slot.num_items
            kind: FailureKind = "preempted" if was_idle else "infrastructure"
            self._lose(stream, last_line(error), kind)
        else:
            if event and slot.handle.done:
                handle = slot.handle
                spoiled = isinstance(item, Failure) and spoils_process(item.error)
                self._release(stream, recycle=spoiled)
                self._book_off(handle, event)
            elif event and not self._family.is_fork(slot.handle):
                self._outbox.append(event)
                self._drop_waiting_probes(slot.handle)

    def _is_lost(self, stream: Any, failure: Failure) -> bool:
        """Gives a worker up whose job may go on elsewhere, or whose peer says why it does not."""
        if failure.kind == "preempted":
            self._lose(stream, "its machine is being taken away", "preempted")
        elif failure.kind in ("memory", "infrastructure"):
            self._lose(stream, failure.message, failure.kind, cause=failure)
        else:
            return False
        return True

    def _drop_torn(self) -> None:
        """Gives up workers of which a peer is gone; they themselves may take long to notice."""
        for stream, slot in list(self._busy.items()):
            if failure := slot.crew.lost_peer():
                self._lose(stream, failure.message, failure.kind)

    def _branch(self, stream: Any, handle: Handle, item: Fork | Suspended) -> None:
        """Queues a fork before the jobs that have not begun, or frees its job's worker."""
        if isinstance(item, Fork):
            fork = self._family.add(handle, item)
            if fork is not None:
                self._retries[fork] = Retries(self._rules)
                self._enqueue(fork, first=not _is_probe(fork))
            return
        self._release(stream, recycle=False)
        if not self._family.suspend(handle):
            self._enqueue(handle)

    def _release(self, stream: Any, *, recycle: bool) -> None:
        """Makes an actor available, or replaces it."""
        slot = self._busy.pop(stream)
        slot.handle = None
        if (
            recycle
            or slot.retires
            or self._must_go(slot)
            or (self._recycle_after and slot.num_jobs >= self._recycle_after)
        ):
            slot.crew.end()
        else:
            self._idle.append(slot)

    def _book_off(self, handle: Handle, event: Event) -> None:
        """Delivers the last event of a job; a fork's concerns the job that it belongs to."""
        del self._retries[handle]
        if not self._family.is_fork(handle):
            self._drop_forks(handle)
            self._outbox.append(event)
        elif isinstance(event.body, Failure) and not _is_probe(handle):
            self._stop(self._family.head(handle), event.body)
        elif (waiting := self._family.end(handle)) is not None:
            self._enqueue(waiting)

    def _lose(
        self,
        stream: Any,
        reason: str,
        kind: FailureKind = "infrastructure",
        *,
        cause: Failure | None = None,
    ) -> None:
        """Gives a lost worker up and its job to another one, or up as well."""
        slot = self._busy.pop(stream)
        handle = slot.handle
        assert handle is not None
        slot.crew.end()
        if _is_probe(handle):  # its trajectory does without
            self._book_off(handle, Event(handle, Failure(kind, reason)))
            return
        retries = self._retries[handle]
        _log.debug("%s lost %s: %s", handle.job.run_id, slot.place, reason)
        if again := retries.next(handle.job, kind):
            handle.job = again.job
            self._resting[handle] = time.monotonic() + again.pause
            self._enqueue(handle)
            text = f"{again.label} after its last stage; lost {slot.place}: {reason}"
            notice = Notice("retrying", text, handle.job.attempt)
            self._outbox.append(Event(self._family.head(handle), notice))
            return
        text, attempts = retries.verdict(kind, reason), handle.job.attempt + 1
        last = replace(cause or Failure(kind, text), message=text, attempts=attempts)
        self._give_up(handle, last)

    def _give_up(self, handle: Handle, failure: Failure) -> None:
        if failure.kind != "cancelled":
            with contextlib.suppress(StorageError):
                write_failure(handle.job.run_dir, failure)
        event = accept(handle, failure)
        assert event is not None
        self._book_off(handle, event)

    def _drop_silent(self) -> None:
        """Gives up workers that are silent for longer than allowed."""
        now = time.monotonic()
        for stream, slot in list(self._busy.items()):
            if self._stage_timeout and now - slot.since > self._stage_timeout:
                reason = f"it gave no record for {self._stage_timeout:g} s"
                self._lose(stream, reason, "timeout")
        for reference, slot in list(self._starting.items()):
            if slot.place and now - slot.since > self._cancel_grace:
                del self._starting[reference]
                slot.crew.end()

    def _check_room(self) -> None:
        """Stops waiting for workers that do not come.

        Raises:
            ClusterError: If nothing runs and no actor started within ``start_timeout``.
        """
        silent = time.monotonic() - self._last_progress
        if self._pending and not self._busy and silent > self._start_timeout:
            room = describe_room(self._size_of(self._pending[0].job), self._num_slots)
            raise ClusterError(
                f"no worker started within {self._start_timeout:g} s: {room}; end other jobs, add "
                "nodes or ask for less"
            )

    def cancel(self, handle: Handle) -> None:
        """Ends a job; its worker stays warm if it finishes its stage within ``cancel_grace``."""
        if handle in self._retries:
            attempts = handle.job.attempt + 1
            self._stop(handle, Failure("cancelled", "cancelled", attempts=attempts))

    def _stop(self, handle: Handle, failure: Failure) -> None:
        """Ends a job for a reason that its worker does not know."""
        self._withdraw(handle)
        self._give_up(handle, failure)

    def _drop_forks(self, handle: Handle) -> None:
        for fork in self._family.forget(handle):
            if self._retries.pop(fork, None) is not None:
                self._withdraw(fork)

    def _drop_waiting_probes(self, handle: Handle) -> None:
        """Forgets trials of a stage that is over."""
        for fork in self._family.forks_of(handle):
            if _is_probe(fork) and fork in self._pending:
                self._withdraw(fork)
                del self._retries[fork]
                self._family.end(fork)

    def _withdraw(self, handle: Handle) -> None:
        """Takes a job from the queue, or from its worker as soon as that has finished a stage."""
        if handle in self._pending:
            self._pending.remove(handle)
            self._resting.pop(handle, None)
            self._queued.pop(handle, None)
        for stream, slot in list(self._busy.items()):
            if slot.handle is handle:
                del self._busy[stream]
                ray.cancel(stream)
                slot.handle, slot.since = None, time.monotonic()
                self._starting[slot.crew.where()] = slot

    def hold(self, study: str) -> AbstractContextManager[None]:
        """Keeps other drivers of the cluster off a study.

        Raises:
            LockHeld: If another driver has it (on entry).
        """
        return hold_study(study)

    def close(self) -> None:
        """Ends every actor; unfinished jobs stay resumable."""
        slots = [*self._starting.values(), *self._idle, *self._busy.values()]
        self._head.stop()
        if ray.is_initialized() and not self._head.is_lost:
            for slot in slots:
                slot.crew.end()
        for collection in (self._starting, self._idle, self._busy, self._pending, self._retries):
            collection.clear()
        self._family.clear()
        self._queued.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _is_probe(handle: Handle) -> bool:
    return handle.job.kind == "probe"
