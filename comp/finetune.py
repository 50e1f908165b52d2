"""Training steps: the ones between raises and the fine-tuning after the shrink."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from comp.collectives import clip_gradients_, local, naming_the_lost
from comp.config import PruningConfig
from comp.cost import Measurement
from comp.distillation import Teacher
from comp.errors import NanLoss
from comp.evaluation import autocast, evaluate, to_device
from comp.handle import handle_of
from comp.madtp import LOSS_WEIGHT
from comp.parking import Parked, bytes_of, give_back
from comp.tasks.base import Batch, Evaluation, Task

RATIO_TOLERANCE = 0.005
"""A fine-tuned model may miss its FLOPs target by this share of the dense FLOPs."""


def make_optimizer(model: nn.Module, config: PruningConfig) -> torch.optim.AdamW:
    """AdamW over all trainable parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


def train_step(
    model: nn.Module,
    task: Task,
    batches: Iterator[Batch],
    optimizer: torch.optim.Optimizer,
    config: PruningConfig,
    teacher: Teacher | None = None,
) -> float:
    """Does one optimizer step; a loss that is not finite changes nothing.

    Args:
        model: An attached model in training mode.
        task: Gives the loss.
        batches: ``config.accumulate`` batches of ``config.part_size`` samples are taken from it,
            by each of several workers its share of them.
        optimizer: The optimizer.
        config: Accumulation, gradient clipping, autocast.
        teacher: The dense model, if its predictions are learnt from.

    Returns:
        The mean loss.
    """
    device, handle = next(model.parameters()).device, handle_of(model)
    workers, is_whole = handle.workers, handle.sharding is None
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for _ in range(config.accumulate // workers.size):
        cast = autocast(device, enabled=config.autocast, cached=is_whole)
        with naming_the_lost(amid_others=True), cast:
            batch = to_device(next(batches), device)
            loss = _loss(model, task, batch, teacher) / config.accumulate
        total += workers.sum(float(loss.detach()))
        if not math.isfinite(total):
            return total
        with naming_the_lost(amid_others=True):
            loss.backward()
    workers.sum_gradients_(model.parameters())
    clip_gradients_(list(model.parameters()), config.max_grad_norm)
    optimizer.step()
    if handle.momentum is not None:
        handle.momentum.follow(model)
    return total


def _loss(model: nn.Module, task: Task, batch: Batch, teacher: Teacher | None) -> Tensor:
    handle = handle_of(model)

    def compute() -> Tensor:
        loss = task.loss(model, batch) if teacher is None else teacher.loss(model, batch)
        alignment = handle.alignment
        return loss if alignment is None else loss + LOSS_WEIGHT * alignment.loss()

    return compute() if handle.sharding is None else handle.sharding.loss(compute)


def cosine(step: int, total: int, peak: float) -> float:
    """Learning rate of a cosine to zero at ``step`` of ``total``."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / max(total, 1)))


@dataclass(frozen=True)
class FineTuned:
    """What fine-tuning chose.

    Attributes:
        validation: Verdict on the validation subset of the chosen weights.
        cost: Their cost on the same samples.
        step: The step they are from.
    """

    validation: Evaluation
    cost: Measurement
    step: int


def fine_tune_(
    model: nn.Module,
    task: Task,
    config: PruningConfig,
    *,
    target_macs: float,
    dense_macs: float,
    batches: Iterable[Batch],
    teacher: Teacher | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> FineTuned:
    """Fine-tunes a shrunk model in place and keeps the best weights by validation.

    Token thresholds stay fixed while training and are rescaled by one common factor at each
    check if the measured FLOPs left the target by more than ``RATIO_TOLERANCE``.

    Args:
        model: A shrunk, attached model on its device.
        task: The task.
        config: Steps, learning rate, evaluation subset.
        target_macs: Mean multiply-adds per sample to stay at.
        dense_macs: The dense model's, which the tolerance is a share of.
        batches: Training batches of ``config.part_size`` samples.
        teacher: The dense model, if its predictions are learnt from.
        on_step: Called with step and loss.

    Returns:
        The chosen weights' verdict; the model holds those weights.

    Raises:
        NanLoss: If the loss stops being finite.
    """
    steps, checks = config.fine_tune_steps, config.fine_tune_checks
    peak = config.fine_tune_learning_rate or config.learning_rate
    optimizer = make_optimizer(model, config)
    due = {math.ceil(steps * i / checks) for i in range(1, checks + 1)} if steps else set()
    best: _Best | None = None
    stream = iter(batches)
    for step in range(steps + 1):
        if step in due or (steps == 0 and step == 0):
            optimizer.zero_grad(set_to_none=True)
            found = _check(model, task, config, target_macs, dense_macs, step)
            best = _better(model, best, found, target_macs, dense_macs)
        if step == steps:
            break
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, peak)
        loss = train_step(model, task, stream, optimizer, config, teacher)
        if not math.isfinite(loss):
            raise NanLoss(
                f"the fine-tuning loss became {loss} at step {step}; the pruned trajectory is "
                "intact; lower fine_tune_learning_rate",
                None,
            )
        if on_step is not None:
            on_step(step, loss)
    assert best is not None
    optimizer.state.clear()  # a dropped optimizer, being in cycles, keeps its moments for a while
    give_back(bytes_of(model.parameters()))
    _, chosen, state, thresholds = best
    for tensor, value in zip(_state_of(model), state.read(), strict=True):
        tensor.copy_(value)
    handle = handle_of(model)
    handle.thresholds = {s: thresholds[s.value] for s in handle.thresholds}
    model.eval()
    return chosen


_Best = tuple[tuple[bool, float], FineTuned, Parked, dict[str, float]]


def _state_of(model: nn.Module) -> list[Tensor]:
    return [local(tensor) for tensor in model.state_dict().values()]


def _better(
    model: nn.Module, best: "_Best | None", found: FineTuned, target: float, dense: float
) -> "_Best":
    within = abs(found.cost.macs - target) <= RATIO_TOLERANCE * dense
    key = (within, found.validation.metric)
    if best is not None and key <= best[0]:
        return best
    thresholds = {s.value: theta for s, theta in handle_of(model).thresholds.items()}
    return key, found, Parked(_state_of(model)), thresholds


def _check(
    model: nn.Module,
    task: Task,
    config: PruningConfig,
    target: float,
    dense: float,
    step: int,
    tries: int = 8,
) -> FineTuned:
    """Evaluates, and rescales the thresholds while the FLOPs are off target."""
    handle = handle_of(model)
    low, high = 0.0, math.inf
    factor, reach, base = 1.0, 2.0, dict(handle.thresholds)
    device = next(model.parameters()).device
    for attempt in range(tries):
        verdict, cost = evaluate(
            model,
            task,
            "val",
            batch_size=config.eval_batch_size,
            num_samples=config.eval_samples,
            device=device,
            mixed=config.autocast,
        )
        gap = (cost.macs - target) / dense
        if abs(gap) <= RATIO_TOLERANCE or not any(base.values()) or attempt == tries - 1:
            break
        low, high = (factor, high) if gap > 0 else (low, factor)
        if math.isfinite(high) and low > 0:
            factor = (low + high) / 2
        else:
            factor *= max(1 + reach * gap, 0.5)
            reach *= 2
        handle.thresholds = {stream: theta * factor for stream, theta in base.items()}
    return FineTuned(verdict, cost, step)
