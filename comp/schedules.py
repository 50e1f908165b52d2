"""From a config to the modes of a run and the strategy that chooses among them."""

import math
from collections.abc import Sequence

from comp.config import PruningConfig
from comp.fixed_strategy import FixedStrategy
from comp.lookahead import LookaheadStrategy
from comp.modes import PruningMode
from comp.strategy import MultiModeStrategy, Strategy


def modes_of_run(
    config: PruningConfig, have: Sequence[PruningMode], model: str
) -> list[PruningMode]:
    """Returns the modes that a run prunes: the model's that the method and the config allow.

    Args:
        config: Names the method and, if it restricts them, ``modes``.
        have: The model's modes.
        model: What an error calls the model.

    Raises:
        ValueError: If the config names a mode that is not there, or none is left.
    """
    for name in config.modes or ():
        if name not in have:
            raise ValueError(
                f"modes names {name!r}, which {model} does not have; it has {', '.join(have)}"
            )
    switches = config.switches
    wanted = [
        mode
        for mode in have
        if (switches.tokens if mode.is_tokens else switches.parameters)
        and (config.modes is None or mode.value in config.modes)
    ]
    if not wanted:
        raise ValueError(
            f"modes leaves nothing that method {config.method!r} prunes; "
            f"the model has {', '.join(have)}"
        )
    return wanted


def make_strategy(config: PruningConfig, modes: Sequence[PruningMode]) -> Strategy:
    """Builds the schedule a config asks for over the modes a model has.

    Args:
        config: Names the schedule and its parameters.
        modes: The model's modes, already restricted to what the method prunes.
    """
    schedule = config.switches.schedule
    tokens = [mode.value for mode in modes if mode.is_tokens]
    parameters = [mode.value for mode in modes if not mode.is_tokens]
    names = [mode.value for mode in modes]
    if config.one_ranking and parameters:
        names = ["+".join(parameters), *tokens]
    if schedule in ("mps", "cas", "cas_re"):
        return MultiModeStrategy(
            names,
            exploration=0.0 if schedule == "cas" else config.exploration,
            temperature=config.temperature if schedule == "mps" else math.inf,
            history=config.history if schedule == "mps" else 0.0,
            horizon=config.horizon,
            seed=config.seed,
        )
    if schedule == "lookahead":
        return LookaheadStrategy(names)
    groups = [parameters, tokens] if schedule == "params_first" else [tokens, parameters]
    return FixedStrategy(groups, sequential=schedule != "joint")
