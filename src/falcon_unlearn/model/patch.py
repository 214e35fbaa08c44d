"""A patch: the tensors an unlearning run changed, exact to the byte, and how to apply, revert and verify it.

A patch is a folder of three files::

    patch.safetensors      the changed tensors under their on-disk names, in their on-disk dtypes
    original.safetensors   the same tensors before; makes revert possible without the base model, but still holds
                           the forgotten knowledge: leave it out (``keep_original=False``) or delete it to publish
    patch.json             base model, SHA-256 of every tensor before and after, provenance

Dtypes and shapes never change, so a shard is patched by copying it and overwriting byte ranges: its header and
all other tensors stay as they are, and revert gives back the base's files bit for bit.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, ValidationError

from falcon_unlearn.artifacts import write_json
from falcon_unlearn.errors import UserError
from falcon_unlearn.model.ancestry import LEDGER_FILE, Ancestor, Laid, level, patch_id, read_ledger, write_ledger
from falcon_unlearn.model.shards import (
    TensorSpan,
    file_spans,
    iter_bytes,
    sha256_of,
    tensor_spans,
    write_safetensors,
)

if TYPE_CHECKING:
    import torch

PATCH_FILE = "patch.safetensors"
ORIGINAL_FILE = "original.safetensors"
DOCUMENT_FILE = "patch.json"

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack"}
_FICLONE = 0x40049409  # linux/fs.h: share the extents of another file, copy on write


@dataclass(frozen=True)
class TensorChange:
    """One changed tensor: safetensors dtype, shape, and SHA-256 (hex) of its bytes before and after."""

    dtype: str
    shape: tuple[int, ...]
    sha256_before: str
    sha256_after: str


@dataclass(frozen=True)
class Patch:
    """A patch on the disk. ``tensors`` may be empty: the run changed nothing that the on-disk dtype can show.

    ``ancestry`` are the patches below it, the earliest first: it applies to the base with those, and to nothing else.
    """

    folder: Path
    base_model: str
    tensors: Mapping[str, TensorChange]
    provenance: Mapping[str, Any]
    sha256: str
    ancestry: tuple[Ancestor, ...] = ()

    @property
    def id(self) -> str:
        """Tells it from any other patch, and from the same one on other patches."""
        data = self.provenance.get("data")
        return patch_id(self.sha256, self.changes, self.ancestry, data if isinstance(data, dict) else {})

    @property
    def changes(self) -> dict[str, tuple[str, str]]:
        """Tensor -> SHA-256 before and after."""
        return {name: (change.sha256_before, change.sha256_after) for name, change in self.tensors.items()}

    @property
    def holds_original(self) -> bool:
        """Whether the forgotten weights are in the folder, so that the patch can be reverted on its own."""
        return (self.folder / ORIGINAL_FILE).is_file()


@dataclass(frozen=True)
class ApplyReport:
    """What was written; every file counts once.

    Attributes:
        files_rewritten: shards in which tensors were overwritten.
        files_copied: other files, by plain copy.
        files_linked: other files, as hard links to the base's.
        files_reflinked: other files, sharing the base's blocks copy-on-write.
        bytes_written: bytes that went to the disk (overwritten ranges and plain copies).
        other_weights: files that look like weights in a form the patch does not reach; taken over as they are,
            so after ``apply`` they may still hold the forgotten knowledge.
    """

    files_rewritten: int
    files_copied: int
    bytes_written: int
    files_linked: int
    files_reflinked: int
    other_weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mismatch:
    """A tensor that is neither the patch's base nor its result."""

    name: str
    reason: Literal["missing", "dtype", "shape", "hash"]


@dataclass(frozen=True)
class VerifyReport:
    """How a model stands to a patch.

    ``state`` is ``base`` or ``patched`` where all tensors of the patch are so, ``mixed`` where some are one and
    some the other, ``other`` where any is neither (those are the ``mismatches``). An empty patch finds ``base``.
    ``lacks`` is the first of the patches below it that is not on the model.
    """

    state: Literal["base", "patched", "mixed", "other"]
    mismatches: tuple[Mismatch, ...]
    at_base: tuple[str, ...]
    at_patched: tuple[str, ...]
    lacks: Ancestor | None = None


