"""How firmly the forget records fix their principal subspace: angles to those of bootstrap resamples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from falcon_unlearn.objectives.offset_vectors import PrincipalSubspace, principal_subspace

_WORTH_APPROXIMATING = 1024  # up to this dimension a resample is factorised exactly
_FEW = 5  # resamples above it: one takes seconds
_SWEEPS = 3
_EXTRA = 32


@dataclass(frozen=True)
class SubspaceStability:
    """Principal angles between the subspace of all records and those of resamples, each of the same K.

    Attributes:
        resamples: how many.
        records: how many were drawn from (and as many drawn, with replacement).
        largest_angle: radians, 0 to pi/2; of each resample, then the mean over resamples.
        median_angle: likewise.
        shared: mean squared cosine of all angles: the share of the subspace that a resample has too, 0 to 1.
        shared_at_random: what two random subspaces of that dimension share on average, K / D.
    """

    resamples: int
    records: int
    largest_angle: float
    median_angle: float
    shared: float
    shared_at_random: float


def _fp64(rows: Tensor) -> Tensor:
    # Apple's GPU has no fp64.
    return (rows.cpu() if rows.device.type == "mps" else rows).double()


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles between two subspaces (Björck and Golub 1973, Mathematics of Computation 27).

    Cosines are the singular values of ``Q1' Q2``. Small angles are taken from the sines, as ``arccos`` loses half the
    digits near 1 (Knyazev and Argentati 2002, SIAM Journal on Scientific Computing 23).

    Args:
        first: linearly independent rows that span a subspace, ``(K, D)``.
        second: ``(M, D)``.

    Returns:
        ``(min(K, M),)`` in radians, 0 to pi/2, ascending, fp64.
    """
    larger, smaller = (torch.linalg.qr(_fp64(rows).T).Q for rows in sorted((first, second), key=len, reverse=True))
    inner = larger.T @ smaller
    cosines = torch.linalg.svdvals(inner).clamp(max=1)
    sines = torch.linalg.svdvals(smaller - larger @ inner).clamp(max=1).flip(0)
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())


def _widened(directions: Tensor) -> Tensor:
    """An orthonormal basis of ``directions`` ``(K, D)`` and of about as many random ones, ``(D, M > K)``."""
    rank, hidden = directions.shape
    extra = torch.randn(min(rank + _EXTRA, hidden - rank), hidden, generator=torch.Generator().manual_seed(0))
    basis: Tensor = torch.linalg.qr(torch.cat((directions, extra.to(directions))).T).Q
    return basis


def _improved(rows: Tensor, start: Tensor, rank: int) -> Tensor:
    """About the leading ``rank`` right singular vectors of ``rows``, ``(rank, D)``, by subspace iteration.

    A few steps from ``start`` ``(D, M > rank)`` and Rayleigh-Ritz (Golub and Van Loan, Matrix Computations, 8.2.4).
    """
    basis = start
    for _ in range(_SWEEPS):
        basis = torch.linalg.qr(rows.T @ (rows @ basis)).Q
    image = rows @ basis
    leading: Tensor = torch.linalg.eigh(image.T @ image).eigenvectors[:, -rank:]
    return (basis @ leading).T


def subspace_stability(
    activations: Tensor, records: Tensor, subspace: PrincipalSubspace, resamples: int, generator: torch.Generator
) -> SubspaceStability:
    """Bootstrap over records: the tokens of a record are drawn together, since they are not independent.

    A resample that spans fewer than K directions is at right angles to the missing ones. Where both its sides are above
    1024, its subspace is found by three steps of iteration from that of the whole sample, else exactly: angles are
    then somewhat too small where the spectrum is flat at K. Activations of that size get 5 resamples at most.

    A resample repeats accidents of the sample, so that activations without any structure share more than
    ``shared_at_random`` with it too, however many there are.

    Args:
        activations: those that ``subspace`` is of, ``(N, D)``.
        records: to which record each row belongs, integers ``(N,)``.
        subspace: from :func:`~falcon_unlearn.objectives.offset_vectors.principal_subspace`.
        resamples: one at least; see above.
        generator: on the CPU; of the draws.
    """
    matrix = _fp64(activations)
    rank, hidden = subspace.directions.shape
    names, owners = torch.unique(records.cpu(), return_inverse=True)
    if min(matrix.shape) > _WORTH_APPROXIMATING:
        resamples = min(resamples, _FEW)
    own = _fp64(subspace.directions)
    start = _widened(own)
    angles = matrix.new_full((resamples, rank), math.pi / 2)
    for resample in range(resamples):
        drawn = torch.randint(len(names), (len(names),), generator=generator).bincount(minlength=len(names))
        times = drawn[owners].to(matrix)
        rows = matrix[times > 0].mul_(times[times > 0].sqrt()[:, None])
        if min(rows.shape) <= _WORTH_APPROXIMATING:
            directions = principal_subspace(rows, rank=rank, variance=1.0).directions
        else:
            directions = _improved(rows, start, rank)
        found = principal_angles(own, directions)
        angles[resample, : len(found)] = found
    return SubspaceStability(
        resamples,
        len(names),
        float(angles.amax(1).mean()),
        float(angles.quantile(0.5, dim=1).mean()),
        float(angles.cos().square().mean()),
        rank / hidden,
    )
