"""Measuring a model on a split: the task's metric, its loss, and what the passes cost."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from comp.cost import Measurement, Meter, joined_meters
from comp.handle import PruningHandle, handle_of
from comp.importance import ActivationStatistics
from comp.results import pack_outcomes
from comp.sharding import gathered
from comp.tasks.base import Batch, Evaluation, ReportingTask, SplitTask, Task
from comp.workers import Workers


def resolve_device(name: str) -> torch.device:
    """Returns the device a config names; ``auto`` takes the accelerator if there is one.

    Raises:
        ValueError: If the device does not exist here.
    """
    if name == "auto":
        if torch.accelerator.is_available():
            device = torch.accelerator.current_accelerator()
            assert device is not None
            return device
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}); pass auto") from error
    return device


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Moves a batch's tensors; other values stay."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def batch_size_of(batch: Batch) -> int:
    """Number of samples in a batch: the length of its first tensor."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients on whole weights; restores the mode."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        with torch.no_grad(), gathered(model):
            yield
    finally:
        if was_training:
            model.train()


def autocast(device: torch.device, *, enabled: bool, cached: bool = True) -> Any:
    """bfloat16 autocast on a device, or nothing.

    Args:
        device: The device.
        enabled: Whether to cast at all.
        cached: Whether the bfloat16 weights stay until the end.
    """
    kind = torch.bfloat16
    return torch.autocast(device.type, dtype=kind, enabled=enabled, cache_enabled=cached)


def evaluate(
    model: nn.Module,
    task: Task,
    split: str,
    *,
    batch_size: int = 64,
    num_samples: int | None = None,
    device: torch.device | None = None,
    mixed: bool = False,
    final: bool = False,
) -> tuple[Evaluation, Measurement]:
    """Evaluates an attached model and measures the same passes.

    Args:
        model: An attached model, already on ``device``.
        task: The task.
        split: Which split.
        batch_size: Samples per forward; results do not depend on it.
        num_samples: The first so many samples, or all.
        device: Where batches go; the CPU if ``None``.
        mixed: Run in bfloat16 autocast.
        final: Measure what papers report, too, where that is more than the stage loop needs; its
            passes are not part of the cost.

    Returns:
        The metric in points of 100 with the mean loss, and the cost.

    Raises:
        ValueError: If the split is empty.
    """
    handle = handle_of(model)
    device = device or torch.device("cpu")
    whole = task if isinstance(task, SplitTask) else None
    run = task.score if whole is None else whole.features
    parts: list[tuple[Tensor, ...]] = []
    with evaluating(model), handle.metering() as meter:
        batches = task.batches(split, batch_size=batch_size, num_samples=num_samples)
        for batch in handle.workers.own(batches):
            with autocast(device, enabled=mixed):
                parts.append(run(model, to_device(batch, device)))
            meter.num_samples += batch_size_of(batch)
        parts = _of_all(handle.workers, parts, device)
        if not parts:
            raise ValueError(f"split {split!r} of task {task.name!r} is empty")
        rows = [torch.cat(column) for column in zip(*parts, strict=True)]
        values, losses = rows if whole is None else whole.score_features(*rows)
        measured = _measurement(handle, meter)
    metric, loss = float(values.double().mean()), float(losses.double().mean())
    details: dict[str, float] = {}
    if final and isinstance(task, ReportingTask):
        again = task.batches(split, batch_size=batch_size, num_samples=num_samples)
        on_device = (to_device(batch, device) for batch in again)
        with evaluating(model), autocast(device, enabled=mixed):
            metric, details = task.report(model, on_device, *rows)
    is_mean = final and math.isclose(metric, float(values.double().mean()), abs_tol=1e-6)
    outcomes = pack_outcomes(values.tolist()) if is_mean else ""
    return Evaluation(100 * metric, loss, values.shape[0], details, outcomes), measured


def measure_cost(
    model: nn.Module, task: Task, batches: Iterable[Batch], *, mixed: bool = False
) -> Measurement:
    """Measures what the passes over some batches cost; labels are not looked at.

    Args:
        model: An attached model.
        task: Runs the forward pass.
        batches: Batches on the model's device.
        mixed: Run in bfloat16 autocast.
    """
    handle = handle_of(model)
    with evaluating(model), handle.metering() as meter:
        for batch in handle.workers.own(batches):
            device = next(v.device for v in batch.values() if isinstance(v, Tensor))
            with autocast(device, enabled=mixed):
                task.score(model, batch)
            meter.num_samples += batch_size_of(batch)
        return _measurement(handle, meter)


def _measurement(handle: PruningHandle, meter: Meter) -> Measurement:
    """What all workers have metered together."""
    if handle.workers.size > 1:
        meter = joined_meters(handle.workers.gather(meter.numbers()))
    return meter.measurement(handle.groups.values(), handle.alive())


def _of_all(
    workers: Workers, parts: list[tuple[Tensor, ...]], device: torch.device
) -> list[tuple[Tensor, ...]]:
    """The results of all batches, in their order, where each worker has those of its own."""
    if workers.size == 1:
        return parts
    sent = [tuple(column.cpu() for column in part) for part in parts]
    return [tuple(column.to(device) for column in part) for part in workers.in_turn(sent)]


def collect_statistics(
    handle: PruningHandle, task: Task, batches: Iterable[Batch], *, mixed: bool = False
) -> tuple[ActivationStatistics, Measurement]:
    """Collects activations (and the cost) over calibration batches, in eval mode.

    Args:
        handle: The handle of the model.
        task: Runs the forward pass.
        batches: Calibration batches on the model's device.
        mixed: Run in bfloat16 autocast.
    """
    with evaluating(handle.model), handle.metering() as meter, handle.collecting() as statistics:
        for batch in handle.workers.own(batches):
            device = next(v.device for v in batch.values() if isinstance(v, Tensor))
            with autocast(device, enabled=mixed):
                task.score(handle.model, batch)
            meter.num_samples += batch_size_of(batch)
        cost = _measurement(handle, meter)
        statistics.sums = handle.workers.sum_tensors(statistics.sums)
        statistics.num_samples = cost.num_samples
        return statistics, cost
