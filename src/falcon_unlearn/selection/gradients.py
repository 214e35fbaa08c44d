"""What forget and retain gradients of the likelihood say about each layer: one backward pass gives all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from falcon_unlearn.corpus.batching import Batch
from falcon_unlearn.model.decoder import find_layers, scope_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class GradientRelation:
    """Of the forget gradient g_F and the retain gradient g_R of one layer's parameters, as one vector each.

    Attributes:
        cosine: of the two; NaN where one is zero. Both are of losses that training lowers, so the closer to 1, the more
            does raising the forget loss raise the retain loss: the conflict.
        forget_norm: of g_F.
        retain_norm: of g_R.
    """

    cosine: float
    forget_norm: float
    retain_norm: float

    @property
    def selectivity(self) -> float:
        """log(|g_F| / |g_R|): first-order change of the forget loss a unit step can make, over the retain loss's.

        A layer's share of what SSD (Foster et al. 2024, arXiv 2308.07707) compares parameter by parameter.
        """
        if not (self.forget_norm > 0 and self.retain_norm > 0):
            return math.nan
        return math.log(self.forget_norm / self.retain_norm)


def related(forget: Sequence[Tensor], retain: Sequence[Tensor]) -> GradientRelation:
    """The relation of two gradients, given tensor by tensor."""
    dot = math.fsum(float((f.double() * r.double()).sum()) for f, r in zip(forget, retain, strict=True))
    forget_norm, retain_norm = (
        math.sqrt(math.fsum(float(t.double().square().sum()) for t in g)) for g in (forget, retain)
    )
    both = forget_norm * retain_norm
    return GradientRelation(dot / both if both > 0 else math.nan, forget_norm, retain_norm)


@contextmanager
def _trainable(parameters: Sequence[Tensor], model: PreTrainedModel) -> Iterator[None]:
    """Inside the block gradients go to these parameters of ``model`` alone."""
    kept = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_()
    try:
        yield
    finally:
        for parameter, value in kept.items():
            parameter.requires_grad_(value)


def _mean_nll_gradients(model: PreTrainedModel, batches: Sequence[Batch], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the mean of -log p over all answer tokens of ``batches``."""
    count = sum(int(batch.answer_mask[:, 1:].sum()) for batch in batches)
    total = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    for batch in batches:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        counted = batch.answer_mask[:, 1:]
        loss = F.cross_entropy(logits[:, :-1][counted].float(), batch.input_ids[:, 1:][counted], reduction="sum")
        torch._foreach_add_(total, list(torch.autograd.grad(loss / max(count, 1), parameters)))
    return total


def gradient_relations(
    model: PreTrainedModel,
    forget: Sequence[Batch],
    retain: Sequence[Batch],
    layers: Sequence[int],
    modules: str | Sequence[str] = "mlp",
) -> list[GradientRelation]:
    """How forget and retain gradients of -log p of the answers relate at each layer, for the original model.

    Args:
        model: a causal language model, left as it was.
        forget: batches on its device.
        retain: the same.
        layers: indices of decoder layers.
        modules: which of their parameters, see :func:`falcon_unlearn.model.decoder.scope_parameters`.

    Returns:
        One relation per layer.
    """
    _, stack = find_layers(model)
    scopes = [[stack[layer].get_parameter(n) for n in scope_parameters(stack[layer], modules)] for layer in layers]
    parameters = [parameter for scope in scopes for parameter in scope]
    with _trainable(parameters, model):
        sides = [_mean_nll_gradients(model, batches, parameters) for batches in (forget, retain)]
    found, start = [], 0
    for scope in scopes:
        rows = slice(start, start + len(scope))
        found.append(related(sides[0][rows], sides[1][rows]))
        start += len(scope)
    return found
