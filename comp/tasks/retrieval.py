"""Image-text retrieval by features: which image belongs to a caption, which caption to an image?

The loss is the symmetric contrastive one of CLIP (arXiv 2103.00020) within a batch. The metric,
the mean of R@1 in both directions, compares all images and captions of a split, and so does the
loss that goes with it; neither depends on the batches in which the features were made.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from comp.blocks import unmetered
from comp.data.images import normalize
from comp.tasks.base import Batch
from comp.tasks.batching import Streamed, ordered_batches, sample_splits, shuffled_batches
from comp.tasks.captions import MAX_CAPTIONS, CaptionedImage, drawn_captions
from comp.tasks.text import TextTokenizer, encode, pad, pad_mask

MAX_SCALE = 100.0
"""CLIP's bound on the learned factor on the similarities."""


class RetrievalTask:
    """Images with one caption each or several, for models with ``get_image_features``.

    Args:
        samples: Samples by split.
        images: Returns the pixels of some samples' images, 0..255, ``(B, 3, H, W)``.
        tokenizer: The model's tokenizer.
        augment: Whether training images are shifted and scaled a little (never mirrored).
    """

    name = "retrieval"
    metric_name = "mean R@1"

    def __init__(
        self,
        samples: Mapping[str, Sequence[CaptionedImage] | Streamed[CaptionedImage]],
        images: Callable[[Sequence[Any]], Tensor],
        tokenizer: TextTokenizer,
        *,
        augment: bool = True,
    ) -> None:
        self.samples = sample_splits(samples)
        self._images = images
        self._augment = augment
        self._tokenizer = tokenizer
        self._pad_id = int(tokenizer.pad_token_id or 0)

    def train_batches(self, *, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Yields shuffled training batches without end, one caption an image; see ``Task``."""

        def collate(chosen: Sequence[CaptionedImage], pixels: Tensor, step: int) -> Batch:
            told = drawn_captions(chosen, seed=seed, step=step)
            return self._batch([[text] for text in told], pixels)

        yield from shuffled_batches(
            self.samples["train"],
            self._pixels,
            collate,
            batch_size=batch_size,
            seed=seed,
            start=start,
            augment=self._augment,
            flip=False,
        )

    def batches(
        self, split: str, *, batch_size: int, num_samples: int | None = None
    ) -> Iterator[Batch]:
        """Yields a split once in a fixed order; a sample is an image with its captions."""

        def collate(chosen: Sequence[CaptionedImage], pixels: Tensor, step: None) -> Batch:
            return self._batch([one.captions[:MAX_CAPTIONS] for one in chosen], pixels)

        yield from ordered_batches(
            self.samples,
            self._pixels,
            collate,
            split,
            batch_size=batch_size,
            num_samples=num_samples,
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the symmetric contrastive loss of each image's first caption."""
        images, texts = _first_captions(model, batch)
        return compare(images, texts)[1].mean()

    def score(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns both R@1 and the loss within the batch, of each image's first caption."""
        return compare(*_first_captions(model, batch))

    def features(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Returns features of images and captions, and which captions there are.

        The metered cost of a sample is that of the image and its first caption.

        Returns:
            ``(B, D)``, ``(B, MAX_CAPTIONS, D)`` and ``(B, MAX_CAPTIONS)``, bool.
        """
        images, first = _first_captions(model, batch)
        known = batch["attention_mask"].any(dim=2)  # (B, C)
        texts = first.new_zeros(len(first), MAX_CAPTIONS, first.shape[2])
        texts[:, :1] = first
        with unmetered(model):
            for caption in range(1, known.shape[1]):
                rows = known[:, caption]
                told = {name: batch[name][rows] for name in ("input_ids", "attention_mask")}
                texts[rows, caption] = _text_features(model, told, caption)
        return images, texts, functional.pad(known, (0, MAX_CAPTIONS - known.shape[1]))

    def score_features(
        self, images: Tensor, texts: Tensor, known: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns every image's share of the mean of both R@1, and its loss, each ``(S,)``."""
        return compare(images, texts, known)

    def _pixels(self, chosen: Sequence[CaptionedImage]) -> Tensor:
        return self._images([one.image for one in chosen])

    def _batch(self, told: Sequence[Sequence[str]], pixels: Tensor) -> Batch:
        ids = iter(encode(self._tokenizer, [text for texts in told for text in texts]))
        most = max(len(texts) for texts in told)
        rows = [[next(ids) for _ in texts] + [[]] * (most - len(texts)) for texts in told]
        flat = [one for row in rows for one in row]
        shape = (len(told), most)
        return {
            "pixel_values": normalize(pixels),
            "input_ids": pad(flat, self._pad_id).unflatten(0, shape),  # (B, C, N)
            "attention_mask": pad_mask(flat).unflatten(0, shape),  # all zero where none is
        }


def compare(
    images: Tensor, texts: Tensor, known: Tensor | None = None, *, chunk: int = 256
) -> tuple[Tensor, Tensor]:
    """Holds every image against every caption.

    Args:
        images: Features, already scaled, ``(S, D)``.
        texts: Features of the captions of each image, ``(S, C, D)``.
        known: Which captions there are, the first of every image among them, ``(S, C)``; all of
            them if ``None``.
        chunk: Images whose similarities are held in memory at once.

    Returns:
        Per image, each ``(S,)``: a value whose mean is that of the two R@1, over images and over
        captions, and the mean of both cross-entropies, several captions of one image being
        equally right.
    """
    num_images, num_captions = texts.shape[:2]
    if known is None:
        known = torch.ones(num_images, num_captions, dtype=torch.bool, device=texts.device)
    weight = num_images / known.sum()  # of a caption beside an image
    hits, losses = [], []
    with torch.autocast(images.device.type, enabled=False):
        images, texts = images.float(), texts.float()
        for start in range(0, num_images, chunk):
            own = torch.arange(start, min(start + chunk, num_images), device=images.device)
            there = known[own].float()  # (K, C)
            by_image = images[own] @ texts.flatten(0, 1).mT  # (K, S * C)
            by_image = by_image.masked_fill(~known.flatten(), -math.inf)
            by_text = texts[own] @ images.mT  # (K, C, S)
            right = by_text.gather(2, own[:, None, None].expand(-1, num_captions, 1))[..., 0]
            found = (by_image.argmax(dim=1) // num_captions == own).float()
            named = (by_text.argmax(dim=2) == own[:, None]).float()
            hits.append((found + weight * (named * there).sum(dim=1)) / 2)
            missed = ((by_text.logsumexp(dim=2) - 2 * right) * there).sum(dim=1)
            losses.append((by_image.logsumexp(dim=1) + missed / there.sum(dim=1)) / 2)
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
