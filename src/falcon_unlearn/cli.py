"""The command line: parse, call, print. Results go to stdout, everything else to stderr.

Exit codes: 0 done, 2 the input is wrong or the run was stopped, 1 a defect of ours.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from falcon_unlearn.console import in_columns, number
from falcon_unlearn.errors import UserError
from falcon_unlearn.ranks import launch_from, started_together

if TYPE_CHECKING:
    from falcon_unlearn.artifacts import LayerSelection, Metrics
    from falcon_unlearn.pipeline import Run
    from falcon_unlearn.ranks import Ranks

DESCRIPTION = "Make a language model forget, and show that it did."
EPILOG = "Start with:  falcon-unlearn demo      Your own data:  falcon-unlearn run RECIPE.yaml"

_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT})


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the command line in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="falcon-unlearn", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")

    def add(name: str, summary: str, handler: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary[:1].upper() + summary[1:] + ".")
        sub.add_argument("--json", action="store_true", help="print machine-readable results on stdout, nothing else")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(handler=handler)
        return sub

    demo = add("demo", "the whole job on an embedded model and invented people, without any download", _demo)
    demo.add_argument("--out", default="runs/demo", metavar="DIR", help="run folder (default: runs/demo)")
    demo.add_argument("--seed", type=int, default=0, help="invents other people and trains other models (default: 0)")
    demo.add_argument("--retrain", action="store_true", help="train model and oracle from the seed")
    _folder_state(demo)

    run = add("run", "unlearn as a recipe says", _run)
    layers = add("layers", "select layers as a recipe says, and nothing else", _layers)
    for sub in (run, layers):
        sub.add_argument("recipe", metavar="RECIPE.yaml")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. method.preset=paper seed=1")
        sub.add_argument("--estimate", action="store_true", help="predict memory and work from the config; run nothing")
        _folder_state(sub)
    run.add_argument(
        "--after",
        action="append",
        default=[],
        metavar="PATCH",
        help="stand on an earlier request: its patch or run folder (repeat to say where those below it lie now)",
    )

    patch = add("patch", "show, apply, take back or check a patch", _patch)
    patch.add_argument("action", choices=["info", "apply", "revert", "verify"])
    patch.add_argument("patch", metavar="PATCH", help="patch folder of a run")
    patch.add_argument("--model", metavar="BASE", help="checkpoint folder or hub id")
    patch.add_argument("--out", metavar="DIR", help="where the resulting checkpoint goes (revert: in place without it)")
    patch.add_argument("--link", action="store_true", help="apply: hard-link untouched files instead of copying them")
    patch.add_argument("--stack", action="store_true", help="apply: with the patches it stands on, as far as lacking")
    patch.add_argument(
        "--recompute", action="store_true", help="revert: run the requests above PATCH again without it, into --out"
    )

    compare = add("compare", "run recipes, or a grid of methods and seeds, into one table and one figure", _compare)
    compare.add_argument("recipes", nargs="*", metavar="RECIPE.yaml", help="one row each")
    compare.add_argument("--grid", metavar="GRID.yaml", help="rows times seeds, tuned alike: see docs/methods.md")
    compare.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that share the work (default: 1)"
    )
    compare.add_argument(
        "--out", metavar="DIR", help="where the table goes (default: the grid's output, or runs/compare)"
    )
    compare.add_argument(
        "--storage", metavar="URL", help="share the work with other machines: a file, or postgresql://, mysql://"
    )
    compare.add_argument("--retry-failed", action="store_true", help="with --storage: do again what failed there")

    _add_model_commands(add)

    log = add("score-log", "forget quality and model utility from published TOFU or OpenUnlearning logs", _score_log)
    log.add_argument("log", metavar="LOG.json", help="aggregated log of TOFU's authors, or TOFU_EVAL.json")
    log.add_argument("--retain", metavar="LOG.json", help="the log of the model that never saw the forget data")

    _add_run_folder_commands(add)

    add("methods", "list what is built in", _methods)
    add("doctor", "versions, devices, memory, data: what is there and what to do about what is not", _doctor)
    return parser


def _folder_state(sub: argparse.ArgumentParser) -> None:
    state = sub.add_mutually_exclusive_group()
    state.add_argument("--resume", action="store_true", help="go on in the output folder")
    state.add_argument("--overwrite", action="store_true", help="replace what an earlier run left in the output folder")


def _add_run_folder_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands that take finished runs."""
    report = add("report", "write report.html of a run folder again", _report)
    report.add_argument("run", metavar="RUN_DIR")

    track = add("track", "send the numbers of a finished run to experiment trackers", _track)
    track.add_argument("run", metavar="RUN_DIR")
    track.add_argument("--to", required=True, nargs="+", metavar="TRACKER", help="tensorboard, wandb, mlflow, trackio")
    track.add_argument("--project", metavar="NAME", help="project or experiment there (default: the recipe's)")
    track.add_argument("--name", metavar="NAME", help="name of the run there (default: the recipe's)")

    curve = add("sustainability", "utility and earlier forget sets after each of several requests", _sustainability)
    curve.add_argument("runs", nargs="+", metavar="RUN_DIR", help="of the last request (and of those that were moved)")
    curve.add_argument(
        "--out", default="runs/sustainability", metavar="DIR", help="for the page (default: runs/sustainability)"
    )


