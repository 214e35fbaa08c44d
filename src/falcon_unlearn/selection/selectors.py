"""The table of selectors: what each chooses by, and what it has to look at. How well they do: docs/science.md."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Literal

from torch import Tensor

from falcon_unlearn.selection.separation import mmd_squared, probe

Selector = Literal[
    "sweep", "mutual_information", "middle", "domain_information", "probe_error", "mmd", "gradient_conflict"
]
"""Ways to choose the target layer."""

CRITERIA: Mapping[str, str] = {
    "sweep": "kept retain minus left forget probability on validation records, after a short trial (1 is best)",
    "mutual_information": "least mutual information of forget and retain activations, in nats (published estimator)",
    "middle": "half-way up, whatever the data",
    "domain_information": "most information, in nats, that a linear probe finds in activations about their side",
    "probe_error": "least error of a linear probe that tells forget from retain activations",
    "mmd": "largest squared maximum mean discrepancy of forget and retain activations",
    "gradient_conflict": "least cosine of the gradients of forget and retain likelihood",
}
"""What each selector goes by, for people."""

WHOLE_MODEL_SELECTORS: frozenset[str] = frozenset({"sweep", "gradient_conflict"})
"""They run the whole model, head included; others take mean activations, or nothing."""

SMALLEST: frozenset[str] = frozenset({"mutual_information", "probe_error", "gradient_conflict"})
"""They choose the layer with the smallest score."""

Separation = Callable[[Tensor, Tensor, Sequence[Hashable], int], float]
"""Forget and retain activations ``(n, hidden)`` of a layer, a key per record (phrasings share one), seed -> score."""

SEPARATIONS: Mapping[str, Separation] = {
    "domain_information": lambda forget, retain, groups, seed: probe(forget, retain, groups, seed=seed).information,
    "probe_error": lambda forget, retain, groups, seed: probe(forget, retain, groups, seed=seed).error,
    "mmd": lambda forget, retain, _groups, _seed: mmd_squared(forget, retain),
}
"""Selectors that look at two samples of activations."""


def middle(candidates: Sequence[int], total: int) -> int:
    """Of the candidates the nearest to half-way up ``total`` layers (layer 3 of 6, 2 of 5); of two the lower one."""
    return min(candidates, key=lambda layer: (abs(layer - total // 2), layer))
