"""NPO: negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868).

forget = -(2 / beta) E log sigmoid(-beta log(p / p0))        p, p0: probability of a whole answer, now and originally

As beta goes to 0 its gradient becomes that of gradient ascent. p0 is computed once, so with ``retain`` none or nll no
second model is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from falcon_unlearn.corpus.batching import Batch
from falcon_unlearn.methods.base import WholeSetup
from falcon_unlearn.methods.whole_method import Unit, WholeConfig, WholeMethod, all_batches, of_batch
from falcon_unlearn.objectives.preference import npo


class NpoConfig(WholeConfig):
    """Knobs of NPO."""

    name: Literal["npo"] = "npo"
    beta: float = Field(0.1, gt=0)
    """Inverse temperature; the published value."""


class Npo(WholeMethod):
    """NPO."""

    forget_unit: ClassVar[Unit] = "records"

    def __init__(self, config: NpoConfig, setup: WholeSetup) -> None:
        super().__init__(config, setup)
        self.config = config
        self._reference = self.reference_sums(all_batches(setup))

    def forget_loss(self, step: int, domain: str, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        values = npo(self.sums(batch, masters), of_batch(self._reference, batch), self.config.beta)
        return self.config.forget_weight * values.mean()
