"""How a forget and a retain gradient become one, tensor by tensor.

=========  =====================================================================================
sum        g_F + g_R
falcon     in conflict (cosine < 0) g_F loses its part along g_R, then the two are weighted
           (FALCON, eq. 11-13; weights of the published code)
pcgrad     in conflict each loses its part along the other (Yu et al., NeurIPS 2020), then sum
=========  =====================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from falcon_unlearn.config import Section

Combination = Literal["sum", "falcon", "pcgrad"]


class GradientConfig(Section):
    """How the two gradients are combined."""

    combination: Combination = "falcon"
    """sum, falcon or pcgrad."""
    conflict_weights: tuple[float, float] = (0.8, 1.2)
    """falcon: weights of the projected forget and the retain gradient in conflict."""
    aligned_weights: tuple[float, float] = Field((0.1, 1.9))
    """falcon: weights of the two when they agree."""


@dataclass(frozen=True)
class GradientStatistics:
    """Over the tensors of one step: both norms, mean cosine (NaN where undefined), share of tensors in conflict."""

    forget_norm: float
    retain_norm: float
    cosine: float
    conflicts: float


def coefficients(
    dot: float, forget_squared: float, retain_squared: float, config: GradientConfig
) -> tuple[float, float]:
    """Every combination is ``a g_F + b g_R``; these are a and b of one tensor.

    Args:
        dot: inner product of its two gradients.
        forget_squared: squared norm of the forget gradient.
        retain_squared: squared norm of the retain gradient.
        config: which combination.
    """
    if config.combination == "sum":
        return 1.0, 1.0
    conflict = dot < 0 and forget_squared > 0 and retain_squared > 0  # squares of tiny gradients underflow
    if config.combination == "pcgrad":
        return (1 - dot / forget_squared, 1 - dot / retain_squared) if conflict else (1.0, 1.0)
    if conflict:
        on_forget, on_retain = config.conflict_weights
        return on_forget, on_retain - on_forget * dot / retain_squared
    return config.aligned_weights


def combine(
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    config: GradientConfig,
    over_shards: Callable[[Tensor], Tensor] | None = None,
) -> tuple[list[Tensor], GradientStatistics]:
    """Combine the gradients of all trained tensors in place of ``forget``, and say how much they were at odds.

    Three inner products a tensor and one pass to combine; no further memory.

    Args:
        forget: forget gradients; overwritten with the result.
        retain: retain gradients, of the same shapes.
        config: which combination.
        over_shards: where each of several processes holds a part of every gradient, sums what it is given over them;
            called once, with the inner products of all tensors.
    """
    pairs = [(f.reshape(-1), r.reshape(-1)) for f, r in zip(forget, retain, strict=True)]
    products = torch.stack([torch.stack([f.dot(r), f.dot(f), r.dot(r)]) for f, r in pairs]).double()
    if over_shards is not None:
        products = over_shards(products)
    rows: list[list[float]] = products.tolist()
    for into, other, (dot, forget_squared, retain_squared) in zip(forget, retain, rows, strict=True):
        on_forget, on_retain = coefficients(dot, forget_squared, retain_squared, config)
        into.mul_(on_forget).add_(other, alpha=on_retain)
    dots, squared = products[:, 0], products[:, 1:]
    norms = squared.prod(dim=1).sqrt()
    cosines = (dots / norms)[norms > 0]
    forget_norm, retain_norm = squared.sum(dim=0).sqrt().tolist()
    return list(forget), GradientStatistics(
        forget_norm=forget_norm,
        retain_norm=retain_norm,
        cosine=float(cosines.mean()) if len(cosines) else float("nan"),
        conflicts=float((dots < 0).double().mean()),
    )
