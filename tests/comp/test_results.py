"""Records survive JSON, and points make a table that a person can read."""

import json

import pytest

from comp.results import (
    CurvePoint,
    PruningResult,
    StageRecord,
    format_points,
    pack_outcomes,
    unpack_outcomes,
)

DENSE = CurvePoint(
    model="tiny",
    task="vqa",
    method="dense",
    seed=0,
    ratio_asked=0.0,
    ratio_reached=0.0,
    gmacs=132.54,
    params=2_500_000,
    val=77.0,
    test=76.5,
    val_before_tuning=77.0,
    latency_ms=20.0,
    dense_latency_ms=20.0,
    fine_tuned=0,
    test_ratio=0.0,
)
PRUNED = CurvePoint(
    model="tiny",
    task="vqa",
    method="comp",
    seed=0,
    ratio_asked=0.8,
    ratio_reached=0.8012,
    gmacs=26.3,
    params=900_000,
    val=73.25,
    test=72.0,
    val_before_tuning=60.0,
    latency_ms=5.0,
    dense_latency_ms=20.0,
    fine_tuned=100,
    test_ratio=0.79,
)
STAGE = StageRecord(
    stage=3,
    mode="vision_tokens",
    choice="greedy",
    ratio=0.06,
    macs=1e9,
    params=2_500_000,
    val=76.0,
    val_loss=0.6,
    train_loss=0.5,
    cost=-0.5,
    mode_cost=0.1,
    threshold=0.4,
    units=0,
    tokens={"vision": 40.5},
    seconds=2.0,
    snapshot=None,
)


def test_records_survive_json() -> None:
    assert StageRecord.from_dict(json.loads(json.dumps(STAGE.to_dict()))) == STAGE
    assert CurvePoint.from_dict(json.loads(json.dumps(PRUNED.to_dict()))) == PRUNED


def test_the_speed_up_is_dense_over_pruned() -> None:
    assert PRUNED.speed_up == 4.0


def test_the_table_says_what_counts_as_an_operation() -> None:
    lines = format_points([DENSE, PRUNED]).splitlines()
    assert len(lines) == 4
    assert lines[0].split() == [
        "ratio", "GFLOPs*", "params", "val", "test", "latency", "speed-up"
    ]  # fmt: skip
    assert lines[2].split() == [
        "0.801", "26.3", "0.9", "M", "73.25", "72.00", "20.0", "->", "5.0", "ms", "4.00x"
    ]  # fmt: skip
    assert lines[3] == "* multiply-add = 1"
    assert len({len(line) for line in lines[:3]}) == 1


def test_a_result_prints_its_table() -> None:
    result = PruningResult(model=None, stages=[STAGE], points=[DENSE, PRUNED])
    assert str(result) == format_points([DENSE, PRUNED])


def test_outcomes_are_kept_in_few_bytes() -> None:
    values = [float(i % 3 > 0) for i in range(1000)] + [0.25, 1 / 3]
    text = pack_outcomes(values)
    assert unpack_outcomes(text) == pytest.approx(values, rel=1e-7)
    assert len(text) < 400
    assert unpack_outcomes("") == []


def test_text_that_holds_no_outcomes_is_refused() -> None:
    with pytest.raises(ValueError, match="must be text from pack_outcomes, but got 'abcd'"):
        unpack_outcomes("abcd")
