"""The pool of Ray actors, with real Ray and real accidents."""

import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestration import worker
from orchestration.cluster import ClusterError
from orchestration.executor import Event, Handle, Resources
from orchestration.job import Failure, FailureKind, Job, JobEnd, Notice, Record
from orchestration.ray_actor import PrunerActor
from orchestration.ray_executor import RayExecutor
from orchestration.retry import RULES, Rule
from orchestration.store import read_run
from tests.orchestration.trials import disturb, make_job, numbers

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

SMALL = Resources(cpus=0.5)


Pool = Callable[..., RayExecutor]


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Makes executors with options of their own."""
    opened: list[RayExecutor] = []

    def make(num_slots: int = 1, resources: Resources = SMALL, **options: Any) -> RayExecutor:
        opened.append(RayExecutor(num_slots, resources, **options))
        return opened[-1]

    yield make
    for executor in opened:
        executor.close()


@pytest.fixture(scope="module")
def shared(ray_cluster: str) -> Iterator[RayExecutor]:
    """Two slots whose actors stay warm from test to test."""
    with RayExecutor(2, SMALL) as executor:
        yield executor


@pytest.fixture
def warm(shared: RayExecutor) -> Iterator[RayExecutor]:
    yield shared
    for handle in list(shared._retries):
        shared.cancel(handle)
    list(shared.events())


def losing(workers: int) -> Mapping[FailureKind, Rule]:
    """The usual rules, but for how many workers a job may lose."""
    return {**RULES, "infrastructure": Rule(retries=workers)}


def calm_numbers(directory: Path) -> list[dict[str, object]]:
    job = make_job(directory / "calm")
    list(worker.run(job))
    return numbers(read_run(job.run_dir).records)


def run_all(executor: RayExecutor) -> dict[str, list[Event]]:
    events: dict[str, list[Event]] = {}
    for event in executor.events():
        events.setdefault(event.handle.job.run_id, []).append(event)
    return events


def kinds_of(events: list[Event]) -> list[str]:
    return [e.body.kind if isinstance(e.body, Notice) else type(e.body).__name__ for e in events]


def pid_of(executor: RayExecutor, handle: Handle) -> int:
    return next(place.pid for place, run in executor.places if run == handle.job.run_id)


def until_struck(executor: RayExecutor, handle: Handle) -> list[Event]:
    """Polls until the accident that ``disturb`` planted for the job is under way."""
    seen: list[Event] = []
    order = Path(handle.job.run_dir).parent / f"disturb-{handle.job.run_id}"
    while order.exists():
        seen += executor.poll(0.1)
    while executor.places and (more := executor.poll(0.2)):
        seen += more
    return seen


def test_jobs_run_side_by_side_in_other_processes(tmp_path: Path, warm: RayExecutor) -> None:
    for i in range(4):
        warm.submit(make_job(tmp_path, run=f"s-000{i}"))
    assert warm.free_slots == 0
    events = run_all(warm)
    assert all(kinds_of(e) == ["started", *["Record"] * 7, "JobEnd"] for e in events.values())
    pids = {place.pid for place, run in warm.places}
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert warm.free_slots == 2


def test_the_events_are_what_lies_on_disk(tmp_path: Path, warm: RayExecutor) -> None:
    warm.submit(make_job(tmp_path))
    records = [e.body for e in run_all(warm)["s-0000"] if isinstance(e.body, Record)]
    assert records == list(read_run(tmp_path / "s-0000").records)


@pytest.mark.chaos
def test_a_killed_worker_costs_one_stage_and_changes_no_number(
    tmp_path: Path, warm: RayExecutor
) -> None:
    disturb(tmp_path, "s-0000", "hang", 3)
    handle = warm.submit(make_job(tmp_path))
    events = until_struck(warm, handle)
    os.kill(pid_of(warm, handle), signal.SIGKILL)
    events += run_all(warm)["s-0000"]
    assert kinds_of(events) == [
        *("started", "Record", "Record", "Record"),
        *("retrying", "started", "Record", "Record", "Record", "Record", "JobEnd"),
    ]
    run = read_run(tmp_path / "s-0000")
    assert numbers(run.records) == calm_numbers(tmp_path)
    assert [record.attempt for record in run.records] == [0, 0, 0, 1, 1, 1, 1]


@pytest.mark.chaos
def test_a_job_that_kills_every_worker_is_given_up_and_others_are_not(
    tmp_path: Path, pool: Pool
) -> None:
    executor = pool(rules=losing(1))
    disturb(tmp_path, "s-0000", "always-die", 1)
    for i in range(2):
        executor.submit(make_job(tmp_path, run=f"s-000{i}"))
    events = run_all(executor)
    end = events["s-0000"][-1].body
    assert isinstance(end, Failure)
    assert (end.kind, end.attempts) == ("infrastructure", 2)
    assert end.message.startswith("lost 2 workers, the last time: ")
    assert read_run(tmp_path / "s-0000").failure == end
    assert isinstance(events["s-0001"][-1].body, JobEnd)


def test_what_the_algorithm_raises_fails_that_job_only_and_is_not_retried(
    tmp_path: Path, pool: Pool
) -> None:
    executor = pool(1)
    disturb(tmp_path, "s-0000", "raise", 4)
    for i in range(2):
        executor.submit(make_job(tmp_path, run=f"s-000{i}"))
    events = run_all(executor)
    assert kinds_of(events["s-0000"]) == ["started", *["Record"] * 4, "Failure"]
    assert isinstance(events["s-0001"][-1].body, JobEnd)
    assert len(executor.places) == 1  # the same worker took both


@pytest.mark.chaos
def test_a_hung_worker_is_replaced_after_the_time_limit(tmp_path: Path, pool: Pool) -> None:
    executor = pool(1, stage_timeout=2.0)
    disturb(tmp_path, "s-0000", "hang", 3)
    executor.submit(make_job(tmp_path))
    events = run_all(executor)["s-0000"]
    notices = [e.body.message for e in events if isinstance(e.body, Notice)]
    assert "it gave no record for 2 s" in notices[1]
    assert numbers(read_run(tmp_path / "s-0000").records) == calm_numbers(tmp_path)


class CutsOff(PrunerActor):
    """Ends the first attempt's stream early, as Ray does with a retried one that is shorter."""

    def run(self, job: Job) -> Iterator[worker.Item]:
        for item in super().run(job):
            if job.attempt == 0 and isinstance(item, Record) and item.index == 2:
                return
            yield item


