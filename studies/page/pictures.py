"""Validation images with the patches that a saved pruned model keeps, layer by layer."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestration.storage import Storage
from studies.sources import Source

MAX_SIDE = 208  # pixels; twice what the page shows


def pictures_of(sources: Sequence[Source], num_images: int) -> dict[str, Any]:
    """Runs the most pruned model of the first run that saved one on a few validation images.

    Args:
        sources: Runs, best first.
        num_images: How many images; 0 loads nothing.

    Returns:
        A ``note`` that says which model it is, and ``images``: none if there is no such model or
        no image runs through its encoders.
    """
    for source in sources if num_images else ():
        if source.run is None:
            continue
        storage = Storage(source.run.location)
        names = [name for name in storage.names("model") if storage.exists(_plan(name))]
        if names:
            with storage.tree(f"model/{max(names)}") as directory:
                return _pictures(source, directory, max(names), num_images)
    return {"note": "", "images": []}


def _plan(name: str) -> str:
    return f"model/{name}/pruning.json"


def _pictures(source: Source, directory: Path, name: str, num_images: int) -> dict[str, Any]:
    from comp.examples import kept_patches
    from comp.models import load_model
    from comp.tasks import build_task

    assert source.run is not None
    job = source.run.job
    loaded = load_model(directory)
    task: Any = build_task(
        job.task,
        tokenizer=loaded.tokenizer,
        image_size=loaded.image_size,
        transform=loaded.transform,
        data=Path(job.data) if job.data else None,
    )
    examples = kept_patches(loaded.model, task, num_images=num_images)
    images = [
        {
            "source": _data_uri(example.pixels),
            "side": example.side,
            "layers": [{"layer": 0, "kept": ""}]
            + [{"layer": n + 1, "kept": _bits(kept)} for n, kept in sorted(example.kept.items())],
        }
        for example in examples
        if example.side
    ]
    note = (
        f"The first validation images through {source.name}, {name}: what each layer's token "
        "selection lets through. Covered patches are gone; where dropped tokens are merged, one "
        "summary token carries them on."
    )
    return {"note": note, "images": images}


def _bits(kept: Any) -> str:
    return "".join("1" if flag else "0" for flag in kept.tolist())


def _data_uri(pixels: Any) -> str:
    from PIL import Image

    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    drawing, photograph = io.BytesIO(), io.BytesIO()
    image.save(drawing, "PNG", optimize=True)
    image.save(photograph, "JPEG", quality=85)
    kind, data = min(
        (("png", drawing.getvalue()), ("jpeg", photograph.getvalue())), key=lambda it: len(it[1])
    )
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()
