"""UNDIAL: self-distillation with the target's logit lowered (Dong et al. 2024, arXiv 2402.10052).

forget = <CE(softmax(z0 - s onehot(target)), softmax(z))>        z0: the original model's logits; s: strength
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from falcon_unlearn.corpus.batching import Batch
from falcon_unlearn.methods.base import WholeSetup
from falcon_unlearn.methods.whole_method import WholeConfig, WholeMethod
from falcon_unlearn.objectives.vocabulary import undial


class UndialConfig(WholeConfig):
    """Knobs of UNDIAL."""

    name: Literal["undial"] = "undial"
    strength: float = Field(10.0, gt=0)
    """s, in nats (default: OpenUnlearning's)."""


class Undial(WholeMethod):
    """UNDIAL."""

    keeps_reference = True

    def __init__(self, config: UndialConfig, setup: WholeSetup) -> None:
        super().__init__(config, setup)
        self.config = config

    def forget_loss(self, step: int, domain: str, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        before, now = self.predictions(batch, None), self.predictions(batch, masters)
        values = undial(now.hidden, now.head, now.targets, before.hidden, before.head, strength=self.config.strength)
        return self.config.forget_weight * values.sum() / max(len(values), 1)
