"""The published logs give the published numbers; formulas agree with their naive forms."""

import dataclasses
import json
import math
import os
from fractions import Fraction
from functools import cache
from math import comb
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from falcon_unlearn.artifacts import SampleScore
from falcon_unlearn.evaluation.intervals import CONFIDENCE
from falcon_unlearn.evaluation.metrics import (
    compute_metrics,
    estimates,
    forget_quality,
    forget_truth_ratio,
    harmonic_mean,
    log10_ks_p_value,
    normalised_probability,
    paper_truth_ratio,
    sample_truth_ratio,
    truth_ratio,
    utility_truth_ratio,
)

LOGS = Path(os.environ.get("FALCON_UNLEARN_DATA", "../shared/data")) / "tofu_eval_logs"
LOG_SETS = {
    "forget": "eval_log_forget.json",
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
}

log_probability = st.floats(-20, 0)
share = st.floats(1e-3, 1)


def sample(**changes):
    fields = {
        "set": "forget",
        "index": 0,
        "prompt": "q",
        "answer": "a",
        "generation": "g",
        "probability": 0.5,
        "accuracy": 1.0,
        "rouge": 0.5,
    }
    return SampleScore(**(fields | changes))


@cache
def scores_from_log(name):
    log = json.loads((LOGS / f"llama2-7b_{name}.json").read_text())
    result = {}
    for set_name, key in LOG_SETS.items():
        part = log[key]
        normalised = set_name in {"real_authors", "world_facts"}
        result[set_name] = [
            sample(
                set=set_name,
                index=int(i),
                probability=math.exp(-part["avg_gt_loss"][i]),
                rouge=part["rougeL_recall"][i],
                truth_ratio=truth_ratio(
                    -part["avg_paraphrased_loss"][i], [-x for x in part["average_perturb_loss"][i]]
                ),
                normalised_probability=normalised_probability(
                    -part["avg_gt_loss"][i], [-x for x in part["average_perturb_loss"][i]]
                )
                if normalised
                else None,
            )
            for i in part["avg_gt_loss"]
        ]
    return result


needs_logs = pytest.mark.skipif(not LOGS.is_dir(), reason="no shared data")


@needs_logs
@pytest.mark.parametrize(
    ("name", "utility"), [("full", 0.6227), ("retain90", 0.6137), ("retain95", 0.6006), ("retain99", 0.6207)]
)
def test_model_utility_of_the_published_logs(name, utility):
    metrics = compute_metrics(scores_from_log(name))
    assert metrics.model_utility == pytest.approx(utility, abs=5e-5)
    assert len(metrics.utility_parts) == 9
    assert metrics.unscorable == 0


@needs_logs
@pytest.mark.parametrize(("oracle", "p"), [("retain90", 1.834e-21), ("retain95", 6.504e-16), ("retain99", 2.345e-06)])
def test_forget_quality_of_the_published_logs(oracle, p):
    metrics = compute_metrics(scores_from_log("full"), scores_from_log(oracle)["forget"])
    assert metrics.forget_quality == pytest.approx(p, rel=5e-4)
    assert metrics.log10_forget_quality == pytest.approx(math.log10(p), abs=5e-4)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12))
def test_harmonic_mean_is_the_exact_fraction_and_lies_between_the_extremes(values):
    exact = len(values) / sum(1 / Fraction(v) for v in values)
    assert harmonic_mean(values) == pytest.approx(float(exact), rel=1e-12)
    assert min(values) * (1 - 1e-12) <= harmonic_mean(values) <= max(values) * (1 + 1e-12)


def test_harmonic_mean_of_a_zero_is_zero_and_of_nan_is_nan():
    assert harmonic_mean([0.5, 0.0]) == 0
    assert harmonic_mean([0.0, math.nan]) == 0
    assert math.isnan(harmonic_mean([0.5, math.nan]))
    with pytest.raises(ValueError, match="nothing"):
        harmonic_mean([])


@given(log_probability, st.lists(log_probability, min_size=1, max_size=5))
def test_truth_ratio_is_wrong_over_correct(right, wrong):
    correct = math.exp(right)
    naive = math.exp(-sum(-w for w in wrong) / len(wrong)) / correct
    assert truth_ratio(right, wrong) == pytest.approx(naive, rel=1e-9)


@given(log_probability, st.lists(log_probability, min_size=1, max_size=5))
def test_the_papers_truth_ratio_averages_probabilities_and_is_never_below_the_codes(right, wrong):
    naive = sum(math.exp(w) for w in wrong) / len(wrong) / math.exp(right)
    assert paper_truth_ratio(right, wrong) == pytest.approx(naive, rel=1e-9)
    assert paper_truth_ratio(right, wrong) >= truth_ratio(right, wrong) * (1 - 1e-12)
    assert paper_truth_ratio(right, wrong[:1]) == pytest.approx(truth_ratio(right, wrong[:1]), rel=1e-9)


