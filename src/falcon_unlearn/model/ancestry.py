"""What a patch stands on: the patches below it, how far a checkpoint has got with them, and the list it carries.

A patch that was made with ``--after`` is relative to the model below it: its own tensors are whole, but they were
trained on the base with all earlier patches, and are of no use without them. ``patch.json`` therefore names those
patches in order, each by an id that covers its own content and everything below it, as commits do. A checkpoint on
which two or more patches lie carries :data:`LEDGER_FILE`, so that taking one out of the middle can be refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from falcon_unlearn.artifacts import write_json
from falcon_unlearn.errors import UserError

LEDGER_FILE = "unlearning.json"
"""In a patched checkpoint: the patches that lie on it, the earliest first; only there from the second one on."""

SHORT = 12
"""Digits of an id that people are shown."""


@dataclass(frozen=True)
class Ancestor:
    """A patch below another one.

    Attributes:
        id: of the patch (:func:`patch_id`).
        folder: where it was, absolute.
        tensors: on-disk name -> SHA-256 (hex) before and after it.
    """

    id: str
    folder: str
    tensors: Mapping[str, tuple[str, str]]

    def __str__(self) -> str:
        return f"{self.id[:SHORT]} ({self.folder})"


@dataclass(frozen=True)
class Laid:
    """A patch that lies on a checkpoint: its id and where it was when it was applied."""

    id: str
    folder: str

    def __str__(self) -> str:
        return f"{self.id[:SHORT]} ({self.folder})"


def patch_id(
    patch_sha256: str, tensors: Mapping[str, tuple[str, str]], ancestry: Sequence[Ancestor], data: Mapping[str, str]
) -> str:
    """SHA-256 (hex) of what a patch is: its file, its tensors before and after, its data, the ids below it.

    Args:
        patch_sha256: of the file of changed tensors.
        tensors: on-disk name -> SHA-256 before and after.
        ancestry: the patches below, the earliest first.
        data: SHA-256 of the records it was made with, by domain.
    """
    parts = [patch_sha256, sorted(tensors.items()), [ancestor.id for ancestor in ancestry], sorted(data.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def level(chain: Sequence[Mapping[str, tuple[str, str]]], digest: Callable[[str], str | None]) -> int | None:
    """How many of the patches of ``chain``, from the first on, lie on a model; None where it is not of this line.

    Args:
        chain: of each patch, the earliest first: tensor -> SHA-256 before and after.
        digest: tensor -> its SHA-256 in the model, None where it has no such tensor.
    """
    states: list[dict[str, str]] = [{}]
    for tensors in reversed(chain):  # as the base has it: before the first patch that touches it
        states[0] |= {name: before for name, (before, _) in tensors.items()}
    for tensors in chain:
        states.append({**states[-1], **{name: after for name, (_, after) in tensors.items()}})
    found = {name: digest(name) for name in states[0]}
    return next((number for number in reversed(range(len(states))) if states[number] == found), None)


def read_ledger(model: Path) -> tuple[Laid, ...]:
    """The patches that a checkpoint says lie on it, the earliest first; empty without a list.

    Raises:
        UserError: the list is damaged.
    """
    path = model / LEDGER_FILE
    if not path.is_file():
        return ()
    try:
        plain = json.loads(path.read_bytes())
        return TypeAdapter(tuple[Laid, ...]).validate_python(plain["patches"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise UserError(
            f"{path}: is not a list of the patches on this model: put it back as it was, or make the model again "
            "from its base (falcon-unlearn patch apply --stack)"
        ) from error


def write_ledger(model: Path, laid: Sequence[Laid]) -> None:
    """Write the list of a checkpoint, or remove it where fewer than two patches lie on it."""
    if len(laid) > 1:
        write_json(model / LEDGER_FILE, {"patches": laid})
    else:
        (model / LEDGER_FILE).unlink(missing_ok=True)
