"""What the methods on the whole model share: forward passes, the three retain terms, precomputed references.

retain     term on retain records                                            source
=========  ================================================================  ==================================
none       nothing
nll        <-log p>, mean over counted tokens                                GradDiff (Liu et al. 2022; TOFU)
kl         <KL(p0 || p)>, p0 the original model's next-token distribution    Maini et al. 2024 (TOFU), "KL minimization"
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from falcon_unlearn.config import Section
from falcon_unlearn.corpus.batching import Batch
from falcon_unlearn.methods.base import Side, WholeSetup
from falcon_unlearn.methods.whole_model import Predictions
from falcon_unlearn.model.activation_cache import record_key
from falcon_unlearn.objectives.likelihood import negative_log_likelihood, sequence_sums
from falcon_unlearn.objectives.vocabulary import kl_divergence

Unit = Literal["tokens", "records"]


class WholeConfig(Section):
    """Knobs of every method on the whole model."""

    preset: Literal["default"] = "default"
    """default: what works on the embedded benchmark."""
    forget_weight: float = Field(1.0, gt=0)
    """Factor on the forget loss."""
    retain: Literal["none", "nll", "kl"] = "nll"
    """Term on retain records: none, nll (ordinary training) or kl (to the original model)."""
    retain_weight: float = Field(1.0, ge=0)
    """Factor on the retain term."""


class WholeMethod:
    """A method on the whole model, but for its forget loss."""

    forget_unit: ClassVar[Unit] = "tokens"
    """What the forget loss is a mean over; retain terms are means over tokens."""

    def __init__(self, config: WholeConfig, setup: WholeSetup) -> None:
        self.common = config
        self.setup = setup

    @property
    def keeps_reference(self) -> bool:
        """Whether the original weights are needed after the set-up."""
        return self.common.retain == "kl"

    def weight(self, side: Side, batch: Batch) -> int:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        if side == "forget" and self.forget_unit == "records":
            return len(batch)
        return int(batch.loss_mask(self.setup.loss_mask)[:, 1:].sum())

    def retain_loss(self, step: int, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor | None:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        if self.common.retain == "none":
            return None
        now = self.predictions(batch, masters)
        loss = self.divergence(batch, now) if self.common.retain == "kl" else nll(now)
        return self.common.retain_weight * loss

    def diagnostics(self) -> Mapping[str, Any]:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        return {}

    def predictions(self, batch: Batch, masters: Mapping[str, Tensor] | None) -> Predictions:
        """Of the model with ``masters``, or of the original one."""
        return self.setup.model.predictions(batch, self.setup.loss_mask, masters)

    def divergence(self, batch: Batch, now: Predictions) -> Tensor:
        """Mean over counted tokens of KL(original || now)."""
        before = self.predictions(batch, None)
        return kl_divergence(now.hidden, now.head, before.hidden, before.head).sum() / max(len(now.targets), 1)

    def sums(self, batch: Batch, masters: Mapping[str, Tensor] | None) -> Tensor:
        """Log-probability of each record's counted tokens together, ``(B,)``."""
        found = self.predictions(batch, masters)
        return sequence_sums(found.log_probabilities(), found.mask)

    def reference_sums(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """The original model's :meth:`sums` of every record, once and for all."""
        result: dict[str, Tensor] = {}
        for batch in batches:
            for record, value in zip(batch.records, self.sums(batch, None), strict=True):
                result[record_key(record)] = value
        return result


def nll(found: Predictions) -> Tensor:
    """Mean negative log-likelihood of the counted tokens."""
    return negative_log_likelihood(found.log_probabilities(), found.mask)


def of_batch(values: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """The precomputed values of a batch's records, ``(B,)``."""
    return torch.stack([values[record_key(record)] for record in batch.records])


def all_batches(setup: WholeSetup) -> Sequence[Batch]:
    """The forget batches of all domains."""
    return [batch for batches in setup.forget_batches.values() for batch in batches]
