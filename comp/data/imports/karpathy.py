"""Karpathy's splits of COCO and Flickr30K: ``dataset_coco.json``, ``dataset_flickr30k.json``.

Source: Karpathy and Fei-Fei (arXiv 1412.2306), https://cs.stanford.edu/people/karpathy/deepimagesent
"""

from collections.abc import Sequence
from pathlib import Path

from comp.data.imports.draft import Draft, not_empty, read_json, take

KIND = "captions"
_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def read(sources: Sequence[Path], *, holdout: float) -> list[Draft]:
    """Returns one row for each image with all its captions.

    Args:
        sources: The files.
        holdout: Not used: the splits are the point of these files.

    Raises:
        ValueError: If a file is not of this format.
    """
    drafts = []
    for path in sources:
        images = take(read_json(path), "images", list, path.name)
        for number, entry in enumerate(not_empty(images, path), start=1):
            where = f"{path.name}, row {number}"
            split = take(entry, "split", str, where)
            if split not in _SPLITS:
                raise ValueError(
                    f"{where}: field 'split' must be one of {', '.join(_SPLITS)}, "
                    f"but got {split!r}"
                )
            name = take(entry, "filename", str, where)
            folder = take(entry, "filepath", str, where) if "filepath" in entry else ""
            captions = [
                take(sentence, "raw", str, where)
                for sentence in take(entry, "sentences", list, where)
            ]
            drafts.append(
                Draft(
                    id=name,
                    split=_SPLITS[split],
                    where=where,
                    images=[[f"{folder}/{name}", name] if folder else [name]],
                    texts=[caption.strip() for caption in captions],
                    attributes={"image_id": str(entry.get("cocoid", entry.get("imgid", "")))},
                    fault="" if captions else "it has no caption",
                )
            )
    return drafts
