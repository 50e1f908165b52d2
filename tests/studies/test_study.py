import json
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from studies.errors import SpecError
from studies.folder import StudyFolder
from studies.requests import Requests
from studies.spec import StudySpec
from studies.specfile import override, spec_of
from studies.storages import StorageUnreachable
from studies.study import Study
from studies.summary import summarize
from tests.studies.synthetic import STUDY, make_spec


def open_study(root: Path, *overrides: str) -> Study:
    return Study(frozen(root, *overrides))


def frozen(root: Path, *overrides: str) -> StudySpec:
    spec = make_spec(root, *overrides)
    StudyFolder.of(spec).freeze(spec)
    return spec


def test_asking_ends_with_the_asked_number_of_trials(tmp_path: Path) -> None:
    study = open_study(tmp_path, "n_trials=2")
    assert [trial and trial.number for trial in (study.ask(), study.ask(), study.ask())] == [
        0,
        1,
        None,
    ]


def test_dashboards_name_the_objectives(tmp_path: Path) -> None:
    study = open_study(tmp_path, "objective=[{val_at: 0.8}, {gflops_at: 0.8}]")
    assert study._study.metric_names == ["validation at ratio 0.8", "GFLOPs at ratio 0.8"]


def test_opening_twice_does_not_enqueue_twice(tmp_path: Path) -> None:
    open_study(tmp_path)
    assert open_study(tmp_path).counts() == {"waiting": 1}


def test_the_same_seed_gives_the_same_first_proposals(tmp_path: Path) -> None:
    def proposals(root: Path) -> list[int]:
        study = open_study(root)
        asked = (study.ask() for _ in range(4))
        return [trial.config.num_stages for trial in asked if trial]

    assert proposals(tmp_path / "a") == proposals(tmp_path / "b")


def test_a_running_trial_is_adopted_with_its_config_and_reports(tmp_path: Path) -> None:
    first = open_study(tmp_path).ask()
    assert first is not None
    first.report(500, 70.0)
    (adopted,) = open_study(tmp_path).adopt()
    assert (adopted.number, adopted.config, adopted.reported) == (0, first.config, {500})


def test_an_adopted_trial_can_be_told(tmp_path: Path) -> None:
    open_study(tmp_path).ask()
    study = open_study(tmp_path)
    (adopted,) = study.adopt()
    adopted.complete([71.0], {})
    assert study.counts() == {"complete": 1}


def test_a_ratio_is_reported_once(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    trial = open_study(tmp_path).ask()
    assert trial is not None
    trial.report(500, 70.0)
    trial.report(500, 70.0)
    assert [str(w.message) for w in recwarn if "already reported" in str(w.message)] == []


def test_a_failed_trial_keeps_its_reason(tmp_path: Path) -> None:
    spec = frozen(tmp_path)
    trial = Study(spec).ask()
    assert trial is not None
    trial.fail("loss is nan", "algorithm")
    summary = summarize(StudyFolder.of(spec))
    assert (summary.trials[0].state, summary.trials[0].reason) == ("fail", "loss is nan")
    assert summary.best is None


def test_the_best_of_values_below_zero_is_the_highest(tmp_path: Path) -> None:
    spec = frozen(tmp_path, "n_trials=2")
    study = Study(spec)
    for value in (-3.0, -2.0):
        trial = study.ask()
        assert trial is not None
        trial.complete([value], {})
    summary = summarize(StudyFolder.of(spec))
    assert summary.best is not None
    assert summary.best.value == -2.0
    assert summary.is_finished


def test_a_study_without_a_storage_yet_has_no_trials(tmp_path: Path) -> None:
    spec = frozen(tmp_path)
    summary = summarize(StudyFolder.of(spec))
    assert (summary.trials, summary.is_finished) == ((), False)


def test_reading_a_study_writes_nothing(tmp_path: Path) -> None:
    spec = frozen(tmp_path)
    Study(spec)
    journal = StudyFolder.of(spec).path / "optuna.journal"
    before = journal.read_bytes()
    summarize(StudyFolder.of(spec))
    assert journal.read_bytes() == before


@pytest.mark.skipif(find_spec("psycopg2") is not None, reason="psycopg2 is installed here")
def test_a_missing_database_driver_is_a_sentence(tmp_path: Path) -> None:
    spec = frozen(tmp_path, "storage=postgresql+psycopg2://nobody@localhost/x")
    with pytest.raises(
        SpecError, match=r"driver that is not installed.*pip install psycopg2-binary"
    ):
        Study(spec)


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("postgresql://nobody@127.0.0.1:1/x", "127.0.0.1:1/x cannot be used: .*refused"),
        ("grpc://127.0.0.1:1", "no gRPC proxy answers at grpc://127.0.0.1:1 within"),
        ("sqlite:////no/such/directory/o.db", "unable to open database file"),
    ],
)
def test_an_unreachable_storage_is_a_sentence_within_seconds(
    tmp_path: Path, url: str, complaint: str
) -> None:
    began = time.monotonic()
    with pytest.raises(StorageUnreachable, match=complaint):
        open_study(tmp_path, f"storage={url}")
    assert time.monotonic() - began < 20


