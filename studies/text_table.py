"""Cells as lines of text; a file of its own, as the report that also uses it loads Optuna."""

from collections.abc import Sequence


def columns(cells: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table of cells, right-aligned."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
