"""The FALCON paper's layer criterion: mutual information of forget and retain activations, and its nulls.

Source: Hu et al., arXiv 2502.01472, "information-theoretic guidance". Per layer I(F;R) = H(F) + H(R) - H(F,R), each
entropy by PCA (95 % of the variance) and a Gaussian KDE with Scott's bandwidth; the paper picks the argmin.

Implemented as published, which measurement does not support as a guide:

- PCA is fitted to forget, retain and joint apart, so the dimensions do not add up: the estimate can be negative, and
  multiplying the activations by c adds (kF + kR - kJ) ln c, enough to move the argmin from the first layer to the last.
- In that many dimensions a sample's own kernel is 92-100 % of its density: the estimate is a difference of
  log-determinants. Independent Gaussians of 5 / 20 / 50 dimensions give 1.9 / 2.4 / 4.2 nats instead of 0.
- Forget and retain rows have no natural pairing, so the joint entropy is that of an arbitrary one. Shuffling it, or
  putting retain samples in the place of the forget samples, gave the same curve (correlation .99).

Hence :func:`curve` computes both nulls with every estimate and :func:`statements` says what they leave of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from falcon_unlearn.artifacts import MutualInformationCurve
from falcon_unlearn.config import Section
from falcon_unlearn.corpus.batching import epoch_order
from falcon_unlearn.errors import UserError

MIN_PAIRS = 3
"""A KDE in one dimension needs three samples, see :func:`kde_entropy`."""

NULL_CORRELATION = 0.9
"""A rank correlation with a null from which on :func:`statements` calls the curve indistinguishable from it."""

RANK_TOLERANCE = 1e-12
"""Relative to a dimension's variance: what the others leave unexplained below this is rounding."""


class EstimationError(UserError):
    """An entropy that these samples do not determine."""


class MutualInformationConfig(Section):
    """Settings of the published estimator."""

    variance: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Share of the variance that the PCA before each density estimate keeps."""

    eta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Weight of the mutual information between forget domains, where there are several."""

    permutations: Annotated[int, Field(ge=1)] = 5
    """How many shuffled pairings the permutation null is averaged over."""

    max_samples: Annotated[int, Field(ge=MIN_PAIRS)] = 512
    """Most pairs of rows an estimate uses."""


def _checked(samples: Tensor, where: str) -> Tensor:
    """``samples`` as centred fp64 ``(n, dimensions)`` on the CPU, if they are finite and not constant."""
    assert samples.ndim == 2, f"{where}: expected (samples, dimensions), got {tuple(samples.shape)}"
    x = samples.detach().to("cpu", torch.float64)
    if len(x) < 2:
        raise EstimationError(f"{where}: {len(x)} sample(s), too few to estimate an entropy; add records")
    bad = int((~x.isfinite()).any(dim=1).sum())
    if bad:
        raise EstimationError(
            f"{where}: NaN or infinity in {bad} of {len(x)} activations; load the model in bfloat16 or float32, "
            "or leave those records out"
        )
    eps = torch.finfo(samples.dtype).eps if samples.is_floating_point() else 0.0
    lowest, highest = x.amin(dim=0), x.amax(dim=0)
    if bool((highest - lowest <= 2 * eps * torch.maximum(lowest.abs(), highest.abs())).all()):
        raise EstimationError(
            f"{where}: all {len(x)} activations are the same, so they have no entropy; use records that differ "
            "up to the token the activations are taken at"
        )
    return x - x.mean(dim=0)


def fit_pca(samples: Tensor, variance: float = 0.95, *, where: str = "activations") -> Tensor:
    """Project onto the fewest principal components that hold more than ``variance`` of the variance.

    The same as ``sklearn.decomposition.PCA(n_components=variance).fit_transform``, up to the sign of a column.

    Args:
        samples: ``(n, dimensions)``.
        variance: share to keep, between 0 and 1.
        where: what the samples are, for error messages.

    Returns:
        fp64 ``(n, k)`` on the CPU, by falling variance.

    Raises:
        EstimationError: non-finite or constant samples.
    """
    x = _checked(samples, where)
    rows_fewer = x.shape[0] <= x.shape[1]
    eigenvalues, vectors = torch.linalg.eigh(x @ x.T if rows_fewer else x.T @ x)
    eigenvalues, vectors = eigenvalues.flip(0).clamp_min(0), vectors.flip(1)
    share = eigenvalues.cumsum(0) / eigenvalues.sum()
    k = int((share <= variance).sum()) + 1
    projected: Tensor = vectors[:, :k] * eigenvalues[:k].sqrt() if rows_fewer else x @ vectors[:, :k]
    return projected


