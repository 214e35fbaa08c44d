"""Signals, AUC, true-positive rate and PrivLeak equal plain loops; the intervals are a bootstrap's."""

import math
import time
import zlib

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from falcon_unlearn.evaluation.membership import (
    auc,
    auc_estimate,
    mean_loss,
    min_k,
    min_k_plus_plus,
    privleak,
    privleak_estimate,
    reference_difference,
    tpr_estimate,
    true_positive_rate,
    weighted_auc,
    weighted_tpr,
    zlib_ratio,
)
from falcon_unlearn.evaluation.token_scores import TokenScores

LOG_P = st.floats(-30, 0)
TOKENS = st.lists(st.tuples(LOG_P, LOG_P, st.floats(0, 5)), max_size=30)
SHARES = st.floats(0.01, 1)
# Few distinct values, so that ties are common.
SIGNALS = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=25)


def close(a, b):
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9) or (math.isnan(a) and math.isnan(b))


@given(TOKENS, SHARES)
def test_signals_are_their_definitions(tokens, share):
    scores = TokenScores(*zip(*tokens, strict=True), ()) if tokens else TokenScores((), (), (), ())
    log_p = [p for p, _, _ in tokens]
    lowest = sorted(log_p)[: int(len(log_p) * share)]
    standardised = sorted((p - m) / max(s, 1e-3) for p, m, s in tokens)[: int(len(log_p) * share)]
    with np.errstate(all="ignore"):
        assert close(mean_loss(scores.log_probability), -np.mean(log_p) if log_p else math.nan)
        assert close(min_k(scores.log_probability, share), -np.mean(lowest) if lowest else math.nan)
        assert close(min_k_plus_plus(scores, share), -np.mean(standardised) if standardised else math.nan)


def test_min_k_of_a_short_text_is_no_number():
    # MUSE's slice is empty here.
    assert math.isnan(min_k((-1.0, -2.0), 0.4))
    assert min_k((-1.0, -2.0, -6.0), 0.4) == 6
    assert min_k((-1.0, -2.0), 1) == mean_loss((-1.0, -2.0)) == 1.5


def test_zlib_is_the_mean_loss_a_byte():
    text = "Ada lives in Arlo. " * 9
    assert zlib_ratio(3.0, text) == 3.0 / len(zlib.compress(text.encode("utf-8")))
    assert math.isnan(zlib_ratio(3.0, ""))
    assert reference_difference(3.0, 4.0) == -1


@given(SIGNALS, SIGNALS)
def test_auc_counts_pairs(members, non_members):
    won = sum((m < n) + 0.5 * (m == n) for m in members for n in non_members)
    assert close(auc(members, non_members), won / len(members) / len(non_members))
    labels = [1] * len(members) + [0] * len(non_members)
    assert close(auc(members, non_members), roc_auc_score(labels, [-x for x in members + non_members]))
    assert close(auc(members, non_members), 1 - auc(non_members, members))


@given(SIGNALS, st.lists(st.integers(0, 6).map(float), min_size=1, max_size=250))
def test_the_true_positive_rate_is_the_best_of_all_thresholds(members, non_members):
    thresholds = [*members, *non_members]
    best = max(
        (
            np.mean([m <= t for m in members])
            for t in thresholds
            if sum(n <= t for n in non_members) * 100 <= len(non_members)
        ),
        default=0,
    )
    assert close(true_positive_rate(members, non_members), best)
    labels = [1] * len(members) + [0] * len(non_members)
    fpr, tpr, _ = roc_curve(labels, [-x for x in thresholds], drop_intermediate=False)
    assert close(true_positive_rate(members, non_members), tpr[fpr <= 0.01 + 1e-12].max())


@given(SIGNALS, SIGNALS, st.integers(0, 2**31))
def test_counts_stand_for_repeated_samples(members, non_members, seed):
    rng = np.random.default_rng(seed)
    ours, theirs = rng.integers(0, 3, (4, len(members))), rng.integers(0, 3, (4, len(non_members)))
    for weighted, plain in ((weighted_auc, auc), (weighted_tpr, true_positive_rate)):
        values = weighted(np.array(members), np.array(non_members), ours, theirs)
        for row in range(4):
            repeated = np.repeat(members, ours[row]), np.repeat(non_members, theirs[row])
            assert close(float(values[row]), plain(*repeated))


