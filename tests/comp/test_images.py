import io

import numpy as np
import pytest
import torch
from PIL import Image

from comp.data.images import CLIP_MEAN, CLIP_STD, decode_image, image_tensor, resize_pixels


def encoded(image: Image.Image, suffix: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, suffix, **options)
    return buffer.getvalue()


def corner(data: bytes) -> tuple[int, ...]:
    image = decode_image(data)
    assert image.mode == "RGB"
    return tuple(image.getpixel((0, 0)))


def palette_image() -> Image.Image:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGB", (4, 4), (1, 2, 3)), (1, 2, 3)),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 128)), (255, 127, 127)),
        (Image.new("L", (4, 4), 77), (77, 77, 77)),
        (Image.new("LA", (4, 4), (0, 128)), (127, 127, 127)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (palette_image(), (10, 200, 30)),
    ],
    ids=["rgb", "clear", "half-clear", "grey", "grey-alpha", "bilevel", "palette"],
)
def test_png_of_every_mode_gives_its_colour_over_white(
    image: Image.Image, expected: tuple[int, ...]
) -> None:
    assert corner(encoded(image)) == expected


def test_transparent_palette_colour_becomes_white() -> None:
    assert corner(encoded(palette_image(), transparency=1)) == (255, 255, 255)


def test_first_frame_of_an_animation_counts() -> None:
    second = Image.new("P", (4, 4), 0)
    data = encoded(palette_image(), "GIF", save_all=True, append_images=[second])
    assert corner(data) == (10, 200, 30)


def test_cmyk_is_ink_on_paper() -> None:
    assert corner(encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF")) == (255, 0, 0)


def test_cmyk_jpeg_is_not_inverted() -> None:
    red, green, blue = corner(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (257, 1), (32896, 128), (65535, 255)])
def test_sixteen_bit_grey_keeps_its_upper_byte(value: int, expected: int) -> None:
    image = Image.fromarray(np.full((4, 4), value, dtype=np.uint16))
    assert corner(encoded(image)) == (expected,) * 3


def test_float_grey_in_bytes_is_taken_as_it_is() -> None:
    image = Image.fromarray(np.full((4, 4), 200.0, dtype=np.float32))
    assert corner(encoded(image, "TIFF")) == (200,) * 3


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (4, 2), (255, 255, 255))
    image.putpixel((0, 0), (255, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned clockwise: the left upper corner comes to the right
    decoded = decode_image(encoded(image, "PNG", exif=exif))
    assert decoded.size == (2, 4)
    assert decoded.getpixel((1, 0)) == (255, 0, 0)


@pytest.mark.parametrize("data", [b"", b"no image", encoded(Image.new("RGB", (64, 64)))[:60]])
def test_broken_bytes_are_named_by_their_length(data: bytes) -> None:
    with pytest.raises(ValueError, match=f"{len(data)} bytes cannot be decoded as an image"):
        decode_image(data)


def test_a_truncated_photograph_is_an_error_and_no_grey_area() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG")
    with pytest.raises(ValueError, match="check that the file is complete"):
        decode_image(data[: len(data) // 2])


def test_pixels_are_channels_first_and_of_the_size_asked_for() -> None:
    pixels = resize_pixels(Image.new("RGB", (30, 20), (1, 2, 3)), 8)
    assert pixels.shape == (3, 8, 8)
    assert pixels.dtype == torch.uint8
    assert pixels[:, 0, 0].tolist() == [1, 2, 3]


def test_normalisation_is_that_of_clip() -> None:
    tensor = image_tensor(encoded(Image.new("RGB", (5, 5), (255, 0, 51))), 4)
    expected = [
        (value - mean) / std
        for value, mean, std in zip((1.0, 0.0, 0.2), CLIP_MEAN, CLIP_STD, strict=True)
    ]
    torch.testing.assert_close(tensor[:, 2, 2], torch.tensor(expected))