@dataclass(frozen=True)
class _Document:
    """The content of patch.json."""

    format_version: Literal[1]
    base_model: str
    patch_sha256: str
    tensors: dict[str, TensorChange]
    provenance: dict[str, Any]
    ancestry: tuple[Ancestor, ...] = ()


@dataclass(frozen=True)
class _Edit:
    """One tensor to overwrite: its place in the model, where its new bytes are, and their SHA-256."""

    name: str
    target: TensorSpan
    source: TensorSpan
    sha256: str


@contextmanager
def _disk_errors(doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise UserError(f"{doing}: disk full; nothing was changed, make room and run it again") from error
        raise UserError(f"{doing}: {error.filename or 'input/output'}: {error.strerror or error}") from error


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target``; whatever is still there at the end is removed."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    """Flush a file to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _as_on_disk(name: str, tensor: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Cast to the dtype of ``original``, contiguous and on the CPU."""
    import torch

    if not (tensor.is_floating_point() and original.is_floating_point()):
        raise ValueError(f"{name}: only floating-point tensors can be patched, not {tensor.dtype} on {original.dtype}")
    cast = torch.empty(original.shape, dtype=original.dtype).copy_(tensor.detach())
    if tensor.float().isfinite().all() and not cast.float().isfinite().all():
        raise UserError(f"{name}: the new weights overflow {original.dtype}, the dtype on the disk: train more gently")
    return cast


def write_patch(
    folder: Path,
    base: Path,
    changed: Mapping[str, torch.Tensor],
    base_model: str,
    provenance: Mapping[str, Any],
    *,
    keep_original: bool = True,
    below: Sequence[Patch] = (),
) -> Patch:
    """Write the patch that turns ``base``, with the patches ``below``, into the model with ``changed`` in place.

    Args:
        folder: where to; a patch that is already there is replaced.
        base: checkpoint folder with the weights before.
        changed: on-disk tensor name -> new value, any float dtype, cast to the dtype on the disk. Tensors whose
            bytes then equal the base's are left out, possibly all of them.
        base_model: what the user calls the base (hub id or path), for people to read.
        provenance: any JSON.
        keep_original: also write the tensors before, which still hold the forgotten knowledge.
        below: the patches it stands on, the earliest first, all of them.

    Raises:
        UserError: ``base`` is not a sound safetensors checkpoint, values overflow its dtype, or the disk is full.
        ValueError: a tensor that the base does not have, or with another shape or a dtype that is not float.
    """
    from safetensors import safe_open

    laid = laid_over(below)
    spans = {name: laid.get(name, span) for name, span in tensor_spans(base, changed).items()}
    new: dict[str, torch.Tensor] = {}
    changes: dict[str, TensorChange] = {}
    for name, tensor in sorted(changed.items()):
        span = spans.get(name)
        if span is None or span.shape != tuple(tensor.shape):
            raise ValueError(f"{name}: the base has {span and span.shape}, the change has {tuple(tensor.shape)}")
        with safe_open(base / span.file, framework="pt") as handle:
            original = handle.get_tensor(name)
        cast = _as_on_disk(name, tensor, original)
        before, after = (hashlib.sha256(_raw(t)).hexdigest() for t in (original, cast))
        if before != after:
            new[name] = cast
            changes[name] = TensorChange(span.dtype, span.shape, before, after)

    like = {name: spans[name] for name in changes}
    files = [PATCH_FILE, DOCUMENT_FILE]  # the document goes last: without it there is no patch
    with _disk_errors(f"cannot write the patch {folder}"), _staging(folder) as staged:
        digest = write_safetensors(staged / PATCH_FILE, like, lambda name: [_raw(new[name])])
        if keep_original:
            write_safetensors(staged / ORIGINAL_FILE, like, lambda name: iter_bytes(base, like[name]))
            files.insert(0, ORIGINAL_FILE)
        ancestry = tuple(Ancestor(patch.id, str(patch.folder.resolve()), patch.changes) for patch in below)
        write_json(staged / DOCUMENT_FILE, _Document(1, base_model, digest, changes, dict(provenance), ancestry))
        folder.mkdir(exist_ok=True)
        for file in (DOCUMENT_FILE, PATCH_FILE, ORIGINAL_FILE):
            (folder / file).unlink(missing_ok=True)
        for file in files:
            (staged / file).replace(folder / file)
    return read_patch(folder)


def laid_over(patches: Sequence[Patch]) -> dict[str, TensorSpan]:
    """Where the tensors are that patches lay on their base, the earliest first; ``file`` is absolute."""
    found: dict[str, TensorSpan] = {}
    for patch in patches:
        path = (patch.folder / PATCH_FILE).resolve()
        found |= {name: replace(span, file=str(path)) for name, span in _stored_spans(path, patch.tensors).items()}
    return found


def _stored_spans(path: Path, tensors: Mapping[str, TensorChange]) -> dict[str, TensorSpan]:
    """Spans of a file of the patch, which must hold exactly the tensors of patch.json."""
    spans = file_spans(path)
    listed = {name: (change.dtype, change.shape) for name, change in tensors.items()}
    if {name: (span.dtype, span.shape) for name, span in spans.items()} != listed:
        raise UserError(f"{path}: does not hold the tensors that {DOCUMENT_FILE} lists: get the patch again")
    return spans


def read_patch(folder: Path) -> Patch:
    """Read a patch and check that it is whole.

    Raises:
        UserError: no patch here, or one that is malformed, truncated or altered.
    """
    path = folder / DOCUMENT_FILE
    try:
        document = TypeAdapter(_Document).validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); a patch is a folder with this file") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: not a patch of format 1: {key + ': ' if key else ''}{first['msg']}") from error
    weights = folder / PATCH_FILE
    _stored_spans(weights, document.tensors)
    with _disk_errors(f"cannot read {weights}"), weights.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != document.patch_sha256:
        raise UserError(f"{weights}: was altered, its SHA-256 is not the one in {DOCUMENT_FILE}: get the patch again")
    return Patch(folder, document.base_model, document.tensors, document.provenance, digest, document.ancestry)


def _compare(patch: Patch, model: Path, spans: Mapping[str, TensorSpan]) -> VerifyReport:
    mismatches: list[Mismatch] = []
    at_base: list[str] = []
    at_patched: list[str] = []
    for name, change in patch.tensors.items():
        span = spans.get(name)
        if span is None:
            mismatches.append(Mismatch(name, "missing"))
        elif span.dtype != change.dtype:
            mismatches.append(Mismatch(name, "dtype"))
        elif span.shape != change.shape:
            mismatches.append(Mismatch(name, "shape"))
        else:
            digest = sha256_of(model, span)
            if digest == change.sha256_before:
                at_base.append(name)
            elif digest == change.sha256_after:
                at_patched.append(name)
            else:
                mismatches.append(Mismatch(name, "hash"))
    state: Literal["base", "patched", "mixed", "other"] = "base"
    if mismatches:
        state = "other"
    elif at_patched:
        state = "mixed" if at_base else "patched"
    return VerifyReport(state, tuple(mismatches), tuple(at_base), tuple(at_patched))


def _level_below(patch: Patch, model: Path, spans: Mapping[str, TensorSpan], found: VerifyReport) -> int | None:
    """How many of the patches below ``patch`` lie on the model, from the first on; None where it is of another line."""
    known = {name: patch.tensors[name].sha256_before for name in (*found.at_base, *found.at_patched)}

    def digest(name: str) -> str | None:
        return known.get(name) or (sha256_of(model, spans[name]) if name in spans else None)

    return level([ancestor.tensors for ancestor in patch.ancestry], digest)


def verify_patch(patch: Patch, model: Path) -> VerifyReport:
    """Say whether the checkpoint in ``model`` is the patch's base or its result; only its tensors are looked at.

    Raises:
        UserError: ``model`` is not a sound safetensors checkpoint.
    """
    spans = tensor_spans(model)
    found = _compare(patch, model, spans)
    there = _level_below(patch, model, spans, found)
    if there is not None and there < len(patch.ancestry):
        return replace(found, lacks=patch.ancestry[there])
    if there is None and found.state == "base":  # the line ends below: its own tensors are not all that counts
        last = {name: after for ancestor in patch.ancestry for name, (_, after) in ancestor.tensors.items()}
        strange = [name for name, after in last.items() if name not in spans or sha256_of(model, spans[name]) != after]
        mismatches = [Mismatch(name, "hash" if name in spans else "missing") for name in strange]
        return replace(found, state="other", mismatches=tuple(mismatches))
    return found


def _describe(report: VerifyReport, patch: Patch) -> str:
    first = report.mismatches[0]
    return (
        f"{len(report.mismatches)} of the patch's {len(patch.tensors)} tensors are not those of its base "
        f"'{patch.base_model}' (first: {first.name}, {first.reason})"
    )


def _files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[PurePosixPath]:
    """Relative names of all files under ``folder``, symbolic links followed.

    Raises:
        UserError: a broken link, a link back to a folder above, or something that is not a file.
    """
    here = folder.resolve()
    if here in above:
        raise UserError(f"{folder}: is a link to a folder above it: remove the link")
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            yield from (PurePosixPath(entry.name) / file for file in _files(entry, (*above, here)))
        elif entry.is_file():
            yield PurePosixPath(entry.name)
        else:
            raise UserError(f"{entry}: is a broken link or not a regular file: remove or mend it")


def _reflink(source: Path, target: Path) -> bool:
    if sys.platform != "linux":
        return False
    import fcntl

    with source.open("rb") as original, target.open("wb") as copy:
        try:
            fcntl.ioctl(copy.fileno(), _FICLONE, original.fileno())
        except OSError:
            return False  # another filesystem, or one that cannot
    return True


def _hard_link(source: Path, target: Path) -> bool:
    try:
        target.hardlink_to(source.resolve())
    except OSError:
        return False  # another filesystem, or one that cannot: a copy does as well
    return True


def _copy(source: Path, target: Path) -> Literal["reflinked", "copied"]:
    """Make ``target`` a file of its own with the bytes of ``source``."""
    if _reflink(source, target):
        return "reflinked"
    shutil.copyfile(source, target)
    return "copied"


def _edits(
    stored: Path, tensors: Mapping[str, TensorChange], digests: Mapping[str, str], spans: Mapping[str, TensorSpan]
) -> dict[str, list[_Edit]]:
    """Group what must be overwritten by the model's files."""
    sources = _stored_spans(stored, tensors)
    edits: dict[str, list[_Edit]] = defaultdict(list)
    for name, digest in digests.items():
        edits[spans[name].file].append(_Edit(name, spans[name], sources[name], digest))
    return edits


def _rewrite(shard: Path, target: Path, edits: Sequence[_Edit], folder: Path) -> int:
    """Make ``target`` a copy of ``shard`` with ``edits`` from files in ``folder``; return the bytes written."""
    written = target.stat().st_size if _copy(shard, target) == "copied" else 0
    with target.open("r+b") as handle:
        for edit in edits:
            handle.seek(edit.target.start)
            for chunk in iter_bytes(folder, edit.source):
                handle.write(chunk)
            written += edit.target.size
    for edit in edits:
        if sha256_of(target.parent, replace(edit.target, file=target.name)) != edit.sha256:
            raise UserError(
                f"{folder / edit.source.file}: '{edit.name}' is not what {DOCUMENT_FILE} says (SHA-256 differs): "
                f"get the patch again"
            )
    shutil.copymode(shard, target)
    _sync(target)
    return written


def _new_folder(out: Path, model: Path) -> Path:
    target, source = out.resolve(), model.resolve()
    if target.is_relative_to(source):
        raise UserError(f"{out}: is the model's own folder or inside it: give another folder")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{out}: is there already and not empty: give a new folder")
    return target


def _build(
    model: Path,
    out: Path,
    spans: Mapping[str, TensorSpan],
    edits: Mapping[str, Sequence[_Edit]],
    folder: Path,
    *,
    link: bool,
    laid: Sequence[Laid],
) -> ApplyReport:
    """Write a copy of ``model`` with ``edits`` from files in ``folder`` to ``out``, all of it or nothing.

    ``laid`` are the patches that are on the copy.
    """
    files = [file for file in _files(model) if str(file) != LEDGER_FILE]
    shards = {span.file for span in spans.values()}
    others = tuple(str(file) for file in files if file.suffix in _WEIGHT_SUFFIXES and str(file) not in shards)
    kinds: Counter[str] = Counter()
    written = 0
    with _staging(out) as staged:
        for file in files:
            source, target = model / file, staged / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if str(file) in edits:
                written += _rewrite(source, target, edits[str(file)], folder)
                kinds["rewritten"] += 1
            elif link and _hard_link(source, target):
                kinds["linked"] += 1
            else:
                kind = _copy(source, target)
                shutil.copymode(source, target)
                _sync(target)
                kinds[kind] += 1
                written += target.stat().st_size if kind == "copied" else 0
        write_ledger(staged, laid)
        staged.replace(out)
    return ApplyReport(
        files_rewritten=kinds["rewritten"],
        files_copied=kinds["copied"],
        bytes_written=written,
        files_linked=kinds["linked"],
        files_reflinked=kinds["reflinked"],
        other_weights=others,
    )


def apply_patch(patch: Patch, base: Path, out: Path, *, link: bool = False) -> ApplyReport:
    """Write the patched model to ``out``: a complete checkpoint with every file of ``base``.

    Shards without changed tensors and all other files are taken over bit for bit (reflinks where the filesystem
    can). ``out`` appears in one step when everything is written and checked.

    Args:
        patch: from :func:`read_patch` or :func:`write_patch`.
        base: checkpoint folder; links in it, as in the hub's cache, are followed.
        out: a folder that does not exist or is empty, outside ``base``.
        link: hard-link the untouched files where possible. Whoever later writes into one of those in place
            changes the base too.

    Raises:
        UserError: not the patch's base or already patched, a patch below it is not there or another one is,
            ``out`` in use, the patch altered, the disk full.
    """
    with _disk_errors(f"cannot write {out}"):
        spans = tensor_spans(base)
        target = _new_folder(out, base)
        report = _compare(patch, base, spans)
        if report.state == "patched":
            raise UserError(f"{base}: is already patched: nothing to apply")
        there = _level_below(patch, base, spans, report)
        if there is not None and there < len(patch.ancestry):
            raise UserError(
                f"{base}: lacks the patch {patch.ancestry[there]}, on which {patch.folder} stands: apply that first, "
                "or all that is lacking at once with --stack"
            )
        if report.state == "mixed":
            raise UserError(
                f"{base}: is patched in part ({len(report.at_patched)} of {len(patch.tensors)} tensors, first: "
                f"{report.at_patched[0]}): revert it first, or give the base '{patch.base_model}'"
            )
        if report.state == "other":
            raise UserError(f"{base}: wrong base: {_describe(report, patch)}")
        if there is None:
            raise UserError(
                f"{base}: wrong base: what the patches changed on which {patch.folder} stands is there neither as they "
                f"left it nor as in the base '{patch.base_model}'"
            )
        laid = _laid_below(patch, base)
        digests = {name: change.sha256_after for name, change in patch.tensors.items()}
        edits = _edits(patch.folder / PATCH_FILE, patch.tensors, digests, spans)
        return _build(base, target, spans, edits, patch.folder, link=link, laid=(*laid, _as_laid(patch)))


def _as_laid(patch: Patch) -> Laid:
    return Laid(patch.id, str(patch.folder.resolve()))


def _laid_below(patch: Patch, base: Path) -> tuple[Laid, ...]:
    """The patches on ``base``, which must be those that ``patch`` stands on as far as there is a list."""
    listed = read_ledger(base)
    expected = [ancestor.id for ancestor in patch.ancestry]
    other = next((laid for laid in listed if laid.id not in expected), None)
    if other is not None:
        raise UserError(
            f"{base}: has the patch {other}, on which {patch.folder} does not stand: run its request again with "
            f"--after {other.folder}"
        )
    return listed or tuple(Laid(ancestor.id, ancestor.folder) for ancestor in patch.ancestry)


def apply_stack(patches: Sequence[Patch], base: Path, out: Path, *, link: bool = False) -> ApplyReport:
    """Write the model with all of ``patches`` to ``out``; what already lies on ``base`` is left out.

    Args:
        patches: a patch with all that it stands on, the earliest first.
        base: checkpoint folder: the base, alone or with the first of the patches.
        out: a folder that does not exist or is empty, outside ``base``.
        link: as :func:`apply_patch`.

    Raises:
        UserError: as :func:`apply_patch`.
    """
    with _disk_errors(f"cannot write {out}"):
        spans = tensor_spans(base)
        target = _new_folder(out, base)
        there = level(
            [patch.changes for patch in patches], lambda name: sha256_of(base, spans[name]) if name in spans else None
        )
        if there is None:
            raise UserError(
                f"{base}: wrong base: its tensors are neither those of '{patches[0].base_model}', for which "
                f"{patches[0].folder} was made, nor those that it or a patch above it left"
            )
        if there == len(patches):
            raise UserError(f"{base}: is already patched: nothing to apply")
        sources = laid_over(patches[there:])
        after = {name: change.sha256_after for patch in patches[there:] for name, change in patch.tensors.items()}
        edits: dict[str, list[_Edit]] = defaultdict(list)
        for name, digest in after.items():
            edits[spans[name].file].append(_Edit(name, spans[name], sources[name], digest))
        laid = (*(read_ledger(base) or map(_as_laid, patches[:there])), *map(_as_laid, patches[there:]))
        return _build(base, target, spans, edits, patches[-1].folder, link=link, laid=laid)


def _rewrite_in_place(model: Path, edits: Mapping[str, Sequence[_Edit]], folder: Path) -> ApplyReport:
    """Replace every shard in ``edits``: all are written and checked under temporary names before the first rename."""
    written = 0
    with ExitStack() as cleanup:
        ready: list[tuple[Path, Path]] = []
        for file, changes in edits.items():
            shard = model / file
            temporary = shard.with_name(f".{shard.name}.{os.getpid()}.tmp")
            cleanup.callback(temporary.unlink, missing_ok=True)
            written += _rewrite(shard, temporary, changes, folder)
            ready.append((temporary, shard))
        for temporary, shard in ready:
            temporary.replace(shard)
    return ApplyReport(
        files_rewritten=len(edits), files_copied=0, bytes_written=written, files_linked=0, files_reflinked=0
    )


def revert_patch(patch: Patch, model: Path, out: Path | None) -> ApplyReport:
    """Give back the base model, bit for bit, from the patched one.

    In place, each shard is replaced by renaming, so links to it (hub cache, ``link=True``) are not written through.
    A model patched in part, as an interrupted revert in place leaves it, is brought back as well. Only the last patch
    on a model can be taken back: those above it were trained on what it left.

    Args:
        patch: must still have ``original.safetensors``.
        model: checkpoint folder in the patched state.
        out: a folder that does not exist or is empty, outside ``model``; None reverts in place.

    Raises:
        UserError: no original tensors in the patch, ``model`` is the base already or another model, other patches
            stand on this one, ``out`` in use, the disk full.
    """
    with _disk_errors(f"cannot revert {model}"):
        listed = read_ledger(model)
        last = bool(listed) and listed[-1].id == patch.id
        above = listed[[laid.id for laid in listed].index(patch.id) + 1 :] if patch.id in map(_id, listed) else ()
        if above:
            raise UserError(
                f"{model}: {patch.folder} is not the last patch on it: {' and '.join(map(str, above))} "
                f"{'stand' if len(above) > 1 else 'stands'} on it and would be left on weights never seen in training; "
                "revert from the last one down, or make the later ones again without this one with --recompute"
            )
        below = listed[:-1] if last else listed
        original = patch.folder / ORIGINAL_FILE
        if not patch.holds_original:
            raise UserError(
                f"{original}: is not there, so the patch cannot be reverted: use a copy of the base "
                f"'{patch.base_model}' instead"
            )
        spans = tensor_spans(model)
        target = out and _new_folder(out, model)
        report = _compare(patch, model, spans)
        if report.state == "base" and not last:
            raise UserError(f"{model}: is the base already: nothing to revert")
        if report.state == "other":
            raise UserError(f"{model}: not a model with this patch: {_describe(report, patch)}")
        digests = {name: patch.tensors[name].sha256_before for name in report.at_patched}
        edits = _edits(original, patch.tensors, digests, spans)
        if target is None:
            done = _rewrite_in_place(model, edits, patch.folder)
            write_ledger(model, below)
            return done
        return _build(model, target, spans, edits, patch.folder, link=False, laid=below)


def _id(laid: Laid) -> str:
    return laid.id
