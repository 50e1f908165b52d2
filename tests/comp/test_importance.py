"""Eq. 3, 4, 6 and 7 against loops, and the algebra that they imply."""

import math

import pytest
import torch
from torch import Tensor

from comp.importance import (
    ActivationStatistics,
    column_scores,
    mean_votes,
    normalise_scores,
    parameter_importance,
    scores_from_sums,
    token_importance,
    token_weights,
    vote_sums,
    voted_importance,
    weighted_square_sums,
)

SAMPLES, HEADS, TOKENS, CHANNELS, WIDTH = 3, 4, 7, 6, 5


@pytest.fixture
def attention() -> Tensor:
    return (3 * torch.randn(SAMPLES, HEADS, TOKENS, TOKENS)).softmax(dim=-1)


@pytest.fixture
def valid() -> Tensor:
    return torch.arange(TOKENS) < torch.tensor([7, 5, 6])[:, None]


@pytest.fixture
def first() -> Tensor:
    return (torch.arange(TOKENS) == 0).expand(SAMPLES, -1)


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(WIDTH, CHANNELS)


@pytest.fixture
def activation() -> Tensor:
    return torch.randn(SAMPLES, TOKENS, CHANNELS)


def naive_token_importance(
    attention: Tensor, head_mask: list[float], valid: Tensor, protected: Tensor
) -> Tensor:
    """Eq. 6 and 7 word by word."""
    samples, heads, tokens, _ = attention.shape
    scores = torch.zeros(samples, tokens)
    for b in range(samples):
        counted = [i for i in range(tokens) if valid[b, i] and not protected[b, i]]
        for i in counted:
            for n in counted:
                scores[b, i] += max(
                    head_mask[h] * float(attention[b, h, n, i]) for h in range(heads)
                )
        scores[b] /= scores[b].sum()
    return scores


def naive_parameter_importance(weight: Tensor, activation: Tensor, omega: Tensor) -> Tensor:
    """Eq. 4 word by word, its sum over tokens averaged over samples."""
    width, channels = weight.shape
    samples, tokens, _ = activation.shape
    scores = torch.zeros(channels)
    for i in range(channels):
        squares = 0.0
        for b in range(samples):
            for n in range(tokens):
                squares += float(omega[b, n]) * float(activation[b, n, i]) ** 2 / samples
        magnitude = sum(abs(float(weight[j, i])) for j in range(width)) / width
        scores[i] = magnitude * math.sqrt(squares)
    return scores


@pytest.mark.equations("Eq. 6")
def test_token_importance_sums_the_strongest_head_over_queries(
    attention: Tensor, valid: Tensor, first: Tensor
) -> None:
    scores = token_importance(attention, None, valid, first)
    naive = naive_token_importance(attention, [1.0] * HEADS, valid, first)
    torch.testing.assert_close(scores, naive)


@pytest.mark.equations("Eq. 6", "Eq. 7")
def test_fading_heads_count_by_their_mask(attention: Tensor, valid: Tensor, first: Tensor) -> None:
    mask = [1.0, 0.3, 0.0, 0.8]
    scores = token_importance(attention, torch.tensor(mask), valid, first)
    torch.testing.assert_close(scores, naive_token_importance(attention, mask, valid, first))


@pytest.mark.equations("Eq. 7")
def test_a_head_masked_to_zero_is_as_good_as_absent(attention: Tensor) -> None:
    masked = token_importance(attention, torch.tensor([1.0, 1.0, 0.0, 1.0]))
    torch.testing.assert_close(masked, token_importance(attention[:, [0, 1, 3]]))


@pytest.mark.equations("Eq. 7")
def test_without_its_mask_a_dead_head_keeps_voting(attention: Tensor) -> None:
    attention[:, 2] = 1 / TOKENS  # what q = k = 0 gives
    corrected = token_importance(attention, torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert (token_importance(attention) - corrected).abs().max() > 1e-3


@pytest.mark.equations("Eq. 6")
def test_scores_sum_to_one_over_valid_unprotected_tokens(
    attention: Tensor, valid: Tensor, first: Tensor
) -> None:
    scores = token_importance(attention, None, valid, first)
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(SAMPLES))
    assert scores[~valid].eq(0).all()
    assert scores[first].eq(0).all()


@pytest.mark.equations("Eq. 6", "Eq. 7")
def test_with_all_queries_voting_the_chosen_ones_are_the_usual_ones(
    attention: Tensor, valid: Tensor, first: Tensor
) -> None:
    mask, counted = torch.tensor([1.0, 0.3, 0.0, 0.8]), valid & ~first
    scores = voted_importance(attention, counted, counted, mask)
    torch.testing.assert_close(scores, token_importance(attention, mask, valid, first))


@pytest.mark.equations("Eq. 6")
def test_one_voting_query_decides_alone(attention: Tensor, valid: Tensor, first: Tensor) -> None:
    votes = torch.tensor([[False, True]]).expand(SAMPLES, -1)
    scores = voted_importance(attention[:, :, 2:4], votes, valid & ~first)
    strongest = attention[:, :, 3].amax(dim=1) * (valid & ~first)
    torch.testing.assert_close(scores, strongest / strongest.sum(dim=1, keepdim=True))


