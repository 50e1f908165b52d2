"""Any encoded image to the RGB pixels that it shows, and pixels to the tensor a model takes."""

import io
import struct

import numpy as np
import torch
from PIL import Image, ImageOps
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
        raise ValueError(
            f"{len(data)} bytes cannot be decoded as an image ({error}); "
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
    pixels = np.asarray(image, dtype=np.uint8)  # (H, W, 3)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


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
