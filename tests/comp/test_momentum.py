"""The slow copy: it follows, shares masks and thresholds, shrinks along, resumes, is free."""

import dataclasses
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from comp.finetune import make_optimizer, train_step
from comp.handle import PruningHandle, handle_of
from comp.models import attach
from comp.modes import Stream
from comp.momentum import RATE, Momentum
from comp.pruner import Pruner
from comp.results import CurvePoint, StageRecord
from comp.shrink import shrink_
from comp.tasks.captions import CaptionedImage
from comp.tasks.encoders import encode_images
from comp.tasks.retrieval import ALPHA, RetrievalTask
from tests.comp.test_retrieval import tiny
from tests.tiny import CLOCKS, SMALL

CONFIG = dataclasses.replace(SMALL, ratios=(0.15, 0.25), min_vision_tokens=2, stage_quantum=0.1)
FAMILIES = pytest.mark.parametrize("family", ["clip", "blip"])


@pytest.fixture(scope="module")
def task(tokenizer: Any) -> RetrievalTask:
    pixels = 255 * torch.rand(24, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    samples = {
        split: [CaptionedImage(start + i, (f"a drawing {i}", f"the {i}"), i) for i in range(8)]
        for start, split in ((0, "train"), (8, "val"), (16, "test"))
    }
    return RetrievalTask(samples, lambda ids: pixels[list(ids)], tokenizer, queue=10, top=3)


def trained(task: RetrievalTask, model: nn.Module, steps: int) -> PruningHandle:
    handle = attach(model)
    handle.stock_when_idle = False
    optimizer = make_optimizer(model, CONFIG)
    batches = task.train_batches(batch_size=4, seed=0)
    model.train()
    for _ in range(steps):
        train_step(model, task, batches, optimizer, CONFIG)
    return handle


def weights(momentum: Momentum) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in momentum.tensors().items() if k.startswith("model.")}


def test_it_follows_with_a_rate_of_0_995(tokenizer: Any) -> None:
    model = tiny("clip", tokenizer)
    attach(model)
    momentum = Momentum(model, length=4, width=64)
    before = weights(momentum)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    momentum.follow(model)
    for name, value in weights(momentum).items():
        torch.testing.assert_close(value, before[name] + 1 - RATE)
    assert RATE == 0.995


@FAMILIES
def test_every_step_moves_it_once(task: RetrievalTask, tokenizer: Any, family: str) -> None:
    model = tiny(family, tokenizer)
    momentum = trained(task, model, 1).momentum
    assert momentum is not None
    before = weights(momentum)
    optimizer = make_optimizer(model, CONFIG)
    train_step(model, task, task.train_batches(batch_size=4, seed=1), optimizer, CONFIG)
    now = dict(model.named_parameters())
    for name, value in weights(momentum).items():
        mixed = RATE * before[name] + (1 - RATE) * now[name.removeprefix("model.")].detach()
        torch.testing.assert_close(value, mixed)


def test_the_queue_is_a_multiple_of_the_batch_and_drops_the_oldest(
    task: RetrievalTask, tokenizer: Any
) -> None:
    momentum = trained(task, tiny("clip", tokenizer), 3).momentum
    assert momentum is not None
    assert momentum.length == 8  # of the 10 that were asked for, with batches of 4
    ids = [one["image_id"] for one in islice(task.train_batches(batch_size=4, seed=0), 3)]
    assert momentum.queues()[2].tolist() == [*ids[2].tolist(), *ids[1].tolist()]
    assert momentum.seen == 12


def test_another_batch_size_is_refused(tokenizer: Any) -> None:
    model = tiny("clip", tokenizer)
    attach(model)
    momentum = Momentum(model, length=8, width=2)
    with pytest.raises(ValueError, match="queue of 8 samples is no multiple of a batch of 3"):
        momentum.remember(torch.ones(3, 2), torch.ones(3, 2), torch.arange(3))


def test_its_opinion_counts_from_nothing_to_0_4_over_the_first_epoch(
    task: RetrievalTask, tokenizer: Any
) -> None:
    model = tiny("clip", tokenizer)
    handle = trained(task, model, 1)
    batch = next(task.train_batches(batch_size=4, seed=0))
    found = []
    for _ in range(3):
        ids, mask = batch["input_ids"][:, 0], batch["attention_mask"][:, 0]
        found.append(task._candidates(model, batch, ids, mask, 64)[1])
    assert handle.momentum is not None
    assert found == [ALPHA / 2, ALPHA, ALPHA]