def test_a_database_belongs_to_the_folder_that_wrote_first(tmp_path: Path) -> None:
    storage = f"storage=sqlite:///{tmp_path}/o.db"
    open_study(tmp_path / "mine", storage)
    open_study(tmp_path / "mine", storage)
    with pytest.raises(SpecError, match="is written from another root; go on with it there"):
        open_study(tmp_path / "yours", storage)


def test_a_running_trial_in_a_database_is_adopted(tmp_path: Path) -> None:
    storage = f"storage=sqlite:///{tmp_path}/o.db"
    first = open_study(tmp_path, storage).ask()
    assert first is not None
    (adopted,) = open_study(tmp_path, storage).adopt()
    assert (adopted.number, adopted.config) == (0, first.config)


def test_settings_of_the_spec_are_tried_after_the_defaults(tmp_path: Path) -> None:
    study = open_study(tmp_path, "enqueue=[{num_stages: 33, exploration: 0.1}]")
    asked = [study.ask(), study.ask()]
    assert [trial and trial.config.num_stages for trial in asked] == [10, 33]


def test_a_request_is_taken_up_once(tmp_path: Path) -> None:
    spec = frozen(tmp_path, "n_trials=9")
    study = Study(spec)
    study.ask()
    requests = Requests(StudyFolder.of(spec))
    name = requests.add({"num_stages": 7, "exploration": 0.3})
    trial = study.ask()
    assert trial is not None
    assert trial.config.num_stages == 7
    assert requests.read() == {}
    requests._storage.write(f"{name}.json", b'{"num_stages": 7}')  # its driver died amid it
    study.ask()
    assert study.counts() == {"running": 3}


def test_settings_that_do_not_fit_together_fail_their_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("accumulate must divide batch_size")

    spec = frozen(tmp_path, "n_trials=1")
    study = Study(spec)
    monkeypatch.setattr("studies.study.suggest", refuse)
    assert study.ask() is None
    assert "accumulate must" in summarize(StudyFolder.of(spec)).trials[0].reason


def test_of_trials_that_break_a_constraint_none_is_best(tmp_path: Path) -> None:
    spec = frozen(tmp_path, "constraints=[{drop_at: 0.8, at_most: 2}]")
    study = Study(spec)
    for value, excess in ((70.0, 1.5), (60.0, 0.5)):
        trial = study.ask()
        assert trial is not None
        trial.complete([value], {"drop_at 0.8 at most 2": excess})
    summary = summarize(StudyFolder.of(spec))
    assert summary.best is None
    assert "trial 1, where drop_at 0.8 at most 2 is exceeded by 0.5" in summary.why_no_best
    trial = study.ask()
    assert trial is not None
    trial.complete([50.0], {"drop_at 0.8 at most 2": 0.0})
    best = summarize(StudyFolder.of(spec)).best
    assert best is not None
    assert best.number == 2


def test_the_front_has_the_trials_that_no_other_beats(tmp_path: Path) -> None:
    spec = frozen(tmp_path, "objective=[{val_at: 0.8}, {gflops_at: end}]")
    study = Study(spec)
    for values in ((70.0, 9.0), (60.0, 5.0), (60.0, 7.0), (75.0, 20.0)):
        trial = study.ask()
        assert trial is not None
        trial.complete(values, {})
    summary = summarize(StudyFolder.of(spec))
    assert [trial.number for trial in summary.front] == [3, 0, 1]
    assert summary.best == summary.front[0]


SAMPLERS = ("tpe", "gp", "cmaes", "nsga2", "random")


