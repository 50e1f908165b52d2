"""Accuracy against FLOPs ratio, and how importance measures disagree, as PNG and SVG.

Colours are those of Okabe and Ito (2008), which readers with any colour vision can tell apart;
line style and markers say the same again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.curves import Curve, Metric, check_comparable

if TYPE_CHECKING:
    from comp.diagnostics import LayerInterference
    from studies.reproduction import ResultRow

GREY = "#9a9a9a"
BLACK = "#000000"
BLUE = "#0072B2"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
REMOVED = "FLOPs removed (share of the dense model's multiply-adds, %)"
MAX_NAMED = 12  # runs in a legend
LABELS = {"val": "Validation", "test": "Test"}


def plot_study(
    curves: Sequence[Curve],
    best: Sequence[Curve],
    target: Path,
    *,
    title: str,
    metric: Metric = "val",
    metric_name: str = "accuracy",
) -> list[Path]:
    """Draws every trial as a thin line, the best one bold, the dense model as a dashed line.

    Args:
        curves: All runs of a study.
        best: The runs of the best trial (one a seed); drawn over the others.
        target: Where to write, without a suffix.
        title: Above the plot.
        metric: ``"val"`` or ``"test"``.
        metric_name: What the task calls it.

    Returns:
        The PNG and the SVG.

    Raises:
        ValueError: If there is no curve, or they are of several tasks.
    """
    figure, axes = _axes(curves, title, metric, metric_name)
    thin = [curve for curve in curves if curve not in best]
    for index, curve in enumerate(thin):
        label = f"other trials ({len(thin)})" if index == 0 else None
        _line(axes, curve, metric, GREY, "o", label=label, width=1.0, size=3, order=2)
    for index, curve in enumerate(best):
        label = f"best: trial {curve.trial}" if index == 0 else None
        _line(axes, curve, metric, BLUE, "o", label=label, width=2.6, size=7, order=4)
    if best:
        _annotate(axes, best[0], metric)
    return _save(figure, axes, target)


def plot_runs(
    curves: Sequence[Curve],
    target: Path,
    *,
    title: str,
    metric: Metric = "val",
    metric_name: str = "accuracy",
) -> list[Path]:
    """Draws a few runs, each in a colour and with a marker of its own.

    Returns:
        The PNG and the SVG.

    Raises:
        ValueError: If there is no curve, or they are of several tasks.
    """
    figure, axes = _axes(curves, title, metric, metric_name)
    for index, curve in enumerate(curves):
        colour = PALETTE[index % len(PALETTE)]
        marker = MARKERS[(index + index // len(PALETTE)) % len(MARKERS)]
        label = curve.run if index < MAX_NAMED else None
        _line(axes, curve, metric, colour, marker, label=label, width=1.8, size=6, order=3)
    if len(curves) > MAX_NAMED:
        axes.plot([], [], " ", label=f"{len(curves) - MAX_NAMED} more runs")
    return _save(figure, axes, target)


def plot_settings(rows: Sequence["ResultRow"], target: Path, *, title: str) -> list[Path]:
    """Draws the mean test metric of every setting of a study, with the standard error of the mean.

    What is put to the test (``ResultRow.is_own``) is bold. A study of one ratio becomes one column
    of points.

    Returns:
        The PNG and the SVG.
    """
    figure, axes = _over_ratios(title, "Test metric")
    names = list(dict.fromkeys(row.method for row in rows))
    for index, name in enumerate(names):
        own = sorted((row for row in rows if row.method == name), key=lambda r: r.ratio_asked)
        axes.errorbar(
            [100 * row.ratio_reached for row in own],
            [row.test.mean for row in own],
            yerr=[row.test.std / row.test.num**0.5 for row in own],
            color=PALETTE[index % len(PALETTE)],
            marker=MARKERS[(index + index // len(PALETTE)) % len(MARKERS)],
            linewidth=2.8 if own[0].is_own else 1.3,
            linestyle="-" if index < len(PALETTE) else "--",
            capsize=3,
            label=name,
        )
    axes.legend(fontsize=9, frameon=False, loc="best")
    return _write(figure, target)


def plot_timelines(
    runs: Mapping[str, Sequence[tuple[str, str, float]]], target: Path, *, title: str
) -> list[Path]:
    """Draws a bar a run: which mode every stage pruned, from the dense model to the last ratio.

    A stage is as wide as the FLOPs that it removed, so the colours of a bar add up to each mode's
    share. Stages that explored are hatched; one after which FLOPs rose leaves no mark.

    Args:
        runs: By label, mode, choice (``"sweep"``, ``"greedy"``, ``"explore"``) and the FLOPs ratio
            after every stage, in order.
        target: Where to write, without a suffix.
        title: Above the plot.

    Returns:
        The PNG and the SVG.
    """
    figure = Figure(figsize=(8, 1.4 + 0.42 * len(runs)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=13, loc="left")
    axes.set_xlabel(REMOVED, fontsize=11)
    modes = sorted({mode for stages in runs.values() for mode, _, _ in stages})
    colours = {mode: PALETTE[index % len(PALETTE)] for index, mode in enumerate(modes)}
    named: set[str] = set()
    for row, stages in enumerate(runs.values()):
        before = 0.0
        for mode, choice, ratio in stages:
            axes.barh(
                row,
                100 * max(ratio - before, 0.0),
                left=100 * before,
                height=0.72,
                color=colours[mode],
                edgecolor="white",
                linewidth=0.8,
                hatch="////" if choice == "explore" else None,
                label=None if mode in named else mode.replace("_", " "),
            )
            named.add(mode)
            before = ratio
    axes.set_yticks(range(len(runs)), list(runs))
    axes.invert_yaxis()
    _polish(axes)
    axes.grid(visible=False, axis="y")
    figure.legend(fontsize=9, frameon=False, loc="outside lower center", ncols=5)
    return _write(figure, target)


def plot_interference(
    layers: Sequence["LayerInterference"], target: Path, *, title: str
) -> list[Path]:
    """Draws, per encoder and layer, how much the two importance measures agree.

    Each encoder's solid line is the share of tokens that are important by both measures, the
    dashed one of the same colour what two random choices would share.

    Args:
        layers: From ``comp.diagnostics.interference``.
        target: Where to write, without a suffix.
        title: Above the plot.

    Returns:
        The PNG and the SVG.

    Raises:
        ValueError: If there is no layer.

    Source: CoMP (arXiv 2604.02956), Figure 2.
    """
    if not layers:
        raise ValueError("a plot of interference needs at least one layer, but got none")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=13, loc="left")
    axes.set_xlabel("layer (the first is 1)", fontsize=11)
    axes.set_ylabel("top tokens by both importance measures (%)", fontsize=11)
    for index, encoder in enumerate(dict.fromkeys(layer.encoder for layer in layers)):
        own = [layer for layer in layers if layer.encoder == encoder]
        number = [layer.layer + 1 for layer in own]
        colour = PALETTE[index % len(PALETTE)]
        axes.plot(
            number,
            [100 * layer.overlap for layer in own],
            color=colour,
            marker=MARKERS[index % len(MARKERS)],
            label=encoder,
            zorder=3,
        )
        axes.plot(
            number,
            [100 * layer.expected for layer in own],
            color=colour,
            linestyle="--",
            label=f"{encoder}, by chance",
            zorder=2,
        )
    _polish(axes)
    axes.set_ylim(0, 100)
    axes.set_xticks(range(1, 2 + max(layer.layer for layer in layers)))
    axes.legend(fontsize=9, frameon=False, loc="best")
    return _write(figure, target)


def _polish(axes: Axes) -> None:
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _over_ratios(title: str, height: str) -> tuple[Figure, Axes]:
    """Returns empty axes of points of 100 over the share of FLOPs removed."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=13, loc="left")
    axes.set_xlabel(REMOVED, fontsize=11)
    axes.set_ylabel(f"{height} (points of 100)", fontsize=11)
    _polish(axes)
    return figure, axes


