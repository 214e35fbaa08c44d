"""How one optimiser step lies on several processes (ranks), exactly as one process does it.

Every rank knows the whole batch and takes its rows of it. Losses are means over tokens or records: each part of the
batch counts by its share of them in the whole batch, on whichever rank it is, so that the sum over ranks is the loss of
one process. Gradients are summed objective by objective, before conflicts are resolved.

==========  ====================================  ===============================================================
layout      each rank holds                       summed over ranks
==========  ====================================  ===============================================================
Replicas    all of every tensor                   each gradient (all-reduce); inner products need nothing more
Shards      a part of every tensor                each gradient (FSDP2's reduce-scatter); all inner products of a
                                                  step in one all-reduce
==========  ====================================  ===============================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from falcon_unlearn.corpus.batching import Batch
from falcon_unlearn.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Replicas:
    """Every rank holds all of every tensor; of one rank this is ordinary training."""

    ranks: Ranks = ALONE

    @property
    def saves(self) -> bool:
        """Whether this rank writes the training state."""
        return self.ranks.first

    @property
    def in_step(self) -> bool:
        """Whether forward passes are collective: no rank may repeat one alone."""
        return False

    @property
    def over_shards(self) -> Callable[[Tensor], Tensor] | None:
        """What sums inner products of gradients over the ranks."""
        return None

    def share(self, rows: int) -> int:
        """The most rows of a batch that a rank takes."""
        return -(-rows // self.ranks.world)

    def parts(self, batch: Batch, most: int, weight_of: Callable[[Batch], int]) -> list[tuple[Batch, float]]:
        """This rank's rows in parts of at most ``most``, each with its share of what the batch's loss is a mean over.

        Args:
            batch: the whole batch.
            most: rows per forward pass.
            weight_of: how many things the loss of a batch is a mean over.
        """
        if self.ranks.world == 1 and most >= len(batch):
            return [(batch, 1.0)]
        total = weight_of(batch)
        rows = self.ranks.rows(len(batch))
        own = batch.rows(rows).parts(most) if rows.start < rows.stop else []
        weights = [weight_of(part) for part in own]
        return [(part, weight / total) for part, weight in zip(own, weights, strict=True) if weight]

    def gradients(self, loss: Tensor | None, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Gradients that may be written to: each has memory of its own."""
        if loss is None:
            return [torch.zeros_like(parameter) for parameter in parameters]
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        result, taken = [], set()
        for gradient, parameter in zip(found, parameters, strict=True):
            if gradient is None:
                own = torch.zeros_like(parameter)
            elif gradient.is_contiguous() and gradient.data_ptr() not in taken:
                own = gradient
            else:
                own = gradient.clone(memory_format=torch.contiguous_format)
            taken.add(own.data_ptr())
            result.append(own)
        return result

    def reduced(self, loss: Tensor, gradients: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradients of the whole batch from those of the ranks."""
        self.ranks.sum_all([loss, *gradients])
        return loss, gradients


@dataclass(frozen=True)
class Shards(Replicas):
    """Every rank holds a part of every tensor; forward and backward passes gather and scatter them (FSDP2).

    Attributes:
        parameters: the sharded parameters by the name of their local part among the masters.
    """

    parameters: Mapping[str, DTensor] = field(default_factory=dict)

    @property
    def saves(self) -> bool:
        """No state is kept between steps: it lies on all ranks."""
        return False

    @property
    def in_step(self) -> bool:
        """Every pass gathers weights from all ranks."""
        return True

    @property
    def over_shards(self) -> Callable[[Tensor], Tensor] | None:
        """The inner products of all tensors in one all-reduce."""
        return self.ranks.sum

    def parts(self, batch: Batch, most: int, weight_of: Callable[[Batch], int]) -> list[tuple[Batch, float]]:
        """As many parts on every rank; those without a share of their own are some row with factor 0."""
        total = weight_of(batch)
        if not total:
            return []
        parts = super().parts(batch, most, weight_of)
        spare = next(row for row in (batch.rows(slice(i, i + 1)) for i in range(len(batch))) if weight_of(row))
        return [*parts, *[(spare, 0.0)] * (-(-self.share(len(batch)) // most) - len(parts))]

    def gradients(self, loss: Tensor | None, parameters: Sequence[Tensor]) -> list[Tensor]:
        """This rank's part of gradients that are summed over the ranks already."""
        if loss is not None:
            torch.autograd.backward(loss)
        result = []
        for own, sharded in zip(parameters, self.parameters.values(), strict=True):
            gradient: Any = sharded.grad
            sharded.grad = None
            result.append(torch.zeros_like(own) if gradient is None else gradient.to_local())
        return result

    def reduced(self, loss: Tensor, gradients: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The loss of the whole batch; the gradients are."""
        return self.ranks.sum(loss), gradients
