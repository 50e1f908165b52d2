"""Real prunings through the worker and the pool: broken off, killed, resumed, reloaded."""

from pathlib import Path

import pytest
import torch

from orchestration import forks, worker
from orchestration.job import JobEnd, Notice
from orchestration.store import Run, read_run
from tests.orchestration.tiny_trials import facts, loaded, make_tiny_job
from tests.tiny import FAMILIES


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing disturbs."""
    job = make_tiny_job(tmp_path_factory.mktemp("calm"))
    *_, end = worker.run(job)
    assert isinstance(end, JobEnd), end
    return read_run(job.run_dir)


def test_a_run_passes_through_its_ratios(calm: Run) -> None:
    assert [point.ratio_asked for point in calm.points] == [0.0, 0.1, 0.2]
    assert [stage.snapshot for stage in calm.stages if stage.snapshot] == [0.1, 0.2]


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_run_broken_off_goes_on_to_the_same_numbers(
    tmp_path: Path, calm: Run, stop_after: int
) -> None:
    stream = worker.run(make_tiny_job(tmp_path))
    [next(stream) for _ in range(stop_after)]
    stream.close()
    list(worker.run(make_tiny_job(tmp_path)))
    assert facts(read_run(tmp_path / "s-0000").records) == facts(calm.records)


def test_the_dense_model_stays_as_it_is(calm: Run) -> None:
    fresh = FAMILIES["blip-nlvr"].build(0).state_dict()
    kept = loaded().model.state_dict()
    assert fresh.keys() == kept.keys()
    assert all(torch.equal(fresh[name], kept[name]) for name in fresh)
    assert not hasattr(loaded().model, "pruning")


def test_a_study_measures_the_dense_model_once(tmp_path: Path, calm: Run) -> None:
    point, end = worker.run(make_tiny_job(tmp_path, kind="dense", method="dense"))
    assert isinstance(end, JobEnd)
    dense = point.body.to_dict()  # type: ignore[union-attr]
    first = next(worker.run(make_tiny_job(tmp_path, run="s-0001", dense=dense)))
    assert first.body == point.body  # type: ignore[union-attr]
    assert facts((point,))[0] == facts(calm.records)[0]  # type: ignore[arg-type]


def test_the_finished_models_load_and_have_the_points_size(calm: Run) -> None:
    from comp.models import load_model

    for point in calm.points[1:]:
        name = forks.ratio_name(point.ratio_asked)
        again = load_model(Path(calm.location) / "model" / name)
        assert sum(p.numel() for p in again.model.parameters()) == point.params
        assert again.card["run"] == "s-0000"
        assert again.card["dense"]["name"] == "tiny"


@pytest.mark.ray
@pytest.mark.chaos
def test_a_pruning_killed_in_a_stage_ends_with_the_undisturbed_numbers(
    tmp_path: Path, calm: Run, ray_cluster: str
) -> None:
    from orchestration.ray_executor import RayExecutor

    (tmp_path / "kill-s-0000").write_text("5")  # the second of the second stage's three steps
    with RayExecutor(1) as executor:
        executor.submit(make_tiny_job(tmp_path))
        events = list(executor.events())
    assert isinstance(events[-1].body, JobEnd), events[-1].body
    notices = [e.body.kind for e in events if isinstance(e.body, Notice)]
    assert notices == ["started", "retrying", "started"]
    run = read_run(tmp_path / "s-0000")
    assert facts(run.records) == facts(calm.records)
    assert {record.attempt for record in run.records} == {0, 1}
