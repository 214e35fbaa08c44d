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


def principal_subspace(activations: Tensor, *, rank: int | None, variance: float) -> PrincipalSubspace:
    """One factorisation of ``activations`` ``(N, D)`` (not centred, as published), on the smaller Gram side.

    Args:
        activations: forget activations of the frozen model.
        rank: K, or None for the smallest K that holds ``variance`` of the squared norm.
        variance: used when ``rank`` is None.

    Raises:
        UserError: K reaches the full dimension, where nothing outside the subspace is left.
    """
    # Apple's GPU has no fp64.
    matrix = (activations.cpu() if activations.device.type == "mps" else activations).double()
    rows, hidden = matrix.shape
    if not torch.isfinite(matrix).all() or not matrix.any():
        raise UserError("forget activations are zero or not finite: check the model and its dtype")
    if rows >= hidden:
        values, vectors = torch.linalg.eigh(matrix.T @ matrix)
        directions = vectors.flip(-1).T
    else:
        values, vectors = torch.linalg.eigh(matrix @ matrix.T)
        directions = vectors.flip(-1).T @ matrix
    values = values.flip(0).clamp_min(0)
    numerical_rank = int((values > values[0] * max(rows, hidden) * torch.finfo(torch.float64).eps).sum())
    shares = values.cumsum(0) / values.sum()
    k = rank if rank is not None else int((shares < variance).sum()) + 1
    k = min(k, numerical_rank)
    if k >= hidden:
        raise UserError(
            f"method.offset_rank: {k} directions span all {hidden} dimensions, so no offset direction is left; "
            "lower offset_rank or offset_variance"
        )
    directions = directions[:k]
    if rows < hidden:
        # The Gram matrix squares the condition number: weak directions, merely scaled, lean on strong ones.
        directions = torch.linalg.qr(directions.T).Q.T
    directions, singular_values = (part.float().to(activations.device) for part in (directions, values[:k].sqrt()))
    return PrincipalSubspace(directions, singular_values, float(shares[k - 1]))


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
    _, singular, directions = torch.linalg.svd(activations.float(), full_matrices=False)
    k = min(max_rank, directions.shape[0])
    kept = directions[:k]
    hidden = kept.shape[1]
    weights = -1000.0 * torch.sigmoid(singular[:k] / singular[0])
    projection = torch.eye(hidden, device=kept.device) - (kept.T * weights) @ kept
    projection = torch.tanh(projection + 0.01 * torch.randn(hidden, hidden, generator=generator).to(kept))
    vector = torch.full((hidden,), hidden**-0.5, device=kept.device)
    for _ in range(6):
        vector = torch.tanh(vector @ projection)
        vector = vector / (vector.norm() + 1e-6)
    return vector
