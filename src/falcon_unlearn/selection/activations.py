"""One vector a record and layer: the mean of a layer's output over the record's counted tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from falcon_unlearn.corpus.batching import Encoded, LossMask, collate, length_sorted_batches
from falcon_unlearn.model.decoder import find_layers, first_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def layer_means(
    model: PreTrainedModel,
    encoded: Sequence[Encoded],
    layers: Sequence[int],
    *,
    mask: LossMask,
    pad_id: int,
    batch_size: int = 32,
) -> list[Tensor]:
    """Mean activations of ``encoded`` at each of ``layers``.

    Args:
        model: a decoder with at least ``max(layers) + 1`` layers.
        encoded: records; they are run in length-sorted batches and returned in their own order.
        layers: indices of decoder layers.
        mask: which tokens enter the mean; padding never does.
        pad_id: token to pad with.
        batch_size: records per forward pass.

    Returns:
        One fp32 CPU tensor ``(records, hidden)`` per layer.
    """
    _, stack = find_layers(model)
    sums: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    weights = torch.empty(0)

    def keep(layer: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            means = (first_tensor(output).float() * weights).sum(1) / weights.sum(1)
            sums[layer].append(means.cpu())

        return hook

    handles = [stack[layer].register_forward_hook(keep(layer)) for layer in layers]
    order: list[int] = []
    try:
        for indices in length_sorted_batches(encoded, batch_size):
            batch = collate([encoded[i] for i in indices], pad_id).to(model.device)
            weights = batch.loss_mask(mask)[..., None].float()
            getattr(model, model.base_model_prefix, model)(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            )
            order += indices
    finally:
        for handle in handles:
            handle.remove()
    back = torch.tensor(order).argsort()
    return [torch.cat(sums[layer])[back] for layer in layers]
