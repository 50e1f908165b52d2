"""Latency of two models side by side."""

import pytest
import torch

from comp.measure import LatencyReport, compare_latency
from comp.models import attach
from comp.shrink import shrink_
from tests.tiny import FAMILIES, TinyTask, random_masks

NLVR = FAMILIES["blip-nlvr"]


def test_both_models_are_timed_in_eval_mode_and_put_back() -> None:
    task = TinyTask(NLVR)
    dense, handle = NLVR.build(0), attach(NLVR.build(0))
    handle.masks = random_masks(handle)
    shrink_(handle)
    dense.train()
    batch = next(iter(task.batches("val", batch_size=4)))
    report = compare_latency(dense, handle.model, task, batch, repeats=3, warmup=1)
    assert dense.training
    assert not handle.model.training
    assert (report.batch_size, report.repeats, report.device) == (4, 3, "cpu")
    assert report.dense_ms > 0
    assert report.pruned_ms > 0
    assert report.spread[0] <= report.speed_up <= report.spread[1]


def test_one_repeat_is_enough() -> None:
    task = TinyTask(NLVR)
    model = NLVR.build(0)
    batch = next(iter(task.batches("val", batch_size=2)))
    report = compare_latency(model, model, task, batch, repeats=1, warmup=0)
    assert report.spread == (report.speed_up, report.speed_up)


def test_no_repeat_is_refused() -> None:
    model = NLVR.build(0)
    with pytest.raises(ValueError, match="repeats must be at least 1, but got 0"):
        compare_latency(model, model, TinyTask(NLVR), {"x": torch.ones(1)}, repeats=0)


def test_a_report_reads_as_a_sentence() -> None:
    report = LatencyReport(20.0, 5.0, 4.0, (3.5, 4.5), 8, 20, "cpu")
    assert str(report) == (
        "dense 20.00 ms, pruned 5.00 ms, speed-up 4.00x (quartiles 3.50-4.50, batch 8, "
        "20 pairs, cpu)"
    )
