"""The stage loop on tiny models and a tiny task: what it yields, keeps, refuses and repeats."""

import copy
import dataclasses
import functools
import gc
import itertools
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from comp import results
from comp.checkpoint import load_pruned
from comp.config import PruningConfig
from comp.errors import BudgetUnreachable, NanLoss, UnsupportedModelError
from comp.fixed_strategy import FixedStrategy
from comp.handle import handle_of
from comp.lookahead import LookaheadStrategy, trial_cost
from comp.masks import mask_value
from comp.methods import METHODS
from comp.models import attach
from comp.modes import PruningMode, Stream
from comp.pruner import Pruner, evaluate_dense, prune
from comp.results import CurvePoint, StageRecord
from comp.schedules import make_strategy
from comp.shrink import shrink_
from comp.strategy import MultiModeStrategy, history_weight
from comp.tasks.base import Batch
from tests.tiny import CLOCKS, FAMILIES, SMALL, TinyFamily, TinyTask

NLVR = FAMILIES["blip-nlvr"]
CONFIG = dataclasses.replace(SMALL, ratios=(0.12,), stage_quantum=0.04, quantum_cap=0.3)


def configured(**values: Any) -> PruningConfig:
    return dataclasses.replace(CONFIG, **values)


@functools.cache
def dense_point(name: str) -> CurvePoint:
    """The dense point of a family, measured once as a study does it."""
    return evaluate_dense(FAMILIES[name].build(0), TinyTask(FAMILIES[name]), CONFIG)


@functools.cache
def dense_model(name: str) -> nn.Module:
    """The dense model to compare latencies with, which no run changes."""
    return FAMILIES[name].build(0)


def pruner_of(family: TinyFamily = NLVR, task: TinyTask | None = None, **values: Any) -> Pruner:
    task = task or TinyTask(family)
    config = configured(**values)
    dense, waiting = dense_point(family.name), dense_model(family.name)
    return Pruner(family.build(0), task, config, dense=dense, dense_model=waiting)


def comparable(record: StageRecord | CurvePoint) -> dict[str, Any]:
    """A record without what a clock says."""
    return {k: v for k, v in record.to_dict().items() if k not in CLOCKS}


def all_comparable(pruner: Pruner) -> list[dict[str, Any]]:
    return [comparable(record) for record in pruner.records]


def consume(pruner: Pruner, directory: Path) -> None:
    """Runs to the end, saving after every record."""
    for _ in pruner.run():
        pruner.save(directory)


@dataclasses.dataclass
class Snapshot:
    """What a pruner's model looked like after a record."""

    record: StageRecord | CurvePoint
    kept: dict[str, list[int]]
    masks: dict[str, Tensor]
    thresholds: dict[Stream, float]
    state: Path


@dataclasses.dataclass
class Run:
    """A finished run with a saved state after every record."""

    pruner: Pruner
    snapshots: list[Snapshot]


def saved_run(directory: Path, **values: Any) -> Run:
    pruner = pruner_of(**values)
    snapshots = []
    for i, record in enumerate(pruner.run()):
        pruner.save(directory / str(i))
        snapshots.append(
            Snapshot(
                record,
                copy.deepcopy(pruner.handle.kept),
                copy.deepcopy(pruner.handle.masks),
                dict(pruner.handle.thresholds),
                directory / str(i),
            )
        )
    return Run(pruner, snapshots)