def _add_model_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands that take a model as it is."""
    evaluate = add("evaluate", "score a model with evaluation suites, with intervals beside every number", _evaluate)
    attack = add("attack", "try to bring forgotten knowledge back, in several ways", _attack)
    for sub, example in ((evaluate, "tofu.split=forget05 batch_size=8"), (attack, "forget=F.jsonl relearn.known=3")):
        sub.add_argument("model", metavar="MODEL", help="checkpoint folder, hub id, or the folder of a run")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help=f"e.g. {example}")
        sub.add_argument("--out", required=True, metavar="DIR", help="where the results go")
        sub.add_argument(
            "--patch", action="append", default=[], metavar="PATCH", help="lay a patch on MODEL in memory (repeatable)"
        )
        sub.add_argument("--oracle", metavar="MODEL", help="a model that never saw the forget data")
        _folder_state(sub)
    evaluate.add_argument(
        "--suite",
        nargs="+",
        action="extend",
        required=True,
        metavar="SUITE",
        help="tofu, muse, wmdp, own, privacy (one or several)",
    )
    attack.add_argument(
        "--attack",
        nargs="+",
        action="extend",
        required=True,
        metavar="NAME",
        help="as listed by 'falcon-unlearn methods', or audit: all",
    )
    attack.add_argument("--original", metavar="MODEL", help="the model before unlearning (default: without --patch)")


def _print_json(value: Any) -> None:
    from falcon_unlearn.artifacts import to_plain

    print(json.dumps(to_plain(value), indent=2, ensure_ascii=False))


_ROWS = (
    ("forget probability", "forget_probability"),
    ("forget accuracy", "forget_accuracy"),
    ("  on held-out phrasing", "forget_accuracy_heldout"),
    ("forget ROUGE-L", "forget_rouge"),
    ("forget quality (p)", "forget_quality"),
    ("model utility", "model_utility"),
)


def metrics_table(metrics: Mapping[str, Metrics | None]) -> str:
    """The short table: one row a metric, one column a model, with 95 % intervals; a dash where there is no number."""
    columns = [(name, found) for name in ("before", "after", "oracle") if (found := metrics.get(name)) is not None]
    if not columns:
        return "nothing was scored (evaluation.enabled is false)"
    rows = [["", *(cell for name, _ in columns for cell in (f"{name:>7}", ""))]]
    for label, key in _ROWS:
        values = [getattr(found, key) for _, found in columns]
        if any(value is not None for value in values):
            cells = [
                (f"{number(value):>7}", _bounds(found, key)) for value, (_, found) in zip(values, columns, strict=True)
            ]
            rows.append([label, *(cell for pair in cells for cell in pair)])
    return in_columns(rows)


def _bounds(metrics: Metrics, key: str) -> str:
    bounds = metrics.intervals.get(key)
    return "" if bounds is None else f"[{bounds[0]:.2f}, {bounds[1]:.2f}]"


def selection_table(selection: LayerSelection) -> str:
    """Scores per candidate layer, mutual information with its nulls, and what they mean."""
    curve = selection.mutual_information
    layers = [score.layer for score in selection.scores] or list(curve.layers if curve is not None else ())
    by_sweep = selection.selector == "sweep"
    plain = bool(selection.scores) and selection.selector not in ("sweep", "mutual_information")
    head = ["layer"] + (["score", "forget left", "retain kept"] if by_sweep else ["score"] if plain else [])
    head += ["MI (nats)", "null: retain", "null: permuted"] if curve is not None else []
    rows = [head]
    for i, layer in enumerate(layers):
        row = [f"{layer}{' *' if layer == selection.target_layer else '  '}"]
        if by_sweep:
            score = selection.scores[i]
            row += [number(v) for v in (score.score, score.details["forget_left"], score.details["retain_kept"])]
        if plain:
            row.append(f"{selection.scores[i].score:.3g}")
        if curve is not None:
            row += [f"{v[i]:.2f}" for v in (curve.value, curve.null_retain, curve.null_permutation)]
        rows.append(row)
    lines = ["".join(f"{cell:>16}" for cell in row) for row in rows] if layers else []
    lines += [*selection.notes, f"criterion: {selection.criterion}"]
    lines.append(f"train layers {', '.join(map(str, selection.layers))}; target layer {selection.target_layer}")
    return "\n".join(lines)


def _print_run(run: Run, *, as_json: bool) -> None:
    if as_json:
        _print_json({"output": str(run.folder), "layer_selection": run.selection, "metrics": run.metrics})
        return
    print(metrics_table(run.metrics))
    _print_earlier(run.metrics)
    if run.attacks:
        from falcon_unlearn.attack import attacks_table

        print(f"\n{attacks_table(run.attacks)}")
    print(f"\nreport  {run.folder / 'report.html'}\npatch   {run.folder / 'patch'}")


def _print_earlier(metrics: Mapping[str, Metrics | None]) -> None:
    from falcon_unlearn.earlier import SUITE

    found = {
        name: suite.metrics
        for name, of_model in metrics.items()
        if of_model is not None and (suite := of_model.suites.get(SUITE)) is not None
    }
    if "after" in found:
        rows = [["earlier forget sets", *found]]
        rows += [
            [f"  {key.replace('_', ' ')}", *(number(of_model[key].value) for of_model in found.values())]
            for key in found["after"]
            if key.endswith(("_accuracy", "_probability"))
        ]
        print(f"\n{in_columns(rows)}")


def _console(arguments: argparse.Namespace) -> Any:
    from falcon_unlearn.console import Console

    return Console(quiet=arguments.json)


def _demo(arguments: argparse.Namespace) -> int:
    from falcon_unlearn import embedded
    from falcon_unlearn.corpus.fictional import build_world
    from falcon_unlearn.pipeline import run_recipe
    from falcon_unlearn.recipe import recipe_from, save_recipe
    from falcon_unlearn.run_folder import open_run_folder

    console = _console(arguments)
    out = Path(arguments.out).expanduser().resolve()
    inputs = out / "inputs"
    recipe = recipe_from(embedded.demo_recipe(out, inputs, arguments.seed))
    folder = open_run_folder(
        recipe,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        allowed=("inputs",) if arguments.resume or arguments.overwrite else (),
    )
    save_recipe(recipe, folder / "recipe.yaml")  # marks the folder as ours, should this be stopped before the run
    embedded.write_corpora(build_world(arguments.seed), inputs)
    embedded.write_models(arguments.seed, inputs, retrain=arguments.retrain, say=console.say)
    run = run_recipe(recipe, resume=arguments.resume, allowed=("inputs", "recipe.yaml"), console=console)
    _print_run(run, as_json=arguments.json)
    return 0


def _load(arguments: argparse.Namespace) -> Any:
    from falcon_unlearn.recipe import load_recipe

    after = [f"after={json.dumps(arguments.after)}"] if getattr(arguments, "after", None) else []
    return load_recipe(Path(arguments.recipe), [*arguments.overrides, *after])


_SHARED = ("run", "layers", "evaluate", "attack")
"""Commands that several processes can do together."""


def _refuse_ranks(command: str) -> None:
    if launch_from(os.environ) is None:
        return
    # torch reads it when it is imported; else a rank that is gone is a page of C++ frames on all others.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if command not in _SHARED:
        raise UserError(f"{command} is for one process: torchrun can start {', '.join(_SHARED)}")


@contextlib.contextmanager
def _together(arguments: argparse.Namespace, load: Callable[[], Any]) -> Iterator[tuple[Any, Ranks]]:
    """What is to be done, and the processes that do it; what is wrong with it is said by one of them."""
    state = {key: getattr(arguments, key) for key in ("command", "resume", "overwrite")}
    try:
        request = load()
    except UserError as error:
        with started_together({**state, "error": str(error)}, "cpu"):
            raise
    with started_together({**state, **request.model_dump(mode="json")}, request.device) as ranks:
        yield request, ranks


def _estimate(arguments: argparse.Namespace) -> int:
    from falcon_unlearn.estimate import estimate_layers, estimate_run, estimate_table

    predict = estimate_run if arguments.command == "run" else estimate_layers
    estimate = predict(_load(arguments))
    if arguments.json:
        _print_json(estimate)
    else:
        print(estimate_table(estimate))
    return 0


def _run(arguments: argparse.Namespace) -> int:
    if arguments.estimate:
        return _estimate(arguments)
    from falcon_unlearn.pipeline import run_recipe

    with _together(arguments, lambda: _load(arguments)) as (recipe, ranks):
        run = run_recipe(
            recipe, resume=arguments.resume, overwrite=arguments.overwrite, console=_console(arguments), ranks=ranks
        )
    if ranks.first:
        _print_run(run, as_json=arguments.json)
    return 0


def _layers(arguments: argparse.Namespace) -> int:
    if arguments.estimate:
        return _estimate(arguments)
    from falcon_unlearn.pipeline import select_layers_of

    with _together(arguments, lambda: _load(arguments)) as (recipe, ranks):
        selection, folder = select_layers_of(
            recipe, resume=arguments.resume, overwrite=arguments.overwrite, console=_console(arguments), ranks=ranks
        )
    if not ranks.first:
        return 0
    if arguments.json:
        _print_json(selection)
    else:
        print(selection_table(selection))
        print(f"saved   {folder / 'layer_selection.json'}")
    return 0


def _patch(arguments: argparse.Namespace) -> int:
    from falcon_unlearn.model import patch as patches

    patch = patches.read_patch(Path(arguments.patch))
    if arguments.action == "info":
        return _patch_info(patch, as_json=arguments.json)
    if arguments.model is None:
        raise UserError(f"patch {arguments.action}: --model is needed")
    if arguments.recompute:
        return _recompute(patch, arguments)
    model = _checkpoint_folder(arguments.model)
    if arguments.action == "verify":
        verified = patches.verify_patch(patch, model)
        if arguments.json:
            _print_json(verified)
        else:
            print(_STATES[verified.state].format(model=arguments.model))
            for mismatch in verified.mismatches[:5]:
                print(f"  {mismatch.name}: {mismatch.reason}")
            if verified.lacks is not None:
                print(f"  lacks the patch {verified.lacks}, on which this one stands")
        return 0 if verified.state in {"base", "patched"} and verified.lacks is None else 2
    if arguments.action == "apply":
        if arguments.out is None:
            raise UserError("patch apply: --out is needed; the base is never changed")
        if arguments.stack:
            from falcon_unlearn.model.patched import read_stack

            report = patches.apply_stack(
                read_stack([Path(arguments.patch)]), model, Path(arguments.out), link=arguments.link
            )
        else:
            report = patches.apply_patch(patch, model, Path(arguments.out), link=arguments.link)
    else:
        report = patches.revert_patch(patch, model, None if arguments.out is None else Path(arguments.out))
    if arguments.json:
        _print_json(report)
    else:
        done = "patched" if arguments.action == "apply" else "restored"
        print(f"{done}: {arguments.out or model}")
        print(
            f"files: {report.files_rewritten} rewritten, {report.files_copied} copied, "
            f"{report.files_reflinked} reflinked, {report.files_linked} linked"
        )
        if report.other_weights:
            print(f"taken over unchanged, still with the old weights: {', '.join(report.other_weights)}")
    return 0


def _recompute(patch: Any, arguments: argparse.Namespace) -> int:
    from falcon_unlearn.recompute import recompute_without, stack_on

    if arguments.action != "revert" or arguments.out is None:
        raise UserError("patch revert --recompute: --out is needed, a folder for the new runs")
    runs = recompute_without(patch, stack_on(arguments.model), Path(arguments.out), _console(arguments))
    if arguments.json:
        _print_json([{"output": str(run.folder), "metrics": run.metrics} for run in runs])
        return 0
    for run in runs:
        print(f"{run.folder}\n{metrics_table(run.metrics)}\n")
    print(f"model   falcon-unlearn patch apply {runs[-1].folder / 'patch'} --stack --model BASE --out DIR")
    return 0


def _checkpoint_folder(name: str) -> Path:
    from falcon_unlearn.model.loading import checkpoint_folder

    return checkpoint_folder(name, Path.cwd(), "--model")


_STATES = {
    "base": "base: {model} is what the patch was made for; it is not applied",
    "patched": "patched: every touched tensor of {model} is as the patch left it",
    "mixed": "mixed: some tensors of {model} are patched and some are not",
    "other": "other: {model} is neither the patch's base nor the patched model",
}


def _patch_info(patch: Any, *, as_json: bool) -> int:
    original = patch.holds_original
    if as_json:
        _print_json(
            {
                "base_model": patch.base_model,
                "tensors": patch.tensors,
                "provenance": patch.provenance,
                "has_original": original,
                "id": patch.id,
                "ancestry": [{"id": ancestor.id, "folder": ancestor.folder} for ancestor in patch.ancestry],
            }
        )
        return 0
    print(f"base model   {patch.base_model}")
    print(f"id           {patch.id}")
    for place, ancestor in enumerate(patch.ancestry):
        print(f"{'stands on' if place == 0 else '  and then':12} {ancestor}")
    print(f"tensors      {len(patch.tensors)}")
    for name, change in patch.tensors.items():
        print(f"  {name}  {change.dtype} {list(change.shape)}")
    held = (
        "kept (revert works; it still holds what was forgotten: do not ship it)" if original else "not in this folder"
    )
    print(f"original     {held}")
    for key, value in patch.provenance.items():
        if not isinstance(value, Mapping):
            print(f"{key:12} {value}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from falcon_unlearn.compare import run_plan
    from falcon_unlearn.grid import load_grid, plan_grid, plan_recipes
    from falcon_unlearn.report.comparison import comparison_table
    from falcon_unlearn.sweep_storage import SharedStorage, open_storage

    if (arguments.grid is None) != bool(arguments.recipes):
        raise UserError("compare: name some recipes, or a grid with --grid")
    if arguments.workers < 1:
        raise UserError(f"compare: --workers {arguments.workers}: at least 1")
    if arguments.retry_failed and arguments.storage is None:
        raise UserError("compare: --retry-failed goes with --storage; without one, what failed is always done again")
    shared = None
    if arguments.storage is not None:
        shared = SharedStorage(arguments.storage, retry_failed=arguments.retry_failed)
        open_storage(shared)  # before anything is read or trained
    console = _console(arguments)
    if arguments.grid is not None:
        path = Path(arguments.grid)
        grid = load_grid(path)
        grid = grid if arguments.out is None else grid.model_copy(update={"output": arguments.out})
        plan = plan_grid(grid, path, console)
    else:
        plan = plan_recipes([Path(name) for name in arguments.recipes], Path(arguments.out or "runs/compare"))
    comparison = run_plan(plan, console, workers=arguments.workers, shared=shared)
    if arguments.json:
        _print_json({"output": str(plan.output), "comparison": comparison})
    else:
        print(comparison_table(comparison))
        print(f"table   {plan.output / 'table.md'}\nfigure  {plan.output / 'pareto.svg'}")
    return 1 if comparison.defects else 0


def _names_and_overrides(given: Sequence[str], overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands behind ``--suite`` or ``--attack``: a word that reads key=value is an override."""
    return [word for word in given if "=" not in word], [*overrides, *(word for word in given if "=" in word)]


