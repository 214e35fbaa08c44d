"""A base model with patches laid on it in memory: no patched checkpoint is written."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from falcon_unlearn.errors import UserError
from falcon_unlearn.model.disk_names import TORCH_DTYPES, to_disk
from falcon_unlearn.model.loading import ModelSource, load_causal_lm
from falcon_unlearn.model.patch import PATCH_FILE, Patch, apply_patch, read_patch
from falcon_unlearn.model.shards import sha256_of, tensor_spans

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_patches(source: ModelSource, folders: Sequence[Path]) -> tuple[Patch, ...]:
    """Read patches that stand one on another, and check them against the checkpoint and each other.

    Args:
        source: the base, its weights fetched.
        folders: patch folders, the earliest first.

    Raises:
        UserError: a patch is damaged, or was not made for this base with the patches before it.
    """
    patches = tuple(read_patch(folder) for folder in folders)
    spans = tensor_spans(source.folder) if patches else {}
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
    return patches


def parameter_names(patch: Patch, model: PreTrainedModel) -> dict[str, str]:
    """Name on disk -> name of the parameter in ``model``.

    Raises:
        UserError: a tensor of the patch is part of another one in memory (fused experts).
    """
    parameters = dict(model.named_parameters())
    prefix = f"{model.base_model_prefix}."
    names = {}
    for stored in patch.tensors:
        candidates = (stored, prefix + stored, stored.removeprefix(prefix))
        found = next((name for name in candidates if name in parameters), None)
        if found is None or list(to_disk(model, {found: parameters[found]}, patch.tensors)) != [stored]:
            raise UserError(
                f"patch {patch.folder}: {stored} has no tensor of its own in this {type(model).__name__}; "
                "apply the patch to the checkpoint folder instead (falcon-unlearn patch apply)"
            )
        names[stored] = found
    return names


def _copy_into(patch: Patch, model: PreTrainedModel, names: Mapping[str, str]) -> None:
    from safetensors.torch import load_file

    values = load_file(patch.folder / PATCH_FILE)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for stored, name in names.items():
            parameters[name].copy_(values[stored])


def load_patched(source: ModelSource, patches: Sequence[Patch]) -> PreTrainedModel:
    """Load the base and lay patches from :func:`read_patches` on it.

    In memory, where every patched tensor is one there too. Where it is part of another (fused experts), by way of a
    checkpoint of hard links in a temporary folder, in which only the touched files are new.

    Raises:
        UserError: the base cannot be loaded, or the disk is full.
    """
    model = load_causal_lm(source)
    try:
        names = [parameter_names(patch, model) for patch in patches]
    except UserError:
        del model
        return _load_by_links(source, patches)
    for patch, found in zip(patches, names, strict=True):
        _copy_into(patch, model, found)
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


def apply_in_memory(patch: Patch, model: PreTrainedModel) -> None:
    """Lay a patch on a loaded model, whose tensors, rounded to the checkpoint's dtype, must be the patch's base.

    Raises:
        UserError: they are not, or a tensor cannot be patched in memory; nothing was changed then.
    """
    names = parameter_names(patch, model)
    parameters = dict(model.named_parameters())
    for stored, name in names.items():
        change, value = patch.tensors[stored], parameters[name].detach().cpu().contiguous()
        if tuple(value.shape) != tuple(change.shape):
            raise UserError(f"patch {patch.folder}: {stored} has shape {tuple(value.shape)}, not {change.shape}")
        stored_as = value.to(TORCH_DTYPES[change.dtype])
        digest = hashlib.sha256(stored_as.view(torch.uint8).numpy().tobytes()).hexdigest()
        if digest != change.sha256_before:
            raise UserError(f"patch {patch.folder}: {stored} of this model is not the one the patch was made for")
    _copy_into(patch, model, names)
