import json
from pathlib import Path

import pytest

from comp.config import PruningConfig
from studies.folder import StudyFolder
from studies.report import read_report, write_report
from tests.studies.synthetic import DENSE_VAL, lost_points, make_spec
from tests.studies.test_driver import plant_failure, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """A study of three trials with two seeds each, the second of which failed."""
    root = tmp_path_factory.mktemp("runs")
    plant_failure(root, "s-0001-s7")
    spec = make_spec(root, "n_trials=3", "seeds=[0, 7]", "parallel=1")
    run(spec)
    return StudyFolder.of(spec)


def test_the_table_has_the_dense_model_and_every_ratio(folder: StudyFolder) -> None:
    assert [row.ratio_asked for row in read_report(folder).rows] == [0.0, 0.5, 0.8]


def test_the_table_is_the_mean_over_seeds_of_the_best_trial(folder: StudyFolder) -> None:
    report = read_report(folder)
    assert report.summary.best is not None
    config = PruningConfig(
        num_stages=report.summary.best.params["num_stages"],
        exploration=report.summary.best.params["exploration"],
        seed=0,
    )
    row = report.rows[-1]
    assert row.val.num == 2
    assert row.val.mean == pytest.approx(DENSE_VAL - lost_points(config, 0.8) - 0.035)
    assert row.speed_up.mean == pytest.approx(20 / 12)


def test_the_text_gives_settings_units_and_spread(folder: StudyFolder) -> None:
    text = read_report(folder).to_text()
    assert "best of 2 trials: trial" in text
    assert "validation at ratio 0.8" in text
    assert "20.0 -> 12.0" in text
    assert "±" in text
    assert "multiply-add = 1" in text


def test_the_json_is_the_whole_study(folder: StudyFolder) -> None:
    values = json.loads(json.dumps(read_report(folder).to_dict()))
    assert values["counts"] == {"complete": 2, "fail": 1}
    assert [trial["state"] for trial in values["trials"]] == ["complete", "fail", "complete"]
    gmacs = [point["gmacs"] for point in values["pareto"]]
    assert gmacs == sorted(gmacs)


def test_the_page_shows_plot_table_and_failures(folder: StudyFolder) -> None:
    write_report(folder, read_report(folder))
    page = (folder.path / "report.md").read_text()
    assert "![Accuracy against FLOPs ratio](curves.png)" in page
    assert "| dense | 100 |" in page
    assert "loss is nan in stage 2" in page


def test_a_study_without_a_finished_trial_says_so(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    StudyFolder.of(spec).freeze(spec)
    report = read_report(StudyFolder.of(spec))
    assert report.to_text() == "study 's' has no complete trial yet"
    assert write_report(StudyFolder.of(spec), report) == []
