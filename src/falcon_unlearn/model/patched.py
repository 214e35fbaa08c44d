"""A base model with patches laid on it in memory: no patched checkpoint is written."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from falcon_unlearn.errors import UserError
from falcon_unlearn.model.ancestry import SHORT, Ancestor, level
from falcon_unlearn.model.disk_names import TORCH_DTYPES, to_disk
from falcon_unlearn.model.loading import ModelSource, fetch_files, load_causal_lm
from falcon_unlearn.model.patch import DOCUMENT_FILE, PATCH_FILE, Patch, apply_patch, read_patch
from falcon_unlearn.model.shards import sha256_of, tensor_files, tensor_spans

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_stack(folders: Sequence[Path]) -> tuple[Patch, ...]:
    """Read patches, each behind those it stands on.

    These are looked for among ``folders``, where they were when the patch was made, and in a folder of the same name
    beside the patch's.

    Args:
        folders: patch folders, the earliest first.

    Raises:
        UserError: a patch is damaged, or one that it stands on is not there or no longer the same.
    """
    given = [read_patch(folder) for folder in folders]
    stack: list[Patch] = []
    for patch in given:
        for ancestor in patch.ancestry:
            if ancestor.id not in [found.id for found in stack]:
                stack.append(_find(ancestor, patch, given))
        stack.append(patch)
    return tuple(stack)


def _find(ancestor: Ancestor, patch: Patch, given: Sequence[Patch]) -> Patch:
    named = next((other for other in given if other.id == ancestor.id), None)
    if named is not None:
        return named
    recorded = Path(ancestor.folder)
    beside = patch.folder.resolve().parents[1] / recorded.parent.name / recorded.name
    places = [place for place in (recorded, beside) if (place / DOCUMENT_FILE).is_file()]
    found = [read_patch(place) for place in places]
    same = next((other for other in found if other.id == ancestor.id), None)
    if same is not None:
        return same
    if found:
        raise UserError(
            f"patch {patch.folder}: stands on the patch {ancestor}, and what is there now is another one "
            f"({found[0].id[:SHORT]}): put the one of that time back"
        )
    raise UserError(
        f"patch {patch.folder}: stands on the patch {ancestor}, which is not there: put it back, or, where several "
        "patches can be named, name the folder it is in now before this one"
    )


def read_patches(source: ModelSource, folders: Sequence[Path]) -> tuple[Patch, ...]:
    """Read patches that stand one on another, and check them against the checkpoint and each other.

    Args:
        source: the base.
        folders: patch folders, the earliest first; what they stand on comes with them, unless it is on the base.

    Raises:
        UserError: a patch is damaged, one that it stands on is missing, or it was not made for this base with the
            patches before it.
    """
    stack = read_stack(folders)
    first = next((place for place, patch in enumerate(stack) if patch.folder in folders), 0)
    return fitting(source, stack, may_have=first)


def fitting(source: ModelSource, patches: Sequence[Patch], *, may_have: int = 0) -> tuple[Patch, ...]:
    """The patches of :func:`read_stack`, checked against the checkpoint and each other.

    Args:
        source: the base.
        patches: the earliest first.
        may_have: how many of them, from the first on, may lie on the base already; those that do are left out.

    Raises:
        UserError: a patch was not made for this base with the patches before it.
    """
    touched = {name for patch in patches for name in patch.tensors}
    files = tensor_files(source.folder) if patches else {}
    fetch_files(source, {files[name] for name in touched & set(files)})
    spans = tensor_spans(source.folder, touched) if patches else {}
    if may_have:
        below = [patch.changes for patch in patches[:may_have]]
        there = level(below, lambda name: sha256_of(source.folder, spans[name]) if name in spans else None)
        patches = patches[there or 0 :]
    current: dict[str, str] = {}
    for patch in patches:
        for name, change in patch.tensors.items():
            span = spans.get(name)
            if span is None or (span.dtype, span.shape) != (change.dtype, change.shape):
                raise UserError(f"patch {patch.folder}: {source.name} has no {name} of its shape and type")
            if name not in current:
                current[name] = sha256_of(source.folder, span)
            if current[name] != change.sha256_before:
                again = " (it is already patched)" if current[name] == change.sha256_after else ""
                raise UserError(
                    f"patch {patch.folder}: {name} of {source.name} is not the one the patch was made for{again}: "
                    f"give the base '{patch.base_model}' and every patch before this one, in order"
                )
            current[name] = change.sha256_after
    return tuple(patches)


def parameter_names(patch: Patch, model: PreTrainedModel, on_disk: Collection[str] | None = None) -> dict[str, str]:
    """Name on disk -> name of the parameter in ``model``, of the patch's tensors or of those in ``on_disk``.

    Raises:
        UserError: a tensor of the patch is part of another one in memory (fused experts).
    """
    parameters = dict(model.named_parameters())
    prefix = f"{model.base_model_prefix}."
    names = {}
    on_disk = patch.tensors if on_disk is None else on_disk
    for stored in on_disk:
        candidates = (stored, prefix + stored, stored.removeprefix(prefix))
        found = next((name for name in candidates if name in parameters), None)
        if found is None or list(to_disk(model, {found: parameters[found]}, on_disk)) != [stored]:
            raise UserError(
                f"patch {patch.folder}: {stored} has no tensor of its own in this {type(model).__name__}; "
                "apply the patch to the checkpoint folder instead (falcon-unlearn patch apply)"
            )
        names[stored] = found
    return names


def _copy_into(patch: Patch, model: PreTrainedModel, names: Mapping[str, str]) -> None:
    from safetensors import safe_open

    parameters = dict(model.named_parameters())
    with torch.no_grad(), safe_open(patch.folder / PATCH_FILE, framework="pt") as values:
        for stored, name in names.items():
            parameters[name].copy_(values.get_tensor(stored))


def load_patched(source: ModelSource, patches: Sequence[Patch]) -> PreTrainedModel:
    """Load the base and lay patches from :func:`read_patches` on it.

    In memory, where every patched tensor is one there too. Where it is part of another (fused experts), by way of a
    checkpoint of hard links in a temporary folder, in which only the touched files are new.

    Raises:
        UserError: the base cannot be loaded, or the disk is full.
    """
    patches, source = (*source.patches, *patches), dataclasses.replace(source, patches=())
    model = load_causal_lm(source)
    try:
        names = [parameter_names(patch, model) for patch in patches]
    except UserError:
        del model
        return _load_by_links(source, patches)
    done: set[str] = set()
    for patch, found in zip(reversed(patches), reversed(names), strict=True):  # of each tensor, the last value alone
        _copy_into(patch, model, {stored: name for stored, name in found.items() if stored not in done})
        done |= set(found)
    return model


def _load_by_links(source: ModelSource, patches: Sequence[Patch]) -> PreTrainedModel:
    with tempfile.TemporaryDirectory(prefix="falcon-unlearn-", dir=_near(source.folder)) as scratch:
        folder = source.folder
        for number, patch in enumerate(patches):
            apply_patch(patch, folder, Path(scratch) / str(number), link=True)
            folder = Path(scratch) / str(number)
        return load_causal_lm(dataclasses.replace(source, folder=folder, revision=None))


def _near(folder: Path) -> Path | None:
    """Beside the checkpoint, where hard links are possible, if one may write there."""
    return folder.parent if os.access(folder.parent, os.W_OK) else None


def _digest(value: Tensor, dtype: torch.dtype) -> str:
    stored_as = value.detach().cpu().contiguous().to(dtype)
    return hashlib.sha256(stored_as.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def _refuse_lacking(patch: Patch, model: PreTrainedModel) -> None:
    """Refuse a model without a patch below this one, as far as that changed tensors which this one leaves alone."""
    last = {name: ancestor for ancestor in patch.ancestry for name in ancestor.tensors if name not in patch.tensors}
    parameters = dict(model.named_parameters())
    for stored, name in parameter_names(patch, model, last).items():
        expected = last[stored].tensors[stored][1]
        if all(_digest(parameters[name], dtype) != expected for dtype in TORCH_DTYPES.values()):
            raise UserError(
                f"patch {patch.folder}: this model lacks the patch {last[stored]}, on which it stands: apply that first"
            )


def apply_in_memory(patch: Patch, model: PreTrainedModel) -> None:
    """Lay a patch on a loaded model, whose tensors, rounded to the checkpoint's dtype, must be the patch's base.

    Raises:
        UserError: they are not, or a tensor cannot be patched in memory; nothing was changed then.
    """
    names = parameter_names(patch, model)
    parameters = dict(model.named_parameters())
    _refuse_lacking(patch, model)
    for stored, name in names.items():
        change, value = patch.tensors[stored], parameters[name]
        if tuple(value.shape) != tuple(change.shape):
            raise UserError(f"patch {patch.folder}: {stored} has shape {tuple(value.shape)}, not {change.shape}")
        if _digest(value, TORCH_DTYPES[change.dtype]) != change.sha256_before:
            raise UserError(f"patch {patch.folder}: {stored} of this model is not the one the patch was made for")
    _copy_into(patch, model, names)
