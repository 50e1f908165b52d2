"""The one Parquet layout of every data set: what is read and written, and nothing about tasks.

A data set is one file, or a directory with that file in it as ``data.parquet``. A row holds its
images (encoded bytes, or a path below the image root), texts, labels with their counts, split, id
and free attributes. The metadata carries the layout's version, the kind of the rows and the data
set's source, license and attribution. The kinds, and what they put where:

- ``statements``: two images, one text, label ``true`` or ``false``.
- ``questions``: an image, one text; the distinct answers as labels, how many people gave each as
  counts; no labels where the answers are secret.
- ``captions``: an image, its captions as texts.
- ``conversations``: an image or none; what the human said as texts, each reply as a label.
- ``drawings``: an image, a caption, and everything known as attributes (OpenMoji).
"""

import contextlib
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

LAYOUT_VERSION = 2
SPLITS = ("train", "val", "test", "server")
KINDS = ("statements", "questions", "captions", "conversations", "drawings")
FILE_NAME = "data.parquet"

_GROUP_BYTES = 16 << 20  # a row group is closed at this size, or at so many rows
_CACHED_GROUPS = 9  # a window of shuffling and the group that comes after it
_VERSION_KEY = "comp.layout"
_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        pa.field("texts", pa.list_(pa.string())),
        pa.field("labels", pa.list_(pa.string())),
        pa.field("counts", pa.list_(pa.int32())),
        pa.field("attributes", pa.map_(pa.string(), pa.string())),
    ]
)


@dataclass(frozen=True)
class EncodedImage:
    """An image as it is stored: its bytes, or where they lie.

    Attributes:
        data: The bytes of the image file, or ``None``.
        path: Path relative to the data set's image root, or ``None``.
    """

    data: bytes | None = None
    path: str | None = None

    def read(self, root: Path | None = None) -> bytes:
        """Returns the bytes of the image file.

        Args:
            root: Folder that relative paths start from.

        Raises:
            ValueError: If the path climbs out of ``root`` or there is neither path nor data.
            FileNotFoundError: If there is no such file.
        """
        if self.data is not None:
            return self.data
        if self.path is None or root is None:
            raise ValueError(f"image {self.path!r} has no bytes; pass the image root")
        file = (root / self.path).resolve()
        if not file.is_relative_to(root.resolve()):
            raise ValueError(f"image path {self.path!r} leaves the image root {root}")
        if not file.is_file():
            raise FileNotFoundError(
                f"image {self.path!r} is gone from {root}; put it back, or import the data set "
                "again without --link"
            )
        return file.read_bytes()


@dataclass(frozen=True)
class Row:
    """One sample of a data set.

    Attributes:
        id: Unique in its data set.
        split: One of ``SPLITS``.
        images: In the order that the texts speak of them.
        texts: Captions, a question, a statement, or what the human said.
        labels: Answers, ``true``/``false`` or replies; empty where there is none.
        counts: How many people gave each label; empty means one each.
        attributes: Whatever else is known, by name.
    """

    id: str
    split: str
    images: Sequence[EncodedImage] = ()
    texts: Sequence[str] = ()
    labels: Sequence[str] = ()
    counts: Sequence[int] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)


