"""The published tables of a run: their schemas, and records to rows and back."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from comp.results import CurvePoint, StageRecord
from orchestration.job import Job, Record

FORMAT_VERSION = 1

_IDENTITY = [
    ("study", pa.string()),
    ("trial", pa.int32()),
    ("model", pa.string()),
    ("task", pa.string()),
    ("method", pa.string()),
    ("seed", pa.int64()),
]
_PLACE = [
    ("run_id", pa.string()),
    ("index", pa.int32()),
    ("time", pa.float64()),
    ("attempt", pa.int32()),
    ("extra", pa.string()),
    ("layers", pa.map_(pa.string(), pa.float64())),
]
STAGE_SCHEMA = pa.schema(
    [
        *_IDENTITY,
        ("stage", pa.int32()),
        ("mode", pa.string()),
        ("choice", pa.string()),
        ("ratio", pa.float64()),
        ("macs", pa.float64()),
        ("params", pa.int64()),
        ("val", pa.float64()),
        ("val_loss", pa.float64()),
        ("train_loss", pa.float64()),
        ("cost", pa.float64()),
        ("mode_cost", pa.float64()),
        ("threshold", pa.float64()),
        ("units", pa.int64()),
        ("tokens", pa.map_(pa.string(), pa.float64())),
        ("seconds", pa.float64()),
        ("train_seconds", pa.float64()),
        ("eval_seconds", pa.float64()),
        ("snapshot", pa.float64()),
        ("refreshed", pa.map_(pa.string(), pa.float64())),
        *_PLACE,
    ],
    metadata={"comp.table": "stages", "comp.version": str(FORMAT_VERSION)},
)
CURVE_SCHEMA = pa.schema(
    [
        *_IDENTITY,
        ("ratio_asked", pa.float64()),
        ("ratio_reached", pa.float64()),
        ("gmacs", pa.float64()),
        ("params", pa.int64()),
        ("val", pa.float64()),
        ("test", pa.float64()),
        ("latency_ms", pa.float64()),
        ("dense_latency_ms", pa.float64()),
        ("fine_tuned", pa.int64()),
        ("fine_tune_seconds", pa.float64()),
        ("val_before_tuning", pa.float64()),
        ("test_ratio", pa.float64()),
        ("details", pa.map_(pa.string(), pa.float64())),
        *_PLACE,
        ("outcomes", pa.string()),
    ],
    metadata={"comp.table": "curve", "comp.version": str(FORMAT_VERSION)},
)


def tables_of(job: Job, records: Sequence[Record]) -> dict[str, pa.Table]:
    """Returns the tables ``"stages"`` and ``"curve"`` of a run in their published schemas."""
    rows = [(record, row_of(job, record)) for record in records]
    stages = [row for record, row in rows if record.stage]
    points = [row for record, row in rows if record.point]
    return {
        "stages": pa.Table.from_pylist(stages, schema=STAGE_SCHEMA),
        "curve": pa.Table.from_pylist(points, schema=CURVE_SCHEMA),
    }


def row_of(job: Job, record: Record) -> dict[str, Any]:
    """Returns one table row; what has no column of its own goes to ``extra`` as JSON."""
    schema = STAGE_SCHEMA if record.stage else CURVE_SCHEMA
    body = record.body.to_dict()
    extra = {name: body.pop(name) for name in list(body) if name not in schema.names}
    names = ("study", "trial", "model", "task", "method", "seed", "run_id")
    place = {"index": record.index, "time": record.time, "attempt": record.attempt}
    own = {name: getattr(job, name) for name in names}
    return own | place | body | {"extra": json.dumps(extra) if extra else None}


def record_of(row: dict[str, Any], body_type: type[StageRecord] | type[CurvePoint]) -> Record:
    """Rebuilds the record that a row was made from."""
    values = row | json.loads(row["extra"] or "{}")
    for name in ("tokens", "layers", "details", "refreshed"):
        if name in values:
            values[name] = dict(values[name] or ())
    known = [field.name for field in dataclasses.fields(body_type) if field.name in values]
    fields = {name: values[name] for name in known}  # a table may be older than a column
    return Record(row["index"], body_type.from_dict(fields), row["time"], row["attempt"])


def as_read_back(job: Job, record: Record) -> Record:
    """Returns the record as the tables will give it back (an int in a float column, say).

    Done when it is made, so that a stream replayed from the tables equals the first one bit for
    bit, and so that what no table could hold fails at once.
    """
    columns = _STAGE_COLUMNS if record.stage else _CURVE_COLUMNS
    if all(_is_kept(columns.get(k), value) for k, value in vars(record.body).items()):
        return record  # a table for one row takes a hundred times as long as this look
    tables = tables_of(job, [record])
    if record.stage:
        return record_of(tables["stages"].to_pylist()[0], StageRecord)
    return record_of(tables["curve"].to_pylist()[0], CurvePoint)


def _is_kept(column: pa.DataType | None, value: Any) -> bool:
    """Tells whether a column surely gives back exactly this value; ``None`` is no column."""
    if value is None or column is None:
        return value is None and column is not None
    if column == _MAP:
        pairs = value.items() if type(value) is dict else [(None, None)]
        return all(type(k) is str and k.isascii() and type(v) is float for k, v in pairs)
    if type(value) is int:
        return bool(pa.types.is_integer(column)) and abs(value) < 2 ** (column.bit_width - 1)
    if type(value) is str:
        return bool(column == pa.string()) and value.isascii()
    return type(value) is float and bool(column == pa.float64())


_MAP = pa.map_(pa.string(), pa.float64())
_STAGE_COLUMNS = {field.name: field.type for field in STAGE_SCHEMA}
_CURVE_COLUMNS = {field.name: field.type for field in CURVE_SCHEMA}


def to_parquet(table: pa.Table) -> bytes:
    """Returns the bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())


def from_parquet(data: bytes, body_type: type[StageRecord] | type[CurvePoint]) -> list[Record]:
    """Returns the records in the bytes of one of the two tables."""
    # Handing a few rows to threads would take ten times as long as reading them.
    rows = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False).to_pylist()
    return [record_of(row, body_type) for row in rows]
