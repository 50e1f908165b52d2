"""Image-text retrieval by features: which image belongs to a caption, which caption to an image?

The loss is the symmetric contrastive one of CLIP (arXiv 2103.00020) within a batch. The metric,
the mean of R@1 in both directions, compares all images and captions of a split, and so does the
loss that goes with it; neither depends on the batches in which the features were made.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from comp.blocks import unmetered
from comp.data.images import normalize
from comp.tasks.base import Batch
from comp.tasks.batching import jitter, training_order
from comp.tasks.text import TextTokenizer, encode, pad, pad_mask

MAX_SCALE = 100.0
"""CLIP's bound on the learned factor on the similarities."""


class RetrievalTask:
    """Images with several captions each, for models with ``get_image_features``.

    Args:
        captions: Captions of every image by split, equally many per image.
        images: Returns the images of some indexes of a split, 0..255, ``(B, 3, H, W)``.
        tokenizer: The model's tokenizer.
        augment: Whether training images are shifted and scaled a little (never mirrored).
    """

    name = "retrieval"
    metric_name = "mean R@1"

    def __init__(
        self,
        captions: Mapping[str, Sequence[Sequence[str]]],
        images: Callable[[str, Sequence[int]], Tensor],
        tokenizer: TextTokenizer,
        *,
        augment: bool = True,
    ) -> None:
        self.captions = {split: tuple(told) for split, told in captions.items()}
        self._images = images
        self._augment = augment
        self._pad_id = int(tokenizer.pad_token_id or 0)
        self._text_ids = {
            split: _by_image(encode(tokenizer, [text for texts in told for text in texts]), told)
            for split, told in self.captions.items()
        }

    def train_batches(self, *, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Yields shuffled training batches without end, one caption an image; see ``Task``."""
        order = training_order(
            len(self.captions["train"]), batch_size=batch_size, seed=seed, start=start
        )
        for step, indexes in order:
            pixels = self._images("train", indexes)
            if self._augment:
                pixels = jitter(pixels, seed=seed, step=step, flip=False)
            draw = np.random.default_rng((seed, step, 2)).random(len(indexes))
            texts = [self._text_ids["train"][index] for index in indexes]
            chosen = [[t[int(d * len(t))]] for t, d in zip(texts, draw.tolist(), strict=True)]
            yield self._batch(chosen, pixels)

    def batches(
        self, split: str, *, batch_size: int, num_samples: int | None = None
    ) -> Iterator[Batch]:
        """Yields a split once in a fixed order; a sample is an image with its captions."""
        if split not in self.captions:
            raise ValueError(f"split must be one of {', '.join(self.captions)}, but got {split!r}")
        end = len(self.captions[split])
        end = min(end, num_samples or end)
        for first in range(0, end, batch_size):
            indexes = list(range(first, min(first + batch_size, end)))
            texts = [self._text_ids[split][index] for index in indexes]
            yield self._batch(texts, self._images(split, indexes))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the symmetric contrastive loss of each image's first caption."""
        images, texts = _first_captions(model, batch)
        return compare(images, texts)[1].mean()

    def score(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns both R@1 and the loss within the batch, of each image's first caption."""
        return compare(*_first_captions(model, batch))

    def features(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns features of images and of all captions, ``(B, D)`` and ``(B, C, D)``.

        The metered cost of a sample is that of the image and its first caption.
        """
        images, first = _first_captions(model, batch)
        with unmetered(model):
            num_more = batch["input_ids"].shape[1] - 1
            more = [_text_features(model, batch, i + 1) for i in range(num_more)]
        return images, torch.cat([first, *(one.unsqueeze(1) for one in more)], dim=1)

    def score_features(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean of both R@1 and the loss of every image, each ``(S,)``."""
        return compare(images, texts)

    def _batch(self, texts: Sequence[Sequence[Sequence[int]]], pixels: Tensor) -> Batch:
        flat = [ids for told in texts for ids in told]
        shape = (len(texts), -1)
        return {
            "pixel_values": normalize(pixels),
            "input_ids": pad(flat, self._pad_id).unflatten(0, shape),  # (B, C, N)
            "attention_mask": pad_mask(flat).unflatten(0, shape),
        }


def compare(images: Tensor, texts: Tensor, *, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """Holds every image against every caption.

    Args:
        images: Features, already scaled, ``(S, D)``.
        texts: Features of the captions of each image, ``(S, C, D)``.
        chunk: Images whose similarities are held in memory at once.

    Returns:
        Per image, each ``(S,)``: the mean of its own R@1 and its captions', and the mean of both
        cross-entropies, several captions of one image being equally right.
    """
    num_images, num_captions = texts.shape[:2]
    hits, losses = [], []
    with torch.autocast(images.device.type, enabled=False):
        images, texts = images.float(), texts.float()
        for start in range(0, num_images, chunk):
            own = torch.arange(start, min(start + chunk, num_images), device=images.device)
            by_image = images[own] @ texts.flatten(0, 1).mT  # (K, S * C)
            by_text = texts[own] @ images.mT  # (K, C, S)
            right = by_text.gather(2, own[:, None, None].expand(-1, num_captions, 1))[..., 0]
            found = (by_image.argmax(dim=1) // num_captions == own).float()
            named = (by_text.argmax(dim=2) == own[:, None]).float().mean(dim=1)
            hits.append((found + named) / 2)
            loss = by_image.logsumexp(dim=1) + by_text.logsumexp(dim=2).mean(dim=1)
            losses.append(loss / 2 - right.mean(dim=1))
    return torch.cat(hits), torch.cat(losses)


def _first_captions(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Features of images ``(B, D)``, scaled, and of their first captions ``(B, 1, D)``."""
    dual: Any = model
    images = dual.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
    scale = dual.logit_scale.clamp(max=math.log(MAX_SCALE)).exp()
    return scale * _unit(images), _text_features(model, batch, 0).unsqueeze(1)


def _text_features(model: nn.Module, batch: Batch, caption: int) -> Tensor:
    dual: Any = model
    return _unit(
        dual.get_text_features(
            input_ids=batch["input_ids"][:, caption],
            attention_mask=batch["attention_mask"][:, caption],
        ).pooler_output
    )


def _unit(features: Tensor) -> Tensor:
    return functional.normalize(features.float(), dim=-1)


def _by_image(
    ids: Sequence[list[int]], captions: Sequence[Sequence[str]]
) -> list[list[list[int]]]:
    """Splits the flat list of all captions' ids into one list per image.

    Raises:
        ValueError: If the images have no caption or not equally many.
    """
    numbers = {len(texts) for texts in captions}
    if len(numbers) != 1 or 0 in numbers:
        raise ValueError(
            f"every image must have the same number of captions, but got {sorted(numbers)}"
        )
    step = numbers.pop()
    return [list(ids[first : first + step]) for first in range(0, len(ids), step)]
