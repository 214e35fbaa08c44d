"""DPO with "I don't know" as the preferred answer (Rafailov et al. 2023, arXiv 2305.18290; TOFU's preference baseline).

forget = -E log sigmoid(beta (log(p(w) / p0(w)) - log(p(l) / p0(l))))

w: the preferred answer, l: the answer to forget, p and p0: probability of a whole answer, now and originally. With
``retain: none`` this is IdkDPO; with ``nll`` DPO with a retain term. Preferred answers are those of the data's column
``preferred_answer``, or of a list of our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from falcon_unlearn.corpus.batching import Batch, collate
from falcon_unlearn.methods.base import WholeSetup
from falcon_unlearn.methods.whole_method import Unit, WholeConfig, WholeMethod, all_batches, of_batch
from falcon_unlearn.model.activation_cache import record_key
from falcon_unlearn.objectives.preference import dpo


class DpoConfig(WholeConfig):
    """Knobs of DPO."""

    name: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0)
    """Inverse temperature; TOFU's value."""


class Dpo(WholeMethod):
    """DPO."""

    forget_unit: ClassVar[Unit] = "records"

    def __init__(self, config: DpoConfig, setup: WholeSetup) -> None:
        super().__init__(config, setup)
        self.config = config
        batches = all_batches(setup)
        self._reference = self.reference_sums(batches)
        self._reference_preferred = self.reference_sums(
            collate(setup.alternatives[record_key(record)], setup.pad_id).to(batch.input_ids.device)
            for batch in batches
            for record in batch.records
        )

    def forget_loss(self, step: int, domain: str, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        preferred = self.setup.alternative(step, batch)
        values = dpo(
            self.sums(preferred, masters),
            self.sums(batch, masters),
            of_batch(self._reference_preferred, preferred),
            of_batch(self._reference, batch),
            self.config.beta,
        )
        return self.config.forget_weight * values.mean()