def _axes(
    curves: Sequence[Curve], title: str, metric: Metric, metric_name: str
) -> tuple[Figure, Axes]:
    if not curves:
        raise ValueError("a plot needs at least one run with a finished ratio, but got none")
    check_comparable(curves)
    figure, axes = _over_ratios(title, f"{LABELS[metric]} {metric_name}")
    heights = sorted({round(float(getattr(c.dense, metric)), 6) for c in curves if c.dense})
    for index, height in enumerate(heights):
        label = f"dense: {height:.1f}" if len(heights) == 1 else "dense" if index == 0 else None
        axes.axhline(height, color=BLACK, linestyle="--", linewidth=1.2, label=label, zorder=1)
    return figure, axes


def _line(
    axes: Axes,
    curve: Curve,
    metric: Metric,
    colour: str,
    marker: str,
    *,
    label: str | None,
    width: float,
    size: float,
    order: int,
) -> None:
    axes.plot(
        [100 * ratio for ratio in curve.ratios],
        curve.values(metric),
        color=colour,
        marker=marker,
        markersize=size,
        linewidth=width,
        label=label,
        zorder=order,
    )


def _annotate(axes: Axes, curve: Curve, metric: Metric) -> None:
    for point in curve.points:
        if point.method == "dense":
            continue
        axes.annotate(
            f"{getattr(point, metric):.1f}",
            (100 * point.ratio_reached, getattr(point, metric)),
            textcoords="offset points",
            xytext=(5, 7),
            ha="left",
            fontsize=9,
            color=BLUE,
            zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
        )


def _save(figure: Figure, axes: Axes, target: Path) -> list[Path]:
    axes.margins(x=0.04, y=0.12)
    axes.set_xlim(left=-1)
    axes.legend(fontsize=9, frameon=False, loc="best")
    return _write(figure, target)


def _write(figure: Figure, target: Path) -> list[Path]:
    written = []
    for suffix in ("png", "svg"):
        path = target.with_name(f"{target.name}.{suffix}")
        temporary = path.with_name(f".{path.name}")
        metadata = {"Date": None} if suffix == "svg" else {}
        # Text stays text, and names inside the file do not change from one drawing to the next.
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "comp"}):
            figure.savefig(temporary, format=suffix, dpi=150, metadata=metadata)
        if suffix == "svg":  # whose lines end in spaces, which keep files under git from settling
            lines = temporary.read_text(encoding="utf-8").splitlines()
            temporary.write_text("\n".join(map(str.rstrip, lines)) + "\n", encoding="utf-8")
        temporary.replace(path)
        written.append(path)
    return written
