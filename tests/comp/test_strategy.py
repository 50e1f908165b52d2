"""Eq. 8 to 10, the sweep, exploration and greed, driven through ``choose`` and ``record``."""

import collections
import json
import math
from collections.abc import Callable

import pytest

from comp.fixed_strategy import FixedStrategy
from comp.lookahead import LookaheadStrategy
from comp.strategy import (
    MultiModeStrategy,
    exploration_probabilities,
    history_weight,
)

MODES = ["vision_params", "language_params", "cross_params", "vision_tokens", "language_tokens"]

Oracle = Callable[[str, int], float]


def drive(strategy: MultiModeStrategy, stages: int, oracle: Oracle) -> list[str]:
    """Runs stages whose measured cost is ``oracle(mode, stage)``; returns the modes."""
    sequence = []
    for stage in range(1, stages + 1):
        mode = strategy.choose()
        strategy.record(mode, oracle(mode, stage))
        sequence.append(mode)
    return sequence


def by_position(mode: str, stage: int) -> float:
    """The first mode is the cheapest, whatever the stage."""
    return float(MODES.index(mode))


@pytest.mark.equations("Eq. 10")
def test_history_weight_takes_the_papers_values() -> None:
    weights = [history_weight(interval) for interval in range(1, 8)]
    assert weights == pytest.approx([0.40, 0.32, 0.24, 0.16, 0.08, 0.0, 0.0])


@pytest.mark.equations("Eq. 10")
def test_history_weight_follows_the_formula() -> None:
    for history in (0.1, 0.7):
        for horizon in (1, 3, 8):
            for interval in range(1, 12):
                naive = history - history / horizon * (interval - 1)
                naive = naive if naive > 0 else 0.0
                assert history_weight(interval, history, horizon) == pytest.approx(naive)


@pytest.mark.equations("Eq. 9")
def test_exploration_probabilities_take_the_papers_values() -> None:
    probabilities = exploration_probabilities([1, 2, 3, 4, 5])
    assert probabilities == pytest.approx([0.1289, 0.1574, 0.1922, 0.2348, 0.2868], abs=5e-5)
    probabilities = exploration_probabilities([1, 1, 1, 1, 10])
    assert probabilities == pytest.approx([0.0995] * 4 + [0.602], abs=5e-5)


@pytest.mark.equations("Eq. 9")
def test_exploration_probabilities_are_a_softmax() -> None:
    intervals, temperature = [3, 1, 9, 4], 2.5
    naive = [math.exp(interval / temperature) for interval in intervals]
    probabilities = exploration_probabilities(intervals, temperature)
    assert probabilities == pytest.approx([value / sum(naive) for value in naive])


def test_long_idle_times_do_not_overflow() -> None:
    assert exploration_probabilities([1, 100_000], 1.0) == [0.0, 1.0]


def test_an_infinite_temperature_explores_uniformly() -> None:
    assert exploration_probabilities([1, 50], math.inf) == [0.5, 0.5]


@pytest.mark.equations("Eq. 10")
@pytest.mark.parametrize(("interval", "expected"), [(1, 1.40), (3, 1.24), (6, 1.00), (9, 1.00)])
def test_cost_remembers_less_the_longer_a_mode_was_idle(interval: int, expected: float) -> None:
    strategy = MultiModeStrategy(["a", "b"], exploration=0.0)
    drive(strategy, 2, lambda mode, stage: 2.0)
    while strategy.stage - strategy._last_run["a"] < interval - 1:
        strategy.record(strategy.choose(exclude=["a"]), 2.0)
    strategy.choose(exclude=["b"])
    strategy.record("a", 1.0)
    assert strategy.costs["a"] == pytest.approx(expected)


@pytest.mark.equations("Eq. 10")
def test_the_first_cost_of_a_mode_is_taken_as_it_is() -> None:
    strategy = MultiModeStrategy(MODES, seed=3)
    drive(strategy, 5, by_position)
    assert strategy.costs == {mode: by_position(mode, 0) for mode in MODES}


@pytest.mark.equations("Eq. 10")
def test_the_history_has_an_effect() -> None:
    remembering = MultiModeStrategy(["a"], history=0.4)
    forgetting = MultiModeStrategy(["a"], history=0.0)
    for strategy in (remembering, forgetting):
        drive(strategy, 2, lambda mode, stage: float(stage))
    assert remembering.costs["a"] == pytest.approx(0.4 * 1.0 + 0.6 * 2.0)
    assert forgetting.costs["a"] == 2.0


