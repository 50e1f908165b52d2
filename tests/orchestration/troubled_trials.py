"""Real prunings of a random tiny model that a file beside the run gets into trouble."""

import contextlib
import copy
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from comp.tasks.base import Batch
from orchestration import worker
from orchestration.job import Fork, Job, Record, Suspended
from orchestration.store import RunDirectory
from tests.orchestration.tiny_trials import loaded, order_for
from tests.tiny import FAMILIES, TinyTask

MIB = 2**20
OVERRIDES = (
    "pruning={ratios: [0.1, 0.2], num_stages: 4, steps_per_stage: 3, fine_tune_steps: 2, "
    "batch_size: 4, learning_rate: 0.001, eval_samples: 8, eval_batch_size: 8, test_samples: 8, "
    "calibration_samples: 4, probe_samples: 4, quantum_cap: 0.5, tolerance: 0.02, "
    "min_channels: 4}",
    "objective={val_at: 0.2}",
)  # tiny_trials.CONFIG as parts of a study's spec
RUNNER = "tests.orchestration.troubled_trials:prune_troubled"


class TroubledTask(TinyTask):
    """Does at a training step what the file ``trouble-<run id>`` says.

    Args:
        order: ``"nan STEP"``: the loss is no number from that step on; ``"hungry MIB"``: each
            sample of a batch needs so much memory more, and 500 MiB are allowed.
    """

    def __init__(self, order: Path) -> None:
        super().__init__(FAMILIES["blip-nlvr"], samples=16)
        self.kind, _, number = (order.read_text() if order.exists() else "none 0").partition(" ")
        self.number, self.steps = int(number), 0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.steps += 1
        loss = super().loss(model, batch)
        if self.kind == "nan" and self.steps >= self.number:
            return loss * float("nan")
        if self.kind == "hungry":
            samples = len(next(iter(batch.values())))
            with memory_limit(500 * MIB):
                torch.empty(samples * self.number * MIB, dtype=torch.uint8)
        return loss


@contextlib.contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Lets this process have ``size`` bytes more than it has now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = psutil.Process().memory_info().vms + size
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def prune_troubled(job: Job, directory: RunDirectory) -> Iterator[Record | Fork | Suspended]:
    torch.set_num_threads(1)
    task = TroubledTask(order_for(job, "trouble"))
    yield from worker.work_on(job, directory, copy.copy(loaded()), task)


def trouble(runs: Path, run_id: str, what: str) -> None:
    """Plants a trouble for a run."""
    runs.mkdir(parents=True, exist_ok=True)
    (runs / f"trouble-{run_id}").write_text(what)
