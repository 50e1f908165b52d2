from itertools import islice

import pytest
import torch

from comp.tasks.batching import jitter, training_order


def order(start: int = 0, seed: int = 0) -> list[list[int]]:
    return [b for _, b in islice(training_order(10, batch_size=4, seed=seed, start=start), 5)]


def test_every_epoch_holds_each_sample_once() -> None:
    flat = [index for batch in order() for index in batch]
    assert sorted(flat[:10]) == list(range(10))
    assert sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]


def test_starting_late_equals_skipping() -> None:
    assert order(start=3)[:2] == order()[3:]


def test_another_seed_is_another_order() -> None:
    assert order(seed=1) != order(seed=0)


@pytest.mark.parametrize(("samples", "size", "start"), [(0, 4, 0), (10, 0, 0), (10, 4, -1)])
def test_numbers_out_of_bounds_are_named(samples: int, size: int, start: int) -> None:
    with pytest.raises(ValueError, match=f"but got {samples}, {size} and {start}"):
        next(training_order(samples, batch_size=size, seed=0, start=start))


def picture() -> torch.Tensor:
    pixels = torch.full((6, 3, 32, 32), 255, dtype=torch.uint8)
    pixels[:, :, 8:24, 4:12] = 0  # a bar on the left
    return pixels


def test_jitter_depends_on_seed_and_step_alone() -> None:
    first = jitter(picture(), seed=1, step=5, flip=True)
    assert torch.equal(first, jitter(picture(), seed=1, step=5, flip=True))
    assert not torch.equal(first, jitter(picture(), seed=1, step=6, flip=True))
    assert not torch.equal(first, jitter(picture(), seed=2, step=5, flip=True))


def test_jitter_without_flip_keeps_left_on_the_left() -> None:
    for step in range(8):
        dark = 255.0 - jitter(picture(), seed=0, step=step, flip=False)
        assert (dark[..., :16].sum((1, 2, 3)) > dark[..., 16:].sum((1, 2, 3))).all()


def test_jitter_with_flip_mirrors_some() -> None:
    dark = 255.0 - jitter(picture(), seed=0, step=0, flip=True)
    is_left = dark[..., :16].sum((1, 2, 3)) > dark[..., 16:].sum((1, 2, 3))
    assert is_left.any()
    assert not is_left.all()


def test_no_jitter_is_the_identity() -> None:
    same = jitter(picture(), seed=0, step=0, flip=False, shift=0.0, scale=0.0)
    torch.testing.assert_close(same, picture().float(), atol=1e-3, rtol=0)


def test_workers_together_yield_what_one_yields() -> None:
    alone = [batch for _, batch in islice(training_order([4] * 20, batch_size=4, seed=0), 6)]
    shards = [
        [batch for _, batch in islice(found, 2)]
        for found in (
            training_order([4] * 20, batch_size=4, seed=0, shard=(rank, 3)) for rank in range(3)
        )
    ]
    assert [shards[step % 3][step // 3] for step in range(6)] == alone


def test_a_shard_out_of_bounds_is_named() -> None:
    with pytest.raises(ValueError, match=r"rank in \[0, 2\), got 2"):
        next(training_order(10, batch_size=4, seed=0, shard=(2, 2)))
