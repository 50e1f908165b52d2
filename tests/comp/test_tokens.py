"""Which tokens survive, in which order, and what becomes of the others."""

import itertools

import pytest
import torch
from torch import Tensor

from comp.tokens import keep_above, select

SAMPLES, TOKENS = 4, 9


@pytest.fixture
def valid() -> Tensor:
    return torch.arange(TOKENS) < torch.tensor([9, 7, 9, 5])[:, None]


@pytest.fixture
def protected() -> Tensor:
    return (torch.arange(TOKENS) == 0).expand(SAMPLES, -1)


@pytest.fixture
def scores(valid: Tensor, protected: Tensor) -> Tensor:
    raw = torch.rand(SAMPLES, TOKENS).square() * (valid & ~protected)
    return raw / raw.sum(dim=1, keepdim=True)


@pytest.mark.equations("Eq. 1")
def test_a_token_survives_if_its_relative_score_exceeds_the_threshold(
    scores: Tensor, valid: Tensor, protected: Tensor
) -> None:
    keep = keep_above(scores, 0.8, valid, protected, min_tokens=1)
    for b in range(SAMPLES):
        scored = [i for i in range(TOKENS) if valid[b, i] and not protected[b, i]]
        mean = sum(float(scores[b, i]) for i in scored) / len(scored)
        assert [i for i in scored if keep[b, i]] == [
            i for i in scored if float(scores[b, i]) / mean > 0.8
        ]


def test_an_absolute_threshold_counts_the_tokens_of_the_first_layer(
    scores: Tensor, valid: Tensor, protected: Tensor
) -> None:
    first = torch.full((SAMPLES,), 20)
    keep = keep_above(scores, 0.8, valid, protected, 1, first)
    assert torch.equal(keep, (20 * scores > 0.8) | (protected & valid))
    assert int(keep.sum()) > int(keep_above(scores, 0.8, valid, protected, 1).sum())


def test_a_threshold_of_zero_keeps_every_real_token(
    scores: Tensor, valid: Tensor, protected: Tensor
) -> None:
    assert torch.equal(keep_above(scores, 0.0, valid, protected, min_tokens=1), valid)


def test_fewer_tokens_survive_a_larger_threshold(
    scores: Tensor, valid: Tensor, protected: Tensor
) -> None:
    kept = [
        keep_above(scores, theta, valid, protected, min_tokens=2)
        for theta in (0.0, 0.3, 0.7, 1.0, 1.5, 3.0, 100.0)
    ]
    for more, fewer in itertools.pairwise(kept):
        assert not (fewer & ~more).any()
    assert kept[0].sum() > kept[3].sum() > kept[-1].sum()


@pytest.mark.parametrize("min_tokens", [1, 2, 4])
def test_the_best_tokens_fill_up_to_the_minimum(
    scores: Tensor, valid: Tensor, protected: Tensor, min_tokens: int
) -> None:
    keep = keep_above(scores, 1e9, valid, protected, min_tokens)
    assert (keep & ~protected).sum(dim=1).eq(min_tokens).all()
    for b in range(SAMPLES):
        best = scores[b].topk(min_tokens).indices
        assert keep[b, best].all()


def test_a_text_shorter_than_the_minimum_is_kept_whole() -> None:
    valid = torch.tensor([[True, True, True, False]])
    protected = torch.tensor([[True, False, False, False]])
    scores = torch.tensor([[0.0, 0.9, 0.1, 0.0]])
    assert torch.equal(keep_above(scores, 50.0, valid, protected, min_tokens=5), valid)


def test_protected_tokens_survive_and_padding_does_not(
    scores: Tensor, valid: Tensor, protected: Tensor
) -> None:
    keep = keep_above(scores, 2.0, valid, protected, min_tokens=1)
    assert keep[protected].all()
    assert not keep[~valid].any()


def test_padded_places_are_never_kept_even_if_protected() -> None:
    valid = torch.tensor([[True, True, False]])
    protected = torch.tensor([[True, False, True]])
    scores = torch.tensor([[0.0, 1.0, 0.0]])
    keep = keep_above(scores, 0.5, valid, protected, min_tokens=1)
    assert torch.equal(keep, torch.tensor([[True, True, False]]))


def test_survivors_keep_their_order() -> None:
    keep = torch.tensor([[True, False, True, False, True], [True, True, False, False, False]])
    valid = torch.ones_like(keep)
    plan = select(keep, torch.rand(2, 5), valid, merge=False)
    assert plan is not None
    assert plan.index[0].tolist() == [0, 2, 4]
    assert plan.index[1, :2].tolist() == [0, 1]
    assert plan.valid.tolist() == [[True, True, True], [True, True, False]]


def test_nothing_is_planned_when_no_token_goes(valid: Tensor) -> None:
    assert select(valid, torch.rand(SAMPLES, TOKENS), valid, merge=True) is None


