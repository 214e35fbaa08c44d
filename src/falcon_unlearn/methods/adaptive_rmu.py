"""Adaptive RMU: a steering coefficient that follows each token's norm (Huu-Tien et al. 2025, arXiv 2408.06223).

forget = || a - s |a0| u ||^2 / D        a0: frozen activation of the same token; u: random unit vector; s: scale
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
from falcon_unlearn.methods.base import Setup, Side, counted_activations, counted_tokens, generator_for
from falcon_unlearn.objectives.representation import squared_distance


class AdaptiveRmuConfig(Section):
    """Knobs of adaptive RMU."""

    name: Literal["adaptive_rmu"] = "adaptive_rmu"
    preset: Literal["default"] = "default"
    """default: what works on the embedded benchmark."""
    scale: float = Field(5.0, gt=0)
    """s, factor on the norm of the frozen activation; the published value for Zephyr-7B."""
    forget_weight: float = Field(1.0, gt=0)
    """Factor on the forget loss."""
    retain_weight: float = Field(1.0, ge=0)
    """Factor on the retain loss (1200 in the paper for Zephyr-7B)."""


class AdaptiveRmu:
    """Adaptive RMU, set up for one model and one corpus."""

    def __init__(self, config: AdaptiveRmuConfig, setup: Setup) -> None:
        self.config = config
        self._setup = setup
        self._directions: dict[str, Tensor] = {}
        for domain, batches in setup.forget_batches.items():
            u = torch.rand(setup.decoder.hidden_size, generator=generator_for(setup.seed, "adaptive_rmu", domain))
            self._directions[domain] = (u / u.norm()).to(batches[0].input_ids.device)

    def diagnostics(self) -> Mapping[str, Any]:
        """Nothing was found."""
        return {}

    def weight(self, side: Side, batch: Batch) -> int:
        """Counted tokens, on both sides."""
        return counted_tokens(self._setup, batch)

    def forget_loss(self, step: int, domain: str, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        updated, frozen = counted_activations(self._setup, batch, masters)
        target = self.config.scale * frozen.float().norm(dim=-1, keepdim=True) * self._directions[domain]
        return self.config.forget_weight * squared_distance(updated, target)

    def retain_loss(self, step: int, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        updated, frozen = counted_activations(self._setup, batch, masters)
        return self.config.retain_weight * squared_distance(updated, frozen)
