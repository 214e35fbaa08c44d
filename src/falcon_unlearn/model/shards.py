"""A safetensors checkpoint as bytes: which file and which byte range holds each tensor.

Format: 8 bytes little-endian header length, a JSON header, then the tensors without gaps
(https://github.com/huggingface/safetensors#format). A checkpoint folder has one ``model.safetensors``, or shards
named by ``model.safetensors.index.json``; where both exist the single file counts, as in transformers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from falcon_unlearn.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPE_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I8": 8, "U8": 8, "BOOL": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

_MAX_HEADER = 100_000_000  # the limit of the safetensors library itself
_CHUNK = 1 << 22


@dataclass(frozen=True)
class TensorSpan:
    """Where one tensor stands: bytes ``start`` to ``end`` (exclusive, counted from the beginning) of ``file``.

    ``file`` is relative to the checkpoint folder, ``dtype`` the name safetensors uses (``BF16``).
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.end - self.start


def _header_span(path: Path, file: str, name: str, entry: Any, data_start: int) -> TensorSpan:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        well_formed = all(type(n) is int and n >= 0 for n in (*shape, start, end))
        well_formed = well_formed and (end - start) * 8 == math.prod(shape) * DTYPE_BITS[dtype]
    except (KeyError, TypeError, ValueError):
        well_formed = False
    if not well_formed:
        raise UserError(f"{path}: the header's dtype, shape and offsets of '{name}' do not fit: get the file again")
    return TensorSpan(file, dtype, shape, data_start + start, data_start + end)


def file_spans(path: Path, file: str | None = None) -> dict[str, TensorSpan]:
    """Read the header of one safetensors file.

    Args:
        path: the file.
        file: what to put in ``TensorSpan.file``; the file's own name unless given.

    Raises:
        UserError: the file is missing, not safetensors, truncated, or its size and offsets disagree.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            prefix = handle.read(8)
            data_start = 8 + int.from_bytes(prefix, "little")
            raw = handle.read(min(data_start - 8, _MAX_HEADER))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if prefix == b"version ":
        raise UserError(f"{path}: is a git-lfs pointer, not the weights: run 'git lfs pull' in its folder")
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{path}: is truncated or not a safetensors file: get the file again")
    header.pop("__metadata__", None)
    spans = {name: _header_span(path, file or path.name, name, entry, data_start) for name, entry in header.items()}
    position = data_start
    for span in sorted(spans.values(), key=lambda span: (span.start, span.end)):
        if span.start != position:
            raise UserError(f"{path}: the header leaves a gap or an overlap at byte {position}: get the file again")
        position = span.end
    if position != size:
        kind = "truncated" if size < position else "longer than its header says"
        raise UserError(f"{path}: is {kind} ({size} bytes, expected {position}): get the file again")
    return spans


def _indexed_files(folder: Path) -> dict[str, str]:
    index = folder / INDEX_FILE
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        files = {name: PurePosixPath(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: is not an index with a 'weight_map' of tensor names to files") from error
    for file in dict.fromkeys(files.values()):
        if file.is_absolute() or ".." in file.parts:
            raise UserError(f"{index}: '{file}' is outside the checkpoint folder")
    return {name: file.as_posix() for name, file in files.items()}


def _indexed_spans(folder: Path, names: Collection[str] | None) -> dict[str, TensorSpan]:
    files = {name: file for name, file in _indexed_files(folder).items() if names is None or name in names}
    shards: dict[str, dict[str, TensorSpan]] = {}
    for file in dict.fromkeys(files.values()):
        if not (folder / file).is_file():
            raise UserError(f"{folder / INDEX_FILE}: names '{file}', which is not in {folder}: get the missing shard")
        shards[file] = file_spans(folder / file, file)
    for name, file in files.items():
        if name not in shards[file]:
            raise UserError(f"{folder / file}: has no tensor '{name}', but {INDEX_FILE} says so: get both again")
    return {name: shards[file][name] for name, file in files.items()}


def tensor_spans(folder: Path, names: Collection[str] | None = None) -> dict[str, TensorSpan]:
    """Find every tensor of the checkpoint in ``folder``; only headers are read.

    Args:
        folder: the checkpoint.
        names: only these tensors; shards without any of them need not be there.

    Raises:
        UserError: no folder, no safetensors weights in it, a shard that is missing, truncated or altered.
    """
    if _has_one_file(folder):
        spans = file_spans(folder / SINGLE_FILE)
        return spans if names is None else {name: span for name, span in spans.items() if name in names}
    return _indexed_spans(folder, names)


def tensor_files(folder: Path) -> dict[str, str]:
    """The file of each tensor, relative to ``folder``; of several shards none is opened, or needed.

    Raises:
        UserError: no folder, no safetensors weights in it, or a broken index.
    """
    if _has_one_file(folder):
        return dict.fromkeys(file_spans(folder / SINGLE_FILE), SINGLE_FILE)
    return _indexed_files(folder)


def weight_files(folder: Path) -> tuple[str, ...]:
    """The files that the weights of the checkpoint are in, there or not: all shards, or the one file.

    Raises:
        UserError: a broken index.
    """
    if (folder / SINGLE_FILE).is_file() or not (folder / INDEX_FILE).is_file():
        return (SINGLE_FILE,)
    return tuple(dict.fromkeys(_indexed_files(folder).values()))


def _has_one_file(folder: Path) -> bool:
    """True for a single file, False for shards; anything else is refused."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a folder with {SINGLE_FILE} is needed")
    if (folder / SINGLE_FILE).is_file():
        return True
    if (folder / INDEX_FILE).is_file():
        return False
    if any(folder.glob("pytorch_model*.bin*")):
        raise UserError(
            f"{folder}: has pytorch_model.bin only, and only safetensors is read; convert it with "
            f"transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise UserError(f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}; give a folder with safetensors weights")