def _evaluate(arguments: argparse.Namespace) -> int:
    from falcon_unlearn.evaluate import evaluate, evaluation_request, results_table

    suites, overrides = _names_and_overrides(arguments.suite, arguments.overrides)

    def load() -> Any:
        return evaluation_request(
            arguments.model,
            suites,
            arguments.out,
            patches=arguments.patch,
            oracle=arguments.oracle,
            overrides=overrides,
        )

    with _together(arguments, load) as (request, ranks):
        done = evaluate(
            request, resume=arguments.resume, overwrite=arguments.overwrite, console=_console(arguments), ranks=ranks
        )
    if not ranks.first:
        return 0
    if arguments.json:
        _print_json({"output": str(done.folder), **done.results})
    else:
        print(results_table(done))
        print(f"\nscores  {done.folder / 'scores'}\nnumbers {done.folder / 'metrics.json'}")
    return 0


def _attack(arguments: argparse.Namespace) -> int:
    from falcon_unlearn.attack import attack, attack_request, attacks_table
    from falcon_unlearn.attack_runs import battery_results

    attacks, overrides = _names_and_overrides(arguments.attack, arguments.overrides)

    def load() -> Any:
        return attack_request(
            arguments.model,
            attacks,
            arguments.out,
            patches=arguments.patch,
            original=arguments.original,
            oracle=arguments.oracle,
            overrides=overrides,
        )

    with _together(arguments, load) as (request, ranks):
        done = attack(
            request, resume=arguments.resume, overwrite=arguments.overwrite, console=_console(arguments), ranks=ranks
        )
    if not ranks.first:
        return 0
    if arguments.json:
        _print_json({"output": str(done.folder), **battery_results(done.results)})
    else:
        print(attacks_table(done.results))
        print(f"\nresults {done.folder / 'attacks.json'}\nsamples {done.folder / 'attacks'}")
    return 0


