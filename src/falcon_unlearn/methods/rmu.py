"""RMU: representation misdirection for unlearning (Li et al., ICML 2024, the WMDP paper, section 4).

forget = || a - c u ||^2 / D        u a random unit vector with non-negative entries, c the steering coefficient
retain = || b - b0 ||^2 / D
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from falcon_unlearn.config import Section
from falcon_unlearn.corpus.batching import Batch
from falcon_unlearn.methods.base import (
    Setup,
    Side,
    counted_activations,
    counted_tokens,
    generator_for,
    masked_activations,
)
from falcon_unlearn.objectives.representation import squared_distance


class RmuConfig(Section):
    """Knobs of RMU."""

    name: Literal["rmu"] = "rmu"
    preset: Literal["default", "paper"] = "default"
    """default: what works on the embedded benchmark; paper: Zephyr-7B's published settings."""
    steering_coefficient: float | Literal["auto"] = "auto"
    """c; auto takes steering_scale times the mean norm of the frozen forget activations."""
    steering_scale: float = Field(2.0, gt=0)
    """Used when steering_coefficient is auto."""
    forget_weight: float = Field(1.0, gt=0)
    """Factor on the forget loss."""
    retain_weight: float = Field(1.0, ge=0)
    """Factor on the retain loss (alpha; 1200 in the paper for Zephyr-7B)."""


class Rmu:
    """RMU, set up for one model and one corpus."""

    def __init__(self, config: RmuConfig, setup: Setup) -> None:
        self.config = config
        self._setup = setup
        self._targets: dict[str, Tensor] = {}
        self._coefficients: dict[str, float] = {}
        for domain in setup.forget_batches:
            activations = masked_activations(setup, domain, max_tokens=8192)
            u = torch.rand(activations.shape[-1], generator=generator_for(setup.seed, "rmu", domain)).to(activations)
            coefficient = config.steering_coefficient
            if coefficient == "auto":
                coefficient = config.steering_scale * float(activations.norm(dim=-1).mean())
            self._coefficients[domain] = coefficient
            self._targets[domain] = coefficient * u / u.norm()

    def diagnostics(self) -> dict[str, Any]:
        """The steering coefficient of each domain."""
        return {domain: {"steering_coefficient": c} for domain, c in self._coefficients.items()}

    def weight(self, side: Side, batch: Batch) -> int:
        """Counted tokens, on both sides."""
        return counted_tokens(self._setup, batch)

    def forget_loss(self, step: int, domain: str, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        updated, _ = counted_activations(self._setup, batch, masters)
        return self.config.forget_weight * squared_distance(updated, self._targets[domain])

    def retain_loss(self, step: int, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        updated, frozen = counted_activations(self._setup, batch, masters)
        return self.config.retain_weight * squared_distance(updated, frozen)
