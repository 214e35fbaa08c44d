"""Circuit breakers, representation rerouting (Zou et al. 2024, arXiv 2406.04313).

forget = c_f <max(0, cos(a, a0))>        retain = c_r <|| b - b0 ||>        c_f: forget_weight, c_r: retain_weight

a, b: the updated model's forget / retain activations at the target layer; a0, b0: the frozen ones of the same tokens.
Published: the weight goes from forget to retain over T steps; at step t the two have a factor 1 - t / 2T and t / 2T.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from falcon_unlearn.config import Section
from falcon_unlearn.corpus.batching import Batch
from falcon_unlearn.methods.base import Setup, Side, counted_activations, counted_tokens


class CircuitBreakersConfig(Section):
    """Knobs of circuit breakers."""

    name: Literal["circuit_breakers"] = "circuit_breakers"
    preset: Literal["default"] = "default"
    """default: what works on the embedded benchmark."""
    schedule_steps: int | None = Field(None, ge=1)
    """T of the published schedule; empty: constant weights."""
    forget_weight: float = Field(1.0, gt=0)
    """Factor on the forget loss (10 in the paper for 7B models)."""
    retain_weight: float = Field(1.0, ge=0)
    """Factor on the retain loss (10 in the paper for 7B models)."""


class CircuitBreakers:
    """Circuit breakers, set up for one model and one corpus."""

    def __init__(self, config: CircuitBreakersConfig, setup: Setup) -> None:
        self.config = config
        self._setup = setup

    def diagnostics(self) -> Mapping[str, Any]:
        """Nothing was found."""
        return {}

    def weight(self, side: Side, batch: Batch) -> int:
        """Counted tokens, on both sides."""
        return counted_tokens(self._setup, batch)

    def _weights(self, step: int) -> tuple[float, float]:
        """c_f and c_r at this step."""
        config = self.config
        if config.schedule_steps is None:
            return config.forget_weight, config.retain_weight
        moved = min(step / (2 * config.schedule_steps), 1.0)
        return config.forget_weight * (1 - moved), config.retain_weight * moved

    def forget_loss(self, step: int, domain: str, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        updated, frozen = counted_activations(self._setup, batch, masters)
        similarity = F.cosine_similarity(updated.float(), frozen.float(), dim=-1)
        return self._weights(step)[0] * similarity.relu().mean()

    def retain_loss(self, step: int, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        updated, frozen = counted_activations(self._setup, batch, masters)
        # The norm has no gradient at zero, where training begins.
        distance = ((updated.float() - frozen.float()).square().sum(-1) + 1e-12).sqrt().mean()
        return self._weights(step)[1] * distance