@pytest.mark.parametrize("seed", range(5))
def test_the_first_stages_cover_each_mode_once(seed: int) -> None:
    strategy = MultiModeStrategy(MODES, exploration=1.0, seed=seed)
    assert sorted(drive(strategy, 5, by_position)) == sorted(MODES)


def test_the_sweep_says_so() -> None:
    strategy = MultiModeStrategy(MODES, exploration=0.0)
    choices = []
    for _ in range(6):
        mode = strategy.choose()
        choices.append(strategy.choice)
        strategy.record(mode, 1.0)
    assert choices == ["sweep"] * 5 + ["greedy"]


def test_the_sweep_order_depends_on_the_seed() -> None:
    orders = {tuple(drive(MultiModeStrategy(MODES, seed=s), 5, by_position)) for s in range(20)}
    assert len(orders) > 5


def test_an_exhausted_mode_is_never_chosen_again() -> None:
    strategy = MultiModeStrategy(MODES, exploration=0.5, seed=1)
    drive(strategy, 7, by_position)
    strategy.exhaust("vision_params")
    assert "vision_params" not in drive(strategy, 200, by_position)
    assert "vision_params" not in strategy.live


def test_a_mode_exhausted_before_its_turn_leaves_the_sweep() -> None:
    strategy = MultiModeStrategy(MODES, seed=2)
    strategy.exhaust("cross_params")
    swept = drive(strategy, 4, by_position)
    assert sorted(swept) == sorted(set(MODES) - {"cross_params"})


def test_exhausting_the_open_mode_costs_no_stage() -> None:
    strategy = MultiModeStrategy(MODES)
    mode = strategy.choose()
    strategy.exhaust(mode)
    assert strategy.stage == 0
    assert strategy.choose() != mode


def test_withdrawing_leaves_the_costs_alone() -> None:
    strategy = MultiModeStrategy(MODES, exploration=0.0)
    drive(strategy, 5, by_position)
    strategy.choose()
    strategy.withdraw()
    assert strategy.stage == 5
    assert strategy.choose() == "vision_params"


def test_the_same_seed_gives_the_same_sequence() -> None:
    sequences = [drive(MultiModeStrategy(MODES, seed=7), 60, by_position) for _ in range(2)]
    assert sequences[0] == sequences[1]


def test_another_seed_gives_another_sequence() -> None:
    sequences = [drive(MultiModeStrategy(MODES, seed=s), 60, by_position) for s in (7, 8)]
    assert sequences[0] != sequences[1]


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5])
def test_the_exploration_rate_is_what_was_asked(rate: float) -> None:
    strategy = MultiModeStrategy(MODES, exploration=rate)
    drive(strategy, 5, by_position)
    explored = 0
    for _ in range(10_000):
        mode = strategy.choose()
        explored += strategy.choice == "explore"
        strategy.record(mode, by_position(mode, 0))
    assert explored / 10_000 == pytest.approx(rate, abs=0.02)


@pytest.mark.equations("Eq. 9")
def test_exploration_frequencies_follow_the_softmax() -> None:
    strategy = MultiModeStrategy(MODES, exploration=1.0, seed=11)
    drive(strategy, 5, by_position)
    last_run = dict(strategy._last_run)
    expected = exploration_probabilities([6 - last_run[mode] for mode in MODES])
    drawn: collections.Counter[str] = collections.Counter()
    for _ in range(10_000):
        drawn[strategy.choose()] += 1
        strategy.withdraw()
    frequencies = [drawn[mode] / 10_000 for mode in MODES]
    assert frequencies == pytest.approx(expected, abs=0.02)


def test_uniform_exploration_ignores_idle_time() -> None:
    strategy = MultiModeStrategy(MODES, exploration=1.0, temperature=math.inf)
    drive(strategy, 5, by_position)
    drawn: collections.Counter[str] = collections.Counter()
    for _ in range(10_000):
        drawn[strategy.choose()] += 1
        strategy.withdraw()
    assert [drawn[m] / 10_000 for m in MODES] == pytest.approx([0.2] * 5, abs=0.02)


@pytest.mark.equations("Eq. 8")
def test_greed_picks_the_mode_that_loses_least_per_flop() -> None:
    lost = {"a": 3.0, "b": 1.0, "c": 2.0}
    removed = {"a": 0.02, "b": 0.01, "c": 0.04}
    costs = {mode: lost[mode] / removed[mode] for mode in lost}  # 150, 100, 50
    strategy = MultiModeStrategy(list(costs), exploration=0.0)
    assert set(drive(strategy, 20, lambda mode, stage: costs[mode])[3:]) == {"c"}


