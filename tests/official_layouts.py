"""The published files of every data set that is imported, written small."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SENTENCE = "Γάτα γάτα 猫 🐈 is left of the dog."


def picture(path: Path, shade: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 30, 3), shade, dtype=np.uint8)).convert(mode).save(path)


def nlvr2(folder: Path, *, flat: bool = True) -> list[Path]:
    """Six training pairs, four for validation, two for the test; a third of them are false."""
    files = []
    for split, count in (("train", 6), ("dev", 4), ("test1", 2)):
        lines = []
        for number in range(count):
            name = f"{split}-{number}-0"
            for side in (0, 1):
                home = folder if flat else folder / split / str(number % 2)
                picture(home / f"{name}-img{side}.png", 40 * number + side)
            entry = {"identifier": f"{name}-1", "sentence": SENTENCE, "directory": number % 2}
            lines.append(json.dumps({**entry, "label": "False" if number % 3 == 0 else "True"}))
        files.append(folder / f"{split}.json")
        files[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def karpathy(folder: Path) -> list[Path]:
    """Twelve images with five to seven captions each, as COCO's have."""
    splits = ["train"] * 4 + ["restval"] * 2 + ["val"] * 3 + ["test"] * 3
    images = []
    for number, split in enumerate(splits):
        picture(folder / "val2014" / f"COCO_{number}.jpg", 20 * number)
        told = [{"raw": f"{SENTENCE} {number} {i}"} for i in range(5 + number % 3)]
        entry = {"filepath": "val2014", "filename": f"COCO_{number}.jpg", "cocoid": number}
        images.append({**entry, "split": split, "sentences": told})
    path = folder / "dataset_coco.json"
    path.write_text(json.dumps({"images": images}), encoding="utf-8")
    return [path]


def vqav2(folder: Path) -> list[Path]:
    """Forty training questions about twenty images, four with answers, four without."""
    files = []
    for subset, count, first in (
        ("train2014", 40, 1000),
        ("val2014", 4, 4000),
        ("test2015", 4, 8000),
    ):
        questions, annotations = [], []
        for number in range(count):
            image = number // 2
            picture(folder / subset / f"COCO_{subset}_{image:012d}.jpg", 10 * image)
            ids = {"image_id": image, "question_id": first + number}
            questions.append({**ids, "question": "is this a γάτα?"})
            # Of val2014: yes by 10, 3, 1 and 0 of 10 people.
            yes = (10, 3, 1, 0)[number % 4]
            said = [{"answer": "yes"}] * yes + [{"answer": "no"}] * (10 - yes)
            annotations.append({**ids, "answers": said})
        for name, entries in (("questions", questions), ("annotations", annotations)):
            if (subset, name) != ("test2015", "annotations"):
                files.append(folder / f"{subset}_{name}.json")
                files[-1].write_text(json.dumps({"data_subtype": subset, name: entries}))
    return files[::-1]


def llava(folder: Path) -> list[Path]:
    rows: list[dict[str, Any]] = []
    for number in range(24):
        has_image = number % 4 != 0
        marker = "<image>\n" if has_image else ""
        turns = [
            {"from": "human", "value": f"{marker}what is this?"},
            {"from": "gpt", "value": "a cat"},
            {"from": "human", "value": SENTENCE},
            {"from": "gpt", "value": "yes"},
        ]
        rows.append({"id": f"row-{number}", "conversations": turns})
        if has_image:
            picture(folder / "coco" / f"{number}.jpg", 10 * number)
            rows[-1]["image"] = f"coco/{number}.jpg"
    path = folder / "llava.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return [path]


WRITERS: dict[str, Callable[[Path], list[Path]]] = {
    "nlvr2": nlvr2,
    "karpathy": karpathy,
    "vqav2": vqav2,
    "llava": llava,
}