def kde_entropy(samples: Tensor, *, block: int = 1024, where: str = "activations") -> float:
    """Differential entropy in nats: mean of -log p at the samples, p their Gaussian KDE.

    The kernel's covariance is that of the samples times n^(-2/(d+4)) (Scott), as in ``scipy.stats.gaussian_kde``.

    Args:
        samples: ``(n, d)``.
        block: rows of the distance matrix held at a time; memory is ``block * n`` numbers.
        where: what the samples are, for error messages.

    Raises:
        EstimationError: non-finite or constant samples, n < d + 2, or a singular covariance. (With n = d + 1 the
            whitened samples are a regular simplex whatever the data, and with fewer there is no density.)
    """
    x = _checked(samples, where)
    n, d = x.shape
    if n < d + 2:
        raise EstimationError(
            f"{where}: {n} samples in {d} dimensions do not determine a density ({d + 2} are needed); use more "
            "samples or lower 'variance'"
        )
    scale = x.square().sum(dim=0).div(n - 1).sqrt()
    x = x / scale
    cholesky, failed = torch.linalg.cholesky_ex(x.T @ x / (n - 1))
    # The squared diagonal is each dimension's variance given those before it; a zero scale makes it NaN.
    if int(failed) or not bool((cholesky.diagonal().square() > RANK_TOLERANCE).all()):
        raise EstimationError(
            f"{where}: the covariance of {n} samples in {d} dimensions is singular, so they have no density; "
            "use more samples or lower 'variance'"
        )
    bandwidth = n ** (-1 / (d + 4))
    points = torch.linalg.solve_triangular(cholesky, x.T, upper=False).T / bandwidth
    norms = points.square().sum(dim=1)
    log_kernels = 0.0
    for rows, row_norms in zip(points.split(block), norms.split(block), strict=True):
        squared_distances = row_norms[:, None] + norms - 2 * rows @ points.T
        log_kernels += float(torch.logsumexp(-squared_distances / 2, dim=1).sum())
    log_volume = float((scale * cholesky.diagonal() * bandwidth).log().sum()) + d / 2 * math.log(2 * math.pi)
    return math.log(n) + log_volume - log_kernels / n


def entropy(samples: Tensor, variance: float = 0.95, *, where: str = "activations") -> float:
    """Entropy in nats of ``(n, dimensions)`` samples: :func:`fit_pca`, then :func:`kde_entropy`; raises as they do."""
    return kde_entropy(fit_pca(samples, variance, where=where), where=where)


def mutual_information(forget: Tensor, retain: Tensor, variance: float = 0.95) -> float:
    """I(F;R) = H(F) + H(R) - H(F,R) in nats as published: the PCA is fitted to each of the three apart.

    Args:
        forget: ``(n, dimensions)``.
        retain: ``(n, dimensions)``, row i paired with row i of ``forget``.
        variance: share of the variance that each PCA keeps.

    Raises:
        EstimationError: an entropy cannot be estimated.
    """
    marginal = entropy(forget, variance, where="forget") + entropy(retain, variance, where="retain")
    return marginal - _joint_entropy(forget, retain, variance, "forget joint with retain")


def _joint_entropy(left: Tensor, right: Tensor, variance: float, where: str) -> float:
    """Entropy of the paired rows ``[left | right]``."""
    if len(left) != len(right):
        raise EstimationError(f"{where}: {len(left)} and {len(right)} rows cannot be paired; pass equally many")
    return entropy(torch.cat([left, right], dim=1), variance, where=where)


