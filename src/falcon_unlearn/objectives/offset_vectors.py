"""Directions to steer forget activations to. ``r`` is random, ``V`` holds the K principal directions as rows.

========================  ==========================================================================
paper                     normalise(f(r (I - w V'V))): leaves the principal subspace (w = 1)
random                    normalise(r)
published_code            what the authors' repository computes; see :func:`published_code_vector`
========================  ==========================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from falcon_unlearn.errors import UserError

Nonlinearity = Literal["none", "tanh"]

_ANGLE = 1e-7  # between the subspace that iteration finds and the true one
_WORTH_ITERATING = 2048  # below this dimension the exact decomposition takes little time


@dataclass(frozen=True)
class PrincipalSubspace:
    """The leading right singular vectors of an activation matrix.

    Attributes:
        directions: orthonormal rows, ``(K, D)``.
        singular_values: descending, ``(K,)``.
        variance_share: share of the total squared norm inside the subspace.
    """

    directions: Tensor
    singular_values: Tensor
    variance_share: float


def _fp64(activations: Tensor) -> Tensor:
    # Apple's GPU has no fp64.
    return (activations.cpu() if activations.device.type == "mps" else activations).double()


def _gram(rows: Tensor) -> Tensor:
    """``rows @ rows.T``, its lower triangle only (``eigh`` reads no other): little more than half the products."""
    count = len(rows)
    step = max(64, count // 8)
    gram = rows.new_zeros(count, count)
    for start in range(0, count, step):
        gram[start:, start : start + step] = rows[start:] @ rows[start : start + step].T
    return gram


def _all_pairs(side: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of ``side @ side.T``, descending, and the eigenvectors as columns."""
    values, vectors = torch.linalg.eigh(_gram(side))
    return values.flip(0).clamp_min(0), vectors.flip(-1)


def _smallest_rank(shares: Tensor, variance: float) -> int:
    return int((shares < variance).sum()) + 1


def _leading_pairs(side: Tensor, total: float, *, rank: int | None, variance: float) -> tuple[Tensor, Tensor] | None:
    """The leading pairs of :func:`_all_pairs` without the Gram matrix, or None where the exact way is the better.

    Block Lanczos from a random block, all blocks orthogonalised against each other (Golub and Van Loan, Matrix
    Computations, 10.3.6). ``||A Y - Y Theta|| / (theta_K - theta_K+1)`` bounds the sine of the angle between the
    subspace found and the true one (Davis and Kahan); it must fall to ``_ANGLE`` before the basis reaches an eighth
    of the dimension. More than a 64th of the dimension is not tried: it rarely gets there.
    """
    size = len(side)
    few, largest = size // 64, size // 8
    if size < _WORTH_ITERATING or (rank or 0) > few:
        return None
    width = 32
    start = torch.randn(size, width, generator=torch.Generator().manual_seed(0), dtype=side.dtype).to(side.device)
    block = torch.linalg.qr(start).Q
    basis = side.new_empty(size, 0)
    reduced = side.new_empty(0, 0)
    while basis.shape[1] + width <= largest:
        image = side @ (side.T @ block)
        basis = torch.cat((basis, block), 1)
        column = basis.T @ image
        reduced = torch.cat((torch.cat((reduced, column[:-width].T)), column), 1)
        block, remainder = torch.linalg.qr(image - basis @ column)
        # Once more: where nothing but rounding was left, the columns are not orthogonal to the basis.
        block, again = torch.linalg.qr(block - basis @ (basis.T @ block))
        remainder = again @ remainder
        values, vectors = torch.linalg.eigh(reduced)
        values, vectors = values.flip(0), vectors.flip(-1)
        k = rank if rank is not None else _smallest_rank(values.cumsum(0) / total, variance)
        if k > few and len(values) > width:
            return None
        if k < len(values):
            residual = remainder @ vectors[-width:, :k]
            if residual.norm() <= _ANGLE * (values[k - 1] - values[k]):
                return values[:k], basis @ vectors[:, :k]
    return None


