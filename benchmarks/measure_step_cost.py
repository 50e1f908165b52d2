"""What a CoMP training step costs beside plain fine-tuning of the same dense model.

A step is forward, backward, gradient clipping and AdamW, on a small CLIP with random weights and
the contrastive loss. The plain side is the stock model on its default attention. The CoMP side
has masks that fade in every module, and at the ratio 0.8 the pruned heads, channels and tokens
gone, as in a run that shrinks after every stage. The statistics of a stage (256 calibration
samples) are measured per sample and spread over a stage's 100 steps of 32 samples.

Rows go to benchmarks/results/step_cost-<machine>.parquet and .md.
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from speed_models import SMALL, Pruner
from summary import Row, replace_rows, show
from timing import Table, device, interleaved, ratio_of
from torch import nn

from comp.config import PruningConfig
from comp.finetune import make_optimizer
from comp.handle import PruningHandle

BATCH = 8
GOALS = {0.0: 1.15, 0.8: 0.45}
DEFAULTS = PruningConfig()
SHOWN = (
    "ratio",
    "plain_ms",
    "step_ms",
    "step_over_plain",
    "lowest",
    "highest",
    "with_statistics",
)


def stepper(model: nn.Module, inputs: dict[str, Any]) -> Callable[[], None]:
    """A training step of a model."""
    optimizer = make_optimizer(model, DEFAULTS)
    model.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(**inputs, return_loss=True).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), DEFAULTS.max_grad_norm)
        optimizer.step()

    return step


def fade_some(handle: PruningHandle) -> None:
    """Lets one unit of every module fade, as in the midst of a parameter stage."""
    handle.stock_when_idle = False
    for name, group in handle.groups.items():
        mask = torch.ones(group.num_units, device=group.out.linear.weight.device)
        mask[0] = 0.5
        handle.masks[name] = mask


def collector(handle: PruningHandle, inputs: dict[str, Any]) -> Callable[[], None]:
    """A calibration pass."""

    def collect() -> None:
        handle.model.eval()
        with torch.no_grad(), handle.metering(), handle.collecting():
            handle.model(**inputs)
        handle.model.train()

    return collect


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    inputs = {name: value.to(device()) for name, value in SMALL.inputs(BATCH).items()}
    dense = SMALL.build().to(device())
    pruner = Pruner(dense, {name: value[:2] for name, value in inputs.items()})
    shared = {0.0: pruner.copy().model, 0.8: pruner.prune("mix", 0.8)}
    models = {ratio: copy.deepcopy(model) for ratio, model in shared.items()}  # own parameters
    runs = {"plain": stepper(dense, inputs)}
    for ratio, model in models.items():
        handle: PruningHandle = model.pruning  # type: ignore[assignment]
        fade_some(handle)
        runs[f"step at {ratio}"] = stepper(model, inputs)
        runs[f"statistics at {ratio}"] = collector(handle, inputs)
    times = interleaved(runs, rounds)
    table = Table("step_cost", ("ratio",), SHOWN)
    rows = []
    share = DEFAULTS.calibration_samples / (DEFAULTS.steps_per_stage * DEFAULTS.batch_size)
    for ratio, goal in GOALS.items():
        step, low, high = ratio_of(times[f"step at {ratio}"], times["plain"])
        statistics = share * ratio_of(times[f"statistics at {ratio}"], times["plain"])[0]
        table.add(
            {
                "ratio": ratio,
                "plain_ms": sorted(times["plain"])[rounds // 2],
                "step_ms": sorted(times[f"step at {ratio}"])[rounds // 2],
                "step_over_plain": step,
                "lowest": low,
                "highest": high,
                "with_statistics": step + statistics,
                "rounds": rounds,
                "batch": BATCH,
            }
        )
        rows.append(
            Row(
                figure=f"training: CoMP step over plain step at ratio {ratio}",
                value=round(step + statistics, 4),
                goal=goal,
                at_least=False,
                unit="x",
                how=(
                    f"small CLIP, 224 px, batch {BATCH}, median of {rounds} interleaved rounds "
                    f"({low:.2f}-{high:.2f} without statistics), CPU time of one thread; "
                    "benchmarks/measure_step_cost.py"
                ),
            )
        )
    replace_rows(rows)
    print(show(rows))


if __name__ == "__main__":
    main()
