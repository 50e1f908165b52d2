import json
from pathlib import Path

import pytest

from comp.config import PruningConfig
from studies.folder import StudyFolder
from studies.importances import parameter_importances
from studies.report import read_report, value_text, write_report
from studies.summary import TrialSummary
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


@pytest.fixture(scope="module")
def two_goals(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """Accuracy and cost: a trial with a larger target is cheaper and loses more."""
    spec = make_spec(
        tmp_path_factory.mktemp("goals"),
        "objective=[{val_at: end}, {gflops_at: end}]",
        "constraints=[{drop_at: end, at_most: 7}]",
        "space={target_ratio: {kind: float, low: 0.5, high: 0.95}, exploration: {kind: float, "
        "low: 0.0, high: 0.5}}",
        "pruning.num_stages=12",
        "n_trials=12",
    )
    run(spec)
    return StudyFolder.of(spec)


def test_a_study_of_two_objectives_shows_its_front_and_its_best_in_the_first(
    two_goals: StudyFolder,
) -> None:
    report = read_report(two_goals)
    front = report.summary.front
    lines = report.to_text().splitlines()
    assert lines[0] == f"{len(front)} of 12 trials are on the Pareto front:"
    assert lines[2].split()[:6] == ["trial", "state", "val_at", "end", "gflops_at", "end"]
    assert [int(line.split()[0]) for line in lines[3 : 3 + len(front)]] == [
        trial.number for trial in front
    ]
    best = f"{front[0].values[0]:.2f}"
    assert (
        f"trial {front[0].number}, with the best validation at the largest ratio {best}:" in lines
    )
    page = report.to_markdown("curves.png")
    assert "## Pareto front" in page
    values = report.to_dict()
    assert values["front"] == [trial.number for trial in front]
    assert values["objective"] == "validation at the largest ratio, GFLOPs at the largest ratio"


def test_the_front_of_two_objectives_is_no_trial_beaten_in_both_or_out_of_bounds(
    two_goals: StudyFolder,
) -> None:
    summary = read_report(two_goals).summary
    able = [trial for trial in summary.trials if trial.is_feasible]
    assert 0 < len(able) < 12

    def beats(one: TrialSummary, other: TrialSummary) -> bool:
        (val, cost), (val_there, cost_there) = one.values, other.values
        return val >= val_there and cost <= cost_there and one.values != other.values

    free = {t.number for t in able if not any(beats(other, t) for other in able)}
    assert {trial.number for trial in summary.front} == free


def test_importances_of_two_objectives_are_those_of_the_first(two_goals: StudyFolder) -> None:
    """The target decides the accuracy at the end; exploration moves it by a tenth of a point."""
    found = parameter_importances(two_goals)
    assert list(found) == ["target_ratio", "exploration"]
    assert sum(found.values()) == pytest.approx(1.0)


def test_the_best_trial_is_read_without_the_others(
    folder: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_report(folder)
    monkeypatch.delattr("studies.report.read_point_runs")
    alone = read_report(folder, best_alone=True)
    assert (alone.to_text(), alone.best) == (whole.to_text(), whole.best)
    assert len(alone.runs) == 2 < len(whole.runs)


@pytest.mark.parametrize(
    ("value", "text"), [(79.456, "79.46"), (0.0085213, "0.00852"), (-3.0, "-3.00"), (0.0, "0.00")]
)
def test_small_values_keep_their_digits(value: float, text: str) -> None:
    trial = TrialSummary(0, "complete", (value,), (), {}, {}, (), "", None)
    assert value_text(trial, 0) == text


def test_a_study_without_a_finished_trial_says_so(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    StudyFolder.of(spec).freeze(spec)
    report = read_report(StudyFolder.of(spec))
    assert report.to_text() == "study 's' has no complete trial yet"
    assert write_report(StudyFolder.of(spec), report) == []
