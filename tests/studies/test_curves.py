import csv
from pathlib import Path

import pyarrow.parquet
import pytest

from comp.results import CurvePoint
from orchestration.store import read_run
from studies.curves import (
    Curve,
    Spread,
    area,
    best_curve,
    check_comparable,
    covers,
    curve_of,
    pareto_front,
    spread,
    value_at,
    write_points,
)
from tests.orchestration.trials import make_point
from tests.studies.synthetic import make_spec


def curve(*pairs: tuple[float, float], run: str = "r", **changes: object) -> Curve:
    points = (make_point(ratio, val=val, test=val - 1, **changes) for ratio, val in pairs)
    return Curve(run, tuple(points))


# Two straight pieces: 80 to 70 over [0, 0.5], 70 to 60 over [0.5, 0.75].
BENT = curve((0.0, 80.0), (0.5, 70.0), (0.75, 60.0))


@pytest.mark.parametrize(
    ("ratio", "value"), [(0.0, 80), (0.25, 75), (0.5, 70), (0.625, 65), (0.75, 60)]
)
def test_a_curve_is_read_along_straight_lines(ratio: float, value: float) -> None:
    assert value_at(BENT, ratio) == pytest.approx(value)


def test_test_and_validation_are_read_apart() -> None:
    assert value_at(BENT, 0.25, "test") == pytest.approx(74)


def test_the_order_of_points_does_not_matter() -> None:
    assert Curve("r", BENT.points[::-1]) == BENT


def test_a_ratio_reached_within_tolerance_counts() -> None:
    assert value_at(curve((0.0, 80.0), (0.795, 70.0)), 0.8) == pytest.approx(70)


def test_nothing_is_read_beyond_what_a_run_reached() -> None:
    with pytest.raises(ValueError, match=r"'r' covers ratios 0\.000 to 0\.750, so it has no val"):
        value_at(BENT, 0.8)
    assert not covers(BENT, 0.8)


@pytest.mark.parametrize(
    ("low", "high", "mean"),
    [
        (0.0, 0.5, 75.0),
        (0.5, 0.75, 65.0),
        (0.0, 0.75, (0.5 * 75 + 0.25 * 65) / 0.75),
        (0.25, 0.625, (0.25 * 72.5 + 0.125 * 67.5) / 0.375),
    ],
)
def test_the_area_is_exact_for_straight_pieces(low: float, high: float, mean: float) -> None:
    assert area(BENT, low, high) == pytest.approx(mean)


def test_a_model_that_loses_nothing_has_its_accuracy_as_area() -> None:
    assert area(curve((0.0, 80.0), (0.9, 80.0)), 0.1, 0.8) == pytest.approx(80)


def test_an_area_needs_a_width() -> None:
    with pytest.raises(ValueError, match=r"low must be below high, but got 0.5 and 0.5"):
        area(BENT, 0.5, 0.5)


def test_a_curve_needs_a_point() -> None:
    with pytest.raises(ValueError, match="run 'r' has no points yet"):
        Curve("r", ())


def test_the_best_curve_is_the_highest_that_gets_there() -> None:
    short = curve((0.0, 80.0), (0.5, 79.0), run="short")
    low = curve((0.0, 80.0), (0.8, 50.0), run="low")
    assert best_curve([short, low], 0.8) is low
    assert best_curve([short, low], 0.4) is short
    assert best_curve([short], 0.8) is None


def point(gmacs: float, val: float) -> CurvePoint:
    return make_point(0.5, gmacs=gmacs, val=val)


def test_the_pareto_front_has_what_nothing_beats() -> None:
    cheap, good, beaten, twin = point(1, 50), point(3, 70), point(4, 60), point(3, 70)
    assert pareto_front([beaten, good, cheap, twin]) == [cheap, good]


def test_of_equally_cheap_points_the_better_is_on_the_front() -> None:
    assert pareto_front([point(1, 50), point(1, 60)]) == [point(1, 60)]


def test_spread_is_the_sample_standard_deviation() -> None:
    assert spread([1.0, 3.0]) == Spread(mean=2.0, std=pytest.approx(2**0.5), num=2)
    assert str(spread([1.0, 3.0])) == "2.00 ± 1.41"


def test_one_value_has_no_spread() -> None:
    assert spread([4.0]) == Spread(4.0, 0.0, 1)
    assert str(spread([4.0])) == "4.00"


def test_spread_needs_a_value() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        spread([])


def test_curves_of_two_tasks_are_not_put_on_one_axis() -> None:
    other = curve((0.0, 1.0), (0.5, 1.0), task="nlvr2")
    with pytest.raises(ValueError, match="one task, but got nlvr2, vqa"):
        check_comparable([BENT, other])


def test_a_run_without_a_finished_ratio_has_no_curve(tmp_path: Path) -> None:
    from orchestration.store import RunDirectory
    from tests.orchestration.trials import make_job

    directory = RunDirectory.open(make_job(tmp_path))
    directory.append(make_point(0.0))
    assert curve_of(read_run(tmp_path / "s-0000")) is None


def test_points_are_written_in_the_columns_of_the_run(tmp_path: Path) -> None:
    from tests.studies.test_driver import run

    run(make_spec(tmp_path, "n_trials=2"))
    runs = [read_run(tmp_path / "runs" / name) for name in ("s-0000", "s-0001")]
    assert write_points(runs, tmp_path / "all.parquet") == 6
    assert write_points(runs, tmp_path / "all.csv") == 6
    table = pyarrow.parquet.read_table(tmp_path / "all.parquet")
    with (tmp_path / "all.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    nested = {"layers", "details"}
    assert [name for name in table.column_names if name not in nested] == list(rows[0])
    assert table["ratio_reached"].to_pylist() == [0.0, 0.5, 0.8] * 2


def test_points_go_to_csv_or_parquet_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a \.csv or \.parquet file, but got .*all\.json"):
        write_points([], tmp_path / "all.json")
