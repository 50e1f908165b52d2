"""docs/results.md and docs/results.json, written from the collected points and stages.

The text of the page is a person's; this module fills what stands between
``<!-- begin NAME -->`` and ``<!-- end NAME -->``.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from studies.collection import Collected, read_collection
from studies.curves import removed_macs
from studies.folder import write_atomically
from studies.plots import plot_settings, plot_timelines
from studies.reproduction import ResultRow, rows_of
from studies.reproduction_across import rows_across

_ACROSS = re.compile(r"<!-- begin (?:test )?across ([\w.-]+(?: [\w.-]+)+) -->")
_AGAINST = re.compile(r"<!-- begin against ([\w.-]+)((?: [\w.-]+)+) -->")
Step = tuple[str, str, float]
"""Mode and choice of a stage, and the FLOPs ratio after it."""
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
    collected = read_collection(data)
    rows = rows_of(collected)
    studies = list(dict.fromkeys(row.study for row in rows))
    tables: dict[str, str] = {}
    written = []
    for study in studies:
        own = [row for row in rows if row.study == study]
        tables[f"test {study}"] = test_table(own)
        tables[f"differences {study}"] = difference_table(own)
        written += plot_settings(own, data / study, title=f"{study}: mean of the seeds")
    for study, runs in timelines_of(collected.stages).items():
        tables[f"modes {study}"] = mode_table(runs.values())
        written += plot_timelines(
            runs, data / f"{study}-modes", title=f"{study}: what CoMP pruned"
        )
    text = page.read_text(encoding="utf-8")
    found = [row.to_dict() for row in rows]
    for names in dict.fromkeys(_ACROSS.findall(text)):
        shared, joined = _across(collected, names.split())
        tables |= {f"{place} {names}": table for place, table in shared.items()}
        found += [{**row.to_dict(), "study": names} for row in joined]
        if joined:
            place = data / names.replace(" ", "+")
            written += plot_settings(
                joined, place, title=f"{names.replace(' ', ' and ')}: mean of the seeds"
            )
    for setting, names in dict.fromkeys(_AGAINST.findall(text)):
        shared, _ = _across(collected, names.split(), baseline=setting)
        tables[f"against {setting}{names}"] = shared["across"]
    write_atomically(page, fill(text, tables))
    values = page.with_suffix(".json")
    write_atomically(values, json.dumps(found, indent=1) + "\n")
    return [page, values, *written]


def _across(
    collected: Collected, studies: Sequence[str], baseline: str | None = None
) -> tuple[dict[str, str], list[ResultRow]]:
    """Returns tables of several studies by place with their rows, or why there are none."""
    try:
        rows = rows_across(collected, studies, baseline)
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


def timelines_of(stages: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[Step]]]:
    """Sorts the stages of CoMP's runs, and of its variant's, by study and run."""
    found: dict[str, dict[tuple[str, int], list[Step]]] = {}
    for stage in sorted(stages, key=lambda row: (row["study"], row["setting"], row["seed"])):
        if stage["setting"] in ("comp", "comp_plus"):
            runs = found.setdefault(stage["study"], {})
            step = stage["mode"], stage["choice"], stage["ratio"]
            runs.setdefault((stage["setting"], stage["seed"]), []).append(step)
    return {study: _named(runs) for study, runs in found.items()}


def _named(runs: Mapping[tuple[str, int], list[Step]]) -> dict[str, list[Step]]:
    alone = len({setting for setting, _ in runs}) == 1
    return {
        f"seed {seed}" if alone else f"{setting}, seed {seed}": steps
        for (setting, seed), steps in runs.items()
    }


def mode_table(runs: Iterable[Sequence[Step]]) -> str:
    """Returns how often CoMP pruned each mode and how much that removed."""
    visits: Counter[str] = Counter()
    removed: dict[str, float] = {}
    for stages in runs:
        visits.update(mode for mode, _, _ in stages)
        for mode, share in removed_macs(((m, 1 - ratio) for m, _, ratio in stages), 1.0).items():
            removed[mode] = removed.get(mode, 0.0) + share
    total = sum(removed.values())
    lines = ["| mode | stages | share of the removed FLOPs |", "| --- | --- | --- |"]
    for mode in sorted(visits, key=lambda name: -removed[name]):
        lines.append(f"| {mode} | {visits[mode]} | {removed[mode] / total:.0%} |")
    return "\n".join(lines)
