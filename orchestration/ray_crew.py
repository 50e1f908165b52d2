"""The actors behind one slot of the pool: the one that runs its jobs, and peers that share them.

A crew lives and dies as one: where a peer is lost, the others cannot go on with its job.
"""

import contextlib
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestration.executor import Resources
from orchestration.gang import Seat
from orchestration.job import Failure, Job
from orchestration.ray_actor import PrunerActor
from orchestration.retry import describe_kill

PATIENCE = 10.0  # seconds in which a peer says why it left


class Crew:
    """As many actors as a slot has workers.

    Several stand in the bundles of one placement group: Ray finds room for all of them, on as few
    nodes as it can, or starts none.
    """

    def __init__(self, actor_class: type[PrunerActor], size: Resources, *args: object) -> None:
        self._size, self._num_jobs = size, 0
        self._group: PlacementGroup | None = None
        if size.workers > 1:
            bundles = [_bundle(size) for _ in range(size.workers)]
            self._group = placement_group(bundles, strategy="PACK")
        self._first, *self._peers = [
            self._start(actor_class, index, *args) for index in range(size.workers)
        ]
        self._place = self._first.open_store.remote() if self._peers else None
        self._following: list[Any] = []

    def _start(self, actor_class: type[PrunerActor], index: int, *args: object) -> Any:
        options: dict[str, Any] = {"num_cpus": self._size.cpus, "num_gpus": self._size.gpus}
        if self._size.memory_mib:
            options["memory"] = self._size.memory_mib * 2**20
        if self._group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._group, index)
        remote: Any = ray.remote(max_restarts=0, max_task_retries=0, **options)(actor_class)
        return remote.remote(*args)

    @property
    def num_peers(self) -> int:
        """Actors beside the first."""
        return len(self._peers)

    def where(self) -> Any:
        """Returns a reference to the place of the first actor, there once that is free."""
        return self._first.where.remote()

    def run(self, job: Job) -> Any:
        """Sends a job out; returns the first actor's stream."""
        run = self._first.run.options(num_returns="streaming")
        if not self._peers:
            return run.remote(job)
        self._num_jobs += 1
        seats = [
            Seat(str(self._num_jobs), rank, self._size.workers, self._size.gpus >= 1)
            for rank in range(self._size.workers)
        ]
        self._following = [
            peer.follow.remote(job, seat, self._place)
            for peer, seat in zip(self._peers, seats[1:], strict=True)
        ]
        return run.remote(job, seats[0])

    def cause(self, failure: Failure) -> Failure:
        """Returns what the first worker's failure is due to; see ``cause_among``."""
        return cause_among(self._following, failure)

    def lost_peer(self) -> Failure | None:
        """Returns what became of a peer whose process is gone."""
        gone = (_told(one) for one in _ended(self._following, 0.0) if isinstance(one, RayError))
        return next(gone, None)

    def end(self) -> None:
        """Ends all of them and gives their room back."""
        for actor in (self._first, *self._peers):
            with contextlib.suppress(RayError, ValueError):
                ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)


def cause_among(following: list[Any], failure: Failure) -> Failure:
    """Returns why a job failed: the first worker may only know that another has left.

    Args:
        following: References that end with the peers' part of the job.
        failure: What the first worker says.
    """
    if failure.kind != "infrastructure":
        return failure
    ended = [_told(outcome) for outcome in _ended(following, PATIENCE)]
    return next((one for one in ended if one and one.kind != failure.kind), failure)


def _ended(following: list[Any], timeout: float) -> list[Failure | RayError | None]:
    """Returns what came of the peers that have ended their part within some seconds."""
    if not following:
        return []
    outcomes: list[Failure | RayError | None] = []
    ready, _ = ray.wait(following, num_returns=len(following), timeout=timeout)
    for reference in ready:
        try:
            outcomes.append(ray.get(reference))
        except RayError as error:
            outcomes.append(error)
    return outcomes


def _told(outcome: Failure | RayError | None) -> Failure | None:
    if isinstance(outcome, OutOfMemoryError):
        return Failure("memory", describe_kill(str(outcome)))
    if isinstance(outcome, RayError):
        return Failure("infrastructure", f"a peer is gone: {last_line(outcome)}")
    return outcome


def last_line(error: Exception) -> str:
    """Returns the telling line of one of Ray's long messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, RayTaskError):
        return lines[-1]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _bundle(size: Resources) -> dict[str, float]:
    memory = (size.memory_mib or 0) * 2**20
    asked = {"CPU": size.cpus, "GPU": size.gpus, "memory": memory}
    return {name: amount for name, amount in asked.items() if amount}