def aggregate(
    forget: Mapping[str, Tensor], retain: Tensor, *, eta: float = 1.0, variance: float = 0.95, where: str = ""
) -> float:
    """Sum over domains of I(F_i;R), plus ``eta`` times the sum over pairs of domains of I(F_i;F_j), in nats.

    Args:
        forget: domain to ``(n, dimensions)``; rows are paired across domains and with ``retain``.
        retain: ``(n, dimensions)``.
        eta: weight of the information between domains.
        variance: share of the variance that each PCA keeps.
        where: prefix of error messages, such as ``"layer 3, "``.

    Raises:
        EstimationError: an entropy cannot be estimated.
    """
    return _marginal_part(forget, retain, eta, variance, where) - _joint_part(forget, retain, eta, variance, where)


def _marginal_part(forget: Mapping[str, Tensor], retain: Tensor, eta: float, variance: float, where: str) -> float:
    """What of :func:`aggregate` does not depend on the pairing: each entropy as often as it occurs."""
    domains = len(forget)
    own = sum(entropy(rows, variance, where=f"{where}forget domain '{name}'") for name, rows in forget.items())
    return domains * entropy(retain, variance, where=f"{where}retain") + (1 + eta * (domains - 1)) * own


def _joint_part(forget: Mapping[str, Tensor], retain: Tensor, eta: float, variance: float, where: str) -> float:
    """The weighted joint entropies that :func:`aggregate` subtracts."""
    with_retain = sum(
        _joint_entropy(rows, retain, variance, f"{where}'{name}' joint with retain") for name, rows in forget.items()
    )
    between = sum(
        _joint_entropy(forget[left], forget[right], variance, f"{where}'{left}' joint with '{right}'")
        for left, right in combinations(forget, 2)
    )
    return with_retain + eta * between


@dataclass(frozen=True)
class Pairing:
    """Which rows of each set stand side by side: row numbers, the same count in every tuple."""

    forget: Mapping[str, tuple[int, ...]]
    retain: tuple[int, ...]
    held_back: Mapping[str, tuple[int, ...]]
    """For each domain the retain rows that take its place in the null; no retain row is used twice."""

    @property
    def pairs(self) -> int:
        """Rows in each set."""
        return len(self.retain)


