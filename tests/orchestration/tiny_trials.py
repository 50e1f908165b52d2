"""Real prunings of a random tiny BLIP, seconds each, as a job's ``runner``."""

import copy
import dataclasses
import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from comp.config import PruningConfig
from comp.models import LoadedModel
from comp.tasks.base import Batch
from orchestration import forks, worker
from orchestration.job import Fork, Job, Record, Suspended
from orchestration.store import RunDirectory
from tests.orchestration.trials import make_job
from tests.tiny import CLOCKS, FAMILIES, TinyTask

CONFIG = PruningConfig(
    ratios=(0.1, 0.2),
    num_stages=4,
    steps_per_stage=3,
    fine_tune_steps=2,
    batch_size=4,
    learning_rate=1e-3,
    eval_samples=8,
    eval_batch_size=8,
    test_samples=8,
    calibration_samples=4,
    probe_samples=4,
    quantum_cap=0.5,
    tolerance=0.02,
    min_channels=4,
)


def make_tiny_job(directory: Path, **changes: object) -> Job:
    own = {"config": CONFIG.to_dict(), "task": "tiny"} | changes
    runner = own.pop("runner", "prune_tiny")
    job = make_job(directory, **own)  # type: ignore[arg-type]
    return dataclasses.replace(job, runner=f"tests.orchestration.tiny_trials:{runner}")


@functools.cache
def loaded() -> LoadedModel:
    model = FAMILIES["blip-nlvr"].build(0)
    return LoadedModel(model, None, "tiny", "blip", "tiny", 32, {})


class MortalTask(TinyTask):
    """Kills its process at a training step if the file ``kill-<run id>`` says so.

    Every pass over the test split adds a line to the file ``reads`` beside it.

    Args:
        order: The file; it holds the number of the step, counted in this process.
    """

    def __init__(self, order: Path) -> None:
        super().__init__(FAMILIES["blip-nlvr"], samples=16)
        self.order, self.steps = order, 0

    def batches(
        self, split: str, *, batch_size: int, num_samples: int | None = None
    ) -> Iterator[Batch]:
        if split == "test":
            with self.order.with_name("reads").open("a") as reads:
                reads.write(f"{self.order.name}\n")
        yield from super().batches(split, batch_size=batch_size, num_samples=num_samples)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.steps += 1
        if self.order.exists() and self.steps == int(self.order.read_text()):
            self.order.unlink()
            os.kill(os.getpid(), 9)
        return super().loss(model, batch)


def order_for(job: Job, kind: str) -> Path:
    """The file beside a job's run that tells its task what to do."""
    trajectory = forks.trajectory_of(job) if job.kind == "fine_tune" else job.run_dir
    return Path(trajectory).parent / f"{kind}-{job.run_id}"


def prune_tiny(job: Job, directory: RunDirectory) -> Iterator[Record | Fork | Suspended]:
    torch.set_num_threads(1)
    task = MortalTask(order_for(job, "kill"))
    yield from worker.work_on(job, directory, copy.copy(loaded()), task)


def prune_while_the_first_fork_waits(
    job: Job, directory: RunDirectory
) -> Iterator[Record | Fork | Suspended]:
    """The fork of ratio 0.1 does nothing until its trajectory has reached ratio 0.2."""
    last = Path(forks.trajectory_of(job), "forks", "ratio-200", "snapshot")
    deadline = time.monotonic() + 120
    while job.ratio == 0.1 and not last.exists():
        if time.monotonic() > deadline:
            raise TimeoutError("the trajectory did not go on beside its fork")
        time.sleep(0.05)
    yield from prune_tiny(job, directory)


def prune_with_broken_forks(
    job: Job, directory: RunDirectory
) -> Iterator[Record | Fork | Suspended]:
    if job.kind == "fine_tune":
        raise FloatingPointError(f"the loss of the fork at {job.ratio} is nan")
    yield from prune_tiny(job, directory)


def prune_once_a_probe_has_ended(
    job: Job, directory: RunDirectory
) -> Iterator[Record | Fork | Suspended]:
    """The first stage waits until another worker has tried a mode; the file ``probed`` has all."""
    done = Path(forks.trajectory_of(job) if job.kind == "probe" else job.run_dir, "probed")
    deadline = time.monotonic() + 240
    for item in prune_tiny(job, directory):
        yield item
        while isinstance(item, Fork) and item.job.kind == "probe" and not done.exists():
            if time.monotonic() > deadline:
                raise TimeoutError("no other worker took a probe")
            time.sleep(0.05)
    if job.kind == "probe":
        done.write_text(str(os.getpid()))


def facts(records: tuple[Record, ...]) -> list[dict[str, object]]:
    """What must be equal between two runs: everything but clocks."""
    bodies = [record.body.to_dict() for record in records]
    return [{k: v for k, v in body.items() if k not in CLOCKS} for body in bodies]
