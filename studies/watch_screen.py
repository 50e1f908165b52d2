"""Draws a watched study on a terminal, again and again in place."""

import time
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from studies.goals import objective_name
from studies.overview import (
    View,
    Watcher,
    best_line,
    changes,
    driver_line,
    headline,
    opening,
    run_cells,
)
from studies.report import params_text, value_text

MAX_FRONT = 8
WIDE = 80  # columns, from which on there is room for the settings of the front


def watch(watcher: Watcher, interval: float, console: Console, say: Callable[[str], None]) -> View:
    """Shows a study until it is over or nobody drives it, and returns the last view.

    Args:
        watcher: Looks at it.
        interval: Seconds between two looks.
        console: Where to draw; anything but a terminal gets a line for every change instead.
        say: Takes such lines.
    """
    view = watcher.look()
    if not console.is_terminal:
        for line in opening(view):
            say(line)
        while view.is_driven:
            time.sleep(interval)
            before, view = view, watcher.look()
            for line in changes(before, view):
                say(line)
        return view
    with Live(screen_of(view, console), console=console, auto_refresh=False) as live:
        while view.is_driven:
            time.sleep(interval)
            view = watcher.look()
            live.update(screen_of(view, console), refresh=True)
    return view


def screen_of(view: View, console: Console) -> Group:
    """Returns what a terminal shows, no taller than it."""
    spec = view.spec
    title = Text(f"{spec.name}: {spec.model} on {spec.task}", style="bold", no_wrap=True)
    bar = Table.grid()  # which ends its line; a bar alone leaves the next text behind it
    width, summary = min(60, console.width), view.summary
    bar.add_row(ProgressBar(summary.n_trials, summary.num_ended, width=width))
    parts: list[RenderableType] = [title, Text(objective_name(spec.objective))]
    parts += [Text(headline(view)), bar, _line(driver_line(view)), Text("")]
    room = max(0, console.height - len(parts) - 6)
    if view.live:
        parts += [_runs(view, room), Text("")]
    parts.append(_line(best_line(view), "green" if view.summary.best else ""))
    room -= min(room, len(view.live) + 2)
    if len(spec.objective) > 1 and view.summary.front:
        parts += [Text(""), _front(view, min(MAX_FRONT, room), is_wide=console.width >= WIDE)]
    return Group(*parts)


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, overflow="fold")


def _runs(view: View, room: int) -> Table:
    table = Table.grid(padding=(0, 2))
    for run in view.live[: max(1, room)]:
        table.add_row(*run_cells(run))
    if len(view.live) > max(1, room):
        table.add_row(f"and {len(view.live) - max(1, room)} more")
    return table


def _front(view: View, room: int, *, is_wide: bool) -> Table:
    front = view.summary.front[: max(1, room)]
    rest = len(view.summary.front) - len(front)
    title = "Pareto front" + (f" (and {rest} more)" if rest else "")
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for label in ("trial", *(measure.label for measure in view.spec.objective)):
        table.add_column(label, justify="right", no_wrap=True, min_width=len(label))
    if is_wide:
        table.add_column("chosen", no_wrap=True, overflow="ellipsis")
    for trial in front:
        values = [value_text(trial, index) for index in range(len(view.spec.objective))]
        chosen = [params_text(trial)] if is_wide else []
        table.add_row(str(trial.number), *values, *chosen)
    return table
