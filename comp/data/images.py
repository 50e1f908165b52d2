"""Any encoded image to the RGB pixels that it shows, and pixels to the tensor a model takes."""

import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # openai/CLIP, clip.py; BLIP uses the same
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def decode_image(data: bytes) -> Image.Image:
    """Decodes an encoded image into RGB as a viewer would show it.

    EXIF orientation is applied, transparency lies over white, and 16-bit grey keeps its upper
    eight bits (Pillow's own conversion clips them, which turns such images white).

    Args:
        data: The bytes of a PNG, JPEG, GIF, WebP, TIFF, BMP, ... file; of an animation the first
            frame counts.

    Returns:
        An image of mode ``RGB``.

    Raises:
        ValueError: If the bytes are no image or end too early.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
            if image.mode in _DEEP_MODES:
                return _from_deep_grey(image).convert("RGB")
            if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
                return _over_white(image.convert("RGBA"))
            return image.convert("RGB")
    except (OSError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        unknown = isinstance(
            error, UnidentifiedImageError
        )  # its own text names a buffer's address
        reason = "of no known format" if unknown else error
        raise ValueError(
            f"{len(data)} bytes cannot be decoded as an image ({reason}); "
            "check that the file is complete"
        ) from error


def resize_pixels(image: Image.Image, size: int) -> Tensor:
    """Resizes an RGB image to a square with bicubic filtering, as CLIP and BLIP do.

    Args:
        image: An image of mode ``RGB``; its aspect ratio is not kept (BLIP's evaluation
            transform does not keep it either).
        size: Height and width of the result in pixels.

    Returns:
        Pixels of 0..255, ``(3, size, size)``, uint8.
    """
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return _pixels_of(image)


@dataclass(frozen=True)
class ImageTransform:
    """How a model's images are made of pictures of any shape.

    Attributes:
        size: Height and width in pixels.
        shortest_edge: What the shorter side becomes before the middle is cut out; ``None``
            resizes to a square, whatever the aspect ratio, as BLIP does.
        mean: Of each channel, of values 0..1.
        std: Of each channel, of values 0..1.
    """

    size: int
    shortest_edge: int | None = None
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __call__(self, image: Image.Image) -> Tensor:
        """Returns the pixels of an RGB image, 0..255, ``(3, size, size)``, uint8."""
        if self.shortest_edge is None:
            return resize_pixels(image, self.size)
        return _pixels_of(_middle(image, self.shortest_edge, self.size))

    def restated(self, pixels: Tensor) -> Tensor:
        """Shifts pixels so that ``normalize`` gives what this mean and deviation would.

        Args:
            pixels: Values of 0..255, ``(B, 3, H, W)``.
        """
        if (self.mean, self.std) == (CLIP_MEAN, CLIP_STD):
            return pixels
        mean, std, own_mean, own_std = (
            torch.tensor(values).view(3, 1, 1)
            for values in (CLIP_MEAN, CLIP_STD, self.mean, self.std)
        )
        return ((pixels.float() / 255.0 - own_mean) / own_std * std + mean) * 255.0


def transform_of(processor: Mapping[str, Any], size: int) -> ImageTransform:
    """Reads ``preprocessor_config.json``, as ``transformers`` saves it with a model.

    Args:
        processor: What the file holds; empty means BLIP's own way.
        size: Side of the model's images in pixels.
    """
    edge = processor.get("size")
    if isinstance(edge, Mapping):
        edge = edge.get("shortest_edge")
    elif not processor.get("do_center_crop"):
        edge = None  # older files: a number is both sides where nothing is cropped
    return ImageTransform(
        size,
        int(edge) if edge and processor.get("do_center_crop", True) else None,
        tuple(processor.get("image_mean") or CLIP_MEAN),
        tuple(processor.get("image_std") or CLIP_STD),
    )


def normalize(pixels: Tensor) -> Tensor:
    """Scales bytes to floats with CLIP's mean and standard deviation.

    Args:
        pixels: Values of 0..255, ``(..., 3, H, W)``, uint8 or float.

    Returns:
        Normalised pixels of the same shape, float32.
    """
    mean = torch.tensor(CLIP_MEAN, device=pixels.device).view(3, 1, 1) * 255.0
    std = torch.tensor(CLIP_STD, device=pixels.device).view(3, 1, 1) * 255.0
    return (pixels.float() - mean) / std


def denormalize(pixels: Tensor) -> Tensor:
    """Turns normalised pixels back into values of 0..255, rounded; undoes ``normalize``.

    Args:
        pixels: Normalised pixels, ``(..., 3, H, W)``.
    """
    mean = torch.tensor(CLIP_MEAN, device=pixels.device).view(3, 1, 1) * 255.0
    std = torch.tensor(CLIP_STD, device=pixels.device).view(3, 1, 1) * 255.0
    return (pixels * std + mean).round().clamp(0, 255)


def image_tensor(data: bytes, size: int) -> Tensor:
    """Decodes, resizes and normalises an encoded image.

    Args:
        data: The bytes of an image file.
        size: Height and width of the result in pixels.

    Returns:
        Normalised pixels, ``(3, size, size)``, float32.

    Raises:
        ValueError: If the bytes are no image or end too early.
    """
    return normalize(resize_pixels(decode_image(data), size))


def _pixels_of(image: Image.Image) -> Tensor:
    pixels = np.asarray(image, dtype=np.uint8)  # (H, W, 3)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _middle(image: Image.Image, edge: int, size: int) -> Image.Image:
    """Resizes the shorter side to ``edge`` and cuts a square out of the middle, as CLIP does."""
    width, height = image.size
    scale = edge / min(width, height)
    sides = (edge, int(height * scale)) if width <= height else (int(width * scale), edge)
    resized = image.resize(sides, Image.Resampling.BICUBIC)
    left, top = (sides[0] - size) // 2, (sides[1] - size) // 2
    return resized.crop((left, top, left + size, top + size))


def _over_white(image: Image.Image) -> Image.Image:
    canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(canvas, image).convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F" and values.size and values.max() <= 1.0:
        values = values * 65535.0
    if image.mode != "F" or values.max(initial=0.0) > 255.0:
        values = values / 257.0  # 65535 -> 255
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
