"""The Python face of the command line: recipes in, runs out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_unlearn import pipeline
from falcon_unlearn import recipe as recipes
from falcon_unlearn.artifacts import LayerSelection
from falcon_unlearn.console import Console
from falcon_unlearn.errors import UserError
from falcon_unlearn.model import patch as patches
from falcon_unlearn.model.patched import apply_in_memory
from falcon_unlearn.pipeline import Run
from falcon_unlearn.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a YAML file or a mapping of the same shape.

    Args:
        source: file, or mapping; relative paths in a file start beside it, in a mapping from the current directory.
        overrides: ``"section.key=value"`` strings laid on top.

    Raises:
        UserError: one line per mistake, all at once.
    """
    if isinstance(source, Mapping):
        raw = recipes.apply_overrides(source, overrides)
        return recipes.with_absolute_paths(recipes.recipe_from(raw), Path.cwd())
    return recipes.load_recipe(Path(source), overrides)


def _recipe(source: Recipe | str | Path | Mapping[str, Any]) -> Recipe:
    return source if isinstance(source, Recipe) else load_recipe(source)


def unlearn(
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = True,
) -> Run:
    """Do the whole job of ``falcon-unlearn run``.

    Args:
        recipe: recipe, its file, or a mapping.
        resume: go on in its output folder.
        overwrite: replace an earlier run there.
        quiet: False shows progress on stderr.

    Returns:
        Folder, layer selection, metrics before / after / oracle, and the patch.

    Raises:
        UserError: anything wrong with recipe, data, model or output folder.
    """
    return pipeline.run_recipe(_recipe(recipe), resume=resume, overwrite=overwrite, console=Console(quiet=quiet))


def select_layers(
    recipe: Recipe | str | Path | Mapping[str, Any], *, overwrite: bool = False, quiet: bool = True
) -> LayerSelection:
    """Do the layer selection of a recipe alone, as ``falcon-unlearn layers``.

    Raises:
        UserError: as :func:`unlearn`.
    """
    selection, _ = pipeline.select_layers_of(_recipe(recipe), overwrite=overwrite, console=Console(quiet=quiet))
    return selection


def apply_patch(
    model: PreTrainedModel | str | Path, patch: str | Path, out: str | Path | None = None, *, link: bool = False
) -> PreTrainedModel | Path:
    """Apply a patch to a checkpoint folder, or to a model in memory.

    Args:
        model: checkpoint folder (then ``out`` is needed), or a model loaded from the patch's base, changed in place.
        patch: patch folder.
        out: folder for the patched checkpoint.
        link: hard-link untouched files instead of copying them.

    Returns:
        ``out``, or the model.

    Raises:
        UserError: the base is not the one the patch was made for, or ``out`` is missing or not empty.
    """
    loaded = patches.read_patch(Path(patch))
    if isinstance(model, str | Path):
        if out is None:
            raise UserError("apply_patch: a checkpoint folder is never changed in place; name the out folder")
        patches.apply_patch(loaded, Path(model), Path(out), link=link)
        return Path(out)
    apply_in_memory(loaded, model)
    return model


def revert_patch(patch: str | Path, model: str | Path, out: str | Path | None = None) -> Path:
    """Take a patch back out of a patched checkpoint folder, byte for byte; in place without ``out``.

    Raises:
        UserError: the folder is not in the patched state, or the patch came without its original tensors.
    """
    patches.revert_patch(patches.read_patch(Path(patch)), Path(model), None if out is None else Path(out))
    return Path(out if out is not None else model)


def verify_patch(patch: str | Path, model: str | Path) -> patches.VerifyReport:
    """Tell whether a checkpoint folder is the patch's base, the patched model, or neither."""
    return patches.verify_patch(patches.read_patch(Path(patch)), Path(model))
