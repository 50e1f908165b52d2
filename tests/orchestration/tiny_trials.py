"""Real prunings of a random tiny BLIP, seconds each, as a job's ``runner``."""

import copy
import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from comp.config import PruningConfig
from comp.models import LoadedModel
from comp.tasks.base import Batch
from orchestration import worker
from orchestration.job import Job, Record
from orchestration.store import RunDirectory
from tests.orchestration.trials import make_job
from tests.tiny import FAMILIES, TinyTask

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
CLOCKS = ("seconds", "latency_ms", "dense_latency_ms")


def make_tiny_job(directory: Path, **changes: object) -> Job:
    job = make_job(directory, config=CONFIG.to_dict(), task="tiny", **changes)
    return dataclasses.replace(job, runner="tests.orchestration.tiny_trials:prune_tiny")


@functools.cache
def loaded() -> LoadedModel:
    model = FAMILIES["blip-nlvr"].build(0)
    return LoadedModel(model, None, "tiny", "blip", "tiny", 32, {})


class MortalTask(TinyTask):
    """Kills its process at a training step if the file ``kill-<run id>`` says so.

    Args:
        order: The file; it holds the number of the step, counted in this process.
    """

    def __init__(self, order: Path) -> None:
        super().__init__(FAMILIES["blip-nlvr"], samples=16)
        self.order, self.steps = order, 0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.steps += 1
        if self.order.exists() and self.steps == int(self.order.read_text()):
            self.order.unlink()
            os.kill(os.getpid(), 9)
        return super().loss(model, batch)


def prune_tiny(job: Job, directory: RunDirectory) -> Iterator[Record]:
    torch.set_num_threads(1)
    task = MortalTask(Path(job.run_dir).parent / f"kill-{job.run_id}")
    work = worker.measure_dense if job.kind == "dense" else worker.prune_loaded
    yield from work(job, directory, copy.copy(loaded()), task)


def facts(records: tuple[Record, ...]) -> list[dict[str, object]]:
    """What must be equal between two runs: everything but clocks."""
    bodies = [record.body.to_dict() for record in records]
    return [{k: v for k, v in body.items() if k not in CLOCKS} for body in bodies]
