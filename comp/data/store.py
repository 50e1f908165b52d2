"""The one Parquet layout of every data set: what is read and written, and nothing about tasks.

A data set is one file. A row holds its images (encoded bytes, or a path below the image root),
texts (captions, a question, a statement, turns), labels (answers, ``true``/``false``), split, id
and free attributes. The file's metadata carries the layout's version and the data set's source,
license and attribution.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

LAYOUT_VERSION = 1
SPLITS = ("train", "val", "test")

_VERSION_KEY = "comp.layout"
_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        pa.field("texts", pa.list_(pa.string())),
        pa.field("labels", pa.list_(pa.string())),
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
            OSError: If the file cannot be read.
        """
        if self.data is not None:
            return self.data
        if self.path is None or root is None:
            raise ValueError(f"image {self.path!r} has no bytes; pass the image root")
        file = (root / self.path).resolve()
        if not file.is_relative_to(root.resolve()):
            raise ValueError(f"image path {self.path!r} leaves the image root {root}")
        return file.read_bytes()


@dataclass(frozen=True)
class Row:
    """One sample of a data set.

    Attributes:
        id: Unique in its data set.
        split: One of ``SPLITS``.
        images: In the order that the texts speak of them.
        texts: Captions, a question, a statement, or turns.
        labels: Answers or ``true``/``false``; empty where there is none.
        attributes: Whatever else is known, by name.
    """

    id: str
    split: str
    images: Sequence[EncodedImage] = ()
    texts: Sequence[str] = ()
    labels: Sequence[str] = ()
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
    is what a streaming reader holds at once: 512 rows of 100 kB photographs are 50 MB.

    Args:
        path: The Parquet file; its folder is created.
        rows: The samples, each with an id of its own.
        metadata: Facts about the data set (``name``, ``source``, ``license``, ``attribution``).
        rows_per_group: Rows of one row group.

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
    for row in rows:
        if row.split not in SPLITS:
            raise ValueError(
                f"row {row.id!r}: split must be one of {', '.join(SPLITS)}, but got {row.split!r}"
            )
        if row.id in seen:
            raise ValueError(f"row {row.id!r} comes twice; ids must be unique")
        seen.add(row.id)
        group.append(_record(row))
        if len(group) == rows_per_group:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            group = []
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
        attributes=dict(record["attributes"] or ()),
    )
