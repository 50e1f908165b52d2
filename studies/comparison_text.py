"""What a terminal shows of a comparison."""

from studies.comparison import ComparedRow, Comparison
from studies.curves import pareto_curve_points
from studies.text_table import columns

MAX_ROWS = 40
MAX_GAPS = 5
MAX_FRONT = 8


def comparison_text(comparison: Comparison) -> str:
    """Returns the tables: the rows, their differences to the baseline, and the Pareto front."""
    names = [f"{comparison.metric} at {ratio:g}" for ratio in comparison.ratios]
    names.append(f"area {comparison.span[0]:g}-{comparison.span[1]:.3g}")
    parts = [
        _rows(comparison, names),
        _gaps(comparison),
        ["", *_differences(comparison, names)],
        ["", *_front(comparison)],
    ]
    if comparison.skipped:
        shown = ", ".join(comparison.skipped[:MAX_ROWS])
        parts.append(["", f"without a finished ratio: {shown}", *_rest(comparison.skipped)])
    return "\n".join(line for part in parts for line in part)


def _rest(listed: tuple[object, ...], shown: int = MAX_ROWS) -> list[str]:
    left = len(listed) - shown
    return [f"and {left:,} more; --json has all"] if left > 0 else []


def _rows(comparison: Comparison, names: list[str]) -> list[str]:
    head = ["run", "method", "seeds", *names]
    cells = [_row_cells(row) for row in comparison.rows[:MAX_ROWS]]
    return [*columns([head, *cells]), *_rest(comparison.rows)]


def _row_cells(row: ComparedRow) -> list[str]:
    values = map(_or_dash, row.values)
    return [row.name, row.method, str(len(row.seeds)), *values, str(row.area)]


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _gaps(comparison: Comparison) -> list[str]:
    short = [
        f"-: {row.name} ends at ratio {min(c.ratios[-1] for c in row.curves):.3f}"
        for row in comparison.rows[:MAX_ROWS]
        if None in row.values
    ]
    more = [f"-: so do {len(short) - MAX_GAPS} more"] if len(short) > MAX_GAPS else []
    return [*short[:MAX_GAPS], *more]


def _differences(comparison: Comparison, names: list[str]) -> list[str]:
    baseline = comparison.baseline
    if not comparison.paired:
        return [
            f"no paired differences: no other row shares a seed with {baseline}"
            if len(comparison.rows) > 1
            else "no differences: there is one row only"
        ]
    cells = [
        [row.name, str(len(row.seeds)), *map(_or_dash, row.values), str(row.area)]
        for row in comparison.paired[:MAX_ROWS]
    ]
    note = f"difference to {baseline}, paired by seed, 95 % bootstrap interval:"
    return [note, *columns([["run", "pairs", *names], *cells]), *_rest(comparison.paired)]


def _front(comparison: Comparison) -> list[str]:
    front = pareto_curve_points(comparison.curves, comparison.metric)
    cells = [
        [
            f"{point.gmacs:.4g}",
            f"{getattr(point, comparison.metric):.2f}",
            curve.run if point.method != "dense" else "dense",
            f"{point.ratio_reached:.3f}",
        ]
        for curve, point in front[:MAX_FRONT]
    ]
    head = ["GFLOPs", comparison.metric, "run", "ratio"]
    table = columns([head, *cells])
    return ["Pareto front, cheapest first:", *table, *_rest(tuple(front), MAX_FRONT)]
