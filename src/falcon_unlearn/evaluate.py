"""Run evaluation suites on a model that is there already, and on an oracle beside it."""

from __future__ import annotations

import gc
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from falcon_unlearn.artifacts import SuiteResult, write_json
from falcon_unlearn.console import Console, in_columns, number
from falcon_unlearn.errors import UserError, did_you_mean
from falcon_unlearn.evaluation.suite import Rows, Subject, Suite
from falcon_unlearn.evaluation.suites import SUITES, SuitesConfig, open_suites
from falcon_unlearn.output_folder import begin_output
from falcon_unlearn.ranks import ALONE, Ranks
from falcon_unlearn.recipe import apply_overrides, validated
from falcon_unlearn.subjects import KnownModel, ModelRequest, computing_with, known_model, raw_request, settings_of
from falcon_unlearn.suite_scores import read_suite, score_suite

SETTINGS_FILE = "evaluation.yaml"
_MODELS = ("model", "oracle")
_NOT_COMPARED = ("output", "device", "threads")


class EvaluationRequest(ModelRequest):
    """What ``falcon-unlearn evaluate`` is asked for."""

    suites: SuitesConfig
    """The suites and their settings."""


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
        folder: where scores and numbers are.
        results: by ``model`` and, where there is one, ``oracle``; then by suite.
    """

    folder: Path
    results: Mapping[str, Mapping[str, SuiteResult]]


def evaluation_request(
    model: str,
    suites: Sequence[str],
    output: str,
    *,
    patches: Sequence[str] = (),
    oracle: str | None = None,
    overrides: Sequence[str] = (),
) -> EvaluationRequest:
    """Make a request of what stands on the command line.

    Args:
        model: folder or hub id; or the folder of a run, which brings its patch, oracle and template.
        suites: names of suites.
        output: folder.
        patches: patch folders, the earliest first; of a run they stand on its own patch.
        oracle: folder or hub id.
        overrides: ``key=value`` of the request, or ``suite.key=value``.

    Raises:
        UserError: one line per mistake, all at once.
    """
    if not suites:
        raise UserError(f"--suite: name at least one of {', '.join(SUITES)}")
    for name in suites:
        if name not in SUITES:
            raise UserError(f"--suite {name}: unknown{did_you_mean(name, SUITES)}; known: {', '.join(SUITES)}")
    raw, _ = raw_request(model, output, patches, oracle)
    raw["suites"] = {name: {} for name in suites}
    return validated(EvaluationRequest, apply_overrides(raw, [_placed(text, suites) for text in overrides]), "evaluate")


def _placed(override: str, suites: Sequence[str]) -> str:
    """``tofu.split=forget05`` belongs to the suite."""
    first = re.split(r"[.=]", override, maxsplit=1)[0].strip()
    if first in SUITES and first not in suites:
        raise UserError(f"'{override}': suite {first} is not among --suite {' '.join(suites)}")
    return f"suites.{override}" if first in SUITES else override


def evaluate(
    request: EvaluationRequest,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Score the model, and the oracle where one is named, with every suite, and write the numbers.

    Args:
        request: from :func:`evaluation_request`.
        resume: go on in the output folder behind the last samples that were kept.
        overwrite: remove an earlier evaluation from it first.
        console: where progress goes; None is silent.
        ranks: from :func:`falcon_unlearn.ranks.started_together`; rank 0 writes.

    Raises:
        UserError: anything wrong with model, patches, data or output folder; nothing was written then.
    """
    console = console if console is not None and ranks.first else Console(quiet=True)
    with computing_with(request.threads):
        return _evaluate(request, console, ranks, resume=resume, overwrite=overwrite)


def _evaluate(
    request: EvaluationRequest, console: Console, ranks: Ranks, *, resume: bool, overwrite: bool
) -> Evaluation:
    suites = open_suites(request.suites, Path.cwd(), request.seed)
    known = {"model": known_model(request, request.model, "MODEL", request.patches)}
    if request.oracle is not None:
        known["oracle"] = known_model(request, request.oracle, "--oracle")
    folder = Path(request.output).expanduser().resolve()
    settings = _settings(request, suites, known)
    ranks.on_first(
        lambda: begin_output(
            folder,
            SETTINGS_FILE,
            what="evaluation",
            is_ours=_is_ours,
            settings=settings,
            not_compared=_NOT_COMPARED,
            resume=resume,
            overwrite=overwrite,
        )
    )
    rows = {
        which: _score(model, suites, request.batch_size, folder / "scores" / which, console, ranks=ranks)
        for which, model in known.items()
    }
    results: dict[str, Mapping[str, SuiteResult]] = {}
    for which, model in known.items():
        oracle = rows.get("oracle") if which == "model" else None
        results[which] = {
            name: suite.summarise(
                rows[which][name], None if oracle is None else oracle[name], settings_of(request, model)
            )
            for name, suite in suites.items()
        }

    def write() -> None:
        for name, suite in suites.items():
            oracle_rows = rows["oracle"][name] if "oracle" in rows else None
            for file, content in suite.exports(rows["model"][name], oracle_rows).items():
                write_json(folder / file, content)
        write_json(folder / "metrics.json", {which: results.get(which) for which in _MODELS})

    ranks.on_first(write)
    return Evaluation(folder, results)


def _score(
    known: KnownModel, suites: Mapping[str, Suite], batch_size: int, stem: Path, console: Console, *, ranks: Ranks
) -> dict[str, Rows]:
    stems = {name: stem.with_name(f"{stem.name}.{name}") for name in suites}
    rows = ranks.on_first(
        lambda: {name: found for name, suite in suites.items() if (found := read_suite(suite, stems[name])) is not None}
    )
    if len(rows) < len(suites):  # the model is loaded only for what is not scored yet
        console.say(f"scoring: {known.name}")
        subject = Subject(known.load(), known.encoder, batch_size, known.name)
        rows |= {
            name: score_suite(suites[name], subject, stems[name], console, ranks) for name in suites if name not in rows
        }
        del subject
        gc.collect()
    return rows


def _settings(
    request: EvaluationRequest, suites: Mapping[str, Suite], known: Mapping[str, KnownModel]
) -> dict[str, Any]:
    return {
        **request.model_dump(mode="json"),
        "content": {
            **{f"weights.{which}": model.fingerprint for which, model in known.items()},
            **{f"{name}.{part}": digest for name, suite in suites.items() for part, digest in suite.content.items()},
        },
    }


def _is_ours(name: Path) -> bool:
    if name.parent == Path("scores"):
        return name.name.split(".")[0] in _MODELS and name.suffix == ".jsonl"
    return name.as_posix() in {SETTINGS_FILE, "metrics.json", "scores", "TOFU_EVAL.json", "TOFU_SUMMARY.json"}


def results_table(evaluation: Evaluation) -> str:
    """The numbers with their intervals, the model's beside the oracle's, and what can be concluded."""
    oracle = evaluation.results.get("oracle")
    parts = []
    for suite, result in evaluation.results["model"].items():
        rows = [[suite, "value", "95 % interval", "n", "oracle" if oracle else ""]]
        for name, estimate in result.metrics.items():
            bounds = "" if estimate.low is None else f"{number(estimate.low)} .. {number(estimate.high)}"
            count = f"{estimate.n}" + (f" ({estimate.unscorable} unscorable)" if estimate.unscorable else "")
            beside = oracle[suite].metrics.get(name) if oracle else None
            rows.append([name, number(estimate.value), bounds, count, number(beside.value) if beside else ""])
        parts.append("\n".join([in_columns(rows), *(f"- {statement}" for statement in result.statements)]))
    return "\n\n".join(parts)
