"""NLVR2: is a statement about two images true?"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from comp.data.images import normalize
from comp.tasks.base import Batch
from comp.tasks.batching import jitter, training_order
from comp.tasks.statements import Statement
from comp.tasks.text import TextTokenizer, encode, pad, pad_mask


class NlvrTask:
    """Statements about a left and a right image, true or false.

    Args:
        statements: Statements by split.
        pixels: All images, 0..255, ``(U, 3, H, W)``, uint8.
        tokenizer: The model's tokenizer.
        augment: Whether training images are shifted and scaled a little (never mirrored).
    """

    name = "nlvr2"
    metric_name = "accuracy"

    def __init__(
        self,
        statements: Mapping[str, Sequence[Statement]],
        pixels: Tensor,
        tokenizer: TextTokenizer,
        *,
        augment: bool = True,
    ) -> None:
        self.statements = {split: tuple(made) for split, made in statements.items()}
        self._pixels = pixels
        self._augment = augment
        self._pad_id = int(tokenizer.pad_token_id or 0)
        self._text_ids = {
            split: encode(tokenizer, [statement.text for statement in made])
            for split, made in self.statements.items()
        }

    def train_batches(self, *, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Yields shuffled training batches without end; see ``Task``."""
        order = training_order(
            len(self.statements["train"]), batch_size=batch_size, seed=seed, start=start
        )
        for step, indexes in order:
            pixels = self._images("train", indexes)
            if self._augment:
                pixels = jitter(pixels, seed=seed, step=step, flip=False)
            yield self._batch("train", indexes, pixels)

    def batches(
        self, split: str, *, batch_size: int, num_samples: int | None = None
    ) -> Iterator[Batch]:
        """Yields a split once in a fixed order; see ``Task``."""
        if split not in self.statements:
            raise ValueError(
                f"split must be one of {', '.join(self.statements)}, but got {split!r}"
            )
        end = len(self.statements[split])
        end = min(end, num_samples or end)
        for first in range(0, end, batch_size):
            indexes = list(range(first, min(first + batch_size, end)))
            yield self._batch(split, indexes, self._images(split, indexes))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the mean cross-entropy of the labels."""
        loss: Tensor = model(**batch).loss
        return loss

    def score(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns whether each statement is judged right, and its cross-entropy."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs).logits.float()  # (B, 2)
        labels = batch["labels"]
        right = (logits.argmax(1) == labels).float()
        return right, functional.cross_entropy(logits, labels, reduction="none")

    def _images(self, split: str, indexes: Sequence[int]) -> Tensor:
        """Returns left and right images by turns, ``(2 B, 3, H, W)``."""
        made = self.statements[split]
        return self._pixels[[image for index in indexes for image in made[index].images]]

    def _batch(self, split: str, indexes: Sequence[int], pixels: Tensor) -> Batch:
        texts = [self._text_ids[split][index] for index in indexes]
        labels = [int(self.statements[split][index].label) for index in indexes]
        return {
            "pixel_values": normalize(pixels).unflatten(0, (-1, 2)),  # (B, 2, 3, H, W)
            "input_ids": pad(texts, self._pad_id),
            "attention_mask": pad_mask(texts),
            "labels": torch.tensor(labels),
        }
