"""Sample images with the patches that a pruned model keeps in every layer."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from comp.data.images import denormalize
from comp.evaluation import evaluating
from comp.handle import handle_of
from comp.tasks.base import Task
from comp.trace import TokenTrace


@dataclass(frozen=True)
class ExampleImage:
    """An image and what is left of it on its way through a model.

    Attributes:
        pixels: Values of 0..255, ``(3, H, W)``, uint8.
        encoder: The encoder that the patches run through.
        kept: By layer, which patches are left behind it, in reading order, ``(P,)`` bool.
    """

    pixels: Tensor
    encoder: str
    kept: dict[int, Tensor]

    @property
    def side(self) -> int:
        """Patches of a row of the square image, 0 if the patches make no square."""
        count = next(iter(self.kept.values())).numel()
        side = round(count**0.5)
        return side if side * side == count else 0


def kept_patches(
    model: nn.Module, task: Task, split: str = "val", *, num_images: int = 4
) -> list[ExampleImage]:
    """Runs the first samples of a split and tells which patches each layer lets through.

    Args:
        model: An attached model, on the CPU.
        task: The task; its batches carry ``pixel_values``.
        split: Which split.
        num_images: How many images at most; a sample may have several.

    Returns:
        The images in the split's order; none if the model's encoders see no patches.
    """
    handle = handle_of(model)
    trace = TokenTrace()
    batch = next(iter(task.batches(split, batch_size=num_images, num_samples=num_images)))
    before = handle.trace, handle.stock_when_idle
    handle.trace, handle.stock_when_idle = trace, False
    try:
        with evaluating(model):
            task.score(model, batch)
    finally:
        handle.trace, handle.stock_when_idle = before
    pixels = denormalize(batch["pixel_values"]).flatten(0, -4)  # (images, 3, H, W)
    passes = [one for one in trace.passes if one.kept]
    if not passes:
        return []
    encoder = passes[0].encoder
    rows = [
        {layer: kept[row] for layer, kept in one.kept.items()}
        for one in passes
        if one.encoder == encoder
        for row in range(len(one.patches))
    ]
    return [
        ExampleImage(image.to(torch.uint8), encoder, kept)
        for image, kept in zip(pixels, rows, strict=False)
    ][:num_images]
