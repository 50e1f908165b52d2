"""The run directory: what is in it when, whom it obeys, and that it reads back exactly."""

import dataclasses
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestration.job import Failure, digest_of
from orchestration.store import (
    Fenced,
    RunDirectory,
    RunMismatch,
    list_runs,
    read_run,
)
from orchestration.store_tables import CURVE_SCHEMA, STAGE_SCHEMA, record_of, row_of
from tests.orchestration.trials import CONFIG, make_job, make_point, make_stage

DOCS = Path(__file__).parents[2] / "docs" / "results-format.md"


def save(target: Path) -> None:
    target.mkdir(parents=True)
    (target / "manifest.json").write_text("{}")


def fill(run: RunDirectory) -> None:
    run.append(make_point(0.0), save=save)
    run.append(make_stage(1), save=save)
    run.append(make_stage(2, snapshot=0.25), save=save)
    run.append(make_point(0.25), save=save, models={"ratio-250": save})


def files_of(directory: Path) -> set[str]:
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}


def test_a_run_going_on_has_a_file_per_record_and_two_checkpoints(tmp_path: Path) -> None:
    run = RunDirectory.open(make_job(tmp_path))
    fill(run)
    assert files_of(tmp_path / "s-0000") == {
        "spec.yaml",
        "job.json",
        "owner.json",
        *(f"records/0000{i}.json" for i in range(4)),
        "state/00002/manifest.json",
        "state/00003/manifest.json",
        "model/ratio-250/manifest.json",
    }


def test_a_finished_run_has_tables_models_and_a_manifest(tmp_path: Path) -> None:
    run = RunDirectory.open(make_job(tmp_path))
    fill(run)
    run.finish()
    assert files_of(tmp_path / "s-0000") == {
        "spec.yaml",
        "job.json",
        "stages.parquet",
        "curve.parquet",
        "report.json",
        "manifest.json",
        "model/ratio-250/manifest.json",
    }
    manifest = json.loads((tmp_path / "s-0000" / "manifest.json").read_text())
    assert set(manifest["files"]) | {"manifest.json"} == files_of(tmp_path / "s-0000")


def test_records_read_the_same_before_and_after_the_end(tmp_path: Path) -> None:
    run = RunDirectory.open(make_job(tmp_path))
    fill(run)
    before = read_run(tmp_path / "s-0000")
    end = run.finish()
    after = read_run(tmp_path / "s-0000")
    assert list(before.records) == run.records == list(after.records)
    assert end.digest == digest_of(after.records)
    assert (before.outcome, after.outcome) == ("unfinished", "finished")
    assert [point.ratio_asked for point in after.points] == [0.0, 0.25]
    assert [stage.stage for stage in after.stages] == [1, 2]


def test_an_int_where_a_float_belongs_reads_back_as_it_was_yielded(tmp_path: Path) -> None:
    run = RunDirectory.open(make_job(tmp_path))
    yielded = run.append(dataclasses.replace(make_stage(1), macs=5, cost=math.inf))
    run.finish()
    assert json.dumps(read_run(tmp_path / "s-0000").records[0].to_dict()) == json.dumps(
        yielded.to_dict()
    )


def test_the_tables_have_the_published_schemas(tmp_path: Path) -> None:
    run = RunDirectory.open(make_job(tmp_path))
    fill(run)
    run.finish()
    stages = pq.read_schema(tmp_path / "s-0000" / "stages.parquet")
    curve = pq.read_schema(tmp_path / "s-0000" / "curve.parquet")
    assert (stages, stages.metadata) == (STAGE_SCHEMA, STAGE_SCHEMA.metadata)
    assert (curve, curve.metadata) == (CURVE_SCHEMA, CURVE_SCHEMA.metadata)
    first = "study trial model task method seed ratio_asked ratio_reached gmacs params val test"
    assert curve.names[:15] == [*first.split(), "latency_ms", "dense_latency_ms", "fine_tuned"]


@pytest.mark.parametrize("schema", [STAGE_SCHEMA, CURVE_SCHEMA], ids=["stages", "curve"])
def test_every_column_is_documented_with_its_type(schema: pa.Schema) -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", DOCS.read_text(), re.MULTILINE)
    documented = {name: kind.strip() for name, kind in rows}
    for field in schema:
        assert documented.get(field.name) == str(field.type), field.name


def test_opening_again_goes_on_behind_the_last_record(tmp_path: Path) -> None:
    fill(RunDirectory.open(make_job(tmp_path)))
    again = RunDirectory.open(make_job(tmp_path).next_attempt())
    assert [record.index for record in again.records] == [0, 1, 2, 3]
    assert again.append(make_stage(3)).index == 4
    assert again.records[-1].attempt == 1