@pytest.mark.parametrize("kind", SAMPLERS)
def test_every_sampler_proposes_configs_of_the_space(tmp_path: Path, kind: str) -> None:
    sampler = {"kind": kind, "seed": 1, **({"population": 2} if kind == "nsga2" else {})}
    if kind in ("tpe", "gp", "cmaes"):
        sampler["startup_trials"] = 1
    study = open_study(tmp_path, f"sampler={json.dumps(sampler)}", "n_trials=5")
    numbers = []
    while (trial := study.ask()) is not None:
        numbers.append(trial.config.num_stages)
        trial.complete([float(trial.config.num_stages)], {})
    assert len(numbers) == 5
    assert all(4 <= number <= 40 for number in numbers)
    assert len(set(numbers)) > 2


def test_a_grid_begins_with_the_defaults_is_tried_once_and_then_ends(tmp_path: Path) -> None:
    space = "space={num_stages: {kind: int, low: 4, high: 8, step: 2}, " + (
        "exploration: {kind: float, low: 0.0, high: 0.5, step: 0.25}}"
    )
    values = override({**STUDY, "root": str(tmp_path)}, [space, "sampler={kind: grid}"])
    spec = spec_of({key: value for key, value in values.items() if key != "n_trials"})
    assert isinstance(spec, StudySpec)
    assert spec.n_trials == 9
    StudyFolder.of(spec).freeze(spec)
    study, tried = Study(spec), []
    while (trial := study.ask()) is not None:
        tried.append((trial.config.num_stages, trial.config.exploration))
        trial.complete([1.0], {})
    assert sorted(tried) == [(n, e) for n in (4, 6, 8) for e in (0.0, 0.25, 0.5)]


LISTED = (
    "space={num_stages: {kind: int, low: 4, high: 8}, schedule: {kind: categorical, "
    "choices: [mps, lookahead]}, refresh_after: {kind: categorical, choices: [null, 3]}}"
)


def test_a_list_of_changes_is_tried_with_all_else_as_in_trial_0_and_then_ends(
    tmp_path: Path,
) -> None:
    listed = "enqueue=[{schedule: lookahead}, {refresh_after: 3, num_stages: 5}]"
    values = override({**STUDY, "root": str(tmp_path)}, [LISTED, listed, "sampler={kind: start}"])
    spec = spec_of({key: value for key, value in values.items() if key != "n_trials"})
    assert isinstance(spec, StudySpec)
    assert spec.n_trials == 3
    StudyFolder.of(spec).freeze(spec)
    study, tried = Study(spec), []
    while (trial := study.ask()) is not None:
        config = trial.config
        tried.append((config.switches.schedule, config.refresh_after, config.num_stages))
        trial.complete([1.0], {})
    assert tried == [("mps", None, 8), ("lookahead", None, 8), ("mps", 3, 5)]


def test_a_listed_change_that_no_config_takes_is_named(tmp_path: Path) -> None:
    listed = "enqueue=[{refresh_after: 3}, {refresh_after: 3, schedule: lookahead}]"
    with pytest.raises(SpecError, match=r"enqueue\.1: refresh_after 3 is for the costs of"):
        make_spec(tmp_path, LISTED, listed, "sampler={kind: start}")


def test_a_searched_switch_starts_as_the_method_has_it(tmp_path: Path) -> None:
    space = "space={cip: {kind: categorical, choices: [false, true]}}"
    trial = Study(frozen(tmp_path, space)).ask()
    assert trial is not None
    assert trial.config.cip is True  # which "comp" is, first choice or not


def test_a_conditional_key_is_searched_only_where_its_condition_holds(tmp_path: Path) -> None:
    space = "space={schedule: {kind: categorical, choices: [mps, joint]}, " + (
        "exploration: {kind: float, low: 0.3, high: 0.5, when: {schedule: mps}}}"
    )
    spec = frozen(tmp_path, space, "n_trials=12", "sampler.startup_trials=4")
    study = Study(spec)
    while (trial := study.ask()) is not None:
        is_searched = trial.config.exploration >= 0.3
        assert is_searched == (trial.config.schedule == "mps")
        trial.complete([trial.config.exploration], {})
    trials = summarize(StudyFolder.of(spec)).trials
    assert {("exploration" in t.params) for t in trials} == {True, False}
