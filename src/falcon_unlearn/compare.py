"""Many runs, one table: the cells of a grid over seeds, tuned with equal budgets, or recipes one row each.

Everything lies below one output folder and is found again by the same command:

    inputs/seed-N/        data (and embedded models) of a seed; its facts split into scored and validation
    tuning/CELL.journal   Optuna's trials; CELL.json what they found
    runs/CELL/seed-N/     ordinary run folders
    results/CELL/         one file a run: its numbers, or why it failed
    table.md table.json pareto.svg compare.html
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import multiprocessing
import os
import shutil
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from falcon_unlearn.artifacts import Metrics, read_jsonl, write_bytes, write_json
from falcon_unlearn.console import Console
from falcon_unlearn.errors import UserError
from falcon_unlearn.grid import CellPlan, Plan, digest
from falcon_unlearn.pipeline import Interrupted, run_recipe
from falcon_unlearn.recipe import Recipe, dump_recipe, save_recipe
from falcon_unlearn.report.comparison import DEFECT, Comparison, Row, brief, ranked, recovered_key, write_comparison

if TYPE_CHECKING:
    from optuna import Study

WORST_SCORE = -1.0
"""Of a trial that failed: nothing kept, everything leaked."""
_WAIT_SECONDS = 0.5
_RANDOM_TRIALS = 4
"""Before Optuna's TPE begins to learn from them."""


# one run


@dataclass(frozen=True)
class Outcome:
    """One run of the table.

    Attributes:
        cell: name of the row.
        seed: of the run.
        fingerprint: of all that decides the run.
        parameters: what tuning chose.
        folder: the run folder.
        failed: why there are no numbers, or None.
        values: by key of :data:`~falcon_unlearn.report.comparison.MEASURES`; None where there is no number.
        before: the same of the original model.
        oracle: the same of the oracle, where there is one.
    """

    cell: str
    seed: int
    fingerprint: str
    parameters: Mapping[str, Any]
    folder: str
    failed: str | None = None
    values: Mapping[str, float | None] = field(default_factory=dict)
    before: Mapping[str, float | None] = field(default_factory=dict)
    oracle: Mapping[str, float | None] = field(default_factory=dict)


class _UnusableError(UserError):
    """A run ended, but its score is no number."""


def score_of(metrics: Metrics, before: Metrics) -> tuple[float, float, float]:
    """Score S = kept - leak of a model, its share of model utility kept, and its leak.

    kept = model utility / model utility before; leak = (forget probability + forget accuracy) / 2.

    Raises:
        UserError: there is no model utility, or a number is not finite.
    """
    if not before.model_utility or metrics.model_utility is None:
        raise _UnusableError("there is no model utility to compare: score a retain or utility set that the model knows")
    kept = metrics.model_utility / before.model_utility
    leak = (metrics.forget_probability + metrics.forget_accuracy) / 2
    if not (math.isfinite(kept) and math.isfinite(leak)):
        raise _UnusableError("the unlearned model gives no finite probabilities")
    return kept - leak, kept, leak


def _numbers(metrics: Metrics, before: Metrics) -> dict[str, float | None]:
    score, kept, leak = score_of(metrics, before)
    names = [f.name for f in dataclasses.fields(metrics) if f.name != "unscorable"]
    values = {name: getattr(metrics, name) for name in names}
    plain = {name: value for name, value in values.items() if not isinstance(value, Mapping)}
    attacked = {recovered_key(name): found.get("recovered_accuracy") for name, found in metrics.attacks.items()}
    return {"score": score, "kept": kept, "leak": leak, **plain, **attacked}


def _reason(error: Exception, console: Console) -> str:
    """One line: a mistake of the user or of the settings in its own words, a defect of ours by its type as well."""
    text = " / ".join(line for line in str(error).splitlines() if line.strip())
    if isinstance(error, UserError):
        return text
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        return f"out of memory: {text}".removesuffix(": ")
    console.say(traceback.format_exc())
    return f"{DEFECT}{type(error).__name__}: {text}"


def _score_folder(plan: Plan, recipe: Recipe) -> Path:
    """Where the scores of the models before and of the oracle are kept for all runs that would find the same ones."""
    sections = {"model", "evaluation", "seed", "dtype", "device", "threads", "trust_remote_code"}
    parts = recipe.model_dump(mode="json", include=sections | {"attacks"})
    return plan.path("shared", digest([plan.weights, parts, recipe.corpus.template, recipe.corpus.plain_template])[:16])


