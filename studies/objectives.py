"""What Optuna is told of a trial: one number of its validation curve, never of the test split."""

import math

from studies.curves import Curve, area, value_at
from studies.spec import Area, ValAt


def objective_value(objective: ValAt | Area, curve: Curve) -> float:
    """Returns the objective of one run; higher is better.

    Raises:
        ValueError: If the curve does not reach far enough, or holds a value that is no number.
    """
    if isinstance(objective, Area):
        value = area(curve, *objective.area)
    else:
        value = value_at(curve, objective.val_at)
    if not math.isfinite(value):
        raise ValueError(f"the objective of run {curve.run!r} is {value}, which is no number")
    return value


def objective_name(objective: ValAt | Area) -> str:
    """Returns what a person calls the objective."""
    if isinstance(objective, Area):
        low, high = objective.area
        return f"mean validation between ratios {low:g} and {high:g}"
    return f"validation at ratio {objective.val_at:g}"
