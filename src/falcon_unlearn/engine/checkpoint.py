"""The state of a training run in one safetensors file, replaced atomically: no pickle, nothing half-written.

The newest state is in ``checkpoint.safetensors``, those before it in ``checkpoint.1.safetensors`` and so on. Each
carries a hash of its own content, so that a damaged one is known and the one before it is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
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


class DamagedCheckpointError(UserError):
    """A file is no whole state; ``found`` says so without saying what to do."""

    def __init__(self, path: Path, reason: object) -> None:
        self.found = f"{path}: not a usable checkpoint ({reason})"
        super().__init__(f"{self.found}; start again with --overwrite")


def checkpoint_files(path: Path) -> list[Path]:
    """The kept states that are there, the newest first; ``path`` is where the newest goes."""
    pattern = re.compile(rf"{re.escape(path.stem)}(?:\.(\d+))?{re.escape(path.suffix)}")
    found = {int(match[1] or 0): file for file in path.parent.glob("*") if (match := pattern.fullmatch(file.name))}
    return [found[age] for age in sorted(found)]


def _make_room(path: Path, keep: int) -> None:
    """Age the kept states by one, so that ``path`` is free; the ``keep`` - 1 newest of them stay."""

    def aged(age: int) -> Path:
        return path.with_name(f"{path.stem}.{age}{path.suffix}") if age else path

    for age in range(keep - 2, -1, -1):  # the oldest first: whenever this is cut off, the newest is still there
        if aged(age).exists():
            aged(age).replace(aged(age + 1))


def _digest(state: Mapping[str, object], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of all that a checkpoint holds."""
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_checkpoint(
    path: Path,
    progress: Progress,
    fingerprint: str,
    masters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    keep: int = 1,
) -> None:
    """Write masters and optimiser state.

    Args:
        path: file of the newest state.
        progress: how far training is.
        fingerprint: hash of everything that must be equal to go on from here.
        masters: trained tensors, in the order the optimiser got them.
        optimizer: from :func:`falcon_unlearn.engine.optimizers.build_optimizer`.
        keep: states on the disk, this one included.

    Raises:
        UserError: the disk is full.
    """
    tensors = {f"master/{name}": value.detach().cpu().contiguous() for name, value in masters.items()}
    for name, parameter in masters.items():
        for key, value in state_tensors(optimizer, parameter).items():
            tensors[f"optimizer/{key}/{name}"] = value.cpu().contiguous()
    state = {**dataclasses.asdict(progress), "fingerprint": fingerprint}
    metadata = {"state": json.dumps({**state, "sha256": _digest(state, tensors)})}
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
            _make_room(path, keep)
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be written ({error}): free some space and go on with --resume") from error


def load_checkpoint(
    path: Path, fingerprint: str, masters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> Progress:
    """Put a saved state into ``masters`` and ``optimizer``; return how far it was.

    Raises:
        DamagedCheckpointError: the file is cut off, altered or no checkpoint.
        UserError: it belongs to another recipe, model or corpus.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            state = json.loads((handle.metadata() or {})["state"])
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (not a mapping)
        progress, found = Progress(int(state["step"]), int(state["micro_batch_size"])), state["fingerprint"]
        written = state.pop("sha256")
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise DamagedCheckpointError(path, error) from error
    if written != _digest(state, tensors):
        raise DamagedCheckpointError(path, "its content is not what was written")
    if found != fingerprint:
        raise UserError(f"{path}: belongs to a run with another recipe, model or data; start again with --overwrite")
    for name, parameter in masters.items():
        value = tensors.get(f"master/{name}")
        if value is None or value.shape != parameter.shape:
            raise DamagedCheckpointError(path, f"no {name} in it")
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


def load_newest(
    path: Path,
    fingerprint: str,
    masters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    say: Callable[[str], None],
) -> Progress | None:
    """:func:`load_checkpoint` of the newest kept state that is whole; damaged newer ones are removed.

    Args:
        path: file of the newest state.
        fingerprint: as it was saved with.
        masters: trained tensors to overwrite.
        optimizer: its state is overwritten.
        say: told of each damaged file.

    Returns:
        How far it was, or None where there is no state at all.

    Raises:
        UserError: all of them are damaged, or the newest whole one belongs to another recipe, model or corpus.
    """
    files = checkpoint_files(path)
    for position, file in enumerate(files):
        try:
            progress = load_checkpoint(file, fingerprint, masters, optimizer)
        except DamagedCheckpointError as error:
            if file == files[-1]:
                raise
            say(f"{error.found}; trying the one before it, {files[position + 1].name}")
            continue
        for damaged in files[:position]:  # only now that another is whole, and before they age and push it out
            damaged.unlink(missing_ok=True)
        return progress
    return None
