"""What a pruned forward pass executes, counted as torch dispatches it: no clock, so no noise."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from comp import attention
from comp.handle import PruningHandle
from comp.models import attach
from comp.modes import Stream
from comp.shrink import shrink_
from tests.tiny import FAMILIES, TinyFamily, random_masks, sample_of

THRESHOLDS = {Stream.VISION: 0.8, Stream.TEXT: 0.7}
SIZE = 6
HEADS_READ_PADDING = ("blip-retrieval", "blip-caption", "llava")  # in the stock code
SCORING = [name for name in FAMILIES if name != "llava"]  # all tokens vote there


class Work(TorchDispatchMode):
    """Counts what products with weights cost and the attention matrices that are formed.

    Attributes:
        macs: Multiply-adds of products of rows with a weight.
        rows: Rows that each weight was multiplied by, by the weight's address.
        matrices: Shapes of attention probabilities, ``(B, H, Q, N)`` each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0
        self.rows: Counter[int] = Counter()
        self.matrices: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            rows, weight = args[-2:]
            self.macs += rows.shape[0] * weight.numel()
            self.rows[weight.data_ptr()] += rows.shape[0]
        elif name == "_softmax" and result.dim() == 4:
            self.matrices.append(tuple(result.shape))
        return result


def work_of(run: Callable[[], object]) -> Work:
    with Work() as work:
        run()
    return work


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def pruned(family: TinyFamily, thresholds: dict[Stream, float]) -> PruningHandle:
    handle = attach(family.build(0))
    handle.masks = random_masks(handle)
    shrink_(handle)
    handle.thresholds = dict(thresholds)
    return handle


def scoring_layers(handle: PruningHandle) -> int:
    return sum(
        block.drops_tokens and block.boundary != 0
        for blocks in handle.structure.encoders.values()
        for block in blocks
    )


def cost_of_a_batch(family: TinyFamily, thresholds: dict[Stream, float]) -> int:
    """Multiply-adds of a batch beyond what its samples cost alone."""
    handle, batch = pruned(family, thresholds), family.batch(SIZE, 0)
    together = work_of(lambda: family.outputs(handle.model, batch))
    samples = [sample_of(batch, row) for row in range(SIZE)]
    alone = [work_of(partial(family.outputs, handle.model, sample)) for sample in samples]
    assert together.macs > 0
    return together.macs - sum(work.macs for work in alone)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_batch_costs_what_its_samples_cost_alone(name: str) -> None:
    family = FAMILIES[name]
    heads = cost_of_a_batch(family, {}) if name in HEADS_READ_PADDING else 0
    assert cost_of_a_batch(family, THRESHOLDS) == heads


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_layer_computes_the_rows_that_are_kept_and_no_others(name: str) -> None:
    family = FAMILIES[name]
    handle, batch = pruned(family, THRESHOLDS), family.batch(SIZE, 0)
    with handle.metering() as meter:
        work = work_of(lambda: family.outputs(handle.model, batch))
    kept, computed = {}, {}
    for encoder, blocks in handle.structure.encoders.items():
        for block in blocks:
            last = block.layer if block.boundary is None else block.layer - 1  # that dropped
            if last >= 0:
                weight = block.feed_forward.out.linear.weight
                computed[encoder, block.layer] = work.rows[weight.data_ptr()]
                kept[encoder, block.layer] = int(meter._tokens[encoder, last])
    assert computed == kept


@pytest.mark.parametrize("name", list(FAMILIES))
def test_where_no_token_can_be_dropped_no_attention_matrix_is_formed(name: str) -> None:
    family = FAMILIES[name]
    handle, batch = pruned(family, {}), family.batch(SIZE, 0)
    assert work_of(lambda: family.outputs(handle.model, batch)).matrices == []


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_layer_that_drops_tokens_forms_one_attention_matrix(name: str) -> None:
    family = FAMILIES[name]
    handle, batch = pruned(family, THRESHOLDS), family.batch(SIZE, 0)
    matrices = work_of(lambda: family.outputs(handle.model, batch)).matrices
    passes = 2 if name == "blip-retrieval" else 1  # features, then matching
    assert len(matrices) == passes * scoring_layers(handle)


@pytest.mark.parametrize("name", SCORING)
def test_attention_matrices_are_formed_in_pieces_with_equal_results(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES[name]
    handle, batch = pruned(family, THRESHOLDS), family.batch(SIZE, 0)
    whole = family.outputs(handle.model, batch)
    monkeypatch.setattr(attention, "_CACHED_NUMBERS", 64)
    pieces: list[Any] = []
    work = work_of(lambda: pieces.append(family.outputs(handle.model, batch)))
    assert max(shape[0] * shape[2] for shape in work.matrices) <= 16
    torch.testing.assert_close(pieces[0], whole, rtol=0, atol=1e-5)


def test_training_keeps_no_attention_matrix_for_the_backward_pass() -> None:
    family = FAMILIES["clip"]
    handle, batch = attach(family.build(0)), family.batch(SIZE, 0)
    handle.thresholds = dict(THRESHOLDS)
    handle.model.train()
    saved: list[tuple[int, ...]] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        family.losses(handle.model, batch).mean()
    first = handle.structure.encoders["vision"][0].attention.num_units, 17, 17
    assert (SIZE, 17, 32) in saved  # the rows that enter the first layer
    assert (SIZE, *first) not in saved
