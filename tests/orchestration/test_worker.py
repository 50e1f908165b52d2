"""The worker's stream: replay, go on, end; and how it fails."""

from pathlib import Path

import pytest

from orchestration import worker
from orchestration.job import Failure, Job, JobEnd, Record
from orchestration.store import Fenced, RunDirectory, read_run
from tests.orchestration.trials import disturb, make_job, numbers


def stream_of(job: Job) -> tuple[list[Record], JobEnd | Failure]:
    *records, end = worker.run(job)
    assert all(isinstance(record, Record) for record in records)
    assert isinstance(end, (JobEnd, Failure))
    return records, end  # type: ignore[return-value]


def test_a_record_is_on_disk_before_it_is_yielded(tmp_path: Path) -> None:
    for item in worker.run(make_job(tmp_path)):
        if isinstance(item, Record):
            assert read_run(tmp_path / "s-0000").records[-1] == item
    assert read_run(tmp_path / "s-0000").outcome == "finished"


def test_a_finished_run_replays_the_same_stream(tmp_path: Path) -> None:
    assert stream_of(make_job(tmp_path)) == stream_of(make_job(tmp_path).next_attempt())


@pytest.mark.parametrize("stop_after", range(7))
def test_a_run_broken_off_anywhere_gives_the_undisturbed_numbers(
    tmp_path: Path, stop_after: int
) -> None:
    calm, _ = stream_of(make_job(tmp_path / "calm"))
    first = worker.run(make_job(tmp_path))
    before = [next(first) for _ in range(stop_after + 1)]
    first.close()
    records, end = stream_of(make_job(tmp_path).next_attempt())
    assert records[: stop_after + 1] == before
    assert numbers(records) == numbers(calm)
    assert isinstance(end, JobEnd)


def test_finished_models_lie_beside_the_tables(tmp_path: Path) -> None:
    stream_of(make_job(tmp_path))
    models = sorted(path.name for path in (tmp_path / "s-0000" / "model").iterdir())
    assert models == ["ratio-250", "ratio-500"]


def test_what_the_run_raises_ends_the_stream_and_is_noted(tmp_path: Path) -> None:
    disturb(tmp_path, "s-0000", "raise", 4)
    records, end = stream_of(make_job(tmp_path))
    assert len(records) == 4
    assert isinstance(end, Failure)
    assert (end.kind, end.error) == ("algorithm", "FloatingPointError")
    assert end.message == "loss is nan in stage 3; lower the learning rate"
    assert "trials.py" in end.traceback
    assert read_run(tmp_path / "s-0000").failure == end


def test_a_failed_run_goes_on_when_it_is_started_again(tmp_path: Path) -> None:
    calm, _ = stream_of(make_job(tmp_path / "calm"))
    disturb(tmp_path, "s-0000", "raise", 4)
    stream_of(make_job(tmp_path))
    assert numbers(stream_of(make_job(tmp_path))[0]) == numbers(calm)


def test_a_directory_of_another_spec_is_a_failure_and_left_alone(tmp_path: Path) -> None:
    stream_of(make_job(tmp_path))
    records, end = stream_of(make_job(tmp_path, model="other"))
    assert records == []
    assert isinstance(end, Failure)
    assert end.error == "RunMismatch"
    assert read_run(tmp_path / "s-0000").outcome == "finished"


def test_storage_that_cannot_be_written_is_a_failure_of_its_own_kind(tmp_path: Path) -> None:
    (tmp_path / "s-0000").write_text("in the way")
    _, end = stream_of(make_job(tmp_path))
    assert isinstance(end, Failure)
    assert end.kind == "storage"
    assert str(tmp_path / "s-0000") in end.message


def test_storage_that_fails_later_leaves_finished_stages_intact(tmp_path: Path) -> None:
    calm, _ = stream_of(make_job(tmp_path / "calm"))
    stream = worker.run(make_job(tmp_path))
    [next(stream) for _ in range(3)]
    state = tmp_path / "s-0000" / "state"
    state.rename(tmp_path / "aside")
    state.write_text("in the way")
    end = next(stream)
    assert isinstance(end, Failure)
    assert end.kind == "storage"
    state.unlink()
    (tmp_path / "aside").rename(state)
    assert numbers(stream_of(make_job(tmp_path))[0]) == numbers(calm)


def test_a_worker_that_was_replaced_raises(tmp_path: Path) -> None:
    stream = worker.run(make_job(tmp_path))
    next(stream)
    RunDirectory.open(make_job(tmp_path).next_attempt())
    with pytest.raises(Fenced):
        next(stream)
    assert read_run(tmp_path / "s-0000").failure is None


def test_a_stop_comes_after_a_durable_record(tmp_path: Path) -> None:
    items = list(worker.run(make_job(tmp_path), stop=lambda: "preempted"))
    assert isinstance(items[0], Record)
    assert items[1] == Failure("preempted", "stopped after record 0")
    assert read_run(tmp_path / "s-0000").outcome == "unfinished"


@pytest.mark.parametrize(
    ("runner", "error"),
    [
        ("nothing", "runner must be 'module:function', but got 'nothing'"),
        ("tests.orchestration.trials:nothing", "has no attribute 'nothing'"),
        ("no_such_module:prune", "No module named 'no_such_module'"),
    ],
)
def test_an_unknown_runner_is_named(tmp_path: Path, runner: str, error: str) -> None:
    job = Job.from_dict(make_job(tmp_path).to_dict() | {"runner": runner})
    _, end = stream_of(job)
    assert isinstance(end, Failure)
    assert error in end.message
