"""From per-sample scores to the numbers of one model: TOFU's formulas (Maini et al., COLM 2024), pure functions."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from scipy.special import gammaln, logsumexp
from scipy.stats import ks_2samp

from falcon_unlearn.artifacts import Estimate, Metrics, SampleScore
from falcon_unlearn.evaluation.intervals import RESAMPLES, Numbers, group, interval, resampled_counts, weighted_means

FORGET_SET = "forget"

TruthRatioDefinition = Literal["code", "paper"]
"""``code``: :func:`truth_ratio`, with which published tables are made; ``paper``: :func:`paper_truth_ratio`."""

_LARGEST_EXPONENT = 700.0


def truth_ratio(right: float, wrong: Sequence[float]) -> float:
    """Wrong / right: geometric mean over the wrong answers of their per-token probability over the right one's.

    ``exp(mean_i wrong_i - right)``, OpenUnlearning's form of TOFU's R_truth. Held finite (at e^700) so that a
    diverged model still has a rank.

    Args:
        right: mean log-probability per token of the paraphrased answer.
        wrong: the same of each perturbed answer, at least one.
    """
    assert wrong
    return math.exp(min(math.fsum(wrong) / len(wrong) - right, _LARGEST_EXPONENT))


def paper_truth_ratio(right: float, wrong: Sequence[float]) -> float:
    """Wrong / right: arithmetic mean of the wrong answers' per-token probabilities over the right one's.

    ``mean_i(exp(wrong_i)) / exp(right)``, equation 1 of Maini et al. (COLM 2024). Never below
    :func:`truth_ratio`. Held finite in the same way.

    Args:
        right: mean log-probability per token of the paraphrased answer.
        wrong: the same of each perturbed answer, at least one.
    """
    assert wrong
    log_ratio = float(logsumexp(wrong)) - math.log(len(wrong)) - right
    return math.exp(min(log_ratio, _LARGEST_EXPONENT))


def sample_truth_ratio(score: SampleScore, definition: TruthRatioDefinition = "code") -> float | None:
    """The truth ratio of one sample; None where its record has none, NaN where it cannot be computed.

    The paper's needs the log-probabilities. A record without a paraphrase has its answer in that place (TOFU's real
    authors and world facts).
    """
    if definition == "code" or score.truth_ratio is None or math.isnan(score.truth_ratio):
        return score.truth_ratio
    wrong, right = score.perturbed_log_probabilities, score.paraphrased_log_probability
    right = score.log_probability if right is None else right
    return paper_truth_ratio(right, wrong) if wrong and right is not None else math.nan


def normalised_probability(right: float, wrong: Sequence[float]) -> float:
    """P(right) / (P(right) + sum of P(wrong)), P being exp of a mean log-probability per token."""
    return float(math.exp(right - logsumexp([right, *wrong])))


def forget_truth_ratio(ratio: float) -> float:
    """min(R, 1/R): 1 where a model prefers neither right nor wrong (what the forget set averages)."""
    return ratio if ratio <= 1 else 1 / ratio


def utility_truth_ratio(ratio: float) -> float:
    """max(0, 1 - R): 1 where a model is sure of the right answer (what every other set averages)."""
    return 0.0 if ratio > 1 else 1.0 - ratio


def harmonic_mean(parts: Iterable[float]) -> float:
    """Harmonic mean of numbers >= 0; 0 if any of them is 0, else NaN if any is NaN.

    Raises:
        ValueError: no parts.
    """
    values = list(parts)
    if not values:
        raise ValueError("harmonic mean of nothing")
    if any(value <= 0 for value in values):
        return 0.0
    return len(values) / math.fsum(1 / value for value in values)


def log10_ks_p_value(a: Sequence[float], b: Sequence[float]) -> float:
    """Log10 of the p-value of the two-sided two-sample Kolmogorov-Smirnov test.

    This is ``scipy.stats.ks_2samp`` (exact up to 10 000 samples) wherever a double can hold the p-value. Below
    that the leading term of the exact series takes over for equal sizes, ``2 C(2n, n - nD) / C(2n, n)``, and that
    of the asymptotic one, ``2 exp(-2 D^2 nm / (n + m))``, for unequal ones.

    Args:
        a: numbers without NaN, at least one.
        b: numbers without NaN, at least one.
    """
    with warnings.catch_warnings():
        # Where rounding lifts the exact p-value above 1, scipy warns and takes the asymptotic one.
        warnings.simplefilter("ignore", RuntimeWarning)
        result = ks_2samp(a, b)
    if result.pvalue >= sys.float_info.min:
        return math.log10(result.pvalue)
    n, m, distance = len(a), len(b), float(result.statistic)
    if n == m:
        apart = round(n * distance)
        log_p = float(2 * gammaln(n + 1) - gammaln(n - apart + 1) - gammaln(n + apart + 1))
    else:
        log_p = -2 * distance**2 * n * m / (n + m)
    return (math.log(2) + log_p) / math.log(10)


def forget_quality(truth_ratios: Sequence[float], oracle_truth_ratios: Sequence[float]) -> tuple[float, float]:
    """How well the truth ratios on the forget set could be those of a model that never saw it.

    Returns:
        The p-value of the two-sample KS test (0 where a double cannot hold it) and its log10.
    """
    log10_p = log10_ks_p_value(truth_ratios, oracle_truth_ratios)
    return 10**log10_p, log10_p


def forget_quality_of(
    scores: Sequence[SampleScore],
    oracle: Sequence[SampleScore] | None,
    definition: TruthRatioDefinition = "code",
) -> tuple[float, float] | tuple[None, None]:
    """:func:`forget_quality` of two sets of samples, without NaN; None where one of them has no truth ratio."""
    ours, theirs = (_scored(sample_truth_ratio(s, definition) for s in side) for side in (scores, oracle or ()))
    return forget_quality(ours, theirs) if ours and theirs else (None, None)


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _scored(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and not math.isnan(value)]


def _is_unscorable(score: SampleScore) -> bool:
    numbers = (score.probability, score.accuracy, score.rouge, score.truth_ratio, score.accuracy_heldout)
    return any(math.isnan(value) for value in _present((*numbers, score.normalised_probability)))


def _columns(
    name: str, scores: Sequence[SampleScore], definition: TruthRatioDefinition
) -> dict[str, list[float | None]]:
    """The numbers of one set's samples by the name of their mean."""
    ratios = [sample_truth_ratio(s, definition) for s in scores]
    if name == FORGET_SET:
        return {
            "forget_probability": [s.probability for s in scores],
            "forget_accuracy": [s.accuracy for s in scores],
            "forget_accuracy_heldout": [s.accuracy_heldout for s in scores],
            "forget_rouge": [s.rouge for s in scores],
            "forget_truth_ratio": [None if r is None else forget_truth_ratio(r) for r in ratios],
        }
    return {
        f"{name}_probability": [
            s.probability if s.normalised_probability is None else s.normalised_probability for s in scores
        ],
        f"{name}_rouge": [s.rouge for s in scores],
        f"{name}_truth_ratio": [None if r is None else utility_truth_ratio(r) for r in ratios],
    }


