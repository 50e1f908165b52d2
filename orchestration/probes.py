"""Trials of modes that other workers take over from a trajectory, where there is room.

Before a stage that opens with trials, a trajectory names a probe for every mode but its first: a
job that restores the state before the stage, tries one mode, and leaves the cost in a file. The
trajectory itself tries one mode after the other that nobody has begun, and waits for the others a
bounded time; what has not come by then it tries as well. A trial's cost depends on the state and
the mode alone, so that it does not matter who tries.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from orchestration.job import Fork, Job
from orchestration.storage import Storage, join, parent
from orchestration.store import PROBES, RunDirectory

if TYPE_CHECKING:
    from comp.lookahead import TrialPlan
    from comp.pruner import Pruner
    from comp.stages import StageLoop

BEGUN, COST = "begun.json", "cost.json"
PATIENCE = 3.0  # times the own longest trial that another worker's may take
LOOK_EVERY = 0.05  # seconds


def announce(directory: RunDirectory, pruner: "Pruner") -> Iterator[Fork]:
    """Yields a fork for every trial of the next stage that another worker may take over.

    Args:
        directory: The trajectory's, with the pruner's state in it.
        pruner: Between two items of its trajectory.
    """
    ahead = pruner.trials_ahead
    if directory.job.fine_tune != "fork" or ahead is None or pruner.handle.workers.size > 1:
        return
    state = directory.latest_state_name()
    # The trajectory begins with the first, so the last is the one that it comes to last.
    for mode in reversed(ahead.modes[1:]):
        yield Fork(_probe_of(directory.job, state, mode, ahead.gap, ahead.steps))


def _probe_of(job: Job, state: str, mode: str, gap: float, steps: int) -> Job:
    return replace(
        job,
        run_id=f"{job.run_id}-{mode.replace('+', '.')}",
        run_dir=_place(job, state, mode),
        kind="probe",
        probe={"state": state, "mode": mode, "gap": gap, "steps": steps},
        attempt=0,
    )


def _place(job: Job, state: str, mode: str) -> str:
    return join(job.run_dir, PROBES, f"{state.rpartition('/')[2]}-{mode}")


def trajectory_of(probe: Job) -> str:
    """Returns the run directory that a probe's job belongs to."""
    return parent(probe.run_dir, 2)


def try_mode(job: Job, pruner: "Pruner") -> None:
    """Does a probe's job: leaves the cost of one trial for its trajectory, if that still runs.

    Args:
        job: The probe.
        pruner: At its beginning.

    Raises:
        FileNotFoundError: If the trajectory has gone on by much.
        NanLoss: If the loss stops being finite.
    """
    assert job.probe is not None
    trajectory, own = Storage(trajectory_of(job)), Storage(job.run_dir)
    with trajectory.tree(job.probe["state"]) as state:
        pruner.restore(state)
    begun = {"host": socket.gethostname(), "pid": os.getpid()}
    own.write(BEGUN, json.dumps(begun).encode(), durable=False)
    cost = _cost(pruner, job.probe["mode"], job.probe["gap"], job.probe["steps"])
    if not trajectory.exists("manifest.json"):
        own.write(COST, json.dumps({"cost": cost}).encode(), durable=False)


def _cost(loop: "StageLoop", mode: str, gap: float, steps: int) -> float | None:
    from comp.lookahead import trial_cost

    return trial_cost(loop, mode, gap, steps)


class SharedTrials:
    """Gives a stage the costs of its trials, whoever has tried (``StageLoop.trials``)."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory

    def __call__(self, loop: "StageLoop", plan: "TrialPlan") -> dict[str, float]:
        """Returns what ``comp.lookahead.trial_costs`` returns."""
        modes, gap, steps = plan
        state = self._directory.latest_state_name()
        places = {mode: Storage(_place(self._directory.job, state, mode)) for mode in modes}
        costs: dict[str, float | None] = {}
        longest = 0.0
        for mode in modes:
            if not places[mode].exists(BEGUN):
                began = time.monotonic()
                costs[mode] = _cost(loop, mode, gap, steps)
                longest = max(longest, time.monotonic() - began)
        deadline = time.monotonic() + PATIENCE * longest
        for mode in modes:
            if mode not in costs:
                found = _wait(places[mode], deadline)
                costs[mode] = found["cost"] if found else _cost(loop, mode, gap, steps)
        in_order = {mode: costs[mode] for mode in modes}
        return {mode: cost for mode, cost in in_order.items() if cost is not None}


def _wait(place: Storage, deadline: float) -> dict[str, Any] | None:
    """Returns what a probe has found; ``None`` if that does not come in time."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            found: dict[str, Any] = json.loads(place.read(COST))
            return found
        if time.monotonic() > deadline:
            return None
        time.sleep(LOOK_EVERY)
