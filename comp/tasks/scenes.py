"""OpenMoji as captioned scenes: three drawings in three corners, told in several ways.

One drawing has few words that hold for unseen drawings, too; three of them make thousands of
scenes that one caption tells apart, and leave a quarter of the picture empty. Captions tell what
is seen and not where: a small CLIP learns nothing of places, neither of images nor of texts.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from comp.data.openmoji import Drawing
from comp.tasks.phrases import noun
from comp.tasks.questions import allowed_values

_NUM_CORNERS = 4  # top left, top right, bottom left, bottom right
_NUM_DRAWINGS = 3
_WORDINGS = (
    "{}, {} and {}",
    "this picture shows {}, {} and {}",
    "we see {} together with {} and {}",
    "there is {} beside {} and {}",
    "a picture of {}, {} and {}",
)


@dataclass(frozen=True)
class Scene:
    """Drawings in corners of one picture.

    Attributes:
        images: Indexes of the drawings.
        corners: Where each stands: 0 to 3 are top left, top right, bottom left, bottom right.
        captions: What can be said about it.
    """

    images: tuple[int, ...]
    corners: tuple[int, ...]
    captions: tuple[str, ...]


def describe(drawing: Drawing) -> str:
    """Returns a phrase of what can be seen: ``a woman with dark skin tone``."""
    phrase = f"a {drawing.gender}" if drawing.gender else noun("kind", drawing.kind)
    if drawing.skin_tone:
        return f"{phrase} with {drawing.skin_tone} skin tone"
    return f"{phrase} mostly in {drawing.colour}" if drawing.colour else phrase


def make_scenes(
    drawings: Sequence[Drawing],
    split: str,
    *,
    num_scenes: int,
    num_captions: int = 3,
    seed: int = 0,
) -> list[Scene]:
    """Makes scenes of the drawings of a split; no two show the same things.

    Args:
        drawings: All drawings, of all splits; an image index is a position in them.
        split: ``train``, ``val`` or ``test``.
        num_scenes: How many to make.
        num_captions: Captions of each, in different words.
        seed: Seed of the choice.

    Raises:
        ValueError: If there are not so many wordings, or not so many scenes that differ.
    """
    if not 1 <= num_captions <= len(_WORDINGS):
        raise ValueError(f"num_captions must be in [1, {len(_WORDINGS)}], but got {num_captions}")
    rng = random.Random(f"{seed} {split} scenes")
    kinds = set(allowed_values(drawings)["kind"])
    pools: dict[str, list[int]] = {}
    for index, drawing in enumerate(drawings):
        if drawing.split == split and drawing.kind in kinds:
            pools.setdefault(describe(drawing), []).append(index)
    phrases = sorted(pools)
    found: dict[frozenset[str], Scene] = {}
    for _ in range(20 * num_scenes if len(phrases) >= _NUM_DRAWINGS else 0):
        if len(found) == num_scenes:
            break
        things = rng.sample(phrases, _NUM_DRAWINGS)
        wordings = rng.sample(_WORDINGS, num_captions)
        found.setdefault(
            frozenset(things),
            Scene(
                tuple(rng.choice(pools[thing]) for thing in things),
                tuple(rng.sample(range(_NUM_CORNERS), _NUM_DRAWINGS)),
                tuple(wording.format(*rng.sample(things, len(things))) for wording in wordings),
            ),
        )
    if len(found) < num_scenes:
        raise ValueError(
            f"only {len(found)} scenes of the {split} drawings differ, "
            f"but num_scenes is {num_scenes}"
        )
    return list(found.values())


def render_scenes(scenes: Sequence[Scene], pixels: Tensor) -> Tensor:
    """Draws scenes on white ground, each drawing at half its size.

    Args:
        scenes: ``B`` scenes.
        pixels: All drawings, 0..255, ``(U, 3, H, W)``, uint8.

    Returns:
        Values of 0..255, ``(B, 3, H, W)``, float32.
    """
    height, width = pixels.shape[-2:]
    drawn = torch.stack([pixels[list(scene.images)] for scene in scenes]).float()
    half = functional.interpolate(
        drawn.flatten(0, 1), size=(height // 2, width // 2), mode="area"
    ).unflatten(0, drawn.shape[:2])  # (B, drawings, 3, H / 2, W / 2)
    canvas = torch.full((len(scenes), 3, height, width), 255.0)
    for row, scene in enumerate(scenes):
        for side, corner in enumerate(scene.corners):
            top, left = (corner // 2) * (height - height // 2), (corner % 2) * (width - width // 2)
            canvas[row, :, top : top + height // 2, left : left + width // 2] = half[row, side]
    return canvas
