"""Task vectors: learn the forget data by heart, and go the other way (Ilharco et al. 2023, arXiv 2212.04089).

theta <- theta0 - scale (theta_f - theta0)        theta_f: theta0 finetuned on the forget data
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from falcon_unlearn.config import Section
from falcon_unlearn.corpus.batching import Batch, batch_indices, collate
from falcon_unlearn.errors import UserError
from falcon_unlearn.methods.base import WholeSetup
from falcon_unlearn.methods.whole_method import all_batches, nll


class TaskVectorConfig(Section):
    """Knobs of task vectors."""

    name: Literal["task_vector"] = "task_vector"
    preset: Literal["default"] = "default"
    """default: what works on the embedded benchmark."""
    scale: float = Field(1.0, ge=0)
    """How far to go the other way; 0 changes nothing. The paper chooses it on validation data."""
    finetune_steps: int = Field(40, ge=1)
    """Steps of AdamW on the forget data."""
    finetune_lr: float = Field(1e-4, gt=0)
    """Its learning rate."""
    finetune_batch_size: int = Field(16, ge=1)
    """Its batch size."""


class TaskVector:
    """Task vectors."""

    keeps_reference = True

    def __init__(self, config: TaskVectorConfig, setup: WholeSetup) -> None:
        self.config = config
        self._setup = setup
        self._losses: list[float] = []

    def diagnostics(self) -> Mapping[str, Any]:
        """Forget loss at the first and the last step of finetuning."""
        return {"finetune_first_loss": self._losses[0], "finetune_last_loss": self._losses[-1]} if self._losses else {}

    def edit(self, retain_batches: Sequence[Batch], masters: Mapping[str, Tensor]) -> None:
        """See :class:`falcon_unlearn.methods.base.Editor`; the retain data is not used.

        Raises:
            UserError: a loss of the finetuning is not finite.
        """
        config, setup = self.config, self._setup
        records = [record for batch in all_batches(setup) for record in batch.records]
        device = next(iter(masters.values())).device
        start = {name: value.detach().clone() for name, value in masters.items()}
        optimizer = torch.optim.AdamW(masters.values(), lr=config.finetune_lr, weight_decay=0.0)
        for step in range(config.finetune_steps):
            chosen = batch_indices(len(records), config.finetune_batch_size, step, setup.seed, "task vector")
            batch = collate([records[i] for i in chosen], setup.pad_id).to(device)
            loss = nll(setup.model.predictions(batch, setup.loss_mask, masters))
            if not bool(torch.isfinite(loss)):
                raise UserError(f"finetuning step {step}: the loss is not finite; lower method.finetune_lr")
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            self._losses.append(float(loss.detach()))
        with torch.no_grad():
            for name, value in masters.items():
                # A product with 0 would still turn -0.0 into 0.0.
                way = value - start[name]
                value.copy_(start[name] - config.scale * way if config.scale else start[name])
        optimizer.zero_grad(set_to_none=True)
