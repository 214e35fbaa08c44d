"""Gradient ascent on the forget data (Jang et al. 2023, arXiv 2210.01504), nothing else.

forget = <log p>        p: probability of a counted token of a forget answer; <.>: mean over tokens
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from falcon_unlearn.corpus.batching import Batch
from falcon_unlearn.methods.whole_method import WholeConfig, WholeMethod
from falcon_unlearn.objectives.likelihood import gradient_ascent


class GradAscentConfig(WholeConfig):
    """Knobs of gradient ascent."""

    name: Literal["grad_ascent"] = "grad_ascent"
    retain: Literal["none", "nll", "kl"] = "none"
    """none, as published; with nll it is grad_diff, with kl kl_min."""


class GradAscent(WholeMethod):
    """Gradient ascent, with the retain term its config names; also GradDiff and KL minimisation."""

    def forget_loss(self, step: int, domain: str, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        found = self.predictions(batch, masters)
        return self.common.forget_weight * gradient_ascent(found.log_probabilities(), found.mask)
