"""What the frozen part of a split model makes of each record, kept between epochs.

An activation depends on nothing but the weights and the tokens up to it, so entries are found by the token ids of
their record: data that changes is not found. The weights are the business of whoever fills the cache; a cache file
that outlives the process carries their hash (:meth:`ActivationStore.seal`).
"""

from __future__ import annotations

import contextlib
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
        self._ahead: dict[str, tuple[Tensor, torch.cuda.Event | None]] = {}
        self._stream: torch.cuda.Stream | None = None

    def holds(self, records: Sequence[Encoded]) -> bool:
        """Whether all of these records, and at least one, are there."""
        keys = [record_key(record) for record in records]
        # Each apart: where memory ran out between the two, a file that outlived the process holds one of them only.
        return bool(keys) and all(f"{kind} {key}" in self.store for kind in ("input", "output") for key in keys)

    def add(self, kind: Kind, records: Iterable[Encoded], activations: Tensor) -> None:
        """Keep ``activations`` ``(records, length, hidden)`` of a right-padded batch."""
        for row, record in enumerate(records):
            self.store.put(f"{kind} {record_key(record)}", activations[row, : len(record)])

    def fetch_ahead(self, batches: Sequence[Sequence[Encoded]], device: torch.device) -> None:
        """Begin to copy what :meth:`read` will be asked for, batch by batch, and forget what it was not asked for.

        On CUDA the copies run beside the computation, each batch's behind those before it. What lies on disk is left
        to :meth:`read`, whose caller would wait for it here too.
        """
        self._ahead.clear()
        if device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for records in batches:
                keys = [f"{kind} {record_key(record)}" for kind in ("input", "output") for record in records]
                try:
                    found = {key: self._to(key, device) for key in keys if self.store.in_memory(key)}
                except torch.OutOfMemoryError:  # then smaller batches, which the trainer will try, are read in time
                    return
                done = None if self._stream is None else self._stream.record_event()
                self._ahead |= {key: (values, done) for key, values in found.items()}

    def read(self, kind: Kind, records: Sequence[Encoded], width: int, device: torch.device) -> Tensor:
        """The activations of a batch ``(records, width, hidden)``; padding is zero."""
        rows = [self._row(f"{kind} {record_key(record)}", device) for record in records]
        batch = rows[0].new_zeros((len(rows), width, rows[0].shape[-1]))
        for row, values in zip(batch, rows, strict=True):
            row[: len(values)] = values
        return batch

    def _to(self, key: str, device: torch.device) -> Tensor:
        return self.store.get(key).to(device, non_blocking=device.type == "cuda")

    def _row(self, key: str, device: torch.device) -> Tensor:
        if key not in self._ahead:
            return self._to(key, device)
        values, done = self._ahead.pop(key)
        if done is not None:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(done)
            values.record_stream(stream)  # its memory is the copying stream's, which must not take it back before
        return values
