"""Prunings of a random tiny LLaVA that two workers may share, as a job's ``runner``."""

import copy
import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from comp.models import LoadedModel
from comp.tasks.base import Batch
from comp.workers import Workers
from orchestration import worker
from orchestration.job import Fork, Job, Record, Suspended
from orchestration.store import RunDirectory
from tests.comp import shared_runs
from tests.orchestration.tiny_trials import order_for
from tests.orchestration.trials import make_job
from tests.tiny import FAMILIES, TinyTask

CONFIG = dataclasses.replace(
    shared_runs.CONFIG, ratios=(0.1,), eval_samples=4, test_samples=2, learning_rate=1e-4
)


def make_shared_job(directory: Path, **changes: object) -> Job:
    own = {"config": CONFIG.to_dict(), "task": "tiny", "sharded": True} | changes
    job = make_job(directory, **own)  # type: ignore[arg-type]
    return dataclasses.replace(job, runner="tests.orchestration.gang_trials:prune_shared")


@functools.cache
def loaded() -> LoadedModel:
    return LoadedModel(FAMILIES["llava"].build(0), None, "tiny", "llava", "tiny", 32, {})


class PeerTask(TinyTask):
    """Kills the second worker at a training step if the file ``peer-<run id>`` says so.

    Args:
        order: The file; it holds the number of the step, counted in parts of batches.
    """

    def __init__(self, order: Path) -> None:
        super().__init__(FAMILIES["llava"], samples=9)
        self.order, self.steps = order, 0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.steps += 1
        is_peer = Workers.here().rank == 1
        if is_peer and self.order.exists() and self.steps == int(self.order.read_text()):
            self.order.unlink()
            os.kill(os.getpid(), 9)
        return super().loss(model, batch)


def prune_shared(job: Job, directory: RunDirectory) -> Iterator[Record | Fork | Suspended]:
    torch.set_num_threads(1)
    task = PeerTask(order_for(job, "peer"))
    yield from worker.work_on(job, directory, copy.copy(loaded()), task)
