"""Records and the tables that give them back."""

from pathlib import Path
from typing import Any

import pytest

from comp.results import CurvePoint, StageRecord
from orchestration.job import Record
from orchestration.store_tables import as_read_back, record_of, tables_of
from tests.orchestration.trials import make_job, make_point, make_stage


def through_a_table(record: Record, directory: Path) -> Record:
    tables = tables_of(make_job(directory), [record])
    name, kind = ("stages", StageRecord) if record.stage else ("curve", CurvePoint)
    return record_of(tables[name].to_pylist()[0], kind)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"val": 80},
        {"val": float("inf")},
        {"params": 2**40},
        {"layers": {"vision.0 heads": 3}},
        {"layers": {"Schicht ü": 3.5}},
        {"val": True},
    ],
    ids=str,
)
def test_a_record_is_what_a_table_gives_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    for body in (make_point(0.5, **changes), make_stage(2)):
        record = Record(0, body, 1.5)
        found = as_read_back(make_job(tmp_path), record)
        expected = through_a_table(record, tmp_path)
        assert found == expected
        types = [[type(value) for value in vars(r.body).values()] for r in (found, expected)]
        assert types[0] == types[1]


def test_what_no_table_can_hold_fails_when_the_record_is_made(tmp_path: Path) -> None:
    record = Record(0, make_point(0.5, params=2**70), 1.5)
    with pytest.raises((OverflowError, ValueError)):
        as_read_back(make_job(tmp_path), record)
