"""What the stage loop asks of a task: batches, a loss and a metric."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

Batch = dict[str, Any]
Shard = tuple[int, int]
"""Rank and number of the workers that take training batches by turns."""

ALONE: Shard = (0, 1)


@dataclass(frozen=True)
class Evaluation:
    """A task's verdict on a model.

    Attributes:
        metric: The number people quote, in points of 100, higher is better.
        loss: Mean loss per sample.
        num_samples: Samples behind both.
        details: What else papers report, by name; only of a final evaluation.
        outcomes: The metric of every sample, packed (``comp.results.pack_outcomes``); only of a
            final evaluation whose metric is their mean.
    """

    metric: float
    loss: float
    num_samples: int
    details: dict[str, float] = field(default_factory=dict)
    outcomes: str = field(default="", repr=False)


@dataclass(frozen=True)
class Prediction:
    """What a model says of a training batch, to be held against what another one says of it.

    Attributes:
        logits: A row for everything that is chosen (a class, a word, a match), ``(R, C)``.
        weights: What each row counts in the batch's loss, ``(R,)``.
    """

    logits: Tensor
    weights: Tensor


class Task(Protocol):
    """A data set, its batch layout, its loss and its metric.

    All methods are deterministic given their arguments: the same seed and step give the same
    batch in another process, which is what makes a run restartable.

    Attributes:
        name: For example ``"vqa"``.
        metric_name: For example ``"accuracy"``.
    """

    name: str
    metric_name: str

    def train_batches(
        self, *, batch_size: int, seed: int, start: int = 0, shard: Shard = ALONE
    ) -> Iterator[Batch]:
        """Yields shuffled training batches without end, from step ``start`` on.

        ``train_batches(seed=s, start=k)`` continues ``train_batches(seed=s)`` after ``k`` batches
        without reading those. Of ``n`` workers the one with ``shard=(r, n)`` gets the batches of
        steps ``start + r``, ``start + r + n`` and so on, without reading the others'.
        """
        ...

    def batches(
        self, split: str, *, batch_size: int, num_samples: int | None = None
    ) -> Iterator[Batch]:
        """Yields a split once in a fixed order: its first ``num_samples``, or all of it.

        Splits are stored shuffled, so the first samples are a fair subset. Training augmentation
        is off.

        Raises:
            ValueError: If the split does not exist.
        """
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the scalar training loss; batch tensors already are on the model's device."""
        ...

    def score(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns metric (0..1, higher is better) and loss of every sample, each ``(B,)``.

        Runs under ``no_grad`` in eval mode. A forward pass that deployment would not run (the loss
        of a generative model, say) stands inside ``comp.blocks.unmetered(model)``.
        """
        ...


@runtime_checkable
class PredictingTask(Task, Protocol):
    """A task whose loss comes from logits, so that a model can learn from another's.

    The rows of a prediction depend on the batch alone, not on the model.
    """

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        """Returns a prediction on a training batch; draws no random numbers in eval mode."""
        ...

    def loss_and_prediction(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Prediction]:
        """Returns what ``loss`` and ``predict`` return, of one forward pass."""
        ...


@runtime_checkable
class SplitTask(Task, Protocol):
    """A task whose metric compares every sample with all others of a split, as retrieval does.

    ``score`` then judges within a batch, which is enough to measure a cost or collect
    statistics; ``comp.evaluation.evaluate`` collects features over the split instead.
    """

    def features(self, model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
        """Returns what the metric needs of every sample, each ``(B, ...)``.

        Called as ``score`` is.
        """
        ...

    def score_features(self, *features: Tensor) -> tuple[Tensor, Tensor]:
        """Returns metric and loss of every sample of a split, each ``(S,)``, as ``score`` does.

        The arguments are the features of all batches, ``(S, ...)``.
        """
        ...


@runtime_checkable
class ReportingTask(SplitTask, Protocol):
    """A task of which papers report more than the stage loop needs, as re-ranked retrieval."""

    def report(
        self, model: nn.Module, batches: Iterable[Batch], *features: Tensor
    ) -> tuple[float, dict[str, float]]:
        """Returns the metric that papers report (0..1), and more figures by name.

        Args:
            model: An attached model in eval mode, under ``no_grad``.
            batches: The split's batches once more, on the model's device.
            features: As for ``score_features``.
        """
        ...


@runtime_checkable
class PreparingTask(Protocol):
    """A task that trains something which the model's stock class lacks."""

    def prepare_(self, model: nn.Module) -> None:
        """Adds it to an attached model, in place, before its optimizer is made; once is enough."""
        ...
