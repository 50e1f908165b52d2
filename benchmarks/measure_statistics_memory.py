"""Memory: what collecting statistics adds to the peak of a training step.

Each figure is the growth of a fresh process's peak resident memory (``ru_maxrss``) from before its
first training step to its end. One program trains three steps; the others collect the statistics
of Eq. 4 before the last of them, as a stage does before it ranks units: on batches as large as
those of training, and on batches twice as large, the proportion of a config's defaults. They run
by turns, by default five times each. Models and batches are random; nothing is downloaded.

Writes benchmarks/results/statistics_memory-<machine>-torch<version>.csv and a row of summary.json:

    python benchmarks/measure_statistics_memory.py
"""

import csv
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.summary import Row, replace_rows, show

NUM_REPEATS = 5
NUM_SAMPLES = 8
PROGRAMS = {"train": 0, "collect": NUM_SAMPLES, "collect_twice": 2 * NUM_SAMPLES}
WIDTH, LAYERS, SIDE = 256, 6, 128
MIB = 1024  # ru_maxrss counts KiB


def peak_mib() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB


def child(collected: int) -> None:
    """Trains three steps and prints by how much the peak grew.

    Args:
        collected: Samples in a batch that statistics are collected on; 0 for none.
    """
    import torch

    from comp.config import PruningConfig
    from comp.evaluation import collect_statistics
    from comp.finetune import make_optimizer, train_step
    from comp.models import attach
    from comp.models.blip_build import BlipShape, build_blip
    from comp.models.tokenizer import as_pretrained
    from comp.tasks.nlvr import NlvrTask
    from comp.tasks.statements import Statement
    from comp.tasks.text import tokenizer_from_texts

    text = "both images show a person with dark skin tone and at least one of them a flag"
    tokenizer = as_pretrained(tokenizer_from_texts([text]))
    pixels = torch.randint(0, 256, (4 * NUM_SAMPLES, 3, SIDE, SIDE), dtype=torch.uint8)
    pairs = range(2 * NUM_SAMPLES)
    made = [Statement((2 * i, 2 * i + 1), text, i % 2 == 0, "both") for i in pairs]
    task = NlvrTask({"train": made}, pixels, tokenizer)
    shape = BlipShape(WIDTH, WIDTH // 64, LAYERS, LAYERS, image_size=SIDE, patch_size=8)
    model = build_blip("nlvr2", shape, tokenizer)
    handle = attach(model)
    handle.stock_when_idle = False
    config = PruningConfig(batch_size=NUM_SAMPLES)
    optimizer = make_optimizer(model, config)
    stream = task.train_batches(batch_size=NUM_SAMPLES, seed=0)
    before = peak_mib()
    for step in range(3):
        if collected and step == 2:
            collect_statistics(handle, task, task.batches("train", batch_size=collected))
        train_step(model.train(), task, stream, optimizer, config)
    print(json.dumps(peak_mib() - before))


def growth_mib(program: str) -> float:
    """Runs a fresh process and returns by how much its peak grew."""
    command = [sys.executable, __file__, program]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    growths: dict[str, list[float]] = {program: [] for program in PROGRAMS}
    for _ in range(NUM_REPEATS):
        for program, values in growths.items():
            values.append(growth_mib(program))
    machine = f"{platform.machine()}-{os.cpu_count()}cpu"
    torch = version("torch").split("+")[0]
    results = Path(__file__).parent / "results"
    path = results / f"statistics_memory-{machine}-torch{torch}.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["what", "median_mib", "smallest_mib", "largest_mib", "repeats", "python"])
        for name, values in growths.items():
            figures = (statistics.median(values), min(values), max(values))
            row = [f"{value:.1f}" for value in figures]
            table.writerow([name, *row, NUM_REPEATS, platform.python_version()])
    plain, *collecting = (statistics.median(values) for values in growths.values())
    rows = [
        Row(
            figure="memory: statistics beside a training step",
            value=round(100 * (max(collecting) / plain - 1), 2),
            goal=15.0,
            at_least=False,
            unit="%",
            how=(
                f"growth of peak resident memory over three training steps, {plain:.0f} MiB, with "
                "and without collecting, on batches of as many and of twice as many samples, the "
                f"larger of the two; medians of {NUM_REPEATS} fresh processes each by turns; "
                f"BLIP-NLVR of width {WIDTH}, {LAYERS} layers, batches of {NUM_SAMPLES} pairs of "
                f"{SIDE} px; {machine}, torch {torch}"
            ),
        )
    ]
    replace_rows(rows)
    print(show(rows))
    print(f"written to {path}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        child(PROGRAMS[sys.argv[1]])
    else:
        main()
