"""Studies without models: trials of a closed-form curve, and an executor that interleaves them."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from comp.config import PruningConfig
from comp.results import CurvePoint, StageRecord
from orchestration import worker
from orchestration.executor import Event, Handle, accept
from orchestration.job import Failure, Job, Record
from orchestration.store import RunDirectory
from studies.spec import StudySpec
from studies.specfile import override, spec_of

DENSE_VAL = 80.0
RUNNER = "tests.studies.synthetic:prune"


def lost_points(config: PruningConfig, ratio: float) -> float:
    """Accuracy lost at a ratio: least at 12 stages and at an exploration of 0.25."""
    detour = abs(math.log(config.num_stages / 12)) + 4 * (config.exploration - 0.25) ** 2
    return 10 * ratio**2 * (1 + detour) + 0.01 * config.seed


def make_point(config: PruningConfig, ratio: float, *, method: str = "comp") -> CurvePoint:
    """The test accuracy points the other way, so that a study that reads it is found out."""
    val = DENSE_VAL - lost_points(config, ratio)
    return CurvePoint(
        model="blip-tiny-vqa",
        task="vqa",
        method=method,
        seed=config.seed,
        ratio_asked=ratio,
        ratio_reached=ratio,
        gmacs=100 * (1 - ratio),
        params=int(1e6 * (1 - ratio / 2)),
        val=val,
        test=100 - val,
        val_before_tuning=val - 1,
        latency_ms=20 * (1 - ratio / 2),
        dense_latency_ms=20.0,
        fine_tuned=10,
        test_ratio=ratio,
    )


def make_stage(stage: int, ratio: float, val: float) -> StageRecord:
    return StageRecord(
        stage=stage,
        mode="vision_params",
        choice="greedy",
        ratio=ratio,
        macs=1e9 * (1 - ratio),
        params=1000,
        val=val,
        val_loss=1.0,
        train_loss=1.0,
        cost=0.1,
        mode_cost=0.1,
        threshold=1.0,
        units=3,
        tokens={"vision": 16.0},
        seconds=0.01,
        snapshot=ratio,
    )


def bodies(job: Job) -> Iterator[StageRecord | CurvePoint]:
    """What a run of this job yields: a stage before every point, the dense point first."""
    config = job.pruning_config
    yield make_point(config, 0.0, method="dense")
    if job.kind == "dense":
        return
    for stage, ratio in enumerate(config.ratios, 1):
        point = make_point(config, ratio)
        yield make_stage(stage, ratio, point.val)
        yield point


def prune(job: Job, directory: RunDirectory) -> Iterator[Record]:
    """Runs a job, or fails as a file ``fail-<run id>`` beside its run directory says."""
    order = Path(job.run_dir).parent / f"fail-{job.run_id}"
    for index, body in enumerate(bodies(job)):
        if index == 2 and order.exists():
            raise FloatingPointError(order.read_text())
        if index >= len(directory.records):
            yield directory.append(body)


class SlotsExecutor:
    """Runs jobs side by side, one record of each in turn, with the real worker and run store.

    Attributes:
        submitted: Run ids in the order in which they came.
        computed: Records that were computed here, not replayed, by run id.
    """

    def __init__(self, num_slots: int, *, before_poll: Callable[[int], None] = lambda n: None):
        self._num_slots = num_slots
        self._streams: dict[Handle, Iterator[worker.Item]] = {}
        self._cancelled: set[Handle] = set()
        self._before_poll = before_poll
        self._polls = 0
        self.submitted: list[str] = []
        self.held: list[str] = []
        self.most_at_once = 0

    @property
    def num_slots(self) -> int:
        return self._num_slots

    @property
    def free_slots(self) -> int:
        return max(0, self._num_slots - len(self._streams))

    def submit(self, job: Job) -> Handle:
        handle = Handle(job)
        self._streams[handle] = worker.run(job)
        self.submitted.append(job.run_id)
        self.most_at_once = max(self.most_at_once, len(self._streams))
        return handle

    def poll(self, timeout: float) -> list[Event]:
        self._polls += 1
        self._before_poll(self._polls)
        events = []
        for handle, stream in list(self._streams.items()):
            if handle in self._cancelled:
                event = accept(handle, Failure("cancelled", "cancelled"))
            else:
                event = accept(handle, next(stream))
            events += [event] if event else []
            if handle.done:
                del self._streams[handle]
        return events

    def events(self) -> Iterator[Event]:
        while self._streams:
            yield from self.poll(0)

    def cancel(self, handle: Handle) -> None:
        self._cancelled.add(handle)

    @contextlib.contextmanager
    def hold(self, study: str) -> Iterator[None]:
        self.held.append(study)
        yield

    def close(self) -> None:
        self._streams.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def records_of(run_id: str, events: list[Event]) -> list[Record]:
    mine = [event for event in events if event.handle.job.run_id == run_id]
    return [event.body for event in mine if isinstance(event.body, Record)]


STUDY: dict[str, Any] = {
    "kind": "study",
    "name": "s",
    "model": "blip-tiny-vqa",
    "task": "vqa",
    "pruning": {"ratios": [0.5, 0.8], "num_stages": 10},
    "space": {
        "num_stages": {"kind": "int", "low": 4, "high": 40, "log": True},
        "exploration": {"kind": "float", "low": 0.0, "high": 0.5},
    },
    "objective": {"val_at": 0.8},
    "n_trials": 6,
    "parallel": 2,
    "sampler": {"seed": 1},
}


def make_spec(root: Path, *overrides: str) -> StudySpec:
    spec = spec_of(override({**STUDY, "root": str(root)}, overrides))
    assert isinstance(spec, StudySpec)
    return spec


def prune_to_nan(job: Job, directory: RunDirectory) -> Iterator[Record]:
    """Like ``prune``, but the validation of trial 1 is no number."""
    for body in bodies(job):
        broken = job.trial == 1 and body.val != DENSE_VAL
        yield directory.append(dataclasses.replace(body, val=math.nan) if broken else body)


def prune_slowly(job: Job, directory: RunDirectory) -> Iterator[Record]:
    """Like ``prune``, a fiftieth of a second a record."""
    for record in prune(job, directory):
        time.sleep(0.02)
        yield record


def prune_heavily(job: Job, directory: RunDirectory) -> Iterator[Record]:
    """Like ``prune``, with a checkpoint of 400 KB a record and a model of as much a point."""

    def save(target: Path) -> None:
        target.mkdir(parents=True)
        (target / "state.bin").write_bytes(bytes(400_000))

    for index, body in enumerate(bodies(job)):
        if index >= len(directory.records):
            models = {f"ratio-{index}": save} if isinstance(body, CurvePoint) else {}
            yield directory.append(body, save=save, models=models)


def prune_held(job: Job, directory: RunDirectory) -> Iterator[Record]:
    """Like ``prune``, but goes on behind record 2 only once no file ``hold-<run id>`` is there."""
    order = Path(job.run_dir).parent / f"hold-{job.run_id}"
    for record in prune(job, directory):
        yield record
        while record.index == 2 and order.exists():
            time.sleep(0.05)
