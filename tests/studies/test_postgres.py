"""Two studies at once with Optuna's and MLflow's storage in a real PostgreSQL."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from studies.driver import Outcome, run_study
from studies.errors import SpecError
from studies.folder import StudyFolder
from studies.session import Mirror
from studies.spec import StudySpec
from studies.study import Study
from studies.summary import summarize
from tests.studies.postgres import serving_postgres
from tests.studies.synthetic import RUNNER, SlotsExecutor, make_spec

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def make_database() -> Iterator[Callable[[str], str]]:
    with serving_postgres() as make:
        yield make


@pytest.fixture(scope="module")
def url(make_database: Callable[[str], str]) -> str:
    return make_database("optuna")


def spec_in(url: str, root: Path, name: str, *changes: str) -> StudySpec:
    return make_spec(root, f"name={name}", f"storage={url}", *changes)


def test_two_studies_at_once_share_a_server_for_optuna_and_mlflow(
    make_database: Callable[[str], str], tmp_path: Path
) -> None:
    import mlflow

    url, tracking = make_database("empty"), make_database("mlflow")
    specs = [
        spec_in(url, tmp_path / name, name, f"tracking.uri={tracking}", "n_trials=8")
        for name in ("one", "two")
    ]

    def run(spec: StudySpec) -> Outcome:
        with closing(Mirror(spec, spec.name)) as mirror:
            return run_study(spec, lambda: SlotsExecutor(2), [mirror], runner=RUNNER)

    with ThreadPoolExecutor() as pool:
        outcomes = list(pool.map(run, specs))
    assert outcomes == [Outcome("finished", {"complete": 8})] * 2
    client = mlflow.MlflowClient(tracking_uri=tracking)
    for spec in specs:
        summary = summarize(StudyFolder.of(spec))
        assert [trial.number for trial in summary.trials] == list(range(8))
        experiment = client.get_experiment_by_name(spec.name)
        runs = client.search_runs([experiment.experiment_id])
        names = {run.info.run_name for run in runs}
        assert {run_id for trial in summary.trials for run_id in trial.runs} <= names


def test_a_trial_of_a_dead_driver_is_adopted_from_the_database(url: str, tmp_path: Path) -> None:
    class DriverDied(BaseException):
        pass

    def die(poll: int) -> None:
        if poll == 5:
            raise DriverDied

    spec = spec_in(url, tmp_path, "adopted", "n_trials=4")
    dying = SlotsExecutor(2, before_poll=die)
    with pytest.raises(DriverDied):
        run_study(spec, lambda: dying, runner=RUNNER)
    assert summarize(StudyFolder.of(spec)).counts["running"] == 2
    outcome = run_study(spec, lambda: SlotsExecutor(2), runner=RUNNER)
    assert outcome.counts == {"complete": 4}
    assert len(summarize(StudyFolder.of(spec)).trials) == 4


def test_a_study_of_another_root_is_refused(url: str, tmp_path: Path) -> None:
    for name in ("mine", "yours"):
        spec = spec_in(url, tmp_path / name, "shared")
        StudyFolder.of(spec).freeze(spec)
    Study(spec_in(url, tmp_path / "mine", "shared"))
    with pytest.raises(SpecError, match="is written from another root"):
        Study(spec_in(url, tmp_path / "yours", "shared"))
