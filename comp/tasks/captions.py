"""Images with what was said about them: the samples that retrieval and captioning share."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from comp.data.layout import EncodedImage, Row
from comp.tasks.text import without_marks

MAX_CAPTIONS = 8
"""Captions of an image that are read; COCO has five to seven, Flickr30K five."""


@dataclass(frozen=True)
class CaptionedImage:
    """An image with what was said about it.

    Attributes:
        image: Whatever the task's ``images`` takes.
        captions: The references, at least one.
        id: A number that no other image of the split has, for tasks that compare them.
    """

    image: Any
    captions: tuple[str, ...]
    id: int = 0


def stored_captions(row: Row) -> CaptionedImage:
    """Makes a sample of a row of kind ``captions``; of more than eight captions eight count.

    Captions lose the marks that BLIP never sees, in training and evaluation; CIDEr ignores them.
    """
    image: EncodedImage = row.images[0]
    texts = [without_marks(text, between=" ") or text for text in row.texts[:MAX_CAPTIONS]]
    digest = hashlib.blake2b(row.id.encode(), digest_size=7).digest()
    return CaptionedImage(image, tuple(texts), int.from_bytes(digest))


def drawn_captions(samples: Sequence[CaptionedImage], seed: int, step: int) -> list[str]:
    """Returns one caption of each image, all of them equally likely; a step decides which."""
    draw = np.random.default_rng((seed, step, 2)).random(len(samples)).tolist()
    return [
        one.captions[int(place * len(one.captions))]
        for one, place in zip(samples, draw, strict=True)
    ]
