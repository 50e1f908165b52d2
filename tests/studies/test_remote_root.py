"""Studies whose root is a URI: the same study, in a local S3."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from comp.checkpoint import save_pruned
from comp.models import load_model
from orchestration.job import Job, Record
from orchestration.lock import LEASE
from orchestration.storage import Storage, StorageError, join
from orchestration.store import RunDirectory, read_run
from studies.cli import cli
from studies.cli_model import at_hand, find_model
from studies.driver import StudyFailed
from studies.errors import SpecError
from studies.folder import StudyFolder
from studies.report import read_report, write_report
from studies.session import conduct_study, sync_study
from studies.sources import find_runs
from studies.study import Study
from studies.summary import summarize
from tests.object_store import SECRET, ObjectStore, serving
from tests.studies.synthetic import RUNNER, make_spec, prune
from tests.tiny import FAMILIES


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with serving() as server:
        yield server


def test_a_study_lies_in_an_object_store_and_goes_on_there(
    store: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracking = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    small = (f"root={store.root}", "parallel=1", tracking)
    spec = make_spec(tmp_path, *small, "n_trials=1")
    conduct_study(spec, inline=True, runner=RUNNER)
    assert conduct_study(
        make_spec(tmp_path, *small, "n_trials=2"), inline=True, runner=RUNNER
    ).counts == {"complete": 2}
    folder = StudyFolder.find(store.root, "s")
    written = write_report(folder, read_report(folder))
    assert set(map(folder.storage.exists, ("report.md", "curves.png", "spec.yaml"))) == {True}
    assert written[-1] == f"{store.root}/studies/s/report.md"
    assert [run.job.run_id for run in find_runs(["s"], store.root)] == ["s-0000", "s-0001"]
    assert sync_study(folder) == ([], 3)
    assert list(tmp_path.glob("*/")) == [tmp_path / "mlflow-artifacts"]

    assert (
        cli.main(["study", "status", "--root", store.root, "--json"], standalone_mode=False) == 0
    )
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last)["studies"] == [{"name": "s", "counts": {"complete": 2}}]


def test_the_journal_in_an_object_store_is_read_back(store: ObjectStore, tmp_path: Path) -> None:
    spec = make_spec(tmp_path, f"root={store.root}", "name=journal", "n_trials=3")
    StudyFolder.of(spec).freeze(spec)
    study = Study(spec)
    first, second = study.ask(), study.ask()
    assert first is not None
    assert second is not None
    first.complete([3.5], {})
    again = summarize(StudyFolder.of(spec))
    assert [trial.value for trial in again.trials] == [3.5, None]
    adopted = list(Study(spec).adopt())
    assert [(trial.number, trial.config) for trial in adopted] == [(1, second.config)]


def test_a_store_that_denies_stops_a_study_before_any_work(
    store: ObjectStore, tmp_path: Path
) -> None:
    spec = make_spec(tmp_path, f"root={store.root}/denied", "tracking.enabled=false")
    store.check_keys()
    try:
        with pytest.raises(
            StorageError,
            match=f"{store.root}/denied/studies/s.*AWS_ACCESS_KEY_ID|access is denied",
        ):
            conduct_study(spec, inline=True, runner=RUNNER)
    finally:
        store.trust()
    assert not StudyFolder.of(spec).is_started


def prune_until_denied(job: Job, directory: RunDirectory) -> Iterator[Record]:
    """A runner whose store denies it everything after the second record of trial 1."""
    for record in prune(job, directory):
        yield record
        if job.trial == 1 and record.index == 1:
            ObjectStore(os.environ["AWS_ENDPOINT_URL"]).check_keys()


def test_a_store_that_denies_in_the_middle_keeps_what_is_finished(
    store: ObjectStore, tmp_path: Path
) -> None:
    root = f"{store.root}/middle"
    spec = make_spec(tmp_path, f"root={root}", "tracking.enabled=false", "n_trials=2")
    try:
        with pytest.raises(StudyFailed, match=f"{root}/runs/s-0001/.*access is denied"):
            conduct_study(spec, inline=True, runner=f"{__name__}:prune_until_denied")
    finally:
        store.trust()
    kept = read_run(f"{root}/runs/s-0001")
    assert (kept.outcome, len(kept.records)) == ("unfinished", 2)
    assert read_run(f"{root}/runs/s-0000").outcome == "finished"
    Storage(f"{root}/studies/s").remove(LEASE)  # its holder, this process, still lives
    outcome = conduct_study(spec, inline=True, runner=f"{__name__}:prune_until_denied")
    assert outcome.counts == {"complete": 2}
    assert read_run(f"{root}/runs/s-0001").records[:2] == kept.records


def test_nothing_in_the_store_holds_the_key(store: ObjectStore) -> None:
    storage = Storage(store.root)
    names = list(storage.sizes("studies")) + list(storage.sizes("runs"))
    assert len(names) > 20
    assert [name for name in names if SECRET.encode() in storage.read(name)] == []


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ("root=s3://AKIA:hunter2@bucket/x", "AWS_SECRET_ACCESS_KEY"),
        ("tracking.uri=https://me:hunter2@mlflow.example", "MLFLOW_TRACKING_PASSWORD"),
        ("storage=postgresql://me:hunter2@db/optuna", "PGPASSWORD"),
    ],
)
def test_a_password_in_a_spec_is_refused_and_not_repeated(
    tmp_path: Path, change: str, remedy: str
) -> None:
    with pytest.raises(SpecError, match="must not hold a") as caught:
        make_spec(tmp_path, change)
    assert remedy in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_model_of_a_run_in_the_store_is_loaded(store: ObjectStore) -> None:
    run = f"{store.root}/runs/with-a-model"
    model = FAMILIES["blip-nlvr"].build(0)
    Storage(run).write_tree("model/ratio-500", lambda target: save_pruned(model, target))
    with at_hand(run) as place:
        loaded = load_model(find_model(place, 0.5))
    weights = loaded.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="neither a run nor a model at"), at_hand(f"{run}-not"):
        pytest.fail("nothing is there")


def test_places_in_a_root_are_joined(store: ObjectStore) -> None:
    assert StudyFolder(store.root, "s").run("s-1") == join(store.root, "runs", "s-1")
