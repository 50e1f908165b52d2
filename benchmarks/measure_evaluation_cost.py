"""What measuring a stage's cost r takes beside the stage's training.

Stages of blip-tiny-vqa with the proportions of the default config at a quarter of its size: as
many training samples to a validation sample. Both times are those that every stage records and
``report.json`` adds up (``train_seconds``, ``eval_seconds``); figures go to results/summary.json.
"""

import dataclasses
import os
import platform
import statistics

import torch
from summary import Row, replace_rows, show

from comp.config import PruningConfig
from comp.models import load_model
from comp.pruner import Pruner
from comp.results import StageRecord
from comp.tasks import build_task

GOAL = 0.15
PART = 4
STAGES = 4
DEFAULT = PruningConfig(device="cpu")
CONFIG = dataclasses.replace(
    DEFAULT,
    steps_per_stage=DEFAULT.steps_per_stage // PART,
    eval_samples=DEFAULT.eval_samples // PART,
    test_samples=64,
)


def main() -> None:
    torch.set_num_threads(1)
    loaded = load_model("blip-tiny-vqa")
    task = build_task("vqa", tokenizer=loaded.tokenizer, image_size=loaded.image_size)
    pruner = Pruner(loaded.model, task, CONFIG)
    for record in pruner.trajectory():
        if isinstance(record, StageRecord):
            share = record.eval_seconds / record.train_seconds
            print(
                f"stage {record.stage}, {record.mode}: {record.eval_seconds:.1f} s beside "
                f"{record.train_seconds:.1f} s, {share:.3f}",
                flush=True,
            )
        if len(pruner.stages) == STAGES:
            break
    shares = [stage.eval_seconds / stage.train_seconds for stage in pruner.stages]
    row = Row(
        figure="evaluation of a stage over its training",
        value=round(statistics.median(shares), 4),
        goal=GOAL,
        at_least=False,
        unit="x",
        how=(
            f"blip-tiny-vqa, median of {STAGES} stages ({min(shares):.3f}-{max(shares):.3f}) of "
            f"{CONFIG.steps_per_stage} steps of {CONFIG.batch_size} and {CONFIG.eval_samples} "
            f"validation samples, the proportions of the defaults, seed 0, clock, 1 thread, "
            f"{os.cpu_count()} cores shared with other work, {platform.machine()}; "
            "benchmarks/measure_evaluation_cost.py"
        ),
    )
    replace_rows([row])
    print(show([row]))


if __name__ == "__main__":
    main()
