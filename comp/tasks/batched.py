"""A task's two ways through its splits: shuffled without end, and once in stored order."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic

from torch import Tensor, nn

from comp.tasks.base import ALONE, Batch, Prediction, Shard
from comp.tasks.batching import Sample, ordered_batches, sample_splits, shuffled_batches


class BatchedTask(ABC, Generic[Sample]):
    """What a batch is made of is the task's own; which samples are in it is decided here.

    Args:
        samples: Samples by split.
        augment: Whether training images are shifted and scaled a little.
        flip: Whether it also mirrors half of them.

    Attributes:
        name: The task's name.
        samples: Samples by split.
    """

    name: str

    def __init__(self, samples: Mapping[str, Any], *, augment: bool, flip: bool = False) -> None:
        self.samples = sample_splits(samples)
        self._augment, self._flip = augment, flip

    def train_batches(
        self, *, batch_size: int, seed: int, start: int = 0, shard: Shard = ALONE
    ) -> Iterator[Batch]:
        """Yields shuffled training batches without end; see ``Task``.

        Raises:
            ValueError: If there is no training split.
        """
        if "train" not in self.samples:
            raise ValueError(
                f"training for task {self.name!r} needs a split train, but the data set has only "
                f"{', '.join(self.samples)}; import its training files too"
            )

        def collate(chosen: Sequence[Sample], pixels: Tensor, step: int) -> Batch:
            return self._batch(chosen, pixels, (seed, step))

        return shuffled_batches(
            self.samples["train"],
            self._images,
            collate,
            batch_size=batch_size,
            seed=seed,
            start=start,
            shard=shard,
            augment=self._augment,
            flip=self._flip,
        )

    def batches(
        self, split: str, *, batch_size: int, num_samples: int | None = None
    ) -> Iterator[Batch]:
        """Yields a split once in a fixed order; see ``Task``."""
        return ordered_batches(
            self.samples,
            self._images,
            self._batch,
            split,
            batch_size=batch_size,
            num_samples=num_samples,
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the scalar training loss; see ``Task``."""
        return self._judge(model, batch)[0]

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        """Returns what a model says of a training batch; see ``PredictingTask``."""
        return self._judge(model, batch)[1]()

    def loss_and_prediction(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Prediction]:
        """Returns what ``loss`` and ``predict`` return, of one forward pass."""
        loss, predicted = self._judge(model, batch)
        return loss, predicted()

    @abstractmethod
    def _judge(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Callable[[], Prediction]]:
        """Returns the training loss and what makes the prediction behind it, if asked for."""

    @abstractmethod
    def _images(self, chosen: Sequence[Sample]) -> Tensor:
        """Returns the pixels of samples, 0..255, ``(B, 3, H, W)``."""

    @abstractmethod
    def _batch(
        self, chosen: Sequence[Sample], pixels: Tensor, drawn: tuple[int, int] | None
    ) -> Batch:
        """Makes a batch of samples and their pixels.

        Args:
            chosen: The samples.
            pixels: Their images.
            drawn: Seed and step, which decide whatever training draws; ``None`` in stored order.
        """
