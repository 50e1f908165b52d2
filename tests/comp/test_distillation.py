"""Distillation: the term and its gradient, what a teacher leaves alone, runs with and without."""

import copy
import dataclasses
import functools
import gc
import itertools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from comp.distillation import Teacher, divergence
from comp.finetune import make_optimizer, train_step
from comp.models import attach
from comp.pruner import Pruner, evaluate_dense
from comp.results import CurvePoint, Snapshot, StageRecord
from comp.tasks.base import Batch, Prediction
from tests.tiny import CLOCKS, FAMILIES, SMALL, TinyTask

NLVR = FAMILIES["blip-nlvr"]
CONFIG = dataclasses.replace(
    SMALL,
    ratios=(0.05,),
    stage_quantum=0.05,
    quantum_cap=0.3,
    fine_tune_checks=1,
    distillation=0.5,
    distillation_temperature=3.0,
)


class PredictingTiny(TinyTask):
    """The tiny task with its logits."""

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        logits = NLVR.outputs(model, batch)
        return Prediction(logits, torch.full((len(logits),), 1 / len(logits)))

    def loss_and_prediction(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Prediction]:
        said = self.predict(model, batch)
        return functional.cross_entropy(said.logits, batch["labels"]), said


TASK = PredictingTiny(NLVR)


def student() -> nn.Module:
    model = NLVR.build(1)
    attach(model).stock_when_idle = False
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_the_gradient_is_that_of_the_loss_written_out() -> None:
    dense, model, batch = NLVR.build(0), student(), NLVR.batch(4, 7)
    loss = Teacher(dense, TASK, CONFIG).loss(model, batch)
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    attach(dense).stock_when_idle = False
    with torch.no_grad():
        theirs = (NLVR.outputs(dense, batch) / 3).softmax(dim=1)
    ours = NLVR.outputs(model, batch)
    soft = (theirs * (theirs.log() - (ours / 3).softmax(dim=1).log())).sum(dim=1).mean()
    naive = functional.cross_entropy(ours, batch["labels"]) + 0.5 * 9 * soft
    naive.backward()
    torch.testing.assert_close(loss, naive)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_rows_count_by_their_weight() -> None:
    ours, theirs = torch.randn(3, 5), torch.randn(3, 5)
    shares = torch.tensor([0.5, 0.0, 2.0])
    whole = divergence(Prediction(ours, shares), Prediction(theirs, shares), 1.0)
    rows = [
        float(divergence(Prediction(ours[[i]], one), Prediction(theirs[[i]], one), 1.0))
        for i, one in enumerate(torch.ones(3, 1))
    ]
    assert float(whole) == pytest.approx(0.5 * rows[0] + 2 * rows[2])


def test_a_weight_of_zero_gives_the_digits_of_no_teacher() -> None:
    config = dataclasses.replace(CONFIG, distillation=0.0)
    teacher = Teacher(NLVR.build(0), TASK, config)
    states = []
    for given in (None, teacher):
        model = student()
        train_step(
            model, TASK, iter([NLVR.batch(4, 7)]), make_optimizer(model, config), config, given
        )
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_teacher_shares_the_dense_weights_and_leaves_the_model_alone() -> None:
    dense, model = NLVR.build(0), student()
    before = copy.deepcopy(dense.state_dict())
    teacher = Teacher(dense, TASK, CONFIG)
    optimizer = make_optimizer(model, CONFIG)
    batches = itertools.repeat(NLVR.batch(4, 7))
    for _ in range(2):
        train_step(model, TASK, batches, optimizer, CONFIG, teacher)
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())
    assert not hasattr(dense, "pruning")
    assert all(p.requires_grad and p.grad is None for p in dense.parameters())
    shared = zip(dense.parameters(), teacher._model.parameters(), strict=True)
    assert all(own.data_ptr() == other.data_ptr() for own, other in shared)


def test_a_task_without_predictions_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"task 'tiny' gives none; set distillation to 0, or"):
        Pruner(NLVR.build(0), TinyTask(NLVR), CONFIG)


@functools.cache
def run(**values: Any) -> tuple[list[StageRecord | CurvePoint], Pruner]:
    pruner = pruner_of(**values)
    return list(pruner.run()), pruner


def pruner_of(**values: Any) -> Pruner:
    config, dense = dataclasses.replace(CONFIG, **values), NLVR.build(0)
    return Pruner(NLVR.build(0), TASK, config, dense=dense_point(), dense_model=dense)


@functools.cache
def dense_point() -> CurvePoint:
    return evaluate_dense(NLVR.build(0), TASK, dataclasses.replace(CONFIG, distillation=0.0))


def figures(records: list[StageRecord | CurvePoint]) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.to_dict().items() if k not in CLOCKS} for r in records]


def weights_of(pruner: Pruner) -> list[Tensor]:
    assert pruner.finished_model is not None
    return list(pruner.finished_model.state_dict().values())


def test_fine_tuning_learns_from_the_dense_model_and_stages_do_not() -> None:
    with_it, one = run()
    without, other = run(distillation=0.0)
    assert figures(with_it)[:-1] == figures(without)[:-1]
    assert not all(map(torch.equal, weights_of(one), weights_of(other)))


def test_a_teacher_is_freed_after_the_fine_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    models = []

    class Watched(Teacher):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            models.append(weakref.ref(self._model))

    monkeypatch.setattr("comp.stages.Teacher", Watched)
    pruner = pruner_of(fine_tune_steps=0)
    gc.disable()
    try:
        assert [type(body) for body in pruner.run()][-1] is CurvePoint
    finally:
        gc.enable()
    assert [model() for model in models] == [None]


def test_stages_learn_from_it_if_asked() -> None:
    records = pruner_of(distill_stages=True).run()
    point, stage = next(records), next(records)
    plain = run()[0]
    assert figures([point]) == figures(plain[:1])
    assert isinstance(stage, StageRecord)
    assert isinstance(plain[1], StageRecord)
    assert stage.train_loss != plain[1].train_loss


def test_a_restored_snapshot_is_fine_tuned_alike(tmp_path: Path) -> None:
    """What a fork does: the dense model comes from its own pruner."""
    whole, pruner = run()
    first = pruner_of()
    for body in first.trajectory():
        if isinstance(body, Snapshot):
            first.save(tmp_path, optimizer=False)
    second = pruner_of()
    second.restore(tmp_path)
    assert figures([second.finish(0.05)]) == figures(whole[-1:])
    assert all(map(torch.equal, weights_of(second), weights_of(pruner)))
