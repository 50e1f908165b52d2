import math

import pytest

from comp.results import CurvePoint
from studies.curves import Curve
from studies.goals import Measure, objective_name, read_measure
from studies.objectives import judge, measure_curve
from studies.spec import StudySpec
from studies.specfile import override, spec_of
from tests.orchestration.trials import make_point
from tests.studies.synthetic import STUDY


def curve(*pairs: tuple[float, float]) -> Curve:
    return Curve("r", tuple(make_point(ratio, val=val, test=99.0) for ratio, val in pairs))


BENT = curve((0.0, 80.0), (0.5, 70.0), (0.75, 60.0))


def test_val_at_reads_the_validation_curve() -> None:
    assert measure_curve(Measure("val_at", 0.625), BENT) == pytest.approx(65)


def test_the_end_is_the_largest_ratio() -> None:
    assert measure_curve(Measure("val_at", "end"), BENT) == pytest.approx(60)


def test_area_is_the_mean_of_the_validation_curve() -> None:
    assert measure_curve(Measure("area", (0.5, 0.75)), BENT) == pytest.approx(65)


def test_a_drop_is_counted_from_the_dense_model() -> None:
    assert measure_curve(Measure("drop_at", 0.5), BENT) == pytest.approx(10)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("gflops_at", "gmacs"), ("latency_at", "latency_ms"), ("speed_up_at", "speed_up")],
)
def test_costs_are_those_of_the_point(kind: str, name: str) -> None:
    point: CurvePoint = BENT.points[1]
    assert measure_curve(Measure(kind, 0.5), BENT) == pytest.approx(getattr(point, name))


def test_a_run_that_ends_too_early_has_no_value() -> None:
    with pytest.raises(ValueError, match=r"covers ratios 0\.000 to 0\.750, so it has no val at"):
        measure_curve(Measure("val_at", 0.9), BENT)


def test_a_value_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"validation at ratio 0\.5 of run 'r' is nan"):
        measure_curve(Measure("val_at", 0.5), curve((0.0, 80.0), (0.5, math.nan)))


def test_objectives_have_names_for_people() -> None:
    assert objective_name((Measure("val_at", 0.8),)) == "validation at ratio 0.8"
    both = (Measure("area", (0.5, 0.8)), Measure("gflops_at", "end"))
    assert objective_name(both) == (
        "mean validation between ratios 0.5 and 0.8, GFLOPs at the largest ratio"
    )


def spec(*overrides: str) -> StudySpec:
    found = spec_of(override(STUDY, overrides))
    assert isinstance(found, StudySpec)
    return found


def test_the_mean_over_seeds_is_told_and_the_values_of_every_seed_are_kept() -> None:
    curves = {0: BENT, 3: curve((0.0, 80.0), (0.5, 74.0), (0.75, 62.0))}
    verdict = judge((Measure("val_at", 0.5),), (), curves)
    assert verdict.values == (72.0,)
    assert verdict.by_seed == {0: (70.0,), 3: (74.0,)}


@pytest.mark.parametrize(
    ("constraint", "excess"),
    [("{drop_at: 0.5, at_most: 8}", 2.0), ("{val_at: 0.5, at_least: 65}", -5.0)],
)
def test_a_constraint_is_kept_at_zero_or_less(constraint: str, excess: float) -> None:
    (bound,) = spec(f"constraints=[{constraint}]").constraints
    verdict = judge((Measure("val_at", 0.5),), (bound,), {0: BENT})
    assert verdict.excess == {bound.name: pytest.approx(excess)}


def test_a_measure_reads_back_as_it_was_written() -> None:
    for text in ({"val_at": 0.8}, {"area": [0.5, 0.8]}, {"latency_at": "end"}):
        assert read_measure(text).to_spec() == text
