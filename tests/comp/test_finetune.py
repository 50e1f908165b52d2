"""Training steps, and the fine-tuning that keeps the best weights at the asked FLOPs."""

import copy
import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from comp import finetune
from comp.config import PruningConfig
from comp.errors import NanLoss
from comp.evaluation import evaluate
from comp.finetune import (
    RATIO_TOLERANCE,
    FineTuned,
    cosine,
    fine_tune_,
    make_optimizer,
    train_step,
)
from comp.handle import PruningHandle, handle_of
from comp.models import attach
from comp.modes import Stream
from comp.shrink import shrink_
from comp.tasks.base import Batch
from tests.tiny import FAMILIES, TinyTask, random_masks

NLVR = FAMILIES["blip-nlvr"]
CONFIG = PruningConfig(
    fine_tune_steps=4,
    learning_rate=1e-3,
    batch_size=4,
    eval_samples=16,
    eval_batch_size=16,
    device="cpu",
)


@pytest.fixture
def task() -> TinyTask:
    return TinyTask(NLVR)


@pytest.fixture
def pruned() -> PruningHandle:
    """A shrunk model that drops tokens."""
    handle = attach(NLVR.build(0))
    handle.masks = random_masks(handle)
    shrink_(handle)
    handle.thresholds = {Stream.VISION: 0.6, Stream.TEXT: 0.4}
    return handle


def macs_of(model: nn.Module, task: TinyTask) -> float:
    return evaluate(model, task, "val", batch_size=16, num_samples=16)[1].macs


def tune(
    handle: PruningHandle, task: TinyTask, *, target: float | None = None, **values: Any
) -> FineTuned:
    config = dataclasses.replace(CONFIG, **values)
    dense = macs_of(attach(NLVR.build(0)).model, task)
    return fine_tune_(
        handle.model,
        task,
        config,
        target_macs=macs_of(handle.model, task) if target is None else target * dense,
        dense_macs=dense,
        batches=task.train_batches(batch_size=config.batch_size, seed=1),
    )


def test_the_learning_rate_is_a_cosine_to_zero() -> None:
    rates = [cosine(step, 4, 2.0) for step in range(5)]
    assert rates == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0.0])


def test_the_optimizer_takes_what_is_trainable() -> None:
    model = NLVR.build(0)
    frozen = next(model.parameters()).requires_grad_(False)
    held = [p for group in make_optimizer(model, CONFIG).param_groups for p in group["params"]]
    assert frozen not in set(held)
    assert len(held) == len(list(model.parameters())) - 1


def test_a_step_lowers_the_loss_of_its_batch(task: TinyTask) -> None:
    model = attach(NLVR.build(0)).model
    optimizer = make_optimizer(model, CONFIG)
    batch = next(task.train_batches(batch_size=8, seed=0))
    losses = [
        train_step(model, task, itertools.repeat(batch), optimizer, CONFIG) for _ in range(5)
    ]
    assert losses[-1] < losses[0]


def test_gradients_are_clipped(task: TinyTask) -> None:
    model = attach(NLVR.build(0)).model
    config = dataclasses.replace(CONFIG, max_grad_norm=1e-3)
    batch = next(task.train_batches(batch_size=8, seed=0))
    train_step(model, task, iter([batch]), make_optimizer(model, config), config)
    norm = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    assert math.sqrt(norm) <= 1.001e-3


def test_moments_are_freed_without_the_garbage_collector(
    pruned: PruningHandle, task: TinyTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.optim.Optimizer] = []

    def remembered(*args: Any) -> torch.optim.AdamW:
        optimizer = make_optimizer(*args)
        made.append(optimizer)
        return optimizer

    monkeypatch.setattr(finetune, "make_optimizer", remembered)
    tune(pruned, task, fine_tune_steps=1)
    assert len(made) == 1
    assert not made[0].state


class NanTask(TinyTask):
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return super().loss(model, batch) * math.nan