def _harmonic_means(parts: Numbers) -> Numbers:
    """:func:`harmonic_mean` of each row."""
    with np.errstate(divide="ignore"):
        means = parts.shape[1] / (1 / parts).sum(axis=1)
    return np.where((parts <= 0).any(axis=1), 0.0, means)


def estimates(
    scores: Mapping[str, Sequence[SampleScore]], *, definition: TruthRatioDefinition = "code", seed: int = 0
) -> dict[str, Estimate]:
    """Every mean over samples, and model utility, with 95 % bootstrap intervals.

    Model utility is the harmonic mean, over all sets but the forget set, of mean probability, ROUGE-L recall and
    max(0, 1 - truth ratio), as far as a set has them; a sample with a ``normalised_probability`` enters with it.
    On TOFU's three sets this is TOFU's model utility. ``forget_truth_ratio`` is the mean of min(R, 1/R). Means
    leave out NaN.

    Entities are resampled where records name one, samples elsewhere, each set on its own; every draw of all sets
    gives one draw of the utility. A number whose scorable samples are one entity has no interval.

    Args:
        scores: scores by name of the set; ``forget`` is the forget set, every other one counts as utility.
        definition: of the truth ratio.
        seed: of the draws.

    Returns:
        By name, as the fields of :class:`Metrics` and the names of its ``utility_parts`` (``retain_rouge``), in the
        order of ``scores``; what no sample has is left out. ``model_utility`` comes last.
    """
    result: dict[str, Estimate] = {}
    utility: dict[str, Numbers] = {}
    columns = {name: _columns(name, samples, definition) for name, samples in scores.items() if samples}
    kept = {
        name: {key: values for key, values in of_set.items() if any(value is not None for value in values)}
        for name, of_set in columns.items()
    }
    groups = {
        name: group(np.array(list(of_set.values()), dtype=np.float64).T, [s.entity for s in scores[name]])
        for name, of_set in kept.items()
    }
    counts = resampled_counts(list(groups.values()), resamples=RESAMPLES, seed=seed)
    for (name, samples), drawn in zip(groups.items(), counts, strict=True):
        draws = weighted_means(samples.values, drawn)
        for column, (key, values) in enumerate(kept[name].items()):
            scored = _scored(values)
            there = ~np.isnan(samples.values[:, column])
            several = len(np.unique(samples.clusters[there])) > 1
            low, high = (interval(draws[:, column]) if several else None) or (None, None)
            result[key] = Estimate(
                value=math.fsum(scored) / len(scored) if scored else math.nan,
                low=low,
                high=high,
                n=len(scored),
                unscorable=len(_present(values)) - len(scored),
            )
            if name != FORGET_SET:
                utility[key] = draws[:, column]
    if utility:
        parts = [result[key] for key in utility]
        several = all(part.low is not None for part in parts)
        bounds = interval(_harmonic_means(np.stack(list(utility.values()), axis=1))) if several else None
        low, high = bounds or (None, None)
        rows = [
            row for name, of_set in kept.items() if name != FORGET_SET for row in zip(*of_set.values(), strict=True)
        ]
        unscorable = sum(any(math.isnan(value) for value in _present(row)) for row in rows)
        value = harmonic_mean(math.nan if part.value is None else part.value for part in parts)
        result["model_utility"] = Estimate(value, low, high, n=len(rows) - unscorable, unscorable=unscorable)
    return result


