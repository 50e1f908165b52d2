"""The map from what Optuna chose to a ``PruningConfig``, and back.

A key of the space is a key of ``PruningConfig``, or one of three that stand for several:
``target_ratio`` is the largest of the ratios, those above it being left out; ``prune_share``
splits the steps of a trial, ``step_budget`` of them if that is there, between stages and
fine-tuning.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from comp.config import PruningConfig
from comp.words import nearest
from studies.domains import (
    DERIVED_KEYS,
    PRUNE_SHARE,
    STEP_BUDGET,
    TARGET_RATIO,
    ChoiceDomain,
    Domain,
    FixedDomain,
    FloatDomain,
    IntDomain,
    read_config,
)
from studies.errors import sentences
from studies.matrix import CELL

if TYPE_CHECKING:
    from optuna.trial import Trial

Space = Mapping[str, Domain]


def config_of(base: PruningConfig, values: Mapping[str, Any]) -> PruningConfig:
    """Puts config values over a base.

    Args:
        base: Where the other keys come from.
        values: ``PruningConfig`` keys and ``DERIVED_KEYS``.

    Raises:
        ValueError: If the result is no valid config.
    """
    own = {k: value for k, value in values.items() if k not in (*DERIVED_KEYS, CELL)}
    typed = read_config(own)
    config = dataclasses.replace(base, **{key: getattr(typed, key) for key in own})
    if TARGET_RATIO in values:
        target = float(values[TARGET_RATIO])
        below = tuple(ratio for ratio in config.ratios if ratio < target)
        config = dataclasses.replace(config, ratios=(*below, target))
    if PRUNE_SHARE in values:
        total = values.get(STEP_BUDGET, total_steps(base))
        return split_steps(config, total, float(values[PRUNE_SHARE]))
    return config


def total_steps(config: PruningConfig) -> int:
    """Returns the optimizer steps that a config plans, all stages and fine-tunings together."""
    return config.num_stages * config.steps_per_stage + len(config.ratios) * config.fine_tune_steps


def split_steps(config: PruningConfig, total: int, share: float) -> PruningConfig:
    """Spends a share of a budget on the planned stages and the rest on the fine-tunings.

    Args:
        config: Says how many stages and ratios there are.
        total: Optimizer steps, at least 1.
        share: In (0, 1].

    Raises:
        ValueError: If one of them is out of bounds.
    """
    if not 0 < share <= 1:
        raise ValueError(f"{PRUNE_SHARE} must be in (0, 1], but got {share:g}")
    if total < 1:
        raise ValueError(f"{STEP_BUDGET} must be at least 1, but got {total}")
    steps = max(1, round(share * total / config.num_stages))
    left = max(0, total - steps * config.num_stages)
    return dataclasses.replace(
        config, steps_per_stage=steps, fine_tune_steps=round(left / len(config.ratios))
    )


def suggest(trial: "Trial", base: PruningConfig, space: Space) -> PruningConfig:
    """Asks Optuna for a value of every active key; an adopted trial gives those of before.

    Raises:
        ValueError: If what it chose is no valid config.
    """
    labels: dict[str, Any] = {}
    for key, domain in space.items():
        if is_active(domain, labels):
            labels[key] = _ask(trial, key, domain)
    return config_of(base, values_of(space, labels))


def _ask(trial: "Trial", key: str, domain: Domain) -> Any:
    match domain:
        case IntDomain():
            return trial.suggest_int(
                key, domain.low, domain.high, step=domain.step, log=domain.log
            )
        case FloatDomain():
            return trial.suggest_float(
                key, domain.low, domain.high, step=domain.step, log=domain.log
            )
        case ChoiceDomain():
            return trial.suggest_categorical(key, domain.labels)
        case FixedDomain():
            return domain.value


def is_active(domain: Domain, labels: Mapping[str, Any]) -> bool:
    """Tells whether a key is searched, given the labels of the keys above it."""
    conditions = (domain.when or {}).items()
    return all(key in labels and labels[key] in allowed for key, allowed in conditions)


def values_of(space: Space, labels: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config values behind labels."""
    found = {}
    for key, label in labels.items():
        domain = space[key]
        found[key] = domain.value_of(label) if isinstance(domain, ChoiceDomain) else label
    return found