@pytest.fixture(scope="module", params=["stage", "end"])
def curve(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run through two ratios."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp(request.param)
    return saved_run(directory, ratios=(0.15, 0.3), shrink=request.param)


# --- what it yields ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_pruned_to_the_ratio(name: str) -> None:
    family = FAMILIES[name]
    pruner = pruner_of(family)
    records = list(pruner.run())
    assert records == pruner.records
    assert isinstance(records[0], CurvePoint)
    assert isinstance(records[-1], CurvePoint)
    assert all(isinstance(record, StageRecord) for record in records[1:-1])
    point = pruner.points[-1]
    assert point.ratio_asked == 0.12
    assert point.ratio_reached >= 0.12 - 0.005
    assert point.params < pruner.points[0].params
    assert 0 < point.test < 100
    assert pruner.finished_model is not None
    handle = handle_of(pruner.finished_model)
    assert not handle.masks
    assert handle.kept


def test_the_first_stages_cover_every_mode_once(curve: Run) -> None:
    sweep = curve.pruner.stages[:5]
    assert sorted(record.mode for record in sweep) == sorted(PruningMode)
    assert {record.choice for record in sweep} == {"sweep"}
    assert "sweep" not in {record.choice for record in curve.pruner.stages[5:]}


def test_a_point_follows_the_stage_that_reached_its_ratio(curve: Run) -> None:
    for before, record in itertools.pairwise(curve.pruner.records):
        if isinstance(record, CurvePoint):
            assert isinstance(before, StageRecord)
            assert before.snapshot == record.ratio_asked
        elif isinstance(before, StageRecord):
            assert before.snapshot is None
    assert [point.ratio_asked for point in curve.pruner.points] == [0.0, 0.15, 0.3]


def test_a_finished_model_is_freed_before_the_next_stage_or_point() -> None:
    models = []
    pruner = pruner_of(ratios=(0.001, 0.0011, 0.05), tolerance=0.0, modes=("vision_params",))
    gc.disable()
    try:
        for record in pruner.run():
            if pruner.finished_model is not None:
                models.append(weakref.ref(pruner.finished_model))
            alive = [model for model in models if model() is not None]
            assert len(alive) <= (isinstance(record, CurvePoint) and record.ratio_asked > 0)
    finally:
        gc.enable()
    assert len(models) == 3


def test_two_ratios_that_one_stage_reaches_give_two_points() -> None:
    pruner = pruner_of(ratios=(0.001, 0.0011), tolerance=0.0, modes=("vision_params",))
    list(pruner.run())
    assert len(pruner.stages) == 1
    assert [point.ratio_asked for point in pruner.points[1:]] == [0.001, 0.0011]


def test_stages_are_numbered_and_the_ratio_is_of_the_dense_cost(curve: Run) -> None:
    dense = curve.pruner.points[0].gmacs * 1e9
    for number, record in enumerate(curve.pruner.stages, start=1):
        assert record.stage == number
        assert record.ratio == pytest.approx(1 - record.macs / dense)


def test_training_and_evaluation_are_timed_as_parts_of_their_stage(curve: Run) -> None:
    for stage in curve.pruner.stages:
        assert stage.train_seconds > 0
        assert stage.eval_seconds > 0
        assert stage.train_seconds + stage.eval_seconds <= stage.seconds


def test_the_ratio_is_not_overshot_by_more_than_a_step(curve: Run) -> None:
    reached = {record.snapshot: record.ratio for record in curve.pruner.stages if record.snapshot}
    for asked, ratio in reached.items():
        assert asked - CONFIG.tolerance <= ratio <= asked + 0.03


def test_masks_are_hard_after_every_stage(curve: Run) -> None:
    for snapshot in curve.snapshots:
        assert all(((m == 0) | (m == 1)).all() for m in snapshot.masks.values())
    if curve.pruner.config.shrink == "stage":
        assert not any(snapshot.masks for snapshot in curve.snapshots)


def test_thresholds_only_rise_and_units_never_come_back(curve: Run) -> None:
    for before, after in itertools.pairwise(curve.snapshots):
        for stream, theta in before.thresholds.items():
            assert after.thresholds[stream] >= theta
        for name, kept in before.kept.items():
            assert set(after.kept[name]) <= set(kept)
        for name, mask in before.masks.items():
            assert (after.masks[name] <= mask).all()


def test_a_stage_changes_its_own_mode_only(curve: Run) -> None:
    groups = curve.pruner.handle.groups
    for before, after in itertools.pairwise(curve.snapshots):
        if isinstance(after.record, CurvePoint):
            assert (after.kept, after.thresholds) == (before.kept, before.thresholds)
            continue
        mode = PruningMode(after.record.mode)
        changed = {n for n in after.kept if after.kept[n] != before.kept.get(n)}
        changed |= {
            n
            for n, mask in after.masks.items()
            if n not in before.masks or not torch.equal(mask, before.masks[n])
        }
        assert {groups[name].mode for name in changed} <= {mode}
        raised = {s for s, t in after.thresholds.items() if t != before.thresholds.get(s)}
        assert raised == ({mode.stream} if mode.is_tokens else set())
        assert (after.record.units == 0) == mode.is_tokens


def test_the_minima_hold_at_the_end(curve: Run) -> None:
    alive = curve.pruner.handle.alive()
    for name, group in curve.pruner.handle.groups.items():
        assert alive[name] >= (1 if group.kind == "head" else CONFIG.min_channels)


def test_shrinking_early_or_late_gives_the_same_number_of_parameters(curve: Run) -> None:
    model = copy.deepcopy(curve.pruner.model)
    shrink_(handle_of(model))
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert curve.pruner.stages[-1].params == expected


@pytest.mark.equations("Eq. 8", "Eq. 10")
def test_costs_are_those_of_the_equations(curve: Run) -> None:
    """Recomputes r and R from the validation losses and FLOPs of the records."""
    dense = curve.pruner.points[0].gmacs * 1e9
    costs: dict[str, float] = {}
    last_run = dict.fromkeys((mode.value for mode in PruningMode), 0)
    for before, record in itertools.pairwise(curve.pruner.stages):
        drop = (before.macs - record.macs) / dense
        if drop >= CONFIG.min_quantum:
            assert record.cost == pytest.approx((record.val_loss - before.val_loss) / drop)
    for record in curve.pruner.stages:
        weight = history_weight(record.stage - last_run[record.mode])
        old = costs.get(record.mode)
        costs[record.mode] = (
            record.cost if old is None else weight * old + (1 - weight) * record.cost
        )
        last_run[record.mode] = record.stage
        assert record.mode_cost == pytest.approx(costs[record.mode])


def test_the_run_is_long_enough_for_the_history_to_matter(curve: Run) -> None:
    assert any(record.mode_cost != record.cost for record in curve.pruner.stages)


# --- repetition --------------------------------------------------------------------------------


def test_a_restored_run_gives_the_same_bits_as_the_uninterrupted_one(curve: Run) -> None:
    expected = all_comparable(curve.pruner)
    weights = curve.pruner.model.state_dict()
    reached = next(i for i, values in enumerate(expected) if values.get("snapshot"))
    for index in (reached, reached + 1):
        pruner = pruner_of(ratios=(0.15, 0.3), shrink=curve.pruner.config.shrink)
        pruner.restore(curve.snapshots[index].state)
        assert all_comparable(pruner) == expected[: index + 1]
        rest = [comparable(record) for record in pruner.run()]
        assert rest == expected[index + 1 :]
        state = pruner.model.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in state.items())