@given(log_probability, log_probability, st.lists(log_probability, min_size=1, max_size=5))
def test_a_samples_truth_ratio_by_either_definition(answer, paraphrase, wrong):
    with_paraphrase = sample(
        truth_ratio=truth_ratio(paraphrase, wrong),
        log_probability=answer,
        paraphrased_log_probability=paraphrase,
        perturbed_log_probabilities=tuple(wrong),
    )
    without = sample(
        truth_ratio=truth_ratio(answer, wrong), log_probability=answer, perturbed_log_probabilities=tuple(wrong)
    )
    assert sample_truth_ratio(with_paraphrase) == with_paraphrase.truth_ratio
    assert sample_truth_ratio(with_paraphrase, "paper") == paper_truth_ratio(paraphrase, wrong)
    assert sample_truth_ratio(without, "paper") == paper_truth_ratio(answer, wrong)


def test_the_papers_truth_ratio_without_log_probabilities_is_unscorable():
    assert sample_truth_ratio(sample(), "paper") is None
    assert math.isnan(sample_truth_ratio(sample(truth_ratio=0.5), "paper"))
    metrics = compute_metrics(
        {"forget": [sample(truth_ratio=0.5)], "retain": [sample(truth_ratio=0.5)]},
        [sample(truth_ratio=0.5)],
        definition="paper",
    )
    assert metrics.forget_quality is None
    assert math.isnan(metrics.model_utility)


@given(log_probability, st.lists(log_probability, min_size=1, max_size=5))
def test_normalised_probability_is_the_share_of_the_right_answer(right, wrong):
    naive = math.exp(right) / (math.exp(right) + sum(map(math.exp, wrong)))
    assert normalised_probability(right, wrong) == pytest.approx(naive, rel=1e-9)


def test_truth_ratio_of_a_diverged_model_stays_finite():
    assert math.isfinite(truth_ratio(-5000.0, [-1.0]))
    assert forget_truth_ratio(truth_ratio(-5000.0, [-1.0])) < 1e-300
    assert truth_ratio(-1.0, [-5000.0]) == 0
    assert math.isnan(truth_ratio(math.nan, [-1.0]))
    assert math.isfinite(paper_truth_ratio(-5000.0, [-1.0]))
    assert paper_truth_ratio(-1.0, [-5000.0]) == 0
    assert math.isnan(paper_truth_ratio(math.nan, [-1.0]))


@given(st.floats(0, 1e9))
def test_truth_ratio_aggregates(ratio):
    assert utility_truth_ratio(ratio) == max(0.0, 1 - ratio)
    assert forget_truth_ratio(ratio) == (min(ratio, 1 / ratio) if ratio else 0)
    assert math.isnan(utility_truth_ratio(math.nan))
    assert math.isnan(forget_truth_ratio(math.nan))


samples = st.lists(st.integers(0, 12).map(float), min_size=1, max_size=12)


def paths_inside(n, m, n_times_m_times_d):
    """Monotone lattice paths from (0, 0) to (n, m) that never reach the KS distance (Hodges 1957)."""
    counts = {}
    for i in range(n + 1):
        for j in range(m + 1):
            inside = abs(i * m - j * n) < n_times_m_times_d
            before = 1 if i == j == 0 else counts.get((i - 1, j), 0) + counts.get((i, j - 1), 0)
            counts[i, j] = before if inside else 0
    return counts[n, m]


@settings(max_examples=60, deadline=None)
@given(samples, samples)
def test_ks_p_value_is_the_share_of_paths_that_reach_the_distance(a, b):
    n, m = len(a), len(b)
    distance = max(abs(sum(x <= t for x in a) * m - sum(x <= t for x in b) * n) for t in {*a, *b})
    p = 1.0 if distance == 0 else 1 - paths_inside(n, m, distance) / comb(n + m, n)
    quality, log10_p = forget_quality(a, b)
    # At 1 scipy's exact value may round to above 1 and give way to the asymptotic one.
    tolerance = 1e-9 if p < 1 - 1e-9 else 1e-3
    assert quality == pytest.approx(p, rel=tolerance)
    assert log10_p == pytest.approx(math.log10(p), abs=tolerance)


