"""Options beyond the paper: fading exploration, refreshed costs, smaller last quanta, prices."""

import copy
import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch

from comp.config import PruningConfig
from comp.lookahead import fork, trial_cost
from comp.masks import UnitChoice, rank_scores
from comp.methods import METHODS
from comp.models import attach
from comp.modes import PruningMode
from comp.opening import open_stage, trials_before, way_left
from comp.pruner import Pruner
from comp.raising import Raise, shrinking_quantum, steps_of
from comp.results import CurvePoint, StageRecord
from comp.stages import StageLoop
from comp.strategy import MultiModeStrategy, history_weight
from tests.comp.test_distillation import CONFIG, dense_point
from tests.tiny import FAMILIES, TinyTask

NLVR = FAMILIES["blip-nlvr"]
TASK = TinyTask(NLVR)
RATIO = 0.2
MODES = ["a", "b", "c"]


def pruner_of(**values: Any) -> Pruner:
    own = {"ratios": (RATIO,), "stage_quantum": 0.02, "distillation": 0.0, **values}
    config = dataclasses.replace(CONFIG, **own)
    return Pruner(NLVR.build(0), TASK, config, dense=dense_point(), dense_model=NLVR.build(0))


def after_stages(pruner: Pruner, number: int) -> list[StageRecord]:
    for record in pruner.run():
        if isinstance(record, StageRecord) and record.stage == number:
            break
    return pruner.stages


def swept(exploration: float = 1.0, seed: int = 0) -> MultiModeStrategy:
    """A strategy with a cost for every mode."""
    strategy = MultiModeStrategy(MODES, exploration=exploration, seed=seed)
    for _ in MODES:
        strategy.record(strategy.choose(), 1.0)
    return strategy


# --- exploration that fades --------------------------------------------------------------------


def test_the_probability_of_exploring_is_rho_times_the_way_that_is_left() -> None:
    strategy = swept(0.2)
    for reached, left in ((0.0, 1.0), (0.6, 0.25), (0.8, 0.0), (-0.1, 1.0), (0.9, 0.0)):
        strategy.exploration_left = way_left(reached, 0.8)
        assert strategy.explore_probability == pytest.approx(0.2 * left)


def test_at_the_target_nothing_explores() -> None:
    strategy = swept(1.0)
    strategy.exploration_left = 0.0
    for _ in range(20):
        strategy.record(strategy.choose(), 1.0)
        assert strategy.choice == "greedy"


def test_a_loop_tells_its_strategy_how_far_it_is() -> None:
    pruner = pruner_of(fade_exploration=True)
    first, _ = after_stages(pruner, 2)
    assert isinstance(pruner.strategy, MultiModeStrategy)
    assert 0 < pruner.strategy.exploration_left < 1
    assert pruner.strategy.exploration_left == pytest.approx(1 - first.ratio / RATIO)


# --- costs that are measured again -------------------------------------------------------------


def test_a_cost_is_stale_some_stages_after_its_run_or_refresh() -> None:
    strategy = MultiModeStrategy(["a", "b"], exploration=0.0)
    strategy.record(strategy.choose(exclude=["b"]), 1.0)
    assert strategy.stale(1) == []
    for stage in (2, 3):
        assert strategy.stale(3) == []
        strategy.record(strategy.choose(exclude=["a"]), 1.0)
        assert (strategy.stage, strategy.stale(2)) == (stage, ["a"] if stage == 3 else [])
    strategy.refresh(["a"], {"a": 7.0})
    assert strategy.costs["a"] == 7.0
    assert strategy.stale(1) == []


def test_a_mode_that_has_nothing_to_give_keeps_its_cost_for_a_while() -> None:
    strategy = swept()
    strategy.refresh(MODES, {"b": 7.0})
    assert strategy.costs == {"a": 1.0, "b": 7.0, "c": 1.0}
    assert strategy.stale(1) == []


def test_refreshes_survive_a_restart() -> None:
    strategy = swept()
    strategy.refresh(["a"], {"a": 7.0})
    again = MultiModeStrategy(MODES)
    again.restore(strategy.state())
    assert (again.costs, again.stale(1)) == (strategy.costs, strategy.stale(1))


