"""What two workers do together in the tests; run as a program, this file is the second of them."""

import dataclasses
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from comp.collectives import local
from comp.config import PruningConfig
from comp.finetune import train_step
from comp.models import attach
from comp.pruner import Pruner
from comp.results import CurvePoint, StageRecord
from comp.upop import gradient_scores
from comp.workers import Workers
from tests.tiny import CLOCKS, FAMILIES, TinyTask

CONFIG = PruningConfig(
    ratios=(0.2,),
    stage_quantum=0.08,
    steps_per_stage=2,
    fine_tune_steps=2,
    fine_tune_checks=1,
    learning_rate=1e-3,
    batch_size=4,
    accumulate=2,
    min_channels=4,
    eval_samples=7,
    eval_batch_size=3,
    calibration_samples=5,
    probe_samples=2,
    test_samples=4,
    device="cpu",
)
TIMES = (*CLOCKS, "outcomes")
Records = list[StageRecord | CurvePoint]


def pruner(workers: Workers, family: str = "llava", **options: Any) -> Pruner:
    config = PruningConfig.from_dict(CONFIG.to_dict() | options)
    model = FAMILIES[family].build(workers.rank)  # the second one's weights are others at first
    return Pruner(model, TinyTask(FAMILIES[family], 9), config, workers=workers)


def prune(workers: Workers, **options: Any) -> Records:
    """Records of a run; several workers end it after a stage and take it up again."""
    first = pruner(workers, **options)
    if workers.size == 1:
        return list(first.run())
    for _ in zip(range(2), first.run(), strict=False):
        pass
    with tempfile.TemporaryDirectory() as directory:
        place = workers.first(directory)
        if workers.is_first:
            first.save(place)
        else:
            first.lend()
        workers.first(None)
        second = pruner(workers, **options)
        second.restore(place)
        workers.gather(None)
    return [*second.records, *second.run()]


def prune_in_shards(workers: Workers) -> Records:
    """As ``prune``; small steps, as Adam's first ones follow the rounding of tiny gradients."""
    sharded = dataclasses.replace(workers, sharded=True)
    options = {"ratios": (0.1,), "learning_rate": 1e-4, "gradient_checkpointing": True}
    return prune(sharded, **options)


def shares_held(workers: Workers) -> dict[str, float]:
    """Share of all weights, gradients and moments that this worker holds after a step."""
    own = pruner(dataclasses.replace(workers, sharded=True))
    config = own.config
    batches = own.task.train_batches(batch_size=config.part_size, seed=0, shard=workers.shard)
    own.model.train()
    train_step(own.model, own.task, batches, own.optimizer, config)
    used = list(own.optimizer.state)
    parts = {
        "weights": list(own.model.parameters()),
        "gradients": [p.grad for p in used],
        "moments": [v for s in own.optimizer.state.values() for v in s.values() if v.dim()],
    }
    return {
        name: sum(local(t).numel() for t in tensors) / sum(t.numel() for t in tensors)
        for name, tensors in parts.items()
    }


def search(workers: Workers) -> Records:
    """Records of UPop's search, which adds up gradients of masks."""
    options = {"method": "upop_sine", "num_stages": 2, "fine_tune_steps": 0}
    return list(pruner(workers, "clip", **options).run())


def gradients(workers: Workers) -> dict[str, torch.Tensor]:
    """Gradients of masks over more batches than the workers can share evenly."""
    family = FAMILIES["llava"]
    handle = attach(family.build(0))
    handle.workers = workers
    return gradient_scores(
        handle, TinyTask(family, 5), TinyTask(family, 5).batches("train", batch_size=2)
    )


RUNS: dict[str, Callable[[Workers], Any]] = {
    run.__name__: run for run in (prune, prune_in_shards, search, gradients)
}


def together(rank: int, meeting: Path) -> dict[str, Any]:
    """Does all of them as one of two processes that meet at a file."""
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    try:
        found = {name: run(Workers.here()) for name, run in RUNS.items()}
        return found | {"held": shares_held(Workers.here())}
    finally:
        distributed.destroy_process_group()


def assert_close(own: object, other: object) -> None:
    """Equal but for the rounding of sums, 1e-4 of the value, and for times."""
    if isinstance(own, StageRecord | CurvePoint):
        assert isinstance(other, type(own))
        for field in dataclasses.fields(own):
            if field.name not in TIMES:
                assert_close(getattr(own, field.name), getattr(other, field.name))
    elif isinstance(own, torch.Tensor):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    elif isinstance(own, dict):
        assert isinstance(other, dict)
        assert own.keys() == other.keys()
        for key, value in own.items():
            assert_close(value, other[key])
    elif isinstance(own, list | tuple):
        assert isinstance(other, list | tuple)
        for one, two in zip(own, other, strict=True):
            assert_close(one, two)
    elif isinstance(own, float):
        assert own == pytest.approx(other, rel=1e-4, abs=1e-4)
    else:
        assert own == other


if __name__ == "__main__":
    torch.set_num_threads(1)
    together(1, Path(sys.argv[1]))