@FAMILIES
def test_momentum_copies_share_masks_and_thresholds(
    task: RetrievalTask, tokenizer: Any, family: str
) -> None:
    """Invariant: a slow copy of equal weights encodes as the masked model does."""
    model = tiny(family, tokenizer)
    handle = attach(model)
    momentum = Momentum(model, length=4, width=64)
    for name, group in handle.groups.items():
        handle.masks[name] = torch.ones(group.num_units)
        handle.masks[name][0] = 0.3
    handle.thresholds = {Stream.VISION: 0.9, Stream.TEXT: 0.9}
    pixels = next(task.batches("val", batch_size=4))["pixel_values"]
    with torch.no_grad():
        online = encode_images(model.eval(), pixels).features
    slow = momentum.encode(model, lambda m: encode_images(m, pixels).features)
    assert torch.equal(slow, online)
    handle.masks, handle.thresholds = {}, {}
    whole = momentum.encode(model, lambda m: encode_images(m, pixels).features)
    assert not torch.allclose(whole, online)


@FAMILIES
def test_shrinking_slices_the_copys_own_weights(
    task: RetrievalTask, tokenizer: Any, family: str
) -> None:
    model = tiny(family, tokenizer)
    handle = trained(task, model, 2)
    momentum = handle.momentum
    assert momentum is not None
    for name, group in handle.groups.items():
        mask = torch.ones(group.num_units)
        mask[0] = 0.0
        handle.masks[name] = mask
    pixels = next(task.batches("val", batch_size=4))["pixel_values"]
    masked = momentum.encode(model, lambda m: encode_images(m, pixels).features)
    shrink_(handle)
    shrunk = momentum.encode(model, lambda m: encode_images(m, pixels).features)
    torch.testing.assert_close(shrunk, masked, atol=1e-5, rtol=0)
    with torch.no_grad():
        online = encode_images(model.eval(), pixels).features
    assert not torch.equal(shrunk, online)  # its own weights, not the model's
    sizes = {k: v.shape for k, v in model.named_parameters()}
    assert {k.removeprefix("model."): v.shape for k, v in weights(momentum).items()} == sizes


def run(pruner: Pruner, stop: int | None = None) -> list[StageRecord | CurvePoint]:
    records = []
    for record in pruner.run():
        records.append(record)
        if len(records) == stop:
            break
    return records


def values(records: list[StageRecord | CurvePoint]) -> list[object]:
    return [{k: v for k, v in one.to_dict().items() if k not in CLOCKS} for one in records]


@FAMILIES
def test_a_resumed_run_equals_an_undisturbed_one(
    task: RetrievalTask, tokenizer: Any, family: str, tmp_path: Path
) -> None:
    whole = Pruner(tiny(family, tokenizer), task, CONFIG)
    undisturbed = run(whole)
    first = Pruner(tiny(family, tokenizer), task, CONFIG)
    run(first, stop=4)
    first.save(tmp_path)
    again = Pruner(tiny(family, tokenizer), task, CONFIG)
    again.restore(tmp_path)
    rest = run(again)
    assert values([*first.records[:4], *rest]) == values(undisturbed)
    for name, tensor in handle_of(whole.model).momentum.tensors().items():  # type: ignore[union-attr]
        assert torch.equal(tensor, handle_of(again.model).momentum.tensors()[name])  # type: ignore[union-attr]


def test_it_is_no_part_of_the_model(task: RetrievalTask, tokenizer: Any) -> None:
    model = tiny("clip", tokenizer)
    number = sum(parameter.numel() for parameter in model.parameters())
    names = set(model.state_dict())
    trained(task, model, 1)
    assert sum(parameter.numel() for parameter in model.parameters()) == number
    assert set(model.state_dict()) == names


def test_it_costs_nothing_in_the_measured_flops(task: RetrievalTask, tokenizer: Any) -> None:
    model = tiny("clip", tokenizer)
    handle = trained(task, model, 1)
    batch = next(task.train_batches(batch_size=4, seed=0))
    totals = []
    for mode in (True, False):  # in eval mode the slow copy does not run
        with handle.metering() as meter:
            task.loss(model.train(mode), batch)
        meter.num_samples = 4
        totals.append(meter.measurement(handle.groups.values(), handle.alive()))
    assert totals[0] == totals[1]


def test_a_finished_model_has_no_slow_copy(task: RetrievalTask, tokenizer: Any) -> None:
    pruner = Pruner(tiny("clip", tokenizer), task, CONFIG)
    run(pruner)
    assert pruner.finished_model is not None
    assert handle_of(pruner.finished_model).momentum is None
    assert handle_of(pruner.model).momentum is not None
