"""Rows on their way into the layout: read from a published file, their images not yet found."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

Value = TypeVar("Value")

_NO_JSON = (json.JSONDecodeError, UnicodeDecodeError, RecursionError)  # the last: brackets alone
_NAMES = {str: "text", int: "a whole number", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Draft:
    """A row whose images are still names.

    Attributes:
        id: Unique in the data set.
        split: One of the layout's.
        where: File and row that it comes from, for messages.
        images: For every image the paths below the image root where it may lie, likeliest first.
        texts: As in the layout.
        labels: As in the layout.
        counts: As in the layout.
        attributes: As in the layout.
        fault: Why the row cannot be used, or empty.
    """

    id: str
    split: str
    where: str
    images: Sequence[Sequence[str]] = ()
    texts: Sequence[str] = ()
    labels: Sequence[str] = ()
    counts: Sequence[int] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)
    fault: str = ""


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        ValueError: If it is no JSON.
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; check the path")
    try:
        return json.loads(path.read_bytes())
    except _NO_JSON as error:
        raise ValueError(f"{path.name} is no JSON ({error}); check that it is complete") from None


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields where each line stands and its value.

    Raises:
        ValueError: If a line is no JSON.
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; check the path")
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        where = f"{path.name}, row {number}"
        if line.strip():
            try:
                yield where, json.loads(line)
            except _NO_JSON as error:
                raise ValueError(f"{where} is no JSON ({error}); NLVR2 has one a line") from None


def take(entry: Any, name: str, kind: type[Value], where: str) -> Value:
    """Returns a field of a row.

    Raises:
        ValueError: If the row is no object, or the field is missing or of another type.
    """
    if not isinstance(entry, dict) or name not in entry:
        have = ", ".join(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
        have = have or "no fields"
        raise ValueError(f"{where}: field {name!r} is missing among {have}; is it the right file?")
    value = entry[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where}: field {name!r} must be {_NAMES[kind]}, but got {value!r:.60}")
    return value


def not_empty(rows: Sequence[Value], path: Path) -> Sequence[Value]:
    """Returns the rows of a file.

    Raises:
        ValueError: If there is none, so that a split would be empty.
    """
    if not rows:
        raise ValueError(f"{path.name} holds no rows; check that it is complete")
    return rows


def hold_out(drafts: Sequence[Draft], share: float, *names: str) -> list[Draft]:
    """Moves training rows into other splits, all rows about one image together.

    The order of a hash decides, so the same files give the same splits.

    Args:
        drafts: Rows of any split; only those of ``train`` move.
        share: Share of the images that each of the other splits gets, at least one.
        names: The other splits.

    Raises:
        ValueError: If that leaves nothing to train on.
    """
    units = {_unit(draft) for draft in drafts if draft.split == "train"}
    order = sorted(units, key=lambda unit: hashlib.sha256(unit.encode()).digest())
    size = max(1, round(share * len(order)))
    if order and size * len(names) >= len(order):
        raise ValueError(
            f"split train would be empty: its rows are about {len(order)} images (or texts), "
            f"of which {' and '.join(names)} take {size} each; pass files with more of them"
        )
    target = {unit: name for i, name in enumerate(names) for unit in order[i * size :][:size]}
    return [
        replace(draft, split=target.get(_unit(draft), "train"))
        if draft.split == "train"
        else draft
        for draft in drafts
    ]


def _unit(draft: Draft) -> str:
    return draft.images[0][0] if draft.images else draft.id