def test_padded_rows_of_a_gathered_batch_are_zero() -> None:
    keep = torch.tensor([[True, True, True], [True, False, False]])
    plan = select(keep, torch.rand(2, 3), torch.ones_like(keep), merge=False)
    assert plan is not None
    gathered = plan.gather(torch.randn(2, 3, 4))
    assert gathered[1, 1:].eq(0).all()
    assert gathered[0].ne(0).all()


@pytest.fixture
def merged_keep() -> Tensor:
    return torch.tensor(
        [
            [True, False, True, False, True],
            [True, True, True, True, True],
            [True, False, False, False, True],
        ]
    )


def test_dropped_tokens_merge_in_proportion_to_their_scores(merged_keep: Tensor) -> None:
    rows = torch.randn(3, 5, 4)
    scores = torch.tensor([[0.0, 0.3, 0.2, 0.1, 0.4]]).expand(3, -1)
    plan = select(merged_keep, scores, torch.ones_like(merged_keep), merge=True)
    assert plan is not None
    gathered = plan.gather(rows)
    assert gathered.shape == (3, 6, 4)
    torch.testing.assert_close(gathered[0, -1], 0.75 * rows[0, 1] + 0.25 * rows[0, 3])
    expected = (0.3 * rows[2, 1] + 0.2 * rows[2, 2] + 0.1 * rows[2, 3]) / 0.6
    torch.testing.assert_close(gathered[2, -1], expected)


def test_merge_weights_sum_to_one_or_to_nothing(merged_keep: Tensor) -> None:
    plan = select(merged_keep, torch.rand(3, 5), torch.ones_like(merged_keep), merge=True)
    assert plan is not None
    assert plan.summary_weight is not None
    torch.testing.assert_close(plan.summary_weight.sum(dim=1), torch.tensor([1.0, 0.0, 1.0]))


def test_a_sample_that_drops_nothing_gets_no_active_summary(merged_keep: Tensor) -> None:
    plan = select(merged_keep, torch.rand(3, 5), torch.ones_like(merged_keep), merge=True)
    assert plan is not None
    assert plan.all_valid[:, -1].tolist() == [True, False, True]
    assert plan.gather(torch.randn(3, 5, 4))[1, -1].eq(0).all()


def test_padding_is_not_merged() -> None:
    valid = torch.tensor([[True, True, True, False]])
    keep = torch.tensor([[True, False, True, False]])
    rows = torch.randn(1, 4, 2)
    plan = select(keep, torch.tensor([[0.0, 0.5, 0.5, 9.0]]), valid, merge=True)
    assert plan is not None
    torch.testing.assert_close(plan.gather(rows)[0, -1], rows[0, 1])


def test_tokens_of_no_score_merge_evenly() -> None:
    keep = torch.tensor([[True, False, False]])
    rows = torch.randn(1, 3, 2)
    plan = select(keep, torch.zeros(1, 3), torch.ones_like(keep), merge=True)
    assert plan is not None
    torch.testing.assert_close(plan.gather(rows)[0, -1], rows[0, 1:].mean(dim=0))


def test_the_summary_takes_the_scores_that_it_merged(merged_keep: Tensor) -> None:
    scores = torch.tensor([[0.0, 0.3, 0.2, 0.1, 0.4]]).expand(3, -1)
    plan = select(merged_keep, scores, torch.ones_like(merged_keep), merge=True)
    assert plan is not None
    gathered = plan.gather_scores(scores)
    torch.testing.assert_close(gathered[:, -1], torch.tensor([0.4, 0.0, 0.6]))
    torch.testing.assert_close(gathered.sum(dim=1), torch.ones(3))


def test_flags_and_positions_travel_with_their_tokens(merged_keep: Tensor) -> None:
    plan = select(merged_keep, torch.rand(3, 5), torch.ones_like(merged_keep), merge=True)
    assert plan is not None
    flags = torch.tensor([[True, False, False, False, True]]).expand(3, -1)
    assert plan.gather_flags(flags).tolist() == [
        [True, False, True, False, False, False],
        [True, False, False, False, True, False],
        [True, True, False, False, False, False],
    ]
    positions = torch.arange(10, 15).expand(3, -1)
    gathered = plan.gather_positions(positions)
    assert gathered[0, :3].tolist() == [10, 12, 14]
    assert gathered[1, :5].tolist() == [10, 11, 12, 13, 14]


def test_without_merging_nothing_is_appended(merged_keep: Tensor) -> None:
    plan = select(merged_keep, torch.rand(3, 5), torch.ones_like(merged_keep), merge=False)
    assert plan is not None
    assert plan.summary_weight is None
    assert plan.all_valid.shape == plan.gather_flags(merged_keep).shape == (3, 5)
    assert plan.gather_positions(torch.arange(5).expand(3, -1)).shape == (3, 5)
    assert plan.gather_scores(torch.rand(3, 5)).shape == (3, 5)
