import dataclasses
from pathlib import Path

import pytest

from orchestration.store import RunDirectory
from studies.comparison import compare_sources
from studies.comparison_text import MAX_ROWS, comparison_text
from studies.curves import Curve
from studies.errors import SpecError
from studies.sources import Source, find_sources
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


def source(
    name: str, values: dict[float, float], *, method: str = "comp", seed: int = 0
) -> Source:
    """A run of a method and seed whose curve goes through the values, dense at ratio 0."""
    points = [
        make_point(r, val=v, seed=seed, method=method if r else "dense") for r, v in values.items()
    ]
    return Source(name, Curve(name, tuple(points), settings={"method": method}), ())


def test_a_study_stands_for_its_runs_but_the_dense_one(root: Path) -> None:
    names = [found.name for found in find_sources(["s"], root)]
    assert names == ["s-0000-s0", "s-0000-s8", "s-0001-s0", "s-0001-s8"]


def test_runs_are_found_by_id_and_by_directory_but_only_once(root: Path) -> None:
    names = ["s-0000-s0", str(root / "runs" / "s-0000-s0"), str(root / "studies" / "s")]
    assert len(find_sources(names, root)) == 4


def test_a_root_stands_for_all_its_runs(root: Path) -> None:
    assert len(find_sources([str(root)], Path("elsewhere"))) == 4


def test_an_unknown_name_names_the_nearest(root: Path) -> None:
    with pytest.raises(SpecError, match=r"is no run directory.*did you mean 's-0000-s"):
        find_sources(["s-0000-s1"], root)


def test_an_empty_study_is_a_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "studies" / "s"
    folder.mkdir(parents=True)
    (folder / "study.json").write_text('{"version": 1, "name": "s"}')
    with pytest.raises(SpecError, match="s: no pruning run has started there yet"):
        find_sources(["s"], tmp_path)


def test_runs_that_differ_in_their_seed_share_a_row(root: Path) -> None:
    comparison = compare_sources(find_sources(["s"], root), [0.8], "val")
    assert [row.seeds for row in comparison.rows] == [[0, 8], [0, 8]]
    (value,) = comparison.rows[0].values
    assert value is not None
    assert value.std == pytest.approx(0.08 / 2**0.5)  # the seeds differ by 0.08 points


def test_rows_are_ordered_by_area(root: Path) -> None:
    areas = [row.area.mean for row in compare_sources(find_sources(["s"], root), [], "val").rows]
    assert areas == sorted(areas, reverse=True)


def test_a_method_is_one_row_over_all_its_settings(root: Path) -> None:
    (row,) = compare_sources(find_sources(["s"], root), [], "val", by="method").rows
    assert (row.name, len(row.curves), row.seeds) == ("comp on blip-tiny-vqa", 4, [0, 8])


def test_differences_are_taken_within_seeds() -> None:
    """Seeds differ by 10 points, the methods by 1: a pair sees only the latter."""
    sources = [
        source(
            f"{method}-{seed}", {0.0: 90.0, 0.5: 60.0 + 10 * seed + gain}, method=method, seed=seed
        )
        for method, gain in (("params", 0.0), ("comp", 1.0))
        for seed in (0, 1, 2)
    ]
    comparison = compare_sources(sources, [0.5], "val", baseline="params")
    (paired,) = comparison.paired
    assert (paired.name, paired.seeds) == ("comp-0", (0, 1, 2))
    (difference,) = paired.values
    assert difference is not None
    assert (difference.mean, difference.low, difference.high) == pytest.approx((1.0, 1.0, 1.0))
    assert "+1.00 [+1.00, +1.00]" in comparison_text(comparison)


def test_rows_without_a_common_seed_are_not_paired() -> None:
    values = {0.0: 90.0, 0.5: 60.0}
    sources = [source("a-1", values, seed=1), source("b-2", values, seed=2, method="params")]
    comparison = compare_sources(sources, [], "val")
    assert comparison.paired == ()
    text = comparison_text(comparison)
    assert "no paired differences: no other row shares a seed with a-1" in text


