"""What a study looks like from another terminal."""

import json
import os
import socket
import time
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from studies.driver import run_study
from studies.folder import StudyFolder
from studies.overview import Watcher, changes, headline, opening
from studies.pulse import PULSE, Pulse, leaving_pulse, read_pulse
from studies.watch_screen import screen_of, watch
from tests.studies.synthetic import RUNNER, SlotsExecutor, make_spec

BOTH = "objective=[{val_at: 0.8}, {gflops_at: 0.8}]"


def stopped_after(root: Path, polls: int, *changes: str) -> StudyFolder:
    """Runs a study until it was polled so often, and leaves its trials running."""
    spec = make_spec(root, *changes)
    seen: list[int] = []
    executor = SlotsExecutor(2, before_poll=seen.append)
    run_study(spec, lambda: executor, runner=RUNNER, should_stop=lambda: len(seen) >= polls)
    return StudyFolder.of(spec)


def test_runs_under_way_show_their_stage_and_ratio(tmp_path: Path) -> None:
    view = Watcher(stopped_after(tmp_path, 5)).look()
    assert {run.trial for run in view.live} == {0, 1}
    assert all(run.ratio == {0: 0.0, 1: 0.5, 2: 0.8}[run.stage] for run in view.live)
    assert any(run.stage for run in view.live)
    assert "2 running" in headline(view)


def test_a_study_that_nobody_drives_says_how_to_go_on(tmp_path: Path) -> None:
    folder = stopped_after(tmp_path, 5)
    assert "no driver is at work; 'comp study resume s' goes on" in opening(Watcher(folder).look())


def test_the_driver_leaves_a_sign_of_life_and_takes_it_away(tmp_path: Path) -> None:
    folder = stopped_after(tmp_path, 5)
    with folder.hold(), leaving_pulse(folder, lambda: {"CPUs": (1.0, 2.0)}):
        deadline = time.monotonic() + 30
        while not folder.storage.exists(PULSE) and time.monotonic() < deadline:
            time.sleep(0.01)
        view = Watcher(folder).look()
        assert view.is_driven
        assert any(line.endswith("in use: CPUs 1 of 2") for line in opening(view))
    assert read_pulse(folder) is None


def test_a_driver_that_has_not_spoken_yet_is_at_work(tmp_path: Path) -> None:
    """Ray takes seconds to start, and whoever watches at once should not be sent away."""
    folder = stopped_after(tmp_path, 5)
    with folder.hold():
        assert f"driver: process {os.getpid()} on {socket.gethostname()}" in opening(
            Watcher(folder).look()
        )


def test_a_holder_that_has_fallen_silent_is_not(tmp_path: Path) -> None:
    """On another host a killed driver leaves its name in the lock's file."""
    folder = stopped_after(tmp_path, 5)
    (folder.path / "driver.lock").write_text('{"host": "elsewhere", "pid": 1}')
    pulse = Pulse(time.time() - 60, time.time() - 90, "elsewhere", 1, {})
    (folder.path / PULSE).write_text(json.dumps(asdict(pulse)))
    assert not Watcher(folder).look().is_driven


def test_what_happened_between_two_looks_is_a_line_each(tmp_path: Path) -> None:
    folder = stopped_after(tmp_path, 5)
    watcher = Watcher(folder)
    before = watcher.look()
    run_study(make_spec(tmp_path), lambda: SlotsExecutor(2), runner=RUNNER)
    lines = changes(before, watcher.look())
    assert sum(line.startswith("trial ") and " complete " in line for line in lines) == 6
    assert any(line.startswith("best: trial") for line in lines)


@pytest.mark.parametrize("width", [40, 120])
def test_a_screen_shows_the_front_and_fits(tmp_path: Path, width: int) -> None:
    folder = stopped_after(tmp_path, 10**6, BOTH)
    console = Console(width=width, height=24, force_terminal=True, record=True, file=StringIO())
    console.print(screen_of(Watcher(folder).look(), console))
    text = console.export_text()
    assert "6 of 6 trials over" in text
    assert "Pareto front" in text
    assert max(map(len, text.splitlines())) <= width


def test_at_eighty_columns_every_part_has_its_own_line_and_no_head_is_cut(tmp_path: Path) -> None:
    folder = stopped_after(tmp_path, 10**6, BOTH)
    console = Console(width=80, height=24, force_terminal=True, record=True, file=StringIO())
    console.print(screen_of(Watcher(folder).look(), console))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert "━" * 60 in lines
    assert "finished" in lines
    assert any(line.startswith("trial  val_at 0.8  gflops_at 0.8  chosen") for line in lines)


def test_elsewhere_than_on_a_terminal_there_are_plain_lines(tmp_path: Path) -> None:
    folder = stopped_after(tmp_path, 10**6)
    lines: list[str] = []
    watch(Watcher(folder), 0.1, Console(force_terminal=False), lines.append)
    assert lines[2] == "finished"
    assert not any("\x1b" in line for line in lines)