def test_a_restored_run_at_its_end_has_nothing_left(curve: Run) -> None:
    pruner = pruner_of(ratios=(0.15, 0.3), shrink=curve.pruner.config.shrink)
    pruner.restore(curve.snapshots[-1].state)
    assert list(pruner.run()) == []


def test_a_curve_passes_through_what_a_separate_run_gives(curve: Run) -> None:
    alone = pruner_of(ratios=(0.15,), shrink=curve.pruner.config.shrink)
    torch.manual_seed(4)
    drawn = torch.rand(2)
    torch.manual_seed(4)
    torch.rand(1)
    expected = [comparable(record) for record in alone.run()]
    assert all_comparable(curve.pruner)[: len(expected)] == expected
    assert expected[-1]["ratio_asked"] == 0.15
    # Neither did the caller's random numbers matter, nor were any of them used up.
    assert torch.equal(torch.rand(1), drawn[1:])


def test_points_made_elsewhere_from_snapshots_are_those_of_the_run(
    curve: Run, tmp_path: Path
) -> None:
    values: dict[str, Any] = {"ratios": (0.15, 0.3), "shrink": curve.pruner.config.shrink}
    pruner = pruner_of(**values)
    for body in pruner.trajectory():
        if isinstance(body, results.Snapshot):
            pruner.save(tmp_path / str(body.ratio), optimizer=False)
    assert [comparable(s) for s in pruner.stages] == [comparable(s) for s in curve.pruner.stages]
    for point in curve.pruner.points[1:]:
        elsewhere = pruner_of(**values)
        elsewhere.restore(tmp_path / str(point.ratio_asked))
        assert comparable(elsewhere.finish(point.ratio_asked)) == comparable(point)


