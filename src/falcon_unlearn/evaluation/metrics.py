"""From per-sample scores to the numbers of one model: TOFU's formulas (Maini et al., COLM 2024), pure functions."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence

from scipy.special import gammaln, logsumexp
from scipy.stats import ks_2samp

from falcon_unlearn.artifacts import Metrics, SampleScore

FORGET_SET = "forget"

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


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _scored(values: Iterable[float | None]) -> list[float]:
    return [value for value in _present(values) if not math.isnan(value)]


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean without NaN; None if there is no value at all, NaN if there is nothing but NaN."""
    present = _present(values)
    scored = _scored(present)
    if not present:
        return None
    return math.fsum(scored) / len(scored) if scored else math.nan


def _mean_or_nan(values: Iterable[float]) -> float:
    mean = _mean(values)
    return math.nan if mean is None else mean


def _is_unscorable(score: SampleScore) -> bool:
    numbers = (score.probability, score.accuracy, score.rouge, score.truth_ratio, score.accuracy_heldout)
    return any(math.isnan(value) for value in _present((*numbers, score.normalised_probability)))


def _utility_parts(name: str, scores: Sequence[SampleScore]) -> dict[str, float]:
    parts = {
        f"{name}_probability": _mean(
            s.probability if s.normalised_probability is None else s.normalised_probability for s in scores
        ),
        f"{name}_rouge": _mean(s.rouge for s in scores),
        f"{name}_truth_ratio": _mean(map(utility_truth_ratio, _present(s.truth_ratio for s in scores))),
    }
    return {key: value for key, value in parts.items() if value is not None}


def compute_metrics(
    scores: Mapping[str, Sequence[SampleScore]], oracle_forget: Sequence[SampleScore] | None = None
) -> Metrics:
    """The numbers of one model.

    Model utility is the harmonic mean, over all sets but the forget set, of mean probability, ROUGE-L recall and
    max(0, 1 - truth ratio), as far as a set has them; a sample with a ``normalised_probability`` enters with it.
    On TOFU's three sets this is TOFU's model utility. ``forget_truth_ratio`` is the mean of min(R, 1/R).
    A mean leaves out NaN; a sample with any NaN is counted once in ``unscorable``.

    Args:
        scores: scores by name of the set; ``forget`` is the forget set, every other one counts as utility.
        oracle_forget: the oracle's scores on the same forget set; without them there is no forget quality.

    Raises:
        KeyError: there is no forget set.
    """
    forget = scores[FORGET_SET]
    parts: dict[str, float] = {}
    for name, samples in scores.items():
        if name != FORGET_SET:
            parts |= _utility_parts(name, samples)

    ratios = _scored(s.truth_ratio for s in forget)
    oracle_ratios = _scored(s.truth_ratio for s in oracle_forget or ())
    quality = forget_quality(ratios, oracle_ratios) if ratios and oracle_ratios else (None, None)
    return Metrics(
        forget_probability=_mean_or_nan(s.probability for s in forget),
        forget_accuracy=_mean_or_nan(s.accuracy for s in forget),
        forget_accuracy_heldout=_mean(s.accuracy_heldout for s in forget),
        forget_rouge=_mean_or_nan(s.rouge for s in forget),
        forget_truth_ratio=_mean(map(forget_truth_ratio, _present(s.truth_ratio for s in forget))),
        forget_quality=quality[0],
        log10_forget_quality=quality[1],
        model_utility=harmonic_mean(parts.values()) if parts else None,
        utility_parts=parts,
        unscorable=sum(_is_unscorable(s) for samples in scores.values() for s in samples),
    )
