"""One run with two workers in a placement group of the pool, with real Ray and real accidents."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from orchestration import worker
from orchestration.cluster import ClusterError
from orchestration.executor import Event, Resources
from orchestration.job import Failure, JobEnd, Notice, Record
from orchestration.ray_crew import cause_among
from orchestration.ray_executor import RayExecutor
from orchestration.store import read_run
from tests.comp.shared_runs import assert_close
from tests.orchestration.gang_trials import make_shared_job
from tests.orchestration.tiny_trials import facts
from tests.orchestration.trials import make_job

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

PAIR = Resources(cpus=0.5, workers=2)


@pytest.fixture(scope="module")
def pair(ray_cluster: str) -> Iterator[RayExecutor]:
    """One slot of two workers, warm from test to test."""
    with RayExecutor(1, PAIR) as executor:
        yield executor


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, pair: RayExecutor) -> tuple[Record, ...]:
    """The records of an undisturbed run of two workers with shards and a forked fine-tuning."""
    job = make_shared_job(tmp_path_factory.mktemp("calm"), fine_tune="fork")
    pair.submit(job)
    assert isinstance(list(pair.events())[-1].body, JobEnd)
    return read_run(job.run_dir).records


def retries(events: list[Event]) -> list[str]:
    bodies = [event.body for event in events]
    return [body.message for body in bodies if isinstance(body, Notice) and body.attempt]


def test_two_workers_in_a_placement_group_find_what_one_finds(
    tmp_path: Path, calm: tuple[Record, ...]
) -> None:
    job = make_shared_job(tmp_path)
    assert isinstance(list(worker.run(job))[-1], JobEnd)
    alone = [record.body for record in read_run(job.run_dir).records]
    assert len(alone) > 3
    assert_close([record.body for record in calm], alone)


@pytest.mark.chaos
def test_a_killed_peer_costs_one_stage_and_changes_no_number(
    tmp_path: Path, pair: RayExecutor, calm: tuple[Record, ...]
) -> None:
    (tmp_path / "peer-s-0000").write_text("3")  # in the second stage: one part a step is its own
    pair.submit(make_shared_job(tmp_path))
    events = list(pair.events())
    assert isinstance(events[-1].body, JobEnd), events[-1].body
    assert retries(events)[0].startswith("retrying (1/5) after its last stage; lost process ")
    records = read_run(tmp_path / "s-0000").records
    assert [record.attempt for record in records][:3] == [0, 0, 1]
    assert facts(records) == facts(calm)


def test_what_a_peer_says_of_itself_goes_before_that_it_has_left() -> None:
    left, starved = Failure("infrastructure", "gone"), Failure("memory", "out of memory")
    assert cause_among([ray.put(None), ray.put(starved)], left) == starved
    assert cause_among([ray.put(None), ray.put(left)], left) == left
    other = Failure("algorithm", "loss is nan")
    assert cause_among([ray.put(starved)], other) == other


def test_a_peer_that_raises_says_why(tmp_path: Path) -> None:
    failure = worker.follow(make_job(tmp_path, runner="nothing"))
    assert failure is not None
    assert (failure.kind, failure.error) == ("algorithm", "AttributeError")


def test_a_peer_writes_nothing(tmp_path: Path) -> None:
    failure = worker.follow(make_job(tmp_path))
    assert failure is not None
    assert failure.error == "Fenced"
    assert not list((tmp_path / "s-0000").glob("records/*"))


def test_a_cancelled_run_frees_both_workers(tmp_path: Path, pair: RayExecutor) -> None:
    handle = pair.submit(make_shared_job(tmp_path, sharded=False))
    while not any(isinstance(event.body, Record) for event in pair.poll(1.0)):
        pass
    ((place, _),) = pair.places
    pair.cancel(handle)
    pair.submit(make_shared_job(tmp_path, run="s-0001", sharded=False))
    ends = [e.body for e in pair.events() if isinstance(e.body, Failure | JobEnd)]
    assert [type(end) for end in ends] == [Failure, JobEnd]
    assert [each for each, _ in pair.places] == [place]


def test_more_workers_than_the_cluster_holds_are_refused() -> None:
    with pytest.raises(
        ClusterError,
        match="asks for 3 workers of 2 CPUs each, but 1 nodes hold no more than 2 of these",
    ):
        RayExecutor(1, Resources(cpus=2, workers=3))


def test_no_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="workers must be at least 1, but got 0"):
        Resources(workers=0)
