"""Attacks that change the weights by rule: a way back towards the original model, and pruning.

interpolate    theta = (1 - alpha) theta_unlearned + alpha theta_original
prune          in every matrix of a decoder layer the entries of smallest magnitude become zero
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from falcon_unlearn.artifacts import SampleScore
from falcon_unlearn.attacks.base import AttackConfig, Outcome, OutOfTimeError, Point, Target, point, strongest
from falcon_unlearn.errors import UserError
from falcon_unlearn.model.decoder import find_layers, replaced

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Share = Annotated[float, Field(ge=0, le=1)]


def score_changes(
    target: Target,
    settings: Sequence[Mapping[str, str | int | float]],
    changed: Callable[[int], Mapping[str, Tensor]],
    *,
    notes: Sequence[str] = (),
    headline: int | None = None,
) -> Outcome:
    """Score the model under several changes of its weights, one after the other.

    Args:
        target: the model under attack.
        settings: names each change.
        changed: position of a setting -> tensors that take the place of the model's own, by name.
        notes: for the outcome.
        headline: position of the setting that is reported first; None for the strongest.

    Raises:
        OutOfTimeError: nothing was finished, or the headline was not.
    """
    tried: list[tuple[Point, tuple[SampleScore, ...]]] = []
    for position, setting in enumerate(settings):
        if target.deadline.passed:
            break
        with replaced(target.model, changed(position)):
            samples = target.score()
            utility = {"utility": target.utility_probability()} if target.utility else {}
        tried.append((point(setting, samples, utility), samples))
    if len(tried) <= (headline or 0):
        raise OutOfTimeError
    best, samples = strongest(tried) if headline is None else tried[headline]
    return Outcome(
        samples,
        tuple(entry[0] for entry in tried),
        steps=len(tried),
        artefacts={"strongest" if headline is None else "headline": dict(best.setting)},
        notes=tuple(notes),
        complete=len(tried) == len(settings),
    )


def layer_matrices(model: PreTrainedModel) -> list[str]:
    """Names of the matrices inside the decoder layers (three-dimensional ones of fused experts too)."""
    name, stack = find_layers(model)
    return [f"{name}.{key}" for key, value in stack.named_parameters() if value.ndim >= 2 and not key.endswith("bias")]


class InterpolateConfig(AttackConfig):
    """How far towards the original weights what knowledge is back. Whoever has those needs no attack: a diagnosis."""

    name: Literal["interpolate"] = "interpolate"
    alphas: tuple[Share, ...] = Field((0.5, 0.25, 0.75), min_length=1)
    """Shares of the way to the original weights; the first one is the headline."""

    @property
    def uses_original(self) -> bool:
        """See :class:`~falcon_unlearn.attacks.base.AttackConfig`."""
        return True

    def run(self, target: Target) -> Outcome:
        """See :class:`~falcon_unlearn.attacks.base.AttackConfig`."""
        if target.original is None:
            raise UserError("attack interpolate: needs the original model: name it")
        mine, theirs = (dict(model.named_parameters()) for model in (target.model, target.original))
        if {n: p.shape for n, p in mine.items()} != {n: p.shape for n, p in theirs.items()}:
            raise UserError("attack interpolate: the original model has other tensors than the model under attack")
        pairs = {name: (value.detach(), theirs[name].detach().to(value)) for name, value in mine.items()}
        pairs = {name: (a, b) for name, (a, b) in pairs.items() if not torch.equal(a, b)}
        return score_changes(
            target,
            [{"alpha": alpha} for alpha in self.alphas],
            lambda i: {name: interpolated(a, b, self.alphas[i]) for name, (a, b) in pairs.items()},
            notes=[f"headline: alpha {self.alphas[0]:g}; {len(pairs)} of {len(mine)} tensors differ"],
            headline=0,
        )


def interpolated(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """``(1 - alpha) a + alpha b`` in fp32, in the dtype of ``a``; the ends are exact."""
    return torch.lerp(a.float(), b.float(), alpha).to(a.dtype)


class PruneConfig(AttackConfig):
    """Magnitude pruning: what hides knowledge may hang on small weights more than the knowledge does."""

    name: Literal["prune"] = "prune"
    sparsities: tuple[Share, ...] = Field((0.1, 0.2, 0.3), min_length=1)
    """Shares of each matrix that become zero."""

    def run(self, target: Target) -> Outcome:
        """See :class:`~falcon_unlearn.attacks.base.AttackConfig`."""
        names = layer_matrices(target.model)
        return score_changes(
            target,
            [{"sparsity": sparsity} for sparsity in self.sparsities],
            lambda i: {n: pruned(target.model.get_parameter(n).detach(), self.sparsities[i]) for n in names},
            notes=["by magnitude, matrix by matrix, all matrices of the decoder layers"],
        )


def pruned(weight: Tensor, sparsity: float) -> Tensor:
    """A copy whose ``round(sparsity * n)`` entries of smallest magnitude are zero."""
    result = weight.clone()
    count = round(sparsity * weight.numel())
    smallest = torch.topk(weight.abs().flatten(), count, largest=False, sorted=False).indices
    result.view(-1)[smallest] = 0
    return result
