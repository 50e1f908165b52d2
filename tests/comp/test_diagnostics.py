"""How far the two importance measures disagree."""

import dataclasses
from typing import Any

import pytest
import torch

from comp.diagnostics import _TokenContributions, interference
from comp.models import attach
from tests.tiny import FAMILIES, TinyTask

NLVR = FAMILIES["blip-nlvr"]


def batches(task: TinyTask) -> Any:
    return task.batches("train", batch_size=4, num_samples=8)


def test_every_layer_that_scores_tokens_is_reported() -> None:
    task = TinyTask(NLVR)
    found = interference(attach(NLVR.build(0)), task, batches(task))
    assert [(entry.encoder, entry.layer) for entry in found] == [
        ("vision", 0),
        ("vision", 1),
        ("vision", 2),
        ("text", 0),
        ("text", 1),
    ]
    for entry in found:
        assert 0 <= entry.overlap <= 1
        assert entry.num_samples == (16 if entry.encoder == "vision" else 8)


def test_two_random_choices_overlap_by_the_share() -> None:
    task = TinyTask(NLVR)
    found = interference(attach(NLVR.build(0)), task, batches(task), share=0.5)
    assert found[0].expected == pytest.approx(0.5)


def test_all_tokens_overlap_with_themselves() -> None:
    task = TinyTask(NLVR)
    found = interference(attach(NLVR.build(0)), task, batches(task), share=0.999)
    assert {entry.overlap for entry in found} == {1.0}


def test_the_handle_is_left_as_it_was() -> None:
    task = TinyTask(NLVR)
    handle = attach(NLVR.build(0))
    handle.model.train()
    interference(handle, task, batches(task))
    assert handle.statistics is None
    assert handle.model.training


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_out_of_bounds_is_refused(share: float) -> None:
    task = TinyTask(NLVR)
    with pytest.raises(ValueError, match=rf"share must be in \(0, 1\), but got {share}"):
        interference(attach(NLVR.build(0)), task, [], share=share)


def test_without_cip_there_are_no_scores_to_compare() -> None:
    task = TinyTask(NLVR)
    handle = attach(NLVR.build(0))
    handle.switches = dataclasses.replace(handle.switches, cip=False)
    with pytest.raises(ValueError, match="interference needs token scores"):
        interference(handle, task, [])


@pytest.mark.equations("Eq. 3", "Eq. 6")
@pytest.mark.parametrize(("loudest", "overlap"), [((1, 2), 1.0), ((2, 3), 0.5), ((3, 4), 0.0)])
def test_overlap_is_of_the_tokens_behind_eq_3_with_those_of_eq_6(
    loudest: tuple[int, ...], overlap: float
) -> None:
    """Token 0 is pooled; attention ranks 1 and 2 highest; some tokens have large activations."""
    name = "vision_model.encoder.layers.0.self_attn"
    collector = _TokenContributions(attach(NLVR.build(0)), share=0.5)
    activation = torch.ones(1, 5, 32)
    activation[:, list(loudest)] = 3.0
    collector.add(name, activation, torch.tensor([[1.0, 0.4, 0.3, 0.2, 0.1]]))
    assert collector.overlaps[name] == [overlap]
    assert collector.expected[name] == [0.5]