def test_padding_columns_do_not_change_scores(
    attention: Tensor, valid: Tensor, first: Tensor
) -> None:
    scores = token_importance(attention, None, valid, first)
    wider = torch.rand(SAMPLES, HEADS, TOKENS + 2, TOKENS + 2)
    wider[..., :TOKENS, :TOKENS] = attention
    pad = torch.zeros(SAMPLES, 2, dtype=torch.bool)
    again = token_importance(
        wider, None, torch.cat([valid, pad], 1), torch.cat([first, pad], dim=1)
    )
    assert (again[:, :TOKENS] - scores).abs().max() <= 1e-6
    assert again[:, TOKENS:].eq(0).all()


def test_scores_carry_no_gradient(attention: Tensor) -> None:
    assert not token_importance(attention.requires_grad_()).requires_grad


def test_scores_are_float32_under_half_precision(attention: Tensor) -> None:
    assert token_importance(attention.bfloat16()).dtype is torch.float32


def test_all_heads_dead_gives_uniform_scores(attention: Tensor, first: Tensor) -> None:
    scores = token_importance(attention, torch.zeros(HEADS), None, first)
    torch.testing.assert_close(scores[:, 1:], torch.full((SAMPLES, TOKENS - 1), 1 / (TOKENS - 1)))


def test_a_sample_without_scored_tokens_gets_zeros() -> None:
    scored = torch.zeros(1, 3, dtype=torch.bool)
    assert normalise_scores(torch.rand(1, 3), scored).eq(0).all()


@pytest.mark.equations("Eq. 4")
def test_token_weights_are_one_on_the_pooled_token_and_shares_elsewhere() -> None:
    weights = token_weights(torch.tensor([[0.9, 0.1, 0.3, 0.0], [0.0, 2.0, 2.0, 4.0]]))
    expected = torch.tensor([[1.0, 0.25, 0.75, 0.0], [1.0, 0.25, 0.25, 0.5]])
    torch.testing.assert_close(weights, expected)


@pytest.mark.equations("Eq. 4")
def test_token_weights_without_a_pooled_token_sum_to_one() -> None:
    weights = token_weights(torch.tensor([[1.0, 3.0]]), prefix=0)
    torch.testing.assert_close(weights, torch.tensor([[0.25, 0.75]]))


def test_token_weights_take_a_pooled_token_anywhere() -> None:
    pooled = torch.tensor([[False, False, True]])
    weights = token_weights(torch.tensor([[1.0, 1.0, 5.0]]), pooled)
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5, 1.0]]))


def test_token_weights_of_zero_scores_are_uniform() -> None:
    weights = token_weights(torch.zeros(1, 5))
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.25, 0.25, 0.25, 0.25]]))


@pytest.mark.equations("Eq. 3")
def test_plain_parameter_importance_is_structured_wanda(
    weight: Tensor, activation: Tensor
) -> None:
    naive = naive_parameter_importance(weight, activation, torch.ones(SAMPLES, TOKENS))
    torch.testing.assert_close(parameter_importance(weight, activation), naive)


@pytest.mark.equations("Eq. 4")
def test_token_weighted_parameter_importance(weight: Tensor, activation: Tensor) -> None:
    omega = token_weights(torch.rand(SAMPLES, TOKENS))
    naive = naive_parameter_importance(weight, activation, omega)
    torch.testing.assert_close(parameter_importance(weight, activation, omega), naive)


@pytest.mark.equations("Eq. 3", "Eq. 4")
def test_uniform_weights_divide_wanda_by_the_root_of_the_token_count(
    weight: Tensor, activation: Tensor
) -> None:
    uniform = token_weights(torch.ones(SAMPLES, TOKENS), prefix=0)
    weighted = parameter_importance(weight, activation, uniform)
    plain = parameter_importance(weight, activation)
    assert (weighted - plain / math.sqrt(TOKENS)).abs().max() <= 1e-6


@pytest.mark.equations("Eq. 4")
def test_a_pooled_token_counts_as_much_as_all_others_together(
    weight: Tensor, activation: Tensor
) -> None:
    weighted = parameter_importance(weight, activation, token_weights(torch.ones(SAMPLES, TOKENS)))
    squares = activation.square()
    both = (squares[:, 0] + squares[:, 1:].mean(dim=1)).mean(dim=0)
    torch.testing.assert_close(weighted, weight.abs().mean(dim=0) * both.sqrt())


@pytest.mark.equations("Eq. 4")
def test_scaling_all_token_scores_changes_nothing(weight: Tensor, activation: Tensor) -> None:
    scores = torch.rand(SAMPLES, TOKENS)
    before = parameter_importance(weight, activation, token_weights(scores))
    after = parameter_importance(weight, activation, token_weights(17 * scores))
    torch.testing.assert_close(before, after, rtol=1e-6, atol=1e-6)


