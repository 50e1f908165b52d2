"""What a person sees of running jobs, on a terminal and in a log."""

import io
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from orchestration.executor import Event, Handle, InlineExecutor
from orchestration.job import Failure, Job, JobEnd, Notice, Record
from orchestration.progress import Progress, show_seconds
from tests.orchestration.trials import make_job, make_point, make_stage


def shown_of(job: Job, *, live: bool) -> str:
    stream = io.StringIO()
    progress = Progress(stream, live=live)
    with InlineExecutor() as executor:
        executor.submit(job)
        for event in executor.events():
            progress.update(event)
    progress.close()
    return stream.getvalue()


def screen_of(text: str) -> list[str]:
    """What a terminal shows after ``text``, of which ``ESC [n F`` and ``ESC [J`` erase lines."""
    lines: list[str] = []
    for part in re.split(r"(\x1b\[\d+F\x1b\[J)", text):
        if part.startswith("\x1b"):
            del lines[-int(part[2:-4]) :]
        else:
            lines += part.splitlines()
    return lines


def test_a_log_has_one_line_a_record_and_no_control_characters(tmp_path: Path) -> None:
    lines = shown_of(make_job(tmp_path, run="s-0003"), live=False).splitlines()
    assert len(lines) == 8
    assert lines[0].startswith("trial 3   dense: test 79.00, val ")
    assert re.match(r"trial 3   stage 1/4    vision tokens    ratio 0.12/0.50", lines[1])
    assert lines[-1].startswith("trial 3   done, ratio 0.500: test 74.00")
    assert not any("\x1b" in line for line in lines)


def test_a_terminal_keeps_only_the_endings(tmp_path: Path) -> None:
    text = shown_of(make_job(tmp_path, run="s-0003"), live=True)
    assert "stage 4/4    vision params" in text
    (line,) = screen_of(text)
    assert line.startswith("trial 3   done, ratio 0.500")


def test_running_jobs_have_a_line_each_below_what_stays(tmp_path: Path) -> None:
    stream = io.StringIO()
    progress = Progress(stream, live=True)
    handles = [Handle(make_job(tmp_path, run=f"s-000{i}")) for i in range(2)]
    for handle in handles:
        progress.update(Event(handle, Notice("started", "runs here")))
        progress.update(Event(handle, Record(0, make_stage(2), time.time())))
    progress.print("a remark")
    lines = screen_of(stream.getvalue())
    assert lines[0] == "a remark"
    assert [line[:18] for line in lines[1:]] == ["trial 0   stage 2/", "trial 1   stage 2/"]


def test_stages_beyond_the_plan_are_estimated_from_the_ratio_reached(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    planned, target = job.config["num_stages"], job.config["ratios"][-1]
    stream = io.StringIO()
    progress = Progress(stream, live=False)
    handle = Handle(job)
    for number, ratio in ((planned, target / 2), (2 * planned, target)):
        stage = replace(make_stage(number), ratio=ratio)
        progress.update(Event(handle, Record(0, stage, time.time())))
    shown = re.findall(r"stage (\S+)", stream.getvalue())
    assert shown == [f"{planned}/~{2 * planned}", f"{2 * planned}/{2 * planned}"]


def test_a_trajectory_at_its_end_shows_that_its_forks_are_at_work(tmp_path: Path) -> None:
    stream = io.StringIO()
    progress = Progress(stream, live=True)
    handle = Handle(make_job(tmp_path))
    progress.update(Event(handle, Record(0, make_stage(4), time.time())))
    progress.update(Event(handle, Notice("forked", "ratio 0.5 is fine-tuned in process 7")))
    assert screen_of(stream.getvalue())[0].endswith("tuning")


def test_a_lost_worker_is_said_on_a_line_that_stays(tmp_path: Path) -> None:
    stream = io.StringIO()
    progress = Progress(stream, live=True)
    handle = Handle(make_job(tmp_path))
    progress.update(Event(handle, Notice("retrying", "lost process 7 on a host", 1)))
    progress.update(Event(handle, Failure("infrastructure", "lost 6 workers")))
    assert screen_of(stream.getvalue()) == [
        "trial 0  lost process 7 on a host",
        "trial 0   infrastructure: lost 6 workers",
    ]


def test_the_time_left_ignores_what_was_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    stream = io.StringIO()
    progress = Progress(stream, live=False)
    handle = Handle(make_job(tmp_path))
    progress.update(Event(handle, Notice("started", "")))
    progress.update(Event(handle, Record(0, make_stage(2), 500.0)))  # ratio 0.25, replayed
    now[0] = 1060.0
    progress.update(Event(handle, Record(1, make_stage(3), 1060.0)))  # 0.125 in 60 s
    replayed, fresh = stream.getvalue().splitlines()
    assert "left" not in replayed
    assert fresh.endswith("1 min 0 s left")


def test_the_dense_reference_is_named(tmp_path: Path) -> None:
    stream = io.StringIO()
    progress = Progress(stream, live=False)
    handle = Handle(make_job(tmp_path, kind="dense", method="dense"))
    progress.update(Event(handle, Record(0, make_point(0.0), 1.0)))
    progress.update(Event(handle, JobEnd(1, "0" * 16)))
    assert [line[:15] for line in stream.getvalue().splitlines()] == [
        "dense     dense",
        "dense     done,",
    ]


def test_lines_never_wrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    stream = io.StringIO()
    progress = Progress(stream, live=True)
    progress.update(Event(Handle(make_job(tmp_path)), Record(0, make_stage(2), 1.0)))
    assert all(len(line) < 30 for line in screen_of(stream.getvalue()))


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.4, "4 s"), (200, "3 min 20 s"), (7530, "2 h 5 min")]
)
def test_durations_read_like_durations(seconds: float, text: str) -> None:
    assert show_seconds(seconds) == text
