"""Two processes that prune one small LLaVA together, against one that does it alone."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from comp.config import PruningConfig
from comp.cost import Meter, joined_meters
from comp.handle import handle_of
from comp.momentum import momentum_of
from comp.workers import ALONE, Workers
from tests.comp import shared_runs
from tests.comp.shared_runs import assert_close


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the first of two workers got; the second is another process."""
    meeting = tmp_path_factory.mktemp("meeting") / "store"
    command = [sys.executable, "-m", "tests.comp.shared_runs", str(meeting)]
    second = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield shared_runs.together(0, meeting)
    finally:
        try:
            _, errors = second.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            second.kill()
            _, errors = second.communicate()
    assert second.returncode == 0, errors


@pytest.mark.parametrize("name", shared_runs.RUNS)
def test_two_workers_find_what_one_finds(both: dict[str, Any], name: str) -> None:
    assert_close(both[name], shared_runs.RUNS[name](ALONE))


@pytest.mark.parametrize("kind", ["weights", "gradients", "moments"])
def test_of_two_sharded_workers_each_holds_half(both: dict[str, Any], kind: str) -> None:
    assert both["held"][kind] == pytest.approx(0.5, abs=0.02)


def test_a_batch_is_split_into_parts_for_every_worker() -> None:
    config = PruningConfig(batch_size=24, accumulate=4)
    assert Workers(0, 6).split(config).accumulate == 12
    assert ALONE.split(config) == config


def test_a_batch_that_workers_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 32 cannot be shared by 3 workers"):
        Workers(0, 3).split(PruningConfig(batch_size=32))


def test_workers_take_turns() -> None:
    assert [list(Workers(rank, 2).own(range(5))) for rank in (0, 1)] == [[0, 2, 4], [1, 3]]


def test_joined_meters_have_seen_the_samples_of_all() -> None:
    meters = []
    for count in (3, 4):
        meter = Meter()
        meter.add_tokens("text", 0, torch.tensor([count, count]))
        meter.add_fixed(count)
        meter.num_samples = 2
        meters.append(meter)
    cost = joined_meters(meters).measurement([], {})
    assert (cost.num_samples, cost.total_macs, cost.tokens) == (4, 7, {"text.0": 3.5})


def test_workers_share_no_queue_of_features() -> None:
    one = shared_runs.pruner(ALONE, "blip-vqa")
    handle_of(one.model).workers = Workers(0, 2)
    with pytest.raises(ValueError, match="2 workers cannot share one queue of features"):
        momentum_of(one.model, length=4, batch=2, width=4)


def test_gradients_of_a_lone_process_stay() -> None:
    layer = nn.Linear(2, 1)
    layer(torch.ones(1, 2)).sum().backward()
    ALONE.sum_gradients_(layer.parameters())
    assert torch.equal(layer.weight.grad, torch.ones(1, 2))  # type: ignore[arg-type]