def iter_bytes(folder: Path, span: TensorSpan) -> Iterator[bytes]:
    """Yield the bytes of a tensor in chunks of at most 4 MiB.

    Raises:
        UserError: the file ends before the tensor does.
    """
    with (folder / span.file).open("rb") as handle:
        handle.seek(span.start)
        left = span.size
        while left:
            chunk = handle.read(min(left, _CHUNK))
            if not chunk:
                raise UserError(f"{folder / span.file}: is truncated: get the file again")
            left -= len(chunk)
            yield chunk


def read_bytes(folder: Path, span: TensorSpan) -> bytes:
    """All bytes of a tensor as they are on the disk."""
    return b"".join(iter_bytes(folder, span))


def read_into(folder: Path, span: TensorSpan, out: memoryview) -> None:
    """Read the bytes of a tensor into ``out``, of exactly its size: no copy, no memory-mapped pages left behind.

    Raises:
        UserError: the file ends before the tensor does.
    """
    assert len(out) == span.size
    with (folder / span.file).open("rb", buffering=0) as handle:
        handle.seek(span.start)
        done = 0
        while done < span.size:
            count = handle.readinto(out[done:])
            if not count:
                raise UserError(f"{folder / span.file}: is truncated: get the file again")
            done += count


def sha256_of(folder: Path, span: TensorSpan) -> str:
    """SHA-256 (hex) of a tensor's bytes, in constant memory."""
    digest = hashlib.sha256()
    for chunk in iter_bytes(folder, span):
        digest.update(chunk)
    return digest.hexdigest()


def fingerprint(folder: Path, names: Collection[str] | None = None) -> str:
    """SHA-256 over names, layout and samples of the weights: tells one model from another in little time.

    Each file gives its size and sixteen evenly spaced blocks of 64 KiB, so a change that falls between them in a
    large file goes unseen; patches compare whole tensors instead.

    Args:
        folder: the checkpoint.
        names: only these tensors and the files they are in.

    Raises:
        UserError: as :func:`tensor_spans`.
    """
    spans = tensor_spans(folder, names)
    digest = hashlib.sha256(repr(sorted(spans.items())).encode())
    for file in sorted({span.file for span in spans.values()}):
        with (folder / file).open("rb") as handle:
            size = handle.seek(0, 2)
            for k in range(16):
                handle.seek(size * k // 16)
                digest.update(handle.read(1 << 16))
    return digest.hexdigest()


def write_safetensors(
    path: Path, like: Mapping[str, TensorSpan], data: Callable[[str], Iterable[bytes | memoryview]]
) -> str:
    """Write a safetensors file tensor by tensor and flush it to the disk; renaming it is the caller's business.

    Unlike ``safetensors.torch.save_file`` this holds no copy of the file in memory, takes bytes of any dtype
    from the disk as they are, and lets the system's own error through when the disk is full.

    Args:
        path: the file to write.
        like: dtype and shape of every tensor; only these two are used.
        data: name -> the tensor's bytes, in pieces.

    Returns:
        SHA-256 (hex) of the whole file.
    """
    # Widest dtype first, as safetensors does: with an aligned header every tensor is aligned to its own width.
    names = sorted(like, key=lambda name: (-DTYPE_BITS[like[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        span = like[name]
        start, position = position, position + span.size
        header[name] = {"dtype": span.dtype, "shape": span.shape, "data_offsets": (start, position)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as handle:

        def put(piece: bytes | memoryview) -> None:
            handle.write(piece)
            digest.update(piece)

        put(len(text).to_bytes(8, "little") + text)
        for name in names:
            for piece in data(name):
                put(piece)
        assert handle.tell() == 8 + len(text) + position, f"{path}: data does not have the declared size"
        handle.flush()
        os.fsync(handle.fileno())
    return digest.hexdigest()