def test_another_seed_gives_another_run(curve: Run) -> None:
    pruner = pruner_of(seed=2)
    list(pruner.run())
    modes = [record.mode for record in pruner.stages]
    assert modes != [record.mode for record in curve.pruner.stages[: len(modes)]]


# --- one stage ---------------------------------------------------------------------------------


class WatchedTask(TinyTask):
    """Notes the masks in force at every training step and which splits are read."""

    def __init__(self, family: TinyFamily) -> None:
        super().__init__(family)
        self.fading: list[set[float]] = []
        self.splits: list[str] = []

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        masks = handle_of(model).masks.values()
        self.fading.append({float(v) for mask in masks for v in mask} - {1.0})
        return super().loss(model, batch)

    def batches(
        self, split: str, *, batch_size: int, num_samples: int | None = None
    ) -> Iterator[Batch]:
        self.splits.append(split)
        return super().batches(split, batch_size=batch_size, num_samples=num_samples)


def test_masks_fade_after_every_step_and_are_zero_for_the_rest_of_the_stage() -> None:
    task = WatchedTask(NLVR)
    pruner = pruner_of(task=task, steps_per_stage=8, modes=("vision_params",))
    stages = pruner.run()
    next(stages)
    next(stages)
    expected = [{mask_value(step, 6)} - {1.0} for step in range(8)]
    assert [sorted(seen) for seen in task.fading] == [
        pytest.approx(sorted(values)) for values in expected
    ]


def test_the_test_split_is_read_once_a_point() -> None:
    task = WatchedTask(NLVR)
    list(Pruner(NLVR.build(0), task, configured(ratios=(0.05, 0.1))).run())
    assert task.splits.count("test") == 3


def test_a_given_dense_point_spares_the_test_split() -> None:
    task = WatchedTask(NLVR)
    pruner = pruner_of(task=task, seed=9)
    point = next(iter(pruner.run()))
    assert point == dataclasses.replace(dense_point("blip-nlvr"), seed=9)
    assert "test" not in task.splits


@pytest.mark.parametrize("mode", PruningMode)
def test_a_run_may_be_restricted_to_one_mode(mode: PruningMode) -> None:
    ratio = {"vision_params": 0.1, "vision_tokens": 0.1, "cross_params": 0.03}
    pruner = pruner_of(modes=(mode.value,), ratios=(ratio.get(mode.value, 0.02),))
    list(pruner.run())
    assert {record.mode for record in pruner.stages} == {mode.value}


def test_the_optimizer_holds_the_models_own_parameters_after_every_stage() -> None:
    pruner = pruner_of()
    for _ in pruner.run():
        held = {id(p) for group in pruner.optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in pruner.model.parameters()}
        assert {id(p) for p in pruner.optimizer.state} <= held


def test_training_trains(curve: Run) -> None:
    dense = NLVR.build(0).state_dict()
    trained = curve.pruner.model.state_dict()
    assert not torch.equal(dense["cls_head.0.weight"], trained["cls_head.0.weight"])


# --- methods -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_reaches_its_ratio(method: str) -> None:
    pruner = pruner_of(method=method, lookahead_steps=1)
    list(pruner.run())
    switches = METHODS[method]
    assert pruner.points[-1].method == method
    assert pruner.points[-1].ratio_reached >= 0.12 - 0.005
    assert bool(pruner.handle.kept) >= switches.parameters - (switches.schedule != "joint")
    if not switches.tokens:
        assert not any(pruner.handle.thresholds.values())
    if not switches.parameters:
        assert not pruner.handle.kept
    assert (pruner.handle.switches.cip, pruner.handle.switches.cit) == (
        switches.cip,
        switches.cit,
    )


