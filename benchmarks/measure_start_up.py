"""Start-up: how long ``comp --help`` takes, and what ``import comp`` adds to torch.

Writes benchmarks/results/start_up-<machine>-torch<version>.csv: median and quartiles of 7
interleaved runs, CPU time, each in a fresh process, after one warm-up run of each.
"""

import csv
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from summary import Row, replace_rows, show

NUM_REPEATS = 7
PROGRAMS = {
    "python": "pass",
    "comp --help": "import sys; sys.argv[1:] = ['--help']; from studies.cli import main; main()",
    "import torch": "import torch",
    "import torch, comp": "import torch, comp",
}


def cpu_ms(program: str) -> float:
    """Milliseconds of CPU that a process running ``program`` takes, system time included.

    On an idle machine that is what it takes on the clock; others may share this one.
    """
    before = os.times()
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    user = after.children_user - before.children_user
    return (user + after.children_system - before.children_system) * 1000


def measure() -> dict[str, list[float]]:
    for program in PROGRAMS.values():
        cpu_ms(program)
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(NUM_REPEATS):
        for name, program in PROGRAMS.items():
            times[name].append(cpu_ms(program))
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
    how = (
        f"CPU time, median of {NUM_REPEATS} fresh processes, interleaved; "
        "benchmarks/measure_start_up.py"
    )
    added = [
        b - a for a, b in zip(times["import torch"], times["import torch, comp"], strict=True)
    ]
    rows = [
        _row("start-up: comp --help", statistics.median(times["comp --help"]), 0.4, how),
        _row("start-up: import comp beyond torch", statistics.median(added), 0.1, how),
    ]
    replace_rows(rows)
    print(show(rows))


def _row(figure: str, milliseconds: float, goal: float, how: str) -> Row:
    return Row(
        figure=figure,
        value=round(milliseconds / 1000, 3),
        goal=goal,
        at_least=False,
        unit="s",
        how=how,
    )


if __name__ == "__main__":
    main()
