import math

import pytest

from studies.curves import Curve
from studies.objectives import objective_name, objective_value
from studies.spec import Area, ValAt
from tests.orchestration.trials import make_point


def curve(*pairs: tuple[float, float]) -> Curve:
    return Curve("r", tuple(make_point(ratio, val=val, test=99.0) for ratio, val in pairs))


BENT = curve((0.0, 80.0), (0.5, 70.0), (0.75, 60.0))


def test_val_at_reads_the_validation_curve() -> None:
    assert objective_value(ValAt(val_at=0.625), BENT) == pytest.approx(65)


def test_area_is_the_mean_of_the_validation_curve() -> None:
    assert objective_value(Area(area=(0.5, 0.75)), BENT) == pytest.approx(65)


def test_a_run_that_ends_too_early_has_no_value() -> None:
    with pytest.raises(ValueError, match=r"covers ratios 0\.000 to 0\.750, so it has no val at"):
        objective_value(ValAt(val_at=0.9), BENT)


def test_a_value_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="objective of run 'r' is nan"):
        objective_value(ValAt(val_at=0.5), curve((0.0, 80.0), (0.5, math.nan)))


def test_objectives_have_names_for_people() -> None:
    assert objective_name(ValAt(val_at=0.8)) == "validation at ratio 0.8"
    name = "mean validation between ratios 0.5 and 0.8"
    assert objective_name(Area(area=(0.5, 0.8))) == name