@given(SIGNALS, SIGNALS, SIGNALS)
def test_unscorable_samples_are_left_out_and_counted(members, non_members, more):
    holes = [math.nan] * len(more)
    for plain, estimate in ((auc, auc_estimate), (true_positive_rate, tpr_estimate)):
        assert close(plain(members + holes, holes + non_members), plain(members, non_members))
        found = estimate(members + holes, non_members)
        assert (found.n, found.unscorable) == (len(members) + len(non_members), len(holes))
        assert close(found.value, plain(members, non_members))
    assert math.isnan(auc(holes, non_members))
    assert math.isnan(true_positive_rate(members, holes))


@given(st.floats(0, 1), st.floats(0, 1))
def test_privleak_is_muses(model, retrained):
    assume(retrained == 1 or 1 - retrained > 1e-6)
    # MUSE's code: AUCs with the forget records as non-members.
    muse_model, muse_retrain = 1 - model, 1 - retrained
    expected = (muse_model - muse_retrain) / muse_retrain * 100 if muse_retrain else math.nan
    assert close(privleak(model, retrained), expected)


def test_privleak_reads_as_published():
    assert privleak(0.5, 0.5) == 0
    assert privleak(1.0, 0.5) == -100
    assert privleak(0.0, 0.5) == 100
    # open-unlearning issue 167: the logs of a model that never forgot in the place of the retrained one's.
    assert privleak(0.00002, 0.981) == pytest.approx(5163, abs=1)
    assert math.isnan(privleak(0.5, 1.0))


def test_the_auc_turned_round_is_what_muses_code_computes():
    rng = np.random.default_rng(0)
    forget, holdout = rng.normal(0, 1, 80), rng.normal(0.7, 1, 90)
    labels = np.array([0] * 80 + [1] * 90)
    assert roc_auc_score(labels, -np.concatenate([forget, holdout])) == pytest.approx(1 - auc(forget, holdout))


def naive_interval(statistic, seed, members, non_members, labels, other_labels):
    """Resample whole entities with replacement, 2000 times, by the book."""
    rng = np.random.default_rng(seed)

    def draw(values, names):
        clusters = [np.array(values)[np.array(names) == name] for name in dict.fromkeys(names)]
        return np.concatenate([clusters[i] for i in rng.integers(0, len(clusters), len(clusters))])

    draws = [statistic(draw(members, labels), draw(non_members, other_labels)) for _ in range(2000)]
    return np.quantile(draws, [0.025, 0.975])


def test_the_interval_is_a_bootstraps_over_entities():
    rng = np.random.default_rng(1)
    labels, other_labels = [f"p{i // 4}" for i in range(60)], [f"q{i // 4}" for i in range(80)]
    members = rng.normal(0, 1, 60) + np.repeat(rng.normal(0, 1, 15), 4)
    non_members = rng.normal(0.8, 1, 80) + np.repeat(rng.normal(0, 1, 20), 4)
    found = auc_estimate(list(members), list(non_members), labels, other_labels)
    low, high = naive_interval(auc, 0, members, non_members, labels, other_labels)
    assert found.low == pytest.approx(low, abs=0.02)
    assert found.high == pytest.approx(high, abs=0.02)
    alone = auc_estimate(list(members), list(non_members))
    assert alone.high - alone.low < found.high - found.low  # records of one entity are no independent evidence


def test_privleak_draws_both_models_together():
    rng = np.random.default_rng(2)
    forget, holdout = list(rng.normal(0, 1, 60)), list(rng.normal(0.4, 1, 60))
    shifted = [x - 0.05 for x in forget]
    paired = privleak_estimate((shifted, holdout), (forget, holdout))
    assert paired.value == pytest.approx(privleak(auc(shifted, holdout), auc(forget, holdout)))
    fixed = privleak_estimate((shifted, holdout), auc(forget, holdout))
    assert fixed.value == pytest.approx(paired.value)
    assert paired.high - paired.low < (fixed.high - fixed.low) / 2
    same = privleak_estimate((forget, holdout), (forget, holdout))
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_privleak_has_no_value_where_the_retrained_model_tells_all_apart():
    estimate = privleak_estimate(([1.0, 2.0], [1.5, 3.0]), ([1.0, 2.0], [3.0, 4.0]))
    assert math.isnan(estimate.value)
    assert (estimate.low, estimate.high) == (None, None)


@settings(max_examples=20)
@given(SIGNALS)
def test_one_side_without_records_gives_no_number(members):
    estimate = auc_estimate(members, [])
    assert math.isnan(estimate.value)
    assert estimate.low is None


def test_an_interval_takes_no_noticeable_time():
    rng = np.random.default_rng(3)
    start = time.process_time()
    auc_estimate(list(rng.normal(0, 1, 400)), list(rng.normal(0, 1, 400)))
    assert time.process_time() - start < 1
