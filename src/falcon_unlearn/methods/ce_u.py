"""CE-U: cross-entropy to one's own distribution without the right token (arXiv 2503.01224).

forget = <CE([softmax(z without the target)], softmax(z))>        z: logits; [.]: constant, without gradient

The first counted token of a record is left out, as published.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from falcon_unlearn.corpus.batching import Batch
from falcon_unlearn.methods.base import Side
from falcon_unlearn.methods.whole_method import WholeConfig, WholeMethod
from falcon_unlearn.objectives.vocabulary import ce_u


class CeUConfig(WholeConfig):
    """Knobs of CE-U."""

    name: Literal["ce_u"] = "ce_u"


class CeU(WholeMethod):
    """CE-U."""

    def weight(self, side: Side, batch: Batch) -> int:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        if side == "retain":
            return super().weight(side, batch)
        mask = batch.loss_mask(self.setup.loss_mask).clone()
        mask[:, 0] = False
        return int(_after_the_first(mask).sum())

    def forget_loss(self, step: int, domain: str, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        found = self.predictions(batch, masters)
        chosen = _after_the_first(found.mask)[found.mask]
        values = ce_u(found.hidden[chosen], found.head, found.targets[chosen])
        return self.common.forget_weight * values.sum() / max(len(values), 1)


def _after_the_first(mask: Tensor) -> Tensor:
    return mask & (mask.cumsum(1) > 1)