def compute_metrics(
    scores: Mapping[str, Sequence[SampleScore]],
    oracle_forget: Sequence[SampleScore] | None = None,
    *,
    definition: TruthRatioDefinition = "code",
) -> Metrics:
    """The numbers of one model: :func:`estimates`, and forget quality where there is an oracle.

    A sample with any NaN is counted once in ``unscorable``.

    Args:
        scores: scores by name of the set; ``forget`` is the forget set, every other one counts as utility.
        oracle_forget: the oracle's scores on the same forget set; without them there is no forget quality.
        definition: of the truth ratio.

    Raises:
        KeyError: there is no forget set.
    """
    forget = scores[FORGET_SET]
    numbers = estimates(scores, definition=definition)
    values = {name: math.nan if number.value is None else number.value for name, number in numbers.items()}
    quality, log10_quality = forget_quality_of(forget, oracle_forget, definition)
    own = {"model_utility", *_columns(FORGET_SET, (), definition)}
    return Metrics(
        forget_probability=values.get("forget_probability", math.nan),
        forget_accuracy=values.get("forget_accuracy", math.nan),
        forget_accuracy_heldout=values.get("forget_accuracy_heldout"),
        forget_rouge=values.get("forget_rouge", math.nan),
        forget_truth_ratio=values.get("forget_truth_ratio"),
        forget_quality=quality,
        log10_forget_quality=log10_quality,
        model_utility=values.get("model_utility"),
        utility_parts={name: value for name, value in values.items() if name not in own},
        unscorable=sum(_is_unscorable(s) for samples in scores.values() for s in samples),
        intervals={
            name: (number.low, number.high)
            for name, number in numbers.items()
            if number.low is not None and number.high is not None
        },
    )
