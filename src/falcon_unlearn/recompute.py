"""Take a deletion request out of the middle: run the later ones again, as their recipes say, without it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from falcon_unlearn.console import Console
from falcon_unlearn.earlier import EarlierRequest, patch_folder
from falcon_unlearn.errors import UserError
from falcon_unlearn.model.ancestry import read_ledger
from falcon_unlearn.model.patch import Patch
from falcon_unlearn.model.patched import read_stack
from falcon_unlearn.pipeline import Run, run_recipe
from falcon_unlearn.recipe import Recipe, load_recipe


def stack_on(model: str) -> tuple[Patch, ...]:
    """The patches that lie on a model, the earliest first.

    Args:
        model: a checkpoint on which two or more patches lie, or the run folder of the last request.

    Raises:
        UserError: neither, or a patch is missing.
    """
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        return read_stack([patch_folder(model, "--model")])
    laid = read_ledger(folder)
    if not laid:
        raise UserError(
            f"--model {model}: does not say which patches lie on it, so at most one does, and that can be reverted; "
            "or give the run folder of the last request"
        )
    stack = read_stack([Path(patch.folder) for patch in laid])
    other = next((patch for patch, listed in zip(stack, laid, strict=False) if patch.id != listed.id), None)
    if other is not None or len(stack) != len(laid):
        raise UserError(
            f"--model {model}: the patches it lists are no longer where they were; give the last run folder"
        )
    return stack


def recompute_without(patch: Patch, stack: Sequence[Patch], out: Path, console: Console) -> list[Run]:
    """Run the requests above ``patch`` again, each after those that remain below it.

    The runs go to ``out``, under the names of the run folders they repeat (of two of one name, ``week2/run`` and
    ``week3/run``, the second is ``run-2``); where some of them are there already, this goes on from them. Nothing else
    is changed.

    Args:
        patch: what is taken out.
        stack: the last patch with all below it, the earliest first.
        out: folder for the new runs.
        console: progress.

    Raises:
        UserError: ``patch`` is not in the stack or is its last, a later run folder is not there, or its forget
            records are no longer those of that time.
        Interrupted: Ctrl-C; the same call goes on.
    """
    ids = [below.id for below in stack]
    if patch.id not in ids:
        raise UserError(f"{patch.folder}: is not below {stack[-1].folder}, so there is nothing to make again")
    place = ids.index(patch.id)
    if place == len(stack) - 1:
        raise UserError(f"{patch.folder}: nothing stands on it: revert it without --recompute")
    later = [EarlierRequest(number, below) for number, below in enumerate(stack[place + 1 :], start=place + 2)]
    remaining = [str(below.folder.resolve()) for below in stack[:place]]
    # All of them are found wanting before the first runs.
    recipes = [_recipe_of(request, output) for request, output in zip(later, _outputs(later, out), strict=True)]
    runs = []
    for request, recipe in zip(later, recipes, strict=True):
        console.say(f"again without {patch.folder.parent.name}: {request.folder}, in {recipe.output}")
        again = recipe.model_copy(update={"after": tuple(remaining)})
        runs.append(run_recipe(again, resume=True, console=console))
        remaining.append(str(runs[-1].patch.folder.resolve()))
    return runs


def _outputs(requests: Sequence[EarlierRequest], out: Path) -> list[Path]:
    folder = out.expanduser().resolve()
    outputs: list[Path] = []
    for request in requests:
        name = request.folder.name
        names = (name, *(f"{name}-{n}" for n in range(2, len(requests) + 1)))
        outputs.append(next(folder / name for name in names if folder / name not in outputs))
    old = {request.folder.resolve() for request in requests}
    replaced = next((output for output in outputs if output in old), None)
    if replaced is not None:
        raise UserError(f"--out {out}: would replace the run {replaced}; name another folder")
    return outputs


def _recipe_of(request: EarlierRequest, output: Path) -> Recipe:
    path = request.folder / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"{request.patch.folder}: its run folder is needed to make it again, and has no recipe.yaml")
    request.forget_records()
    return load_recipe(path).model_copy(update={"output": str(output)})
