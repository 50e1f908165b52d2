"""What a run measures of a model: accuracy and cost on its subsets, latency, and curve points."""

import copy

from torch import device as Device
from torch import nn

from comp.config import PruningConfig
from comp.cost import Measurement
from comp.evaluation import evaluate, to_device
from comp.finetune import FineTuned
from comp.handle import handle_of
from comp.measure import compare_latency
from comp.parking import ParkedModel
from comp.results import CurvePoint
from comp.shrink import num_parameters
from comp.tasks.base import Evaluation, ReportingTask, Task
from comp.workers import ALONE, Workers


class Yardstick:
    """Measures all models of one run alike.

    Args:
        task: The task.
        config: Subset sizes, batch size, what counts as value and as resource.
        device: Where models are.
        dense_model: The dense model, to compare latencies with, or where it waits.
        dense_params: Its parameters.
        model_name: Written into the points.
        workers: Take the first one's latency.
    """

    def __init__(
        self,
        task: Task,
        config: PruningConfig,
        device: Device,
        dense_model: nn.Module | ParkedModel,
        dense_params: int,
        model_name: str,
        workers: Workers = ALONE,
    ) -> None:
        self._task, self._config, self._device = task, config, device
        self._dense_model, self._dense_params = dense_model, dense_params
        self._model_name, self._workers = model_name, workers

    def evaluate(
        self, model: nn.Module, split: str, *, final: bool = False
    ) -> tuple[Evaluation, Measurement]:
        """Evaluates an attached model on the run's subset of a split; see ``comp.evaluation``."""
        config = self._config
        return evaluate(
            model,
            self._task,
            split,
            batch_size=config.eval_batch_size,
            num_samples=config.test_samples if split == "test" else config.eval_samples,
            device=self._device,
            mixed=config.autocast,
            final=final,
        )

    def value_of(self, verdict: Evaluation) -> float:
        """What stages want to keep high: the metric, or minus the loss."""
        return verdict.metric if self._config.val_metric == "metric" else -verdict.loss

    def resource_of(self, model: nn.Module) -> float:
        """Parameters or milliseconds of a model, whichever the cost counts; 0 if FLOPs."""
        if self._config.cost == "params":
            return float(num_parameters(model, handle_of(model)))
        return self.latency_of(model)[1] if self._config.cost == "latency" else 0.0

    def latency_of(self, model: nn.Module | None) -> tuple[float, float]:
        """Median milliseconds of a batch by the dense model and by a model, interleaved.

        Args:
            model: The model; ``None`` is the dense one itself.
        """
        batches = self._task.batches("val", batch_size=self._config.eval_batch_size)
        batch = to_device(next(iter(batches)), self._device)
        dense = self.dense_here()
        report = compare_latency(dense, model or dense, self._task, batch, repeats=7)
        return self._workers.first((report.dense_ms, report.pruned_ms))

    def dense_here(self) -> nn.Module:
        """Returns the dense model on this device, for as long as the caller holds it.

        It may be the one that all runs of a process share, which nobody must change.
        """
        dense = self._dense_model
        if isinstance(dense, ParkedModel):
            dense = dense.build()
        on_device = next(dense.parameters()).device == self._device
        return dense if on_device else copy.deepcopy(dense).to(self._device)

    def dense_point(self, model: nn.Module, verdict: Evaluation, cost: Measurement) -> CurvePoint:
        """Makes the dense model's point, which reads the test split.

        Args:
            model: The model before its first stage.
            verdict: Its verdict on the validation subset.
            cost: Its cost on the same samples.
        """
        val = self._reported(model, verdict)
        test, _ = self.evaluate(model, "test", final=True)
        latency = self.latency_of(None)[1]
        return CurvePoint(
            model=self._model_name,
            task=self._task.name,
            method="dense",
            seed=self._config.seed,
            ratio_asked=0.0,
            ratio_reached=0.0,
            gmacs=cost.macs / 1e9,
            params=self._dense_params,
            val=val.metric,
            test=test.metric,
            val_before_tuning=verdict.metric,
            latency_ms=latency,
            dense_latency_ms=latency,
            fine_tuned=0,
            test_ratio=0.0,
            layers=handle_of(model).left_in_layers(cost),
            details=test.details,
            outcomes=test.outcomes,
        )

    def point(
        self, model: nn.Module, tuned: FineTuned, *, ratio: float, before: float, dense_macs: float
    ) -> CurvePoint:
        """Makes the point of a shrunk and fine-tuned model, which reads the test split.

        Args:
            model: The model.
            tuned: What its fine-tuning chose.
            ratio: The FLOPs ratio that was asked for.
            before: Validation metric before the fine-tuning.
            dense_macs: Mean multiply-adds of the dense model.
        """
        handle = handle_of(model)
        verdict = self._reported(model, tuned.validation)
        test, test_cost = self.evaluate(model, "test", final=True)
        dense_ms, pruned_ms = self.latency_of(model)
        return CurvePoint(
            model=self._model_name,
            task=self._task.name,
            method=self._config.method,
            seed=self._config.seed,
            ratio_asked=ratio,
            ratio_reached=1.0 - tuned.cost.macs / dense_macs,
            gmacs=tuned.cost.macs / 1e9,
            params=num_parameters(model, handle),
            val=verdict.metric,
            test=test.metric,
            val_before_tuning=before,
            latency_ms=pruned_ms,
            dense_latency_ms=dense_ms,
            fine_tuned=self._config.fine_tune_steps,
            test_ratio=1.0 - test_cost.macs / dense_macs,
            layers=handle.left_in_layers(tuned.cost),
            details=test.details,
            outcomes=test.outcomes,
        )

    def _reported(self, model: nn.Module, verdict: Evaluation) -> Evaluation:
        """The validation verdict of a point, where that is another than the one of stages."""
        if not isinstance(self._task, ReportingTask):
            return verdict
        return self.evaluate(model, "val", final=True)[0]