def pair_rows(forget_rows: Mapping[str, int], retain_rows: int, max_samples: int, seed: int) -> Pairing:
    """Shuffle each set and take n rows of it, so that the estimate and its nulls rest on equally many pairs.

    n is the least of ``max_samples``, the smallest forget domain, and the retain rows divided by one more than the
    number of domains: the retain set must give its own rows and, for the null, a stand-in for every domain.

    Raises:
        EstimationError: no forget domain, or fewer than :data:`MIN_PAIRS` pairs.
    """
    if not forget_rows:
        raise EstimationError("layer selection by mutual information needs at least one forget domain")
    parts = len(forget_rows) + 1
    n = min(max_samples, *forget_rows.values(), retain_rows // parts)
    if n < MIN_PAIRS:
        counts = ", ".join(f"{count} in forget domain '{name}'" for name, count in forget_rows.items())
        raise EstimationError(
            f"too few records for mutual information ({counts}, {retain_rows} in retain): at least {MIN_PAIRS} in each "
            f"forget domain and {MIN_PAIRS * parts} in retain are needed"
        )
    order = epoch_order(retain_rows, 0, seed, "mutual information, retain")
    return Pairing(
        forget={
            name: tuple(epoch_order(count, 0, seed, f"mutual information, forget {name}")[:n])
            for name, count in forget_rows.items()
        },
        retain=tuple(order[:n]),
        held_back={name: tuple(order[n * i : n * (i + 1)]) for i, name in enumerate(forget_rows, start=1)},
    )


def _select(samples: Tensor, rows: Sequence[int], where: str) -> Tensor:
    """Rows of ``samples``, centred; where they have more dimensions than rows, in a basis of their own span.

    Such a change of basis keeps every inner product and with them PCA and density, at the cost of n columns.
    """
    x = _checked(samples[list(rows)], where)
    return torch.linalg.qr(x.T, mode="r").R.T if x.shape[0] < x.shape[1] else x


def curve(
    layers: Sequence[int],
    forget: Mapping[str, Sequence[Tensor]],
    retain: Sequence[Tensor],
    config: MutualInformationConfig,
    seed: int,
) -> MutualInformationCurve:
    """Estimate :func:`aggregate` at each layer, and what it gives where there is nothing to find.

    All three values of a layer rest on the same number of rows (see :func:`pair_rows`), and every layer on the same
    rows and pairings. ``null_retain`` puts held-back retain rows in the place of every forget domain;
    ``null_permutation`` is the mean over ``config.permutations`` in which each domain's rows are shuffled anew.

    Args:
        layers: layer numbers.
        forget: domain to one ``(N_i, hidden)`` tensor a layer, sample order the same in all.
        retain: one ``(N, hidden)`` tensor a layer.
        config: the estimator's settings.
        seed: of rows, pairing and permutations.

    Raises:
        EstimationError: an entropy cannot be estimated; the message names layer and domain.
        UserError: too few samples to pair.
    """
    for name, tensors in [*forget.items(), ("retain", retain)]:
        assert len(tensors) == len(layers) > 0, f"{name}: {len(tensors)} tensors for {len(layers)} layers"
        assert len({len(tensor) for tensor in tensors}) == 1, f"{name}: layers differ in their number of samples"
    counts = {name: len(tensors[0]) for name, tensors in forget.items()}
    rows = pair_rows(counts, len(retain[0]), config.max_samples, seed)
    shuffles = [
        {name: epoch_order(rows.pairs, p, seed, f"mutual information, permutation {name}") for name in forget}
        for p in range(config.permutations)
    ]
    value, null_retain, null_permutation = [], [], []
    for position, layer in enumerate(layers):
        where = f"layer {layer}, "
        domains = {
            name: _select(tensors[position], rows.forget[name], f"{where}forget domain '{name}'")
            for name, tensors in forget.items()
        }
        kept = _select(retain[position], rows.retain, f"{where}retain")
        held_back = {
            name: _select(retain[position], chosen, f"{where}held-back retain")
            for name, chosen in rows.held_back.items()
        }
        marginal = _marginal_part(domains, kept, config.eta, config.variance, where)
        value.append(marginal - _joint_part(domains, kept, config.eta, config.variance, where))
        null_retain.append(
            aggregate(held_back, kept, eta=config.eta, variance=config.variance, where=f"{where}held-back retain as ")
        )
        joints = [
            _joint_part({n: x[order[n]] for n, x in domains.items()}, kept, config.eta, config.variance, where)
            for order in shuffles
        ]
        null_permutation.append(marginal - sum(joints) / len(joints))
    return MutualInformationCurve(
        layers=tuple(layers),
        value=tuple(value),
        null_retain=tuple(null_retain),
        null_permutation=tuple(null_permutation),
        pairs=rows.pairs,
        domains=tuple(forget),
    )


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None for fewer than three values or a side without any difference."""
    from scipy.stats import spearmanr

    if len(left) < 3 or len(set(left)) == 1 or len(set(right)) == 1:
        return None
    return round(float(spearmanr(left, right).statistic), 12)


def statements(curve: MutualInformationCurve) -> tuple[str, ...]:
    """What a reader of the curve should know, one plain sentence each: its choice, its nulls, what is left of it."""
    chosen = curve.argmin
    at = curve.layers.index(chosen)
    lines = [f"Mutual information is lowest at layer {chosen} ({curve.value[at]:.2f} nats from {curve.pairs} pairs)."]
    for name, without, null, consequence in (
        (
            "retain samples in the place of the forget samples",
            "any forget sample",
            curve.null_retain,
            "the choice of layer says nothing about what is to be forgotten",
        ),
        (
            "forget and retain samples paired anew",
            "that pairing",
            curve.null_permutation,
            "the estimate does not measure what forget and retain samples share",
        ),
    ):
        lowest = curve.layers[min(range(len(null)), key=null.__getitem__)]
        correlation = rank_correlation(curve.value, null)
        agreement = "" if correlation is None else f"; rank correlation of the two curves {correlation:+.2f}"
        lines.append(f"With {name} it is lowest at layer {lowest}, {null[at]:.2f} nats at layer {chosen}{agreement}.")
        if correlation is not None and correlation >= NULL_CORRELATION:
            lines.append(f"The curve is not distinguishable from that one: {consequence}.")
        elif lowest == chosen and len(null) > 1:
            lines.append(f"The same layer is chosen without {without}.")
    if any(value < 0 for value in curve.value):
        lines.append(
            "No mutual information is negative, but this estimate is: it depends on the scale of the activations, "
            "as the published estimator does."
        )
    return tuple(lines)
