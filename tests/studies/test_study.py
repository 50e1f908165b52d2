from pathlib import Path

import pytest

from studies.errors import SpecError
from studies.folder import StudyFolder
from studies.spec import StudySpec
from studies.study import Study, summarize
from tests.studies.synthetic import make_spec


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
    first.report(0.5, 70.0)
    (adopted,) = open_study(tmp_path).adopt()
    assert (adopted.number, adopted.config, adopted.reported) == (0, first.config, {500})


def test_an_adopted_trial_can_be_told(tmp_path: Path) -> None:
    open_study(tmp_path).ask()
    study = open_study(tmp_path)
    (adopted,) = study.adopt()
    adopted.complete(71.0)
    assert study.counts() == {"complete": 1}


def test_a_ratio_is_reported_once(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    trial = open_study(tmp_path).ask()
    assert trial is not None
    trial.report(0.5, 70.0)
    trial.report(0.5, 70.0)
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
        trial.complete(value)
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


def test_a_missing_database_driver_is_a_sentence(tmp_path: Path) -> None:
    spec = frozen(tmp_path, "storage=postgresql+psycopg2://nobody@localhost/x")
    try:
        import psycopg2  # type: ignore[import-untyped]  # noqa: F401
    except ImportError:
        with pytest.raises(SpecError, match=r"driver that is not installed.*pip install psycopg2"):
            Study(spec)
    else:
        pytest.skip("psycopg2 is installed here")
