"""A pruner's state on disk: replaced whole or not at all, and refused where it does not belong."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from comp.config import PruningConfig
from comp.errors import CheckpointMismatch, NanLoss
from comp.pruner import Pruner, prune
from comp.results import CurvePoint, StageRecord
from comp.state import record_from_dict, record_to_dict
from comp.tasks.base import Batch
from tests.tiny import FAMILIES, TinyTask

CONFIG = PruningConfig(
    ratios=(0.3,),
    stage_quantum=0.05,
    steps_per_stage=1,
    learning_rate=1e-3,
    batch_size=2,
    min_channels=4,
    eval_samples=2,
    calibration_samples=2,
    probe_samples=2,
    device="cpu",
)
POINT = CurvePoint(
    model="tiny",
    task="tiny",
    method="dense",
    seed=0,
    ratio_asked=0.0,
    ratio_reached=0.0,
    gmacs=1.0,
    params=10,
    val=50.0,
    test=50.0,
    val_before_tuning=50.0,
    latency_ms=1.0,
    dense_latency_ms=1.0,
    fine_tuned=0,
    test_ratio=0.0,
)
STAGE = StageRecord(
    stage=1,
    mode="vision_params",
    choice="sweep",
    ratio=0.1,
    macs=9.0,
    params=9,
    val=50.0,
    val_loss=0.7,
    train_loss=0.7,
    cost=0.1,
    mode_cost=0.1,
    threshold=0.5,
    units=3,
    tokens={"vision": 17.0},
    seconds=1.0,
)


def fresh(family: str = "blip-nlvr", **values: Any) -> Pruner:
    config = dataclasses.replace(CONFIG, **values)
    chosen = FAMILIES[family]
    return Pruner(chosen.build(0), TinyTask(chosen, samples=4), config, dense=POINT)


@functools.cache
def started() -> Pruner:
    """A pruner after two stages; no test changes it."""
    pruner = fresh()
    stages = pruner.run()
    for _ in range(3):
        next(stages)
    return pruner


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    started().save(tmp_path / "state")
    return tmp_path / "state"


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_everything_comes_back(saved: Path) -> None:
    pruner, again = started(), fresh()
    again.restore(saved)
    assert again.records == pruner.records
    assert again.strategy.state() == pruner.strategy.state()
    assert again.handle.plan() == pruner.handle.plan()
    assert (again._step, again._macs, again._value) == (pruner._step, pruner._macs, pruner._value)
    assert again._cost == pruner._cost
    pairs = zip(again.model.named_parameters(), pruner.model.named_parameters(), strict=True)
    for (name, a), (other, b) in pairs:
        assert name == other
        assert torch.equal(a, b)
        for key, value in pruner.optimizer.state[b].items():
            assert torch.equal(again.optimizer.state[a][key], value)


def test_tied_weights_come_back_tied(tmp_path: Path) -> None:
    pruner = fresh("blip-caption")
    stages = pruner.run()
    for _ in range(2):
        next(stages)
    pruner.save(tmp_path / "state")
    again = fresh("blip-caption")
    again.restore(tmp_path / "state")
    decoder: Any = again.model.text_decoder
    words = decoder.bert.embeddings.word_embeddings.weight
    assert decoder.cls.predictions.decoder.weight is words
    assert again.optimizer.state[words]


def test_saving_again_replaces_the_state_and_its_files(saved: Path) -> None:
    started().save(saved)
    assert len(list(saved.iterdir())) == 2
    fresh().restore(saved)


@pytest.mark.parametrize("accident", ["write_tensors", "json.dumps", "Path.replace"])
def test_dying_while_saving_leaves_the_state_before(
    saved: Path, accident: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = fresh()
    next(iter(other.run()))

    def die(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"comp.state.{accident}", die)
    with pytest.raises(KeyboardInterrupt):
        other.save(saved)
    monkeypatch.undo()
    again = fresh()
    again.restore(saved)
    assert len(again.stages) == 2
    started().save(saved)
    assert len(list(saved.glob("tensors-*"))) == 1


def test_a_directory_without_a_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no state\.json; no stage was saved there"):
        fresh().restore(tmp_path)


def test_another_config_is_refused_by_the_names_of_what_differs(saved: Path) -> None:
    with pytest.raises(CheckpointMismatch, match=r"differs in exploration, learning_rate\)"):
        fresh(exploration=0.5, learning_rate=1e-4).restore(saved)


def test_another_version_is_refused(saved: Path) -> None:
    edit(saved / "state.json", version=99)
    with pytest.raises(CheckpointMismatch, match="has version 99, but this comp reads version 1"):
        fresh().restore(saved)


def test_a_pruner_that_has_begun_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointMismatch, match="can only be restored into a fresh pruner"):
        started().restore(saved)


def test_another_model_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointMismatch, match="was saved for a model of other widths"):
        fresh("blip-retrieval").restore(saved)


def test_weights_that_do_not_fit_are_refused(saved: Path) -> None:
    path = next(saved.glob("tensors-*"))
    tensors = load_file(path)
    del tensors["model.cls_head.0.bias"]
    save_file(tensors, path)
    with pytest.raises(CheckpointMismatch, match=r"does not fit the model: \['cls_head\.0\.bias'"):
        fresh().restore(saved)


@pytest.mark.parametrize(
    "record", [POINT, STAGE, dataclasses.replace(STAGE, threshold=-math.inf, snapshot=0.1)]
)
def test_records_survive_json(record: StageRecord | CurvePoint) -> None:
    text = json.dumps(record_to_dict(record), allow_nan=False)
    assert record_from_dict(json.loads(text)) == record


class FailingTask(TinyTask):
    """Its training loss stops being a number after so many good ones."""

    left = 10**9

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.left -= 1
        return super().loss(model, batch) * (math.nan if self.left < 0 else 1.0)


def test_prune_goes_on_after_the_last_good_stage_and_gives_the_model_again(tmp_path: Path) -> None:
    clip, config = FAMILIES["clip"], dataclasses.replace(CONFIG, ratios=(0.1,), fine_tune_steps=1)
    config = dataclasses.replace(config, modes=("vision_params",), test_samples=2)
    task, found = FailingTask(clip, samples=4), []
    task.left = 1
    with pytest.raises(NanLoss, match="stage 2, step 1"):
        prune(clip.build(0), task, config, directory=tmp_path)
    task.left = 10**9
    for directory in (None, tmp_path, tmp_path):  # at once, from stage 2 on, only the fine-tuning
        begin = task.left
        result = prune(clip.build(0), task, config, directory=directory)
        with torch.no_grad():
            found.append((clip.outputs(result.model, clip.batch(2, 0)), begin - task.left))
        assert result.points[-1].ratio_reached == pytest.approx(0.1, abs=0.02)
    (at_once, all_steps), (later, rest), (again, last) = found
    assert torch.equal(later, at_once)
    assert torch.equal(again, at_once)
    assert (all_steps - rest, last) == (1, config.fine_tune_steps)
