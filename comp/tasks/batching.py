"""Samples to batches: their order, and the small random shifts of their images.

Everything here depends on the seed and the step alone, so that a run may start at any step.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from comp.data.images import ImageTransform, decode_image
from comp.data.layout import EncodedImage, Row, Rows, epoch_order
from comp.tasks.base import ALONE, Batch, Shard

Sample = TypeVar("Sample")


class Samples(Protocol[Sample]):
    """The samples of a split, in memory or in a file.

    Attributes:
        blocks: How many of them lie beside each other in the file.
    """

    blocks: tuple[int, ...]

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def fetch(self, indexes: Sequence[int]) -> list[Sample]:
        """Returns samples by number."""
        ...


class InMemory(tuple[Sample, ...]):
    """Samples that are all there; one block."""

    @property
    def blocks(self) -> tuple[int, ...]:
        """The only block."""
        return (len(self),)

    def fetch(self, indexes: Sequence[int]) -> list[Sample]:
        """Returns samples by number."""
        return [self[index] for index in indexes]


class Streamed(Generic[Sample]):
    """Samples that are read from a data set when they are asked for.

    Args:
        rows: A split.
        convert: Makes a sample of a row.
    """

    def __init__(self, rows: Rows, convert: Callable[[Row], Sample]) -> None:
        self._rows = rows
        self._convert = convert
        self.blocks = rows.blocks

    def __len__(self) -> int:
        return len(self._rows)

    def fetch(self, indexes: Sequence[int]) -> list[Sample]:
        """Returns samples by number, in the order asked for."""
        return [self._convert(row) for row in self._rows.fetch(indexes)]


def sample_splits(splits: Mapping[str, Any]) -> dict[str, Any]:
    """Returns splits as ``Samples``: sequences are taken into memory."""
    return {
        name: samples if isinstance(samples, Streamed) else InMemory(samples)
        for name, samples in splits.items()
    }


class Images:
    """Where the pixels of samples come from: a tensor of all images, or encoded files.

    Args:
        pixels: All images, 0..255, ``(U, 3, H, W)``, uint8, or ``None`` if images are encoded.
        transform: How encoded images become the model's, and how the model normalises all.
        root: Folder that paths of encoded images start from.
    """

    def __init__(
        self,
        pixels: Tensor | None = None,
        *,
        transform: ImageTransform | None = None,
        root: Path | None = None,
    ) -> None:
        self._pixels = pixels
        self._transform = transform
        self._root = root

    def __call__(self, images: Sequence[Any]) -> Tensor:
        """Returns images by index or as decoded, ``(B, 3, H, W)``, for ``normalize``.

        They are 0..255, uint8, unless the model normalises in its own way.

        Raises:
            ValueError: If a file cannot be decoded.
            OSError: If a file is gone.
        """
        if self._pixels is not None:
            pixels = self._pixels[list(images)]
        else:
            pixels = torch.stack([self._decode(image) for image in images])
        return pixels if self._transform is None else self._transform.restated(pixels)

    def _decode(self, image: EncodedImage) -> Tensor:
        assert self._transform is not None, "encoded images need a transform"
        return self._transform(decode_image(image.read(self._root)))


def shuffled_batches(
    samples: Samples[Sample],
    images: Callable[[Sequence[Sample]], Tensor],
    collate: Callable[[Sequence[Sample], Tensor, int], Batch],
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    augment: bool,
    flip: bool,
    shard: Shard = ALONE,
) -> Iterator[Batch]:
    """Yields shuffled training batches without end, each a function of seed and step.

    Args:
        samples: The training split.
        images: Pixels of some samples, 0..255, ``(B, 3, H, W)``.
        collate: Makes a batch of samples, their pixels and the step.
        batch_size: Samples of a batch.
        seed: Seed of the run.
        start: The first step.
        augment: Whether images are shifted and scaled a little.
        flip: Whether that mirrors half of them.
        shard: Rank and number of workers: worker ``r`` of ``n`` yields every ``n``-th batch from
            step ``start + r`` on, so all of them together yield what one would.

    Raises:
        ValueError: If the split is empty or the shard is out of bounds.
    """
    order = training_order(
        samples.blocks, batch_size=batch_size, seed=seed, start=start, shard=shard
    )
    for step, indexes in order:
        chosen = samples.fetch(indexes)
        pixels = images(chosen)
        if augment and len(pixels):
            pixels = jitter(pixels, seed=seed, step=step, flip=flip)
        yield collate(chosen, pixels, step)


def ordered_batches(
    splits: Mapping[str, Samples[Sample]],
    images: Callable[[Sequence[Sample]], Tensor],
    collate: Callable[[Sequence[Sample], Tensor, None], Batch],
    split: str,
    *,
    batch_size: int,
    num_samples: int | None = None,
) -> Iterator[Batch]:
    """Yields a split once in stored order: its first ``num_samples``, or all of it.

    Args:
        splits: The samples of every split.
        images: Pixels of some samples.
        collate: Makes a batch of samples and their pixels; the step is ``None``.
        split: Which split.
        batch_size: Samples of a batch.
        num_samples: The first so many, or all.

    Raises:
        ValueError: If the split does not exist.
    """
    samples = split_of(splits, split)
    end = len(samples)
    end = min(end, num_samples or end)
    for first in range(0, end, batch_size):
        chosen = samples.fetch(range(first, min(first + batch_size, end)))
        yield collate(chosen, images(chosen), None)


def split_of(splits: Mapping[str, Samples[Sample]], split: str) -> Samples[Sample]:
    """Returns the samples of a split.

    Raises:
        ValueError: If the data set does not hold it.
    """
    if split not in splits:
        raise ValueError(
            f"split must be one of {', '.join(splits)}, but got {split!r}; name one that is there "
            "or import that split's files too"
        )
    return splits[split]


def training_order(
    num_samples: int | Sequence[int],
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    shard: Shard = ALONE,
) -> Iterator[tuple[int, list[int]]]:
    """Yields the step and the sample indexes of one batch after another, without end.

    Every epoch has a permutation of its own; a batch may lie across the border of two.

    Args:
        num_samples: Samples of an epoch; or how many lie in each row group of a file, which are
            then shuffled as ``epoch_order`` does.
        batch_size: Samples of a batch.
        seed: Seed of the permutations.
        start: The first step to yield; those before are not computed.
        shard: Rank and number of workers that take steps by turns.

    Raises:
        ValueError: If there are no samples, or ``batch_size``, ``start`` or ``shard`` is out of
            bounds.
    """
    blocks = (num_samples,) if isinstance(num_samples, int) else tuple(num_samples)
    num_samples = sum(blocks)
    rank, workers = shard
    if not 0 <= rank < workers:
        raise ValueError(f"shard must be (rank, workers) with rank in [0, {workers}), got {rank}")
    if num_samples < 1 or batch_size < 1 or start < 0:
        raise ValueError(
            "num_samples and batch_size must be at least 1 and start at least 0, but got "
            f"{num_samples}, {batch_size} and {start}"
        )
    epoch = -1
    order = np.empty(0, dtype=np.int64)
    step = start + rank
    while True:
        batch: list[int] = []
        for place in range(step * batch_size, (step + 1) * batch_size):
            if place // num_samples != epoch:
                epoch = place // num_samples
                order = epoch_order(blocks, seed=seed, epoch=epoch)
            batch.append(int(order[place % num_samples]))
        yield step, batch
        step += workers


def jitter(
    pixels: Tensor, *, seed: int, step: int, flip: bool, shift: float = 0.06, scale: float = 0.1
) -> Tensor:
    """Shifts, scales and perhaps mirrors images a little, each in its own way.

    Args:
        pixels: Values of 0..255 on white ground, ``(B, 3, H, W)``.
        seed: Seed of the run.
        step: Training step; with the seed it decides the result.
        flip: Whether half of the images are mirrored.
        shift: Largest shift as a share of the width.
        scale: Largest change of size.

    Returns:
        Values of 0..255, ``(B, 3, H, W)``, float32; what comes in from outside repeats the
        border.
    """
    num = pixels.shape[0]
    random = np.random.default_rng((seed, step, 1)).random((4, num))
    size = 1.0 + scale * (2.0 * random[0] - 1.0)
    matrix = np.zeros((num, 2, 3))
    matrix[:, 0, 0] = size * np.where(flip & (random[3] < 0.5), -1.0, 1.0)
    matrix[:, 1, 1] = size
    matrix[:, :, 2] = 2.0 * shift * (2.0 * random[1:3].T - 1.0)
    theta = torch.from_numpy(matrix).float()
    grid = functional.affine_grid(theta, list(pixels.shape), align_corners=False)
    return functional.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)