def _score_log(arguments: argparse.Namespace) -> int:
    from falcon_unlearn.evaluation.logs import score_log

    scores = score_log(Path(arguments.log), None if arguments.retain is None else Path(arguments.retain))
    if arguments.json:
        _print_json(scores)
        return 0
    rows = [["forget quality (p)", number(scores.forget_quality)], ["  log10", number(scores.log10_forget_quality)]]
    rows += [["model utility", number(scores.model_utility)]]
    rows += [[f"  {name}", number(value)] for name, value in scores.parts.items()]
    print("\n".join([in_columns(rows), *scores.notes]))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from falcon_unlearn.recipe import load_recipe
    from falcon_unlearn.report.html import write_report

    folder = Path(arguments.run)
    if not (folder / "recipe.yaml").exists():
        raise UserError(f"report: {folder} is no run folder (it has no recipe.yaml)")
    path = write_report(folder, samples=load_recipe(folder / "recipe.yaml").report.samples)
    if arguments.json:
        _print_json({"report": str(path)})
    else:
        print(path)
    return 0


def _track(arguments: argparse.Namespace) -> int:
    from falcon_unlearn.recipe import load_recipe, validated
    from falcon_unlearn.trackers import TrackersConfig, tracking

    folder = Path(arguments.run)
    if not (folder / "recipe.yaml").exists() or not (folder / "metrics.json").exists():
        raise UserError(f"track: {folder} is no finished run (it has no recipe.yaml and metrics.json)")
    recipe = load_recipe(folder / "recipe.yaml")
    given = {key: value for key in ("project", "name") if (value := getattr(arguments, key)) is not None}
    config = validated(TrackersConfig, {**recipe.trackers.model_dump(), **given, "use": arguments.to}, "track")
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    with tracking(config, recipe.model_dump(mode="json"), folder, lambda _: None) as trackers:
        trackers.finish(folder / "training.jsonl", metrics)
    if trackers.problems:
        raise UserError("\n".join(f"track: {name}: {problem}" for name, problem in trackers.problems.items()))
    if arguments.json:
        _print_json({"run": str(folder), "sent_to": list(config.use)})
    else:
        print(f"sent to {', '.join(config.use)}")
    return 0