def _run(plan: Plan, recipe: Recipe, *, own_folder: bool) -> Mapping[str, Metrics | None]:
    """Run or finish a recipe; the original model and the oracle are scored by the first run that needs it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what a failed run held
    folder = Path(recipe.output)
    if own_folder:
        return run_recipe(recipe, resume=True).metrics
    stored = folder / "recipe.yaml"
    if folder.exists() and not (stored.exists() and stored.read_text(encoding="utf-8") == dump_recipe(recipe)):
        shutil.rmtree(folder)  # of an earlier state of the grid
    shared = _score_folder(plan, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, stored)
    _copy_missing(shared, folder)
    try:
        return run_recipe(recipe, resume=True).metrics
    finally:
        _copy_missing(folder, shared)


_SHARED_RESULTS = ("scores/before.*", "scores/oracle.*", "attacks/original.*", "attacks/oracle.*")


def _copy_missing(source: Path, target: Path) -> None:
    """Copy what one run finds out about the original model and the oracle, and all others would find again."""
    for pattern in _SHARED_RESULTS:
        for path in sorted(source.glob(pattern)):
            other = target / path.relative_to(source)
            if not other.exists():
                other.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(other, path.read_bytes())


def _start_peak(device: str) -> bool:
    """Let the peak of memory begin anew; False where the system cannot."""
    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _costs(folder: Path, *, fresh: bool, peak_known: bool) -> dict[str, float | None]:
    """Seconds of training (of all its sessions), and the peak of memory: on the GPU, else of the process.

    Args:
        folder: a finished run.
        fresh: it was run just now, by this process.
        peak_known: the process's peak was begun anew before it.
    """
    provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    log = folder / "training.jsonl"
    steps = sum(row["seconds"] or 0.0 for row in read_jsonl(log)) if log.exists() else 0.0
    if str(provenance["device"]).startswith("cuda"):
        peak = round(torch.cuda.max_memory_allocated() / 2**20) if fresh else None
    else:
        peak = provenance["peak_memory_mb"] if peak_known or not fresh else None
    return {
        "training_seconds": max(provenance["stage_seconds"].get("training", 0.0), steps),
        "peak_memory_mb": peak,
    }


def _folder(plan: Plan, cell: CellPlan, seed: int) -> Path:
    return cell.folders.get(seed, plan.path("runs", cell.name, f"seed-{seed}"))


def _result_path(plan: Plan, cell: CellPlan, seed: int) -> Path:
    return plan.path("results", cell.name, f"seed-{seed}.json")


def _read_result(plan: Plan, cell: CellPlan, seed: int, parameters: Mapping[str, Any]) -> Outcome | None:
    """The result of exactly this run, or None."""
    path = _result_path(plan, cell, seed)
    if not path.exists():
        return None
    outcome = Outcome(**json.loads(path.read_text(encoding="utf-8")))
    return outcome if outcome.fingerprint == _fingerprint(plan, cell, seed, parameters) else None


def _fingerprint(plan: Plan, cell: CellPlan, seed: int, parameters: Mapping[str, Any]) -> str:
    return digest([plan.weights, cell.final[seed], parameters])


def _final(plan: Plan, cell: CellPlan, seed: int, tuned: Tuned, console: Console) -> Outcome:
    """One run of the table; whatever stops it but an interruption becomes its result."""
    folder = _folder(plan, cell, seed)
    blank = Outcome(cell.name, seed, _fingerprint(plan, cell, seed, tuned.parameters), tuned.parameters, str(folder))
    if tuned.failed is not None:
        return dataclasses.replace(blank, failed=tuned.failed)
    try:
        recipe = cell.recipe(cell.final[seed], tuned.parameters, folder)
        fresh, peak_known = not (folder / "metrics.json").exists(), _start_peak(recipe.device)
        metrics = _run(plan, recipe, own_folder=seed in cell.folders)
        before, after, oracle = (metrics[name] for name in ("before", "after", "oracle"))
        assert before is not None
        assert after is not None
        return dataclasses.replace(
            blank,
            values={**_numbers(after, before), **_costs(folder, fresh=fresh, peak_known=peak_known)},
            before=_numbers(before, before),
            oracle={} if oracle is None else _numbers(oracle, before),
        )
    except Exception as error:  # one run must not take the others with it; a defect is shown as what it is
        return dataclasses.replace(blank, failed=_reason(error, console))


# tuning


@dataclass(frozen=True)
class Tuned:
    """What the trials of a cell found.

    Attributes:
        parameters: of the best trial, by dotted key.
        score: its score on validation facts; None without trials.
        trials: parameters, score and failure of each.
        failed: why none of them gave a score, or None.
        fingerprint: of all that decides the trials.
    """

    parameters: Mapping[str, Any] = field(default_factory=dict)
    score: float | None = None
    trials: Sequence[Mapping[str, Any]] = ()
    failed: str | None = None
    fingerprint: str = ""


def _optuna() -> ModuleType:
    try:
        import optuna
        import optuna.storages.journal
    except ImportError as error:
        raise UserError("compare: searching needs Optuna: pip install 'falcon-unlearn[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _study_of(plan: Plan, cell: CellPlan) -> str:
    searches = {key: search.model_dump(mode="json") for key, search in cell.search.items()}
    return digest([plan.weights, [cell.trial[seed] for seed in sorted(cell.trial)], searches])


def _read_tuned(plan: Plan, cell: CellPlan) -> Tuned | None:
    """What the trials found, or None where they are not done."""
    if not cell.search:
        return Tuned()
    path = plan.path("tuning", f"{cell.name}.json")
    if not path.exists():
        return None
    tuned = Tuned(**json.loads(path.read_text(encoding="utf-8")))
    return tuned if tuned.fingerprint == _study_of(plan, cell) and len(tuned.trials) == plan.trials else None


def _tune(plan: Plan, cell: CellPlan, console: Console) -> Tuned:
    """Do what is left of a cell's trials and choose the best of them, by validation facts alone.

    A trial is a function of the trials before it, so that a stopped study goes on as if it had not been. One that
    was cut off is done again from its run folders.
    """
    optuna = _optuna()
    plan.path("tuning").mkdir(parents=True, exist_ok=True)
    backend = optuna.storages.journal.JournalFileBackend(str(plan.path("tuning", f"{cell.name}.journal")))
    fingerprint = _study_of(plan, cell)
    study: Study = optuna.create_study(
        study_name=f"{cell.name} {fingerprint[:12]}",
        storage=optuna.storages.JournalStorage(backend),
        direction="maximize",
        load_if_exists=True,
    )
    states = optuna.trial.TrialState
    for cut_off in study.get_trials(states=(states.RUNNING,)):
        study.tell(cut_off.number, state=states.FAIL)
    while (number := len(study.get_trials(states=(states.COMPLETE,)))) < plan.trials:
        drawn = int(digest([cell.name, number])[:8], 16)
        study.sampler = optuna.samplers.TPESampler(seed=drawn, n_startup_trials=_RANDOM_TRIALS)
        trial = study.ask()
        parameters = {key: search.suggest(trial, key) for key, search in cell.search.items()}
        trial.set_user_attr("parameters", parameters)
        score, failed = WORST_SCORE, None
        folder = plan.path("trials", cell.name, str(number))
        try:
            recipes = [cell.recipe(raw, parameters, folder / f"seed-{seed}") for seed, raw in cell.trial.items()]
            score = statistics.fmean(_trial_score(plan, recipe) for recipe in recipes)
        except Exception as error:
            failed = _reason(error, console)
            trial.set_user_attr("failed", failed)
        study.tell(trial, score)
        shutil.rmtree(folder, ignore_errors=True)
        shown = ", ".join(f"{key} {brief(value)}" for key, value in parameters.items())
        found = f"S {score:.3f}" if failed is None else f"failed: {failed}"
        console.say(f"{cell.name}, trial {number + 1} of {plan.trials} ({shown}): {found}")
    done = study.get_trials(states=(states.COMPLETE,))[: plan.trials]
    trials = [
        {"parameters": t.user_attrs["parameters"], "score": t.value, "failed": t.user_attrs.get("failed")} for t in done
    ]
    fine = [t for t in trials if t["failed"] is None]
    if not fine:
        reason = f"all {len(trials)} trials failed, the last with: {trials[-1]['failed']}"
        return Tuned(trials=trials, failed=reason, fingerprint=fingerprint)
    best = max(fine, key=lambda t: t["score"])
    return Tuned(best["parameters"], best["score"], trials, None, fingerprint)


def _trial_score(plan: Plan, recipe: Recipe) -> float:
    metrics = _run(plan, recipe, own_folder=False)
    before, after = metrics["before"], metrics["after"]
    assert before is not None
    assert after is not None
    return score_of(after, before)[0]


# working it off, in one process or in several


@contextlib.contextmanager
def _claim(path: Path) -> Iterator[bool]:
    """Whether this process alone has the claim; the system takes it from a process that dies."""
    try:
        import fcntl
    except ImportError:  # Windows: one worker only
        yield True
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mine = False
        else:
            mine = True
        yield mine
    finally:
        os.close(handle)


@dataclass(frozen=True)
class _Job:
    name: str
    done: Callable[[], bool]
    do: Callable[[], None]


def _jobs(plan: Plan, cell: CellPlan, console: Console) -> list[_Job]:
    """What of a cell can be done now: its trials, or else its runs that have no result."""
    tuned = _read_tuned(plan, cell)
    if tuned is None:

        def tune() -> None:
            write_json(plan.path("tuning", f"{cell.name}.json"), _tune(plan, cell, console))

        return [_Job("tuning", lambda: _read_tuned(plan, cell) is not None, tune)]
    jobs = []
    for seed in cell.final:

        def done(seed: int = seed) -> bool:
            return _read_result(plan, cell, seed, tuned.parameters) is not None

        def run(seed: int = seed) -> None:
            outcome = _final(plan, cell, seed, tuned, console)
            path = _result_path(plan, cell, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, outcome)
            score = outcome.values.get("score")
            found = f"failed: {outcome.failed}" if score is None else f"S {score:.3f}"
            console.say(f"{cell.name}, seed {seed}: {found}")

        if not done():
            jobs.append(_Job(f"seed-{seed}", done, run))
    return jobs


def _work(plan: Plan, console: Console) -> None:
    """Do whatever nobody else is doing until nothing is left, or until the process that started this one is gone."""
    parent = multiprocessing.parent_process()
    while True:
        left, progress = 0, False
        for cell in plan.cells:
            for job in _jobs(plan, cell, console):
                if parent is not None and not parent.is_alive():
                    return
                left += 1
                with _claim(plan.path("claims", cell.name, job.name)) as mine:
                    if mine and not job.done():
                        job.do()
                        assert job.done()
                        progress = True
        if not left:
            return
        if not progress:
            time.sleep(_WAIT_SECONDS)


def _threads_of(workers: int) -> int:
    """Threads of each worker, where the recipe names no number."""
    return max(1, torch.get_num_threads() // workers)


def _work_beside(plan: Plan, console: Console, workers: int) -> None:
    """What another worker's process does."""
    torch.set_num_threads(_threads_of(workers))
    with contextlib.suppress(KeyboardInterrupt):
        _work(plan, console)


