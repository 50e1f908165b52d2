"""How long do ``comp study status``, ``best`` and ``comp compare`` take on a large study?

The driver writes a study of 10,000 finished trials as it always does, one after the other in this
process, each with a run directory of five records; only the pruning itself costs nothing. Then
every command runs three times in a process of its own, and once before that uncounted, as after
the study's last trial. ``--keep DIRECTORY`` writes the study there, or goes on with one.
"""

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from summary import Row, replace_rows, show

from orchestration.executor import InlineExecutor
from studies.driver import run_study
from studies.spec import StudySpec
from studies.specfile import spec_of

NAME, GOAL, REPEATS = "large", 5.0, 3
COMMANDS = {
    "comp study status": ["study", "status", NAME],
    "comp study best": ["study", "best", NAME],
    "comp compare": ["compare", NAME],
}


def study_spec(root: str, num_trials: int) -> StudySpec:
    values: dict[str, Any] = {
        "kind": "study",
        "name": NAME,
        "model": "blip-tiny-vqa",
        "task": "vqa",
        "pruning": {"ratios": [0.5], "num_stages": 10},
        "space": {
            "num_stages": {"kind": "int", "low": 4, "high": 40},
            "exploration": {"kind": "float", "low": 0.0, "high": 0.5},
        },
        "objective": {"val_at": 0.5},
        "sampler": {"kind": "random"},
        "n_trials": num_trials,
        "tracking": {"enabled": False},
        "root": root,
    }
    spec = spec_of(values)
    assert isinstance(spec, StudySpec)
    return spec


def seconds_of(words: list[str], root: str) -> tuple[float, float]:
    """Returns how long a command takes by the clock, and how much processor time."""
    command = [sys.executable, "-m", "studies.cli", *words, "--root", root]
    before, start = processor_seconds(), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start, processor_seconds() - before


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(root: str, num_trials: int) -> list[Row]:
    start = time.perf_counter()  # some five minutes
    runner = "orchestration_trials:noop"
    outcome = run_study(study_spec(root, num_trials), InlineExecutor, runner=runner)
    assert outcome.counts == {"complete": num_trials}, outcome
    print(f"{num_trials} trials are there after {time.perf_counter() - start:.0f} s")
    rows = []
    for name, words in COMMANDS.items():
        first, *calls = [seconds_of(words, root) for _ in range(1 + REPEATS)]
        times = [seconds for seconds, _ in calls]
        how = (
            f"median of {REPEATS} ({min(times):.2f} to {max(times):.2f} s) at "
            f"{statistics.median(used for _, used in calls):.2f} s of processor time, first call "
            f"{first[0]:.2f} s; {num_trials} trials of five records, journal and runs in memory, "
            f"load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores, {platform.machine()}, "
            f"Python {platform.python_version()}; benchmarks/measure_study_queries.py"
        )
        value = statistics.median(times)
        rows.append(
            Row(
                figure=f"studies: {name} of {num_trials} trials",
                value=round(value, 4),
                goal=GOAL,
                at_least=False,
                unit="s",
                how=how,
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--keep", metavar="DIRECTORY", help="where the study is kept")
    arguments = parser.parse_args()
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as scratch:
        rows = measure(arguments.keep or scratch, arguments.trials)
    if arguments.trials == parser.get_default("trials"):
        replace_rows(rows)
    print(show(rows))


if __name__ == "__main__":
    main()
