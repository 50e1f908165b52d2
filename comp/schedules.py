"""From a config to the strategy that chooses modes."""

import math
from collections.abc import Sequence

from comp.config import PruningConfig
from comp.fixed_strategy import FixedStrategy
from comp.lookahead import LookaheadStrategy
from comp.modes import PruningMode
from comp.strategy import MultiModeStrategy, Strategy


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
