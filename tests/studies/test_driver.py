"""The driver over an executor that runs synthetic trials side by side, with real files."""

from pathlib import Path

import pytest

from comp.config import PruningConfig
from orchestration.executor import Event
from orchestration.job import Failure
from orchestration.lock import LockHeld, hold_directory
from orchestration.storage import StorageError
from orchestration.store import read_run
from studies.driver import Outcome, StudyFailed, run_study
from studies.errors import SpecError
from studies.folder import StudyFolder
from studies.spec import StudySpec
from studies.summary import StudySummary, summarize
from tests.studies import synthetic
from tests.studies.synthetic import (
    DENSE_VAL,
    RUNNER,
    SlotsExecutor,
    lost_points,
    make_spec,
    records_of,
)


class DriverDied(BaseException):
    """What a test raises in place of a kill."""


def intermediate_values(spec: StudySpec) -> dict[int, float]:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    journal = str(StudyFolder.of(spec).path / "optuna.journal")
    storage = optuna.storages.JournalStorage(JournalFileBackend(journal))
    return optuna.load_study(study_name="s", storage=storage).trials[0].intermediate_values


def run(spec: StudySpec, executor: SlotsExecutor | None = None, **options: object) -> Outcome:
    pool = executor or SlotsExecutor(spec.parallel)
    return run_study(spec, lambda: pool, runner=RUNNER, **options)  # type: ignore[arg-type]


def summary_of(spec: StudySpec) -> StudySummary:
    return summarize(StudyFolder.of(spec))


def die_at(poll: int) -> SlotsExecutor:
    def die(now: int) -> None:
        if now == poll:
            raise DriverDied

    return SlotsExecutor(2, before_poll=die)


def test_a_study_ends_with_the_asked_number_of_trials(tmp_path: Path) -> None:
    outcome = run(make_spec(tmp_path))
    assert outcome == Outcome("finished", {"complete": 6})


def test_the_dense_reference_runs_first_and_alone(tmp_path: Path) -> None:
    executor = SlotsExecutor(2)
    run(make_spec(tmp_path), executor)
    assert executor.submitted[0] == "s-dense"
    assert executor.submitted.count("s-dense") == 1


def test_trials_get_the_dense_point(tmp_path: Path) -> None:
    run(make_spec(tmp_path))
    dense = read_run(tmp_path / "runs" / "s-dense").points[0]
    assert read_run(tmp_path / "runs" / "s-0003").job.dense == dense.to_dict()


def test_trial_0_is_the_starting_point_of_the_spec(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, "n_trials=1")
    run(spec)
    assert summary_of(spec).trials[0].params == {"num_stages": 10, "exploration": 0.2}


def test_as_many_trials_run_at_once_as_asked(tmp_path: Path) -> None:
    executor = SlotsExecutor(3)
    run(make_spec(tmp_path, "parallel=3"), executor)
    assert executor.most_at_once == 3


def test_the_value_told_is_validation_accuracy(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, "n_trials=1")
    run(spec)
    expected = DENSE_VAL - lost_points(PruningConfig(num_stages=10), 0.8)
    assert summary_of(spec).trials[0].value == pytest.approx(expected)


