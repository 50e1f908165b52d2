"""NLVR2: is a statement about two images true?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from comp.data.images import normalize
from comp.data.layout import EncodedImage, Row
from comp.tasks.base import Batch, Prediction
from comp.tasks.batched import BatchedTask
from comp.tasks.batching import (
    Images,
    Streamed,
)
from comp.tasks.statements import Statement
from comp.tasks.text import TextTokenizer, encode, pad, pad_mask, without_marks

MAX_WORDS = 40
"""Words of a statement that are read (BLIP)."""


@dataclass(frozen=True)
class StoredStatement:
    """A statement about two encoded images.

    Attributes:
        images: The left and the right image.
        text: The statement.
        label: Whether it is true.
    """

    images: tuple[EncodedImage, ...]
    text: str
    label: bool


PairStatement = Statement | StoredStatement


def stored_statement(row: Row) -> StoredStatement:
    """Makes a statement of a row of kind ``statements``, without the marks BLIP never sees."""
    text = without_marks(row.texts[0], between=" ")
    return StoredStatement(tuple(row.images), text, row.labels[0] == "true")


class NlvrTask(BatchedTask[PairStatement]):
    """Statements about a left and a right image, true or false.

    Args:
        statements: Statements by split.
        pixels: All images, 0..255, ``(U, 3, H, W)``, uint8, or where to decode them.
        tokenizer: The model's tokenizer.
        augment: Whether training images are shifted and scaled a little (never mirrored).
    """

    name = "nlvr2"
    metric_name = "accuracy"

    def __init__(
        self,
        statements: Mapping[str, Sequence[Statement] | Streamed[StoredStatement]],
        pixels: Tensor | Images,
        tokenizer: TextTokenizer,
        *,
        augment: bool = True,
    ) -> None:
        super().__init__(statements, augment=augment)
        self.statements = self.samples
        self._pixels = pixels if isinstance(pixels, Images) else Images(pixels)
        self._tokenizer = tokenizer
        self._pad_id = int(tokenizer.pad_token_id or 0)

    def _judge(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Callable[[], Prediction]]:
        """Returns the mean cross-entropy of the labels."""
        said = model(**batch)
        shares = torch.full((len(said.logits),), 1 / len(said.logits), device=said.logits.device)
        return said.loss, lambda: Prediction(said.logits, shares)

    def score(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns whether each statement is judged right, and its cross-entropy."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs).logits.float()  # (B, 2)
        labels = batch["labels"]
        right = (logits.argmax(1) == labels).float()
        return right, functional.cross_entropy(logits, labels, reduction="none")

    def _images(self, made: Sequence[PairStatement]) -> Tensor:
        """Returns left and right images by turns, ``(2 B, 3, H, W)``."""
        return self._pixels([image for one in made for image in one.images])

    def _batch(
        self, made: Sequence[PairStatement], pixels: Tensor, drawn: tuple[int, int] | None = None
    ) -> Batch:
        texts = encode(self._tokenizer, [" ".join(one.text.split()[:MAX_WORDS]) for one in made])
        return {
            "pixel_values": normalize(pixels).unflatten(0, (-1, 2)),  # (B, 2, 3, H, W)
            "input_ids": pad(texts, self._pad_id),
            "attention_mask": pad_mask(texts),
            "labels": torch.tensor([int(one.label) for one in made]),
        }
