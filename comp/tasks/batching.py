"""The order of training samples and the small random shifts of their images.

Everything here depends on the seed and the step alone, so that a run may start at any step.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


def training_order(
    num_samples: int, *, batch_size: int, seed: int, start: int = 0
) -> Iterator[tuple[int, list[int]]]:
    """Yields the step and the sample indexes of one batch after another, without end.

    Every epoch has a permutation of its own; a batch may lie across the border of two.

    Args:
        num_samples: Samples of an epoch.
        batch_size: Samples of a batch.
        seed: Seed of the permutations.
        start: The first step to yield; those before are not computed.

    Raises:
        ValueError: If there are no samples, or ``batch_size`` or ``start`` is out of bounds.
    """
    if num_samples < 1 or batch_size < 1 or start < 0:
        raise ValueError(
            "num_samples and batch_size must be at least 1 and start at least 0, but got "
            f"{num_samples}, {batch_size} and {start}"
        )
    epoch = -1
    order = np.empty(0, dtype=np.int64)
    step = start
    while True:
        batch: list[int] = []
        for place in range(step * batch_size, (step + 1) * batch_size):
            if place // num_samples != epoch:
                epoch = place // num_samples
                order = np.random.default_rng((seed, epoch)).permutation(num_samples)
            batch.append(int(order[place % num_samples]))
        yield step, batch
        step += 1


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