@pytest.mark.chaos
def test_a_stream_that_ends_without_its_end_is_not_taken_for_complete(
    tmp_path: Path, pool: Pool
) -> None:
    executor = pool(1)
    executor._actor_class = CutsOff
    executor.submit(make_job(tmp_path))
    events = run_all(executor)["s-0000"]
    assert kinds_of(events).count("Record") == 7
    (retry,) = [e.body for e in events if kinds_of([e]) == ["retrying"]]
    assert isinstance(retry, Notice)
    assert "its stream ended early" in retry.message
    assert numbers(read_run(tmp_path / "s-0000").records) == calm_numbers(tmp_path)


@pytest.mark.chaos
def test_a_worker_told_to_go_finishes_its_stage_and_the_job_moves_for_free(
    tmp_path: Path, pool: Pool
) -> None:
    executor = pool(2, rules=losing(0))
    disturb(tmp_path, "s-0000", "nap", 3)
    handle = executor.submit(make_job(tmp_path))
    until_struck(executor, handle)
    os.kill(pid_of(executor, handle), signal.SIGTERM)
    events = run_all(executor)["s-0000"]
    assert kinds_of(events)[:2] == ["Record", "retrying"]
    assert isinstance(events[-1].body, JobEnd)
    assert [r.attempt for r in read_run(tmp_path / "s-0000").records] == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.chaos
def test_an_idle_worker_told_to_go_leaves_at_once_and_costs_no_job_a_retry(
    tmp_path: Path, pool: Pool
) -> None:
    executor = pool(1, rules=losing(0))
    executor.submit(make_job(tmp_path))
    run_all(executor)
    ((place, _),) = executor.places
    os.kill(place.pid, signal.SIGTERM)
    _, alive = psutil.wait_procs([psutil.Process(place.pid)], timeout=60)
    assert not alive
    executor.submit(make_job(tmp_path, run="s-0001"))
    assert isinstance(run_all(executor)["s-0001"][-1].body, JobEnd)


def test_a_cancelled_job_frees_its_slot_and_keeps_its_worker(tmp_path: Path, pool: Pool) -> None:
    executor = pool()
    disturb(tmp_path, "s-0000", "nap", 3)
    handle = executor.submit(make_job(tmp_path))
    until_struck(executor, handle)
    pid = pid_of(executor, handle)
    executor.cancel(handle)
    assert executor.free_slots == 1
    executor.submit(make_job(tmp_path, run="s-0001"))
    events = run_all(executor)
    assert kinds_of(events["s-0000"]) == ["Failure"]
    assert isinstance(events["s-0001"][-1].body, JobEnd)
    assert [place.pid for place, _ in executor.places] == [pid]


