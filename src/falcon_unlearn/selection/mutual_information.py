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

BLOCK = 1024
"""Rows and columns of the kernel matrix held at a time."""


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
    """``samples`` as centred fp64 ``(n, dimensions)`` where they lie (CPU or CUDA), if finite and not constant."""
    assert samples.ndim == 2, f"{where}: expected (samples, dimensions), got {tuple(samples.shape)}"
    # Of the devices only these two compute in fp64.
    x = samples.detach().to(samples.device if samples.is_cuda else "cpu", torch.float64)
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


def _leading(products: Tensor, variance: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues, falling, and eigenvectors of a matrix of inner products: the fewest above ``variance`` of all."""
    eigenvalues, vectors = torch.linalg.eigh(products)
    eigenvalues, vectors = eigenvalues.flip(0).clamp_min(0), vectors.flip(1)
    share = eigenvalues.cumsum(0) / eigenvalues.sum()
    k = int((share <= variance).sum()) + 1
    return eigenvalues[:k], vectors[:, :k]


def fit_pca(samples: Tensor, variance: float = 0.95, *, where: str = "activations") -> Tensor:
    """Project onto the fewest principal components that hold more than ``variance`` of the variance.

    The same as ``sklearn.decomposition.PCA(n_components=variance).fit_transform``, up to the sign of a column.

    Args:
        samples: ``(n, dimensions)``.
        variance: share to keep, between 0 and 1.
        where: what the samples are, for error messages.

    Returns:
        fp64 ``(n, k)``, by falling variance; on CUDA if the samples are, else on the CPU.

    Raises:
        EstimationError: non-finite or constant samples.
    """
    x = _checked(samples, where)
    if x.shape[0] <= x.shape[1]:
        eigenvalues, vectors = _leading(x @ x.T, variance)
        return vectors * eigenvalues.sqrt()
    return x @ _leading(x.T @ x, variance)[1]


def _refuse_too_few(n: int, d: int, where: str) -> None:
    if n < d + 2:
        raise EstimationError(
            f"{where}: {n} samples in {d} dimensions do not determine a density ({d + 2} are needed); use more "
            "samples or lower 'variance'"
        )


def _singular(n: int, d: int, where: str) -> EstimationError:
    return EstimationError(
        f"{where}: the covariance of {n} samples in {d} dimensions is singular, so they have no density; "
        "use more samples or lower 'variance'"
    )


def _white_entropy(points: Tensor, log_scale: float, block: int) -> float:
    """Entropy of a Gaussian KDE from its whitened points.

    Args:
        points: samples in units in which the kernel's covariance is the identity, ``(n, d)``.
        log_scale: log-determinant of the map from those units to the samples' own.
        block: the kernel matrix is symmetric and held in pieces of at most ``block`` by ``block``.
    """
    n, d = points.shape
    half_norms = points.square().sum(dim=1) / 2
    # No maximum to take out of these sums: each holds the point's own kernel, which is 1, and no larger one.
    sums = torch.zeros_like(half_norms)
    pieces = [slice(start, start + block) for start in range(0, n, block)]
    for i, rows in enumerate(pieces):
        for columns in pieces[i:]:
            kernel = torch.addmm(-half_norms[columns], points[rows], points[columns].T)
            kernel = kernel.sub_(half_norms[rows, None]).exp_()
            sums[rows] += kernel.sum(dim=1)
            if columns != rows:
                sums[columns] += kernel.sum(dim=0)
    return math.log(n) + log_scale + d / 2 * math.log(2 * math.pi) - float(sums.log().mean())


def kde_entropy(samples: Tensor, *, block: int = BLOCK, where: str = "activations") -> float:
    """Differential entropy in nats: mean of -log p at the samples, p their Gaussian KDE.

    The kernel's covariance is that of the samples times n^(-2/(d+4)) (Scott), as in ``scipy.stats.gaussian_kde``.

    Args:
        samples: ``(n, d)``.
        block: rows and columns of the kernel matrix held at a time; memory is ``block * block`` numbers.
        where: what the samples are, for error messages.

    Raises:
        EstimationError: non-finite or constant samples, n < d + 2, or a singular covariance. (With n = d + 1 the
            whitened samples are a regular simplex whatever the data, and with fewer there is no density.)
    """
    x = _checked(samples, where)
    n, d = x.shape
    _refuse_too_few(n, d, where)
    scale = x.square().sum(dim=0).div(n - 1).sqrt()
    x = x / scale
    cholesky, failed = torch.linalg.cholesky_ex(x.T @ x / (n - 1))
    # The squared diagonal is each dimension's variance given those before it; a zero scale makes it NaN.
    if int(failed) or not bool((cholesky.diagonal().square() > RANK_TOLERANCE).all()):
        raise _singular(n, d, where)
    bandwidth = n ** (-1 / (d + 4))
    points = torch.linalg.solve_triangular(cholesky, x.T, upper=False).T / bandwidth
    return _white_entropy(points, float((scale * cholesky.diagonal() * bandwidth).log().sum()), block)


class _Rows:
    """Centred fp64 rows ``x`` of one set, ``(n, dimensions)``; of many dimensions entropies need only ``gram``."""

    def __init__(self, x: Tensor, gram: Tensor | None = None) -> None:
        self.x = x
        self._gram = gram

    @property
    def gram(self) -> Tensor:
        """Inner products ``(n, n)``, computed once."""
        if self._gram is None:
            self._gram = self.x @ self.x.T
        return self._gram

    def in_order(self, order: Sequence[int]) -> _Rows:
        """The rows in another order."""
        index = torch.tensor(order, device=self.x.device)
        return _Rows(self.x[index], None if self._gram is None else self._gram[index][:, index])


def _entropy(sets: Sequence[_Rows], variance: float, where: str) -> float:
    """Entropy in nats of the rows of ``sets`` side by side, by PCA and KDE.

    Side by side, inner products add up; and principal components are uncorrelated, so that whitening is a division.
    """
    counts = [len(rows.x) for rows in sets]
    if len(set(counts)) > 1:
        raise EstimationError(f"{where}: {' and '.join(map(str, counts))} rows cannot be paired; pass equally many")
    n = counts[0]
    if n <= sum(rows.x.shape[1] for rows in sets):
        eigenvalues, unit = _leading(torch.stack([rows.gram for rows in sets]).sum(0), variance)
    else:
        x = torch.cat([rows.x for rows in sets], dim=1)
        eigenvalues, vectors = _leading(x.T @ x, variance)
        unit = x @ vectors / eigenvalues.sqrt()
    d = len(eigenvalues)
    _refuse_too_few(n, d, where)
    if not bool(eigenvalues[-1] > RANK_TOLERANCE * eigenvalues[0]):
        raise _singular(n, d, where)
    bandwidth = n ** (-1 / (d + 4))
    log_scale = float((eigenvalues / (n - 1)).log().sum()) / 2 + d * math.log(bandwidth)
    return _white_entropy(unit * (math.sqrt(n - 1) / bandwidth), log_scale, BLOCK)


def entropy(samples: Tensor, variance: float = 0.95, *, where: str = "activations") -> float:
    """Entropy in nats of ``(n, dimensions)`` samples: :func:`fit_pca`, then :func:`kde_entropy`; raises as they do."""
    return _entropy([_Rows(_checked(samples, where))], variance, where)


def mutual_information(forget: Tensor, retain: Tensor, variance: float = 0.95) -> float:
    """I(F;R) = H(F) + H(R) - H(F,R) in nats as published: the PCA is fitted to each of the three apart.

    Args:
        forget: ``(n, dimensions)``.
        retain: ``(n, dimensions)``, row i paired with row i of ``forget``.
        variance: share of the variance that each PCA keeps.

    Raises:
        EstimationError: an entropy cannot be estimated.
    """
    return aggregate({"forget": forget}, retain, variance=variance)


def published_mutual_information(forget: Tensor, retain: Tensor, variance: float = 0.95) -> float:
    """I(F;R) as published for sets of different size, in nats: each marginal entropy rests on all rows of its set.

    The joint entropy rests on the first rows, as many as both sets have. An entropy estimate depends on the number of
    rows, so the three are comparable only for equal counts, as in :func:`mutual_information` and :func:`curve`.

    Args:
        forget: ``(n, dimensions)``.
        retain: ``(m, dimensions)``, on the same device.
        variance: share of the variance that each PCA keeps.

    Raises:
        EstimationError: an entropy cannot be estimated.
    """
    pairs = min(len(forget), len(retain))
    sets = [_Rows(_checked(samples, name)) for samples, name in ((forget, "forget"), (retain, "retain"))]
    marginal = sum(_entropy([rows], variance, name) for rows, name in zip(sets, ("forget", "retain"), strict=True))
    paired = [rows if len(rows.x) == pairs else _Rows(rows.x[:pairs] - rows.x[:pairs].mean(dim=0)) for rows in sets]
    return marginal - _entropy(paired, variance, "forget joint with retain")


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
    domains = {name: _Rows(_checked(rows, f"{where}forget domain '{name}'")) for name, rows in forget.items()}
    kept = _Rows(_checked(retain, f"{where}retain"))
    marginal = _own_part(domains, eta, variance, where) + len(domains) * _entropy([kept], variance, f"{where}retain")
    return marginal - _joint_part(domains, kept, eta, variance, where)


def _own_part(forget: Mapping[str, _Rows], eta: float, variance: float, where: str) -> float:
    """The forget domains' own entropies in :func:`aggregate`, each as often as it occurs."""
    own = sum(_entropy([rows], variance, f"{where}forget domain '{name}'") for name, rows in forget.items())
    return (1 + eta * (len(forget) - 1)) * own


def _joint_part(forget: Mapping[str, _Rows], retain: _Rows, eta: float, variance: float, where: str) -> float:
    """The weighted joint entropies that :func:`aggregate` subtracts."""
    with_retain = sum(
        _entropy([rows, retain], variance, f"{where}'{name}' joint with retain") for name, rows in forget.items()
    )
    between = sum(
        _entropy([forget[left], forget[right]], variance, f"{where}'{left}' joint with '{right}'")
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


def curve(
    layers: Sequence[int],
    forget: Mapping[str, Sequence[Tensor]],
    retain: Sequence[Tensor],
    config: MutualInformationConfig,
    seed: int,
    *,
    device: torch.device | str | None = None,
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
        device: where to compute, one layer after the other; without it where the activations lie. On other devices
            than CPU and CUDA, which have no fp64, the CPU computes.

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

    def centred(samples: Tensor, chosen: Sequence[int], name: str) -> _Rows:
        return _Rows(_checked(samples[list(chosen)].to(device), name))

    value, null_retain, null_permutation = [], [], []
    for position, layer in enumerate(layers):
        where = f"layer {layer}, "
        domains = {
            name: centred(tensors[position], rows.forget[name], f"{where}forget domain '{name}'")
            for name, tensors in forget.items()
        }
        kept = centred(retain[position], rows.retain, f"{where}retain")
        held_back = {
            name: centred(retain[position], chosen, f"{where}held-back retain")
            for name, chosen in rows.held_back.items()
        }
        eta, variance = config.eta, config.variance
        own = _own_part(domains, eta, variance, where)
        of_retain = len(domains) * _entropy([kept], variance, f"{where}retain")
        marginal = own + of_retain
        value.append(marginal - _joint_part(domains, kept, eta, variance, where))
        stand_in = f"{where}held-back retain as "
        null_retain.append(
            _own_part(held_back, eta, variance, stand_in)
            + of_retain
            - _joint_part(held_back, kept, eta, variance, stand_in)
        )
        joints = [
            _joint_part({n: x.in_order(order[n]) for n, x in domains.items()}, kept, eta, variance, where)
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
