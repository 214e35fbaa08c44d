"""How a forget and a retain gradient become one, tensor by tensor.

=========  =====================================================================================
sum        g_F + g_R
falcon     in conflict (cosine < 0) g_F loses its part along g_R, then the two are weighted
           (FALCON, eq. 11-13; weights of the published code)
pcgrad     in conflict each loses its part along the other (Yu et al., NeurIPS 2020), then sum
=========  =====================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
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


def project_out(gradient: Tensor, direction: Tensor) -> Tensor:
    """``gradient`` without its component along ``direction``; a zero direction takes nothing away."""
    squared = (direction * direction).sum()
    if squared == 0:
        return gradient
    return gradient - ((gradient * direction).sum() / squared) * direction


def combine_tensor(forget: Tensor, retain: Tensor, config: GradientConfig) -> Tensor:
    """One tensor's update direction from its two gradients (all of the same shape)."""
    if config.combination == "sum":
        return forget + retain
    conflict = bool((forget * retain).sum() < 0)
    if config.combination == "pcgrad":
        return project_out(forget, retain) + project_out(retain, forget) if conflict else forget + retain
    if conflict:
        on_forget, on_retain = config.conflict_weights
        return on_forget * project_out(forget, retain) + on_retain * retain
    on_forget, on_retain = config.aligned_weights
    return on_forget * forget + on_retain * retain


def combine(
    forget: Sequence[Tensor], retain: Sequence[Tensor], config: GradientConfig
) -> tuple[list[Tensor], GradientStatistics]:
    """Combine the gradients of all trained tensors and say how much they were at odds."""
    combined = [combine_tensor(f, r, config) for f, r in zip(forget, retain, strict=True)]
    dots = torch.stack([(f * r).sum() for f, r in zip(forget, retain, strict=True)])
    forget_norms = torch.stack([f.norm() for f in forget])
    retain_norms = torch.stack([r.norm() for r in retain])
    products = forget_norms * retain_norms
    cosines = (dots / products)[products > 0]
    return combined, GradientStatistics(
        forget_norm=float(forget_norms.norm()),
        retain_norm=float(retain_norms.norm()),
        cosine=float(cosines.mean()) if len(cosines) else float("nan"),
        conflicts=float((dots < 0).float().mean()),
    )
