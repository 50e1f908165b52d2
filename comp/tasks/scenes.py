"""OpenMoji as captioned scenes: two drawings in two corners, told in several ways.

One drawing has few words that hold for unseen drawings, too; two of them in two corners make
thousands of scenes that one caption tells apart, and leave half of the picture empty. Scenes come
in twelves: the same two things in all pairs of corners. So what is seen does not tell a scene, nor
where, and a model that has only learned the drawings by heart is no good.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from comp.data.openmoji import Drawing
from comp.tasks.phrases import noun
from comp.tasks.questions import allowed_values

CORNERS = ("top left", "top right", "bottom left", "bottom right")
_WORDINGS = (
    "{first} at the {a} and {second} at the {b}",
    "at the {b} there is {second} and at the {a} {first}",
    "this picture shows {first} at the {a} and {second} at the {b}",
    "we see {second} at the {b} and {first} at the {a}",
    "{first} in the {a} of the picture, {second} in the {b}",
)


@dataclass(frozen=True)
class Scene:
    """Two drawings in two corners of one picture.

    Attributes:
        images: Indexes of the two drawings.
        corners: Where they stand, indexes into ``CORNERS``, ascending.
        captions: What can be said about it.
    """

    images: tuple[int, int]
    corners: tuple[int, int]
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
    """Makes scenes of the drawings of a split, in random order; no two have the same captions.

    Two things stand in every pair of corners, both ways round, each time as any drawing that the
    words fit; only the last two may have fewer scenes.

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
    places = list(itertools.combinations(range(len(CORNERS)), 2))
    found: dict[tuple[str, str, tuple[int, int]], Scene] = {}
    for _ in range(20 * num_scenes):
        if len(found) >= num_scenes:
            break
        things = rng.choice(phrases), rng.choice(phrases)
        for (first, second), corners in itertools.product((things, things[::-1]), places):
            wordings = rng.sample(_WORDINGS, num_captions)
            found.setdefault(
                (first, second, corners),
                Scene(
                    (rng.choice(pools[first]), rng.choice(pools[second])),
                    corners,
                    tuple(_say(wording, first, second, corners) for wording in wordings),
                ),
            )
    if len(found) < num_scenes:
        raise ValueError(
            f"only {len(found)} scenes of the {split} drawings differ, "
            f"but num_scenes is {num_scenes}"
        )
    scenes = list(found.values())[:num_scenes]
    rng.shuffle(scenes)
    return scenes


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
    ).unflatten(0, (-1, 2))  # (B, 2, 3, H / 2, W / 2)
    canvas = torch.full((len(scenes), 3, height, width), 255.0)
    for row, scene in enumerate(scenes):
        for side, corner in enumerate(scene.corners):
            top, left = (corner // 2) * (height - height // 2), (corner % 2) * (width - width // 2)
            canvas[row, :, top : top + height // 2, left : left + width // 2] = half[row, side]
    return canvas


def _say(wording: str, first: str, second: str, corners: tuple[int, int]) -> str:
    a, b = (CORNERS[corner] for corner in corners)
    return wording.format(first=first, second=second, a=a, b=b)
