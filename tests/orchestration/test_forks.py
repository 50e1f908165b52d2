"""Fine-tunes as jobs of their own: beside the trajectory, also after accidents, same digits."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from comp.results import CurvePoint, StageRecord
from orchestration import worker
from orchestration.executor import Event, Executor, InlineExecutor, Resources
from orchestration.job import Failure, Fork, Job, JobEnd, Notice, Record, Suspended
from orchestration.store import Run, read_run
from tests.orchestration.tiny_trials import facts, make_tiny_job


def forking(directory: Path, **changes: object) -> Job:
    return make_tiny_job(directory, fine_tune="fork", **changes)


def finish(job: Job) -> list[Event]:
    with InlineExecutor() as executor:
        executor.submit(job)
        return list(executor.events())


def by_kind(run: Run) -> list[dict[str, object]]:
    """Stages in their order, then points in theirs: forks may end in any order."""
    points = sorted(run.points, key=lambda point: point.ratio_asked)
    bodies = [*run.stages, *points]
    return facts(tuple(Record(i, body, 0.0) for i, body in enumerate(bodies)))


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> Run:
    job = make_tiny_job(tmp_path_factory.mktemp("inline"))
    *_, end = worker.run(job)
    assert isinstance(end, JobEnd), end
    return read_run(job.run_dir)


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Run:
    job = forking(tmp_path_factory.mktemp("forked"))
    assert isinstance(finish(job)[-1].body, JobEnd)
    return read_run(job.run_dir)


def test_forks_give_the_digits_of_inline_fine_tunes(inline: Run, forked: Run) -> None:
    assert by_kind(forked) == by_kind(inline)


def test_a_finished_run_looks_alike_however_it_was_fine_tuned(inline: Run, forked: Run) -> None:
    trees = [
        sorted(str(path.relative_to(run.location)) for path in Path(run.location).rglob("*"))
        for run in (inline, forked)
    ]
    assert trees[0] == trees[1]


def test_the_test_split_is_read_once_for_every_ratio(forked: Run) -> None:
    reads = Path(forked.location).with_name("reads").read_text().split()
    assert reads == ["kill-s-0000", "kill-s-0000-r100", "kill-s-0000-r200"]


def test_a_fork_is_named_when_its_ratio_is_reached_not_at_the_end(tmp_path: Path) -> None:
    items = list(worker.run(forking(tmp_path)))
    first = next(i for i, item in enumerate(items) if isinstance(item, Fork))
    assert any(isinstance(item, Record) for item in items[first + 1 :])
    assert isinstance(items[-1], Suspended)


def test_a_trajectory_adopts_a_fork_that_ends_before_it(tmp_path: Path, inline: Run) -> None:
    job = forking(tmp_path)
    items: list[object] = []
    for item in worker.run(job):
        if isinstance(item, Fork) and not any(isinstance(old, Fork) for old in items):
            list(worker.run(item.job))
        items.append(item)
    bodies = [item.body for item in items if isinstance(item, Record)]
    assert [point.ratio_asked for point in bodies if isinstance(point, CurvePoint)] == [0.0, 0.1]
    assert isinstance(bodies[-1], StageRecord)
    assert isinstance(finish(job)[-1].body, JobEnd)
    assert by_kind(read_run(job.run_dir)) == by_kind(inline)


@pytest.mark.parametrize(("before", "after"), [("fork", "inline"), ("inline", "fork")])
def test_a_run_broken_off_goes_on_the_other_way_to_the_same_digits(
    tmp_path: Path, inline: Run, before: str, after: str
) -> None:
    stream = worker.run(make_tiny_job(tmp_path, fine_tune=before))
    [next(stream) for _ in range(5)]
    stream.close()
    events = finish(make_tiny_job(tmp_path, fine_tune=after))
    assert isinstance(events[-1].body, JobEnd), events[-1].body
    assert by_kind(read_run(tmp_path / "s-0000")) == by_kind(inline)


def test_a_driver_that_died_while_forks_were_at_work_is_followed_by_one_that_ends_them(
    tmp_path: Path, inline: Run
) -> None:
    items = list(worker.run(forking(tmp_path)))
    first = next(item for item in items if isinstance(item, Fork))
    stream = worker.run(first.job)
    assert isinstance(next(stream), Record)  # on disk, and its end is not
    stream.close()
    assert isinstance(finish(forking(tmp_path))[-1].body, JobEnd)
    assert by_kind(read_run(tmp_path / "s-0000")) == by_kind(inline)


def test_a_fork_that_fails_fails_its_run_with_its_sentence(tmp_path: Path) -> None:
    end = finish(forking(tmp_path, runner="prune_with_broken_forks"))[-1].body
    assert isinstance(end, Failure), end
    assert end.message == "the loss of the fork at 0.1 is nan"
    assert read_run(tmp_path / "s-0000").failure == end


def test_a_cancelled_run_takes_its_forks_along(tmp_path: Path) -> None:
    with InlineExecutor() as executor:
        handle = executor.submit(forking(tmp_path))
        events = []
        for event in executor.events():
            events.append(event)
            if isinstance(event.body, Record) and event.body.index == 3:
                executor.cancel(handle)
    assert isinstance(events[-1].body, Failure)
    assert not any(isinstance(e.body, Notice) and e.body.kind == "forked" for e in events)


@pytest.fixture(scope="module")
def on_two_slots(ray_cluster: str) -> Iterator[Executor]:
    from orchestration.ray_executor import RayExecutor

    with RayExecutor(2, Resources(cpus=0.5)) as executor:
        yield executor


@pytest.mark.ray
def test_a_trajectory_goes_on_while_its_fork_is_at_work_elsewhere(
    tmp_path: Path, inline: Run, on_two_slots: Executor
) -> None:
    job = forking(tmp_path, runner="prune_while_the_first_fork_waits")
    handle = on_two_slots.submit(job)
    events = list(on_two_slots.events())
    assert isinstance(events[-1].body, JobEnd), events[-1].body
    assert {event.handle for event in events} == {handle}
    assert by_kind(read_run(tmp_path / "s-0000")) == by_kind(inline)
    assert on_two_slots.free_slots == 2


@pytest.mark.ray
@pytest.mark.chaos
def test_a_fork_killed_while_it_tunes_ends_with_the_undisturbed_digits(
    tmp_path: Path, inline: Run, on_two_slots: Executor
) -> None:
    (tmp_path / "kill-s-0000-r200").write_text("2")
    handle = on_two_slots.submit(forking(tmp_path))
    events = list(on_two_slots.events())
    assert isinstance(events[-1].body, JobEnd), events[-1].body
    kinds = [event.body.kind for event in events if isinstance(event.body, Notice)]
    assert kinds.count("retrying") == 1
    assert handle.job.attempt == 0  # the trajectory lost nobody
    assert by_kind(read_run(tmp_path / "s-0000")) == by_kind(inline)
