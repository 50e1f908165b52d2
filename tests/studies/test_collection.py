"""The dataset behind a results page grows run by run, and refuses runs on other terms."""

from pathlib import Path

import pyarrow.parquet
import pytest

from studies.collection import POINTS, STAGES, collect, read_collection
from studies.folder import StudyFolder
from studies.reproduction import rows_of
from tests.studies.synthetic import make_spec
from tests.studies.test_driver import run


def study(root: Path, *changes: str) -> StudyFolder:
    """Runs a study of the same name in a root of its own."""
    spec = make_spec(root, "n_trials=1", *changes)
    run(spec)
    return StudyFolder.of(spec)


def pairs(data: Path, table: str = POINTS) -> list[tuple[str, int]]:
    rows = pyarrow.parquet.read_table(data / table).to_pylist()
    return sorted({(row["study"], row["seed"]) for row in rows})


def test_seeds_that_were_run_elsewhere_join_those_that_are_there(tmp_path: Path) -> None:
    data = tmp_path / "data"
    first = study(tmp_path / "here", "seeds=[0, 1]")
    assert collect([first], data) == 2
    assert collect([study(tmp_path / "there", "seeds=[1, 2]")], data) == 2
    assert pairs(data) == pairs(data, STAGES) == [("s", 0), ("s", 1), ("s", 2)]
    points = pyarrow.parquet.read_table(data / POINTS).to_pylist()
    assert len({(point["seed"], point["ratio_asked"]) for point in points}) == len(points)


def test_settings_of_two_pieces_keep_their_stages_though_run_ids_are_equal(tmp_path: Path) -> None:
    data = tmp_path / "data"
    space = (
        "space={distillation: {kind: categorical, choices: [0.0, 1.0]}, "
        "recalibrate: {kind: categorical, choices: [false, true]}}"
    )
    for place, change in (("here", "distillation: 1.0"), ("there", "recalibrate: true")):
        listed = ("sampler={kind: start}", space, f"enqueue=[{{{change}}}]", "n_trials=2")
        collect([study(tmp_path / place, *listed)], data)
    rows = rows_of(read_collection(data))
    assert {row.method for row in rows} == {
        "comp",
        "comp distillation=1.0",
        "comp recalibrate=true",
    }
    assert len({row.stages for row in rows}) == 1


def test_pieces_whose_trial_0_differs_are_refused_for_settings_are_named_after_it(
    tmp_path: Path,
) -> None:
    space = "space={recalibrate: {kind: categorical, choices: [false, true]}}"
    start = ("sampler={kind: start}", space, "n_trials=1")
    collect([study(tmp_path / "here", *start)], tmp_path / "data")
    other = study(tmp_path / "there", *start, "pruning.recalibrate=true", "seeds=[1]")
    with pytest.raises(ValueError, match=r"recalibrate of trial 0 \(False and True\)"):
        collect([other], tmp_path / "data")


def test_another_study_is_left_as_it_is(tmp_path: Path) -> None:
    data = tmp_path / "data"
    collect([study(tmp_path, "name=one")], data)
    collect([study(tmp_path, "name=two")], data)
    assert [name for name, _ in pairs(data)] == ["one", "two"]


def test_a_run_with_fewer_points_does_not_replace_one_with_more(tmp_path: Path) -> None:
    data, quantum = tmp_path / "data", "pruning.stage_quantum=0.1"
    collect([study(tmp_path / "whole", quantum, "pruning.ratios=[0.3, 0.8]")], data)
    whole = pyarrow.parquet.read_table(data / POINTS)
    short = study(tmp_path / "short", quantum, "pruning.ratios=[0.8]")
    collect([short], data)
    assert pyarrow.parquet.read_table(data / POINTS).equals(whole)
    assert collect([short], data, replace=True) == 1
    assert pyarrow.parquet.read_table(data / POINTS).num_rows < whole.num_rows


def test_runs_on_other_terms_are_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    data = tmp_path / "data"
    collect([study(tmp_path / "here")], data)
    before = pyarrow.parquet.read_table(data / POINTS)
    other = study(tmp_path / "there", "pruning.steps_per_stage=7", "seeds=[4]")
    with pytest.raises(ValueError, match=r"steps_per_stage \(\d+ and 7\); collect with --replace"):
        collect([other], data)
    assert pyarrow.parquet.read_table(data / POINTS).equals(before)
    collect([other], data, replace=True)
    assert pairs(data) == [("s", 4)]
