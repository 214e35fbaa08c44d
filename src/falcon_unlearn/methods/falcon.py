"""FALCON: contrastive orthogonal unalignment (Hu et al., NeurIPS 2025, arXiv 2502.01472).

    forget  = - log  exp(cos(a, h+)/tau) / (exp(cos(a, h+)/tau) + sum_n exp(cos(a, n)/tau))
    retain  = 1 - cos(b, b0)

with ``a`` / ``b`` the updated model's forget / retain activations at the target layer, ``h+`` the offset vector,
``n`` frozen forget activations and ``b0`` the frozen retain activation of the same token. The gradients of the
two are combined per tensor by :mod:`falcon_unlearn.engine.gradient_conflict`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from falcon_unlearn.config import Section
from falcon_unlearn.corpus.batching import Batch
from falcon_unlearn.methods.base import (
    Setup,
    Side,
    counted_activations,
    counted_tokens,
    generator_for,
    masked_activations,
    masked_records,
)
from falcon_unlearn.methods.falcon_whole import StandInConfig
from falcon_unlearn.objectives.offset_vectors import (
    Nonlinearity,
    PrincipalSubspace,
    paper_vector,
    principal_subspace,
    published_code_vector,
    random_vector,
)
from falcon_unlearn.objectives.representation import cosine_retention, info_nce
from falcon_unlearn.objectives.subspace_stability import SubspaceStability, subspace_stability


class FalconConfig(Section):
    """Knobs of FALCON; a preset fills in what a recipe leaves out."""

    name: Literal["falcon"] = "falcon"
    preset: Literal["default", "layer", "paper", "published_code"] = "default"
    """default: what works and holds on the embedded benchmark, on the whole model; layer: what works in one layer;
    paper: as published; published_code: as the authors' code does."""
    positives: Literal["offset", "stand_in"] = "offset"
    """What forget activations are pulled to: an offset vector, in one layer; or stand-ins, in the whole model."""
    stand_in: StandInConfig = StandInConfig()
    """Where positives is stand_in."""
    offset: Literal["paper", "random", "published_code"] = "paper"
    """How the offset vector is made."""
    offset_rank: int | None = Field(None, ge=1)
    """K, the number of principal directions taken out; None takes offset_variance instead."""
    offset_variance: float = Field(0.9, gt=0, lt=1)
    """Share of the activations' squared norm that the K directions hold, where offset_rank is not given."""
    offset_weight: float = 1.0
    """w of the paper's formula; 1 leaves nothing of the principal subspace."""
    offset_nonlinearity: Nonlinearity = "none"
    """f of the paper's formula."""
    offset_refresh: Literal["run", "step"] = "run"
    """run: one vector per forget domain; step: a new one every step."""
    offset_tokens: int = Field(8192, ge=2)
    """At most so many forget tokens enter the factorisation."""
    offset_bootstrap: int = Field(20, ge=0)
    """Resamples of the forget records that show how stable the principal subspace is, a diagnostic; 0 for none. At
    most 5 where there are more than 1024 tokens and dimensions."""
    temperature: float = Field(0.7, gt=0)
    """tau of InfoNCE."""
    negatives: Literal["same_token", "batch"] = "same_token"
    """same_token: the frozen activation of the token itself; batch: of all forget tokens of the (micro-)batch."""
    forget_weight: float = Field(1.0, gt=0)
    """Factor on the forget loss."""
    retain_weight: float = Field(2.0, ge=0)
    """Factor on the retain loss (the paper's alpha)."""


class Falcon:
    """FALCON, set up for one model and one corpus."""

    def __init__(self, config: FalconConfig, setup: Setup) -> None:
        self.config = config
        self._setup = setup
        self._subspaces: dict[str, PrincipalSubspace] = {}
        self._stability: dict[str, SubspaceStability] = {}
        for domain in setup.forget_batches if config.offset == "paper" else ():
            activations = masked_activations(setup, domain, config.offset_tokens)
            subspace = principal_subspace(activations, rank=config.offset_rank, variance=config.offset_variance)
            self._subspaces[domain] = subspace
            if config.offset_bootstrap:
                self._stability[domain] = subspace_stability(
                    activations,
                    masked_records(setup, domain, config.offset_tokens),
                    subspace,
                    config.offset_bootstrap,
                    generator_for(setup.seed, "offset bootstrap", domain),
                )
        self._fixed: dict[str, Tensor] = {}
        if config.offset_refresh == "run":
            self._fixed = {domain: self._draw(domain, "run") for domain in setup.forget_batches}

    def _draw(self, domain: str, moment: object) -> Tensor:
        config, setup = self.config, self._setup
        generator = generator_for(setup.seed, "offset", domain, moment)
        if config.offset == "paper":
            return paper_vector(
                self._subspaces[domain],
                generator,
                weight=config.offset_weight,
                nonlinearity=config.offset_nonlinearity,
            )
        batches = setup.forget_batches[domain]
        if config.offset == "random":
            return random_vector(setup.decoder.hidden_size, generator).to(batches[0].input_ids.device)
        batch = batches[int(generator.initial_seed() % len(batches))]
        activations = setup.decoder.prepare(batch).frozen[batch.loss_mask(setup.loss_mask)]
        return published_code_vector(activations, generator)

    def offset_vector(self, step: int, domain: str) -> Tensor:
        """Unit vector ``(hidden,)`` that the forget activations of ``domain`` are pulled to at ``step``."""
        return self._fixed[domain] if domain in self._fixed else self._draw(domain, step)

    def diagnostics(self) -> dict[str, Any]:
        """Rank and variance share of each domain's principal subspace, and how stable it is."""
        return {
            domain: {
                "rank": len(subspace.directions),
                "variance_share": subspace.variance_share,
                **({"stability": asdict(self._stability[domain])} if domain in self._stability else {}),
            }
            for domain, subspace in self._subspaces.items()
        }

    def weight(self, side: Side, batch: Batch) -> int:
        """Counted tokens, on both sides."""
        return counted_tokens(self._setup, batch)

    def forget_loss(self, step: int, domain: str, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        config = self.config
        updated, frozen = counted_activations(self._setup, batch, masters)
        loss = info_nce(
            updated,
            self.offset_vector(step, domain),
            frozen[:, None] if config.negatives == "same_token" else frozen,
            config.temperature,
        )
        return config.forget_weight * loss

    def retain_loss(self, step: int, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        updated, frozen = counted_activations(self._setup, batch, masters)
        return self.config.retain_weight * cosine_retention(updated, frozen)
