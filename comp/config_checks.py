"""What a ``PruningConfig`` is held to: choices, bounds, and options that need each other."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_args

from comp.methods import METHODS, Schedule, check_site
from comp.modes import PruningMode
from comp.words import nearest

if TYPE_CHECKING:
    from comp.config import PruningConfig

CHOOSING = ("mps", "cas", "cas_re")
"""Schedules that go by a smoothed cost of every mode."""


def tuple_of_ratios(ratios: Any) -> tuple[float, ...]:
    """Returns ratios as a tuple.

    Raises:
        ValueError: If they are no list of numbers.
    """
    if not isinstance(ratios, list | tuple) or not all(
        isinstance(ratio, int | float) and not isinstance(ratio, bool) for ratio in ratios
    ):
        raise ValueError(f"ratios must be a list of numbers in (0, 1), but got {ratios!r}")
    return tuple(ratios)


def check_config(config: "PruningConfig") -> None:
    """Checks a config in full.

    Raises:
        ValueError: If a value is out of bounds, or two do not go together.
    """
    _check_ratios(config.ratios)
    _check_choices(config)
    for name, low, high in _BOUNDS:
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name} must be in [{low}, {high}], but got {value}")
    check_site(config.switches.unit, config.mask_site)
    _check_search(config)
    _check_costs(config)
    _check_regrow(config)
    _check_distillation(config)
    if config.batch_size % config.accumulate:
        raise ValueError(
            f"accumulate must divide batch_size ({config.batch_size}), but got {config.accumulate}"
        )


def _check_ratios(ratios: tuple[float, ...]) -> None:
    if not ratios:
        raise ValueError("ratios must name at least one ratio in (0, 1), but got ()")
    for ratio in ratios:
        if not 0.0 < ratio < 1.0:
            hint = f"; pass {ratio / 100:g} for {ratio:g} %" if 1 < ratio < 100 else ""
            raise ValueError(f"ratios must lie in (0, 1), but got {ratio}{hint}")
    if list(ratios) != sorted(set(ratios)):
        raise ValueError(f"ratios must ascend without repeats, but got {ratios}")


def _check_choices(config: "PruningConfig") -> None:
    if config.method not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}, but got {config.method!r}"
            + nearest(config.method, list(METHODS))
        )
    for name, choices in _CHOICES.items():
        value = getattr(config, name)
        if value not in choices:
            shown = ", ".join(str(choice) for choice in choices if choice is not None)
            raise ValueError(f"{name} must be one of {shown}, but got {value!r}")
    for field in fields(config):
        value = getattr(config, field.name)
        is_open = value is None and field.type == bool | None
        if field.type in (bool, bool | None) and not (isinstance(value, bool) or is_open):
            raise ValueError(f"{field.name} must be true or false, but got {value!r}")
    known = [mode.value for mode in PruningMode]
    for mode in config.modes or ():
        if mode not in known:
            raise ValueError(
                f"modes must be among {', '.join(known)}, but got {mode!r}" + nearest(mode, known)
            )


def _check_search(config: "PruningConfig") -> None:
    switches = config.switches
    if switches.schedule != "sine":
        return
    if switches.tokens or switches.parameter_score != "gradient":
        raise ValueError(
            "schedule 'sine' is UPop's search by gradients, which drops no tokens, but got "
            f"it with method {config.method!r} and parameter_score "
            f"{switches.parameter_score!r}; use method 'upop_sine'"
        )
    if len(config.ratios) > 1:
        raise ValueError(
            f"schedule 'sine' searches for one ratio, but ratios is {config.ratios}; "
            "start a run for each"
        )
    for name, default in (("rank_by", "score"), ("last_quantum", 1.0), ("steps_by", "stage")):
        if (value := getattr(config, name)) not in (None, default):
            raise ValueError(
                f"{name} {value!r} is for stages that take a quantum from a "
                f"ranking, but schedule 'sine' selects by a curve of its own; leave {name} out"
            )


def _check_costs(config: "PruningConfig") -> None:
    """Refuses what is about the costs of modes where a schedule asks for none."""
    schedule, method = config.switches.schedule, config.method
    has = f"but method {method!r} has {schedule!r}"
    if config.init != "sweep" and schedule not in CHOOSING:
        raise ValueError(
            f"init {config.init!r} gives first costs to the schedules mps, cas and cas_re, {has}; "
            "use 'sweep'"
        )
    if config.refresh_after is not None and schedule not in CHOOSING:
        raise ValueError(
            f"refresh_after {config.refresh_after} is for the costs of the schedules mps, cas and "
            f"cas_re, {has}; leave it out"
        )
    if config.fade_exploration and schedule not in ("mps", "cas_re"):
        raise ValueError(
            f"fade_exploration is for the schedules mps and cas_re, which explore, {has}; "
            "leave it out"
        )
    if config.one_ranking and schedule not in (*CHOOSING, "lookahead"):
        raise ValueError(
            f"one_ranking is for the schedules that choose a mode, {has}; leave it out"
        )
    if config.switches.cost_against != "before" and schedule not in (*CHOOSING, "lookahead"):
        raise ValueError(
            f"cost_against {config.switches.cost_against!r} is for the schedules that choose a "
            f"mode by its cost, {has}; use 'before'"
        )
    if config.history_by not in (None, "stage") and schedule not in CHOOSING:
        raise ValueError(
            f"history_by {config.history_by!r} is for the costs of the schedules mps, cas and "
            f"cas_re, {has}; leave it out"
        )
    if config.rank_by != "score" and not config.switches.parameters:
        raise ValueError(
            f"rank_by {config.rank_by!r} is about units, but method {method!r} prunes tokens "
            "alone; leave it out"
        )


def _check_regrow(config: "PruningConfig") -> None:
    if config.regrow and config.shrink != "end":
        raise ValueError(
            f"regrow brings masked units back, but shrink {config.shrink!r} removes them after "
            "their stage; use shrink 'end'"
        )
    if config.regrow and config.switches.schedule == "sine":
        raise ValueError(
            "regrow is for stages of their own, but schedule 'sine' chooses among all units "
            "at every stage anyway; leave regrow out"
        )


def _check_distillation(config: "PruningConfig") -> None:
    if config.distill_stages and not config.distillation:
        raise ValueError(
            "distill_stages lets stages learn from the dense model, too, but distillation is 0; "
            "give it a weight, such as 1.0"
        )


_CHOICES: dict[str, tuple[Any, ...]] = {
    "schedule": (None, *get_args(Schedule)),
    "parameter_score": (None, "wanda", "gradient"),
    "token_score": (None, "attention", "madtp"),
    "token_threshold": (None, "relative", "absolute"),
    "head_reduce": (None, "max", "mean"),
    "unit": (None, "head", "head_dim"),
    "init": ("sweep", "probe", "rehearsal"),
    "rank_norm": (None, "kind", "layer"),
    "rank_by": ("score", "score_per_flop"),
    "history_by": (None, "stage", "quantum"),
    "steps_by": (None, "stage", "quantum"),
    "mask_site": ("qkv", "context"),
    "merge": ("auto", "summary", "drop"),
    "val_metric": ("metric", "neg_loss"),
    "cost_against": (None, "before", "control"),
    "cost": ("macs", "params", "latency"),
    "shrink": ("stage", "end"),
    "version": (1,),
}

_BOUNDS: tuple[tuple[str, float, float], ...] = (
    ("num_stages", 1, 10_000),
    ("steps_per_stage", 1, 10_000_000),
    ("exploration", 0.0, 1.0),
    ("temperature", 1e-6, 1e6),
    ("history", 0.0, 1.0),
    ("horizon", 1, 10_000),
    ("refresh_after", 1, 10_000),
    ("lookahead_steps", 0, 1_000_000),
    ("stage_quantum", 1e-6, 1.0),
    ("last_quantum", 0.01, 1.0),
    ("quantum_cap", 1e-6, 1.0),
    ("min_quantum", 0.0, 0.1),
    ("tolerance", 0.0, 0.1),
    ("max_stages", 1, 1_000_000),
    ("decay_share", 0.0, 1.0),
    ("min_heads", 1, 1024),
    ("min_channels", 1, 1_000_000),
    ("min_vision_tokens", 1, 100_000),
    ("min_text_tokens", 1, 100_000),
    ("learning_rate", 0.0, 10.0),
    ("weight_decay", 0.0, 10.0),
    ("batch_size", 1, 1_000_000),
    ("accumulate", 1, 1_000_000),
    ("drop_path", 0.0, 0.9),
    ("max_grad_norm", 1e-9, 1e9),
    ("fine_tune_steps", 0, 100_000_000),
    ("fine_tune_checks", 1, 1_000),
    ("fine_tune_learning_rate", 0.0, 10.0),
    ("distillation", 0.0, 1_000.0),
    ("distillation_temperature", 0.1, 100.0),
    ("eval_samples", 1, 100_000_000),
    ("test_samples", 1, 100_000_000),
    ("eval_batch_size", 1, 1_000_000),
    ("calibration_samples", 1, 100_000_000),
    ("probe_samples", 1, 100_000_000),
    ("seed", 0, 2**32 - 1),
)