def write_rows(
    path: Path,
    rows: Iterable[Row],
    *,
    metadata: Mapping[str, str],
    rows_per_group: int = 512,
) -> int:
    """Writes a data set; the file appears when it is complete, or not at all.

    Rows are written as they come, so a data set larger than memory can be written. A row group
    is what a streaming reader holds at once, so it ends at 16 MiB of images if that comes first.

    Args:
        path: The Parquet file; its folder is created.
        rows: The samples, each with an id of its own.
        metadata: Facts about the data set (``name``, ``kind``, ``source``, ``license``, ...).
        rows_per_group: Most rows of one row group.

    Returns:
        The number of rows written.

    Raises:
        ValueError: If a row's split is unknown, an id repeats, or there is no row.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {**metadata, _VERSION_KEY: str(LAYOUT_VERSION)}
    schema = _SCHEMA.with_metadata(facts)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        # The images are compressed already: encoding them again would cost time, not save space.
        with pq.ParquetWriter(part, schema, compression="NONE", use_dictionary=False) as writer:
            count = _write_groups(writer, schema, rows, rows_per_group)
        if count == 0:
            raise ValueError(f"{path.name} would have no rows; a data set needs at least one")
        part.chmod(0o644)
        with part.open("rb") as written:
            os.fsync(written.fileno())  # before the name, or a power cut leaves an empty file
        part.replace(path)  # atomic: two writers at once leave one whole file
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
        raise
    return count


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the facts that ``write_rows`` stored.

    Raises:
        ValueError: If the file is not of this layout or of another version of it.
        FileNotFoundError: If there is no such file.
    """
    return _metadata(_open(path), path)


def read_rows(path: Path, *, splits: Sequence[str] | None = None) -> Iterator[Row]:
    """Yields the rows of a data set in stored order, one row group in memory at a time.

    The file is memory-mapped, so bytes that are not asked for are not read.

    Args:
        path: A file that ``write_rows`` wrote.
        splits: Only rows of these; ``None`` means all.

    Raises:
        ValueError: If the file is not of this layout or of another version of it.
        FileNotFoundError: If there is no such file.
    """
    file = _open(path)
    _metadata(file, path)
    for group in range(file.num_row_groups):
        for record in file.read_row_group(group).to_pylist():
            if splits is None or record["split"] in splits:
                yield _row(record)