def test_a_checkpoint_without_its_record_is_dropped(tmp_path: Path) -> None:
    fill(RunDirectory.open(make_job(tmp_path)))
    save(tmp_path / "s-0000" / "state" / "00004")
    again = RunDirectory.open(make_job(tmp_path))
    with again.latest_state() as path:
        assert path.name == "00003"
    assert sorted(p.name for p in (tmp_path / "s-0000/state").iterdir()) == ["00002", "00003"]


def test_a_worker_that_was_replaced_cannot_write(tmp_path: Path) -> None:
    old = RunDirectory.open(make_job(tmp_path))
    old.append(make_point(0.0))
    new = RunDirectory.open(make_job(tmp_path).next_attempt())
    with pytest.raises(Fenced, match="was taken over by process"):
        old.append(make_stage(1))
    with pytest.raises(Fenced):
        old.finish()
    assert new.append(make_stage(1)).index == 1


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (
            {"config": dataclasses.replace(CONFIG, seed=3).to_dict()},
            "config.seed is 0 there and 3",
        ),
        ({"model": "other"}, "model is 'none' there and 'other'"),
        ({"study": "t"}, "study is 's' there and 't'"),
    ],
)
def test_a_directory_of_another_spec_is_refused_and_left_alone(
    tmp_path: Path, changes: dict[str, object], what: str
) -> None:
    fill(RunDirectory.open(make_job(tmp_path)))
    before = files_of(tmp_path)
    with pytest.raises(RunMismatch, match=f"belongs to another spec .{what}"):
        RunDirectory.open(make_job(tmp_path, **changes))
    assert files_of(tmp_path) == before


def test_a_directory_of_a_version_that_knew_fewer_keys_is_refused_by_the_key(
    tmp_path: Path,
) -> None:
    config = make_job(tmp_path).config
    older = {name: value for name, value in config.items() if name != "cip"}
    fill(RunDirectory.open(make_job(tmp_path, config=older)))
    with pytest.raises(RunMismatch, match=r"config\.cip is 'unknown' there and None here"):
        RunDirectory.open(make_job(tmp_path, config=config))


def test_a_failure_is_noted_and_forgotten_when_the_run_goes_on(tmp_path: Path) -> None:
    run = RunDirectory.open(make_job(tmp_path))
    failure = Failure("algorithm", "loss is nan", "NanLoss", "Traceback ...")
    run.fail(failure)
    assert read_run(run.storage.location).outcome == "failed"
    assert read_run(run.storage.location).failure == failure
    RunDirectory.open(make_job(tmp_path))
    assert read_run(run.storage.location).outcome == "unfinished"


def test_the_report_is_strict_json_even_with_nan(tmp_path: Path) -> None:
    run = RunDirectory.open(make_job(tmp_path))
    run.append(make_point(0.0, val_before_tuning=math.nan))
    run.finish()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    text = (tmp_path / "s-0000" / "report.json").read_text()
    report = json.loads(text, parse_constant=refuse)
    assert report["points"][0]["val_before_tuning"] is None


def test_the_report_says_what_evaluation_took_beside_training(tmp_path: Path) -> None:
    run = RunDirectory.open(make_job(tmp_path))
    for number, seconds in enumerate((2.0, 6.0), start=1):
        run.append(replace(make_stage(number), train_seconds=seconds, eval_seconds=0.6))
    run.finish()
    report = json.loads((tmp_path / "s-0000" / "report.json").read_text())
    assert report["eval_over_train"] == pytest.approx(1.2 / 8)


def test_what_has_no_column_is_kept_in_extra(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    record = RunDirectory.open(job).append(make_stage(1))
    row = row_of(job, record) | {"extra": json.dumps({"later": 1})}
    assert record_of(row | {"tokens": list(record.stage.tokens.items())}, type(record.stage)) == (
        record
    )


def test_runs_are_found_by_what_is_in_them(tmp_path: Path) -> None:
    for name in ("s-0001", "s-0000"):
        RunDirectory.open(make_job(tmp_path, run=name))
    (tmp_path / "not-a-run").mkdir()
    assert list_runs(tmp_path) == [str(tmp_path / "s-0000"), str(tmp_path / "s-0001")]
    assert list_runs(tmp_path / "missing") == []


def test_a_directory_without_a_run_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not a run directory: job\.json is missing"):
        read_run(tmp_path)


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    RunDirectory.open(make_job(tmp_path))
    path = tmp_path / "s-0000" / "job.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    with pytest.raises(ValueError, match="has format version 99, but this program reads up to 1"):
        read_run(tmp_path / "s-0000")
