"""What Optuna is told of a trial on its way: intermediate values, for dashboards and pruners.

Without a pruner these are the finished points of the curve. With one that compares stages they
must stand at the same ratios in every trial, so they are read off the straight lines between the
stages, at multiples of one ratio and before any fine-tuning. With one that compares seeds, every
seed is a step of its own. A study of several objectives has none.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from comp.results import CurvePoint, StageRecord
from studies.curves import Curve, spread
from studies.objectives import measure_curve
from studies.search import HyperbandPruner, MedianPruner, PatiencePruner, WilcoxonPruner
from studies.spec import StudySpec

Report = tuple[int, float]  # a step and a value


@dataclass
class _Line:
    """The stages of one seed so far: the last knot, and the area under the line up to it."""

    ratio: float
    val: float
    area: float = 0.0

    def go_to(self, ratio: float, val: float) -> None:
        """Moves on along a straight line."""
        self.area += (ratio - self.ratio) * (val + self.val) / 2
        self.ratio, self.val = ratio, val


@dataclass
class StageReports:
    """Turns the records of a trial's runs, one run a seed, into reports in ascending order.

    Attributes:
        spec: The study.
    """

    spec: StudySpec
    _lines: dict[int, _Line] = field(default_factory=dict, init=False)
    _values: dict[int, dict[int, float]] = field(default_factory=dict, init=False)

    def take(self, seed: int, body: StageRecord | CurvePoint) -> list[Report]:
        """Takes a record in, and returns what every seed has by now."""
        if len(self.spec.objective) > 1 or isinstance(self.spec.pruner, WilcoxonPruner):
            return []
        is_dense = isinstance(body, CurvePoint) and body.method == "dense"
        if self.spec.pruner is None:
            if isinstance(body, StageRecord) or is_dense:
                return []
            return self._add(seed, [(_step(body.ratio_asked), body.val)])
        if isinstance(body, StageRecord):
            line = self._lines.setdefault(seed, _Line(0.0, body.val))
            return self._add(seed, list(_passed(line, body, self.spec.pruner)))
        if is_dense:
            self._lines[seed] = _Line(0.0, body.val)
        return []

    def end(self, seed: int, points: Sequence[CurvePoint]) -> list[Report]:
        """Takes the end of a seed's run in.

        Raises:
            ValueError: If its curve cannot be judged.
        """
        if not isinstance(self.spec.pruner, WilcoxonPruner):
            return []
        curve = Curve(f"seed {seed}", tuple(points))
        return [(self.spec.seeds.index(seed), measure_curve(self.spec.objective[0], curve))]

    def _add(self, seed: int, reports: list[Report]) -> list[Report]:
        found = []
        for step, value in reports:
            values = self._values.setdefault(step, {})
            values[seed] = value
            if len(values) == len(self.spec.seeds):
                found.append((step, spread(list(values.values())).mean))
        return found


def _passed(
    line: _Line, stage: StageRecord, pruner: MedianPruner | HyperbandPruner | PatiencePruner
) -> Iterator[Report]:
    """Yields a report for every multiple of ``every`` up to a stage, and moves the line there."""
    start, val = line.ratio, line.val
    number = int(start / pruner.every + 1e-9) + 1
    while number * pruner.every <= stage.ratio + 1e-9:
        ratio = number * pruner.every
        line.go_to(ratio, val + (ratio - start) / (stage.ratio - start) * (stage.val - val))
        yield _step(ratio), line.area if isinstance(pruner, MedianPruner) else line.val
        number += 1
    if stage.ratio > line.ratio:
        line.go_to(stage.ratio, stage.val)


def _step(ratio: float) -> int:
    return round(1000 * ratio)