def run_plan(plan: Plan, console: Console, *, workers: int = 1) -> Comparison:
    """Do what is left of a plan, write the table and the figure, and return what they show.

    Args:
        plan: from :func:`plan_grid` or :func:`plan_recipes`.
        console: one line a trial and a run.
        workers: processes; this one is the first of them. At equal ``threads`` they do not change the result.

    Raises:
        UserError: Optuna or file locks are missing.
        Interrupted: Ctrl-C; finished runs and trials are kept.
    """
    if workers > 1 and os.name == "nt":
        raise UserError("compare: --workers needs the file locks of a POSIX system; leave it out")
    if any(cell.search for cell in plan.cells):
        _optuna()
    for cell in plan.cells:  # what failed is tried again; a recipe's own folder says itself whether it is finished
        for path in plan.path("results", cell.name).glob("seed-*.json"):
            if cell.folders or json.loads(path.read_text(encoding="utf-8"))["failed"] is not None:
                path.unlink()
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_work_beside, args=(plan, console, workers)) for _ in range(workers - 1)]
    threads = torch.get_num_threads()
    try:
        for process in others:
            process.start()
        torch.set_num_threads(_threads_of(workers))
        _work(plan, console)
    except BaseException as stop:
        for process in others:
            if process.is_alive():
                process.terminate()
        if isinstance(stop, KeyboardInterrupt):
            raise Interrupted("stopped; the same command goes on from here") from stop
        raise
    finally:
        torch.set_num_threads(threads)
        for process in others:
            if process.pid is not None:
                process.join()
    comparison = gather(plan)
    write_comparison(comparison, plan.output)
    return comparison