def starting_point(base: PruningConfig, space: Space) -> dict[str, Any]:
    """Returns the Optuna parameters of trial 0: the base's values, moved into their domains."""
    labels: dict[str, Any] = {}
    for key, domain in space.items():
        if is_active(domain, labels):
            value = base_value(base, key)
            labels[key] = _nearest_label(domain, value)
    return {k: v for k, v in labels.items() if not isinstance(space[k], FixedDomain)}


def base_value(base: PruningConfig, key: str) -> Any:
    """Returns what a config has for a key of the space, also where it says so indirectly."""
    match key:
        case "cell":
            return None  # so the first one
        case "target_ratio":
            return base.ratios[-1]
        case "step_budget":
            return total_steps(base)
        case "prune_share":
            return base.num_stages * base.steps_per_stage / total_steps(base)
        case "stage_quantum":
            return base.quantum
        case "fine_tune_learning_rate" if base.fine_tune_learning_rate is None:
            return base.learning_rate
        case "max_stages" if base.max_stages is None:
            return 3 * base.num_stages
    value = getattr(base, key)
    return getattr(base.switches, key, None) if value is None else value  # the method's own


def _nearest_label(domain: Domain, value: Any) -> Any:
    match domain:
        case IntDomain() | FloatDomain():
            clipped = min(max(domain.low if value is None else value, domain.low), domain.high)
            if domain.step is None or (isinstance(domain, IntDomain) and domain.step == 1):
                return clipped
            return max(label for label in domain.grid if label <= clipped + 1e-9 * abs(clipped))
        case ChoiceDomain():
            same = [x for x in domain.labels if _plain(domain.value_of(x)) == _plain(value)]
            return (same or domain.labels)[0]
        case FixedDomain():
            return domain.value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def label_of(domain: Domain, value: Any) -> Any:
    """Returns what Optuna would have to choose to give a config value.

    Raises:
        ValueError: If the domain does not have it.
    """
    label = _nearest_label(domain, value)
    given = domain.value_of(label) if isinstance(domain, ChoiceDomain) else label
    if _plain(given) != _plain(value) and not is_close(given, value):
        raise ValueError(f"{value!r} is not in the domain, whose nearest value is {given!r}")
    return label


def is_close(one: Any, other: Any) -> bool:
    """Tells whether two numbers are equal but for rounding; anything else is not."""
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (one, other))
    return bool(numbers and abs(one - other) <= 1e-9 * max(abs(one), abs(other)))


def check_labels(space: Space, labels: Mapping[str, Any]) -> dict[str, Any]:
    """Checks values that a person wants tried, and returns the parameters that Optuna is given.

    Args:
        space: The domains by key.
        labels: For choices with names the names, for the others the values.

    Raises:
        ValueError: If a key is not searched or a value is outside its domain.
    """
    known = [key for key, domain in space.items() if not isinstance(domain, FixedDomain)]
    found = {}
    for key, label in labels.items():
        if key not in known:
            hint = nearest(str(key), known) or f"; the keys are {', '.join(known)}"
            raise ValueError(f"{key!r} is not searched by this study{hint}")
        domain = space[key]
        try:
            if isinstance(domain, ChoiceDomain):
                label = label if label in domain.labels else label_of(domain, label)
            elif isinstance(label, bool) or not isinstance(label, (int, float)):
                raise ValueError(f"{label!r} is not a number")
            else:
                label = label_of(domain, label)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        found[key] = label
    return found


