"""How far apart forget and retain activations of a layer lie: four estimates, each of two samples of mean activations.

Unlike the published mutual information they ask of the activations which side they are of. None of them says what an
edit of the layer would do: docs/science.md has them beside runs at every layer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FOLDS = 5
"""Of the cross-validation of :func:`probe`."""

PENALTY = 1e-2
"""Of the probe's squared weights, beside the mean loss of a record."""


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()


def mmd_squared(forget: Tensor, retain: Tensor) -> float:
    """Squared maximum mean discrepancy, unbiased (so it can be negative), RBF kernel with the median heuristic.

    Source: Gretton et al., "A kernel two-sample test", JMLR 2012, lemma 6. Kernel exp(-d^2 / m), m the median of
    the squared distances between all samples of both sides.

    Args:
        forget: ``(n >= 2, hidden)``.
        retain: ``(m >= 2, hidden)``.

    Returns:
        0 on average where both are drawn from the same distribution, at most 2.
    """
    x, y = forget.double(), retain.double()
    n, m = len(x), len(y)
    distances = _squared_distances(pooled := torch.cat([x, y]), pooled)
    rows, columns = torch.triu_indices(n + m, n + m, offset=1)
    median = distances[rows, columns].median()
    if median == 0:
        return 0.0
    kernel = torch.exp(-distances / median).fill_diagonal_(0)
    own = kernel[:n, :n].sum() / (n * (n - 1)) + kernel[n:, n:].sum() / (m * (m - 1))
    return float(own - 2 * kernel[:n, n:].mean())


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of two representations of the same n inputs.

    Source: Kornblith et al., "Similarity of neural network representations revisited", ICML 2019, equation 4:
    |Y'X|^2 / (|X'X| |Y'Y|), Frobenius norms of centred matrices.

    Forget and retain records are no inputs in common: rows are paired here by what is asked, a forget record with
    its stand-in (:mod:`falcon_unlearn.corpus.stand_ins`).

    Args:
        x: ``(n, d)``.
        y: ``(n, e)``, row i of the same input as row i of ``x``.

    Returns:
        0 to 1; 1 where they are the same up to a rotation, a shift and a factor. NaN where one of them is constant.
    """
    a, b = (v.double() - v.double().mean(0) for v in (x, y))
    norms = (a @ a.T).norm() * (b @ b.T).norm()
    return float((b.T @ a).square().sum() / norms) if norms > 0 else math.nan


@dataclass(frozen=True)
class Probe:
    """What a linear probe makes of records that it was not trained on.

    Attributes:
        error: share of them that it puts on the wrong side; sides weigh the same, so .5 is chance.
        information: log 2 minus the mean cross-entropy, in nats; at most log 2, negative where it is worse than chance.
    """

    error: float
    information: float


def _fit(x: Tensor, y: Tensor, weights: Tensor, penalty: float) -> Tensor:
    """Logistic regression with intercept (last entry) by Newton's method; ``y`` is 0 or 1, ``weights`` sum to 1."""
    design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    ridge = torch.full((design.shape[1],), 2 * penalty, dtype=x.dtype)
    ridge[-1] = 1e-8
    beta = torch.zeros(design.shape[1], dtype=x.dtype)
    for _ in range(30):
        p = torch.sigmoid(design @ beta)
        gradient = design.T @ (weights * (p - y)) + ridge * beta
        hessian = (design * (weights * p * (1 - p))[:, None]).T @ design + torch.diag(ridge)
        step = torch.linalg.solve(hessian, gradient)
        beta = beta - step
        if float(step.abs().max()) < 1e-8:
            break
    return beta


def probe(
    forget: Tensor, retain: Tensor, groups: Sequence[Hashable], *, seed: int = 0, penalty: float = PENALTY
) -> Probe:
    """Tell forget from retain records by logistic regression, cross-validated.

    ``information`` is the variational lower bound of Barber and Agakov (NIPS 2003) on the mutual information of
    activation and side, I >= H(side) - E[-log q(side | activation)], with held-out records in the expectation and both
    sides equally likely.

    Args:
        forget: ``(n, hidden)``.
        retain: ``(m, hidden)``.
        groups: a key for each record, forget first; records with equal keys (phrasings of a fact) share a fold.
        seed: of the folds.
        penalty: of the squared weights, features having variance 1.
    """
    n, m = len(forget), len(retain)
    assert len(groups) == n + m
    x = torch.cat([forget, retain]).double()
    y = torch.cat([torch.ones(n), torch.zeros(m)]).double()
    keys = list(dict.fromkeys(groups))
    random.Random(f"folds {seed}").shuffle(keys)
    fold_of = {key: i % FOLDS for i, key in enumerate(keys)}
    folds = torch.tensor([fold_of[key] for key in groups])
    logits = torch.zeros(n + m, dtype=torch.float64)
    for fold in range(FOLDS):
        held, kept = folds == fold, folds != fold
        side = y[kept]
        if not (0 < side.sum() < len(side)):
            continue  # one side only: the logits stay at chance
        weights = torch.where(side == 1, 0.5 / side.sum(), 0.5 / (1 - side).sum())
        centre, spread = x[kept].mean(0), x[kept].std(0).clamp_min(1e-12)
        beta = _fit((x[kept] - centre) / spread, side, weights, penalty)
        logits[held] = ((x[held] - centre) / spread) @ beta[:-1] + beta[-1]
    signed = torch.where(y == 1, logits, -logits)
    wrong = (signed < 0).double() + 0.5 * (signed == 0)
    loss = torch.nn.functional.softplus(-signed)

    def balanced(values: Tensor) -> float:
        return float(values[:n].mean() + values[n:].mean()) / 2

    return Probe(balanced(wrong), math.log(2) - balanced(loss))