def test_a_negative_cost_is_attractive() -> None:
    strategy = MultiModeStrategy(MODES, exploration=0.0)
    sequence = drive(strategy, 9, lambda mode, stage: -1.0 if mode == "cross_params" else 0.5)
    assert set(sequence[5:]) == {"cross_params"}


def test_ties_go_to_the_mode_that_was_idle_longest() -> None:
    strategy = MultiModeStrategy(MODES, exploration=0.0, seed=5)
    sequence = drive(strategy, 15, lambda mode, stage: 1.0)
    assert sequence[5:10] == sequence[:5]
    assert sequence[10:] == sequence[:5]


def changing(mode: str, stage: int) -> float:
    """``a`` is cheap until stage 20, ``b`` from then on."""
    return {"a": 1.0 if stage < 20 else 9.0, "b": 5.0 if stage < 20 else 0.5, "c": 6.0}[mode]


def test_exploration_notices_that_another_mode_has_become_cheap() -> None:
    sequence = drive(MultiModeStrategy(["a", "b", "c"], seed=0), 80, changing)
    assert collections.Counter(sequence[3:19]).most_common(1)[0][0] == "a"
    assert collections.Counter(sequence[40:]).most_common(1)[0][0] == "b"


def test_greed_alone_leaves_a_cheap_mode_unseen() -> None:
    def late(mode: str, stage: int) -> float:
        return 1.0 if mode == "a" else (5.0 if stage < 20 else 0.1)

    greedy = drive(MultiModeStrategy(["a", "b"], exploration=0.0), 80, late)
    full = drive(MultiModeStrategy(["a", "b"]), 80, late)
    assert set(greedy[2:]) == {"a"}
    assert full[40:].count("b") > full[40:].count("a")


@pytest.mark.parametrize("scale", [100.0, 1e-9])
def test_choices_do_not_depend_on_the_units_of_cost(scale: float) -> None:
    def cost(mode: str, stage: int) -> float:
        return math.sin(3 * MODES.index(mode) + 0.7 * stage)

    plain = drive(MultiModeStrategy(MODES, seed=4), 100, cost)
    scaled = drive(MultiModeStrategy(MODES, seed=4), 100, lambda m, s: scale * cost(m, s))
    assert plain == scaled


def test_a_restored_strategy_goes_on_as_if_uninterrupted() -> None:
    whole = drive(MultiModeStrategy(MODES, seed=9), 60, changing_cost)
    first = MultiModeStrategy(MODES, seed=9)
    start = drive(first, 23, changing_cost)
    second = MultiModeStrategy(MODES, seed=0)
    second.restore(json.loads(json.dumps(first.state())))
    assert start + drive_from(second, 24, 60) == whole


def changing_cost(mode: str, stage: int) -> float:
    return math.cos(MODES.index(mode) + 0.3 * stage)


def drive_from(strategy: MultiModeStrategy, first: int, last: int) -> list[str]:
    return drive(strategy, last - first + 1, lambda m, s: changing_cost(m, s + first - 1))


