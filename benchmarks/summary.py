"""benchmarks/results/summary.json: one list of figures, whichever benchmark measured them."""

import fcntl
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

SUMMARY = Path(__file__).parent / "results" / "summary.json"


class Row(TypedDict):
    """A figure: what it is called, its value, and what it is held to.

    ``at_least`` says how: the value must be at least the goal, or at most. ``how`` says in one
    sentence how it was measured.
    """

    figure: str
    value: float
    goal: float | None
    at_least: bool
    unit: str
    how: str


def replace_rows(rows: Sequence[Row], path: Path = SUMMARY) -> None:
    """Writes rows over those of the same figure; the others stay as and where they are."""
    path.parent.mkdir(exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        old: list[Row] = json.loads(path.read_text()) if path.exists() else []
        new = {row["figure"]: row for row in rows}
        merged = [new.pop(row["figure"], row) for row in old]
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_text(json.dumps([*merged, *new.values()], indent=1) + "\n")
        temporary.replace(path)


def show(rows: Sequence[Row]) -> str:
    """Returns one line a row, with its goal and whether it is met."""
    lines = []
    for row in rows:
        line = f"{row['figure']:44} {row['value']:>10.4g} {row['unit']}"
        if row["goal"] is not None:
            sign = ">=" if row["at_least"] else "<="
            met = row["value"] >= row["goal"] if row["at_least"] else row["value"] <= row["goal"]
            line += f"  (goal {sign} {row['goal']:g}: {'met' if met else 'missed'})"
        lines.append(line)
    return "\n".join(lines)
