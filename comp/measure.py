"""Latency of the pruned model beside the dense one, measured interleaved in one process."""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from comp.evaluation import evaluating
from comp.tasks.base import Batch, Task


@dataclass(frozen=True)
class LatencyReport:
    """Latency of one batch.

    Attributes:
        dense_ms: Median latency of the dense model.
        pruned_ms: Median latency of the pruned model.
        speed_up: Median of the paired ratios dense / pruned.
        spread: Lower and upper quartile of the paired ratios.
        batch_size: Samples in the batch.
        repeats: Timed pairs.
        device: Device type.
    """

    dense_ms: float
    pruned_ms: float
    speed_up: float
    spread: tuple[float, float]
    batch_size: int
    repeats: int
    device: str

    def __str__(self) -> str:
        return (
            f"dense {self.dense_ms:.2f} ms, pruned {self.pruned_ms:.2f} ms, speed-up "
            f"{self.speed_up:.2f}x (quartiles {self.spread[0]:.2f}-{self.spread[1]:.2f}, "
            f"batch {self.batch_size}, {self.repeats} pairs, {self.device})"
        )


def compare_latency(
    dense: nn.Module,
    pruned: nn.Module,
    task: Task,
    batch: Batch,
    *,
    repeats: int = 20,
    warmup: int = 3,
) -> LatencyReport:
    """Times the task's scoring pass of both models in turn.

    Args:
        dense: The dense model, on the batch's device.
        pruned: The pruned model, on the same device; a model compared with itself is timed once
            a pair.
        task: Runs the pass that its metric needs.
        batch: One batch on the device.
        repeats: Timed pairs.
        warmup: Untimed pairs before them.

    Raises:
        ValueError: If ``repeats`` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, but got {repeats}")
    tensor = next(value for value in batch.values() if isinstance(value, Tensor))
    pairs = []
    with evaluating(dense), evaluating(pruned):
        for i in range(warmup + repeats):
            before = _time(dense, task, batch, tensor.device)
            after = before if pruned is dense else _time(pruned, task, batch, tensor.device)
            if i >= warmup:
                pairs.append((before, after))
    ratios = sorted(a / b for a, b in pairs)
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return LatencyReport(
        dense_ms=statistics.median(a for a, _ in pairs),
        pruned_ms=statistics.median(b for _, b in pairs),
        speed_up=statistics.median(ratios),
        spread=(quartiles[0], quartiles[2]),
        batch_size=tensor.shape[0],
        repeats=repeats,
        device=tensor.device.type,
    )


def _time(model: nn.Module, task: Task, batch: Batch, device: torch.device) -> float:
    """Milliseconds of one scoring pass, by device events where there are any."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        task.score(model, batch)
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end))
    begin = time.perf_counter()
    task.score(model, batch)
    return 1000 * (time.perf_counter() - begin)
