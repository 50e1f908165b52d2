"""What distillation adds to a step of fine-tuning: a forward of the dense model.

Steps of ``comp.finetune.train_step`` on blip-tiny-vqa and its questions, batch 32, with a teacher
and without one, by turns: of the dense model, and of one that has lost 60 % of its units and drops
tokens. Prints CPU time of one thread, medians of paired ratios with the lowest and highest.
"""

import argparse
import copy
import itertools
from collections.abc import Callable

import torch
from timing import interleaved, ratio_of

from comp.config import PruningConfig
from comp.distillation import Teacher
from comp.evaluation import measure_cost
from comp.finetune import make_optimizer, train_step
from comp.handle import PruningHandle
from comp.masks import UnitChoice, fade_
from comp.models import attach, load_model
from comp.modes import Stream
from comp.shrink import shrink_
from comp.tasks import build_task
from comp.tasks.base import Batch, Task

CONFIG = PruningConfig(distillation=1.0, device="cpu")
THRESHOLDS = {Stream.VISION: 0.8, Stream.TEXT: 0.5}


def prune_(handle: PruningHandle) -> None:
    """Removes 60 % of every group's units and lets tokens drop."""
    units = {name: list(range(round(0.6 * g.num_units))) for name, g in handle.groups.items()}
    fade_(handle, UnitChoice(units, 0.0, 0.0), 0.0)
    shrink_(handle)
    handle.thresholds = dict(THRESHOLDS)


def stepper(
    handle: PruningHandle, task: Task, batch: Batch, teacher: Teacher | None
) -> Callable[[], None]:
    """A training step of a copy of a model."""
    model = copy.deepcopy(handle.model).train()
    optimizer, batches = make_optimizer(model, CONFIG), itertools.repeat(batch)

    def step() -> None:
        train_step(model, task, batches, optimizer, CONFIG, teacher)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    loaded = load_model("blip-tiny-vqa")
    task = build_task("vqa", tokenizer=loaded.tokenizer, image_size=loaded.image_size)
    teacher = Teacher(loaded.model, task, CONFIG)
    batch = next(task.train_batches(batch_size=CONFIG.batch_size, seed=0))
    dense = 0.0
    for name in ("dense", "pruned"):
        handle = attach(copy.deepcopy(loaded.model))
        handle.stock_when_idle = False
        if name == "pruned":
            prune_(handle)
        macs = measure_cost(handle.model, task, [batch]).macs
        dense = dense or macs
        runs = {"with": stepper(handle, task, batch, teacher)}
        runs["without"] = stepper(handle, task, batch, None)
        times = interleaved(runs, rounds)
        ratio, low, high = ratio_of(times["with"], times["without"])
        plain = sorted(times["without"])[rounds // 2]
        print(
            f"{name}, FLOPs ratio {1 - macs / dense:.2f}: a step of {plain:.0f} ms takes "
            f"{ratio:.2f} times as long with a teacher ({low:.2f}-{high:.2f}, {rounds} rounds)"
        )


if __name__ == "__main__":
    main()
