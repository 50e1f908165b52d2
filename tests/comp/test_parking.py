"""What waits outside the memory that training needs comes back bit for bit."""

import resource
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from comp import parking
from comp.parking import Parked, ParkedModel, parked
from tests.tiny import FAMILIES, TinyFamily

TENSORS = [
    torch.randn(3, 5),
    torch.randn(4, 6).t(),
    torch.tensor(2.5),
    torch.tensor([], dtype=torch.int64),
    torch.randn(7).bfloat16(),
    torch.arange(9),
    torch.tensor([True, False]),
]


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda t: f"{t.dtype}-{list(t.shape)}")
def test_a_tensor_comes_back_as_it_was(tensor: Tensor) -> None:
    before = tensor.clone(memory_format=torch.preserve_format)
    waiting = Parked([torch.zeros(1), tensor])
    assert same(list(waiting.read())[1], before)


def test_who_writes_to_what_came_back_changes_no_other_reading() -> None:
    waiting = Parked([torch.ones(4)])
    next(waiting.read()).zero_()
    assert next(waiting.read()).tolist() == [1, 1, 1, 1]


def test_a_parked_parameter_is_the_same_object_and_trains_on() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    with parked([parameter]):
        assert parameter.shape == (3,)
        assert parameter.untyped_storage().nbytes() == 4  # of one element
    assert parameter.tolist() == [1, 1, 1]
    parameter.sum().backward()
    optimizer.step()
    assert parameter.tolist() == [0, 0, 0]


def test_no_file_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    waiting = Parked([torch.ones(3)])
    assert not list(tmp_path.iterdir())
    assert next(waiting.read()).tolist() == [1, 1, 1]


def test_a_disk_that_is_full_costs_memory_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    tensor = torch.ones(3)
    with pytest.warns(UserWarning, match=r"No space left on device.*TMPDIR"), parked([tensor]):
        pass
    assert tensor.tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_parked_model_is_built_with_the_same_weights_and_ties(name: str) -> None:
    family: TinyFamily = FAMILIES[name]
    model = family.build(0)
    built = ParkedModel(model).build()
    ours, theirs = (dict(m.state_dict()) for m in (model, built))
    assert ours.keys() == theirs.keys()
    assert all(same(ours[key], theirs[key]) for key in ours)
    assert len(list(built.parameters())) == len(list(model.parameters()))
    assert all(not tensor.is_meta for tensor in (*built.parameters(), *built.buffers()))


def test_a_parked_model_does_not_follow_the_one_it_was_made_of() -> None:
    model = nn.Linear(2, 2)
    waiting, before = ParkedModel(model), model.weight.tolist()
    with torch.no_grad():
        model.weight.zero_()
    assert waiting.build().weight.tolist() == before  # type: ignore[operator, union-attr]


@pytest.mark.skipif(parking._TRIM is None, reason="needs glibc")
def test_freed_memory_between_tensors_in_use_leaves_the_process() -> None:
    tensors = [torch.ones(25_000) for _ in range(500)]  # 100 kB each: not mapped on their own
    kept = tensors[::10]
    before = resident_mb()
    freed = parking.bytes_of(tensors)
    del tensors
    parking.give_back(freed)
    assert resident_mb() < before - 30
    assert all(tensor.sum() == 25_000 for tensor in kept)


def test_nothing_walks_over_all_memory_for_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[int] = []
    monkeypatch.setattr(parking, "_TRIM", walks.append)
    parking.give_back(parking.WORTH_A_WALK - 1)
    assert walks == []
    parking.give_back(parking.WORTH_A_WALK)
    assert walks == [0]


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6