def _sustainability(arguments: argparse.Namespace) -> int:
    from falcon_unlearn.report.curve import sustainability_table, write_sustainability
    from falcon_unlearn.sustainability import sustainability

    curve, out = sustainability(arguments.runs), Path(arguments.out)
    write_sustainability(curve, out)
    if arguments.json:
        _print_json({"output": str(out), "sustainability": curve})
    else:
        print(sustainability_table(curve))
        print(f"page    {out / 'sustainability.html'}\nnumbers {out / 'sustainability.json'}")
    return 0


def _methods(arguments: argparse.Namespace) -> int:
    from falcon_unlearn.attacks.battery import ATTACKS
    from falcon_unlearn.evaluation.suites import SUITES
    from falcon_unlearn.methods import METHODS
    from falcon_unlearn.presets import PRESETS
    from falcon_unlearn.selection.selectors import CRITERIA

    if arguments.json:
        _print_json(
            {"methods": list(METHODS), "attacks": list(ATTACKS), "selectors": list(CRITERIA), "suites": list(SUITES)}
        )
        return 0
    sections: dict[str, Mapping[str, str]] = {
        "methods": {name: f"{entry.summary} (presets: {', '.join(PRESETS[name])})" for name, entry in METHODS.items()},
        "attacks": ATTACKS,
        "suites": SUITES,
        "selectors": CRITERIA,
    }
    for title, entries in sections.items():
        print(title)
        print(in_columns([[f"  {name}", summary] for name, summary in entries.items()]))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from falcon_unlearn.doctor import examine

    found = examine()
    if arguments.json:
        _print_json(found)
        return 0
    for key, value in found["facts"].items():
        print(f"{key:22} {value}")
    for advice in found["advice"]:
        print(f"! {advice}")
    if not found["advice"]:
        print("nothing is missing")
    return 0


def _fail(message: str, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr)
    return 2


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, allowing overrides to stand behind options too."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    late = [text for text in rest if "=" in text and not text.startswith("-")]
    if len(late) < len(rest) or (late and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognised: {' '.join(text for text in rest if text not in late or not late) or late[0]}")
    if late:
        arguments.overrides = [*arguments.overrides, *late]
    if arguments.command is None and not arguments.version:
        parser.error("a command is needed")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``falcon-unlearn``; returns the exit code."""
    arguments = _parse(argv)
    if arguments.version:
        from falcon_unlearn import __version__

        print(__version__)
        return 0
    try:
        _refuse_ranks(arguments.command)
        return int(arguments.handler(arguments))
    except UserError as error:
        return _fail(str(error), debug=arguments.debug)
    except KeyboardInterrupt as stop:
        again = "; go on with the same command and --resume" if "resume" in arguments else ""
        return _fail(f"{str(stop) or 'stopped'}{again}", debug=arguments.debug)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        again = "; finished stages are kept: mend that and go on with --resume" if "resume" in arguments else ""
        return _fail(f"{error.strerror}{where}{again}", debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
