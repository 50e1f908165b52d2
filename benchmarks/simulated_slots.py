"""An executor whose slots are generators of this process: a cluster's size without a cluster."""

import contextlib
import random
import time
from collections.abc import Iterator
from typing import Self

from orchestration import worker
from orchestration.executor import Event, Handle, accept
from orchestration.job import Failure, Job

EVENTS_A_POLL = 32


class SimulatedSlots:
    """Jobs advance in random order, a record at a time, as those of a large cluster do.

    Attributes:
        worker_seconds: Processor time that went into the jobs themselves; elsewhere it would not
            be the driver's.
        most_at_once: Jobs that were under way together.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.worker_seconds = 0.0
        self.most_at_once = 0
        self._random = random.Random(0)
        self._streams: dict[Handle, Iterator[worker.Item]] = {}
        self._order: list[Handle] = []

    @property
    def free_slots(self) -> int:
        return self.num_slots - len(self._order)

    def submit(self, job: Job) -> Handle:
        handle = Handle(job)
        self._streams[handle] = worker.run(job)
        self._order.append(handle)
        self.most_at_once = max(self.most_at_once, len(self._order))
        return handle

    def poll(self, timeout: float) -> list[Event]:
        events: list[Event] = []
        while self._order and len(events) < EVENTS_A_POLL:
            place = self._random.randrange(len(self._order))
            handle = self._order[place]
            begin = time.process_time()
            item = next(self._streams[handle])
            self.worker_seconds += time.process_time() - begin
            assert not isinstance(item, Failure), item
            event = accept(handle, item)  # type: ignore[arg-type]
            events += [event] if event else []
            if handle.done:
                del self._streams[handle]
                self._order[place] = self._order[-1]
                self._order.pop()
        return events

    def events(self) -> Iterator[Event]:
        while self._order:
            yield from self.poll(0)

    def cancel(self, handle: Handle) -> None:
        raise AssertionError("nothing is cancelled here")

    @contextlib.contextmanager
    def hold(self, study: str) -> Iterator[None]:
        yield

    def close(self) -> None:
        self._streams.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
