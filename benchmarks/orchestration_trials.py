"""What the workers of measure_orchestration.py run; importable there, so in a file of its own."""

import gc
import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from comp.results import CurvePoint, StageRecord
from orchestration import worker
from orchestration.forks import trajectory_of
from orchestration.job import Fork, Job, Record, Suspended
from orchestration.ray_actor import own_memory_mib
from orchestration.store import RunDirectory

RECORDS = 5


def point(job: Job, ratio: float) -> CurvePoint:
    """A point whose value is a smooth function of the trial's exploration."""
    val = 80.0 - 10 * ratio * (1 + (job.config["exploration"] - 0.25) ** 2)
    return CurvePoint(
        model="none",
        task="vqa",
        method="comp" if ratio else "dense",
        seed=job.seed,
        ratio_asked=ratio,
        ratio_reached=ratio,
        gmacs=1.0 - ratio,
        params=1000,
        val=val,
        test=val,
        val_before_tuning=val,
        latency_ms=1.0,
        dense_latency_ms=1.0,
        fine_tuned=0,
        test_ratio=ratio,
    )


def noop(job: Job, directory: RunDirectory) -> Iterator[Record]:
    """The dense point, three stages and a point, none of which costs anything."""
    bodies: list[StageRecord | CurvePoint] = [point(job, 0.0)]
    if job.kind != "dense":
        bodies += [_stage(index) for index in range(1, RECORDS - 1)]
        bodies.append(point(job, 0.5))
    for body in bodies[len(directory.records) :]:
        yield directory.append(body)


def _stage(index: int) -> StageRecord:
    return StageRecord(
        stage=index,
        mode="vision_params",
        choice="greedy",
        ratio=index / 8,
        macs=1e6,
        params=1000,
        val=80.0,
        val_loss=0.5,
        train_loss=0.4,
        cost=0.1,
        mode_cost=0.2,
        threshold=1.5,
        units=3,
        tokens={"vision": 16.0},
        seconds=0.0,
        snapshot=0.5 if index == RECORDS - 2 else None,
    )


def timed_prune(job: Job, directory: RunDirectory) -> Iterator[Record | Fork | Suspended]:
    """A real pruning, or a fork of one, that notes from when to when it was at work."""
    begin = time.time()
    run_dir = trajectory_of(job) if job.kind == "fine_tune" else job.run_dir
    note = Path(run_dir).parent / f"busy-{job.run_id}-{uuid.uuid4().hex}.json"
    try:
        yield from worker.prune(job, directory)
    finally:  # nobody takes more of one that waits for its forks
        note.write_text(json.dumps([begin, time.time()]))


def warm_prune(job: Job, directory: RunDirectory) -> Iterator[Record | Fork | Suspended]:
    """A real pruning that notes when it is ready to train, and what its process keeps after it."""
    loaded, task = worker.load(job.model, job.task, job.data)
    worker.new_pruner(job, loaded, task)
    ready = time.time()
    gc.collect()
    yield from worker.prune(job, directory)
    note = {"ready": ready, "memory": own_memory_mib(), "pid": os.getpid()}
    Path(job.run_dir).with_name(f"warm-{job.run_id}.json").write_text(json.dumps(note))


def sleeping(job: Job, directory: RunDirectory) -> Iterator[Record]:
    """The same records a second apart: to the driver it looks as if a GPU worked between them."""
    records = noop(job, directory)
    for _ in range(RECORDS):
        time.sleep(1.0)
        yield next(records)
