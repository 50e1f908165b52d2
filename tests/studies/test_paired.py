import numpy as np
import pytest

from studies.paired import Difference, paired_difference, sampled_difference


def test_one_pair_has_a_mean_and_no_interval() -> None:
    assert paired_difference([1.5]) == Difference(1.5, None, None, 1)
    assert not paired_difference([1.5]).is_clear


def test_the_interval_is_the_same_every_time() -> None:
    assert paired_difference([1.0, 2.0, 4.0]) == paired_difference([1.0, 2.0, 4.0])


def test_the_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    """30 pairs of a normal difference of 1: 95 % intervals hold it in 184 to 196 of 200 draws."""
    draws = np.random.default_rng(0).normal(1.0, 2.0, size=(200, 30))
    found = [paired_difference(list(row)) for row in draws]
    covered = sum(d.low is not None and d.high is not None and d.low <= 1 <= d.high for d in found)
    assert 180 <= covered <= 198


def test_an_interval_beside_zero_is_clear() -> None:
    assert paired_difference([1.0, 2.0, 1.5]).is_clear
    assert not paired_difference([1.0, -2.0, 1.5]).is_clear


def test_no_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one pair"):
        paired_difference([])


def test_an_interval_over_one_seed_is_that_of_its_samples() -> None:
    """800 right answers more of 4,000: 20 points, with a standard error of 0.63."""
    ours = np.zeros((1, 4000))
    ours[0, :800] = 1
    found = sampled_difference(ours, np.zeros((1, 4000)))
    assert found.mean == pytest.approx(20)
    assert found.low == pytest.approx(20 - 1.96 * 0.632, abs=0.1)
    assert found.high == pytest.approx(20 + 1.96 * 0.632, abs=0.1)


def test_seeds_that_disagree_widen_the_interval() -> None:
    calm = np.tile([1.0, 0.0, 0.0, 0.0], (5, 250))
    torn = calm.copy()
    torn[0], torn[1] = 0, np.tile([1.0, 1.0, 0.0, 0.0], 250)
    none = np.zeros_like(calm)
    sure, unsure = sampled_difference(calm, none), sampled_difference(torn, none)
    assert sure.mean == unsure.mean == 25
    assert sure.low is not None
    assert unsure.low is not None
    assert unsure.low < sure.low - 5


@pytest.mark.parametrize("shape", [(2, 3), (0, 4), (4,)])
def test_outcomes_of_other_samples_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"same seeds and samples, but got \("):
        sampled_difference(np.zeros(shape), np.zeros((2, 4) if shape == (2, 3) else shape))