def test_a_loss_that_is_no_number_changes_nothing() -> None:
    model = attach(NLVR.build(0)).model
    before = copy.deepcopy(model.state_dict())
    task = NanTask(NLVR)
    batch = next(task.train_batches(batch_size=4, seed=0))
    assert math.isnan(
        train_step(model, task, itertools.repeat(batch), make_optimizer(model, CONFIG), CONFIG)
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_fine_tuning_stops_at_a_loss_that_is_no_number(pruned: PruningHandle) -> None:
    with pytest.raises(NanLoss, match=r"loss became nan at step 0; .*lower fine_tune_learn"):
        tune(pruned, NanTask(NLVR))


def test_the_verdict_is_that_of_the_weights_that_are_left(
    pruned: PruningHandle, task: TinyTask
) -> None:
    tuned = tune(pruned, task, learning_rate=0.05)
    again, cost = evaluate(pruned.model, task, "val", batch_size=16, num_samples=16)
    assert again == tuned.validation
    assert cost == tuned.cost
    assert not pruned.model.training


def test_the_best_check_by_validation_wins(pruned: PruningHandle, task: TinyTask) -> None:
    """A learning rate that wrecks the model makes the last check worse than an earlier one."""
    spoilt = copy.deepcopy(pruned.model)
    tuned = tune(pruned, task, learning_rate=0.2)
    assert tuned.step < 4
    optimizer = make_optimizer(spoilt, dataclasses.replace(CONFIG, learning_rate=0.2))
    for batch in itertools.islice(task.train_batches(batch_size=4, seed=1), 4):
        train_step(spoilt, task, iter([batch]), optimizer, CONFIG)
    last, _ = evaluate(spoilt, task, "val", batch_size=16, num_samples=16)
    assert tuned.validation.metric > last.metric


def test_no_steps_only_evaluate(pruned: PruningHandle, task: TinyTask) -> None:
    before = copy.deepcopy(pruned.model.state_dict())
    tuned = tune(pruned, task, fine_tune_steps=0)
    assert tuned.step == 0
    state = pruned.model.state_dict()
    assert all(torch.equal(before[name], value) for name, value in state.items())


@pytest.mark.parametrize("change", [-0.03, 0.04])
def test_one_factor_on_all_thresholds_brings_the_flops_back(
    pruned: PruningHandle, task: TinyTask, change: float
) -> None:
    dense = macs_of(attach(NLVR.build(0)).model, task)
    target = macs_of(pruned.model, task) / dense + change
    tuned = tune(pruned, task, target=target, fine_tune_steps=0)
    assert abs(tuned.cost.macs / dense - target) <= RATIO_TOLERANCE
    thresholds = handle_of(pruned.model).thresholds
    assert (thresholds[Stream.VISION] > 0.6) is (change < 0)
    assert thresholds[Stream.VISION] / 0.6 == pytest.approx(thresholds[Stream.TEXT] / 0.4)


def test_thresholds_stay_when_the_flops_are_right(pruned: PruningHandle, task: TinyTask) -> None:
    tune(pruned, task, fine_tune_steps=0)
    assert pruned.thresholds == {Stream.VISION: 0.6, Stream.TEXT: 0.4}


def test_without_token_pruning_nothing_is_rescaled(task: TinyTask) -> None:
    handle = attach(NLVR.build(0))
    handle.thresholds = {}
    tune(handle, task, target=0.5, fine_tune_steps=0)
    assert handle.thresholds == {}


def test_progress_is_told_step_by_step(pruned: PruningHandle, task: TinyTask) -> None:
    seen: list[tuple[int, float]] = []
    dense = macs_of(pruned.model, task)
    fine_tune_(
        pruned.model,
        task,
        CONFIG,
        target_macs=dense,
        dense_macs=dense,
        batches=task.train_batches(batch_size=4, seed=0),
        on_step=lambda step, loss: seen.append((step, loss)),
    )
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert all(math.isfinite(loss) for _, loss in seen)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_a_batch_in_parts_gives_the_gradient_of_the_mean_over_the_parts(task: TinyTask) -> None:
    config = dataclasses.replace(CONFIG, accumulate=2, max_grad_norm=1e9, learning_rate=0.0)
    parts = [NLVR.batch(2, 1), NLVR.batch(2, 2)]
    model = NLVR.build(0).eval()
    attach(model).stock_when_idle = False
    loss = train_step(model, task, iter(parts), make_optimizer(model, config), config)
    found = gradients_of(model)
    model.zero_grad()
    mean = sum(task.loss(model, part) for part in parts) / 2
    assert isinstance(mean, Tensor)
    mean.backward()
    assert loss == pytest.approx(float(mean.detach()), rel=1e-6)
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(family: Any) -> None:
    """With tokens dropping and masks fading, which the second pass has to repeat exactly."""
    task, batch, found = TinyTask(family), family.batch(4, 3), []
    for recompute in (False, True):
        model = family.build(0).train()
        handle = attach(model)
        handle.stock_when_idle, handle.recompute, handle.drop_path = False, recompute, 0.5
        handle.masks = {name: mask * 0.5 + 0.5 for name, mask in random_masks(handle).items()}
        handle.thresholds = {stream: 0.4 for stream in Stream}
        torch.manual_seed(5)
        loss = task.loss(model, batch)
        loss.backward()
        found.append((loss.detach(), gradients_of(model)))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name])


def test_gradient_checkpointing_runs_every_block_again_in_the_backward_pass() -> None:
    model = NLVR.build(0).train()
    handle = attach(model)
    handle.stock_when_idle, handle.recompute = False, True
    calls = []
    norm: Any = handle.structure.encoders["vision"][0].attention_wrap.before
    norm.register_forward_hook(lambda *_: calls.append(1))
    loss = TinyTask(NLVR).loss(model, NLVR.batch(2, 0))
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2
