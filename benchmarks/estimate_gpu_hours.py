"""What the experiments on the paper's own models would cost, in GPU-hours.

    python benchmarks/estimate_gpu_hours.py [--tflops 100]

An extrapolation, and no measurement on a GPU: multiply-adds of the dense model's training forward
(``comp.reference_cost``), times six for forward and backward in FLOPs, times the share of a dense
step that a CoMP step takes at a ratio, which ``measure_step_cost.py`` measured on BLIP-base at
ratios 0 and 0.8 (a straight line between), plus the share of evaluations that
``measure_evaluation_cost.py`` measured. ``--tflops`` is what a GPU sustains; 100 is a third of the
bfloat16 peak of an A100.
"""

import argparse
import json
from collections.abc import Iterator

from summary import SUMMARY

from comp import reference_cost
from comp.config import PruningConfig
from studies.spec import StudySpec
from studies.specfile import read_specs

EXPERIMENTS = ("paper-main", "paper-cim", "paper-mps", "paper-sensitivity")
FORWARD_AND_BACKWARD = 3
FLOPS_PER_MAC = 2
WORDS = 20
LLAVA_TOKENS = 576 + 60
QUESTION_COST = reference_cost.blip_vqa_mock_cost(questions=1, answers=1).body


def dense_macs(cell: str) -> float:
    """Multiply-adds of one training forward of a sample."""
    costs = {
        "blip-nlvr2": reference_cost.blip_nlvr_cost(WORDS).body,
        "blip-vqa": QUESTION_COST,
        "blip-retrieval": reference_cost.blip_retrieval_training_cost(WORDS).body,
        "blip-captioning": reference_cost.blip_caption_cost(WORDS).body,
        "clip-retrieval": reference_cost.clip_training_cost().body,
        "llava": reference_cost.llava_prefill_cost(LLAVA_TOKENS).body,
    }
    return float(costs[cell])


def step_share(ratio: float, at_zero: float, at_80: float) -> float:
    """Share of a dense step that a CoMP step takes at a ratio."""
    return at_zero + (at_80 - at_zero) * ratio / 0.8


def dense_steps(config: PruningConfig, at_zero: float, at_80: float, evaluation: float) -> float:
    """Training steps of a run, in dense steps."""
    middle = step_share(config.ratios[-1] / 2, at_zero, at_80)
    stages = config.num_stages * config.steps_per_stage * middle * (1 + evaluation)
    tunes = sum(step_share(ratio, at_zero, at_80) for ratio in config.ratios)
    return stages + config.fine_tune_steps * tunes


def estimates(tflops: float) -> Iterator[tuple[str, int, float, float]]:
    """Yields study, its runs, hours a run and hours in all."""
    measured = {row["figure"]: row["value"] for row in json.loads(SUMMARY.read_text())}
    for experiment in EXPERIMENTS:
        for spec in read_specs(experiment):
            assert isinstance(spec, StudySpec)
            config = spec.pruning
            steps = dense_steps(
                config,
                measured["training: CoMP step over plain step at ratio 0.0"],
                measured["training: CoMP step over plain step at ratio 0.8"],
                measured["evaluation of a stage over its training"],
            )
            macs = dense_macs(spec.name.removeprefix(f"{experiment}-"))
            recomputed = FORWARD_AND_BACKWARD + config.gradient_checkpointing
            flops = steps * config.batch_size * macs * FLOPS_PER_MAC * recomputed
            hours = flops / (tflops * 1e12) / 3600
            runs = spec.n_trials * len(spec.seeds)
            yield spec.name, runs, hours, runs * hours


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tflops", type=float, default=100.0, help="What a GPU sustains.")
    args = parser.parse_args()
    print("| study | runs | GPU-hours a run | GPU-hours |\n| --- | --- | --- | --- |")
    for name, runs, hours, total in estimates(args.tflops):
        print(f"| {name} | {runs} | {hours:.1f} | {total:,.0f} |")


if __name__ == "__main__":
    main()