@given(samples, samples)
def test_ks_is_symmetric_and_sees_only_ranks(a, b):
    assert log10_ks_p_value(a, b) == pytest.approx(log10_ks_p_value(b, a))
    assert log10_ks_p_value(a, b) == pytest.approx(log10_ks_p_value([2.0**x for x in a], [2.0**x for x in b]))


def test_ks_below_the_smallest_double_is_exact_for_equal_sizes():
    apart = 900
    a = np.arange(1000.0)
    b = a + apart
    assert ks_2samp(a, b).pvalue < 1e-308
    # comb() counts exactly where doubles have long run out; Gnedenko and Korolyuk's series.
    terms = sum((-1) ** (k + 1) * comb(2000, 1000 - k * apart) for k in range(1, 1000 // apart + 1))
    exact = Fraction(2 * terms, comb(2000, 1000))
    expected = math.log10(exact.numerator) - math.log10(exact.denominator)
    assert log10_ks_p_value(a, b) == pytest.approx(expected, abs=1e-6)


def test_ks_below_the_smallest_double_keeps_order_for_unequal_sizes():
    a = np.arange(2000.0)
    nearer, farther = log10_ks_p_value(a, a[:1500] + 1700), log10_ks_p_value(a, a[:1500] + 1900)
    assert -math.inf < farther < nearer < -308


def test_metrics_of_a_small_model_by_hand():
    forget = [
        sample(probability=0.2, accuracy=1.0, rouge=0.4, truth_ratio=0.5, accuracy_heldout=0.0),
        sample(probability=0.4, accuracy=0.0, rouge=0.8, truth_ratio=4.0),
    ]
    retain = [sample(probability=0.8, rouge=0.5, truth_ratio=0.5), sample(probability=0.4, rouge=0.7, truth_ratio=3.0)]
    facts = [sample(probability=0.9, normalised_probability=0.25, rouge=1.0)]
    metrics = compute_metrics({"forget": forget, "retain": retain, "facts": facts}, oracle_forget=forget)
    assert metrics.forget_probability == pytest.approx(0.3)
    assert metrics.forget_accuracy == 0.5
    assert metrics.forget_accuracy_heldout == 0
    assert metrics.forget_rouge == pytest.approx(0.6)
    assert metrics.forget_truth_ratio == pytest.approx((0.5 + 0.25) / 2)
    assert metrics.forget_quality == 1
    assert metrics.utility_parts == pytest.approx(
        {
            "retain_probability": 0.6,
            "retain_rouge": 0.6,
            "retain_truth_ratio": 0.25,
            "facts_probability": 0.25,
            "facts_rouge": 1.0,
        }
    )
    assert metrics.model_utility == pytest.approx(5 / (1 / 0.6 + 1 / 0.6 + 4 + 4 + 1))
    assert metrics.unscorable == 0


def test_what_the_data_does_not_allow_is_none():
    metrics = compute_metrics({"forget": [sample()]}, oracle_forget=[sample(truth_ratio=1.0)])
    assert metrics.forget_accuracy_heldout is None
    assert metrics.forget_truth_ratio is None
    assert metrics.forget_quality is None
    assert metrics.log10_forget_quality is None
    assert metrics.model_utility is None
    assert compute_metrics({"forget": [sample(truth_ratio=1.0)]}).forget_quality is None


@given(st.lists(share, min_size=1, max_size=6), st.integers(1, 3))
def test_nan_samples_are_counted_and_change_no_mean(probabilities, unscored):
    nan = sample(
        probability=math.nan,
        accuracy=math.nan,
        rouge=math.nan,
        truth_ratio=math.nan,
        accuracy_heldout=math.nan,
    )
    scored = [sample(probability=p, rouge=p, truth_ratio=p / 2, accuracy_heldout=1.0) for p in probabilities]
    clean = compute_metrics({"forget": scored, "retain": scored}, scored)
    dirty = compute_metrics({"forget": [nan] * unscored + scored, "retain": [*scored, nan]}, [nan, *scored])
    assert clean.unscorable == 0
    assert dirty.unscorable == unscored + 1
    for name in ("forget_probability", "forget_rouge", "forget_truth_ratio", "forget_quality", "model_utility"):
        assert getattr(dirty, name) == getattr(clean, name)
    assert dirty.utility_parts == clean.utility_parts


def test_a_set_that_cannot_be_scored_at_all_does_not_raise_the_utility():
    fine, broken = sample(truth_ratio=0.5), sample(truth_ratio=math.nan)
    assert math.isnan(compute_metrics({"forget": [fine], "retain": [broken]}).model_utility)


# --- intervals --------------------------------------------------------------------------------------------------


def random_scores(n_entities=12, per_entity=5, seed=0):
    rng = np.random.default_rng(seed)
    result = {}
    for set_name in ("forget", "retain", "facts"):
        level = rng.uniform(0.2, 0.8, n_entities)
        result[set_name] = [
            sample(
                set=set_name,
                index=i,
                probability=float(np.clip(level[i // per_entity] + rng.normal(0, 0.05), 0.01, 1)),
                rouge=float(rng.uniform(0.3, 1)),
                truth_ratio=float(rng.uniform(0, 1.5)),
                entity=f"{set_name} {i // per_entity}",
            )
            for i in range(n_entities * per_entity)
        ]
    return result


def naive_draws(scores, draws=1500, seed=1):
    """Entities drawn with replacement one after the other, every number computed anew from the drawn samples."""
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(draws):
        drawn = {}
        for name, samples in scores.items():
            entities = {}
            for score in samples:
                entities.setdefault(score.entity, []).append(score)
            keys = list(entities)
            drawn[name] = [s for i in rng.integers(0, len(keys), len(keys)) for s in entities[keys[i]]]
        means = {}
        for name, samples in drawn.items():
            summary = forget_truth_ratio if name == "forget" else utility_truth_ratio
            means[f"{name}_probability"] = np.mean([s.probability for s in samples])
            means[f"{name}_rouge"] = np.mean([s.rouge for s in samples])
            means[f"{name}_truth_ratio"] = np.mean([summary(s.truth_ratio) for s in samples])
        means["model_utility"] = harmonic_mean(v for k, v in means.items() if not k.startswith("forget"))
        result.append(means)
    return {name: np.array([means[name] for means in result]) for name in result[0]}


def test_intervals_are_those_of_a_naive_bootstrap_over_entities():
    scores = random_scores()
    metrics = compute_metrics(scores)
    naive = naive_draws(scores)
    assert set(metrics.intervals) == {*naive, "forget_accuracy"}
    tail = (1 - CONFIDENCE) / 2
    for name, draws in naive.items():
        low, high = np.quantile(draws, [tail, 1 - tail])
        # Both quantiles are drawn ones: their own scatter is a few hundredths of the spread.
        assert metrics.intervals[name] == pytest.approx((low, high), abs=0.35 * draws.std()), name


def test_entities_make_wider_intervals_than_samples_taken_as_independent():
    scores = random_scores()
    loose = {name: [dataclasses.replace(s, entity=None) for s in samples] for name, samples in scores.items()}
    clustered, independent = compute_metrics(scores).intervals, compute_metrics(loose).intervals

    def width(intervals):
        low, high = intervals["retain_probability"]
        return high - low

    assert width(clustered) > 1.5 * width(independent)


def test_intervals_are_reproducible_and_hold_every_mean_but_no_p_value():
    scores = random_scores(seed=3)
    metrics = compute_metrics(scores, scores["forget"])
    assert metrics == compute_metrics(scores, scores["forget"])
    assert not {"forget_quality", "log10_forget_quality"} & set(metrics.intervals)
    for name, (low, high) in metrics.intervals.items():
        value = metrics.utility_parts.get(name, getattr(metrics, name, None))
        assert low <= value <= high, name


def test_no_interval_where_the_scorable_samples_are_one_entity():
    retain = [sample(rouge=math.nan, entity="a"), sample(rouge=0.5, entity="b"), sample(rouge=0.7, entity="b")]
    metrics = compute_metrics({"forget": [sample()], "retain": retain})
    assert set(metrics.intervals) == {"retain_probability"}
    assert metrics.model_utility > 0


def test_estimates_count_what_they_left_out():
    forget = [sample(rouge=math.nan), sample(truth_ratio=0.5), sample(truth_ratio=0.5)]
    retain = [sample(rouge=math.nan, truth_ratio=math.nan), sample(), sample()]
    numbers = estimates({"forget": forget, "retain": retain})
    assert (numbers["forget_rouge"].n, numbers["forget_rouge"].unscorable) == (2, 1)
    # No truth ratio at all is another thing than one that could not be computed.
    assert (numbers["forget_truth_ratio"].n, numbers["forget_truth_ratio"].unscorable) == (2, 0)
    assert (numbers["model_utility"].n, numbers["model_utility"].unscorable) == (2, 1)
    assert list(numbers)[-1] == "model_utility"


def test_the_utility_of_a_draw_is_zero_where_a_part_is():
    retain = [sample(rouge=0.0) for _ in range(20)] + [sample(rouge=1.0)]
    low, high = compute_metrics({"forget": [sample()], "retain": retain}).intervals["model_utility"]
    assert low == 0 < high
