"""docs/results.md and docs/results.json, written from the collected points and stages.

The text of the page is a person's; this module fills what stands between
``<!-- begin NAME -->`` and ``<!-- end NAME -->``.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet

from studies.collection import POINTS, STAGES, Pair, pair_of
from studies.curves import removed_macs
from studies.folder import write_atomically
from studies.plots import plot_settings, plot_timelines
from studies.reproduction import ResultRow, read_rows
from studies.reproduction_across import rows_across

_ACROSS = re.compile(r"<!-- begin (?:test )?across ([\w.-]+(?: [\w.-]+)+) -->")
TOLERANCE = 0.005  # how far a ratio may lie from the asked one on equal terms


def write_results(data: Path, page: Path) -> list[Path]:
    """Writes tables into a page, ``results.json`` beside it and the plots into ``data``.

    Args:
        data: Directory that ``studies.collection.collect`` wrote.
        page: A Markdown file with places for tables.

    Returns:
        What was written.

    Raises:
        ValueError: If the page has a place for a table that the data does not give.
    """
    rows = read_rows(data)
    studies = list(dict.fromkeys(row.study for row in rows))
    tables: dict[str, str] = {}
    written = []
    for study in studies:
        own = [row for row in rows if row.study == study]
        tables[f"test {study}"] = test_table(own)
        tables[f"differences {study}"] = difference_table(own)
        written += plot_settings(own, data / study, title=f"{study}: mean of the seeds")
    timelines = read_timelines(data)
    for study in dict.fromkeys(run.study for run in timelines):
        runs = [run for run in timelines if run.study == study]
        tables[f"modes {study}"] = mode_table(runs)
        written += _timelines(runs, data)
    text = page.read_text(encoding="utf-8")
    found = [row.to_dict() for row in rows]
    for names in dict.fromkeys(_ACROSS.findall(text)):
        shared, joined = _across(data, names.split())
        tables |= {f"{place} {names}": table for place, table in shared.items()}
        found += [{**row.to_dict(), "study": names} for row in joined]
    write_atomically(page, fill(text, tables))
    values = page.with_suffix(".json")
    write_atomically(values, json.dumps(found, indent=1) + "\n")
    return [page, values, *written]


def _across(data: Path, studies: Sequence[str]) -> tuple[dict[str, str], list[ResultRow]]:
    """Returns tables of several studies by place with their rows, or why there are none."""
    try:
        rows = rows_across(data, studies)
    except ValueError as error:
        return dict.fromkeys(("across", "test across"), f"Not compared: {error}."), []
    return {"across": difference_table(rows), "test across": test_table(rows)}, rows


def fill(text: str, tables: Mapping[str, str]) -> str:
    """Puts tables into their places.

    Raises:
        ValueError: If there is no table for a place.
    """

    def put(match: re.Match[str]) -> str:
        name = match[1]
        if name not in tables:
            raise ValueError(
                f"the page has a place for {name!r}, but the data gives {', '.join(tables)}"
            )
        return f"<!-- begin {name} -->\n{tables[name]}\n<!-- end {name} -->"

    return re.sub(r"<!-- begin (.+?) -->.*?<!-- end \1 -->", put, text, flags=re.DOTALL)


def test_table(rows: Sequence[ResultRow]) -> str:
    """Returns mean and standard deviation of the test metric, a column a ratio.

    A star marks a mean ratio that lies further than ``TOLERANCE`` from the asked one.
    """

    def cell(row: ResultRow) -> str:
        is_off = abs(row.ratio_reached - row.ratio_asked) > TOLERANCE
        return f"{row.test}" + ("*" if is_off else "")

    return _pivot(rows, cell)


def difference_table(rows: Sequence[ResultRow]) -> str:
    """Returns differences to the best baseline with their intervals, bold where 0 is outside."""

    def cell(row: ResultRow) -> str:
        if row.difference is None:
            return "baseline" if row.method == row.baseline else "-"
        return f"**{row.difference}**" if row.difference.is_clear else f"{row.difference}"

    return _pivot(rows, cell)


def _pivot(rows: Sequence[ResultRow], cell: Any) -> str:
    ratios = sorted({row.ratio_asked for row in rows})
    by_place = {(row.method, row.ratio_asked): row for row in rows}
    top = {row.method: row.test.mean for row in sorted(rows, key=lambda r: r.ratio_asked)}
    lines = ["| setting | seeds | stages | " + " | ".join(f"{ratio:g}" for ratio in ratios) + " |"]
    lines.append("| --- " * (len(ratios) + 3) + "|")
    for method in sorted(top, key=lambda name: -top[name]):
        own = [by_place.get((method, ratio)) for ratio in ratios]
        known = [row for row in own if row is not None]
        head = [f"`{method}`", f"{min(len(row.seeds) for row in known)}", f"{known[0].stages:.1f}"]
        cells = ["-" if row is None else cell(row) for row in own]
        lines.append("| " + " | ".join([*head, *cells]) + " |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Timeline:
    """What one run of CoMP pruned.

    Attributes:
        study: Name of the study.
        seed: Seed of the run.
        dense_macs: Multiply-adds of the dense model.
        stages: Mode, choice and multiply-adds left after every stage, in order.
    """

    study: str
    seed: int
    dense_macs: float
    stages: list[tuple[str, str, float]] = field(default_factory=list)


def read_timelines(data: Path) -> list[Timeline]:
    """Reads the stages of all runs of plain CoMP in a collection."""
    dense = {
        pair_of(point): 1e9 * point["gmacs"]
        for point in pyarrow.parquet.read_table(data / POINTS).to_pylist()
        if point["method"] == "dense"
    }
    found: dict[Pair, Timeline] = {}
    for stage in pyarrow.parquet.read_table(data / STAGES).to_pylist():
        if stage["setting"] != "comp":
            continue
        key = pair_of(stage)
        run = found.setdefault(key, Timeline(stage["study"], stage["seed"], dense[key]))
        run.stages.append((stage["mode"], stage["choice"], stage["macs"]))
    return sorted(found.values(), key=lambda run: (run.study, run.seed))


def mode_table(runs: Sequence[Timeline]) -> str:
    """Returns how often CoMP pruned each mode and how much that removed."""
    visits: Counter[str] = Counter()
    removed: dict[str, float] = {}
    for run in runs:
        visits.update(mode for mode, _, _ in run.stages)
        stages = [(mode, macs) for mode, _, macs in run.stages]
        for mode, macs in removed_macs(stages, run.dense_macs).items():
            removed[mode] = removed.get(mode, 0.0) + macs / run.dense_macs
    total = sum(removed.values())
    lines = ["| mode | stages | share of the removed FLOPs |", "| --- | --- | --- |"]
    for mode in sorted(visits, key=lambda name: -removed[name]):
        lines.append(f"| {mode} | {visits[mode]} | {removed[mode] / total:.0%} |")
    return "\n".join(lines)


def _timelines(runs: Sequence[Timeline], data: Path) -> list[Path]:
    bars = {
        f"seed {run.seed}": [
            (mode, choice, 1 - macs / run.dense_macs) for mode, choice, macs in run.stages
        ]
        for run in runs
    }
    study = runs[0].study
    return plot_timelines(bars, data / f"{study}-modes", title=f"{study}: what CoMP pruned")
