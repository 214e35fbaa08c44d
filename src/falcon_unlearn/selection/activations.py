"""One vector a record and layer: the mean of a layer's output over the record's counted tokens."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from falcon_unlearn.corpus.batching import Encoded, LossMask, collate, length_sorted_batches
from falcon_unlearn.model.activation_store import ActivationStore
from falcon_unlearn.model.decoder import LayerReachedError, find_layers, first_tensor
from falcon_unlearn.model.replicas import run_batches
from falcon_unlearn.model.skeleton import Skeleton
from falcon_unlearn.model.streaming import stream_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _sees_padding(model: PreTrainedModel) -> bool:
    """Whether tokens look to their right, where the padding is, so that an attention mask is needed."""
    return bool(getattr(model.config.get_text_config(decoder=True), "use_bidirectional_attention", False))


def token_budget_batches(encoded: Sequence[Encoded], batch_tokens: int) -> list[list[int]]:
    """Indices of ``encoded`` by length, in batches of at most ``batch_tokens`` tokens with padding (or one record)."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    batches: list[list[int]] = []
    for index in order:
        if batches and (len(batches[-1]) + 1) * len(encoded[index]) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


class MeanCollector:
    """Collects batches of layer outputs, in any order and from any thread: one tensor a layer, in the records' order.

    Args:
        layers: whose outputs will be added.
        batches: the record indices of each batch.
    """

    def __init__(self, layers: Sequence[int], batches: Sequence[Sequence[int]]) -> None:
        self._batches = len(batches)
        self._back = torch.tensor([index for batch in batches for index in batch], dtype=torch.long).argsort()
        self._parts: dict[int, dict[int, Tensor]] = {layer: {} for layer in layers}
        self._done: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def add(self, layer: int, number: int, output: Tensor, counted: Tensor) -> None:
        """Add one batch of ``layer``.

        Args:
            layer: one of the layers.
            number: which of the batches.
            output: its hidden states, ``(batch, length, hidden)``.
            counted: which tokens enter the mean, boolean ``(batch, length)``.
        """
        # Half precision is too coarse to sum in.
        states = output.to(torch.promote_types(output.dtype, torch.float32))
        weights = counted.to(states)
        mean = torch.bmm(weights[:, None], states)[:, 0] / weights.sum(1, keepdim=True)
        parts = self._parts[layer]
        with self._lock:
            parts[number] = mean
            if len(parts) == self._batches:
                # One copy from the device a layer: each is a wait for all that runs there.
                self._done[layer] = torch.cat([parts[i] for i in range(self._batches)]).cpu()[self._back]
                parts.clear()

    def result(self, layer: int) -> Tensor:
        """Means of ``layer`` after its last batch: ``(records, hidden)`` on the CPU, fp32 or the model's fp64."""
        return self._done[layer]


@torch.no_grad()
def layer_means(
    model: PreTrainedModel,
    encoded: Sequence[Encoded],
    layers: Sequence[int],
    *,
    mask: LossMask,
    pad_id: int,
    batch_size: int = 32,
    batch_tokens: int | None = None,
) -> list[Tensor]:
    """Mean activations of ``encoded`` at each of ``layers``.

    Records run in batches sorted by length, through no layer above the highest asked for, and without attention
    mask: padding stands on the right, where no token of a causal decoder looks.

    Args:
        model: a causal decoder with at least ``max(layers) + 1`` layers.
        encoded: records; they are returned in their own order.
        layers: indices of decoder layers.
        mask: which tokens enter the mean; padding never does.
        pad_id: token to pad with.
        batch_size: records per forward pass.
        batch_tokens: instead of ``batch_size``, the most tokens (padding included) per forward pass.

    Returns:
        One CPU tensor ``(records, hidden)`` per layer, fp32 (fp64 if the model is).
    """
    batches = (
        length_sorted_batches(encoded, batch_size)
        if batch_tokens is None
        else token_budget_batches(encoded, batch_tokens)
    )
    collector, highest, masked = MeanCollector(layers, batches), max(layers), _sees_padding(model)

    def prepare(model: PreTrainedModel) -> Callable[[int], None]:
        current: tuple[int, Tensor]

        def keep(layer: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                number, counted = current
                collector.add(layer, number, first_tensor(output), counted)
                if layer == highest:
                    raise LayerReachedError

            return hook

        stack = find_layers(model)[1]
        handles.extend(stack[layer].register_forward_hook(keep(layer)) for layer in dict.fromkeys(layers))
        backbone = getattr(model, model.base_model_prefix, model)

        @torch.no_grad()
        def run(number: int) -> None:
            nonlocal current
            batch = collate([encoded[i] for i in batches[number]], pad_id).to(model.device)
            current = number, batch.loss_mask(mask)
            with contextlib.suppress(LayerReachedError):
                backbone(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask if masked else None, use_cache=False
                )

        return run

    handles: list[RemovableHandle] = []
    try:
        run_batches(model, len(batches), prepare)
    finally:
        for handle in handles:
            handle.remove()
    return [collector.result(layer) for layer in layers]


def streamed_layer_means(
    skeleton: Skeleton,
    encoded: Sequence[Encoded],
    layers: Sequence[int],
    *,
    mask: LossMask,
    pad_id: int,
    batch_size: int,
    store: ActivationStore,
) -> list[Tensor]:
    """The same values as :func:`layer_means`, to the bit, with one layer of the model in memory at a time.

    Args:
        skeleton: the model.
        encoded: records; they are returned in their own order.
        layers: indices of decoder layers.
        mask: which tokens enter the mean; padding never does.
        pad_id: token to pad with.
        batch_size: records per forward pass.
        store: keeps the hidden states between layers.

    Raises:
        UserError: weights of a layer are missing, truncated or altered, or the disk is full.
    """
    indices = length_sorted_batches(encoded, batch_size)
    collector, wanted = MeanCollector(layers, indices), set(layers)
    batches = [collate([encoded[i] for i in chosen], pad_id) for chosen in indices]

    def visit(layer: int, number: int, before: Tensor, after: Tensor) -> None:
        if layer in wanted:
            collector.add(layer, number, after, batches[number].loss_mask(mask).to(after.device))

    stream_layers(skeleton, batches, max(layers), visit, store, masked=_sees_padding(skeleton.model))
    return [collector.result(layer) for layer in layers]
