"""Prunings on Ray that run out of memory, with real limits and real allocations."""

from dataclasses import replace
from pathlib import Path

import pytest

from orchestration.executor import Event
from orchestration.job import Failure, JobEnd, Notice
from orchestration.ray_executor import RayExecutor
from orchestration.store import read_run
from tests.orchestration.tiny_trials import make_tiny_job
from tests.orchestration.troubled_trials import RUNNER, trouble

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

Events = dict[str, list[Event]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memory")


@pytest.fixture(scope="module")
def events(place: Path, ray_cluster: str) -> Events:
    """Of three runs: one that fits with half the batch, one that never does, and a modest one."""
    trouble(place, "s-0000", "hungry 200")  # 800 MiB for a batch of four, and 500 are allowed
    trouble(place, "s-0001", "hungry 1000")
    with RayExecutor(2) as executor:
        for number in range(3):
            executor.submit(replace(make_tiny_job(place, run=f"s-000{number}"), runner=RUNNER))
        found: Events = {}
        for event in executor.events():
            found.setdefault(event.handle.job.run_id, []).append(event)
    return found


def retries(events: list[Event]) -> list[str]:
    bodies = [event.body for event in events]
    return [b.message for b in bodies if isinstance(b, Notice) and b.kind == "retrying"]


def test_a_run_without_memory_goes_on_with_half_the_batch(events: Events, place: Path) -> None:
    assert isinstance(events["s-0000"][-1].body, JobEnd), events["s-0000"][-1].body
    (retry,) = retries(events["s-0000"])
    assert retry.startswith("retrying (1/1) with batches in 2 parts after its last stage")
    assert "out of memory (tried to allocate 800 MiB; the worker has used up to" in retry
    records = read_run(place / "s-0000").records
    assert [record.attempt for record in records] == [0, *[1] * (len(records) - 1)]


def test_a_run_that_never_fits_is_tried_twice_and_fails_with_the_figures(
    events: Events, place: Path
) -> None:
    end = events["s-0001"][-1].body
    assert isinstance(end, Failure)
    assert (end.kind, end.attempts) == ("memory", 2)
    assert end.message.startswith("out of memory 2 times, the last one with smaller parts of")
    assert "tried to allocate 2,000 MiB; the worker has used up to " in end.message
    assert read_run(place / "s-0001").failure == end


def test_other_runs_do_not_notice(events: Events) -> None:
    assert isinstance(events["s-0002"][-1].body, JobEnd)
    assert retries(events["s-0002"]) == []
