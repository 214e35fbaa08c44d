"""What the frozen part of a split model makes of each record, kept between epochs.

An activation depends on nothing but the weights and the tokens up to it, so entries are found by the token ids of
their record: data that changes is not found. The weights are the business of whoever fills the cache; a cache file
that outlives the process carries their hash (:meth:`ActivationStore.seal`).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from falcon_unlearn.corpus.batching import Encoded
from falcon_unlearn.model.activation_store import ActivationStore

Kind = Literal["input", "output"]
"""input: of the first trained layer; output: the original model's, of the target layer."""


def record_key(record: Encoded) -> str:
    """Hash of a record's token ids."""
    return hashlib.blake2b(array("q", record.ids).tobytes(), digest_size=16).hexdigest()


class ActivationCache:
    """Input of the first trained layer and frozen output of the target layer, per record, without padding.

    Args:
        store: where they lie.
    """

    def __init__(self, store: ActivationStore) -> None:
        self.store = store

    def holds(self, records: Sequence[Encoded]) -> bool:
        """Whether all of these records, and at least one, are there."""
        keys = [record_key(record) for record in records]
        # Each apart: where memory ran out between the two, a file that outlived the process holds one of them only.
        return bool(keys) and all(f"{kind} {key}" in self.store for kind in ("input", "output") for key in keys)

    def add(self, kind: Kind, records: Iterable[Encoded], activations: Tensor) -> None:
        """Keep ``activations`` ``(records, length, hidden)`` of a right-padded batch."""
        for row, record in enumerate(records):
            self.store.put(f"{kind} {record_key(record)}", activations[row, : len(record)])

    def read(self, kind: Kind, records: Sequence[Encoded], width: int, device: torch.device) -> Tensor:
        """The activations of a batch ``(records, width, hidden)``; padding is zero."""
        rows = [self.store.get(f"{kind} {record_key(record)}") for record in records]
        batch = rows[0].new_zeros((len(rows), width, rows[0].shape[-1]))
        for row, values in zip(batch, rows, strict=True):
            row[: len(values)] = values
        return batch.to(device)
