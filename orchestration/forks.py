"""Fine-tunes that are forked off a trajectory: jobs of their own beside the one that goes on.

Where a trajectory reaches an asked ratio it leaves a snapshot, names the fork and prunes on. The
fork restores the snapshot in whatever process takes it and makes the ratio's point. The job of
the trajectory stays the only one that writes its records: it adopts a finished fork's point at its
next record, or, once the trajectory has ended and others are still at work, when it is sent again.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.job import Fork, Job, Record, Suspended
from orchestration.storage import join, parent
from orchestration.store import FORKS, RunDirectory, read_run

if TYPE_CHECKING:
    from comp.pruner import Pruner

SNAPSHOT = "snapshot"


def ratio_name(ratio: float) -> str:
    """Returns the directory of a ratio's model or fork: ``"ratio-700"`` for 0.7."""
    return f"ratio-{round(ratio * 1000):03d}"


def fork_of(job: Job, ratio: float) -> Job:
    """Returns the job that fine-tunes at a ratio what another one prunes."""
    return dataclasses.replace(
        job,
        run_id=f"{job.run_id}-r{round(ratio * 1000):03d}",
        run_dir=join(job.run_dir, FORKS, ratio_name(ratio)),
        kind="fine_tune",
        ratio=ratio,
        attempt=0,
    )


def trajectory_of(fork: Job) -> str:
    """Returns the run directory that a fork's job was forked off."""
    return parent(fork.run_dir, 2)


def leave_snapshot(directory: RunDirectory, ratio: float, pruner: "Pruner") -> Fork:
    """Makes durable what a fork starts from, unless an earlier attempt has, and names the fork.

    Args:
        directory: The trajectory's.
        ratio: The ratio that it has reached.
        pruner: Stands at that ratio's ``Snapshot``.

    Raises:
        StorageError: If it cannot be written.
    """

    def save(target: Path) -> None:
        pruner.save(target, optimizer=False)

    place = f"{FORKS}/{ratio_name(ratio)}/{SNAPSHOT}"
    if directory.storage.exists(place):
        pruner.lend(optimizer=False)  # as the other workers do
    else:
        directory.storage.write_tree(place, save)
    return Fork(fork_of(directory.job, ratio))


def adopt(directory: RunDirectory) -> Iterator[Record]:
    """Takes the points of finished forks into the records of their trajectory.

    Yields:
        The new records.
    """
    for ratio in _forked(directory):
        if directory.storage.exists(f"{FORKS}/{ratio_name(ratio)}/manifest.json"):
            (point,) = read_run(fork_of(directory.job, ratio).run_dir).points
            yield directory.append(point)


def go_on_with(directory: RunDirectory) -> Iterator[Record | Fork]:
    """Takes up what an earlier attempt has left of forks: adopts the finished, names the others.

    Yields:
        New records, then a ``Fork`` for each that is not finished.
    """
    yield from adopt(directory)
    for ratio in _forked(directory):
        yield Fork(fork_of(directory.job, ratio))


def is_over(directory: RunDirectory) -> bool:
    """Tells whether the trajectory has passed its last ratio, so that only forks are left."""
    asked = set(directory.job.config["ratios"])
    return bool(asked) and asked <= {*_done(directory), *_forked(directory)}


def suspend_if_incomplete(directory: RunDirectory) -> Iterator[Suspended]:
    """Yields ``Suspended`` after the end of a trajectory of which forks are still at work."""
    if _forked(directory):
        yield Suspended()


def _forked(directory: RunDirectory) -> list[float]:
    """Returns the asked ratios that have a snapshot and no point yet."""
    names = directory.storage.names(FORKS)
    done = _done(directory)
    return [
        ratio
        for ratio in directory.job.config["ratios"]
        if ratio not in done
        and ratio_name(ratio) in names
        and directory.storage.exists(f"{FORKS}/{ratio_name(ratio)}/{SNAPSHOT}")
    ]


def _done(directory: RunDirectory) -> set[float]:
    return {record.point.ratio_asked for record in directory.records if record.point}
