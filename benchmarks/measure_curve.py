"""A whole curve from one trajectory, against a run of its own for every ratio.

Prunes blip-tiny-vqa through five ratios at once and to each of them alone, one thread, each run in
the same process one after the other, and compares processor time, which other work on the machine
does not stretch as it does a clock. The steps have the paper's proportions at a hundredth of its
scale: stages of equal FLOPs in all runs, four times as many pruning steps on the way to the last
ratio as fine-tuning steps a ratio. Figures go to results/summary.json.
"""

import copy
import dataclasses
import os
import platform
import time

import torch
from summary import Row, replace_rows, show

from comp.config import PruningConfig
from comp.models import LoadedModel, load_model
from comp.pruner import prune
from comp.results import CurvePoint
from comp.tasks import build_task
from comp.tasks.base import Task

RATIOS = (0.4, 0.5, 0.6, 0.7, 0.8)
CONFIG = PruningConfig(
    ratios=RATIOS,
    stage_quantum=0.08,
    num_stages=10,
    steps_per_stage=10,
    fine_tune_steps=25,
    fine_tune_checks=1,
    quantum_cap=0.4,
    min_quantum=0.004,
    learning_rate=3e-4,
    eval_samples=256,
    test_samples=256,
    calibration_samples=64,
    probe_samples=48,
    device="cpu",
)


def cpu_seconds(
    loaded: LoadedModel, task: Task, ratios: tuple[float, ...]
) -> tuple[float, list[CurvePoint]]:
    """Processor seconds of one run through some ratios, and its points."""
    config = dataclasses.replace(CONFIG, ratios=ratios)
    begin = time.process_time()
    result = prune(copy.deepcopy(loaded.model), task, config)
    return time.process_time() - begin, result.points[1:]


def main() -> None:
    torch.set_num_threads(1)
    loaded = load_model("blip-tiny-vqa")
    task = build_task("vqa", tokenizer=loaded.tokenizer, image_size=loaded.image_size)
    cpu_seconds(loaded, task, RATIOS[:1])  # decodes the pictures, warms up
    whole, curve = cpu_seconds(loaded, task, RATIOS)
    alone = {}
    for ratio in RATIOS:
        alone[ratio], (point,) = cpu_seconds(loaded, task, (ratio,))
        print(f"{ratio}: {alone[ratio]:.1f} s, val {point.val:.2f}", flush=True)
    vals = ", ".join(f"{point.val:.1f}" for point in curve)
    print(f"one trajectory: {whole:.1f} s, val {vals}", flush=True)
    how = (
        f"processor time of one trajectory with {len(RATIOS)} fine-tunes ({whole:.0f} s) over "
        f"that of a run for each ({sum(alone.values()):.0f} s), blip-tiny-vqa, ratios "
        f"{RATIOS}, stages of 8 % of the FLOPs, seed 0, one run of each, {os.cpu_count()} cores "
        f"shared with other work, {platform.machine()}"
    )
    rows: list[Row] = [
        Row(
            figure="whole curve over separate runs",
            value=round(whole / sum(alone.values()), 4),
            goal=0.65,
            at_least=False,
            unit="x",
            how=how,
        )
    ]
    replace_rows(rows)
    print(show(rows))


if __name__ == "__main__":
    main()
