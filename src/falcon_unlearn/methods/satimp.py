"""SatImp: ascent weighted by saturation and importance (Yang et al. 2025, arXiv 2505.11953).

forget = <[p^beta1 (1 - p)^beta2] log p>        [.]: constant, without gradient
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from falcon_unlearn.corpus.batching import Batch
from falcon_unlearn.methods.base import WholeSetup
from falcon_unlearn.methods.whole_method import WholeConfig, WholeMethod
from falcon_unlearn.objectives.likelihood import satimp


class SatImpConfig(WholeConfig):
    """Knobs of SatImp (defaults: OpenUnlearning's; the authors' own example uses 0.3 and 0.3)."""

    name: Literal["satimp"] = "satimp"
    beta1: float = Field(5.0, ge=0)
    """Saturation: large values leave alone what is improbable by now."""
    beta2: float = Field(1.0, ge=0)
    """Importance: large values leave alone what is all but certain."""


class SatImp(WholeMethod):
    """SatImp."""

    def __init__(self, config: SatImpConfig, setup: WholeSetup) -> None:
        super().__init__(config, setup)
        self.config = config

    def forget_loss(self, step: int, domain: str, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        config, found = self.config, self.predictions(batch, masters)
        loss = satimp(found.log_probabilities(), found.mask, config.beta1, config.beta2)
        return config.forget_weight * loss
