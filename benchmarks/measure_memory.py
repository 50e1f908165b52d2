"""Peak memory of pruning beside fine-tuning: BLIP-base NLVR2 at 112 px, batch 2, fresh processes.

Fine-tuning: AdamW steps of the stock model with clipped gradients, each followed by an evaluation
pass. Pruning: a whole ``Pruner`` run with steps and passes of the same batches: the dense model's
point with its latency, stages with calibration and probing, and at each of two ratios the
trajectory's copy fine-tuned and its latency taken beside the dense model's. Weights and images are
random; images are small, as activations are alike on both sides and would bring the ratio closer
to 1. On a CPU the peak is the process's resident set, mapped files included, on an accelerator
what torch allocated there. Rows go to benchmarks/results/memory-<machine>.parquet and .md, the
ratio to results/summary.json.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from speed_models import blip_inputs, blip_nlvr
from summary import Row, replace_rows, show
from timing import Table, device
from torch import Tensor, nn

from comp.config import PruningConfig
from comp.finetune import make_optimizer
from comp.pruner import Pruner
from comp.results import CurvePoint
from comp.tasks.base import ALONE, Batch, Shard

BATCH, SIZE = 2, 112
GOAL = 1.15
CONFIG = PruningConfig(
    ratios=(0.15, 0.3),
    stage_quantum=0.15,
    quantum_cap=1.0,
    steps_per_stage=2,
    fine_tune_steps=2,
    fine_tune_checks=2,
    batch_size=BATCH,
    eval_batch_size=BATCH,
    eval_samples=BATCH,
    test_samples=BATCH,
    calibration_samples=BATCH,
    probe_samples=BATCH,
)


class RandomPairs:
    """One batch of random image pairs and statements, again and again."""

    name = "random-pairs"
    metric_name = "accuracy"

    def __init__(self) -> None:
        labels = torch.arange(BATCH) % 2
        self.batch: Batch = {**blip_inputs(BATCH, SIZE), "labels": labels}

    def train_batches(
        self, *, batch_size: int, seed: int, start: int = 0, shard: Shard = ALONE
    ) -> Iterator[Batch]:
        while True:
            yield self.batch

    def batches(
        self, split: str, *, batch_size: int, num_samples: int | None = None
    ) -> Iterator[Batch]:
        yield self.batch

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss

    def score(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        right = (logits.argmax(-1) == batch["labels"]).float()
        return right, F.cross_entropy(logits, batch["labels"], reduction="none")


def fine_tune(model: Any) -> dict[str, Any]:
    """Steps of the stock model, as many as one of the pruning's fine-tunings has."""
    model = model.to(device())
    task = RandomPairs()
    batch = {name: value.to(device()) for name, value in task.batch.items()}
    optimizer = make_optimizer(model, CONFIG)
    for _ in range(CONFIG.fine_tune_steps):
        model.train()
        optimizer.zero_grad(set_to_none=True)
        task.loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CONFIG.max_grad_norm)
        optimizer.step()
        model.eval()
        with torch.no_grad():
            task.score(model, batch)
    return {"reached": 0.0, "points": ""}


def prune(model: Any) -> dict[str, Any]:
    """A whole run; ``points`` says how high the peak was after the dense model and each ratio."""
    pruner, peaks = Pruner(model, RandomPairs(), CONFIG), []
    for record in pruner.run():
        if isinstance(record, CurvePoint):
            peaks.append(f"{record.ratio_asked}: {peak_mib():.0f}")
    return {"reached": pruner.ratio, "points": ", ".join(peaks)}


def peak_mib() -> float:
    """The most memory that this process has taken so far."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


KINDS = {"fine-tuning": fine_tune, "pruning": prune}


def main() -> None:
    if len(sys.argv) > 1:
        torch.set_num_threads(1)
        found = KINDS[sys.argv[1]](blip_nlvr(SIZE))
        print(json.dumps({"kind": sys.argv[1], "peak_mib": peak_mib(), **found}))
        return
    table = Table("memory", ("kind",), ("kind", "peak_mib", "reached", "points"))
    peaks = {}
    for kind in KINDS:
        command = [sys.executable, __file__, kind]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(result.stdout.splitlines()[-1])
        table.add(found)
        peaks[kind] = found["peak_mib"]
    row = Row(
        figure="memory: peak of pruning over fine-tuning",
        value=round(peaks["pruning"] / peaks["fine-tuning"], 4),
        goal=GOAL,
        at_least=False,
        unit="x",
        how=(
            f"BLIP-base NLVR2, random weights, {SIZE} px, batch {BATCH}, fresh processes, a whole "
            f"run to ratios {CONFIG.ratios} with fine-tunings and latencies, "
            f"{peaks['pruning']:.0f} over {peaks['fine-tuning']:.0f} MiB, on {device().type}; "
            "benchmarks/measure_memory.py"
        ),
    )
    replace_rows([row])
    print(show([row]))


if __name__ == "__main__":
    main()
