"""LLMU (Yao et al. 2024, arXiv 2310.10683): ascent, random answers in place of the right ones, KL on the retain data.

forget = e1 <log p(right answer)> + e2 <-log p(random answer)>        retain = e3 <KL(p0 || p)>

A random answer is the answer of a retain record. Its loss is a mean over its own tokens and counts as often as the
right answer it replaces has tokens, so that the loss of a batch is the weighted mean of its parts'. Published: e1
between 0.05 and 2, e2 = e3 = 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from falcon_unlearn.corpus.batching import Batch
from falcon_unlearn.methods.base import WholeSetup
from falcon_unlearn.methods.whole_method import WholeConfig, WholeMethod
from falcon_unlearn.objectives.likelihood import gradient_ascent, sequence_means


class LlmuConfig(WholeConfig):
    """Knobs of LLMU; ``forget_weight`` is e1."""

    name: Literal["llmu"] = "llmu"
    random_weight: float = Field(1.0, ge=0)
    """e2, factor on the random answers."""
    retain: Literal["none", "nll", "kl"] = "kl"
    """kl, as published."""


class Llmu(WholeMethod):
    """LLMU."""

    def __init__(self, config: LlmuConfig, setup: WholeSetup) -> None:
        super().__init__(config, setup)
        self.config = config

    def forget_loss(self, step: int, domain: str, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        found = self.predictions(batch, masters)
        ascent = gradient_ascent(found.log_probabilities(), found.mask)
        replacing = self.predictions(self.setup.alternative(step, batch), masters)
        tokens = found.mask.sum(1)
        means = sequence_means(replacing.log_probabilities(), replacing.mask)
        other = -(tokens * means).sum() / tokens.sum().clamp(min=1)
        return self.config.forget_weight * ascent + self.config.random_weight * other
