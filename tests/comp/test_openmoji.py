import os
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from comp.data.layout import Row, read_metadata, read_rows, write_rows
from comp.data.openmoji import (
    Drawing,
    OpenMoji,
    build_openmoji,
    cached_file,
    load_openmoji,
    openmoji_path,
)


def named(openmoji: OpenMoji, name: str) -> Drawing:
    return next(d for d in openmoji.drawings if name in (d.name, *d.aliases))


def load_count(_: int) -> int:
    return sum(1 for _ in read_rows(openmoji_path()))


def test_more_than_three_thousand_drawings_have_a_name(openmoji: OpenMoji) -> None:
    assert len(openmoji.drawings) > 3500
    assert all(drawing.name and drawing.group for drawing in openmoji.drawings)
    assert openmoji.pixels.shape == (len(openmoji.drawings), 3, 64, 64)


def test_no_drawing_is_in_two_splits(openmoji: OpenMoji) -> None:
    splits = defaultdict(set)
    for one in openmoji.drawings:
        splits[one.drawing].add(one.split)
    assert {len(found) for found in splits.values()} == {1}


def test_no_picture_comes_twice(openmoji: OpenMoji) -> None:
    pictures = {picture.numpy().tobytes() for picture in openmoji.pixels}
    assert len(pictures) == len(openmoji.drawings)


def test_splits_are_about_seventy_fifteen_fifteen(openmoji: OpenMoji) -> None:
    drawings = {one.drawing: one.split for one in openmoji.drawings}
    share = {s: list(drawings.values()).count(s) / len(drawings) for s in ("train", "val", "test")}
    assert share == pytest.approx({"train": 0.70, "val": 0.15, "test": 0.15}, abs=0.03)


def test_skin_tones_of_a_person_are_one_drawing(openmoji: OpenMoji) -> None:
    cooks = [one for one in openmoji.drawings if one.name.startswith("woman cook")]
    assert {one.skin_tone for one in cooks} == {
        "light", "medium-light", "medium", "medium-dark", "dark", "yellow",
    }  # fmt: skip
    assert len({one.drawing for one in cooks}) == 1


def test_a_person_and_its_mirror_image_are_one_drawing(openmoji: OpenMoji) -> None:
    left = named(openmoji, "woman running, dark skin tone")
    right = named(openmoji, "woman running facing right, dark skin tone")
    assert left.drawing == right.drawing


@pytest.mark.parametrize("words", [("woman cook", "cook"), ("mermaid", "merman"), ("boy", "girl")])
def test_genders_of_a_person_are_one_drawing(openmoji: OpenMoji, words: tuple[str, str]) -> None:
    first, second = (named(openmoji, name) for name in words)
    assert first.drawing == second.drawing


def test_different_roles_are_different_drawings(openmoji: OpenMoji) -> None:
    assert named(openmoji, "woman cook").drawing != named(openmoji, "woman judge").drawing


def test_attributes_come_from_names_code_points_and_pixels(openmoji: OpenMoji) -> None:
    cook = named(openmoji, "woman cook, medium skin tone")
    assert (cook.group, cook.subgroup, cook.kind) == ("people", "person-role", "person")
    assert (cook.skin_tone, cook.gender, cook.role) == ("medium", "woman", "cook")
    assert cook.caption == "a drawing of a woman cook, medium skin tone"
    apple = named(openmoji, "red apple")
    assert (apple.group, apple.kind, apple.colour) == ("food", "fruit", "red")
    assert named(openmoji, "man surfing").activity == "surfing"
    germany = named(openmoji, "Germany")
    assert (germany.kind, germany.outline, germany.num_colours) == ("flag", "wide", "two")
    assert (germany.colour_middle, germany.colour_bottom) == ("red", "yellow")


def test_names_that_disagree_about_one_picture_leave_the_attribute_empty(
    openmoji: OpenMoji,
) -> None:
    people = named(openmoji, "people wrestling")
    assert len(people.aliases) > 15  # every pair of skin tones is drawn alike
    assert people.skin_tone in ("", "yellow")


def test_a_hidden_skin_is_not_labelled(openmoji: OpenMoji) -> None:
    bath = named(openmoji, "person taking bath, dark skin tone")
    assert bath.skin_tone == ""


def test_attribution_and_license_are_in_the_file(openmoji_file: Path) -> None:
    facts = read_metadata(openmoji_file)
    assert facts["license"] == "CC-BY-SA-4.0"
    assert "All emojis designed by OpenMoji" in facts["attribution"]


def test_another_data_set_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "toy.parquet"
    write_rows(path, [Row(id="1", split="train")], metadata={"name": "toy"})
    with pytest.raises(ValueError, match=r"toy\.parquet is not an OpenMoji data set"):
        load_openmoji(path=path)


@pytest.mark.parametrize("size", [8, 4096])
def test_a_size_out_of_bounds_is_named(size: int) -> None:
    with pytest.raises(ValueError, match=f"but got {size}"):
        openmoji_path(size)


def test_a_cache_that_cannot_be_written_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("COMP_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr("comp.data.openmoji._named_drawings", lambda: iter(()))
    with pytest.raises(OSError, match=r"cannot be written .* set COMP_CACHE"):
        openmoji_path()


def test_of_two_processes_that_find_a_broken_cache_one_builds_it(
    openmoji_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, builders = pq.read_table(openmoji_file), tmp_path / "builders"

    def noted(path: Path, *, size: int) -> int:
        with builders.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        return build_openmoji(path, size=size)

    monkeypatch.setattr("comp.data.openmoji.build_openmoji", noted)
    monkeypatch.setenv("COMP_CACHE", str(tmp_path / "cache"))
    path = cached_file(64)
    path.parent.mkdir()
    path.write_bytes(b"half a fi")
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        counts = list(pool.map(load_count, range(2)))
    assert counts[0] == counts[1] > 3500
    assert len(builders.read_text().split()) == 1
    assert list(path.parent.iterdir()) == [path]
    assert pq.read_table(path).equals(before), "the code builds another file: raise _BUILD"


def test_decoded_pixels_are_kept_in_a_file_that_processes_share(
    openmoji_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMP_CACHE", str(tmp_path))
    first = load_openmoji(path=openmoji_file).pixels
    monkeypatch.setattr("comp.data.openmoji.decode_image", None)  # nothing is decoded again
    again = load_openmoji(path=openmoji_file).pixels
    assert torch.equal(first, again)
    (file,) = tmp_path.iterdir()
    assert str(file) in Path("/proc/self/maps").read_text()
    again[0] = 0  # a page of one's own
    assert torch.equal(load_openmoji(path=openmoji_file).pixels, first)