def test_tokens_first_turns_to_parameters_half_way() -> None:
    pruner = pruner_of(method="sjp_tp", ratios=(0.19,))
    list(pruner.run())
    turn = 1 - math.sqrt(1 - 0.19)
    for before, record in itertools.pairwise(pruner.stages):
        expected = "params" if before.ratio >= turn else "tokens"
        assert all(expected in part for part in record.mode.split("+"))


def test_switches_of_the_config_override_the_method() -> None:
    pruner = pruner_of(method="comp", cip=False, schedule="joint")
    assert (pruner.handle.switches.cip, pruner.handle.switches.cit) == (False, True)
    assert isinstance(pruner.strategy, FixedStrategy)


@pytest.mark.equations("Eq. 9", "Eq. 10")
@pytest.mark.parametrize(
    ("schedule", "exploration", "temperature", "history"),
    [("mps", 0.2, 5.0, 0.4), ("cas_re", 0.2, math.inf, 0.0), ("cas", 0.0, math.inf, 0.0)],
)
def test_the_ablations_take_one_part_away_each(
    schedule: Any, exploration: float, temperature: float, history: float
) -> None:
    strategy = make_strategy(configured(schedule=schedule), list(PruningMode))
    assert isinstance(strategy, MultiModeStrategy)
    assert strategy._exploration == exploration
    assert strategy._temperature == temperature
    assert strategy._history == history


def test_lookahead_trials_leave_the_pruner_as_it_is() -> None:
    pruner = pruner_of(schedule="lookahead", lookahead_steps=1)
    next(iter(pruner.run()))
    weights = copy.deepcopy(pruner.model.state_dict())
    gap = 0.1 * pruner._dense_macs
    first = [trial_cost(pruner, mode, gap, 1) for mode in pruner.modes]
    again = [trial_cost(pruner, mode, gap, 1) for mode in reversed(pruner.modes)][::-1]
    assert first == again
    assert None not in first
    assert not pruner.handle.masks
    assert not pruner.handle.thresholds
    assert not pruner.optimizer.state
    assert all(torch.equal(weights[n], v) for n, v in pruner.model.state_dict().items())


def test_lookahead_takes_the_cheapest_trial() -> None:
    pruner = pruner_of(schedule="lookahead", lookahead_steps=1)
    stages = pruner.run()
    next(stages)
    gap = pruner._macs - pruner._target_macs(0.12)
    costs = {mode.value: trial_cost(pruner, mode, gap, 1) for mode in pruner.modes}
    record = next(stages)
    assert isinstance(record, StageRecord)
    assert isinstance(pruner.strategy, LookaheadStrategy)
    assert record.mode == min(costs, key=lambda mode: costs[mode] or 0.0)


@pytest.mark.parametrize("init", ["probe", "rehearsal"])
def test_trials_of_all_modes_replace_the_sweep(init: Any) -> None:
    pruner = pruner_of(init=init, exploration=0.0)
    steps = {"probe": 0, "rehearsal": pruner.config.steps_per_stage}[init]
    stages = pruner.run()
    next(stages)
    gap = pruner._macs - pruner._target_macs(0.12)
    tried = {m.value: trial_cost(pruner, m, gap, steps) for m in pruner.modes}
    costs = {mode: cost for mode, cost in tried.items() if cost is not None}
    first = next(stages)
    assert isinstance(first, StageRecord)
    assert (first.choice, first.mode) == ("greedy", min(costs, key=costs.__getitem__))
    assert len(costs) == len(pruner.modes)
    others = {mode: cost for mode, cost in pruner.strategy.costs.items() if mode != first.mode}
    assert others == {mode: costs[mode] for mode in others}


@pytest.mark.parametrize("cost", ["params", "latency"])
def test_costs_may_count_parameters_or_time(cost: Any) -> None:
    pruner = pruner_of(cost=cost)
    list(pruner.run())
    assert all(math.isfinite(record.cost) for record in pruner.stages)


def test_the_cost_by_parameters_is_per_share_of_parameters() -> None:
    pruner = pruner_of(cost="params", modes=("vision_params",), ratios=(0.1,))
    list(pruner.run())
    first, second = pruner.stages[:2]
    share = (first.params - second.params) / pruner.points[0].params
    assert second.cost == pytest.approx((second.val_loss - first.val_loss) / share)


