"""The inline executor, and the bookkeeping that both executors share."""

from pathlib import Path

import pytest

from orchestration.executor import (
    Event,
    Handle,
    InlineExecutor,
    Resources,
    StreamBroken,
    accept,
)
from orchestration.job import Failure, JobEnd, Notice, Record, digest_of
from tests.orchestration.trials import disturb, make_job, make_point, make_stage


def records() -> list[Record]:
    return [Record(0, make_point(0.0), 1.0), Record(1, make_stage(1), 2.0)]


def end_of(items: list[Record]) -> JobEnd:
    return JobEnd(len(items), digest_of(items))


def test_jobs_run_one_after_the_other(tmp_path: Path) -> None:
    with InlineExecutor() as executor:
        handles = [executor.submit(make_job(tmp_path, run=f"s-000{i}")) for i in range(2)]
        events = list(executor.events())
    assert [type(event.body) for event in events] == [Notice, *[Record] * 7, JobEnd] * 2
    assert [event.handle for event in events] == [handles[0]] * 9 + [handles[1]] * 9
    assert all(handle.done for handle in handles)


def test_a_failed_job_does_not_stop_the_next(tmp_path: Path) -> None:
    disturb(tmp_path, "s-0000", "raise", 2)
    with InlineExecutor() as executor:
        for i in range(2):
            executor.submit(make_job(tmp_path, run=f"s-000{i}"))
        ends = [e.body for e in executor.events() if isinstance(e.body, (JobEnd, Failure))]
    assert [type(end) for end in ends] == [Failure, JobEnd]


def test_a_cancelled_job_ends_at_its_next_record_and_can_go_on(tmp_path: Path) -> None:
    with InlineExecutor() as executor:
        handle = executor.submit(make_job(tmp_path))
        seen = []
        for event in executor.events():
            seen.append(event.body)
            if isinstance(event.body, Record) and event.body.index == 2:
                executor.cancel(handle)
        assert isinstance(seen[-1], Failure)
        assert seen[-1].kind == "cancelled"
        assert len(seen) == 5
        executor.submit(make_job(tmp_path))
        assert isinstance(list(executor.events())[-1].body, JobEnd)


def test_slots_are_free_until_taken(tmp_path: Path) -> None:
    with InlineExecutor() as executor:
        assert (executor.num_slots, executor.free_slots) == (1, 1)
        executor.submit(make_job(tmp_path))
        assert executor.free_slots == 0
        assert executor.poll(0.0)
        assert executor.free_slots == 0
        list(executor.events())
        assert executor.free_slots == 1
        assert executor.poll(0.0) == []


def test_two_jobs_cannot_fill_one_directory(tmp_path: Path) -> None:
    with InlineExecutor() as executor:
        executor.submit(make_job(tmp_path))
        with pytest.raises(ValueError, match="run s-0000 is already under way"):
            executor.submit(make_job(tmp_path))


def test_a_retried_stream_delivers_every_record_once(tmp_path: Path) -> None:
    handle, items = Handle(make_job(tmp_path)), records()
    first = [accept(handle, items[0])]
    again = [accept(handle, item) for item in [*items, end_of(items)]]
    assert first == [Event(handle, items[0])]
    assert again == [None, Event(handle, items[1]), Event(handle, end_of(items))]


@pytest.mark.parametrize(
    "stream",
    [
        [records()[1]],
        [records()[0], end_of(records())],
        [*records(), JobEnd(2, "0" * 16)],
        [records()[0], Record(1, make_stage(2), 2.0), end_of(records())],
    ],
    ids=["gap", "too short", "other digest", "other record"],
)
def test_a_broken_stream_is_noticed(tmp_path: Path, stream: list[Record | JobEnd]) -> None:
    handle = Handle(make_job(tmp_path))
    *good, broken = stream
    for item in good:
        accept(handle, item)
    with pytest.raises(StreamBroken):
        accept(handle, broken)
    assert not handle.done


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cpus": -1.0}, "cpus must not be negative, but got -1.0"),
        ({"gpus": 1.5}, "gpus above 1 must be a whole number, but got 1.5"),
    ],
)
def test_impossible_resources_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Resources(**values)  # type: ignore[arg-type]


def test_resources_read_as_a_person_would_say_them() -> None:
    assert str(Resources(2.0, 0.5, 1024)) == "2 CPUs, 0.5 GPUs, 1024 MiB of memory"
