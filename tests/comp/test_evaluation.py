"""Means over samples, whatever the batch size, and a model left as it was."""

import statistics

import pytest
import torch

from comp.evaluation import (
    batch_size_of,
    collect_statistics,
    evaluate,
    evaluating,
    measure_cost,
    resolve_device,
    to_device,
)
from comp.handle import PruningHandle
from comp.models import attach
from comp.modes import Stream
from comp.results import unpack_outcomes
from tests.tiny import FAMILIES, TinyFamily, TinyTask, random_masks


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> TinyFamily:
    return FAMILIES[request.param]


@pytest.fixture
def handle(family: TinyFamily) -> PruningHandle:
    handle = attach(family.build(0))
    handle.masks = random_masks(handle, soft=True)
    handle.thresholds = {Stream.VISION: 0.8, Stream.TEXT: 0.7}
    return handle


def test_results_do_not_depend_on_the_batch_size(
    family: TinyFamily, handle: PruningHandle
) -> None:
    task = TinyTask(family, samples=7)
    (one, one_cost), (other, other_cost) = (
        evaluate(handle.model, task, "val", batch_size=size) for size in (2, 7)
    )
    assert one.metric == pytest.approx(other.metric, abs=1e-3)
    assert one.loss == pytest.approx(other.loss, abs=1e-5)
    assert one.num_samples == other.num_samples == 7
    assert one_cost == other_cost


def test_the_metric_is_a_mean_in_points_of_100() -> None:
    family = FAMILIES["blip-nlvr"]
    task, model = TinyTask(family, samples=5), attach(family.build(0)).model
    verdict, _ = evaluate(model, task, "val", num_samples=3)
    with torch.no_grad():
        losses = family.losses(model, next(iter(task.batches("val", batch_size=3))))
    assert verdict.loss == pytest.approx(float(losses.mean()), abs=1e-5)
    assert verdict.metric == pytest.approx(100 * float((-losses).exp().mean()), abs=1e-3)
    assert verdict.num_samples == 3


def test_a_final_evaluation_keeps_what_every_sample_got() -> None:
    family = FAMILIES["blip-nlvr"]
    task, model = TinyTask(family, samples=5), attach(family.build(0)).model
    verdict, _ = evaluate(model, task, "val", final=True)
    outcomes = unpack_outcomes(verdict.outcomes)
    assert 100 * statistics.mean(outcomes) == pytest.approx(verdict.metric, abs=1e-4)
    assert len(outcomes) == 5
    assert evaluate(model, task, "val")[0].outcomes == ""


def test_an_empty_split_is_refused() -> None:
    family = FAMILIES["blip-nlvr"]
    task = TinyTask(family, samples=0)
    with pytest.raises(ValueError, match="split 'val' of task 'tiny' is empty"):
        evaluate(attach(family.build(0)).model, task, "val")


def test_a_model_that_is_not_attached_is_refused() -> None:
    family = FAMILIES["blip-nlvr"]
    with pytest.raises(ValueError, match="carries no pruning handle"):
        evaluate(family.build(0), TinyTask(family), "val")


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(training: bool) -> None:
    family = FAMILIES["blip-nlvr"]
    model = attach(family.build(0)).model.train(training)
    evaluate(model, TinyTask(family, samples=2), "val")
    assert model.training is training


def test_the_mode_is_restored_after_an_error() -> None:
    model = FAMILIES["blip-nlvr"].build(0).train()
    with pytest.raises(TypeError), evaluating(model):
        model(7)
    assert model.training


def test_measuring_the_cost_looks_at_the_same_passes(
    family: TinyFamily, handle: PruningHandle
) -> None:
    task = TinyTask(family, samples=6)
    _, cost = evaluate(handle.model, task, "val", batch_size=4)
    assert measure_cost(handle.model, task, task.batches("val", batch_size=4)) == cost


def test_statistics_come_with_the_cost_and_without_dropout(
    family: TinyFamily, handle: PruningHandle
) -> None:
    task = TinyTask(family, samples=6)
    handle.model.train()
    passes = [
        collect_statistics(handle, task, task.batches("val", batch_size=size)) for size in (6, 4)
    ]
    assert passes[0][1] == passes[1][1]
    assert passes[0][0].num_samples == 6
    for group, sums in passes[0][0].sums.items():
        torch.testing.assert_close(sums, passes[1][0].sums[group], rtol=1e-4, atol=1e-6)
    assert handle.model.training


def test_devices_are_found_by_name() -> None:
    assert resolve_device("cpu").type == "cpu"
    available = torch.accelerator.is_available()
    assert (resolve_device("auto").type == "cpu") is not available


@pytest.mark.parametrize("name", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"device '{name}' cannot be used here .*pass auto"):
        resolve_device(name)


def test_only_tensors_move() -> None:
    batch = to_device({"x": torch.ones(2), "name": "a"}, torch.device("meta"))
    assert batch["x"].device.type == "meta"
    assert batch["name"] == "a"


def test_the_batch_size_is_that_of_the_first_tensor() -> None:
    assert batch_size_of({"name": "a", "x": torch.ones(3, 2)}) == 3
