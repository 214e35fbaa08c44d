"""What the engine asks of a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from falcon_unlearn.corpus.batching import Batch, LossMask
from falcon_unlearn.model.decoder import SplitDecoder


@dataclass(frozen=True)
class Setup:
    """What a representation method may look at before training.

    Attributes:
        decoder: the split model.
        forget_batches: some forget batches per domain, in the order of the corpus.
        loss_mask: which tokens take part in losses and statistics; padding never does.
        seed: everything random in a method is a function of this seed, the domain and the step.
    """

    decoder: SplitDecoder
    forget_batches: Mapping[str, Sequence[Batch]]
    loss_mask: LossMask
    seed: int


class Method(Protocol):
    """A method that is set up and ready to give losses.

    The two losses are always apart: the engine decides how their gradients are combined. Each is a mean over
    :meth:`weight` things, so that the engine can cut a batch into micro-batches and add up their gradients.
    """

    def forget_loss(self, step: int, domain: str, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor:
        """Forward pass and objective on a forget batch.

        Args:
            step: counts from 0.
            domain: the forget domain of this step.
            batch: of that domain.
            masters: trained tensors by name, fp32 leaves.
        """
        ...

    def retain_loss(self, step: int, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor:
        """Forward pass and objective on a retain batch."""
        ...

    def weight(self, batch: Batch) -> int:
        """Over how many things (tokens, records) the losses on ``batch`` are means."""
        ...

    def diagnostics(self) -> Mapping[str, Any]:
        """What the set-up found, per forget domain, as JSON: it goes into the run's provenance."""
        ...


def generator_for(seed: int, *parts: object) -> torch.Generator:
    """A CPU generator that depends on its arguments alone, so that any step can be replayed on its own."""
    import hashlib

    digest = hashlib.sha256(repr((seed, *parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def masked_activations(setup: Setup, domain: str, max_tokens: int) -> Tensor:
    """Frozen target-layer activations of a domain's counted tokens, ``(N <= max_tokens, hidden)``."""
    parts: list[Tensor] = []
    count = 0
    for batch in setup.forget_batches[domain]:
        activations = setup.decoder.prepare(batch).frozen[batch.loss_mask(setup.loss_mask)]
        parts.append(activations.float())
        count += len(activations)
        if count >= max_tokens:
            break
    return torch.cat(parts)[:max_tokens]
