"""Was a text trained on? Signals of one sequence, and how well a signal tells members from non-members. Pure.

Every signal is a loss: **the lower, the more likely a member**. An AUC here is the probability that a member's signal
is below a non-member's: 1 where all members are recognised, 0.5 where nothing can be told, 0 where members look least
like members, which is just as telling. Members are the forget records.

MUSE's code turns the roles around (forget records are its non-members), so its AUC is 1 minus this one;
OpenUnlearning's ``mia_*`` are this one, and its ``privleak`` turns them to MUSE's.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import numpy.typing as npt

from falcon_unlearn.artifacts import Estimate
from falcon_unlearn.evaluation.intervals import Group, Numbers, bootstrap, group
from falcon_unlearn.evaluation.token_scores import TokenScores

FALSE_POSITIVE_RATE = 0.01

# OpenUnlearning clamps Min-K%++'s variance at 1e-6.
_SMALLEST_STD = 1e-3

Counts = npt.NDArray[np.int64]
Clusters = Sequence[Hashable | None]


def mean_loss(log_probability: Sequence[float]) -> float:
    """Mean negative log-probability per token in nats (Yeom et al. 2018); NaN without a token."""
    return -math.fsum(log_probability) / len(log_probability) if log_probability else math.nan


def zlib_ratio(loss: float, text: str) -> float:
    """Loss per byte of the zlib-compressed text (Carlini et al. 2021, section 5.2: log-perplexity / zlib entropy).

    Args:
        loss: the **mean** per token, as in MUSE's and OpenUnlearning's code.
        text: what was scored; NaN if it is empty.
    """
    return loss / len(zlib.compress(text.encode())) if text else math.nan


def _lowest_mean(values: Sequence[float], share: float) -> float:
    count = int(len(values) * share)
    return -math.fsum(sorted(values)[:count]) / count if count else math.nan


def min_k(log_probability: Sequence[float], share: float) -> float:
    """Min-K%: mean loss of the share of tokens with the lowest log-probability (Shi et al. 2023).

    Returns:
        NaN where the share is less than one token: MUSE averages an empty slice there, OpenUnlearning takes
        one token.
    """
    return _lowest_mean(log_probability, share)


def min_k_plus_plus(scores: TokenScores, share: float) -> float:
    """Min-K%++: the same of each token's log-probability standardised over the vocabulary (Zhang et al. 2024).

    ``(log p - mean) / std``, std at least 1e-3 as in OpenUnlearning. NaN as :func:`min_k`.
    """
    standardised = [
        (value - mean) / max(std, _SMALLEST_STD)
        for value, mean, std in zip(scores.log_probability, scores.mean, scores.std, strict=True)
    ]
    return _lowest_mean(standardised, share)


def reference_difference(loss: float, reference_loss: float) -> float:
    """Loss minus that of a reference model on the same tokens (Carlini et al. 2021; difference as OpenUnlearning)."""
    return loss - reference_loss


def _without_nan(values: Numbers, counts: Counts) -> tuple[Numbers, Numbers]:
    """Sorted values ``(n,)`` and, in that order, cumulative counts ``(rows, n + 1)`` that begin at 0."""
    there = np.flatnonzero(~np.isnan(values))
    order = there[np.argsort(values[there])]
    cumulative = np.zeros((len(counts), len(order) + 1))
    np.cumsum(counts[:, order], axis=1, out=cumulative[:, 1:])
    return values[order], cumulative


def weighted_auc(members: Numbers, non_members: Numbers, member_counts: Counts, non_member_counts: Counts) -> Numbers:
    """AUC of each row of counts, ``(rows,)``: the Mann-Whitney statistic, ties count half; NaN where a side is empty.

    Args:
        members: ``(n,)`` signals; NaN is left out.
        non_members: ``(m,)``.
        member_counts: ``(rows, n)``, how often each member is drawn.
        non_member_counts: ``(rows, m)``.
    """
    ours, our_cumulative = _without_nan(members, member_counts)
    theirs, their_cumulative = _without_nan(non_members, non_member_counts)
    # For a member with `below` non-members under it and `up_to` not over it, (below + up_to) / 2 pairs are lost.
    below, up_to = (np.searchsorted(theirs, ours, side=side) for side in ("left", "right"))
    lost = (their_cumulative[:, below] + their_cumulative[:, up_to]) / 2
    pairs = our_cumulative[:, -1] * their_cumulative[:, -1]
    with np.errstate(invalid="ignore"):
        return np.asarray(1 - (np.diff(our_cumulative, axis=1) * lost).sum(axis=1) / pairs)


def weighted_tpr(members: Numbers, non_members: Numbers, member_counts: Counts, non_member_counts: Counts) -> Numbers:
    """Most members recognised by a threshold that at most 1 % of the non-members fall under (Carlini et al. 2022).

    Arguments and result are those of :func:`weighted_auc`.
    """
    ours, our_cumulative = _without_nan(members, member_counts)
    theirs, their_cumulative = _without_nan(non_members, non_member_counts)
    if not len(ours) or not len(theirs):
        return np.full(len(member_counts), np.nan)
    # The threshold stands just below the first non-member that would be one too many.
    allowed = FALSE_POSITIVE_RATE * their_cumulative[:, -1:] * (1 + 1e-12)
    one_too_many = (their_cumulative[:, 1:] <= allowed).sum(axis=1)
    bound = theirs[np.minimum(one_too_many, len(theirs) - 1)]
    recognised = our_cumulative[np.arange(len(bound)), np.searchsorted(ours, bound, side="left")]
    with np.errstate(invalid="ignore"):
        rate = recognised / our_cumulative[:, -1]
    return np.asarray(np.where(their_cumulative[:, -1] > 0, rate, np.nan))


def _once(values: Numbers) -> Counts:
    return np.ones((1, len(values)), dtype=np.int64)


def auc(members: Sequence[float], non_members: Sequence[float]) -> float:
    """Probability that a member's signal is below a non-member's, ties counted half; NaN signals are left out.

    Equal to scikit-learn's ``roc_auc_score`` of the negative signals with members as positives.

    Returns:
        NaN where a side is empty.
    """
    ours, theirs = np.asarray(members, dtype=np.float64), np.asarray(non_members, dtype=np.float64)
    return float(weighted_auc(ours, theirs, _once(ours), _once(theirs))[0])


def true_positive_rate(members: Sequence[float], non_members: Sequence[float]) -> float:
    """Share of members recognised at a false-positive rate of at most 1 %; NaN where a side is empty."""
    ours, theirs = np.asarray(members, dtype=np.float64), np.asarray(non_members, dtype=np.float64)
    return float(weighted_tpr(ours, theirs, _once(ours), _once(theirs))[0])


def _privleak(auc_model: Numbers, auc_retrain: Numbers | float) -> Numbers:
    theirs = 1 - np.asarray(auc_retrain, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = ((1 - auc_model) - theirs) / theirs * 100
    return np.asarray(np.where(theirs > 0, value, np.nan))


def privleak(auc_model: float, auc_retrain: float) -> float:
    """MUSE's PrivLeak in percent: how far the model's AUC is from a retrained model's (Shi et al. 2024, section 3.1).

    ``((1 - auc_model) - (1 - auc_retrain)) / (1 - auc_retrain) * 100``, the AUCs in this module's convention, those of
    MUSE being ``1 - auc``. 0 is the retrained model, towards -100 the forget records are still recognised as
    members, far above 0 they look like anything but members.

    Returns:
        NaN where the retrained model's AUC is 1 and the quotient has no value.
    """
    return float(_privleak(np.asarray(auc_model), auc_retrain))


def _groups(
    members: Sequence[float] | Numbers,
    non_members: Sequence[float] | Numbers,
    member_clusters: Clusters | None,
    non_member_clusters: Clusters | None,
) -> list[Group]:
    return [group(members, member_clusters), group(non_members, non_member_clusters)]


def _of_two(statistic: Callable[..., Numbers], groups: Sequence[Group], seed: int) -> Estimate:
    """A weighted statistic of members and non-members, drawn independently."""
    ours, theirs = (g.values[:, 0] for g in groups)
    return bootstrap(groups, lambda counts: statistic(ours, theirs, *counts), seed=seed)


def auc_estimate(
    members: Sequence[float],
    non_members: Sequence[float],
    member_clusters: Clusters | None = None,
    non_member_clusters: Clusters | None = None,
    *,
    seed: int = 0,
) -> Estimate:
    """:func:`auc` with its bootstrap interval; members and non-members are drawn independently, by clusters."""
    return _of_two(weighted_auc, _groups(members, non_members, member_clusters, non_member_clusters), seed)


def tpr_estimate(
    members: Sequence[float],
    non_members: Sequence[float],
    member_clusters: Clusters | None = None,
    non_member_clusters: Clusters | None = None,
    *,
    seed: int = 0,
) -> Estimate:
    """:func:`true_positive_rate` with its bootstrap interval."""
    return _of_two(weighted_tpr, _groups(members, non_members, member_clusters, non_member_clusters), seed)


def privleak_estimate(
    model: tuple[Sequence[float], Sequence[float]],
    retrained: tuple[Sequence[float], Sequence[float]] | float,
    member_clusters: Clusters | None = None,
    non_member_clusters: Clusters | None = None,
    *,
    seed: int = 0,
) -> Estimate:
    """:func:`privleak` with its bootstrap interval.

    Args:
        model: signals of the members and of the non-members.
        retrained: the same under the retrained model, of the same records in the same order: both AUCs are then taken
            from the same draws. Or its AUC, known from elsewhere.
        member_clusters: a label a member.
        non_member_clusters: a label a non-member.
        seed: of the draws.
    """
    known = retrained if isinstance(retrained, float) else None
    models = [model] if isinstance(retrained, float) else [model, retrained]
    members, non_members = (np.column_stack([signals[side] for signals in models]).astype(float) for side in (0, 1))

    def statistic(counts: Sequence[Counts]) -> Numbers:
        aucs = [weighted_auc(members[:, c], non_members[:, c], *counts) for c in range(len(models))]
        return _privleak(aucs[0], aucs[1] if known is None else known)

    return bootstrap(_groups(members, non_members, member_clusters, non_member_clusters), statistic, seed=seed)
