"""What a study looks for: measures of a trial's curve, to be bettered or to be kept in bounds.

A measure is written ``{val_at: 0.8}``: one key, and the ratio where the curve is read, ``end`` for
the largest ratio that the trial was asked for. None of them reads the test split. What they are
computed from is in :mod:`studies.objectives`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator

from comp.words import nearest

END = "end"
AREA = "area"


@dataclass(frozen=True)
class _Kind:
    """What there is to know of a kind of measure: its name, its unit and which way is better."""

    name: str
    unit: str
    maximize: bool


KINDS = {
    "val_at": _Kind("validation", "", maximize=True),
    AREA: _Kind("mean validation", "", maximize=True),
    "drop_at": _Kind("validation points below dense", "", maximize=False),
    "gflops_at": _Kind("GFLOPs", "G", maximize=False),
    "params_at": _Kind("million parameters", "M", maximize=False),
    "latency_at": _Kind("latency", "ms", maximize=False),
    "speed_up_at": _Kind("speed-up", "x", maximize=True),
}


def check_ratio(name: str, ratio: float) -> None:
    """Raises a ``ValueError`` if a ratio is outside [0, 1), with the hint for percentages."""
    if not 0.0 <= ratio < 1.0:
        hint = f"; pass {ratio / 100:g} for {ratio:g} %" if 1 < ratio < 100 else ""
        raise ValueError(f"{name} must be in [0, 1), but got {ratio:g}{hint}")


@dataclass(frozen=True)
class Measure:
    """One number of a trial's validation curve.

    Attributes:
        kind: A key of ``KINDS``.
        at: Where the curve is read: one ratio or ``"end"``, two ratios for an area.
    """

    kind: str
    at: float | str | tuple[float, float]

    @property
    def maximize(self) -> bool:
        """Whether more is better."""
        return KINDS[self.kind].maximize

    @property
    def span(self) -> tuple[float, float]:
        """The ratios that a curve must cover; both 0 where its end is read, wherever that is."""
        if isinstance(self.at, tuple):
            return self.at
        return (0.0, 0.0) if isinstance(self.at, str) else (self.at, self.at)

    @property
    def name(self) -> str:
        """What a person calls it, for example ``"validation at ratio 0.8"``."""
        kind = KINDS[self.kind]
        if isinstance(self.at, tuple):
            return f"{kind.name} between ratios {self.at[0]:g} and {self.at[1]:g}"
        place = "the largest ratio" if isinstance(self.at, str) else f"ratio {self.at:g}"
        return f"{kind.name} at {place}"

    @property
    def label(self) -> str:
        """The same for the head of a narrow column, for example ``"val_at 0.8"``."""
        place = "-".join(f"{r:g}" for r in self.at) if isinstance(self.at, tuple) else self.at
        return f"{self.kind} {place if isinstance(place, str) else format(place, 'g')}"

    def to_spec(self) -> dict[str, Any]:
        """Returns what a person writes."""
        return {self.kind: list(self.at) if isinstance(self.at, tuple) else self.at}


@dataclass(frozen=True)
class Bound:
    """A measure that must stay on one side of a limit.

    Attributes:
        measure: What is bounded.
        limit: The last value that is allowed.
        is_upper: Whether larger values than the limit are forbidden, else smaller ones are.
    """

    measure: Measure
    limit: float
    is_upper: bool

    @property
    def name(self) -> str:
        """What a person calls it, for example ``"drop_at 0.8 at most 2"``."""
        return f"{self.measure.label} at {'most' if self.is_upper else 'least'} {self.limit:g}"

    def excess(self, value: float) -> float:
        """Returns by how much a value breaks the limit; 0 or less if it keeps it."""
        return value - self.limit if self.is_upper else self.limit - value

    def to_spec(self) -> dict[str, Any]:
        """Returns what a person writes."""
        return {**self.measure.to_spec(), "at_most" if self.is_upper else "at_least": self.limit}


def _read_measures(values: Any) -> tuple[Measure, ...]:
    listed = values if isinstance(values, (list, tuple)) else [values]
    if not listed:
        raise ValueError("objective must name at least one measure, but got []")
    found = tuple(read_measure(one) for one in listed)
    if len(set(found)) != len(found):
        raise ValueError(f"objective must not name a measure twice, but got {values!r}")
    return found


def read_measure(values: Any) -> Measure:
    """Turns ``{val_at: 0.8}`` into a measure.

    Raises:
        ValueError: If it is anything else.
    """
    if isinstance(values, Measure):
        return values
    if not isinstance(values, Mapping) or len(values) != 1:
        raise ValueError(
            "objective must be {val_at: RATIO}, {area: [LOW, HIGH]} or another of "
            f"{', '.join(KINDS)}, one key each, but got {values!r}; the test split is never the "
            "objective"
        )
    ((kind, at),) = values.items()
    if kind not in KINDS:
        raise ValueError(
            f"objective must be one of {', '.join(KINDS)}, but got {kind!r}"
            f"{nearest(str(kind), list(KINDS))}; the test split is never the objective"
        )
    return Measure(kind, _read_area(at) if kind == AREA else _read_place(kind, at))


def _read_place(kind: str, at: Any) -> float | str:
    if at == END:
        return END
    if isinstance(at, bool) or not isinstance(at, (int, float)):
        raise ValueError(f"{kind} must be a ratio or {END!r}, but got {at!r}")
    check_ratio(kind, at)
    return float(at)


def _read_area(at: Any) -> tuple[float, float]:
    is_pair = isinstance(at, (list, tuple)) and len(at) == 2
    if not is_pair or any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in at):
        raise ValueError(f"area must be two ascending ratios, but got {at!r}")
    for ratio in at:
        check_ratio(AREA, ratio)
    if not at[0] < at[1]:
        raise ValueError(f"area must be two ascending ratios, but got {list(at)}")
    return (float(at[0]), float(at[1]))


def _read_bound(values: Any) -> Bound:
    if isinstance(values, Bound):
        return values
    limits = [
        key for key in ("at_most", "at_least") if isinstance(values, Mapping) and key in values
    ]
    if len(limits) != 1:
        raise ValueError(
            "a constraint must be a measure with at_most or at_least, for example "
            f"{{drop_at: 0.8, at_most: 2}}, but got {values!r}"
        )
    limit = values[limits[0]]
    if isinstance(limit, bool) or not isinstance(limit, (int, float)):
        raise ValueError(f"{limits[0]} must be a number, but got {limit!r}")
    measure = read_measure({key: value for key, value in values.items() if key != limits[0]})
    return Bound(measure, float(limit), is_upper=limits[0] == "at_most")


def _show_measures(measures: tuple[Measure, ...]) -> Any:
    shown = [measure.to_spec() for measure in measures]
    return shown[0] if len(shown) == 1 else shown


Objectives = Annotated[
    tuple[Measure, ...], PlainValidator(_read_measures), PlainSerializer(_show_measures)
]
Constraint = Annotated[Bound, PlainValidator(_read_bound), PlainSerializer(Bound.to_spec)]


def objective_name(measures: tuple[Measure, ...]) -> str:
    """Returns what a person calls the objectives of a study."""
    return ", ".join(measure.name for measure in measures)