class DataSet:
    """A data set that is read where it is asked for, never whole.

    Args:
        path: A file that ``write_rows`` wrote, or a directory with it as ``data.parquet``.

    Attributes:
        path: The Parquet file.
        facts: What ``read_metadata`` returns.
        splits: The rows of every split that there is.

    Raises:
        ValueError: If it is not of this layout or of another version of it.
        FileNotFoundError: If there is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = data_file(path)
        file = _open(self.path)
        self.facts = _metadata(file, self.path)
        found: dict[str, list[NDArray[np.int64]]] = {}
        for group in range(file.num_row_groups):
            names = file.read_row_group(group, columns=["split"])["split"].to_numpy()
            for split in dict.fromkeys(names):
                places = np.flatnonzero(names == split)
                found.setdefault(split, []).append(
                    np.stack([np.full_like(places, group), places], axis=1)
                )
        self.splits = {split: Rows(self.path, found[split]) for split in SPLITS if split in found}

    @property
    def kind(self) -> str:
        """One of ``KINDS``, or an empty string."""
        return self.facts.get("kind", "")

    @property
    def image_root(self) -> Path | None:
        """Folder that paths of images start from; ``None`` if the file holds their bytes."""
        root = self.facts.get("image_root")
        return Path(root) if root else None


class Rows:
    """The rows of a split by number; the row groups that were used last stay in memory.

    Args:
        path: The Parquet file.
        places: Row group and row in it of every row, ``(R, 2)`` for each row group.

    Attributes:
        blocks: How many rows of the split lie in each row group, in stored order.
    """

    def __init__(self, path: Path, places: Sequence[NDArray[np.int64]]) -> None:
        self.blocks = tuple(len(rows) for rows in places)
        self._path = path
        self._places = np.concatenate(places)
        self._file: pq.ParquetFile | None = None
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_tables": OrderedDict()}

    def fetch(self, indexes: Sequence[int]) -> list[Row]:
        """Returns rows by their numbers in the split, in the order asked for."""
        rows: dict[int, Row] = {}
        chosen = self._places[list(indexes)]
        for group in np.unique(chosen[:, 0]).tolist():
            here = np.flatnonzero(chosen[:, 0] == group)
            records = self._table(group).take(pa.array(chosen[here, 1])).to_pylist()
            rows.update(zip(here.tolist(), map(_row, records), strict=True))
        return [rows[i] for i in range(len(indexes))]

    def _table(self, group: int) -> pa.Table:
        if group in self._tables:
            self._tables.move_to_end(group)
            return self._tables[group]
        if self._file is None:
            self._file = _open(self._path)
        while len(self._tables) >= _CACHED_GROUPS:
            self._tables.popitem(last=False)
        self._tables[group] = self._file.read_row_group(group)
        return self._tables[group]


def epoch_order(
    blocks: Sequence[int], *, seed: int, epoch: int, window: int = _CACHED_GROUPS - 1
) -> NDArray[np.int64]:
    """Shuffles row numbers so that a reader holds a few row groups at a time.

    Row groups come in random order; rows are shuffled across as many of them as a window has.
    With one window that is a plain permutation.

    Args:
        blocks: Rows of each row group.
        seed: Seed of the run.
        epoch: Which epoch; each has an order of its own.
        window: Row groups that are mixed with each other.

    Returns:
        Every number from 0 to the sum of ``blocks`` once.
    """
    generator = np.random.default_rng((seed, epoch))
    if len(blocks) <= window:
        return generator.permutation(sum(blocks))
    starts = np.concatenate([[0], np.cumsum(blocks)])
    groups = generator.permutation(len(blocks))
    windows = (groups[first : first + window] for first in range(0, len(groups), window))
    return np.concatenate(
        [
            generator.permutation(
                np.concatenate([np.arange(starts[group], starts[group + 1]) for group in mixed])
            )
            for mixed in windows
        ]
    )


def data_file(path: Path) -> Path:
    """Returns the Parquet file that a path stands for: itself, or the one in the directory."""
    return path / FILE_NAME if path.is_dir() else path


def _open(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        raise FileNotFoundError(f"there is no data set at {path}; check the path")
    try:
        return pq.ParquetFile(path, memory_map=True)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file ({error}); import it again") from error


def _metadata(file: pq.ParquetFile, path: Path) -> dict[str, str]:
    raw = file.schema_arrow.metadata or {}
    facts = {key.decode(): value.decode() for key, value in raw.items()}
    version = facts.pop(_VERSION_KEY, None)
    if version is None:
        raise ValueError(f"{path} has no {_VERSION_KEY} in its metadata: not a data set of comp")
    if version != str(LAYOUT_VERSION):
        raise ValueError(
            f"{path} is of layout {version}, but this release reads layout {LAYOUT_VERSION}; "
            "import it again"
        )
    return {key: value for key, value in facts.items() if not key.startswith("ARROW:")}


def _write_groups(
    writer: pq.ParquetWriter, schema: pa.Schema, rows: Iterable[Row], rows_per_group: int
) -> int:
    seen: set[str] = set()
    group: list[dict[str, object]] = []
    size = 0
    for row in rows:
        if row.split not in SPLITS:
            raise ValueError(
                f"row {row.id!r}: split must be one of {', '.join(SPLITS)}, but got {row.split!r}"
            )
        if row.id in seen:
            raise ValueError(f"row {row.id!r} comes twice; ids must be unique")
        seen.add(row.id)
        group.append(_record(row))
        size += sum(len(image.data or b"") for image in row.images)
        if len(group) == rows_per_group or size >= _GROUP_BYTES:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            group, size = [], 0
    if group:
        writer.write_table(pa.Table.from_pylist(group, schema=schema))
    return len(seen)


def _record(row: Row) -> dict[str, object]:
    return {
        "id": row.id,
        "split": row.split,
        "images": [{"bytes": image.data, "path": image.path} for image in row.images],
        "texts": list(row.texts),
        "labels": list(row.labels),
        "counts": list(row.counts),
        "attributes": list(row.attributes.items()),
    }


def _row(record: dict[str, Any]) -> Row:
    return Row(
        id=record["id"],
        split=record["split"],
        images=tuple(
            EncodedImage(image["bytes"], image["path"]) for image in record["images"] or ()
        ),
        texts=tuple(record["texts"] or ()),
        labels=tuple(record["labels"] or ()),
        counts=tuple(record["counts"] or ()),
        attributes=dict(record["attributes"] or ()),
    )