def _directions(matrix: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    """Right singular vectors ``(K, D)``, fp32, from eigenpairs of the smaller Gram side of ``matrix`` (fp64)."""
    if len(matrix) >= matrix.shape[1]:
        return vectors.T.float()
    if values[-1] > 1e-8 * values[0]:
        scaled = (vectors / values.sqrt()).T
        # Rounding in fp32 adds about 6e-8 |row| / sigma_K to a direction: 3e-7 at most where this holds.
        if values.sum() < 25 * len(matrix) * values[-1]:
            return scaled.float() @ matrix.float()
        return (scaled @ matrix).float()
    # The Gram matrix squares the condition number: weak directions, merely scaled, lean on strong ones.
    orthonormal: Tensor = torch.linalg.qr(matrix.T @ vectors).Q
    return orthonormal.T.float()


def principal_subspace(activations: Tensor, *, rank: int | None, variance: float) -> PrincipalSubspace:
    """One factorisation of ``activations`` ``(N, D)`` (not centred, as published), on the smaller Gram side.

    Where few directions are asked for, or few hold ``variance``, they are found by block iteration, to an angle of
    1e-7 or not at all; else all of them by an exact decomposition. Equal inputs give equal results.

    Args:
        activations: forget activations of the frozen model.
        rank: K, or None for the smallest K that holds ``variance`` of the squared norm.
        variance: used when ``rank`` is None.

    Raises:
        UserError: K reaches the full dimension, where nothing outside the subspace is left.
    """
    matrix = _fp64(activations)
    rows, hidden = matrix.shape
    total = float(matrix.norm()) ** 2
    if not 0 < total < float("inf"):
        raise UserError("forget activations are zero or not finite: check the model and its dtype")
    side = matrix if rows < hidden else matrix.T
    values, vectors = _leading_pairs(side, total, rank=rank, variance=variance) or _all_pairs(side)
    numerical_rank = int((values > values[0] * max(rows, hidden) * torch.finfo(torch.float64).eps).sum())
    shares = values.cumsum(0) / total
    k = min(rank if rank is not None else _smallest_rank(shares, variance), numerical_rank)
    if k >= hidden:
        raise UserError(
            f"method.offset_rank: {k} directions span all {hidden} dimensions, so no offset direction is left; "
            "lower offset_rank or offset_variance"
        )
    values = values[:k]
    directions = _directions(matrix, values, vectors[:, :k])
    return PrincipalSubspace(
        directions.to(activations.device), values.sqrt().float().to(activations.device), float(shares[k - 1])
    )


def _unit(vector: Tensor) -> Tensor:
    return F.normalize(vector, dim=-1)


def paper_vector(
    subspace: PrincipalSubspace, generator: torch.Generator, *, weight: float = 1.0, nonlinearity: Nonlinearity = "none"
) -> Tensor:
    """Principal offset vector (FALCON, eq. 5): a random vector with the principal directions taken out.

    With ``weight = 1`` and no nonlinearity the result is orthogonal to every direction of ``subspace``.

    Returns:
        Unit vector ``(D,)``.
    """
    directions = subspace.directions
    r = torch.randn(directions.shape[1], generator=generator).to(directions)
    projected = r - weight * ((directions @ r) @ directions)
    return _unit(torch.tanh(projected) if nonlinearity == "tanh" else projected)


def random_vector(hidden: int, generator: torch.Generator) -> Tensor:
    """A uniformly random unit vector ``(D,)``."""
    return _unit(torch.randn(hidden, generator=generator))


def published_code_vector(activations: Tensor, generator: torch.Generator, *, max_rank: int = 1000) -> Tensor:
    """The vector of the authors' repository, which lies inside the subspace it is said to leave.

    A constant vector passes six times through ``tanh(I + 1000 sum_k sigmoid(s_k/s_1) v_k v_k' + noise)`` and an
    elementwise tanh. The weights make the projection grow along the principal directions, not shrink. ``sum_k``
    is one matrix product here instead of the repository's loop.

    Args:
        activations: ``(N, D)``.
        generator: source of the noise (standard deviation 0.01).
        max_rank: K = min(max_rank, N, D).
    """
    matrix = _fp64(activations)
    rows, hidden = matrix.shape
    values, vectors = _all_pairs(matrix if rows < hidden else matrix.T)
    values, vectors = values[:max_rank], vectors[:, :max_rank]
    kept = _directions(matrix, values, vectors).to(activations.device)
    weights = -1000.0 * torch.sigmoid((values / values[0]).sqrt().to(kept))
    projection = torch.eye(hidden, device=kept.device) - (kept.T * weights) @ kept
    projection = torch.tanh(projection + 0.01 * torch.randn(hidden, hidden, generator=generator).to(kept))
    vector = torch.full((hidden,), hidden**-0.5, device=kept.device)
    for _ in range(6):
        vector = torch.tanh(vector @ projection)
        vector = vector / (vector.norm() + 1e-6)
    return vector
