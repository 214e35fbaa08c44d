"""WGA: weighted gradient ascent (Wang et al. 2025, arXiv 2502.19301).

forget = <[p^alpha] log p>        [.]: constant, without gradient; alpha = 0 is plain ascent
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from falcon_unlearn.corpus.batching import Batch
from falcon_unlearn.methods.base import WholeSetup
from falcon_unlearn.methods.whole_method import WholeConfig, WholeMethod
from falcon_unlearn.objectives.likelihood import wga


class WgaConfig(WholeConfig):
    """Knobs of WGA."""

    name: Literal["wga"] = "wga"
    alpha: float = Field(1.0, ge=0)
    """Inverse temperature of the weight (default: OpenUnlearning's)."""


class Wga(WholeMethod):
    """WGA."""

    def __init__(self, config: WgaConfig, setup: WholeSetup) -> None:
        super().__init__(config, setup)
        self.config = config

    def forget_loss(self, step: int, domain: str, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        found = self.predictions(batch, masters)
        return self.config.forget_weight * wga(found.log_probabilities(), found.mask, self.config.alpha)
