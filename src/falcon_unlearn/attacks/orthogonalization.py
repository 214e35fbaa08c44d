"""Orthogonalisation: take the direction that unlearning added out of the residual stream; no weight changes.

d_l = mean of the model's activations after layer l on the known forget records, minus
      original: the original model's mean on the same records
      retain:   the model's own mean on retain records (no other model is needed)
h   <- h - (h . d) d / |d|^2

Source: Łucki et al. 2024 (arXiv 2409.18025, section 4.3), who take each layer's own direction out of it, and Arditi et
al. 2024 (arXiv 2406.11717), who take one layer's direction out of every layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from falcon_unlearn.artifacts import SampleScore
from falcon_unlearn.attacks.base import AttackConfig, Outcome, OutOfTimeError, Point, Target, point, strongest
from falcon_unlearn.corpus.batching import collate, epoch_order
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.errors import UserError
from falcon_unlearn.model.decoder import find_layers, first_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Contrast = Literal["original", "retain"]

RETAIN_RECORDS = 128
"""At most so many retain records are averaged."""


class OrthogonalizeConfig(AttackConfig):
    """Ablation of a difference of means, per layer."""

    name: Literal["orthogonalize"] = "orthogonalize"
    contrasts: tuple[Contrast, ...] = Field(("retain",), min_length=1)
    """What the forget activations are compared with: retain (own activations on retain records) or original."""
    layers: tuple[int, ...] | None = None
    """Layers whose direction is tried on its own, in every layer; empty: all. Each layer's own is always tried."""

    @property
    def uses_original(self) -> bool:
        """See :class:`~falcon_unlearn.attacks.base.AttackConfig`."""
        return "original" in self.contrasts

    def run(self, target: Target) -> Outcome:
        """See :class:`~falcon_unlearn.attacks.base.AttackConfig`."""
        _, stack = find_layers(target.model)
        wanted = tuple(range(len(stack))) if self.layers is None else self.layers
        outside = [layer for layer in wanted if not 0 <= layer < len(stack)]
        if outside:
            raise UserError(f"attack orthogonalize: layer {outside[0]} is not one of the model's 0..{len(stack) - 1}")
        found = {contrast: _directions(target, contrast) for contrast in self.contrasts}
        choices: list[tuple[Contrast, int | None]] = [(c, layer) for c in self.contrasts for layer in (None, *wanted)]
        tried: list[tuple[Point, tuple[SampleScore, ...]]] = []
        for contrast, layer in choices:
            if target.deadline.passed:
                break
            own = found[contrast]
            with ablated(stack, own if layer is None else [own[layer]] * len(stack)):
                samples = target.score()
                utility = {"utility": target.utility_probability()} if target.utility else {}
            setting = {"contrast": contrast, "layer": "each its own" if layer is None else layer}
            tried.append((point(setting, samples, utility), samples))
        if not tried:
            raise OutOfTimeError
        best, samples = strongest(tried)
        return Outcome(
            samples,
            tuple(entry[0] for entry in tried),
            steps=len(tried),
            artefacts={"strongest": dict(best.setting)},
            notes=("directions are means over the tokens of the known forget records; weights stay as they are",),
            complete=len(tried) == len(choices),
        )


def _directions(target: Target, contrast: Contrast) -> list[Tensor]:
    """One direction a layer, ``(hidden,)`` in fp32; not of unit length."""
    mine = mean_activations(target.model, target, target.known)
    if contrast == "original":
        if target.original is None:
            raise UserError("attack orthogonalize: contrast original needs the original model: name it, or take retain")
        theirs = mean_activations(target.original, target, target.known)
    else:
        if not target.retain:
            raise UserError("attack orthogonalize: contrast retain needs retain records: give some, or take original")
        order = epoch_order(len(target.retain), 0, target.seed, "orthogonalize")[:RETAIN_RECORDS]
        theirs = mean_activations(target.model, target, [target.retain[i] for i in order])
    return [a - b.to(a.device) for a, b in zip(mine, theirs, strict=True)]


@torch.no_grad()
def mean_activations(model: PreTrainedModel, target: Target, records: Sequence[Record]) -> list[Tensor]:
    """Mean output of each decoder layer, ``(hidden,)`` fp32, over all tokens but beginning-of-sequence and padding."""
    _, stack = find_layers(model)
    sums: dict[int, Tensor] = {}
    count = 0
    mask = torch.zeros(0)

    def add(index: int, output: Any) -> None:
        hidden = first_tensor(output)[mask].float().sum(0)
        sums[index] = sums[index] + hidden if index in sums else hidden

    handles = [
        layer.register_forward_hook(lambda _module, _args, output, index=index: add(index, output))
        for index, layer in enumerate(stack)
    ]
    try:
        encoded = target.encode(records)
        for start in range(0, len(encoded), target.batch_size):
            batch = collate(encoded[start : start + target.batch_size], target.encoder.pad_id).to(model.device)
            mask = batch.content_mask
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            count += int(mask.sum())
    finally:
        for handle in handles:
            handle.remove()
    return [sums[index] / count for index in range(len(stack))]


@contextlib.contextmanager
def ablated(stack: nn.ModuleList, directions: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block each layer's output has no part along its direction; one of length zero changes nothing."""

    def hook(direction: Tensor) -> Any:
        unit = direction / direction.norm()

        def remove(_module: nn.Module, _args: Any, output: Any) -> Any:
            hidden = first_tensor(output)
            along = unit.to(hidden.device)
            exact = hidden.float()
            cleaned = (exact - (exact @ along)[..., None] * along).to(hidden.dtype)
            return (cleaned, *output[1:]) if isinstance(output, tuple) else cleaned

        return remove

    handles = [
        layer.register_forward_hook(hook(direction))
        for layer, direction in zip(stack, directions, strict=True)
        if float(direction.norm())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
