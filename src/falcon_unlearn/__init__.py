"""Make a language model forget, and show that it did.

>>> from falcon_unlearn import apply_patch, load_recipe, unlearn
>>> run = unlearn(load_recipe("people.yaml"))  # doctest: +SKIP
>>> run.metrics["after"].forget_accuracy       # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from falcon_unlearn.api import apply_patch, load_recipe, revert_patch, select_layers, unlearn, verify_patch
    from falcon_unlearn.errors import UserError
    from falcon_unlearn.pipeline import Run
    from falcon_unlearn.recipe import Recipe

__version__ = _version("falcon-unlearn")

# Resolved on first use, so that importing the package does not import torch.
_PUBLIC = {
    "Recipe": "falcon_unlearn.recipe",
    "Run": "falcon_unlearn.pipeline",
    "UserError": "falcon_unlearn.errors",
    "apply_patch": "falcon_unlearn.api",
    "load_recipe": "falcon_unlearn.api",
    "revert_patch": "falcon_unlearn.api",
    "select_layers": "falcon_unlearn.api",
    "unlearn": "falcon_unlearn.api",
    "verify_patch": "falcon_unlearn.api",
}

__all__ = [
    "Recipe",
    "Run",
    "UserError",
    "apply_patch",
    "load_recipe",
    "revert_patch",
    "select_layers",
    "unlearn",
    "verify_patch",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'falcon_unlearn' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
