"""Many runs, one table: the cells of a grid over seeds, tuned with equal budgets, or recipes one row each.

Everything lies below one output folder and is found again by the same command:

    inputs/seed-N/        data (and embedded models) of a seed; its facts split into scored and validation
    tuning/CELL.journal   Optuna's trials; CELL.json what they found
    runs/CELL/seed-N/     ordinary run folders
    results/CELL/         one file a run: its numbers, or why it failed
    table.md table.json pareto.svg compare.html

With a storage (:mod:`~falcon_unlearn.sweep_storage`) trials, claims and results stand there too, for other machines.
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
import signal
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch

from falcon_unlearn.artifacts import Metrics, read_jsonl, to_plain, write_bytes, write_json
from falcon_unlearn.console import Console
from falcon_unlearn.earlier import earlier_requests
from falcon_unlearn.errors import UserError
from falcon_unlearn.grid import CellPlan, Plan, digest
from falcon_unlearn.pipeline import Interrupted, run_recipe
from falcon_unlearn.recipe import Recipe, dump_recipe, save_recipe
from falcon_unlearn.report.comparison import DEFECT, Comparison, Row, brief, ranked, recovered_key, write_comparison
from falcon_unlearn.sweep_storage import (
    Board,
    SharedStorage,
    journal,
    load_optuna,
    naming_the_storage,
)

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage

T = TypeVar("T")

WORST_SCORE = -1.0
"""Of a trial that failed: nothing kept, everything leaked."""
_WAIT_SECONDS = 0.5
_WAIT_SECONDS_SHARED = 2.0
_DEATHS = 2
"""So many workers may die of a run or a trial; then it has failed."""
_DIED = f"{_DEATHS} workers died while they did it (killed, or out of memory); see what the system says of them"
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


def oracle_score_of(metrics: Metrics, before: Metrics, oracle: Metrics) -> float | None:
    """Score of a model whose leak is measured from the oracle's: knowing less than the oracle does is no merit.

    kept less the mean, over forget probability and accuracy, of max(0, (x - oracle) / (before - oracle)): 0 at the
    oracle, 1 at the original model. None where the original model knows no more than the oracle.
    """
    _, kept, _ = score_of(metrics, before)
    leak = 0.0
    for value, original, least in (
        (metrics.forget_probability, before.forget_probability, oracle.forget_probability),
        (metrics.forget_accuracy, before.forget_accuracy, oracle.forget_accuracy),
    ):
        if not original > least:
            return None
        leak += max(0.0, (value - least) / (original - least)) / 2
    return kept - leak


def _numbers(metrics: Metrics, before: Metrics, oracle: Metrics | None) -> dict[str, float | None]:
    score, kept, leak = score_of(metrics, before)
    names = [f.name for f in dataclasses.fields(metrics) if f.name != "unscorable"]
    values = {name: getattr(metrics, name) for name in names}
    plain = {name: value for name, value in values.items() if not isinstance(value, Mapping)}
    attacked = {recovered_key(name): found.get("recovered_accuracy") for name, found in metrics.attacks.items()}
    above_oracle = None if oracle is None else oracle_score_of(metrics, before, oracle)
    return {"score": score, "oracle_score": above_oracle, "kept": kept, "leak": leak, **plain, **attacked}


def _reason(error: Exception, console: Console) -> str:
    """One line: a mistake of the user or of the settings in its own words, a defect of ours by its type as well."""
    text = " / ".join(line for line in str(error).splitlines() if line.strip())
    if isinstance(error, UserError):
        return text
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        return f"out of memory: {text}".removesuffix(": ")
    console.say(traceback.format_exc())
    return f"{DEFECT}{type(error).__name__}: {text}"


def _twice(what: str, do: Callable[[], T], console: Console) -> T:
    """Do it, once more where it crashes; a mistake of the user or of the settings would only be found again."""
    try:
        return do()
    except UserError:
        raise
    except Exception as error:
        console.say(f"{what} crashed, trying once more: {_reason(error, console)}")
    return do()


def _score_folder(plan: Plan, recipe: Recipe) -> Path:
    """Where the scores of the models before and of the oracle are kept for all runs that would find the same ones."""
    sections = {"model", "evaluation", "seed", "dtype", "device", "threads", "trust_remote_code"}
    parts = recipe.model_dump(mode="json", include=sections | {"attacks"})
    templates = (recipe.corpus.template, recipe.corpus.plain_template)
    below = [request.patch.id for request in earlier_requests(recipe.after)]
    return plan.path("shared", digest([plan.weights, parts, *templates, *below])[:16])


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


def _blank(plan: Plan, cell: CellPlan, seed: int, tuned: Tuned) -> Outcome:
    """Without numbers: failed like the trials, or not run yet."""
    fingerprint, folder = _fingerprint(plan, cell, seed, tuned.parameters), str(_folder(plan, cell, seed))
    return Outcome(cell.name, seed, fingerprint, tuned.parameters, folder, tuned.failed)


def _final(plan: Plan, cell: CellPlan, seed: int, tuned: Tuned, console: Console) -> Outcome:
    """One run of the table; whatever stops it but an interruption becomes its result."""
    folder = _folder(plan, cell, seed)
    blank = _blank(plan, cell, seed, tuned)
    if blank.failed is not None:
        return blank
    try:
        recipe = cell.recipe(cell.final[seed], tuned.parameters, folder)
        fresh, peak_known = not (folder / "metrics.json").exists(), _start_peak(recipe.device)
        run = partial(_run, plan, recipe, own_folder=seed in cell.folders)
        metrics = _twice(f"{cell.name}, seed {seed}", run, console)
        before, after, oracle = (metrics[name] for name in ("before", "after", "oracle"))
        assert before is not None
        assert after is not None
        return dataclasses.replace(
            blank,
            values={**_numbers(after, before, oracle), **_costs(folder, fresh=fresh, peak_known=peak_known)},
            before=_numbers(before, before, oracle),
            oracle={} if oracle is None else _numbers(oracle, before, oracle),
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


def _study_of(plan: Plan, cell: CellPlan) -> str:
    searches = {key: search.model_dump(mode="json") for key, search in cell.search.items()}
    return digest([plan.weights, [cell.trial[seed] for seed in sorted(cell.trial)], searches])


def _everywhere(plan: Plan, *parts: Any) -> str:
    """Digest of what decides a job, the same wherever the output folder lies."""
    own = json.dumps(str(plan.output))[1:-1]
    return digest(json.dumps(to_plain([plan.weights, *parts]), sort_keys=True).replace(own, ""))


def _tuning_key(plan: Plan, cell: CellPlan) -> str:
    searches = {key: search.model_dump(mode="json") for key, search in cell.search.items()}
    return _everywhere(plan, [cell.trial[seed] for seed in sorted(cell.trial)], searches)


def _read_tuned(plan: Plan, cell: CellPlan) -> Tuned | None:
    """What the trials found, or None where they are not done."""
    if not cell.search:
        return Tuned()
    path = plan.path("tuning", f"{cell.name}.json")
    if not path.exists():
        return None
    tuned = Tuned(**json.loads(path.read_text(encoding="utf-8")))
    return tuned if tuned.fingerprint == _study_of(plan, cell) and len(tuned.trials) == plan.trials else None


def _tune(plan: Plan, cell: CellPlan, console: Console, storage: BaseStorage | None = None) -> Tuned:
    """Do what is left of a cell's trials and choose the best of them, by validation facts alone.

    A trial is a function of the trials before it, so that a stopped study goes on as if it had not been. One that
    was cut off is done again from its run folders; one that ended its worker twice has failed.

    Args:
        plan: the comparison.
        cell: the one to tune.
        console: one line a trial.
        storage: where the trials are kept; None: a journal in the output folder.
    """
    optuna = load_optuna()
    fingerprint = _study_of(plan, cell)
    plan.path("tuning").mkdir(parents=True, exist_ok=True)
    study: Study = optuna.create_study(
        study_name=f"{cell.name} {(fingerprint if storage is None else _tuning_key(plan, cell))[:12]}",
        storage=journal(plan.path("tuning", f"{cell.name}.journal")) if storage is None else storage,
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
        deaths = _deaths_of_trial(study, parameters)
        try:
            if deaths >= _DEATHS:
                failed = _DIED
            else:
                recipes = [cell.recipe(raw, parameters, folder / f"seed-{seed}") for seed, raw in cell.trial.items()]
                what = f"{cell.name}, trial {number + 1}"
                score = statistics.fmean(_twice(what, partial(_trial_score, plan, r), console) for r in recipes)
        except KeyboardInterrupt:
            trial.set_user_attr("stopped", True)  # by the user, which is no death
            raise
        except Exception as error:
            failed = _reason(error, console)
        if failed is not None:
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


def _deaths_of_trial(study: Study, parameters: Mapping[str, Any]) -> int:
    """Workers that died doing the trial that is next; it has drawn the same parameters then."""
    last: list[Mapping[str, Any]] = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name == "COMPLETE":
            last = []
        elif trial.state.name == "FAIL":
            last.append(trial.user_attrs)
    return sum(attrs.get("parameters") == parameters and "stopped" not in attrs for attrs in last)


def _trial_score(plan: Plan, recipe: Recipe) -> float:
    metrics = _run(plan, recipe, own_folder=False)
    before, after = metrics["before"], metrics["after"]
    assert before is not None
    assert after is not None
    return score_of(after, before)[0]


# working it off, in one process or in several


@contextlib.contextmanager
def _claim(path: Path) -> Iterator[int | None]:
    """How many processes died with this claim, now that it is this process's alone; None where it is another's.

    The system takes it from a process that dies, whose mark then stays in the file.
    """
    try:
        import fcntl
    except ImportError:  # Windows: one worker only
        yield 0
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        deaths = os.fstat(handle).st_size
        os.pwrite(handle, b".", deaths)
        try:
            yield deaths
        finally:
            os.ftruncate(handle, 0)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class _Job:
    """A cell's trials, or one of its runs.

    Attributes:
        name: of the job, within its cell.
        key: of the job in a storage.
        done: whether its result lies in the output folder.
        do: do it; told how many workers died of it.
        keep: put the result into the output folder.
        stored: the result as a storage holds it.
    """

    name: str
    key: str
    done: Callable[[], bool]
    do: Callable[[int], Tuned | Outcome]
    keep: Callable[[Tuned | Outcome], None]
    stored: Callable[[Mapping[str, Any]], Tuned | Outcome]


def _keep(path: Path, result: Tuned | Outcome) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)


def _tuning_job(plan: Plan, cell: CellPlan, console: Console, board: Board | None) -> _Job:
    storage = None if board is None else board.storage
    return _Job(
        "tuning",
        f"{cell.name} tuning {digest([_tuning_key(plan, cell), plan.trials])[:16]}",
        done=lambda: _read_tuned(plan, cell) is not None,
        do=lambda _: _tune(plan, cell, console, storage),
        keep=lambda tuned: _keep(plan.path("tuning", f"{cell.name}.json"), tuned),
        stored=lambda row: Tuned(**{**row, "fingerprint": _study_of(plan, cell)}),
    )


def _run_job(plan: Plan, cell: CellPlan, seed: int, tuned: Tuned, console: Console) -> _Job:
    def do(deaths: int) -> Outcome:
        blank = _blank(plan, cell, seed, tuned)
        outcome = (
            dataclasses.replace(blank, failed=_DIED) if deaths >= _DEATHS else _final(plan, cell, seed, tuned, console)
        )
        score = outcome.values.get("score")
        found = f"failed: {outcome.failed}" if score is None else f"S {score:.3f}"
        console.say(f"{cell.name}, seed {seed}: {found}")
        return outcome

    return _Job(
        f"seed-{seed}",
        f"{cell.name} seed-{seed} {_everywhere(plan, cell.final[seed], tuned.parameters, tuned.failed)[:16]}",
        done=lambda: _read_result(plan, cell, seed, tuned.parameters) is not None,
        do=do,
        keep=lambda outcome: _keep(_result_path(plan, cell, seed), outcome),
        stored=lambda row: Outcome(**{**row, "fingerprint": _fingerprint(plan, cell, seed, tuned.parameters)}),
    )


def _jobs(plan: Plan, cell: CellPlan, console: Console, board: Board | None) -> list[_Job]:
    """What of a cell can be done now: its trials, or else its runs that have no result, here or in the storage."""
    tuned = _read_tuned(plan, cell)
    if tuned is None:
        job = _tuning_job(plan, cell, console, board)
        if not _taken_over(job, board):
            return [job]
        tuned = _read_tuned(plan, cell)
        assert tuned is not None
    jobs = [_run_job(plan, cell, seed, tuned, console) for seed in cell.final]
    return [job for job in jobs if not job.done() and not _taken_over(job, board)]


def _taken_over(job: _Job, board: Board | None) -> bool:
    """Whether the storage holds the result; it lies in the output folder then."""
    row = None if board is None else board.result(job.key)
    if row is not None:
        job.keep(job.stored(row))
        assert job.done()
    return row is not None


def _attempt(plan: Plan, cell: CellPlan, job: _Job, console: Console, board: Board | None) -> bool:
    """Do a job unless it is done or another worker is at it; whether this worker did it."""
    if board is None:
        with _claim(plan.path("claims", cell.name, job.name)) as deaths:
            mine = deaths is not None and not job.done()
            if mine:
                job.keep(job.do(deaths or 0))
        return mine
    with board.claim(job.key) as claim:
        if claim is None:
            return False
        try:
            result = job.do(claim.deaths)
            claim.finish(to_plain(result))
        except Exception:
            if not claim.lost:
                raise
            console.say(f"{cell.name}, {job.name}: another worker took it over, since this one stood still too long")
            return False
        job.keep(result)
    return True


def _work(plan: Plan, console: Console, board: Board | None) -> None:
    """Do whatever nobody else is doing until nothing is left, or until the process that started this one is gone."""
    parent = multiprocessing.parent_process()
    while True:
        left, progress = 0, False
        if board is not None:
            board.refresh()
        for cell in plan.cells:
            for job in _jobs(plan, cell, console, board):
                if parent is not None and not parent.is_alive():
                    return
                left += 1
                if _attempt(plan, cell, job, console, board):
                    assert job.done()
                    progress = True
        if not left:
            return
        if not progress:
            time.sleep(_WAIT_SECONDS if board is None else _WAIT_SECONDS_SHARED)


@contextlib.contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """SIGTERM, as a cluster sends it at the end of its time, stops like Ctrl-C: what is kept is not counted a death."""

    def stop(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _threads_of(workers: int) -> int:
    """Threads of each worker, where the recipe names no number."""
    return max(1, torch.get_num_threads() // workers)


def _work_beside(plan: Plan, console: Console, workers: int, shared: SharedStorage | None) -> None:
    """What another worker's process does."""
    torch.set_num_threads(_threads_of(workers))
    with contextlib.suppress(KeyboardInterrupt), _terminated_is_interrupted():
        _work(plan, console, None if shared is None else Board(shared))


