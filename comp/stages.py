"""The stage loop: choose a mode, raise its threshold, train while masks fade, measure its cost.

``StageLoop`` holds what stages change: the model with its masks and thresholds, the schedule, the
optimizer and the latest measurement. ``comp.pruner`` leads it through the asked ratios.

Source: CoMP (arXiv 2604.02956), Section 3 and Algorithm 1.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from comp.config import PruningConfig
from comp.cost import Measurement
from comp.distillation import Teacher, check_predicts
from comp.errors import BudgetUnreachable, NanLoss
from comp.evaluation import resolve_device
from comp.finetune import make_optimizer, train_step
from comp.fixed_strategy import FixedStrategy
from comp.handle import PruningHandle
from comp.lookahead import Trials, fork, trial_costs
from comp.masks import UnitChoice, bring_back_, fade_, mask_value
from comp.models import attach
from comp.modes import Stream
from comp.opening import Opening, open_stage
from comp.parking import ParkedModel, bytes_of, give_back
from comp.raising import Raise, Raising, steps_of
from comp.results import CurvePoint, StageRecord
from comp.schedules import make_strategy, modes_of_run
from comp.sharding import gather_, shard_
from comp.shrink import migrate_optimizer_, num_parameters, shrink_
from comp.tasks.base import Evaluation, PreparingTask, Task
from comp.upop_search import UpopSearch
from comp.workers import ALONE, Workers
from comp.yardstick import Yardstick


class StageLoop:
    """Prunes one model stage by stage.

    Args:
        model: A model of a known family; pruned in place.
        task: Batches, loss and metric.
        config: What to do.
        model_name: Written into the points.
        dense_model: See ``comp.pruner.Pruner``.
        workers: See ``comp.pruner.Pruner``.

    Attributes:
        records: Everything that was finished.
        teacher: The dense model that stages learn from, if they do.
        trials: Who tries the modes before a stage that ``comp.opening`` wants trials for.
        controls: What ``control`` found since the last stage, by steps.

    Raises:
        ValueError: If the config names a mode that the model does not have, the task cannot be
            distilled as it asks, or the workers cannot share a batch.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: PruningConfig,
        *,
        model_name: str = "",
        dense_model: nn.Module | None = None,
        workers: Workers = ALONE,
    ) -> None:
        config = workers.split(config)
        if config.distillation:
            check_predicts(task)
        self.device = resolve_device(config.device)
        self.task = task
        self.config = config
        self.model_name = model_name or type(model).__name__
        self.yardstick = Yardstick(
            task,
            config,
            self.device,
            dense_model if dense_model is not None else ParkedModel(model),
            sum(parameter.numel() for parameter in model.parameters()),
            self.model_name,
            workers,
        )
        self.model = model.to(self.device)
        self.handle: PruningHandle = attach(
            model,
            switches=config.switches,
            mask_site=config.mask_site,
            merge=config.merge,
            min_tokens={
                Stream.VISION: config.min_vision_tokens,
                Stream.TEXT: config.min_text_tokens,
            },
        )
        self.handle.workers = workers
        self.handle.stock_when_idle = False
        self.handle.recompute = config.gradient_checkpointing
        self.handle.drop_path = config.drop_path
        self.handle.static_tokens = None  # thresholds decide again, so that stages can raise them
        self.modes = modes_of_run(config, self.handle.structure.modes(), type(model).__name__)
        self.strategy = make_strategy(config, self.modes)
        self.search: UpopSearch | None = None
        if config.switches.schedule == "sine":
            groups = [group for group in self.handle.groups.values() if group.mode in self.modes]
            self.search = UpopSearch(self.handle, groups, config.num_stages)
        if isinstance(task, PreparingTask):
            task.prepare_(model)
        workers.share_(model)
        shard_(self.handle)
        self.optimizer = make_optimizer(model, config)
        self.records: list[StageRecord | CurvePoint] = []
        self.trials: Trials = trial_costs
        self.teacher = self._make_teacher() if config.distill_stages else None
        self._step = 0
        self._dense_macs = 0.0
        self._macs = 0.0
        self._value = 0.0
        self._resource = self._dense_resource = 0.0
        self._cost: Measurement | None = None
        self.controls: dict[int, float] = {}

    def _make_teacher(self) -> Teacher:
        return Teacher(self.yardstick.dense_here(), self.task, self.config)

    @contextmanager
    def teaching(self) -> Iterator[Teacher | None]:
        """Lends the dense model to learn from, if there is to be one; it takes memory inside."""
        if self.teacher is not None or not self.config.distillation:
            yield self.teacher
            return
        teacher = self._make_teacher()
        try:
            yield teacher
        finally:
            teacher.dismiss()

    @property
    def stages(self) -> list[StageRecord]:
        """The finished stages."""
        return [record for record in self.records if isinstance(record, StageRecord)]

    @property
    def ratio(self) -> float:
        """FLOPs ratio reached so far, on the validation subset."""
        return 1.0 - self._macs / self._dense_macs if self._dense_macs else 0.0

    def _target_macs(self, ratio: float) -> float:
        return (1.0 - ratio) * self._dense_macs

    def gap(self, ratio: float) -> float:
        """Mean multiply-adds that are left to go to a ratio."""
        return self._macs - self._target_macs(ratio)

    def has_reached(self, ratio: float) -> bool:
        """Whether no stage is needed any more to get to a ratio."""
        slack = self.config.tolerance * self._dense_macs
        return self._macs <= self._target_macs(ratio) + slack

    def measure_dense(self) -> Evaluation:
        """Takes the model as it is for the dense one; returns its verdict on validation."""
        verdict, self._cost = self.yardstick.evaluate(self.model, "val")
        self._dense_macs = self._macs = self._cost.macs
        self._value = self.yardstick.value_of(verdict)
        self._resource = self._dense_resource = self.yardstick.resource_of(self.model)
        return verdict

    def run_stage(self, ratio: float) -> StageRecord:
        """Runs the next stage; the caller adds its record to ``records``.

        Args:
            ratio: The asked ratio that the trajectory is on its way to.

        Raises:
            BudgetUnreachable: If no mode has anything left to give, or stages run out.
            NanLoss: If the loss is not finite.
        """
        limit = self.config.max_stages or 3 * self.config.num_stages
        if len(self.stages) >= limit:
            raise BudgetUnreachable(
                f"ratio {ratio} is not reached after {limit} stages, only {self.ratio:.4f}; "
                "raise max_stages, quantum_cap or stage_quantum",
                self.ratio,
            )
        begin = time.perf_counter()
        run = self._prune if self.search is None else self._search
        opening, train_loss, trained = run(ratio)
        record = self._measure_stage(ratio, opening, train_loss)
        return replace(record, seconds=time.perf_counter() - begin, train_seconds=trained)

    def _prune(self, ratio: float) -> tuple[Opening, float, float]:
        """Raises a threshold and trains; returns what was done, the loss, and the seconds."""
        opening = open_stage(self, ratio)
        begin = time.perf_counter()
        steps = steps_of(self.config, opening.raised.macs / self._dense_macs)
        train_loss = self.take(opening.raised, steps)
        trained = time.perf_counter() - begin
        if self.config.shrink == "stage":
            gather_(self.handle, self.optimizer)
            migrate_optimizer_(self.optimizer, shrink_(self.handle))
            shard_(self.handle, self.optimizer)
        return opening, train_loss, trained

    def _search(self, ratio: float) -> tuple[Opening, float, float]:
        """Does what ``_prune`` does in a stage of UPop's search: it trains and then selects."""
        assert self.search is not None
        assert self._cost is not None
        modes, steps = self.strategy.choose(), self.config.steps_per_stage
        begin = time.perf_counter()
        self.search.watch_()
        train_loss = self.train(UnitChoice({}, 0.0, 0.0), steps)
        self.search.gather_(steps)
        trained = time.perf_counter() - begin
        choice = self.search.update_(
            len(self.stages),
            self._cost.unit_macs,
            self._dense_macs - self._target_macs(ratio),
            min_heads=self.config.min_heads,
            min_channels=self.config.min_channels,
        )
        removed = max(choice.macs, self.config.min_quantum * self._dense_macs, 1.0)
        raised = Raise(choice, {}, choice.threshold, removed)
        return Opening(modes, raised), train_loss, trained

    def raising(self) -> Raising:
        """What the next stage may take of the current model."""
        assert self._cost is not None
        return Raising(self.handle, self.task, self.config, self._cost, self._dense_macs)

    def take(self, raised: Raise, steps: int) -> float:
        """Takes a stage's step: thresholds rise, and the model trains while the units fade.

        With ``recalibrate`` all thresholds are set again after it, so that what went is what the
        step was to remove: neither heads that are gone nor training may move it. With
        ``cost_against="control"`` the next ``measure`` compares with a control.

        Args:
            raised: What the stage removes.
            steps: Optimizer steps.

        Returns:
            The mean training loss.

        Raises:
            NanLoss: If the loss is not finite.
        """
        drops = any(theta > 0 for theta in (self.handle.thresholds | raised.thresholds).values())
        recalibrates = self.config.switches.recalibrate and drops
        target = self.raising().search.start - raised.macs if recalibrates else 0.0
        if self.config.switches.cost_against == "control" and steps:
            self._value = self.control(steps)
        self.handle.thresholds.update(raised.thresholds)
        loss = self.train(raised.choice, steps)
        if recalibrates:
            tolerance = self.config.tolerance * self._dense_macs
            self.handle.thresholds.update(self.raising().search.settle(target, tolerance))
        return loss

    def control(self, steps: int) -> float:
        """Returns what the model would be worth after some steps that prune nothing.

        Trials from one snapshot share ``controls``, so that it is measured once a stage.
        """
        if steps not in self.controls:
            twin = fork(self)
            twin.train(UnitChoice({}, 0.0, 0.0), steps)
            verdict, _ = self.yardstick.evaluate(twin.model, "val")
            self.controls[steps] = self.yardstick.value_of(verdict)
        return self.controls[steps]

    def train(self, choice: UnitChoice, steps: int) -> float:
        """Trains for some steps while the chosen units fade; returns the mean loss.

        Args:
            choice: Units whose masks end at 0, and units that come back before the first step.
            steps: Optimizer steps; with none the units go at once and the loss is 0.

        Raises:
            NanLoss: If the loss is not finite.
        """
        stage = len(self.stages) + 1
        decay = max(1, round(self.config.decay_share * steps))
        bring_back_(self.handle, choice)
        batches = self.task.train_batches(
            batch_size=self.config.part_size,
            seed=self.config.seed,
            start=self._step * self.config.accumulate,
            shard=self.handle.workers.shard,
        )
        total = 0.0
        self.model.train()
        with torch.random.fork_rng(devices=self._rng_devices()):
            torch.manual_seed(self._random_seed(stage))
            for step in range(1, steps + 1):
                loss = train_step(
                    self.model, self.task, batches, self.optimizer, self.config, self.teacher
                )
                if not math.isfinite(loss):
                    raise NanLoss(
                        f"the training loss became {loss} in stage {stage}, step {step}; the "
                        f"state after stage {stage - 1} is intact; lower learning_rate",
                        stage,
                    )
                total += loss
                fade_(self.handle, choice, mask_value(step, decay))
        fade_(self.handle, choice, 0.0)
        self.optimizer.zero_grad(set_to_none=True)
        give_back(bytes_of(self.model.parameters()))
        self._step += steps
        return total / max(steps, 1)

    def _random_seed(self, place: int) -> int:
        """Seed of dropout at a place of the run; every worker has its own."""
        return self.config.seed * 1_000_003 + place + self.handle.workers.rank * 2**40

    def _rng_devices(self) -> list[int]:
        return [self.device.index or 0] if self.device.type == "cuda" else []

    def _measure_stage(self, ratio: float, opening: Opening, train_loss: float) -> StageRecord:
        """Evaluates a trained stage; the times of the record other than its own are left out."""
        modes, raised = opening.modes, opening.raised
        begin = time.perf_counter()
        verdict, cost = self.measure(raised.macs)
        evaluated = time.perf_counter() - begin
        choice = self.strategy.choice
        by_quantum = self.config.switches.history_by == "quantum"
        self.strategy.record(modes, cost, raised.share if by_quantum else 1.0)
        assert self._cost is not None
        self._value, self._macs = self.yardstick.value_of(verdict), self._cost.macs
        self.controls.clear()
        reached = self.has_reached(ratio)
        self._advance_fixed_strategy()
        return StageRecord(
            stage=len(self.stages) + 1,
            mode=modes,
            choice=choice,
            ratio=self.ratio,
            macs=self._macs,
            params=num_parameters(self.model, self.handle),
            val=verdict.metric,
            val_loss=verdict.loss,
            train_loss=train_loss,
            cost=cost,
            mode_cost=self.strategy.costs.get(modes, cost),
            threshold=raised.threshold,
            units=raised.choice.count,
            tokens=self._cost.last_tokens(),
            seconds=0.0,
            snapshot=ratio if reached else None,
            layers=self.handle.left_in_layers(self._cost),
            eval_seconds=evaluated,
            refreshed=opening.refreshed,
        )

    def measure(self, predicted_macs: float) -> tuple[Evaluation, float]:
        """Evaluates the model as it is now.

        Args:
            predicted_macs: Multiply-adds that the raise before it was to remove.

        Returns:
            The verdict on the validation subset and the cost r of Eq. 8, or against the control.
        """
        verdict, self._cost = self.yardstick.evaluate(self.model, "val")
        lost = self._value - self.yardstick.value_of(verdict)
        return verdict, lost / self._removed_share(predicted_macs)

    def _removed_share(self, predicted_macs: float) -> float:
        """Share of the dense model's resource that the stage removed (denominator of Eq. 8).

        With FLOPs, drift that ate the drop is replaced by the drop predicted at the raise. With
        parameters or latency a mode may remove next to nothing; the floor makes it expensive.
        """
        assert self._cost is not None
        if self.config.cost == "macs":
            drop = self._macs - self._cost.macs
            if drop < self.config.min_quantum * self._dense_macs:
                drop = predicted_macs
            return drop / self._dense_macs
        before, self._resource = self._resource, self.yardstick.resource_of(self.model)
        drop = (before - self._resource) / self._dense_resource
        return max(drop, self.config.min_quantum, 1e-6)

    def _advance_fixed_strategy(self) -> None:
        """One-after-the-other schedules turn at 1 - sqrt(1 - p), the symmetric split."""
        turn = 1.0 - math.sqrt(1.0 - self.config.ratios[-1])
        if isinstance(self.strategy, FixedStrategy) and self.ratio >= turn:
            self.strategy.advance()
