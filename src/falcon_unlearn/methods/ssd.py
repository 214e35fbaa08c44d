"""SSD: selective synaptic dampening (Foster et al. 2024, arXiv 2308.07707). No training: one pass over the data.

F_i, D_i = E g_i^2 on the forget data and on all data, g the gradient of <-log p> on a batch (diagonal of the Fisher
information). Where F_i > alpha D_i:  theta_i <- min(lambda D_i / F_i, 1) theta_i

alpha selects (a larger one selects less; none at infinity), lambda dampens. Published: alpha 10, lambda 1 for images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from falcon_unlearn.config import Section
from falcon_unlearn.corpus.batching import Batch
from falcon_unlearn.methods.base import WholeSetup
from falcon_unlearn.methods.whole_method import all_batches, nll


class SsdConfig(Section):
    """Knobs of SSD."""

    name: Literal["ssd"] = "ssd"
    preset: Literal["default"] = "default"
    """default: what works on the embedded benchmark."""
    alpha: float = Field(10.0, gt=0)
    """Selection: parameters whose forget importance is more than alpha times their importance on all data. The ratio is
    never above all records / forget records: an alpha from there on changes nothing."""
    dampening: float = Field(1.0, ge=0)
    """lambda."""
    fisher_batch_size: int = Field(1, ge=1)
    """Records whose gradients are averaged before squaring; 1 is the diagonal of the empirical Fisher information."""


class Ssd:
    """SSD."""

    keeps_reference = True

    def __init__(self, config: SsdConfig, setup: WholeSetup) -> None:
        self.config = config
        self._setup = setup
        self._selected: dict[str, float] = {}

    def diagnostics(self) -> Mapping[str, Any]:
        """Share of the parameters that were dampened."""
        return dict(self._selected)

    def edit(self, retain_batches: Sequence[Batch], masters: Mapping[str, Tensor]) -> None:
        """See :class:`falcon_unlearn.methods.base.Editor`."""
        forget, forget_count = self._squared_gradients(all_batches(self._setup), masters)
        retain, retain_count = self._squared_gradients(retain_batches, masters)
        selected, total = 0, 0
        for name, value in masters.items():
            on_forget = forget[name] / forget_count
            on_all = (forget[name] + retain[name]) / (forget_count + retain_count)
            chosen = on_forget > self.config.alpha * on_all
            factor = (self.config.dampening * on_all / on_forget.clamp(min=torch.finfo(on_all.dtype).tiny)).clamp(max=1)
            value.data = torch.where(chosen, value.data * factor, value.data)
            selected += int(chosen.sum())
            total += chosen.numel()
        self._selected = {"share_dampened": selected / total}

    def _squared_gradients(
        self, batches: Iterable[Batch], masters: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], int]:
        """Sum over (micro-)batches of squared gradients, and how many there were."""
        sums = {name: torch.zeros_like(value, requires_grad=False) for name, value in masters.items()}
        count = 0
        for batch in batches:
            for part in batch.parts(self.config.fisher_batch_size):
                loss = nll(self._setup.model.predictions(part, self._setup.loss_mask, masters))
                gradients = torch.autograd.grad(loss, list(masters.values()), allow_unused=True)
                for total, gradient in zip(sums.values(), gradients, strict=True):
                    if gradient is not None:
                        total.addcmul_(gradient, gradient)
                count += 1
        return sums, max(count, 1)
