"""The contrastive losses, hard negatives and ranks, each held against the papers' own words."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from comp.contrast import (
    Candidates,
    contrastive_loss,
    hard_negatives,
    rank_and_loss,
    soft_targets,
)


def unit(*shape: int) -> Tensor:
    return functional.normalize(torch.randn(*shape), dim=-1)


def told(images: Tensor, num: int) -> Tensor:
    return torch.ones(len(images), num, dtype=torch.bool)


def metric_of(images: Tensor, texts: Tensor) -> list[float]:
    values: list[float] = (
        rank_and_loss(images, texts, told(images, texts.shape[1]))[0].hits().tolist()
    )
    return values


def test_a_perfect_model_finds_everything() -> None:
    images = torch.eye(5)
    assert metric_of(images, images[:, None].expand(-1, 3, -1)) == [1.0] * 5


def test_any_caption_of_its_own_is_right_for_an_image() -> None:
    images = torch.eye(2)
    texts = torch.stack([torch.eye(2), torch.eye(2)[[1, 1]]])  # the first image's second is wrong
    texts[0, 1] = torch.tensor([0.0, 0.9])
    assert metric_of(images, texts) == [0.75, 1.0]


def test_the_loss_with_one_caption_is_clips() -> None:
    images, texts = torch.randn(2, 7, 4)
    logits, target = images @ texts.T, torch.arange(7)
    both = functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
    found = rank_and_loss(images, texts[:, None], told(images, 1))[1]
    torch.testing.assert_close(found.mean(), both / 2)


def test_chunks_change_nothing() -> None:
    images, texts = torch.randn(11, 4), torch.randn(11, 3, 4)
    known = torch.rand(11, 3) < 0.7
    known[:, 0] = True
    whole, parts = (rank_and_loss(images, texts, known, chunk=chunk) for chunk in (256, 4))
    torch.testing.assert_close(parts[1], whole[1])
    assert torch.equal(parts[0].of_texts, whole[0].of_texts)
    assert torch.equal(parts[0].of_images, whole[0].of_images)


def test_recall_counts_images_and_captions_each_once() -> None:
    images = torch.eye(4)
    texts = torch.eye(4)[:, None].repeat(1, 2, 1)
    texts[0] = torch.eye(4)[1]  # both captions of the first image fit the second
    known = torch.ones(4, 2, dtype=torch.bool)
    known[0, 1] = False
    ranks, _ = rank_and_loss(images, texts, known)
    assert ranks.recall(1) == (pytest.approx(0.5), pytest.approx(6 / 7))
    assert float(ranks.hits().mean()) == pytest.approx(sum(ranks.recall(1)) / 2)


def test_a_missing_caption_changes_nothing() -> None:
    images, texts = torch.randn(5, 4), torch.randn(5, 2, 4)
    longer = torch.cat([texts, 100 * torch.randn(5, 1, 4)], dim=1)
    known = functional.pad(told(images, 2), (0, 1))
    short, long = (
        rank_and_loss(images, texts, told(images, 2)),
        rank_and_loss(images, longer, known),
    )
    torch.testing.assert_close(short[1], long[1])
    assert torch.equal(short[0].of_texts, long[0].of_texts)
    assert short[0].recall(1) == long[0].recall(1)


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_features_that_say_nothing_find_nothing(value: float) -> None:
    assert metric_of(torch.full((4, 3), value), torch.full((4, 2, 3), value)) == [0.0] * 4


def test_targets_are_the_images_own_texts_until_the_slow_copy_has_a_say() -> None:
    similarity = torch.randn(3, 6)
    same = torch.zeros(3, 6, dtype=torch.bool)
    same[0, [0, 4]] = same[1, 1] = same[2, 2] = True
    hard = soft_targets(similarity, same, 0.0)
    assert hard[0].tolist() == [0.5, 0, 0, 0, 0.5, 0]
    mixed = soft_targets(similarity, same, 0.4)
    torch.testing.assert_close(mixed, 0.6 * hard + 0.4 * similarity.softmax(dim=1))


def test_the_contrastive_loss_is_albefs() -> None:
    images, texts = unit(3, 8), unit(3, 8)
    candidates = Candidates(unit(7, 8), unit(7, 8), torch.tensor([5, 6, 7, 5, 1, 2, 3]))
    factor, alpha = torch.tensor(1 / 0.07), 0.4
    found = contrastive_loss(images, texts, candidates, factor, alpha)
    # ALBEF's own lines, with its names.
    idx_all, temp = candidates.ids, 0.07
    pos_idx = torch.eq(idx_all[:3, None], idx_all).float()
    sim_targets = pos_idx / pos_idx.sum(1, keepdim=True)
    sim_i2t_m = candidates.images[:3] @ candidates.texts.t() / temp
    sim_t2i_m = candidates.texts[:3] @ candidates.images.t() / temp
    i2t_targets = alpha * functional.softmax(sim_i2t_m, dim=1) + (1 - alpha) * sim_targets
    t2i_targets = alpha * functional.softmax(sim_t2i_m, dim=1) + (1 - alpha) * sim_targets
    sim_i2t = images @ candidates.texts.t() / temp
    sim_t2i = texts @ candidates.images.t() / temp
    loss_i2t = -torch.sum(functional.log_softmax(sim_i2t, dim=1) * i2t_targets, dim=1).mean()
    loss_t2i = -torch.sum(functional.log_softmax(sim_t2i, dim=1) * t2i_targets, dim=1).mean()
    torch.testing.assert_close(found, (loss_i2t + loss_t2i) / 2)


def test_a_hard_negative_is_never_of_the_same_image() -> None:
    ids = torch.tensor([0, 0, 1, 2])
    same = ids[:, None] == ids
    for _ in range(50):
        rows, wrong = hard_negatives(50 * same.float(), same)
        assert rows.tolist() == [0, 1, 2, 3]
        assert not bool(same[rows, wrong].any())


def test_the_likelier_negative_is_drawn_more_often() -> None:
    similarity = torch.tensor([[0.0, math.log(3.0), 0.0]]).repeat(1000, 1)
    same = torch.zeros(1000, 3, dtype=torch.bool)
    same[:, 2] = True
    _, wrong = hard_negatives(similarity, same)
    assert float((wrong == 1).float().mean()) == pytest.approx(0.75, abs=0.05)


def test_a_batch_of_one_image_has_no_negative() -> None:
    rows, wrong = hard_negatives(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool))
    assert len(rows) == len(wrong) == 0
