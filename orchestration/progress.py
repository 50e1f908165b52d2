"""What a person sees while jobs run: one live line per job, or one line per event in a log."""

import math
import shutil
import sys
import time
from dataclasses import dataclass
from typing import TextIO

from comp.results import CurvePoint, StageRecord
from orchestration.executor import Event, Handle
from orchestration.job import Failure, Job, JobEnd, Notice, Record

NEAR = 0.01  # how far below its last ratio a trajectory may end

_WIDTHS = {"stage": 11, "mode": 15, "ratio": 15, "val": 10}


@dataclass
class _State:
    """What a job's line is made from."""

    job: Job
    began: float
    ratio_then: float = 0.0
    ratio: float = 0.0
    stage: StageRecord | None = None
    point: CurvePoint | None = None
    note: str = ""


class Progress:
    """Shows the events of an executor.

    On a terminal the running jobs have one line each at the bottom, redrawn in place, and what is
    worth keeping scrolls above them. Elsewhere every stage, point and end is a line of its own.
    """

    def __init__(self, stream: TextIO | None = None, *, live: bool | None = None) -> None:
        """Draws nothing yet.

        Args:
            stream: Where to; standard error if ``None``.
            live: Whether to redraw lines; ``None`` means if the stream is a terminal.
        """
        self._stream = stream if stream is not None else sys.stderr
        self._live = self._stream.isatty() if live is None else live
        self._states: dict[Handle, _State] = {}
        self._drawn = 0

    def update(self, event: Event) -> None:
        """Takes one event in and shows it."""
        handle, body = event.handle, event.body
        state = self._states.setdefault(handle, _State(handle.job, time.time()))
        if isinstance(body, Record):
            self._note_record(state, body)
        elif isinstance(body, Notice) and body.kind == "forked":
            if state.stage is not None and state.ratio >= _target(state.job) - NEAR:
                state.note = "tuning"
        elif isinstance(body, Notice):
            state.note = "" if body.kind == "started" else "retrying"
            state.began, state.ratio_then = time.time(), state.ratio
            if body.kind == "retrying":
                self.print(f"{_name(state.job)}  {body.message}")
        else:
            del self._states[handle]
            self.print(_ending(state, body))
        self._draw()

    def print(self, text: str) -> None:
        """Writes a line that stays, above the live ones."""
        self._erase()
        self._stream.write(text + "\n")
        self._draw()

    def close(self) -> None:
        """Erases the live lines."""
        self._erase()
        self._states.clear()
        self._stream.flush()

    def _note_record(self, state: _State, record: Record) -> None:
        if isinstance(record.body, StageRecord):
            state.stage, state.ratio = record.body, record.body.ratio
            if record.time < state.began:  # a replay: it says nothing of today's speed
                state.ratio_then = state.ratio
        else:
            state.point = record.body
        if not self._live:
            self._stream.write(_line(state, record) + "\n")
            self._stream.flush()

    def _draw(self) -> None:
        if not self._live:
            return
        self._erase()
        width = shutil.get_terminal_size().columns - 1  # a wrapped line could not be erased
        lines = [_line(state)[:width] for state in self._states.values()]
        self._stream.write("".join(f"{line}\n" for line in lines))
        self._stream.flush()
        self._drawn = len(lines)

    def _erase(self) -> None:
        if self._drawn:
            self._stream.write(f"\x1b[{self._drawn}F\x1b[J")
            self._drawn = 0


def _name(job: Job) -> str:
    return "dense" if job.kind == "dense" else f"trial {job.trial}"


def _line(state: _State, record: Record | None = None) -> str:
    """Returns a job's line: how far it is, or what a record says."""
    job, stage = state.job, state.stage
    name = _name(job).ljust(9)
    if record is not None and isinstance(record.body, CurvePoint):
        return f"{name} {_show_point(record.body)}"
    if stage is None:
        return f"{name} measures the dense model" if not state.point else f"{name} begins"
    cells = {
        "stage": f"stage {stage.stage}/{_stages(job, stage)}",
        "mode": stage.mode.replace("_", " "),
        "ratio": f"ratio {stage.ratio:.2f}/{_target(job):.2f}",
        "val": f"val {stage.val:.2f}",
    }
    parts = [text.ljust(_WIDTHS[key]) for key, text in cells.items()]
    parts.append(state.note or _left(state))
    return f"{name} {'  '.join(parts)}".rstrip()


def _show_point(point: CurvePoint) -> str:
    what = f"ratio {point.ratio_reached:.3f}" if point.ratio_asked else "dense"
    return (
        f"{what}: test {point.test:.2f}, val {point.val:.2f}, {point.gmacs:.4g} GFLOPs, "
        f"{point.latency_ms:.1f} ms"
    )


def _ending(state: _State, body: JobEnd | Failure) -> str:
    name = _name(state.job).ljust(9)
    if isinstance(body, Failure):
        return f"{name} {body.kind}: {body.message}"
    return f"{name} done, {_show_point(state.point)}" if state.point else f"{name} done"


def _stages(job: Job, stage: StageRecord) -> str:
    """Returns how many stages there will be: an estimate once capped quanta stretch the way."""
    planned = job.config.get("num_stages")
    if planned is None:
        return "?"
    left = _target(job) - stage.ratio
    if left <= 0 or stage.stage < planned:
        return str(max(planned, stage.stage))
    return f"~{stage.stage + math.ceil(left * stage.stage / max(stage.ratio, 1e-3))}"


def _target(job: Job) -> float:
    ratios = job.config.get("ratios") or [0.0]
    return float(ratios[-1])


def _left(state: _State) -> str:
    """Estimates the time left from the ratio gained since this worker began."""
    gained = state.ratio - state.ratio_then
    if gained <= 0:
        return ""
    elapsed = time.time() - state.began
    return f"{show_seconds(elapsed * max(0.0, _target(state.job) - state.ratio) / gained)} left"


def show_seconds(seconds: float) -> str:
    """Returns ``"45 s"``, ``"3 min 20 s"`` or ``"2 h 5 min"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