def test_a_stage_refreshes_idle_costs_without_touching_a_weight() -> None:
    pruner = pruner_of(refresh_after=2, exploration=0.0)
    after_stages(pruner, 3)
    weights, old = copy.deepcopy(pruner.model.state_dict()), pruner.strategy.costs
    plan = trials_before(pruner, RATIO)
    assert plan is not None
    assert pruner.stages[0].mode in plan.modes
    assert pruner.stages[-1].mode not in plan.modes
    expected = {m: trial_cost(pruner, m, plan.gap, 0) for m in plan.modes}
    opening = open_stage(pruner, RATIO)
    assert opening.refreshed == expected
    assert all(pruner.strategy.costs[m] == cost != old[m] for m, cost in expected.items())
    state = pruner.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in state.items())
    assert not pruner.handle.masks


def test_the_record_of_a_stage_tells_what_was_refreshed() -> None:
    stages = after_stages(pruner_of(exploration=0.0, refresh_after=1), 3)
    assert [set(stage.refreshed) for stage in stages] == [set(), set(), {stages[0].mode}]
    assert math.isfinite(stages[2].refreshed[stages[0].mode])


# --- quanta that shrink ------------------------------------------------------------------------


@pytest.mark.parametrize("last", [0.1, 0.5, 1.0])
def test_as_many_shrinking_quanta_make_up_the_way(last: float) -> None:
    reached, quanta = 0.0, []
    for _ in range(12):
        quanta.append(shrinking_quantum(reached, 0.8, 0.8 / 12, last))
        reached += quanta[-1]
    assert reached == pytest.approx(0.8)
    assert quanta[-1] / quanta[0] == pytest.approx(last)
    factors = [after / before for before, after in itertools.pairwise(quanta)]
    assert factors == pytest.approx([last ** (1 / 11)] * 11)


def test_quanta_stay_between_the_first_and_the_last() -> None:
    first = shrinking_quantum(0.0, 0.8, 0.1, 0.25)
    assert shrinking_quantum(-0.3, 0.8, 0.1, 0.25) == first
    assert shrinking_quantum(0.85, 0.8, 0.1, 0.25) == pytest.approx(0.25 * first)
    assert shrinking_quantum(0.0, 0.1, 0.2, 0.25) == 0.2


def test_a_run_begins_with_the_larger_quanta() -> None:
    even, shrinking = (
        after_stages(pruner_of(method="sjp", stage_quantum=0.05, last_quantum=last), 1)[0].ratio
        for last in (1.0, 0.1)
    )
    assert shrinking > even + 0.02


# --- thresholds that are set again ---------------------------------------------------------------


def removed_by_stages(**values: Any) -> list[float]:
    """Shares of the dense FLOPs that four stages removed, while training moves the scores."""
    own = {"method": "sjp_tp", "ratios": (0.4,), "stage_quantum": 0.04, "learning_rate": 0.02}
    pruner = pruner_of(**{**own, "probe_samples": 8, "eval_samples": 8, **values})
    ratios = [0.0, *(stage.ratio for stage in after_stages(pruner, 4))]
    return [after - before for before, after in itertools.pairwise(ratios)]


def test_a_stage_that_is_recalibrated_removes_what_it_was_to_remove() -> None:
    drifted, held = (removed_by_stages(recalibrate=value) for value in (False, True))
    assert sum(drifted) > 4 * 0.04 + 0.04
    assert sum(held) == pytest.approx(4 * 0.04, abs=0.015)


def test_thresholds_settle_where_a_pass_costs_what_is_asked() -> None:
    pruner = pruner_of(method="token")
    after_stages(pruner, 2)
    for factor in (0.95, 1.05):
        search = pruner.raising().search
        target = factor * search.start
        pruner.handle.thresholds.update(search.settle(target, 0.002 * target))
        assert pruner.raising().search.start == pytest.approx(target, rel=0.02)


def test_thresholds_of_zero_stay_so() -> None:
    pruner = pruner_of()
    pruner.measure_dense()
    assert not any(pruner.raising().search.settle(0.0, 0.0).values())


# --- training by what a stage removes ----------------------------------------------------------


def test_steps_are_those_of_a_stage_or_in_proportion_to_its_share_of_a_quantum() -> None:
    config = PruningConfig(steps_per_stage=20, stage_quantum=0.05)
    assert [steps_of(config, share) for share in (0.0, 0.02, 0.05)] == [20, 20, 20]
    config = dataclasses.replace(config, steps_by="quantum")
    assert [steps_of(config, share) for share in (0.0, 0.02, 0.05, 0.06)] == [1, 8, 20, 24]