def _begin(plan: Plan, shared: SharedStorage | None, console: Console) -> Board | None:
    """Forget what is to be done again: what failed, and how often workers died.

    With a storage this happens only where it is asked for, since others may be at work; else a recipe's own folder
    says itself whether it is finished.
    """
    board = None if shared is None else Board(shared)
    if shared is not None and not shared.retry_failed:
        return board
    for cell in plan.cells:
        for path in plan.path("results", cell.name).glob("seed-*.json"):
            if cell.folders or json.loads(path.read_text(encoding="utf-8"))["failed"] is not None:
                path.unlink(missing_ok=True)
        if board is None:
            for path in plan.path("claims", cell.name).glob("*"):
                with _claim(path):
                    pass
        elif (tuned := _read_tuned(plan, cell)) is not None:
            for seed in cell.final:
                board.forget_failure(_run_job(plan, cell, seed, tuned, console).key)
    if board is not None:
        board.refresh()
    return board


def run_plan(plan: Plan, console: Console, *, workers: int = 1, shared: SharedStorage | None = None) -> Comparison:
    """Do what is left of a plan, write the table and the figure, and return what they show.

    Args:
        plan: from :func:`plan_grid` or :func:`plan_recipes`.
        console: one line a trial and a run.
        workers: processes; this one is the first of them. At equal ``threads`` they do not change the result.
        shared: storage by which this and other calls, of other machines too, divide the work.

    Raises:
        UserError: Optuna, a database's driver or file locks are missing, or the storage refuses.
        Interrupted: Ctrl-C or SIGTERM; finished runs and trials are kept.
    """
    if workers > 1 and os.name == "nt":
        raise UserError("compare: --workers needs the file locks of a POSIX system; leave it out")
    if any(cell.search for cell in plan.cells):
        load_optuna()
    with contextlib.nullcontext() if shared is None else naming_the_storage(shared):
        _run_workers(plan, console, workers, shared)
    comparison = gather(plan)
    write_comparison(comparison, plan.output)
    return comparison


def _run_workers(plan: Plan, console: Console, workers: int, shared: SharedStorage | None) -> None:
    board = _begin(plan, shared, console)
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_work_beside, args=(plan, console, workers, shared)) for _ in range(workers - 1)]
    threads = torch.get_num_threads()
    try:
        for process in others:
            process.start()
        torch.set_num_threads(_threads_of(workers))
        with _terminated_is_interrupted():
            _work(plan, console, board)
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
