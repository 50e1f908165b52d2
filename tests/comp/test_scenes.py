import dataclasses
import itertools

import pytest
import torch

from comp.data.openmoji import OpenMoji
from comp.tasks.scenes import Scene, describe, make_scenes, render_scenes


@pytest.fixture(scope="module")
def scenes(openmoji: OpenMoji) -> list[Scene]:
    return make_scenes(openmoji.drawings, "val", num_scenes=300)


def test_no_caption_fits_two_scenes(scenes: list[Scene]) -> None:
    captions = [caption for scene in scenes for caption in scene.captions]
    assert len(captions) == len(set(captions)) == 900


def test_captions_name_all_three_drawings(scenes: list[Scene], openmoji: OpenMoji) -> None:
    for scene in scenes:
        things = [describe(openmoji.drawings[image]) for image in scene.images]
        assert len(set(things)) == len(set(scene.corners)) == 3
        assert all(thing in caption for thing in things for caption in scene.captions)


def test_captions_do_not_follow_the_order_of_the_drawings(
    scenes: list[Scene], openmoji: OpenMoji
) -> None:
    first = [
        scene.captions[0].find(describe(openmoji.drawings[scene.images[0]])) for scene in scenes
    ]
    others = [
        min(scene.captions[0].find(describe(openmoji.drawings[one])) for one in scene.images[1:])
        for scene in scenes
    ]
    leading = sum(mine < theirs for mine, theirs in zip(first, others, strict=True))
    assert 0.2 < leading / len(scenes) < 0.5


def test_scenes_show_drawings_of_their_split_only(scenes: list[Scene], openmoji: OpenMoji) -> None:
    shown = itertools.chain.from_iterable(scene.images for scene in scenes)
    assert {openmoji.drawings[image].split for image in shown} == {"val"}


def test_the_same_seed_makes_the_same_scenes(scenes: list[Scene], openmoji: OpenMoji) -> None:
    assert make_scenes(openmoji.drawings, "val", num_scenes=300) == scenes
    assert make_scenes(openmoji.drawings, "val", num_scenes=300, seed=1) != scenes


def test_a_description_says_what_is_seen(openmoji: OpenMoji) -> None:
    by_name = {drawing.name: drawing for drawing in openmoji.drawings}
    cook = by_name["woman cook, medium skin tone"]
    fruit = dataclasses.replace(by_name["tangerine"], colour="orange")
    assert describe(cook) == "a woman with medium skin tone"
    assert describe(fruit) == "a fruit mostly in orange"


@pytest.mark.parametrize("size", [8, 9])
def test_drawings_stand_in_their_corners_at_half_size(size: int) -> None:
    pixels = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    pixels[1] = 100
    image = render_scenes([Scene((0, 1), (1, 2), ())], pixels)[0, 0]
    expected = torch.full((size, size), 255.0)
    expected[:4, -4:] = 0
    expected[-4:, :4] = 100
    torch.testing.assert_close(image, expected)


def test_more_scenes_than_differ_are_refused(openmoji: OpenMoji) -> None:
    few = [drawing for drawing in openmoji.drawings if drawing.split == "train"]
    seen = {describe(one): one for one in openmoji.drawings if one.split == "val" and one.colour}
    few += list(seen.values())[:4]
    with pytest.raises(ValueError, match="only 4 scenes of the val drawings differ"):
        make_scenes(few, "val", num_scenes=5)
    with pytest.raises(ValueError, match="only 0 scenes of the val drawings differ"):
        make_scenes(few[:-2], "val", num_scenes=5)


@pytest.mark.parametrize("num_captions", [0, 6])
def test_the_number_of_captions_is_checked(openmoji: OpenMoji, num_captions: int) -> None:
    with pytest.raises(ValueError, match=rf"in \[1, 5\], but got {num_captions}"):
        make_scenes(openmoji.drawings, "val", num_scenes=1, num_captions=num_captions)
