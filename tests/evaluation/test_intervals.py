"""Bootstrap intervals against an independent, slow bootstrap, and what they must be in plain cases."""

import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from falcon_unlearn.evaluation.intervals import (
    bootstrap,
    difference_estimate,
    group,
    mean_estimate,
    resampled_counts,
    weighted_means,
)

FINITE = st.floats(-1e3, 1e3)


@given(st.lists(FINITE | st.just(math.nan), min_size=1, max_size=30))
def test_the_value_is_the_plain_mean_and_unscorable_samples_are_counted(values):
    found = mean_estimate(values)
    scored = [value for value in values if not math.isnan(value)]
    assert found.n == len(scored)
    assert found.unscorable == len(values) - len(scored)
    if not scored:
        assert math.isnan(found.value)
        assert found.low is None
        assert found.high is None
        return
    assert found.value == pytest.approx(statistics.fmean(scored), abs=1e-9)
    if found.low is not None:
        assert min(scored) - 1e-9 <= found.low <= found.high <= max(scored) + 1e-9


def test_the_interval_is_that_of_a_slow_bootstrap_and_of_the_normal_law():
    rng = random.Random(0)
    values = [rng.gauss(3, 2) for _ in range(400)]
    found = mean_estimate(values)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(2000))
    half = norm.ppf(0.975) * statistics.stdev(values) / math.sqrt(len(values))
    assert found.low == pytest.approx(means[50], abs=0.05)
    assert found.high == pytest.approx(means[1950], abs=0.05)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)


def test_records_of_one_entity_are_drawn_together():
    """Eight equal answers of one person are one observation: the interval widens by the square root of eight."""
    rng = random.Random(1)
    people = [rng.gauss(0, 1) for _ in range(100)]
    values = [value for value in people for _ in range(8)]
    labels = [f"person {i}" for i in range(100) for _ in range(8)]
    alone, together = mean_estimate(values), mean_estimate(values, labels)
    assert together.value == pytest.approx(alone.value)
    assert (together.high - together.low) / (alone.high - alone.low) == pytest.approx(math.sqrt(8), rel=0.1)
    # Without a label a record is its own entity, whatever its neighbours are called.
    assert mean_estimate(values, [None] * len(values)) == alone


def test_counts_draw_as_many_clusters_as_there_are_and_whole_ones():
    labels = ["a", "b", "a", "c", "b", "a"]
    (counts,) = resampled_counts([group([0.0] * 6, labels)], resamples=50, seed=3)
    assert (counts[:, 0] == counts[:, 2]).all()
    assert (counts[:, 0] == counts[:, 5]).all()
    assert (counts[:, [0, 1, 3]].sum(1) == 3).all()


@given(
    st.lists(st.lists(FINITE | st.just(math.nan), min_size=2, max_size=2), min_size=1, max_size=8), st.integers(0, 99)
)
def test_weighted_means_repeat_each_sample_as_often_as_it_was_drawn(rows, seed):
    values = np.array(rows)
    (counts,) = resampled_counts([group(values)], resamples=4, seed=seed)
    found = weighted_means(values, counts)
    for draw in range(4):
        repeated = np.repeat(values, counts[draw], axis=0)
        for column in range(2):
            kept = repeated[:, column][~np.isnan(repeated[:, column])]
            expected = kept.mean() if len(kept) else math.nan
            assert found[draw, column] == pytest.approx(expected, nan_ok=True, abs=1e-9)


def test_a_paired_difference_is_narrower_than_two_means_apart():
    rng = random.Random(2)
    theirs = [rng.gauss(0, 5) for _ in range(200)]
    ours = [value + 1 + rng.gauss(0, 0.1) for value in theirs]
    found = difference_estimate(ours, theirs)
    assert found.low > 0.95
    assert found.high < 1.05


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    values = [float(i) for i in range(50)]
    assert mean_estimate(values, seed=1) == mean_estimate(values, seed=1)
    assert mean_estimate(values, seed=1) != mean_estimate(values, seed=2)


def test_independent_groups_are_resampled_each_on_their_own():
    a, b = group([0.0] * 40 + [1.0] * 40), group([0.0] * 10 + [1.0] * 10)
    found = bootstrap(
        [a, b], lambda counts: weighted_means(a.values, counts[0])[:, 0] - weighted_means(b.values, counts[1])[:, 0]
    )
    half = norm.ppf(0.975) * math.sqrt(0.25 / 80 + 0.25 / 20)
    assert found.value == 0
    assert found.high == pytest.approx(half, rel=0.15)
    assert found.n == 100


def test_a_single_cluster_has_no_interval():
    assert mean_estimate([1.0, 2.0], ["a", "a"]).low is None
    assert mean_estimate([1.0]).high is None
    assert mean_estimate([]).n == 0
