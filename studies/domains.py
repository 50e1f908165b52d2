"""The models that say which values of a config key a study may try.

A domain knows nothing of Optuna; :mod:`studies.space` maps it to proposals.
"""

import dataclasses
import math
import types
import typing
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    field_validator,
    model_validator,
)

from comp.config import PruningConfig
from comp.words import nearest


class Section(BaseModel):
    """A mapping of the spec: frozen, and an unknown key is named with the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            check_keys(values, list(cls.model_fields))
        return values


def check_keys(values: dict[str, Any], known: list[str]) -> None:
    """Raises a ``ValueError`` that names the first unknown key and the nearest known one."""
    for key in values:
        if key not in known:
            hint = nearest(str(key), known) or f"; the keys here are {', '.join(known)}"
            raise ValueError(f"unknown key {key!r}{hint}")


def _config_model() -> type[BaseModel]:
    """Builds the model that turns the scalars of YAML into ``PruningConfig``'s types."""
    hints = typing.get_type_hints(PruningConfig)
    fields: dict[str, Any] = {f.name: (hints[f.name], f.default) for f in CONFIG_FIELDS}
    return pydantic.create_model("PruningSection", __base__=Section, **fields)


TARGET_RATIO = "target_ratio"  # a key of `space` only: the largest of the config's ratios
PRUNE_SHARE = "prune_share"  # another: the share of a trial's steps that is spent on stages
STEP_BUDGET = "step_budget"  # another: all steps of a trial, stages and fine-tuning together
DERIVED_KEYS = (TARGET_RATIO, PRUNE_SHARE, STEP_BUDGET)
CONFIG_FIELDS = dataclasses.fields(PruningConfig)
CONFIG_KEYS = [field.name for field in CONFIG_FIELDS if field.name != "version"]
_CONFIG_MODEL = _config_model()
_CONFIG_HINTS = typing.get_type_hints(PruningConfig)


def read_config(values: Any) -> PruningConfig:
    """Turns the ``pruning`` section of a spec into a checked config.

    Raises:
        ValueError: If a key is unknown, a type is wrong or a value is out of bounds.
    """
    if isinstance(values, PruningConfig):
        return values
    if values is None:
        return PruningConfig()
    if not isinstance(values, dict):
        raise ValueError(f"pruning must be a mapping of config keys, but got {values!r}")
    check_keys(values, [*CONFIG_KEYS, "version"])
    _refuse_booleans(values)
    if isinstance(values.get("ratios"), (int, float)):
        values = {**values, "ratios": [values["ratios"]]}
    section = _CONFIG_MODEL.model_validate(values)
    return PruningConfig(**{name: getattr(section, name) for name in values})


def _refuse_booleans(values: dict[str, Any]) -> None:
    """Pydantic would take ``true`` for 1 where a number is asked for."""
    hints = _CONFIG_HINTS
    for key, value in values.items():
        takes = typing.get_args(hints[key]) if _is_union(hints[key]) else (hints[key],)
        if isinstance(value, bool) and bool not in takes:
            raise ValueError(f"{key} must not be true or false, but got {value}")


def _is_union(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union


Config = Annotated[
    PruningConfig, PlainValidator(read_config), PlainSerializer(PruningConfig.to_dict)
]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Scalar = str | bool | int | float | None


def _read_when(when: Any) -> dict[str, list[Scalar]] | None:
    if when is None:
        return None
    if not isinstance(when, dict) or not when:
        raise ValueError(
            f"when must be a mapping such as {{schedule: mps}} or {{schedule: [mps, cas]}}, but "
            f"got {when!r}"
        )
    return {
        str(key): list(values) if isinstance(values, (list, tuple)) else [values]
        for key, values in when.items()
    }


class _Domain(Section):
    """What all domains have.

    Attributes:
        when: By another key, which stands above in the space, the values of it with which this key
            is searched; otherwise the key has its starting value.
    """

    when: Annotated[dict[str, list[Scalar]] | None, PlainValidator(_read_when)] = None


class IntDomain(_Domain):
    """Whole numbers from ``low`` to ``high``, both included."""

    kind: Literal["int"]
    low: Annotated[int, Field(strict=True)]
    high: Annotated[int, Field(strict=True)]
    step: Annotated[int, Field(strict=True, ge=1)] = 1
    log: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_bounds(self.low, self.high, self.log)
        if self.log and self.step != 1:
            raise ValueError(f"step must be 1 with log: true, but got {self.step}")
        return self

    @property
    def grid(self) -> list[int]:
        """All values."""
        return list(range(self.low, self.high + 1, self.step))


class FloatDomain(_Domain):
    """Numbers from ``low`` to ``high``, on a logarithmic scale or in steps if asked."""

    kind: Literal["float"]
    low: Number
    high: Number
    step: Annotated[Number, Field(gt=0)] | None = None
    log: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_bounds(self.low, self.high, self.log)
        if self.log and self.step is not None:
            raise ValueError(f"step must be left out with log: true, but got {self.step:g}")
        if self.step is not None and not math.isclose(self.grid[-1], self.high):
            raise ValueError(
                f"high must be a whole number of steps above low, but got low {self.low:g}, high "
                f"{self.high:g} and step {self.step:g}"
            )
        return self

    @property
    def grid(self) -> list[float]:
        """All values.

        Raises:
            ValueError: If there is no ``step``.
        """
        if self.step is None:
            raise ValueError("step is missing, and a grid needs one for a float")
        number = math.floor((self.high - self.low) / self.step + 1e-9)
        return [float(f"{self.low + i * self.step:.12g}") for i in range(number + 1)]


class ChoiceDomain(_Domain):
    """A list of scalars, or names with a value of any kind behind each.

    Named choices are what a list-valued key needs (``ratios``, ``modes``): Optuna stores the name.
    """

    kind: Literal["categorical"]
    choices: list[Scalar] | dict[str, Any]

    @field_validator("choices", mode="before")
    @classmethod
    def _check(cls, choices: Any) -> Any:
        if not isinstance(choices, (list, dict)) or not choices:
            raise ValueError(
                f"choices must be a list of scalars or a mapping of names, but got {choices!r}"
            )
        for choice in choices if isinstance(choices, list) else []:
            if isinstance(choice, (list, dict)):
                raise ValueError(
                    f"a choice must be a scalar, but got {choice!r}; give it a name: "
                    "'choices: {short: [0.5, 0.8]}'"
                )
        return choices

    @property
    def labels(self) -> list[Scalar]:
        """What Optuna chooses among."""
        return list(self.choices)

    def value_of(self, label: Scalar) -> Any:
        """Returns the config value behind a label."""
        return self.choices[str(label)] if isinstance(self.choices, dict) else label


class FixedDomain(_Domain):
    """One value, which Optuna does not see."""

    kind: Literal["fixed"]
    value: Any


Domain = Annotated[
    IntDomain | FloatDomain | ChoiceDomain | FixedDomain, Field(discriminator="kind")
]


def check_bounds(low: float, high: float, log: bool) -> None:
    """Raises a ``ValueError`` if a range is empty or has no logarithm."""
    if low > high:
        raise ValueError(f"low must not be above high, but got low {low:g} and high {high:g}")
    if log and low <= 0:
        raise ValueError(f"low must be above 0 with log: true, but got {low:g}")
