"""Activations of a model larger than memory: all batches through one layer, then all through the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from falcon_unlearn.corpus.batching import Batch, Encoded, collate, length_sorted_batches
from falcon_unlearn.model.activation_cache import ActivationCache
from falcon_unlearn.model.activation_store import ActivationStore
from falcon_unlearn.model.decoder import LayerReachedError, bypassed, first_tensor
from falcon_unlearn.model.skeleton import Skeleton

Visit = Callable[[int, int, Tensor, Tensor], None]


@torch.no_grad()
def stream_layers(
    skeleton: Skeleton,
    batches: Sequence[Batch],
    last: int,
    visit: Visit,
    store: ActivationStore,
    *,
    masked: bool = True,
) -> bool:
    """Run layers 0 to ``last`` over all batches with one layer in memory at a time.

    Each layer is called from the model's own forward pass, with the layers below it passed through and its input
    replaced by what the layer below gave: masks, positions and all else a layer is called with are the model's own.
    Memory is :attr:`Skeleton.layer_bytes`, one batch, and what ``store`` may keep.

    Args:
        skeleton: the model, all of its layers on meta; they are on meta again afterwards.
        batches: on any device.
        last: the last layer to run.
        visit: called with layer, number of the batch, and the layer's input and output, each ``(batch, length,
            hidden)`` on the model's device. Both are lent: read or copy them, do not write into them.
        store: keeps the hidden states between layers, under the numbers of the batches.
        masked: hand the attention mask on; a causal decoder does not need it to ignore padding on the right.

    Returns:
        Whether layers of this architecture return a tuple, as :func:`~falcon_unlearn.model.decoder.bypassed` asks.

    Raises:
        UserError: a layer's weights are missing, truncated or altered, or the disk is full.
    """
    assert 0 <= last < len(skeleton)
    as_tuple = False  # layer 0, below which there is nothing to bypass, shows it
    for layer in range(last + 1):
        skeleton.load(layer)
        try:
            with bypassed(skeleton.stack[:layer], as_tuple=as_tuple):
                for number, batch in enumerate(batches):
                    stored = store.get(number) if layer else None
                    before, output = _through(skeleton, layer, batch.to(skeleton.source.device), stored, masked=masked)
                    after, as_tuple = first_tensor(output), isinstance(output, tuple)
                    if layer < last:
                        store.put(number, after)
                    visit(layer, number, before, after)
        finally:
            skeleton.drop(layer)
    return as_tuple


def stream_activations(
    skeleton: Skeleton,
    layers: Sequence[int],
    records: Sequence[Encoded],
    cache: ActivationCache,
    store: ActivationStore,
    *,
    pad_id: int,
    batch_size: int,
) -> bool:
    """Fill ``cache`` as :meth:`SplitDecoder.keep <falcon_unlearn.model.decoder.SplitDecoder.keep>` does, to the bit.

    Args:
        skeleton: see :func:`stream_layers`, as for what is returned and raised.
        layers: those that are to be trained; the largest is the target.
        records: what the cache will hold.
        cache: on the CPU.
        store: keeps the hidden states between layers.
        pad_id: token to pad with.
        batch_size: records per forward pass.
    """
    groups = [[records[i] for i in indices] for indices in length_sorted_batches(records, batch_size)]

    def visit(layer: int, number: int, before: Tensor, after: Tensor) -> None:
        if layer == min(layers):
            cache.add("input", groups[number], before)
        if layer == max(layers):
            cache.add("output", groups[number], after)

    return stream_layers(skeleton, [collate(group, pad_id) for group in groups], max(layers), visit, store)


def _through(
    skeleton: Skeleton, index: int, batch: Batch, stored: Tensor | None, *, masked: bool
) -> tuple[Tensor, Any]:
    """Input and output of one layer, the input being ``stored`` unless that is None."""
    seen: list[Any] = []

    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        own = args[0] if args else kwargs["hidden_states"]
        states = own if stored is None else stored.to(own.device)
        seen.append(states)
        return ((states, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": states})

    def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(output)
        raise LayerReachedError

    layer = skeleton.stack[index]
    handles = [layer.register_forward_pre_hook(replace, with_kwargs=True), layer.register_forward_hook(stop)]
    try:
        attention = batch.attention_mask if masked else None
        skeleton.model(input_ids=batch.input_ids, attention_mask=attention, use_cache=False)
    except LayerReachedError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    before, output = seen
    return before, output
