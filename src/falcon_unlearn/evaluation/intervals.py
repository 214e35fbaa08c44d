"""Bootstrap intervals: what an aggregate would have been, had other samples (or other entities) been drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from falcon_unlearn.artifacts import Estimate

Numbers = npt.NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Group:
    """Samples that are resampled together, independently of other groups.

    Attributes:
        values: ``(samples, columns)``; NaN where a sample has no such number.
        clusters: ``(samples,)`` integers; samples of one cluster (an entity's records) are drawn together.
    """

    values: Numbers
    clusters: npt.NDArray[np.int64]

    @property
    def n_clusters(self) -> int:
        """Number of things that are drawn."""
        return int(self.clusters.max()) + 1 if len(self.clusters) else 0


def group(values: Sequence[float] | Numbers, clusters: Sequence[Hashable | None] | None = None) -> Group:
    """Make a group of one number, or of one row of numbers, a sample.

    Args:
        values: ``(samples,)`` or ``(samples, columns)``.
        clusters: a label a sample; None in place of a label is a cluster of its own.
    """
    array = np.asarray(values, dtype=np.float64)
    array = array[:, None] if array.ndim == 1 else array
    if clusters is None:
        return Group(array, np.arange(len(array)))
    labels: dict[Hashable, int] = {}
    keys = [("", i) if label is None else ("label", label) for i, label in enumerate(clusters)]
    return Group(array, np.array([labels.setdefault(key, len(labels)) for key in keys], dtype=np.int64))


def resampled_counts(groups: Sequence[Group], *, resamples: int, seed: int) -> list[npt.NDArray[np.int64]]:
    """How often each sample is drawn, per group ``(resamples, samples)``: clusters are drawn with replacement."""
    rng = np.random.default_rng(seed)
    return [_counts(g, rng, resamples) for g in groups]


def _counts(g: Group, rng: np.random.Generator, resamples: int) -> npt.NDArray[np.int64]:
    n = g.n_clusters
    if not n:
        return np.zeros((resamples, len(g.values)), dtype=np.int64)
    drawn = rng.integers(n, size=(resamples, n)) + np.arange(0, resamples * n, n)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n)
    return counts if n == len(g.clusters) and (g.clusters == np.arange(n)).all() else counts[:, g.clusters]


def weighted_means(values: Numbers, counts: npt.NDArray[np.int64]) -> Numbers:
    """Means of each column without NaN, ``(resamples, columns)``; NaN where nothing scorable was drawn.

    Args:
        values: ``(samples, columns)``.
        counts: ``(resamples, samples)``.
    """
    there = ~np.isnan(values)
    weights = counts.astype(np.float64)
    total = weights.sum(1, keepdims=True) if there.all() else weights @ there.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((weights @ np.where(there, values, 0.0)) / total)


def interval(draws: Numbers) -> tuple[float, float] | None:
    """The central 95 % of bootstrap ``draws``, without NaN; None if there is none."""
    finite = draws[~np.isnan(draws)]
    if not len(finite):
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(finite, [tail, 1 - tail])
    return float(low), float(high)


def bootstrap(
    groups: Sequence[Group],
    statistic: Callable[[Sequence[npt.NDArray[np.int64]]], Numbers],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Percentile bootstrap of any statistic of several independent groups (Efron 1979; clusters: Field & Welsh 2007).

    Args:
        groups: what is resampled; each on its own.
        statistic: counts per group ``(rows, samples)`` -> ``(rows,)``. Called with one row of ones for the value
            itself and with the draws for the interval.
        resamples: draws.
        seed: of the draws.

    Returns:
        The value with its interval; no interval where a group has fewer than two clusters with a number, or the value
        itself is NaN.
    """
    ones = [np.ones((1, len(g.values)), dtype=np.int64) for g in groups]
    value = float(statistic(ones)[0])
    scorable = [~np.isnan(g.values).all(axis=1) for g in groups]
    n = sum(int(there.sum()) for there in scorable)
    unscorable = sum(len(g.values) for g in groups) - n
    bounds = None
    drawable = all(len(set(g.clusters[there].tolist())) > 1 for g, there in zip(groups, scorable, strict=True))
    if not math.isnan(value) and drawable:
        bounds = interval(statistic(resampled_counts(groups, resamples=resamples, seed=seed)))
    low, high = bounds or (None, None)
    return Estimate(value, low, high, n=n, unscorable=unscorable)


def mean_estimate(
    values: Sequence[float], clusters: Sequence[Hashable | None] | None = None, *, seed: int = 0
) -> Estimate:
    """Mean without NaN and its interval; NaN if nothing could be scored."""
    only = group(values, clusters)
    return bootstrap([only], lambda counts: weighted_means(only.values, counts[0])[:, 0], seed=seed)


def difference_estimate(
    ours: Sequence[float], theirs: Sequence[float], clusters: Sequence[Hashable | None] | None = None, *, seed: int = 0
) -> Estimate:
    """Mean of ``ours - theirs`` over the same samples, in the same order, and its paired interval."""
    assert len(ours) == len(theirs)
    return mean_estimate([a - b for a, b in zip(ours, theirs, strict=True)], clusters, seed=seed)