def test_the_cost_may_be_in_the_tasks_metric() -> None:
    pruner = pruner_of(val_metric="metric")
    list(pruner.run())
    first, second = pruner.stages[:2]
    drop = (first.macs - second.macs) / (pruner.points[0].gmacs * 1e9)
    assert second.cost == pytest.approx((first.val - second.val) / drop)


def test_half_precision_runs_to_the_end() -> None:
    pruner = pruner_of(autocast=True)
    list(pruner.run())
    assert pruner.points[-1].ratio_reached >= 0.115


@pytest.mark.equations("Eq. 8")
def test_a_drop_that_drift_has_eaten_is_replaced_by_the_one_predicted() -> None:
    pruner = pruner_of()
    stages = pruner.run()
    next(stages)
    next(stages)
    assert pruner._cost is not None
    pruner._macs = pruner._cost.macs  # as if the stage had removed nothing
    assert pruner._removed_share(0.05 * pruner._dense_macs) == pytest.approx(0.05)
    pruner._macs = 0.9 * pruner._cost.macs  # as if tokens had come back
    assert pruner._removed_share(0.05 * pruner._dense_macs) == pytest.approx(0.05)


# --- the last step -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["param", "token", "comp"])
def test_a_ratio_smaller_than_any_step_is_overshot_rather_than_chased(method: str) -> None:
    pruner = pruner_of(
        method=method, ratios=(0.002,), tolerance=0.0, min_channels=48, probe_samples=1
    )
    list(pruner.run())
    assert pruner.stages[-1].ratio >= 0.002


def test_units_left_over_by_small_steps_still_reach_a_steep_ratio() -> None:
    pruner = pruner_of(ratios=(0.7,), stage_quantum=0.08, fine_tune_steps=0)
    list(pruner.run())
    assert pruner.points[-1].ratio_reached >= 0.695


# --- what it refuses ---------------------------------------------------------------------------


def test_an_unreachable_ratio_is_refused_before_any_training() -> None:
    pruner = pruner_of(ratios=(0.99,), min_heads=2, min_vision_tokens=8)
    weights = copy.deepcopy(pruner.model.state_dict())
    with pytest.raises(BudgetUnreachable, match=r"ratio 0\.99 cannot .*with min_heads=2, ") as e:
        list(pruner.run())
    assert f"at most {e.value.highest:.4f}; lower the ratio" in str(e.value)
    assert 0.5 < e.value.highest < 0.99
    assert pruner.stages == []
    assert all(torch.equal(weights[n], v) for n, v in pruner.model.state_dict().items())


class OtherTraining(TinyTask):
    """Its training samples cost far less than those that decide whether a ratio is reached."""

    def batches(
        self, split: str, *, batch_size: int, num_samples: int | None = None
    ) -> Iterator[Batch]:
        for batch in super().batches(split, batch_size=batch_size, num_samples=num_samples):
            if split == "train":
                batch["attention_mask"][:, 3:] = 0
            yield batch


def test_what_can_be_reached_is_measured_on_the_samples_that_decide() -> None:
    found = []
    for task in (TinyTask(NLVR), OtherTraining(NLVR)):
        with pytest.raises(BudgetUnreachable) as error:
            list(pruner_of(task=task, ratios=(0.99,)).run())
        found.append(error.value.highest)
    assert found[0] == found[1]


def test_the_highest_ratio_that_it_names_can_be_reached() -> None:
    minima = {"min_heads": 2, "min_channels": 24, "min_vision_tokens": 10, "min_text_tokens": 5}
    with pytest.raises(BudgetUnreachable) as error:
        list(pruner_of(ratios=(0.99,), **minima).run())
    ratio = math.floor(100 * error.value.highest - 2) / 100
    pruner = pruner_of(
        ratios=(ratio,),
        **minima,
        stage_quantum=0.1,
        steps_per_stage=1,
        fine_tune_steps=0,
        max_stages=100,
    )
    list(pruner.run())
    assert pruner.points[-1].ratio_reached >= ratio - 0.005


