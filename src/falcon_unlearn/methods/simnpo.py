"""SimNPO: NPO without a reference, on the mean log-probability (Fan et al. 2024, arXiv 2410.07163).

forget = -(2 / beta) E log sigmoid(-(beta / |y|) log p - gamma)        p: probability of an answer y; |y|: its tokens
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from falcon_unlearn.corpus.batching import Batch
from falcon_unlearn.methods.base import WholeSetup
from falcon_unlearn.methods.whole_method import Unit, WholeConfig, WholeMethod
from falcon_unlearn.objectives.likelihood import sequence_sums
from falcon_unlearn.objectives.preference import simnpo


class SimNpoConfig(WholeConfig):
    """Knobs of SimNPO."""

    name: Literal["simnpo"] = "simnpo"
    beta: float = Field(2.5, gt=0)
    """Inverse temperature (the authors' value for TOFU forget05; 4.5 for forget10)."""
    gamma: float = 0.0
    """Margin."""


class SimNpo(WholeMethod):
    """SimNPO."""

    forget_unit: ClassVar[Unit] = "records"

    def __init__(self, config: SimNpoConfig, setup: WholeSetup) -> None:
        super().__init__(config, setup)
        self.config = config

    def forget_loss(self, step: int, domain: str, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        config, found = self.config, self.predictions(batch, masters)
        sums = sequence_sums(found.log_probabilities(), found.mask)
        return config.forget_weight * simnpo(sums, found.mask.sum(1), config.beta, config.gamma).mean()