def check_space(
    base: PruningConfig, space: Space, highest: float, *, together: bool = True
) -> None:
    """Tries the ends of every domain, and those of every two together, before any trial does.

    Args:
        base: The config of the keys that are not in the space.
        space: The domains by key.
        highest: The highest ratio that the objective reads; every trial must reach it.
        together: Whether any two of them may meet in a trial.

    Raises:
        ValueError: If a domain allows a value that no config takes, a condition can never hold,
            or a trial could not be judged by the objective.
    """
    _check_conditions(space)
    _check_split(space)
    share = {PRUNE_SHARE: base_value(base, PRUNE_SHARE)} if STEP_BUDGET in space else {}
    ends = [(key, value) for key, domain in space.items() for value in _ends(domain)]
    targets = []
    pairs = itertools.combinations(ends, 2) if together else ()
    for pair in [*((end, end) for end in ends), *pairs]:
        values = share | dict(pair)
        config = _checked_config(base, values, f"space.{pair[-1][0]}")
        targets += [config.ratios[-1]] if values.keys() & {TARGET_RATIO, "ratios"} else []
    lowest = min(targets, default=base.ratios[-1])
    if lowest < highest:
        raise ValueError(
            f"the objective reads the curve up to ratio {highest:g}, but a trial may end at "
            f"{lowest:g}; raise the ratios or lower the objective's"
        )


def check_setting(base: PruningConfig, space: Space, labels: Mapping[str, Any], name: str) -> None:
    """Makes the config of a setting that will be tried as it is listed.

    Args:
        base: The config of the keys that it leaves out.
        space: The domains by key.
        labels: What ``check_labels`` returned.
        name: What to call it in an error.

    Raises:
        ValueError: If it is no valid config.
    """
    _checked_config(base, values_of(space, labels), name)


def _checked_config(base: PruningConfig, values: Mapping[str, Any], name: str) -> PruningConfig:
    try:
        return config_of(base, values)
    except ValueError as error:
        raise ValueError(f"{name}: {'; '.join(sentences(error, values))}") from None


def _check_conditions(space: Space) -> None:
    above: list[str] = []
    for key, domain in space.items():
        for other, allowed in (domain.when or {}).items():
            if other not in above:
                hint = nearest(other, above)
                raise ValueError(
                    f"space.{key}: when names {other!r}, which must be a key above it in the "
                    f"space{hint}"
                )
            labels = _labels(space[other])
            wrong = [value for value in allowed if labels is None or value not in labels]
            if wrong:
                shown = "a float" if labels is None else ", ".join(map(str, labels))
                raise ValueError(
                    f"space.{key}: when asks for {other} = {wrong[0]!r}, but that is {shown}"
                    + (nearest(str(wrong[0]), [str(x) for x in labels]) if labels else "")
                )
        above.append(key)


def _labels(domain: Domain) -> list[Any] | None:
    match domain:
        case IntDomain():
            return list(domain.grid)
        case ChoiceDomain():
            return list(domain.labels)
        case FixedDomain():
            return [domain.value]
        case FloatDomain():
            return None if domain.step is None else list(domain.grid)


def _check_split(space: Space) -> None:
    if STEP_BUDGET in space and PRUNE_SHARE not in space:
        raise ValueError(f"space.{STEP_BUDGET} needs {PRUNE_SHARE} beside it, to split the steps")
    for key in ("steps_per_stage", "fine_tune_steps"):
        if PRUNE_SHARE in space and key in space:
            raise ValueError(
                f"space.{key} must be left out beside {PRUNE_SHARE}, which decides it"
            )


def _ends(domain: Domain) -> list[Any]:
    match domain:
        case IntDomain() | FloatDomain():
            return [domain.low, domain.high]
        case ChoiceDomain():
            return [domain.value_of(label) for label in domain.labels]
        case FixedDomain():
            return [domain.value]


def grid_of(space: Space) -> dict[str, list[Any]]:
    """Returns the values of every searched key, for a grid.

    Raises:
        ValueError: If a key has a condition, or is a float without steps.
    """
    found: dict[str, list[Any]] = {}
    for key, domain in space.items():
        if domain.when is not None:
            raise ValueError(
                f"space.{key}: a grid has no conditional keys; leave 'when' out or take another "
                "sampler"
            )
        try:
            if isinstance(domain, (IntDomain, FloatDomain)):
                found[key] = list(domain.grid)
            elif isinstance(domain, ChoiceDomain):
                found[key] = list(domain.labels)
        except ValueError as error:
            raise ValueError(f"space.{key}: {error}") from None
    return found
