"""Activations by key: in memory up to a budget, in one file beyond it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from falcon_unlearn.artifacts import write_json
from falcon_unlearn.errors import UserError

_ALIGNMENT = 512  # bytes, as torch aligns what it allocates on a GPU


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@dataclass(frozen=True)
class _Slot:
    """Where a tensor lies in the file."""

    start: int
    size: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Slabs:
    """Memory for many tensors, cut from large blocks; given back when none of a block's tensors is left.

    A GPU copies from page-locked memory by itself, while the CPU goes on. torch rounds every page-locked tensor up to
    a power of two, which a block is.

    Args:
        pinned: page-lock the blocks; needs CUDA.
        size: bytes of a block; a larger tensor gets one of its own.
    """

    def __init__(self, *, pinned: bool, size: int = 64 << 20) -> None:
        self._pinned = pinned
        self._size = size
        self._block = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of ``tensor`` in host memory."""
        taken = tensor.numel() * tensor.element_size()
        if len(self._block) < taken:
            self._block = torch.empty(max(self._size, taken), dtype=torch.uint8, pin_memory=self._pinned)
        values = self._block[:taken].view(tensor.dtype).view(tensor.shape)
        aligned = -(-taken // _ALIGNMENT) * _ALIGNMENT
        # A slice beyond the end would be empty at an odd offset, where no empty tensor of a wider dtype can lie.
        self._block = self._block[aligned:] if aligned < len(self._block) else torch.empty(0, dtype=torch.uint8)
        return values.copy_(tensor.detach())


class ActivationStore:
    """CPU tensors by key. What does not fit into the budget is written to ``path`` and memory-mapped to be read.

    A mapping lives only while a tensor is copied out of it, so the file never counts as memory of this process.

    Args:
        path: the file, made when the budget is first exceeded; an old one is replaced.
        budget: bytes kept in memory.
        slabs: what is kept in memory lies there.
    """

    def __init__(self, path: Path, budget: float = math.inf, slabs: Slabs | None = None) -> None:
        self.path = path
        self._budget = budget
        self._slabs = slabs
        self._kept: dict[Hashable, Tensor] = {}
        self._slots: dict[Hashable, _Slot] = {}
        self._in_memory = 0
        self._end = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept or key in self._slots

    def in_memory(self, key: Hashable) -> bool:
        """Whether the tensor under ``key`` is there and not in the file."""
        return key in self._kept

    @property
    def bytes_in_memory(self) -> int:
        """Size of the tensors kept in memory."""
        return self._in_memory

    @property
    def bytes_on_disk(self) -> int:
        """Size of the file."""
        return self._end

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keep a copy of ``tensor``; one of the same size under ``key`` is overwritten where it lies.

        Raises:
            UserError: the disk is full or the folder cannot be written to.
        """
        size = tensor.numel() * tensor.element_size()
        slot = self._slots.get(key)
        if slot is None and self._in_memory - self._size(key) + size <= self._budget:
            self._in_memory += size - self._size(key)
            if self._slabs is None:
                self._kept[key] = tensor.detach().to("cpu", copy=True).contiguous()
            else:
                self._kept[key] = self._slabs.copy(tensor)
            return
        if key in self._kept:
            self._in_memory -= self._size(key)
            del self._kept[key]
        start = slot.start if slot is not None and slot.size == size else self._end
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("r+b" if self._end else "wb") as handle:
                handle.seek(start)
                tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tofile(handle)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error}): free some space") from error
        self._end = max(self._end, start + size)
        self._slots[key] = _Slot(start, size, tuple(tensor.shape), tensor.dtype)

    def get(self, key: Hashable) -> Tensor:
        """The tensor under ``key``; what lies in memory is handed out as it is and must not be written to."""
        if key in self._kept:
            return self._kept[key]
        slot = self._slots[key]
        values = torch.empty(slot.shape, dtype=slot.dtype)
        if slot.size:
            mapped = np.memmap(self.path, np.uint8, "r", slot.start, (slot.size,))
            np.copyto(values.reshape(-1).view(torch.uint8).numpy(), mapped)
        return values

    def close(self) -> None:
        """Forget everything and remove the file."""
        self._kept.clear()
        self._slots.clear()
        self._in_memory = self._end = 0
        self.path.unlink(missing_ok=True)
        self._index.unlink(missing_ok=True)

    @property
    def _index(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    def seal(self, identity: str) -> None:
        """Write down what the file holds, its hash and ``identity``, so that :meth:`reopen` can trust it."""
        slots = {
            key: [slot.start, slot.size, slot.shape, str(slot.dtype).removeprefix("torch.")]
            for key, slot in self._slots.items()
        }
        write_json(self._index, {"identity": identity, "sha256": _sha256(self.path), "slots": slots})

    def reopen(self, identity: str) -> bool:
        """Take over what a sealed file holds, if it is whole, unaltered and of the same identity; tell whether it is.

        Keys are strings then. What was in memory when it was sealed is not in the file.
        """
        try:
            index = json.loads(self._index.read_text(encoding="utf-8"))
            if index["identity"] != identity or index["sha256"] != _sha256(self.path):
                return False
            slots = {
                key: _Slot(start, size, tuple(shape), getattr(torch, dtype))
                for key, (start, size, shape, dtype) in index["slots"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        self._slots.update(slots)
        self._end = self.path.stat().st_size
        return True

    def _size(self, key: Hashable) -> int:
        kept = self._kept.get(key)
        return 0 if kept is None else kept.numel() * kept.element_size()