def test_restricting_the_modes_lowers_the_highest_ratio() -> None:
    with pytest.raises(BudgetUnreachable, match=r"language_params reach at most 0\.0"):
        list(pruner_of(ratios=(0.5,), modes=("language_params",)).run())


def test_running_out_of_stages_is_said_with_the_ratio_reached() -> None:
    pruner = pruner_of(max_stages=2)
    with pytest.raises(BudgetUnreachable, match=r"not reached after 2 stages, only 0\.0") as error:
        list(pruner.run())
    assert len(pruner.stages) == 2
    assert error.value.highest == pruner.ratio > 0


def test_exhausting_every_mode_on_the_way_is_said_with_the_ratio_reached() -> None:
    pruner = pruner_of()
    stages = pruner.run()
    next(stages)
    for mode in pruner.modes:
        pruner.strategy.exhaust(mode.value)
    with pytest.raises(BudgetUnreachable, match=r"every mode is exhausted at 0\.0000; lower the"):
        next(stages)


def test_a_mode_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="modes names 'language_tokens', which BlipForConditiona"):
        pruner_of(FAMILIES["blip-caption"], modes=("language_tokens",))


def test_modes_that_the_method_does_not_prune_are_refused() -> None:
    with pytest.raises(ValueError, match="modes leaves nothing that method 'param' prunes; the"):
        pruner_of(method="param", modes=("vision_tokens",))


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear has no adapter"):
        Pruner(nn.Linear(2, 2), TinyTask(NLVR), CONFIG)


class BrokenTask(TinyTask):
    """Its loss stops being a number at one training step."""

    def __init__(self, family: TinyFamily, step: int) -> None:
        super().__init__(family)
        self._left = step

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self._left -= 1
        return super().loss(model, batch) * (math.nan if self._left == 0 else 1.0)


def test_a_loss_that_is_no_number_stops_the_stage_and_leaves_the_one_before(
    tmp_path: Path,
) -> None:
    pruner = pruner_of(task=BrokenTask(NLVR, step=2 * 2 + 2))
    with pytest.raises(NanLoss, match=r"nan in stage 3, step 2; .*after stage 2 is int") as e:
        consume(pruner, tmp_path / "state")
    assert e.value.stage == 3
    assert len(pruner.stages) == 2
    again = pruner_of()
    again.restore(tmp_path / "state")
    list(again.run())
    healthy = pruner_of()
    list(healthy.run())
    assert all_comparable(again) == all_comparable(healthy)


def test_a_loss_that_is_no_number_reaches_no_weight() -> None:
    pruner = pruner_of(task=BrokenTask(NLVR, step=2))
    with pytest.raises(NanLoss):
        list(pruner.run())
    assert all(parameter.isfinite().all() for parameter in pruner.model.parameters())


# --- shortcuts ---------------------------------------------------------------------------------


def test_prune_gives_the_most_pruned_model_with_the_records(tmp_path: Path) -> None:
    model = NLVR.build(0)
    result = prune(model, TinyTask(NLVR), configured(ratios=(0.05, 0.1)), model_name="tiny")
    assert [point.ratio_asked for point in result.points] == [0.0, 0.05, 0.1]
    assert {point.model for point in result.points} == {"tiny"}
    assert result.stages
    assert str(result).count("\n") == 4
    assert sum(p.numel() for p in result.model.parameters()) == result.points[-1].params
    result.model.save_pretrained(tmp_path)
    batch = NLVR.batch(2, 0)
    with torch.no_grad():
        expected = NLVR.outputs(result.model, batch)
        assert torch.equal(NLVR.outputs(load_pruned(tmp_path), batch), expected)


def test_evaluating_a_dense_model_leaves_it_dense() -> None:
    model, batch = NLVR.build(0), NLVR.batch(2, 0)
    with torch.no_grad():
        before = NLVR.outputs(model, batch)
        point = evaluate_dense(model, TinyTask(NLVR), CONFIG, model_name="tiny")
        assert (NLVR.outputs(model, batch) - before).abs().max() <= 1e-5
    assert (point.ratio_reached, point.method, point.fine_tuned) == (0.0, "dense", 0)
    assert point.params == sum(p.numel() for p in model.parameters())
    assert not attach(model).masks