def test_a_stage_of_a_small_mode_trains_for_less(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def watched(loop: StageLoop, choice: UnitChoice, steps: int) -> float:
        taken.append(steps)
        return train(loop, choice, 1)

    train = StageLoop.train
    monkeypatch.setattr(StageLoop, "train", watched)
    own = {"steps_per_stage": 200, "quantum_cap": 0.1, "exploration": 0.0}
    for by in ("stage", "quantum"):
        after_stages(pruner_of(steps_by=by, **own), 4)
    assert taken[:4] == [200] * 4
    assert min(taken[4:]) < 100 < max(taken[4:])


# --- costs against a control -------------------------------------------------------------------

NOTHING = Raise(UnitChoice({}, 0.0, 0.0), {}, 0.0, 1.0)


def test_training_alone_costs_nothing_against_a_control() -> None:
    for against, nothing in (("before", False), ("control", True)):
        pruner = pruner_of(cost_against=against, learning_rate=0.02)
        pruner.measure_dense()
        pruner.take(NOTHING, 4)
        assert (pruner.measure(1.0)[1] == 0.0) == nothing


def test_a_stage_is_compared_with_a_copy_that_trained_on_the_same_batches() -> None:
    pruner = pruner_of(cost_against="control", steps_per_stage=4, learning_rate=0.02)
    pruner.measure_dense()
    copied = fork(pruner)
    copied.train(NOTHING.choice, 4)
    control = pruner.yardstick.value_of(pruner.yardstick.evaluate(copied.model, "val")[0])
    stage = pruner.run_stage(RATIO)
    assert stage.cost == pytest.approx((control + stage.val_loss) / stage.ratio)


def test_a_control_leaves_the_run_as_it_is() -> None:
    runs = []
    for against in ("before", "control"):
        pruner = pruner_of(cost_against=against, init="sweep")
        pruner.measure_dense()
        runs.append((pruner.run_stage(RATIO), pruner.model.state_dict()))
    (plain, weights), (controlled, others) = runs
    assert (plain.val_loss, plain.macs) == (controlled.val_loss, controlled.macs)
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_trials_from_one_snapshot_share_a_control(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(loop: StageLoop, choice: UnitChoice, steps: int) -> float:
        seen.append((len(loop.stages), bool(choice.units), steps))
        return train(loop, choice, steps)

    train = StageLoop.train
    monkeypatch.setattr(StageLoop, "train", watched)
    own = {"lookahead_steps": 2, "steps_per_stage": 3, "modes": ("vision_params", "cross_params")}
    after_stages(pruner_of(schedule="lookahead", cost_against="control", **own), 2)
    trials = [(True, 2), (True, 2)]
    for stage in (0, 1):
        mine = [(cuts, steps) for at, cuts, steps in seen if at == stage]
        assert mine == [(False, 2), *trials, (False, 3), (True, 3)]


def test_a_trial_without_training_needs_no_control() -> None:
    costs = []
    for against in ("before", "control"):
        pruner = pruner_of(schedule="lookahead", lookahead_steps=0, cost_against=against)
        pruner.measure_dense()
        costs.append(trial_cost(pruner, "vision_params", pruner.gap(RATIO), 0))
    assert costs[0] == costs[1] is not None


# --- stages that a target cuts short ------------------------------------------------------------


def test_a_cost_of_part_of_a_stage_counts_for_that_part() -> None:
    costs = []
    for share in (1.0, 0.25, 0.0):
        strategy = swept(exploration=0.0)
        mode = strategy.choose()
        weight = 1 - history_weight(strategy.stage - strategy._last_run[mode])
        strategy.record(mode, 5.0, share)
        costs.append(strategy.costs[mode])
    assert costs == pytest.approx([1.0 + 4.0 * weight * share for share in (1.0, 0.25, 0.0)])


def test_a_stage_that_its_target_cuts_short_is_a_part_of_one() -> None:
    pruner = pruner_of(modes=("vision_params",))
    pruner.measure_dense()
    quantum = 0.02 * pruner._dense_macs
    for gap, share in ((10 * quantum, 1.0), (0.5 * quantum, 0.5)):
        raised = pruner.raising().pick([PruningMode.VISION_PARAMS], gap, coarse=True)
        assert raised is not None
        assert raised.share == pytest.approx(share, abs=0.2)
        assert (raised.share == 1.0) == (gap > quantum)


# --- scores per FLOP ---------------------------------------------------------------------------


def test_of_two_units_the_costlier_goes_first_by_score_per_flop() -> None:
    groups = [g for g in attach(NLVR.build(0)).groups.values() if g.kind == "head"][:2]
    cheap, costly = groups[0].name, groups[1].name
    scores = {cheap: torch.full((4,), 1.0), costly: torch.full((4,), 2.0)}
    by_score = rank_scores(groups, scores, {})
    by_price = rank_scores(groups, scores, {}, prices={cheap: 10.0, costly: 30.0})
    assert [entry.group for entry in by_score] == [cheap] * 4 + [costly] * 4
    assert [entry.group for entry in by_price] == [costly] * 4 + [cheap] * 4


def test_equal_prices_change_no_order() -> None:
    groups = list(attach(NLVR.build(0)).groups.values())
    scores = {group.name: torch.rand(group.num_units) for group in groups}
    prices = {group.name: 7.0 for group in groups}
    plain, priced = (rank_scores(groups, scores, {}, prices=given) for given in (None, prices))
    assert [entry[:2] for entry in plain] == [entry[:2] for entry in priced]


def test_a_run_ranks_by_what_units_cost_on_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(*args: Any, prices: Any, **options: Any) -> Any:
        seen.append(prices)
        return rank_scores(*args, prices=prices, **options)

    monkeypatch.setattr("comp.raising.rank_scores", watched)
    for rank_by in ("score", "score_per_flop"):
        after_stages(pruner_of(method="param", rank_by=rank_by), 1)
    assert seen[0] is None
    assert all(price > 0 for price in seen[1].values())


# --- one ranking for all modalities --------------------------------------------------------------

PARAMETERS = "vision_params+language_params+cross_params"


def test_parameters_of_all_modalities_can_be_one_mode() -> None:
    pruner = pruner_of(one_ranking=True, exploration=0.0)
    assert pruner.strategy.live == [PARAMETERS, "vision_tokens", "language_tokens"]
    stages = after_stages(pruner, 3)
    assert sorted(stage.mode for stage in stages) == sorted(pruner.strategy.live)
    assert len({pruner.handle.groups[name].mode for name in pruner.handle.kept}) > 1


def test_one_mode_of_parameters_is_retired_as_a_whole() -> None:
    floors = {"min_heads": 4, "min_channels": 48}
    pruner = pruner_of(one_ranking=True, init="probe", ratios=(0.04,), **floors)
    stages = after_stages(pruner, 2)
    assert PARAMETERS not in pruner.strategy.live
    assert all(stage.mode.endswith("_tokens") for stage in stages)


# --- comp_plus ---------------------------------------------------------------------------------


def test_comp_plus_is_comp_with_some_switches_each_of_which_can_be_put_back() -> None:
    mine, papers = (dataclasses.asdict(METHODS[name]) for name in ("comp_plus", "comp"))
    names = {name for name in mine if mine[name] != papers[name]}
    assert names == {"rank_norm", "cost_against", "recalibrate", "history_by", "fade_exploration"}
    back = PruningConfig(method="comp_plus", **{name: papers[name] for name in names})
    assert back.switches == METHODS["comp"]


def test_comp_plus_runs_to_its_ratio() -> None:
    records = list(pruner_of(method="comp_plus").run())
    assert isinstance(records[-1], CurvePoint)
    assert records[-1].ratio_reached == pytest.approx(RATIO, abs=0.01)


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"method": "sjp", "refresh_after": 3}, r"refresh_after 3 is for the costs of the sched"),
        ({"method": "cas", "fade_exploration": True}, r"fade_exploration is for .* leave it out"),
        ({"method": "sjp", "one_ranking": True}, r"one_ranking is for the schedules that ch"),
        ({"method": "token", "rank_by": "score_per_flop"}, r"'token' prunes tokens alone"),
        ({"method": "upop_sine", "last_quantum": 0.5}, r"last_quantum 0.5 is for .* leave last_q"),
        ({"distill_stages": True}, r"distillation is 0; give it a weight"),
        ({"method": "upop_sine", "steps_by": "quantum"}, r"steps_by 'quantum' is for stages"),
        ({"steps_by": "flops"}, r"steps_by must be one of stage, quantum"),
        ({"method": "sjp", "cost_against": "control"}, r"'control' is for the schedules that"),
        ({"method": "sjp", "history_by": "quantum"}, r"history_by 'quantum' is for the costs of"),
        ({"cost_against": "dense"}, r"cost_against must be one of before, control"),
        ({"refresh_after": 0}, r"refresh_after must be in"),
        ({"last_quantum": 0.0}, r"last_quantum must be in"),
        ({"distillation": -1.0}, r"distillation must be in"),
        ({"distillation_temperature": 0.0}, r"distillation_temperature must be in"),
        ({"rank_by": "flops"}, r"rank_by must be one of score, score_per_flop"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(values: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        PruningConfig(**values)
