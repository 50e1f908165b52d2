"""The way of one model through all asked ratios: stages, and a point at each ratio.

``Pruner.run`` is a generator of records and knows no logger, file format or actor. One run
passes through all asked ratios: at each, the trajectory is copied, fine-tuned and tested, which
gives a point of the accuracy-versus-ratio curve, and then goes on untouched. ``trajectory`` leaves
the points out, for callers that have them made elsewhere from a saved snapshot (``finish``). What
a stage does is in ``comp.stages``.

Source: CoMP (arXiv 2604.02956), Section 3 and Algorithm 1.
"""

import copy
import gc
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from comp.collectives import local
from comp.config import PruningConfig
from comp.finetune import fine_tune_
from comp.handle import handle_of
from comp.lookahead import TrialPlan
from comp.opening import trials_before
from comp.parking import parked
from comp.results import CurvePoint, PruningResult, Snapshot, StageRecord
from comp.sharding import gather_, shard_
from comp.shrink import shrink_
from comp.stages import StageLoop
from comp.tasks.base import Task
from comp.workers import ALONE, Workers

_Body = TypeVar("_Body", StageRecord, CurvePoint)


class Pruner(StageLoop):
    """Prunes one model through all asked ratios.

    Args:
        model: A model of a known family; pruned in place.
        task: Batches, loss and metric.
        config: What to do.
        model_name: Written into the points.
        dense: The dense model's point, if it was measured before; otherwise the first thing
            that ``run`` does is to measure it, which reads the test split.
        dense_model: The dense model for latency comparison; ``None`` lets a copy of ``model``
            wait in a temporary file (``comp.parking``).
        workers: The processes that run this loop together, each with the same arguments, and
            share the samples. All yield the same records.

    Attributes:
        records: Everything ``run`` has yielded.
        finished_model: After a ``CurvePoint`` until the next record: the shrunk, fine-tuned model
            behind it.

    Raises:
        ValueError: If the config names a mode that the model does not have, or the workers cannot
            share a batch.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: PruningConfig,
        *,
        model_name: str = "",
        dense: CurvePoint | None = None,
        dense_model: nn.Module | None = None,
        workers: Workers = ALONE,
    ) -> None:
        super().__init__(
            model, task, config, model_name=model_name, dense_model=dense_model, workers=workers
        )
        self.finished_model: nn.Module | None = None
        self._given_dense = dense
        self._num_passed = 0  # asked ratios that the trajectory has reached

    @property
    def points(self) -> list[CurvePoint]:
        """The finished points, the dense model first."""
        return [record for record in self.records if isinstance(record, CurvePoint)]

    @property
    def trials_ahead(self) -> TrialPlan | None:
        """The trials that the next item opens with; ``None`` without any."""
        if not self.records or self._num_passed == len(self.config.ratios):
            return None
        target = self.config.ratios[self._num_passed]
        return None if self.has_reached(target) else trials_before(self, target)

    def run(self) -> Iterator[StageRecord | CurvePoint]:
        """Runs to the last asked ratio, or goes on after ``restore``.

        Yields:
            The dense model's point, then a record per stage, and after the stage that reaches an
            asked ratio that ratio's point. Between two yields the state may be saved.

        Raises:
            BudgetUnreachable: If the kept minima forbid the ratio, or stages run out.
            NanLoss: If the loss of a stage or of a fine-tuning is not finite.
        """
        for body in self.trajectory():
            yield self.finish(body.ratio) if isinstance(body, Snapshot) else body

    def trajectory(self) -> Iterator[StageRecord | CurvePoint | Snapshot]:
        """Runs like ``run``, but only says where an asked ratio is reached.

        Yields:
            The dense model's point, then a record per stage, and a ``Snapshot`` where ``run`` has
            a point. ``finish`` makes the point, here or in a pruner that restored what this one
            saves at the snapshot, with the same result.

        Raises:
            BudgetUnreachable: If the kept minima forbid the ratio, or stages run out.
            NanLoss: If the loss of a stage is not finite.
        """
        if not self.records:
            yield self._note(self._begin())
        elif self._cost is None:
            self._measure_dense()
        while self._num_passed < len(self.config.ratios):
            target = self.config.ratios[self._num_passed]
            if self.has_reached(target):
                self._num_passed += 1
                yield Snapshot(target)
            else:
                self._drop_finished_model()
                yield self._note(self.run_stage(target))

    def _note(self, record: _Body) -> _Body:
        self.records.append(record)
        return record

    def _begin(self) -> CurvePoint:
        point = self._measure_dense()
        self.raising().check_reachable(self.modes, self.config.ratios[-1])
        return point

    def _measure_dense(self) -> CurvePoint:
        verdict = self.measure_dense()
        if self._given_dense is not None:
            return replace(self._given_dense, seed=self.config.seed)
        assert self._cost is not None
        return self.yardstick.dense_point(self.model, verdict, self._cost)

    # --- one point -------------------------------------------------------------------------

    def finish(self, ratio: float) -> CurvePoint:
        """Shrinks a copy of the trajectory, fine-tunes it, and reads the test split once.

        Args:
            ratio: That of the ``Snapshot`` at which this pruner stands.

        Returns:
            The ratio's point; ``finished_model`` is the model behind it.

        Raises:
            NanLoss: If the loss is not finite.
        """
        self._drop_finished_model()
        model = copy.deepcopy(self.model)
        with parked(self._trajectory_tensors()):
            point = self._finish(model, ratio)
        self.finished_model = model
        return self._note(point)

    def _drop_finished_model(self) -> None:
        """Frees its memory at once: a model and its handle hold each other until a sweep."""
        if self.finished_model is not None:
            self.finished_model = None
            gc.collect()

    def _trajectory_tensors(self) -> list[Tensor]:
        """What only stages need: weights, moments, and what a slow copy holds.

        Weights in shards are FSDP2's and stay where they are.
        """
        moments = [local(v) for state in self.optimizer.state.values() for v in state.values()]
        slow = [] if self.handle.momentum is None else self.handle.momentum.held()
        weights = self.model.parameters() if self.handle.sharding is None else ()
        return [*weights, *moments, *slow]

    def _finish(self, model: nn.Module, ratio: float) -> CurvePoint:
        handle = handle_of(model)
        gather_(handle)
        shrink_(handle)
        shard_(handle)
        begin = time.perf_counter()
        with self.teaching() as teacher, torch.random.fork_rng(devices=self._rng_devices()):
            torch.manual_seed(self._random_seed(-self._num_passed))
            tuned = fine_tune_(
                model,
                self.task,
                self.config,
                target_macs=self._target_macs(ratio),
                dense_macs=self._dense_macs,
                batches=self.task.train_batches(
                    batch_size=self.config.part_size,
                    seed=self.config.seed + 1,
                    shard=handle.workers.shard,
                ),
                teacher=teacher,
            )
        seconds = time.perf_counter() - begin
        handle.momentum = None
        gather_(handle)
        before = self.stages[-1].val if self.stages else self.points[0].val
        point = self.yardstick.point(
            model, tuned, ratio=ratio, before=before, dense_macs=self._dense_macs
        )
        return replace(point, fine_tune_seconds=seconds)

    # --- saving ----------------------------------------------------------------------------

    def save(self, directory: str | Path, *, optimizer: bool = True) -> None:
        """Writes everything that ``restore`` needs, atomically; call it between two yields.

        Where weights are in shards, the other workers must call ``lend`` meanwhile.

        Args:
            directory: Made if it is missing.
            optimizer: Whether stages are to go on from it; ``finish`` needs no moments.
        """
        from comp.state import save_state

        save_state(self, Path(directory), optimizer=optimizer)

    def lend(self, *, optimizer: bool = True) -> None:
        """Hands the first worker what it saves, if weights are in shards.

        Args:
            optimizer: As in ``save``.
        """
        from comp.state import tensors_of

        if self.handle.sharding is not None:
            for _ in tensors_of(self, optimizer=optimizer):
                pass

    def restore(self, directory: str | Path) -> None:
        """Takes over a saved state; this pruner must be fresh, with the same dense model.

        Raises:
            CheckpointMismatch: If the state was saved under another config or model.
        """
        from comp.state import load_state

        load_state(self, Path(directory))


def evaluate_dense(
    model: nn.Module,
    task: Task,
    config: PruningConfig,
    *,
    model_name: str = "",
    workers: Workers = ALONE,
) -> CurvePoint:
    """Measures a dense model: validation, test, cost, latency.

    Args:
        model: Stays dense; it ends up attached and on the config's device.
        task: The task.
        config: Subset sizes, device, seed.
        model_name: Written into the point.
        workers: The processes that do this together.
    """
    return Pruner(model, task, config, model_name=model_name, workers=workers)._measure_dense()


def prune(
    model: nn.Module,
    task: Task,
    config: PruningConfig,
    *,
    model_name: str = "",
    directory: str | Path | None = None,
    workers: Workers = ALONE,
) -> PruningResult:
    """Prunes a model to every asked ratio in one go.

    Args:
        model: A model of a known family; pruned in place. Pass a copy to keep the dense one.
        task: Batches, loss and metric, for example from ``comp.build_task``.
        config: What to do.
        model_name: Written into the points.
        directory: Where the state is saved after every stage, so that the same call goes on after
            the last of them; without it a run that ends early leaves nothing.
        workers: The processes that do this together (``Workers.here()`` under ``torchrun``); all
            of them get the same result.

    Returns:
        The most pruned model and the records. ``result.model.save_pretrained(directory)``
        writes it; ``comp.load_pruned(directory)`` reads it in another process.

    Raises:
        UnsupportedModelError: If no family knows the model's class.
        BudgetUnreachable: If the kept minima forbid a ratio.
        NanLoss: If the loss stops being finite.
        CheckpointMismatch: If the directory's state is of another config or model.
    """
    pruner = Pruner(model, task, config, model_name=model_name, workers=workers)
    if directory is not None and (Path(directory) / "state.json").is_file():
        pruner.restore(directory)
    for _ in pruner.run():
        # Not after a point: whoever takes the state up makes its model again.
        if directory is not None and pruner.finished_model is None:
            if workers.is_first:
                pruner.save(directory)
            else:
                pruner.lend()
    return PruningResult(pruner.finished_model, pruner.stages, pruner.points)