def test_the_best_trial_is_the_one_with_the_best_validation(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    run(spec)
    summary = summary_of(spec)
    assert summary.best is not None
    assert summary.best.value == max(trial.value or 0 for trial in summary.trials)


def test_the_mean_over_seeds_is_told(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, "n_trials=1", "seeds=[0, 4]")
    run(spec)
    lost = [lost_points(PruningConfig(num_stages=10, seed=seed), 0.8) for seed in (0, 4)]
    trial = summary_of(spec).trials[0]
    assert trial.value == pytest.approx(DENSE_VAL - sum(lost) / 2)
    assert trial.runs == ("s-0000-s0", "s-0000-s4")


def test_every_ratio_is_reported_as_an_intermediate_value(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, "n_trials=1")
    run(spec)
    assert list(intermediate_values(spec)) == [500, 800]


def test_consumers_see_every_record_once_and_in_order(tmp_path: Path) -> None:
    events: list[Event] = []
    run(make_spec(tmp_path), consumers=[events.append])
    assert [record.index for record in records_of("s-0002", events)] == [0, 1, 2, 3, 4]


def test_a_finished_study_asks_for_nothing_more(tmp_path: Path) -> None:
    run(make_spec(tmp_path))
    executor = SlotsExecutor(2)
    run(make_spec(tmp_path), executor)
    assert executor.submitted == ["s-dense"]


def test_a_study_can_be_given_more_trials(tmp_path: Path) -> None:
    run(make_spec(tmp_path))
    assert run(make_spec(tmp_path, "n_trials=8")).counts == {"complete": 8}


@pytest.mark.parametrize("poll", [1, 2, 4, 6, 9, 13])
def test_trials_of_a_dead_driver_are_adopted_by_number(tmp_path: Path, poll: int) -> None:
    spec = make_spec(tmp_path)
    with pytest.raises(DriverDied):
        run(spec, die_at(poll))
    outcome = run(spec)
    assert outcome.counts == {"complete": 6}
    assert [trial.number for trial in summary_of(spec).trials] == list(range(6))


def test_an_adopted_trial_keeps_its_config_and_what_is_on_disk(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    with pytest.raises(DriverDied):
        run(spec, die_at(6))
    before = {trial.number: trial.params for trial in summary_of(spec).trials}
    records = {n: read_run(tmp_path / "runs" / f"s-{n:04d}").records for n in before}
    assert any(records.values())
    run(spec)
    for number, params in before.items():
        assert summary_of(spec).trials[number].params == params
        after = read_run(tmp_path / "runs" / f"s-{number:04d}").records
        assert after[: len(records[number])] == records[number]


def test_a_soft_stop_leaves_trials_running_and_the_same_command_goes_on(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    polls: list[int] = []
    executor = SlotsExecutor(2, before_poll=polls.append)
    outcome = run(spec, executor, should_stop=lambda: len(polls) >= 4)
    assert outcome.why == "interrupted"
    assert outcome.counts["running"] == 2
    assert run(spec).counts == {"complete": 6}


def test_a_soft_stop_waits_for_the_record_under_way(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    polls: list[int] = []
    events: list[Event] = []
    executor = SlotsExecutor(2, before_poll=polls.append)
    run(spec, executor, consumers=[events.append], should_stop=lambda: len(polls) >= 4)
    ends = [event.body for event in events if isinstance(event.body, Failure)]
    assert [end.kind for end in ends] == ["cancelled", "cancelled"]
    assert len(read_run(tmp_path / "runs" / "s-0000").records) == 3


def test_the_deadline_stops_softly(tmp_path: Path) -> None:
    from studies.driver import Driver

    spec = make_spec(tmp_path, "deadline_minutes=1")
    StudyFolder.of(spec).freeze(spec)
    times = iter(range(0, 10_000, 15))
    driver = Driver(spec, SlotsExecutor(2), clock=lambda: next(times), runner=RUNNER)
    assert driver.run().why == "deadline"
    assert summary_of(spec).counts["running"] == 2


def plant_failure(root: Path, *run_ids: str) -> None:
    (root / "runs").mkdir(parents=True, exist_ok=True)
    for run_id in run_ids:
        (root / "runs" / f"fail-{run_id}").write_text("loss is nan in stage 2")


def test_a_failed_run_fails_its_trial_with_the_reason_and_no_other(tmp_path: Path) -> None:
    plant_failure(tmp_path, "s-0001")
    spec = make_spec(tmp_path)
    assert run(spec).counts == {"complete": 5, "fail": 1}
    trial = summary_of(spec).trials[1]
    assert (trial.state, trial.reason) == ("fail", "run s-0001: loss is nan in stage 2")


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["objective={area: [0.0, 0.8]}"], "the validation value of ratio 0.5 is nan"),
        (["pruner={kind: median, every: 0.2}"], "the validation value of ratio 0.2 is nan"),
        (["objective=[{val_at: 0.8}, {gflops_at: 0.8}]"], "validation at ratio 0.8 of run"),
    ],
)
def test_an_objective_that_is_no_number_fails_its_trial_with_a_sentence(
    overrides: list[str], where: str, tmp_path: Path
) -> None:
    spec = make_spec(tmp_path, "n_trials=3", "parallel=1", *overrides)
    outcome = run_study(
        spec, lambda: SlotsExecutor(1), runner=f"{synthetic.__name__}:prune_to_nan"
    )
    assert outcome.counts == {"complete": 2, "fail": 1}
    trial = summary_of(spec).trials[1]
    assert (trial.state, trial.values) == ("fail", ())
    assert where in trial.reason
    assert "which is no number" in trial.reason


def test_a_failed_seed_ends_the_other_seeds_of_its_trial(tmp_path: Path) -> None:
    plant_failure(tmp_path, "s-0000-s0")
    spec = make_spec(tmp_path, "seeds=[0, 1, 2]", "n_trials=2")
    executor = SlotsExecutor(2)
    assert run(spec, executor).counts == {"complete": 1, "fail": 1}
    assert "s-0000-s2" not in executor.submitted


def test_three_failures_in_a_row_stop_the_study(tmp_path: Path) -> None:
    plant_failure(tmp_path, *(f"s-{number:04d}" for number in range(6)))
    with pytest.raises(StudyFailed, match=r"3 trials in a row failed.*loss is nan"):
        run(make_spec(tmp_path, "parallel=1"))


def test_a_failed_dense_reference_stops_the_study_before_any_trial(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    with pytest.raises(StudyFailed, match="dense reference s-dense failed: No module named"):
        run_study(spec, lambda: SlotsExecutor(2), runner="nowhere:run")
    assert "complete" not in summary_of(spec).counts


def test_a_dead_driver_before_the_dense_reference_ended_loses_nothing(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    with pytest.raises(DriverDied):
        run(spec, die_at(2))
    assert summary_of(spec).counts == {"waiting": 1}
    assert run(spec).counts == {"complete": 6}


def test_trials_of_a_dead_driver_go_before_new_ones(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    with pytest.raises(DriverDied):
        run(spec, die_at(5))
    executor = SlotsExecutor(2)
    run(spec, executor)
    assert executor.submitted[1:3] == ["s-0000", "s-0001"]


def test_a_run_directory_of_another_spec_stops_the_study_and_fails_no_trial(
    tmp_path: Path,
) -> None:
    other = make_spec(tmp_path, "n_trials=1", "pruning.weight_decay=0.2")
    run(other)
    (tmp_path / "studies").rename(tmp_path / "moved")
    with pytest.raises(StudyFailed, match=r"s-dense failed.*config\.weight_decay is 0\.2 there"):
        run(make_spec(tmp_path, "n_trials=1"))
    (tmp_path / "runs" / "s-dense").rename(tmp_path / "dense")
    with pytest.raises(StudyFailed, match=r"run s-0000: .*belongs to another spec"):
        run(make_spec(tmp_path, "n_trials=1"))
    (tmp_path / "runs" / "s-0000").rename(tmp_path / "away")
    assert run(make_spec(tmp_path, "n_trials=1")).counts == {"complete": 1}


def test_a_full_disk_stops_the_study_and_fails_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestration.storage import Storage

    spec, write = make_spec(tmp_path, "n_trials=2"), Storage.write

    def fill_up(self: Storage, name: str, data: bytes, *, durable: bool = True) -> None:
        if "s-0001" in self.location and name.startswith("records/00002"):
            raise StorageError("no space left on device; free some space there")
        write(self, name, data, durable=durable)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write", fill_up)
        with pytest.raises(StudyFailed, match="s-0001: no space left on device"):
            run(spec)
    assert run(spec).counts == {"complete": 2}


def test_a_shared_storage_keeps_studies_of_one_name_apart(tmp_path: Path) -> None:
    storage = f"storage=sqlite:///{tmp_path}/o.db"
    run(make_spec(tmp_path / "mine", storage, "n_trials=1"))
    with pytest.raises(SpecError, match=r"started with space\.num_stages\.high = 40"):
        run(make_spec(tmp_path / "yours", storage, "n_trials=1", "space.num_stages.high=50"))


def test_resuming_with_another_space_is_refused(tmp_path: Path) -> None:
    run(make_spec(tmp_path, "n_trials=1"))
    changed = make_spec(tmp_path, "space.num_stages.high=50")
    with pytest.raises(SpecError, match=r"with space\.num_stages\.high = 40.*now has 50"):
        run(changed)


def test_what_is_no_part_of_the_results_may_change(tmp_path: Path) -> None:
    run(make_spec(tmp_path, "n_trials=1"))
    run(make_spec(tmp_path, "n_trials=1", "parallel=4", "resources.threads=2"))


def test_a_second_driver_is_kept_off(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    with hold_directory(StudyFolder.of(spec).path, "s"), pytest.raises(LockHeld, match="'s'"):
        run(spec)


def test_the_executor_holds_the_study_too(tmp_path: Path) -> None:
    executor = SlotsExecutor(2)
    run(make_spec(tmp_path, "n_trials=1"), executor)
    assert executor.held == ["s"]


def test_sqlite_holds_a_study_as_well(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, f"storage=sqlite:///{tmp_path}/o.db", "n_trials=2")
    assert run(spec).counts == {"complete": 2}
    assert (tmp_path / "o.db").exists()


def test_every_run_has_a_spec_that_runs_it_again(tmp_path: Path) -> None:
    from studies.specfile import read_spec

    run(make_spec(tmp_path, "n_trials=2"))
    found = read_run(tmp_path / "runs" / "s-0001")
    again = read_spec(tmp_path / "runs" / "s-0001" / "spec.yaml")
    assert again.kind == "prune"
    assert again.pruning.to_dict() == found.job.config


def test_every_seed_of_a_trial_is_kept(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, "n_trials=1", "seeds=[0, 4]")
    run(spec)
    trial = summary_of(spec).trials[0]
    assert trial.by_seed[0][0] - trial.by_seed[1][0] == pytest.approx(0.04)
    assert trial.spreads[0].half_interval == pytest.approx(12.706 * 0.02, rel=1e-3)


PRUNED = (
    "pruner={kind: median, startup_trials: 1, every: 0.1}",
    "enqueue=[{num_stages: 40, exploration: 0.5}]",
    "parallel=1",
    "n_trials=2",
)


def test_a_trial_below_the_median_is_stopped_and_keeps_its_results(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, *PRUNED)
    assert run(spec).counts == {"complete": 1, "pruned": 1}
    trial = summary_of(spec).trials[1]
    assert trial.reason == "stopped by the median pruner at ratio 0.1"
    assert trial.values == ()
    left = read_run(tmp_path / "runs" / "s-0001")
    assert left.outcome == "failed"
    assert left.failure == Failure("cancelled", trial.reason)
    assert [type(record.body).__name__ for record in left.records] == ["CurvePoint", "StageRecord"]


def test_a_study_with_stopped_trials_is_finished(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, *PRUNED)
    run(spec)
    assert summary_of(spec).is_finished
    executor = SlotsExecutor(1)
    run(spec, executor)
    assert executor.submitted == ["s-dense"]


def test_stages_are_reported_at_the_same_ratios_in_every_trial(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, "pruner={kind: hyperband, every: 0.2}", "n_trials=1")
    run(spec)
    first, second = (lost_points(PruningConfig(num_stages=10), ratio) for ratio in (0.5, 0.8))
    lost = {200: 0.4 * first, 400: 0.8 * first, 600: first + (second - first) / 3, 800: second}
    expected = {step: pytest.approx(DENSE_VAL - value) for step, value in lost.items()}
    assert intermediate_values(spec) == expected


def test_a_median_pruner_gets_the_area_up_to_a_ratio(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, "pruner={kind: median, every: 0.4}", "n_trials=1")
    run(spec)
    at = [DENSE_VAL - lost_points(PruningConfig(num_stages=10), ratio) for ratio in (0.5, 0.8)]
    middle = DENSE_VAL + 0.8 * (at[0] - DENSE_VAL)
    areas = [0.4 * (DENSE_VAL + middle) / 2]
    areas.append(areas[0] + 0.1 * (middle + at[0]) / 2 + 0.3 * (at[0] + at[1]) / 2)
    expected = {400: pytest.approx(areas[0]), 800: pytest.approx(areas[1])}
    assert intermediate_values(spec) == expected


def test_a_wilcoxon_pruner_compares_seed_by_seed(tmp_path: Path) -> None:
    spec = make_spec(
        tmp_path,
        "pruner={kind: wilcoxon}",
        "seeds=[0, 1, 2, 3, 4, 5]",
        *PRUNED[1:],
    )
    executor = SlotsExecutor(1)
    assert run(spec, executor).counts == {"complete": 1, "pruned": 1}
    assert "at seed 3" in summary_of(spec).trials[1].reason
    assert "s-0001-s5" not in executor.submitted


@pytest.mark.parametrize("kind", ["hyperband", "patience"])
def test_other_pruners_stop_the_worst_trial(tmp_path: Path, kind: str) -> None:
    sections = {
        "hyperband": "pruner={kind: hyperband, every: 0.1, reduction_factor: 2}",
        "patience": "pruner={kind: patience, patience: 1, drop: 10}",
    }
    spec = make_spec(tmp_path, sections[kind], *PRUNED[1:3], "n_trials=8")
    counts = run(spec).counts
    assert counts["pruned"] >= 1
    assert counts["complete"] >= 1


def test_objectives_and_constraints_reach_optuna(tmp_path: Path) -> None:
    spec = make_spec(
        tmp_path,
        "objective=[{val_at: 0.8}, {gflops_at: end}]",
        "constraints=[{drop_at: 0.8, at_most: 9}]",
        "space.target_ratio={kind: float, low: 0.8, high: 0.9}",
        "n_trials=8",
    )
    run(spec)
    summary = summary_of(spec)
    assert all(len(trial.values) == 2 for trial in summary.trials)
    for trial in summary.trials:
        lost = DENSE_VAL - trial.values[0]
        assert trial.excess == {"drop_at 0.8 at most 9": pytest.approx(lost - 9)}
    assert all(trial.is_feasible for trial in summary.front)
