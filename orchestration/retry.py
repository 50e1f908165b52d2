"""What is tried again after a failure, how often, after which pause, and with what changed.

``RULES`` is the whole policy. A job that is tried again goes on after its last durable record, so
a retry costs at most the stage that was under way.
"""

import errno
import re
import resource
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from comp.errors import WorkerLost
from orchestration.job import FailureKind, Job
from orchestration.storage import StorageError

LONGEST_PAUSE = 30.0  # seconds


@dataclass(frozen=True)
class Rule:
    """What follows a failure of one kind.

    Attributes:
        retries: How often a job is tried again; ``None`` for as often as it happens.
        pause: Seconds before the second retry (the first comes at once); they double each time.
        split: Into how many parts the batches are split further in a retry, to save memory.
    """

    retries: int | None = 0
    pause: float = 0.0
    split: int = 1


RULES: Mapping[FailureKind, Rule] = {
    "infrastructure": Rule(retries=5, pause=1.0),  # killed, or its node died; see you elsewhere
    "timeout": Rule(retries=2),  # hung; often the same stage hangs again
    "memory": Rule(retries=1, split=2),
    "preempted": Rule(retries=None),  # nobody's fault, so at nobody's charge
    "algorithm": Rule(),  # the same seed gives the same NaN
    "storage": Rule(),  # the driver stops: every other trial would fail alike
    "cancelled": Rule(),
}


@dataclass(frozen=True)
class Retry:
    """A job that is to be tried again.

    Attributes:
        job: As it is to be sent out.
        pause: Seconds to wait before.
        label: ``"retrying (2/5)"``, for people.
    """

    job: Job
    pause: float
    label: str


@dataclass
class Retries:
    """What has failed of one job so far."""

    rules: Mapping[FailureKind, Rule] = field(default_factory=lambda: RULES)
    counts: Counter[FailureKind] = field(default_factory=Counter)

    def next(self, job: Job, kind: FailureKind) -> Retry | None:
        """Books a failure; returns how the job goes on, ``None`` if it does not."""
        rule = self.rules[kind]
        self.counts[kind] += 1
        count = self.counts[kind]
        if rule.retries is not None and count > rule.retries:
            return None
        again = job.split_further(rule.split) if rule.split > 1 else job
        if again is None:
            return None
        pause = min(rule.pause * 2 ** (count - 2), LONGEST_PAUSE) if count > 1 else 0.0
        label = "retrying" if rule.retries is None else f"retrying ({count}/{rule.retries})"
        if rule.split > 1:
            label += f" with batches in {again.parts} parts"
        return Retry(again.next_attempt(), pause, label)

    def verdict(self, kind: FailureKind, reason: str) -> str:
        """Returns the sentence that a job ends with."""
        count = self.counts[kind]
        return reason if count == 1 else f"{_TIMES[kind].format(count)}, the last time: {reason}"


_TIMES: Mapping[FailureKind, str] = {
    "infrastructure": "lost {} workers",
    "timeout": "hung {} times",
    "memory": "out of memory {} times, the last one with smaller parts of batches",
}


_NO_MEMORY = re.compile(
    r"out of memory|(can.t|cannot|unable to) allocate|not enough memory|ALLOC_FAILED", re.I
)


def kind_of(error: Exception) -> FailureKind:
    """Tells what kind of failure an exception out of a run is.

    torch has no class for all of its ways to run out of memory, so its words count too.
    """
    if isinstance(error, StorageError):
        return "storage"
    if isinstance(error, WorkerLost):
        return "infrastructure"
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return "memory"
    is_torch = isinstance(error, RuntimeError)
    return "memory" if is_torch and _NO_MEMORY.search(str(error)) else "algorithm"


def describe_memory(error: Exception) -> str:
    """Returns one sentence with the figures of a run that is out of memory."""
    first = next(iter(str(error).splitlines()), "").strip()
    asked = re.search(r"tried to allocate (\d+) bytes", first)
    if asked:
        first = f"tried to allocate {int(asked.group(1)) / 2**20:,.0f} MiB"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB
    reason = first or type(error).__name__
    return (
        f"out of memory ({reason.rstrip('.')}; the worker has used up to {peak:,.0f} MiB of host "
        "memory); ask for smaller batch_size or eval_batch_size, more accumulate, "
        "gradient_checkpointing, or fewer runs at a time"
    )


def describe_kill(text: str) -> str:
    """Returns the sentence with the figures out of what Ray says of a process that it ended."""
    found = re.search(r"([\d.]+\s?[KMGT]i?B)(?: used)? ?/ ?([\d.]+\s?[KMGT]i?B)", text)
    figure = f": {found.group(1)} of {found.group(2)} were in use" if found else ""
    return f"out of memory (Ray ended the worker because its machine was nearly full{figure})"


def spoils_process(error_name: str) -> bool:
    """Tells whether an error of this class leaves its process unfit for other jobs.

    After an error on a GPU every later call on it fails as well.
    """
    return error_name == "AcceleratorError"
