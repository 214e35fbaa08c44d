"""What the engine asks of a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from falcon_unlearn.corpus.batching import Batch, Encoded, LossMask, collate
from falcon_unlearn.methods.whole_model import WholeModel
from falcon_unlearn.model.activation_cache import record_key
from falcon_unlearn.model.decoder import SplitDecoder

Side = Literal["forget", "retain"]


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


@dataclass(frozen=True)
class WholeSetup:
    """What a method on the whole model may look at before training.

    Attributes:
        model: the whole model.
        forget_batches: all forget records per domain, in batches, in the order of the corpus.
        alternatives: other answers to the questions of the forget records, by
            :func:`~falcon_unlearn.model.activation_cache.record_key`; of the kind the method's entry asks for.
        loss_mask: which tokens take part in losses; padding never does.
        pad_id: token to pad with.
        seed: everything random in a method is a function of this seed and the step.
        retain_domains: how many of them take turns.
        retain: all retain records.
        begins_word: of each token of the vocabulary, whether a word begins with it; None: every token is a word.
    """

    model: WholeModel
    forget_batches: Mapping[str, Sequence[Batch]]
    alternatives: Mapping[str, tuple[Encoded, ...]]
    loss_mask: LossMask
    pad_id: int
    seed: int
    retain_domains: int = 1
    retain: Sequence[Encoded] = ()
    begins_word: Sequence[bool] | None = None

    def alternative(self, step: int, batch: Batch) -> Batch:
        """Another answer for every record of ``batch``; the next one of each with every step."""
        chosen = []
        for record in batch.records:
            options = self.alternatives[record_key(record)]
            chosen.append(options[step % len(options)])
        return collate(chosen, self.pad_id).to(batch.input_ids.device)


class Editor(Protocol):
    """A method that does not train step by step but changes the weights by a rule of its own."""

    def edit(self, retain_batches: Sequence[Batch], masters: Mapping[str, Tensor]) -> None:
        """Change ``masters`` in place.

        Args:
            retain_batches: all retain records, in batches.
            masters: the tensors in scope by name, fp32 leaves.
        """
        ...

    def diagnostics(self) -> Mapping[str, Any]:
        """What the edit found, as JSON: it goes into the run's provenance."""
        ...


class Method(Protocol):
    """A method that is set up and ready to give losses.

    The two losses are always apart: the engine decides how their gradients are combined. Each is a mean over
    :meth:`weight` things, so that the engine can cut a batch into micro-batches and add up their gradients. None
    stands for no such loss at this step.
    """

    def forget_loss(self, step: int, domain: str, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor | None:
        """Forward pass and objective on a forget batch.

        Args:
            step: counts from 0.
            domain: the forget domain of this step.
            batch: of that domain.
            masters: trained tensors by name, fp32 leaves.
        """
        ...

    def retain_loss(self, step: int, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor | None:
        """Forward pass and objective on a retain batch."""
        ...

    def weight(self, side: Side, batch: Batch) -> int:
        """Over how many things (tokens, records) the forget or the retain loss on ``batch`` is a mean."""
        ...

    def diagnostics(self) -> Mapping[str, Any]:
        """What the set-up found, per forget domain, as JSON: it goes into the run's provenance."""
        ...


def generator_for(seed: int, *parts: object) -> torch.Generator:
    """A CPU generator that depends on its arguments alone, so that any step can be replayed on its own."""
    import hashlib

    digest = hashlib.sha256(repr((seed, *parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def counted_tokens(setup: Setup, batch: Batch) -> int:
    """How many tokens of ``batch`` take part in a loss."""
    return int(batch.loss_mask(setup.loss_mask).sum())


def counted_activations(setup: Setup, batch: Batch, masters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Target-layer activations of the counted tokens, ``(N, hidden)``: with ``masters``, and the original model's."""
    counted = batch.loss_mask(setup.loss_mask)
    prepared = setup.decoder.prepare(batch)
    return setup.decoder.updated(prepared, masters)[counted], prepared.frozen[counted]


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


def masked_records(setup: Setup, domain: str, max_tokens: int) -> Tensor:
    """To which of the domain's records each row of :func:`masked_activations` belongs, ``(N,)`` on the CPU."""
    counts = torch.cat([batch.loss_mask(setup.loss_mask).sum(1).cpu() for batch in setup.forget_batches[domain]])
    return torch.arange(len(counts)).repeat_interleave(counts)[:max_tokens]
