"""Start-up: how long ``comp --help`` takes, and what ``import comp`` adds to torch.

Writes benchmarks/results/start_up-<machine>-torch<version>.csv: median and quartiles of 20
interleaved runs, each in a fresh process, after one warm-up run of each.
"""

import csv
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

NUM_REPEATS = 20
PROGRAMS = {
    "python": "pass",
    "comp --help": "import sys; sys.argv[1:] = ['--help']; from studies.cli import main; main()",
    "import torch": "import torch",
    "import torch, comp": "import torch, comp",
}


def wall_ms(program: str) -> float:
    """Milliseconds from the start of a process that runs ``program`` to its end."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - start) * 1000


def measure() -> dict[str, list[float]]:
    for program in PROGRAMS.values():
        wall_ms(program)
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(NUM_REPEATS):
        for name, program in PROGRAMS.items():
            times[name].append(wall_ms(program))
    return times


def main() -> None:
    times = measure()
    machine = f"{platform.machine()}-{os.cpu_count()}cpu"
    torch = version("torch").split("+")[0]
    path = Path(__file__).parent / "results" / f"start_up-{machine}-torch{torch}.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(
            ["what", "median_ms", "quartile_1_ms", "quartile_3_ms", "repeats", "python"]
        )
        for name, values in times.items():
            low, median, high = statistics.quantiles(values, n=4)
            row = [f"{value:.0f}" for value in (median, low, high)]
            table.writerow([name, *row, NUM_REPEATS, platform.python_version()])
            print(f"{name:20} {row[0]:>6} ms  (quartiles {row[1]} to {row[2]})")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
