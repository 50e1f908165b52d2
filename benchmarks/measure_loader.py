"""The loader: does a set of 100,000 rows iterate in flat memory, and faster than a model trains?

Writes a set of 100,000 questions about 64 px JPEG images (2,048 different ones, noise over
colours) into a temporary directory, reads one epoch of shuffled training batches of 64 with
tokens and augmentation, and times training steps of blip-tiny-vqa on the same batches. Loader and
training take turns in ten rounds, training first, so that other work on the machine hits both
and the memory after every round is that of both. Writes
benchmarks/results/loader-<machine>-torch<version>.csv and its rows of summary.json.
"""

import csv
import io
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from summary import SUMMARY, replace_rows
from summary import Row as SummaryRow

from comp.config import PruningConfig
from comp.data.layout import EncodedImage, Row, write_rows
from comp.finetune import train_step
from comp.models import attach, load_model
from comp.tasks import build_task

NUM_ROWS, NUM_IMAGES, BATCH, NUM_STEPS, ROUNDS = 100_000, 2048, 64, 3, 10


def rows() -> Iterator[Row]:
    generator = np.random.default_rng(0)
    images = []
    for _ in range(NUM_IMAGES):
        pixels = generator.integers(0, 64, (64, 64, 3)) + generator.integers(0, 192, 3)
        buffer = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=90)
        images.append(EncodedImage(data=buffer.getvalue()))
    for number in range(NUM_ROWS):
        image = images[number % NUM_IMAGES]
        text = f"what kind of thing does picture {number} show?"
        split = "train" if number < NUM_ROWS - 64 else "val"
        yield Row(str(number + 1), split, [image], [text], ["food", "animal"], [7, 3])


def memory_mib(name: str) -> float:
    """``RssAnon``: memory that is ours. ``RssFile``: mapped pages that the system may drop."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {name}; this benchmark needs Linux")


def measure(path: Path) -> dict[str, float]:
    facts = {"name": "loader", "kind": "questions", "answers": json.dumps({"food": 1})}
    write_rows(path, rows(), metadata=facts)
    loaded = load_model("blip-tiny-vqa")
    task = build_task("vqa", tokenizer=loaded.tokenizer, image_size=64, data=path)
    batches = task.train_batches(batch_size=BATCH, seed=0)
    to_train = task.train_batches(batch_size=BATCH, seed=1)
    model = loaded.model
    attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()
    part = (NUM_ROWS - 64) // BATCH // ROUNDS
    memory, ratios, speeds = [], [], []
    for _ in range(ROUNDS):
        times = []
        for batch in itertools.islice(to_train, NUM_STEPS):
            start = time.perf_counter()
            train_step(model, task, iter([batch]), optimizer, PruningConfig())
            times.append(time.perf_counter() - start)
        start = time.perf_counter()
        for batch in itertools.islice(batches, part):
            assert len(batch["input_ids"]) == BATCH
        loading = part * BATCH / (time.perf_counter() - start)
        memory.append((memory_mib("RssAnon"), memory_mib("RssFile")))
        training = BATCH / statistics.median(times)
        speeds.append((loading, training))
        ratios.append(loading / training)
    return {
        "file_mib": path.stat().st_size / 2**20,
        "anon_mib_after_tenth": memory[0][0],
        "anon_mib_most": max(one[0] for one in memory),
        "anon_mib_end": memory[-1][0],
        "mapped_mib_end": memory[-1][1],
        "loader_samples_per_s": statistics.median(one[0] for one in speeds),
        "training_samples_per_s": statistics.median(one[1] for one in speeds),
        "loader_over_training": statistics.median(ratios),
        "loader_over_training_least": min(ratios),
    }


def summary_rows(found: dict[str, float], machine: str) -> list[SummaryRow]:
    how = (
        f"{NUM_ROWS} rows of 64 px JPEG, one epoch in {ROUNDS} rounds with {NUM_STEPS} steps of "
        f"blip-tiny-vqa each, batches of {BATCH}, {machine}, cores shared with other work"
    )
    growth = found["anon_mib_most"] - found["anon_mib_after_tenth"]
    return [
        {
            "figure": "data: loader over training, median of rounds",
            "value": found["loader_over_training"],
            "goal": 3.0,
            "at_least": True,
            "unit": "x",
            "how": f"{how}; least of the rounds {found['loader_over_training_least']:.3g}",
        },
        {
            "figure": "data: growth of memory over an epoch",
            "value": growth,
            "goal": 64.0,
            "at_least": False,
            "unit": "MiB",
            "how": f"most RssAnon less that after a tenth of the epoch; {how}",
        },
    ]


def main() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder) / "data.parquet")
    machine = f"{platform.machine()}-{os.cpu_count()}cpu"
    torch_version = version("torch").split("+")[0]
    path = Path(__file__).parent / "results" / f"loader-{machine}-torch{torch_version}.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["what", "value"])
        for name, value in found.items():
            table.writerow([name, f"{value:.4g}"])
            print(f"{name:24} {value:10.4g}")
    replace_rows(summary_rows(found, machine))
    print(f"written to {path} and {SUMMARY}")


if __name__ == "__main__":
    main()