def gather(plan: Plan) -> Comparison:
    """Make the table of the results that are there."""
    rows: list[Row] = []
    references: dict[str, dict[int, Mapping[str, float | None]]] = {"before": {}, "oracle": {}}
    for cell in plan.cells:
        tuned = _read_tuned(plan, cell) or Tuned()
        found = {seed: _read_result(plan, cell, seed, tuned.parameters) for seed in cell.final}
        outcomes = {seed: outcome for seed, outcome in found.items() if outcome is not None}
        for seed, outcome in outcomes.items():
            for name, values in (("before", outcome.before), ("oracle", outcome.oracle)):
                if values and not cell.folders:  # recipes may be about different models
                    references[name].setdefault(seed, values)
        failed = {seed: outcome.failed for seed, outcome in outcomes.items() if outcome.failed is not None}
        values_by_seed = {seed: outcome.values for seed, outcome in outcomes.items()}
        rows.append(
            Row(cell.name, _by_measure(plan.seeds, values_by_seed), failed, False, tuned.parameters, tuned.score)
        )
    first = [Row(name, _by_measure(plan.seeds, of), reference=True) for name, of in references.items() if of]
    return Comparison((*first, *ranked(rows)), plan.seeds, plan.trials, plan.validation_share)


def _by_measure(
    seeds: Sequence[int], outcomes: Mapping[int, Mapping[str, float | None]]
) -> dict[str, tuple[float | None, ...]]:
    keys = dict.fromkeys(key for values in outcomes.values() for key in values)
    return {key: tuple(outcomes.get(seed, {}).get(key) for seed in seeds) for key in keys}
