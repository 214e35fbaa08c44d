"""The state of a training run in one safetensors file, replaced atomically: no pickle, nothing half-written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from falcon_unlearn.artifacts import replacing
from falcon_unlearn.engine.optimizers import restore_state, state_tensors
from falcon_unlearn.errors import UserError


@dataclass(frozen=True)
class Progress:
    """Number of finished steps, and the records per forward pass that memory was found to suffice for."""

    step: int
    micro_batch_size: int


def save_checkpoint(
    path: Path, progress: Progress, fingerprint: str, masters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Write masters and optimiser state.

    Args:
        path: file to replace.
        progress: how far training is.
        fingerprint: hash of everything that must be equal to go on from here.
        masters: trained tensors, in the order the optimiser got them.
        optimizer: from :func:`falcon_unlearn.engine.optimizers.build_optimizer`.

    Raises:
        UserError: the disk is full.
    """
    tensors = {f"master/{name}": value.detach().cpu().contiguous() for name, value in masters.items()}
    for name, parameter in masters.items():
        for key, value in state_tensors(optimizer, parameter).items():
            tensors[f"optimizer/{key}/{name}"] = value.cpu().contiguous()
    state = {**dataclasses.asdict(progress), "fingerprint": fingerprint}
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"state": json.dumps(state)})
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be written ({error}): free some space and go on with --resume") from error


def load_checkpoint(
    path: Path, fingerprint: str, masters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> Progress:
    """Put a saved state into ``masters`` and ``optimizer``; return how far it was.

    Raises:
        UserError: the file is damaged or belongs to another recipe, model or corpus.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            state = json.loads((handle.metadata() or {})["state"])
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (not a mapping)
        progress, found = Progress(int(state["step"]), int(state["micro_batch_size"])), state["fingerprint"]
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{path}: not a usable checkpoint ({error}); start again with --overwrite") from error
    if found != fingerprint:
        raise UserError(f"{path}: belongs to a run with another recipe, model or data; start again with --overwrite")
    for name, parameter in masters.items():
        value = tensors.get(f"master/{name}")
        if value is None or value.shape != parameter.shape:
            raise UserError(f"{path}: not a usable checkpoint (no {name} in it); start again with --overwrite")
    with torch.no_grad():
        for name, parameter in masters.items():
            parameter.copy_(tensors[f"master/{name}"])
    for name, parameter in masters.items():
        saved = {
            key.split("/", 2)[1]: value
            for key, value in tensors.items()
            if key.startswith("optimizer/") and key.split("/", 2)[2] == name
        }
        restore_state(optimizer, parameter, saved)
    return progress