def test_a_cancelled_job_that_does_not_stop_loses_its_worker(tmp_path: Path, pool: Pool) -> None:
    executor = pool(1, cancel_grace=0.5)
    disturb(tmp_path, "s-0000", "hang", 3)
    handle = executor.submit(make_job(tmp_path))
    until_struck(executor, handle)
    pid = pid_of(executor, handle)
    executor.cancel(handle)
    executor.submit(make_job(tmp_path, run="s-0001"))
    assert isinstance(run_all(executor)["s-0001"][-1].body, JobEnd)
    assert [place.pid for place, _ in executor.places] != [pid]


def test_a_waiting_job_can_be_cancelled(tmp_path: Path, pool: Pool) -> None:
    executor = pool(1)
    executor.submit(make_job(tmp_path))
    waiting = executor.submit(make_job(tmp_path, run="s-0001"))
    executor.cancel(waiting)
    events = run_all(executor)
    assert kinds_of(events["s-0001"]) == ["Failure"]
    assert isinstance(events["s-0000"][-1].body, JobEnd)


def test_an_actor_is_replaced_after_its_share_of_jobs(tmp_path: Path, pool: Pool) -> None:
    executor = pool(1, recycle_after=2)
    for i in range(3):
        executor.submit(make_job(tmp_path, run=f"s-000{i}"))
    events = run_all(executor)
    places = [e.body.message for es in events.values() for e in es if isinstance(e.body, Notice)]
    assert places[0] == places[1] != places[2]


def test_an_actor_that_grows_is_replaced(tmp_path: Path, pool: Pool) -> None:
    executor = pool(1, max_growth_mib=48)
    for i in range(4):
        executor.submit(make_job(tmp_path, run=f"s-000{i}", runner="leak"))
    events = run_all(executor)
    places = [e.body.message for es in events.values() for e in es if isinstance(e.body, Notice)]
    assert places[0] == places[1] == places[2] != places[3]  # 64 MiB above the first job's end


def test_no_free_cpus_is_said_with_what_is_asked_for_and_what_there_is(
    tmp_path: Path, pool: Pool
) -> None:
    taker = pool(1, Resources(cpus=3))
    disturb(tmp_path, "s-0000", "hang", 1)
    until_struck(taker, taker.submit(make_job(tmp_path)))
    executor = pool(2, Resources(cpus=2), start_timeout=1.0)
    executor.submit(make_job(tmp_path, run="s-0001"))
    with pytest.raises(
        ClusterError, match=r"2 slots of 2 CPUs are asked for, and [01.5]+ of 4 CPUs are free"
    ):
        list(executor.events())


def test_a_second_job_for_one_directory_is_refused(tmp_path: Path, warm: RayExecutor) -> None:
    warm.submit(make_job(tmp_path))
    with pytest.raises(ValueError, match="run s-0000 is already under way"):
        warm.submit(make_job(tmp_path))


def test_actors_of_unlike_size_do_not_starve_each_other(tmp_path: Path, pool: Pool) -> None:
    """Each of the small jobs holds half a GPU, and there always is a next one."""
    sizes = {"small": Resources(cpus=0.5, gpus=0.5), "large": Resources(cpus=0.5, gpus=2)}
    executor = pool(4, lambda job: sizes[job.model], make_way_after=0.3)
    numbers, ended = itertools.count(), Counter[str]()

    def submit(model: str) -> None:
        run = f"s-{next(numbers):04d}"
        executor.submit(make_job(tmp_path, run=run, model=model, runner="nap"))

    for model in ("small", "small", "small", "large", "small"):
        submit(model)
    deadline = time.monotonic() + 60
    while not (ended["large"] >= 2 and ended["small"] >= 4):
        assert time.monotonic() < deadline, f"only {ended} ended"
        for event in executor.poll(0.1):
            if isinstance(event.body, JobEnd):
                ended[event.handle.job.model] += 1
                submit(event.handle.job.model)
            assert not isinstance(event.body, Failure)


def test_no_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="num_slots must be at least 1, but got 0"):
        RayExecutor(0)


def test_a_poll_without_jobs_returns_at_once(pool: Pool) -> None:
    began = time.monotonic()
    assert pool(1).poll(5.0) == []
    assert time.monotonic() - began < 1