def test_permuting_tokens_with_their_scores_changes_nothing(
    weight: Tensor, activation: Tensor
) -> None:
    scores = torch.rand(SAMPLES, TOKENS)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(TOKENS - 1)])
    before = parameter_importance(weight, activation, token_weights(scores))
    after = parameter_importance(weight, activation[:, order], token_weights(scores[:, order]))
    torch.testing.assert_close(before, after)


def test_duplicating_a_token_without_weight_changes_nothing(
    weight: Tensor, activation: Tensor
) -> None:
    scores = torch.rand(SAMPLES, TOKENS)
    scores[:, 3] = 0
    twice = torch.tensor([*range(TOKENS), 3])
    before = parameter_importance(weight, activation, token_weights(scores))
    after = parameter_importance(weight, activation[:, twice], token_weights(scores[:, twice]))
    torch.testing.assert_close(before, after)


def test_statistics_of_batches_equal_those_of_all_samples_at_once(
    weight: Tensor, activation: Tensor
) -> None:
    omega = token_weights(torch.rand(SAMPLES, TOKENS))
    statistics = ActivationStatistics()
    for rows in (slice(0, 1), slice(1, SAMPLES)):
        statistics.add("ffn", activation[rows], omega[rows])
    statistics.num_samples = SAMPLES
    torch.testing.assert_close(
        statistics.scores("ffn", weight), parameter_importance(weight, activation, omega)
    )


def test_scores_from_sums_divide_by_the_samples_under_the_root() -> None:
    scores = scores_from_sums(torch.tensor([[2.0], [-4.0]]), torch.tensor([8.0]), 2)
    torch.testing.assert_close(scores, torch.tensor([6.0]))


def test_statistics_of_a_group_that_no_pass_went_through_are_missing(weight: Tensor) -> None:
    with pytest.raises(KeyError, match="cross"):
        ActivationStatistics().scores("cross", weight)


def test_attention_must_be_square() -> None:
    with pytest.raises(ValueError, match=r"attention must be \(B, H, N, N\).*\(1, 2, 3, 4\)"):
        token_importance(torch.rand(1, 2, 3, 4))


def test_head_mask_must_have_one_entry_a_head(attention: Tensor) -> None:
    with pytest.raises(ValueError, match=r"head_mask must be \(4,\).*\(3,\)"):
        token_importance(attention, torch.ones(3))


@pytest.mark.parametrize("name", ["valid", "protected"])
def test_flags_must_fit_the_tokens(name: str) -> None:
    flags = {name: torch.ones(2, 4, dtype=torch.bool)}
    with pytest.raises(ValueError, match=rf"{name} must be \(2, 3\), but got \(2, 4\)"):
        column_scores(torch.rand(2, 3, 3), **flags)


def test_votes_must_fit_the_attention(attention: Tensor, valid: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be \(3, 7\) and \(3, 7\).*\(3, 6\) and \(3, 7\)"):
        voted_importance(attention, valid[:, :6], valid)


def test_prefix_must_fit_the_scores() -> None:
    with pytest.raises(ValueError, match=r"prefix must be in \[0, 3\], but got 4"):
        token_weights(torch.rand(1, 3), prefix=4)
    with pytest.raises(ValueError, match=r"prefix must be \(1, 3\).*\(1, 2\)"):
        token_weights(torch.rand(1, 3), prefix=torch.ones(1, 2, dtype=torch.bool))


def test_token_weights_must_fit_the_activation(activation: Tensor) -> None:
    with pytest.raises(ValueError, match=r"token_weight must be \(3, 7\).*\(3, 6\)"):
        weighted_square_sums(activation, torch.ones(SAMPLES, TOKENS - 1))


def test_weight_and_activation_must_agree(activation: Tensor) -> None:
    with pytest.raises(ValueError, match="must agree on h, but got 7 and 6"):
        parameter_importance(torch.rand(WIDTH, CHANNELS + 1), activation)


def test_means_over_those_that_see_a_key_do_not_favour_early_ones() -> None:
    visible = torch.ones(5, 5, dtype=torch.bool).tril()[None]
    votes = torch.tensor([[True, True, True, True, False]])
    strongest = torch.full((1, 5, 5), 0.3) * visible
    sums = vote_sums(strongest, votes)
    assert sums[0].tolist() == pytest.approx([1.2, 0.9, 0.6, 0.3, 0.0])
    assert mean_votes(sums, visible, votes)[0].tolist() == pytest.approx([0.3] * 4 + [0.0])


def test_the_mean_over_heads_is_pyramid_drops() -> None:
    attention = torch.rand(2, 3, 4, 5).softmax(dim=-1)
    votes = torch.tensor([[True, False, True, False], [False, False, False, True]])
    scored = torch.ones(2, 5, dtype=torch.bool)
    found = voted_importance(attention, votes, scored, reduce="mean")
    sums = (attention.mean(dim=1) * votes[..., None]).sum(dim=1)
    torch.testing.assert_close(found, sums / sums.sum(dim=1, keepdim=True))
