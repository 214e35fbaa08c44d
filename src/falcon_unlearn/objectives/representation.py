"""Objectives on activations. Shapes: N = tokens that count (padding is gone before), D = hidden size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def info_nce(anchor: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Contrastive forget loss (FALCON, eq. 8): pull the anchor to the positive, away from the negatives.

    Args:
        anchor: updated model's forget activations, ``(N, D)``.
        positive: offset vector ``(D,)``, or one per token ``(N, D)``.
        negatives: frozen activations, ``(N, K, D)`` for K negatives per token, or ``(M, D)`` shared by all tokens.
        temperature: divides the cosine similarities.

    Returns:
        Mean over tokens of ``-log softmax`` of the positive, a scalar.
    """
    anchor = F.normalize(anchor.float(), dim=-1)
    positive = F.normalize(positive.float(), dim=-1)
    negatives = F.normalize(negatives.float(), dim=-1)
    to_positive = (anchor * positive).sum(-1, keepdim=True)
    to_negatives = anchor @ negatives.T if negatives.ndim == 2 else torch.einsum("nd,nkd->nk", anchor, negatives)
    logits = torch.cat([to_positive, to_negatives], dim=-1) / temperature
    return -F.log_softmax(logits, dim=-1)[:, 0].mean()


def contrast(anchor: Tensor, positive: Tensor, negative: Tensor, temperature: float) -> Tensor:
    """:func:`info_nce` with one negative a token, of each token: ``-log sigmoid((cos(a, p) - cos(a, n)) / tau)``.

    Args:
        anchor: updated activations, ``(..., D)``.
        positive: what each is pulled to, ``(..., D)``.
        negative: what each is pushed from, ``(..., D)``.
        temperature: tau.

    Returns:
        ``(...)``.
    """
    to_positive = F.cosine_similarity(anchor.float(), positive.float(), dim=-1)
    to_negative = F.cosine_similarity(anchor.float(), negative.float(), dim=-1)
    return -F.logsigmoid((to_positive - to_negative) / temperature)


def cosine_retention(updated: Tensor, frozen: Tensor) -> Tensor:
    """Retain loss (FALCON, eq. 9): one minus the mean cosine of updated and frozen activations, both ``(N, D)``."""
    return 1 - F.cosine_similarity(updated.float(), frozen.float(), dim=-1).mean()


def squared_distance(updated: Tensor, target: Tensor) -> Tensor:
    """Mean squared error, the form of both RMU losses (Li et al. 2024, section 4).

    Args:
        updated: ``(N, D)``.
        target: ``(N, D)`` or a vector ``(D,)`` that every token is steered to.
    """
    return (updated.float() - target.float()).square().mean()
