"""A study that begins with another one's trials."""

from pathlib import Path

import pytest

from studies.driver import run_study
from studies.errors import SpecError
from studies.folder import StudyFolder
from studies.spec import StudySpec
from studies.summary import StudySummary, summarize
from tests.studies.synthetic import RUNNER, SlotsExecutor, make_spec


def run(spec: StudySpec) -> StudySummary:
    run_study(spec, lambda: SlotsExecutor(1), runner=RUNNER)
    return summarize(StudyFolder.of(spec))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    run(make_spec(tmp_path, "n_trials=5"))
    return tmp_path


def warm(root: Path, *changes: str) -> StudySpec:
    return make_spec(root, "name=t", "warm_start=s", "n_trials=2", *changes)


def test_finished_trials_are_copied_and_do_not_count(root: Path) -> None:
    old = summarize(StudyFolder(str(root), "s")).trials
    new = run(warm(root))
    assert new.counts == {"complete": 7}
    copied = [trial for trial in new.trials if trial.copied_from]
    assert [trial.copied_from for trial in copied] == [f"s#{number}" for number in range(5)]
    assert [(t.params, t.values, t.runs) for t in copied] == [
        (t.params, t.values, t.runs) for t in old
    ]


def test_trial_0_is_still_the_starting_point(root: Path) -> None:
    first = run(warm(root)).trials[0]
    assert (first.copied_from, first.params["num_stages"]) == ("", 10)


def test_only_trials_that_this_study_could_have_made_are_copied(root: Path) -> None:
    old = summarize(StudyFolder(str(root), "s")).trials
    highest = max(trial.params["num_stages"] for trial in old) - 1
    fitting = [f"s#{t.number}" for t in old if t.params["num_stages"] <= highest]
    assert 0 < len(fitting) < 5
    new = run(warm(root, f"space.num_stages.high={highest}"))
    assert [trial.copied_from for trial in new.trials if trial.copied_from] == fitting


def test_a_second_start_copies_nothing_twice(root: Path) -> None:
    run(warm(root))
    assert run(warm(root, "n_trials=3")).counts == {"complete": 8}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("space.num_stages={kind: int, low: 90, high: 99}", "none of its 5 finished trials lies"),
        ("pruning.learning_rate=0.25", "learning_rate is 3e-05 there and 0.25 here"),
        ("objective={val_at: 0.5}", "has objective = .*so their values cannot be compared"),
        ("warm_start=nowhere", "there is no study 'nowhere'"),
        ("warm_start=t", "cannot start from itself"),
    ],
)
def test_a_study_that_cannot_be_used_is_a_sentence(
    root: Path, change: str, complaint: str
) -> None:
    with pytest.raises(SpecError, match=complaint):
        run(warm(root, change))
