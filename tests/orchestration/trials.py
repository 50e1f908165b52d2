"""Trials that need no model: what a job's ``runner`` may be instead of a pruning."""

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

from comp.config import PruningConfig
from comp.results import CurvePoint, StageRecord
from orchestration.job import Job, Record
from orchestration.store import RunDirectory

CONFIG = PruningConfig(ratios=(0.25, 0.5), num_stages=4)


def make_job(
    directory: Path, *, run: str = "s-0000", runner: str = "walk", **changes: object
) -> Job:
    """A job for one of the trials below in ``directory / run``."""
    values = {
        "run_id": run,
        "study": "s",
        "trial": int(run.rpartition("-")[2]),
        "model": "none",
        "task": "vqa",
        "config": CONFIG.to_dict(),
        "seed": 0,
        "method": "comp",
        "run_dir": str(directory / run),
        "spec_text": "name: s\n",
        "runner": f"tests.orchestration.trials:{runner}",
    }
    return Job(**(values | changes))  # type: ignore[arg-type]


def make_point(ratio: float, **changes: object) -> CurvePoint:
    values = {
        "model": "none",
        "task": "vqa",
        "method": "comp" if ratio else "dense",
        "seed": 0,
        "ratio_asked": ratio,
        "ratio_reached": ratio,
        "gmacs": 1.0 - ratio,
        "params": 1000,
        "val": 80.0 - 10 * ratio,
        "test": 79.0 - 10 * ratio,
        "val_before_tuning": 70.0,
        "latency_ms": 4.0 - ratio,
        "dense_latency_ms": 4.0,
        "fine_tuned": 10,
        "test_ratio": ratio,
    }
    return CurvePoint(**(values | changes))  # type: ignore[arg-type]


def make_stage(stage: int, *, snapshot: float | None = None, draw: float = 0.5) -> StageRecord:
    return StageRecord(
        stage=stage,
        mode="vision_tokens" if stage % 2 else "vision_params",
        choice="greedy",
        ratio=stage / 8,
        macs=1e6 * (1 - stage / 8),
        params=1000 - stage,
        val=80.0 - stage,
        val_loss=draw,
        train_loss=0.4,
        cost=0.1,
        mode_cost=0.2,
        threshold=1.5,
        units=3,
        tokens={"vision": 16.0, "text": 8.0},
        seconds=0.01,
        snapshot=snapshot,
    )


def walk(job: Job, directory: RunDirectory) -> Iterator[Record]:
    """Four stages and three points whose numbers come from a random walk.

    The walk's state goes through the checkpoints, so only an exact resume gives the same numbers.
    """
    generator = random.Random(job.seed)
    if directory.records:
        with directory.latest_state() as state:
            generator = _load(state)
    bodies = [0.0, 1, 2, 0.25, 3, 4, 0.5]
    for body in bodies[len(directory.records) :]:
        _disturb(job, len(directory.records))
        draw = generator.random()

        def save(target: Path) -> None:
            target.mkdir(parents=True)
            (target / "state.txt").write_text(repr(generator.getstate()))

        if isinstance(body, float):
            models = {f"ratio-{body * 1000:03.0f}": save} if body else None
            yield directory.append(make_point(body, val=draw), save=save, models=models)
        else:
            snapshot = {2: 0.25, 4: 0.5}.get(body)
            stage = make_stage(body, snapshot=snapshot, draw=draw)
            yield directory.append(stage, save=save)


def _load(state: Path) -> random.Random:
    import ast

    generator = random.Random()
    generator.setstate(ast.literal_eval((state / "state.txt").read_text()))
    return generator


def _disturb(job: Job, index: int) -> None:
    """Does at a given record what the file ``disturb-<run id>`` beside the run asks for."""
    order = Path(job.run_dir).parent / f"disturb-{job.run_id}"
    if not order.exists():
        return
    what, _, at = order.read_text().partition(" ")
    if index != int(at):
        return
    if what != "always-die":
        order.unlink()
    if what in ("die", "always-die"):
        os.kill(os.getpid(), 9)
    elif what == "hang":
        time.sleep(3600)
    elif what == "nap":
        time.sleep(1)
    elif what == "raise":
        raise FloatingPointError("loss is nan in stage 3; lower the learning rate")


def disturb(directory: Path, run: str, what: str, at: int) -> None:
    """Plants an accident for the trial ``run`` before its record number ``at``."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"disturb-{run}").write_text(f"{what} {at}")


def noop(job: Job, directory: RunDirectory) -> Iterator[Record]:
    """Five records that cost nothing."""
    for stage in range(len(directory.records) + 1, 6):
        yield directory.append(make_stage(stage))


def nap(job: Job, directory: RunDirectory) -> Iterator[Record]:
    """A record after a fifth of a second."""
    time.sleep(0.2)
    yield directory.append(make_stage(1))


_leaked: list[bytearray] = []


def leak(job: Job, directory: RunDirectory) -> Iterator[Record]:
    """A record, and 32 MiB that stay behind in the process."""
    block = bytearray(32 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    _leaked.append(block)
    yield directory.append(make_stage(1))


def numbers(records: list[Record] | tuple[Record, ...]) -> list[dict[str, object]]:
    """What must be equal between a disturbed and an undisturbed run: all but clocks."""
    return [record.body.to_dict() for record in records]
