"""The only map from an Optuna trial to a ``PruningConfig``.

A key of the space is a key of ``PruningConfig``, or ``target_ratio``: the largest of the ratios,
those above it being left out.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from comp.config import PruningConfig
from studies.domains import (
    TARGET_RATIO,
    ChoiceDomain,
    Domain,
    FixedDomain,
    FloatDomain,
    IntDomain,
    read_config,
)
from studies.errors import sentences

if TYPE_CHECKING:
    from optuna.trial import Trial

Space = Mapping[str, Domain]


def config_of(base: PruningConfig, values: Mapping[str, Any]) -> PruningConfig:
    """Puts config values over a base.

    Args:
        base: Where the other keys come from.
        values: ``PruningConfig`` keys and ``target_ratio``.

    Raises:
        ValueError: If the result is no valid config.
    """
    own = {key: value for key, value in values.items() if key != TARGET_RATIO}
    typed = read_config(own)
    config = dataclasses.replace(base, **{key: getattr(typed, key) for key in own})
    if TARGET_RATIO not in values:
        return config
    target = float(values[TARGET_RATIO])
    below = tuple(ratio for ratio in config.ratios if ratio < target)
    return dataclasses.replace(config, ratios=(*below, target))


def suggest(trial: "Trial", base: PruningConfig, space: Space) -> PruningConfig:
    """Asks Optuna for a value of every key; for an adopted trial it gives those of before."""
    return config_of(base, {key: _value(trial, key, domain) for key, domain in space.items()})


def _value(trial: "Trial", key: str, domain: Domain) -> Any:
    match domain:
        case IntDomain():
            return trial.suggest_int(
                key, domain.low, domain.high, step=domain.step, log=domain.log
            )
        case FloatDomain():
            return trial.suggest_float(key, domain.low, domain.high, log=domain.log)
        case ChoiceDomain():
            return domain.value_of(trial.suggest_categorical(key, domain.labels))
        case FixedDomain():
            return domain.value


def starting_point(base: PruningConfig, space: Space) -> dict[str, Any]:
    """Returns the Optuna parameters of trial 0: the base's values, moved into their domains."""
    return {
        key: _nearest_label(domain, _base_value(base, key))
        for key, domain in space.items()
        if not isinstance(domain, FixedDomain)
    }


def _base_value(base: PruningConfig, key: str) -> Any:
    return base.ratios[-1] if key == TARGET_RATIO else getattr(base, key)


def _nearest_label(domain: Domain, value: Any) -> Any:
    match domain:
        case IntDomain():
            clipped = min(max(domain.low if value is None else value, domain.low), domain.high)
            return domain.low + int((clipped - domain.low) // domain.step) * domain.step
        case FloatDomain():
            return min(max(domain.low if value is None else value, domain.low), domain.high)
        case ChoiceDomain():
            same = [x for x in domain.labels if _plain(domain.value_of(x)) == _plain(value)]
            return (same or domain.labels)[0]
    raise TypeError(f"a fixed domain has no labels, but got {domain!r}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_space(base: PruningConfig, space: Space, span: tuple[float, float]) -> None:
    """Tries the ends of every domain before any trial does.

    Args:
        base: The config of the keys that are not in the space.
        space: The domains by key.
        span: The ratios that the objective reads; every trial must reach the second one.

    Raises:
        ValueError: If a domain allows a value that no config takes, or a trial could not be
            judged by the objective.
    """
    targets = []
    for key, domain in space.items():
        for value in _ends(domain):
            try:
                config = config_of(base, {key: value})
            except ValueError as error:
                reason = "; ".join(sentences(error, {key: value}))
                raise ValueError(f"space.{key}: {reason}") from None
            targets += [config.ratios[-1]] if key in (TARGET_RATIO, "ratios") else []
    lowest = min(targets, default=base.ratios[-1])
    if lowest < span[1]:
        raise ValueError(
            f"the objective reads the curve up to ratio {span[1]:g}, but a trial may end at "
            f"{lowest:g}; raise the ratios or lower the objective's"
        )


def _ends(domain: Domain) -> list[Any]:
    match domain:
        case IntDomain() | FloatDomain():
            return [domain.low, domain.high]
        case ChoiceDomain():
            return [domain.value_of(label) for label in domain.labels]
        case FixedDomain():
            return [domain.value]
