"""Jobs and records: what identifies them, and that they survive JSON and pickle."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from orchestration.job import Job, JobEnd, Record, digest_of
from tests.orchestration.trials import CONFIG, make_job, make_point, make_stage


def test_a_job_survives_json_and_pickle(tmp_path: Path) -> None:
    job = make_job(tmp_path, dense=make_point(0.0).to_dict())
    assert Job.from_dict(json.loads(json.dumps(job.to_dict()))) == job
    assert pickle.loads(pickle.dumps(job)) == job
    assert job.pruning_config == CONFIG


@pytest.mark.parametrize("body", [make_stage(2, snapshot=0.25), make_stage(1), make_point(0.5)])
def test_a_record_survives_json(body: object) -> None:
    record = Record(3, body, 1234.5678, 2)  # type: ignore[arg-type]
    assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "other"},
        {"task": "nlvr2"},
        {"data": "elsewhere"},
        {"kind": "dense"},
        {"config": replace(CONFIG, num_stages=5).to_dict()},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_decides_the_result_changes_the_content_id(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    assert make_job(tmp_path, **changes).content_id != make_job(tmp_path).content_id


def test_names_places_and_attempts_do_not_change_the_content_id(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    other = make_job(tmp_path / "elsewhere", run="s-0007", threads=2, spec_text="other")
    assert other.next_attempt().content_id == job.content_id


def test_the_digest_depends_on_values_and_order() -> None:
    records = [Record(0, make_point(0.0), 1.0), Record(1, make_stage(1), 2.0)]
    changed = [records[0], Record(1, make_stage(1, draw=0.51), 2.0)]
    assert digest_of(records) == digest_of(list(records))
    assert len({digest_of(records), digest_of(records[::-1]), digest_of(changed)}) == 3


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "a" * 129, "a b", "a\nb"])
@pytest.mark.parametrize("what", ["run_id", "study"])
def test_names_cannot_leave_the_storage_root(tmp_path: Path, what: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"{what} must be 1 to 128 letters"):
        make_job(tmp_path, **{what: name})


def test_threads_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="threads must be at least 1, but got 0"):
        make_job(tmp_path, threads=0)


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"kind must be one of prune, dense, .* but got 'x'"):
        make_job(tmp_path, kind="x")


def test_job_ends_compare_by_value() -> None:
    assert JobEnd(3, "ab") == JobEnd(3, "ab") != JobEnd(2, "ab")