def test_a_terminal_shows_the_highest_rows_and_says_how_many_are_left() -> None:
    sources = [source(f"r-{n:04d}", {0.0: 90.0, 0.5: n / 100}) for n in range(MAX_ROWS + 1200)]
    for number, one in enumerate(sources):
        assert one.curve is not None
        settings = {"num_stages": str(number)}
        sources[number] = dataclasses.replace(
            one, curve=dataclasses.replace(one.curve, settings=settings)
        )
    lines = comparison_text(compare_sources(sources, [], "val")).splitlines()
    assert lines[1].split()[0] == f"r-{MAX_ROWS + 1199}"
    assert lines[1 + MAX_ROWS] == "and 1,200 more; --json has all"
    assert len(lines) < 100


def test_the_front_names_who_is_on_it() -> None:
    sources = [source("low-0", {0.0: 90.0, 0.5: 60.0}), source("high-0", {0.5: 70.0})]
    sources[1] = source("high-0", {0.0: 90.0, 0.5: 70.0}, method="params")
    front = compare_sources(sources, [], "val").to_dict()["pareto"]
    assert [(point["run"], point["val"]) for point in front] == [("high-0", 70.0), ("low-0", 90.0)]


def test_an_unknown_baseline_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="--baseline names 'uppop', which is not among"):
        compare_sources(find_sources(["s"], root), [], "val", baseline="uppop")


def test_ratios_that_half_of_the_runs_were_asked_for_are_the_default() -> None:
    sources = [
        source("a-0", {0.0: 90.0, 0.5: 60.0, 0.81: 50.0}),
        source("b-0", {0.0: 90.0, 0.5: 60.0, 0.83: 50.0}),
        source("c-0", {0.0: 90.0, 0.5: 60.0, 0.84: 50.0}),
    ]
    assert compare_sources(sources, [], "val").ratios == (0.5,)


def test_a_ratio_that_some_runs_do_not_reach_is_a_gap_with_a_sentence(tmp_path: Path) -> None:
    write_run(tmp_path, "a-1", 0.5)
    write_run(tmp_path, "b-2", 0.5, 0.8)
    comparison = compare_sources(find_sources(["a-1", "b-2"], tmp_path), [0.8], "val")
    by_name = {row.name: row.values[0] for row in comparison.rows}
    assert by_name["a-1"] is None
    assert by_name["b-2"] is not None
    assert "-: a-1 ends at ratio 0.500" in comparison_text(comparison)


def test_a_ratio_that_no_run_reaches_is_a_mistake(root: Path) -> None:
    with pytest.raises(ValueError, match=r"no run reaches ratio 0\.9; the highest is 0\.800"):
        compare_sources(find_sources(["s"], root), [0.9], "val")


def test_runs_of_two_tasks_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, "a-1", 0.5)
    write_run(tmp_path, "b-2", 0.5, task="nlvr2")
    with pytest.raises(ValueError, match="of one task, but got nlvr2, vqa"):
        compare_sources(find_sources(["a-1", "b-2"], tmp_path), [], "val")


def test_a_metric_that_some_runs_lack_is_refused() -> None:
    sources = [
        source("a-0", {0.0: 90.0, 0.5: 60.0}),
        source("b-0", {0.0: 90.0, 0.5: float("nan")}),
    ]
    with pytest.raises(
        ValueError, match=r"1 of 2 runs lack val at some ratio \(b-0\); compare te"
    ):
        compare_sources(sources, [], "val")


def test_runs_without_a_finished_ratio_are_named(tmp_path: Path) -> None:
    write_run(tmp_path, "a-1", 0.5)
    RunDirectory.open(make_job(tmp_path / "runs", run="b-2")).append(make_stage(1))
    sources = find_sources(["a-1", "b-2"], tmp_path)
    assert compare_sources(sources, [], "val").skipped == ("b-2",)
    with pytest.raises(ValueError, match="none of 1 runs has a finished ratio yet"):
        compare_sources([dataclasses.replace(sources[1])], [], "val")
