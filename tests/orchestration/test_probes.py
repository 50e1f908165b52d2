"""Trials of a stage in other workers: same digits, whoever tries and whoever fails to."""

import json
from pathlib import Path

import pytest

from comp.config import PruningConfig
from orchestration import worker
from orchestration.executor import InlineExecutor, Resources
from orchestration.job import Failure, Fork, Job, JobEnd, Record
from orchestration.store import read_run
from tests.orchestration.tiny_trials import CONFIG, facts, make_tiny_job

LOOKAHEAD = {"method": "lookahead", "lookahead_steps": 1, "ratios": (0.04,), "fine_tune_steps": 0}


def make_probing_job(directory: Path, **changes: object) -> Job:
    config = PruningConfig.from_dict(CONFIG.to_dict() | LOOKAHEAD)
    own = {"config": config.to_dict(), "fine_tune": "fork"} | changes
    return make_tiny_job(directory, **own)


def bodies(records: list[Record]) -> list[dict[str, object]]:
    return facts(tuple(records))


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """The stages of a run that tries everything itself."""
    job = make_probing_job(tmp_path_factory.mktemp("inline"), fine_tune="inline")
    *items, end = worker.run(job)
    assert isinstance(end, JobEnd), end
    return bodies([item for item in items if isinstance(item, Record)])[:-1]


def test_probes_of_others_give_the_digits_of_own_trials(
    tmp_path: Path, inline: list[dict[str, object]]
) -> None:
    records, ends = [], []
    for item in worker.run(make_probing_job(tmp_path)):
        if isinstance(item, Fork) and item.job.kind == "probe":
            ends += list(worker.run(item.job))
        records += [item] if isinstance(item, Record) else []
    assert len(ends) == 4 * (len(records) - 1)  # of five modes, one is its own to try
    assert all(isinstance(end, JobEnd) for end in ends), ends
    assert bodies(records) == inline


def test_what_another_worker_has_found_decides(tmp_path: Path) -> None:
    for item in worker.run(make_probing_job(tmp_path)):
        if isinstance(item, Fork) and item.job.kind == "probe":
            place = Path(item.job.run_dir)
            place.mkdir(parents=True)
            (place / "begun.json").write_text("{}")
            probe = item.job.probe
            assert probe is not None
            cost = -1e6 if probe["mode"] == "language_params" else 1e6  # really cross_params
            (place / "cost.json").write_text(json.dumps({"cost": cost}))
        if isinstance(item, Record) and item.stage:
            assert item.stage.mode == "language_params"
            return
    pytest.fail("there was no stage")


def test_trials_that_others_begin_and_do_not_end_are_made_again(
    tmp_path: Path, inline: list[dict[str, object]]
) -> None:
    records = []
    for item in worker.run(make_probing_job(tmp_path)):
        if isinstance(item, Fork) and item.job.kind == "probe":
            Path(item.job.run_dir).mkdir(parents=True)
            Path(item.job.run_dir, "begun.json").write_text("{}")
        records += [item] if isinstance(item, Record) else []
    assert bodies(records) == inline


def test_a_probe_that_comes_too_late_leaves_nothing(tmp_path: Path) -> None:
    with InlineExecutor() as executor:  # has nobody for probes
        executor.submit(make_probing_job(tmp_path))
        events = list(executor.events())
    assert isinstance(events[-1].body, JobEnd), events[-1].body
    before = sorted(tmp_path.rglob("*"))
    job = make_probing_job(tmp_path)
    late = make_probing_job(
        tmp_path,
        kind="probe",
        run_dir=f"{job.run_dir}/probes/00001-language_params",
        probe={"state": "state/00001", "mode": "language_params", "gap": 1e5, "steps": 1},
    )
    (end,) = worker.run(late)
    assert isinstance(end, Failure)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.ray
def test_free_workers_take_probes(
    tmp_path: Path, ray_cluster: str, inline: list[dict[str, object]]
) -> None:
    from orchestration.ray_executor import RayExecutor

    with RayExecutor(2, Resources(cpus=0.5)) as executor:
        executor.submit(make_probing_job(tmp_path, runner="prune_once_a_probe_has_ended"))
        events = list(executor.events())
        assert executor.free_slots == 2
        own = {place.pid for place, _ in executor.places}
    assert isinstance(events[-1].body, JobEnd), events[-1].body
    assert bodies(list(read_run(tmp_path / "s-0000").records))[:-1] == inline
    assert int((tmp_path / "s-0000" / "probed").read_text()) in own
