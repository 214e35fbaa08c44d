"""Who may write into an output folder: an empty one, one to go on in, or one whose contents are ours to replace."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from falcon_unlearn.artifacts import write_bytes
from falcon_unlearn.errors import UserError

_UNNAMED = re.compile(r"\.(?P<name>.+)\.(?P<by>[0-9a-f]{12}|\d+|partial)\.tmp")
_TRIAL = re.compile(r"\.trial\w+\.tmp")
_SAFETENSORS = re.compile(r"\.tmp[0-9A-Za-z]{6}")
"""What safetensors (0.8 and above) writes to before it gives a file its name, ours being temporary too."""


def open_output(
    path: Path,
    marker: str,
    *,
    what: str,
    is_ours: Callable[[Path], bool],
    settings: Mapping[str, Any],
    not_compared: Sequence[str],
    resume: bool,
    overwrite: bool,
    allowed: Sequence[str] = (),
) -> None:
    """Make an output folder ready, without writing anything but the folder itself.

    Temporary files of a process that was killed count as nothing, and are removed: of several processes, one opens.

    Args:
        path: the folder.
        marker: the file by which one of ours is known.
        what: what is kept there ("run"), for messages.
        is_ours: whether a name relative to the folder is something we write; nothing else is ever removed.
        settings: what ``marker`` must hold for a folder to be gone on with.
        not_compared: dotted keys of the settings that may differ.
        resume: go on in the folder.
        overwrite: remove what stands there.
        allowed: names that may already stand there; they are never removed.

    Raises:
        UserError: the folder is not empty, is no folder, cannot be created, or holds something else.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"output: {path} is a file; name a folder")
    left = _left_by_a_kill(path, is_ours)
    everything = sorted(p.name for p in path.iterdir() if p not in left) if path.is_dir() else []
    if everything and marker not in everything:
        raise UserError(
            f"output: {path} is not empty and holds no {what} (but '{everything[0]}'); choose another folder"
        )
    present = [name for name in everything if name not in allowed]
    if present and overwrite:
        _remove(path, present, what, is_ours)
    elif present and not resume:
        raise UserError(f"output: {path} is not empty; go on there with --resume, replace it with --overwrite")
    elif present:
        _refuse_another(path / marker, what, settings, not_compared)
    for entry in left:
        _remove_one(entry)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: {path} cannot be created ({error.strerror})") from error


def begin_output(
    path: Path,
    marker: str,
    *,
    what: str,
    is_ours: Callable[[Path], bool],
    settings: Mapping[str, Any],
    not_compared: Sequence[str],
    resume: bool,
    overwrite: bool,
) -> None:
    """:func:`open_output`, with ``settings`` written to ``marker`` as YAML."""
    open_output(
        path,
        marker,
        what=what,
        is_ours=is_ours,
        settings=settings,
        not_compared=not_compared,
        resume=resume,
        overwrite=overwrite,
    )
    write_bytes(path / marker, yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True).encode())


def _remove(path: Path, present: Sequence[str], what: str, is_ours: Callable[[Path], bool]) -> None:
    entries = [entry for name in present for entry in (path / name, *(path / name).rglob("*"))]
    names = [entry.relative_to(path) for entry in entries]
    foreign = next((name for name in names if not (is_ours(name) or is_temporary(name))), None)
    if foreign is not None:
        raise UserError(
            f"output: {path} holds '{foreign.as_posix()}', which no {what} wrote; --overwrite leaves it alone"
        )
    for name in present:
        _remove_one(path / name)


def _remove_one(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _left_by_a_kill(path: Path, is_ours: Callable[[Path], bool]) -> set[Path]:
    """What writing left behind where it was killed, and no later run reads.

    The partial scores of a suite are read until the whole file is there.
    """
    found = set()
    for entry in path.rglob(".*tmp*"):
        if _TRIAL.fullmatch(entry.name) or _SAFETENSORS.fullmatch(entry.name):
            found.add(entry)
        elif (match := _UNNAMED.fullmatch(entry.name)) is not None:
            whole = entry.with_name(match["name"])
            if is_ours(whole.relative_to(path)) and (match["by"] != "partial" or whole.exists()):
                found.add(entry)
    return found


def is_temporary(path: Path) -> bool:
    """Whether a name is one that unfinished writing leaves behind."""
    return any(
        (part.startswith(".") and part.endswith(".tmp")) or _SAFETENSORS.fullmatch(part) is not None
        for part in path.parts
    )


def _refuse_another(file: Path, what: str, settings: Mapping[str, Any], not_compared: Sequence[str]) -> None:
    try:
        earlier = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        earlier = None
    if not isinstance(earlier, Mapping):
        raise UserError(f"{file}: damaged, so the {what} cannot be resumed; use --overwrite or another folder")
    changed = [key for key in _differing(earlier, settings, not_compared) if key not in not_compared]
    if changed:
        other = "a run of another recipe" if what == "run" else f"another {what}"
        raise UserError(
            f"output: {file.parent} holds {other} ({', '.join(changed)} differ); use --overwrite or another folder"
        )


def _differing(left: Any, right: Any, ignored: Sequence[str], prefix: str = "") -> list[str]:
    """Dotted keys at which two settings differ, ``ignored`` ones left out."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        keys = dict.fromkeys((*left, *right))
        return [
            name
            for key in keys
            if f"{prefix}{key}" not in ignored
            for name in _differing(left.get(key), right.get(key), ignored, f"{prefix}{key}.")
        ]
    return [] if left == right else [prefix.rstrip(".")]
