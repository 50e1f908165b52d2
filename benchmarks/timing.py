"""Interleaved timing, and tables of results: what the benchmarks of speed share."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

RESULTS = Path(__file__).parent / "results"


def device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> str:
    """Name of the machine and torch release, as files of results carry it."""
    where = torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else ""
    where = where or f"{platform.machine()}-{os.cpu_count()}cpu"
    return f"{where}-torch{torch.__version__.split('+')[0]}"


def facts() -> dict[str, Any]:
    """What every row of a table says about where it was measured."""
    return {
        "device": str(device()),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def milliseconds(run: Callable[[], object]) -> float:
    """Time of one call: by device events on an accelerator, else the CPU time of this process.

    With one thread, CPU time is what an idle machine would take; others may share this one.
    """
    if torch.cuda.is_available():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))
    begin = time.process_time()
    run()
    return 1000 * (time.process_time() - begin)


def interleaved(
    runs: Mapping[str, Callable[[], object]], rounds: int, *, warm: bool = True
) -> dict[str, list[float]]:
    """Times some calls in turn, ``rounds`` times each, after a round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + warm):
        for name, run in runs.items():
            taken = milliseconds(run)
            if number >= warm:
                times[name].append(taken)
    return times


def ratio_of(above: Sequence[float], below: Sequence[float]) -> tuple[float, float, float]:
    """Median, lowest and highest of paired ratios."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def profile(run: Callable[[], object], most: int = 6) -> str:
    """Operators with the largest own time, as ``addmm 61 %, bmm 9 %``."""
    cuda = torch.cuda.is_available()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiler:
        run()
    name = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = [(event.key, getattr(event, name)) for event in profiler.key_averages()]
    total = sum(taken for _, taken in events) or 1
    top = sorted(events, key=lambda event: -event[1])[:most]
    return ", ".join(f"{key.removeprefix('aten::')} {100 * t / total:.0f} %" for key, t in top)


class Table:
    """Rows that are on the disk as soon as they are measured, as Parquet and Markdown.

    Args:
        name: What the files begin with.
        key: Columns that tell rows apart; a row replaces the one with the same key.
        shown: Columns of the Markdown table.
    """

    def __init__(self, name: str, key: Sequence[str], shown: Sequence[str]) -> None:
        self.path = RESULTS / f"{name}-{machine()}.parquet"
        self.key, self.shown = key, shown
        self.rows: list[dict[str, Any]] = []
        if self.path.exists():
            self.rows = pq.read_table(self.path).to_pylist()

    def has(self, **key: Any) -> bool:
        """Whether a row with these values is there."""
        return any(all(row[name] == value for name, value in key.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Takes a row and writes the files."""
        whole = {**row, **facts()}
        same = [self._key(row) for row in self.rows]
        if self._key(whole) in same:
            self.rows[same.index(self._key(whole))] = whole
        else:
            self.rows.append(whole)
        RESULTS.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(self.rows), self.path)
        self.path.with_suffix(".md").write_text(self._markdown())
        print("  ".join(f"{name} {_text(whole[name])}" for name in self.shown), flush=True)

    def _key(self, row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.key)

    def _markdown(self) -> str:
        lines = [f"# {self.path.stem}", ""]
        lines += [f"| {' | '.join(self.shown)} |", "|" + " --- |" * len(self.shown)]
        lines += [f"| {' | '.join(_text(row[n]) for n in self.shown)} |" for row in self.rows]
        where = ", ".join(
            f"{name} {self.rows[-1][name]}"
            for name in ("device", "threads", "torch", "transformers", "python", "date")
        )
        return "\n".join([*lines, "", f"Written by `benchmarks/measure_*.py`: {where}.", ""])


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
