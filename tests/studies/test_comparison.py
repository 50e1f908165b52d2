from pathlib import Path

import pytest

from orchestration.store import RunDirectory, read_run
from studies.comparison import compare_runs, find_runs
from studies.errors import SpecError
from tests.orchestration.trials import make_job, make_point, make_stage
from tests.studies.synthetic import make_spec
from tests.studies.test_driver import run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    run(make_spec(root, "n_trials=2", "seeds=[0, 8]"))
    return root


def write_run(root: Path, run_id: str, *ratios: float, **changes: object) -> None:
    job = make_job(root / "runs", run=run_id, task=changes.get("task", "vqa"))
    directory = RunDirectory.open(job)
    for ratio in (0.0, *ratios):
        directory.append(make_point(ratio, **changes))
    directory.finish()


def test_a_study_stands_for_its_runs_but_the_dense_one(root: Path) -> None:
    names = [found.job.run_id for found in find_runs(["s"], root)]
    assert names == ["s-0000-s0", "s-0000-s8", "s-0001-s0", "s-0001-s8"]


def test_runs_are_found_by_id_and_by_directory_but_only_once(root: Path) -> None:
    names = ["s-0000-s0", str(root / "runs" / "s-0000-s0"), str(root / "studies" / "s")]
    assert len(find_runs(names, root)) == 4


def test_a_root_stands_for_all_its_runs(root: Path) -> None:
    assert len(find_runs([str(root)], Path("elsewhere"))) == 4


def test_an_unknown_name_names_the_nearest(root: Path) -> None:
    with pytest.raises(SpecError, match=r"is no run directory.*did you mean 's-0000-s"):
        find_runs(["s-0000-s1"], root)


def test_runs_that_differ_in_their_seed_share_a_row(root: Path) -> None:
    comparison = compare_runs(find_runs(["s"], root), [0.8], "val")
    assert [row.num_seeds for row in comparison.rows] == [2, 2]
    (value,) = comparison.rows[0].values
    assert value is not None
    assert value.std == pytest.approx(0.08 / 2**0.5)  # the seeds differ by 0.08 points


def test_rows_are_ordered_by_area(root: Path) -> None:
    areas = [row.area.mean for row in compare_runs(find_runs(["s"], root), [], "val").rows]
    assert areas == sorted(areas, reverse=True)


def test_ratios_that_were_asked_for_are_the_default(root: Path) -> None:
    assert compare_runs(find_runs(["s"], root), [], "test").ratios == (0.5, 0.8)


def test_a_ratio_that_some_runs_do_not_reach_is_a_gap(tmp_path: Path) -> None:
    write_run(tmp_path, "a-1", 0.5)
    write_run(tmp_path, "b-2", 0.5, 0.8)
    comparison = compare_runs(find_runs(["a-1", "b-2"], tmp_path), [0.8], "val")
    by_name = {row.name: row.values[0] for row in comparison.rows}
    assert by_name["a-1"] is None
    assert by_name["b-2"] is not None
    assert "-: the run does not reach this ratio" in comparison.to_text()


def test_a_ratio_that_no_run_reaches_is_a_mistake(root: Path) -> None:
    with pytest.raises(ValueError, match=r"no run reaches ratio 0\.9; the highest is 0\.800"):
        compare_runs(find_runs(["s"], root), [0.9], "val")


def test_runs_of_two_tasks_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, "a-1", 0.5)
    write_run(tmp_path, "b-2", 0.5, task="nlvr2")
    with pytest.raises(ValueError, match="of one task, but got nlvr2, vqa"):
        compare_runs(find_runs(["a-1", "b-2"], tmp_path), [], "val")


def test_runs_without_a_finished_ratio_are_named(tmp_path: Path) -> None:
    write_run(tmp_path, "a-1", 0.5)
    RunDirectory.open(make_job(tmp_path / "runs", run="b-2")).append(make_stage(1))
    runs = find_runs(["a-1", "b-2"], tmp_path)
    assert compare_runs(runs, [], "val").skipped == ("b-2",)
    unfinished = [read_run(tmp_path / "runs" / "b-2")]
    with pytest.raises(ValueError, match="none of 1 runs has a finished ratio yet"):
        compare_runs(unfinished, [], "val")