@pytest.mark.parametrize("modes", [[], ["a", "a"]])
def test_modes_must_be_distinct(modes: list[str]) -> None:
    with pytest.raises(ValueError, match="modes must be distinct and at least one"):
        MultiModeStrategy(modes)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("exploration", 1.2, r"in \[0, 1\], but got 1.2"),
        ("history", -0.1, r"in \[0, 1\], but got -0.1"),
        ("temperature", 0.0, "above 0, but got 0.0"),
        ("horizon", 0, "at least 1, but got 0"),
    ],
)
def test_numbers_out_of_bounds_are_refused(name: str, value: float, rule: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be {rule}"):
        MultiModeStrategy(MODES, **{name: value})


def test_only_one_stage_is_open_at_a_time() -> None:
    strategy = MultiModeStrategy(["a"])
    strategy.choose()
    with pytest.raises(RuntimeError, match=r"stage 1 \(a\) is open"):
        strategy.choose()


def test_nothing_is_chosen_when_all_modes_are_exhausted() -> None:
    strategy = MultiModeStrategy(["a"])
    strategy.exhaust("a")
    with pytest.raises(RuntimeError, match="every mode is exhausted"):
        strategy.choose()


def test_withdrawing_needs_an_open_stage() -> None:
    with pytest.raises(RuntimeError, match="no stage is open"):
        MultiModeStrategy(["a"]).withdraw()


def test_recording_needs_the_open_mode() -> None:
    strategy = MultiModeStrategy(["a", "b"])
    mode = strategy.choose()
    other = "b" if mode == "a" else "a"
    with pytest.raises(ValueError, match=f"stage 1 is open for '{mode}', but got '{other}'"):
        strategy.record(other, 1.0)


@pytest.mark.parametrize("cost", [math.nan, math.inf])
def test_a_cost_must_be_finite(cost: float) -> None:
    strategy = MultiModeStrategy(["a"])
    with pytest.raises(ValueError, match=f"cost of 'a' must be a finite number, but got {cost}"):
        strategy.record(strategy.choose(), cost)


def test_exhausting_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mode must be one of .*, but got 'c'"):
        MultiModeStrategy(["a", "b"]).exhaust("c")


def test_a_joint_schedule_prunes_everything_in_each_stage() -> None:
    strategy = FixedStrategy([["p", "q"], ["t"]])
    assert strategy.choose() == "p+q+t"
    strategy.exhaust("q")
    assert strategy.choose() == "p+t"
    assert strategy.choice == "fixed"
    assert strategy.costs == {}


def test_a_sequential_schedule_turns_when_told() -> None:
    strategy = FixedStrategy([["t"], ["p", "q"]], sequential=True)
    assert strategy.choose() == "t"
    strategy.advance()
    assert strategy.choose() == "p+q"
    strategy.advance()
    assert strategy.choose() == "p+q"


def test_a_sequential_schedule_goes_back_when_its_last_group_is_exhausted() -> None:
    strategy = FixedStrategy([["t"], ["p"]], sequential=True)
    strategy.advance()
    strategy.exhaust("p")
    assert strategy.choose() == "t"


def test_a_fixed_schedule_ends_when_all_is_exhausted() -> None:
    strategy = FixedStrategy([["p"]])
    strategy.exhaust("p")
    with pytest.raises(RuntimeError, match="every mode is exhausted"):
        strategy.choose()


def test_a_fixed_schedule_that_may_take_nothing_says_so() -> None:
    strategy = FixedStrategy([["p"], ["t"]])
    assert strategy.choose(exclude=["p"]) == "t"
    strategy.withdraw()
    with pytest.raises(RuntimeError, match="nothing left to choose"):
        strategy.choose(exclude=["p", "t"])


def test_a_fixed_schedule_needs_a_mode() -> None:
    with pytest.raises(ValueError, match="groups must name at least one mode"):
        FixedStrategy([[], []])


def test_a_restored_fixed_schedule_stands_where_it_stood() -> None:
    strategy = FixedStrategy([["t"], ["p", "q"]], sequential=True)
    strategy.choose()
    strategy.advance()
    strategy.exhaust("q")
    again = FixedStrategy([["t"], ["p", "q"]], sequential=True)
    again.restore(json.loads(json.dumps(strategy.state())))
    assert again.choose() == "p"
    assert again.stage == 2


def test_lookahead_takes_the_cheapest_of_what_is_offered() -> None:
    strategy = LookaheadStrategy(["a", "b", "c"])
    strategy.offer({"a": 3.0, "b": -1.0, "c": 0.5})
    assert strategy.choose() == "b"
    assert (strategy.choice, strategy.stage) == ("greedy", 1)
    strategy.record("b", 7.0)
    assert strategy.costs == {"a": 3.0, "b": -1.0, "c": 0.5}
    strategy.offer({"a": 3.0, "c": 4.0})
    assert strategy.choose() == "a"


def test_lookahead_goes_round_what_is_excluded_or_exhausted() -> None:
    strategy = LookaheadStrategy(["a", "b", "c"])
    strategy.offer({"a": 1.0, "b": 2.0, "c": 3.0})
    assert strategy.choose(exclude=["a"]) == "b"
    strategy.exhaust("b")
    assert strategy.stage == 0
    assert strategy.choose(exclude=["a"]) == "c"
    strategy.withdraw()
    assert (strategy.live, strategy.stage) == (["a", "c"], 0)
    with pytest.raises(RuntimeError, match="nothing left to choose"):
        strategy.choose(exclude=["a", "c"])


def test_lookahead_needs_a_mode() -> None:
    with pytest.raises(ValueError, match="modes must name at least one mode, but got none"):
        LookaheadStrategy([])


def test_a_restored_lookahead_stands_where_it_stood() -> None:
    strategy = LookaheadStrategy(["a", "b"])
    strategy.offer({"a": 1.0, "b": 2.0})
    strategy.record(strategy.choose(), 1.0)
    strategy.exhaust("b")
    again = LookaheadStrategy(["a", "b"])
    again.restore(json.loads(json.dumps(strategy.state())))
    assert (again.live, again.stage) == (["a"], 1)
