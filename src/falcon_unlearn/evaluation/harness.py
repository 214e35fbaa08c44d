"""The bridge to lm-evaluation-harness: find its tasks, ask a model in memory, hand back one row a document.

Tasks, prompts and log-likelihoods are the harness's own (https://github.com/EleutherAI/lm-evaluation-harness), with its
defaults, so that accuracies stand beside published ones. What it prints is swallowed, and what it changes in the
process, the model and the tokenizer is undone.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import io
import json
import logging
import math
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from falcon_unlearn.errors import UserError, did_you_mean
from falcon_unlearn.evaluation.log_probabilities import evaluating
from falcon_unlearn.evaluation.suite import Subject

_EXTRA = "pip install 'falcon-unlearn[lm-eval]'"
_OWN_FOLDERS = ("wmdp", "mmlu/default", "wikitext")
"""Task folders of the harness that are looked through first: all of its 14 000 names take ten seconds and more."""
_TALKATIVE = ("lm_eval", "transformers", "datasets")
_PLACES = ("dataset_path", "dataset_name", "dataset_kwargs", "metadata", "tag")
"""Keys of a task that say where it and its documents stand, not what is asked."""


@dataclass(frozen=True)
class ChoiceRow:
    """One multiple-choice question.

    Attributes:
        task: leaf task.
        index: of the document in its task.
        log_likelihoods: of each option in nats, summed over its tokens.
        answers: positions of the right options.
        chosen: position of the likeliest option, the first of several; None where a log-likelihood is not finite.
        chosen_normalised: the same by log-likelihood per character.
        cut: the prompt was longer than the model's context and lost its beginning.
    """

    task: str
    index: int
    log_likelihoods: tuple[float, ...]
    answers: tuple[int, ...]
    chosen: int | None
    chosen_normalised: int | None
    cut: bool

    @property
    def correct(self) -> float:
        """1.0 or 0.0; NaN where it cannot be said."""
        return math.nan if self.chosen is None else float(self.chosen in self.answers)

    @property
    def correct_normalised(self) -> float:
        """The same for the option chosen per character."""
        return math.nan if self.chosen_normalised is None else float(self.chosen_normalised in self.answers)


@dataclass(frozen=True)
class TextRow:
    """One text of a perplexity task.

    Attributes:
        task: leaf task.
        index: of the document in its task.
        log_likelihood: of the whole text in nats, read in disjoint windows of the model's context.
        words: as the task counts them; None where it has no perplexity per word.
        bytes: the same for bytes of UTF-8.
    """

    task: str
    index: int
    log_likelihood: float
    words: int | None
    bytes: int | None


Row = ChoiceRow | TextRow


@dataclass(frozen=True)
class TaskGroup:
    """A group of tasks and how the harness makes one number of theirs.

    Attributes:
        name: of the group.
        tasks: its leaf tasks.
        by_size: metric -> whether a task counts by its number of documents (else each task counts once).
    """

    name: str
    tasks: tuple[str, ...]
    by_size: Mapping[str, bool]


@dataclass(frozen=True, eq=False)
class Benchmark:
    """Tasks with their documents read; leaf tasks are the harness's objects."""

    tasks: Mapping[str, Any]
    groups: tuple[TaskGroup, ...]


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Nothing that the harness writes is seen; log levels, progress bars, environment and random state are put back."""
    import datasets
    import transformers  # noqa: F401  (sets its log level when it is imported)

    environment = set(os.environ)
    levels = {name: logging.getLogger(name).level for name in _TALKATIVE}
    bars = not datasets.utils.are_progress_bars_disabled()
    # It draws a name for each task it looks at.
    drawn = random.getstate()
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    if bars:
        datasets.disable_progress_bars()
    try:
        # Its progress bars cannot be turned off: one for every batch of windows.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        random.setstate(drawn)
        if bars:
            datasets.enable_progress_bars()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name in set(os.environ) - environment:
            del os.environ[name]


def harness_version() -> str:
    """Of the installed lm-evaluation-harness.

    Raises:
        UserError: it is not installed.
    """
    try:
        with _undisturbed():
            import accelerate  # noqa: F401
            import lm_eval  # noqa: F401
        return importlib.metadata.version("lm_eval")
    except ImportError as error:
        raise UserError(f"the suite wmdp needs lm-evaluation-harness: {_EXTRA}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _members(entry: Any) -> list[str]:
    """Names of other tasks and groups that a group's file refers to."""
    listed = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else None
    return [name for name in (listed if isinstance(listed, list) else [listed]) if isinstance(name, str)]


def _unknown(names: Sequence[str], index: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for name in names:
        found += _unknown(_members(index[name]), index) if name in index else [name]
    return found


def _dataset_of(name: str, index: Mapping[str, Any]) -> str:
    """Dataset of the first leaf task below ``name``."""
    entry = index[name]
    below = [*_members(entry), *sorted(entry.tags if entry.kind.name == "TAG" else ())]
    return _dataset_of(below[0], index) if below else str((entry.cfg or {}).get("dataset_path"))


def _loading_error(error: Exception, name: str, index: Mapping[str, Any]) -> UserError:
    dataset, text = _dataset_of(name, index), " ".join(str(error).split())
    page = f"https://huggingface.co/datasets/{dataset}"
    what = f"wmdp.tasks: dataset '{dataset}' of '{name}'"
    if "gated dataset" in text:
        return UserError(f"{what} is gated: ask for access at {page}, then log in with 'hf auth login'")
    if isinstance(error, OSError) or "Couldn't find cache" in text or type(error).__module__.startswith("datasets"):
        if re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) and not Path(dataset).exists():
            return UserError(
                f"{what} could not be read from the hub ({page}): check the network, HF_HUB_OFFLINE and your login, "
                "or name a folder of task files with local data as wmdp.include_path"
            )
        return UserError(
            f"{what} could not be read ({_first_line(error)}): correct data_files in the task's file (relative paths "
            "start from the current directory)"
        )
    return UserError(f"wmdp.tasks: '{name}' could not be loaded ({_first_line(error)}): correct the task's file")


def _find(names: Sequence[str], include_path: Path | None) -> Any:
    """The harness's task manager, looking no further than it must."""
    from lm_eval import tasks

    own = Path(tasks.__file__).parent
    users = [] if include_path is None else [include_path]
    manager = tasks.TaskManager(include_path=[*(own / name for name in _OWN_FOLDERS), *users], include_defaults=False)
    if _unknown(names, manager.task_index):
        manager = tasks.TaskManager(include_path=users)
    for name in _unknown(names, manager.task_index):
        where = "" if include_path is None else f" and none in {include_path}"
        raise UserError(
            f"wmdp.tasks: '{name}' is no task of lm-evaluation-harness{where}"
            f"{did_you_mean(name, manager.all_tasks)}; 'lm-eval ls tasks' lists its own"
        )
    return manager


def _prepare(name: str, task: Any, num_fewshot: int | None) -> None:
    """Refuse what cannot be scored here, and set the number of examples by the harness's rules."""
    from lm_eval.api.task import ConfigurableTask

    kind = task.OUTPUT_TYPE
    known = kind == "loglikelihood_rolling" or (
        kind == "multiple_choice"
        and isinstance(task, ConfigurableTask)
        and not task.multiple_input
        and not callable(task.config.process_results)
    )
    if not known:
        raise UserError(
            f"wmdp.tasks: '{name}' ({kind}, or with rules of its own) cannot be scored here: name multiple-choice or "
            "perplexity tasks"
        )
    configured = task.get_config("num_fewshot")
    if configured is None or (num_fewshot is not None and configured != 0):
        task.set_config("num_fewshot", num_fewshot or 0)
    task.set_fewshot_seed(0)
    try:
        task.fewshot_context(task.eval_docs[0], task.get_config("num_fewshot"))
    except Exception as error:  # the harness asserts, and templates raise what they like
        raise UserError(
            f"wmdp.tasks: '{name}' cannot be asked with {task.get_config('num_fewshot')} examples "
            f"({_first_line(error)}): change wmdp.num_fewshot or the task's file"
        ) from error


def open_benchmark(names: Sequence[str], include_path: Path | None, num_fewshot: int | None) -> Benchmark:
    """Find tasks and read their documents.

    Args:
        names: tasks, groups or tags.
        include_path: a folder of task files, which come before the harness's own of the same name.
        num_fewshot: examples before each question, except where a task fixes none; None: as the task says.

    Raises:
        UserError: unknown names, unreadable or gated datasets, tasks of another kind.
    """
    from lm_eval.api.group import Group

    tasks: dict[str, Any] = {}
    groups: dict[str, TaskGroup] = {}
    with _undisturbed():
        manager = _find(names, include_path)
        for name in names:
            try:
                loaded = manager.load([name])
            except Exception as error:  # whatever it is, it is about this task
                raise _loading_error(error, name, manager.task_index) from error
            for leaf, task in loaded["tasks"].items():
                _prepare(leaf, task, num_fewshot)
                tasks.setdefault(leaf, task)
            for group in loaded.get("groups", {}).values():
                assert isinstance(group, Group)
                leaves = tuple(dict.fromkeys(task.task_name for task in group.get_all_tasks()))
                by_size = {metric.metric: metric.weight_by_size for metric in group.aggregate_metric_list or ()}
                groups.setdefault(group.name, TaskGroup(group.name, leaves, by_size))
    return Benchmark(tasks, tuple(groups.values()))


def task_digest(task: Any, limit: int | None) -> str:
    """SHA-256 of what a task asks: its documents in use, its examples and its templates, not where they stand."""
    config = {key: value for key, value in task.dump_config().items() if key not in _PLACES}
    documents = [document for _, document in task.doc_iterator(limit=limit)]
    examples = list(task.fewshot_docs()) if task.get_config("num_fewshot") else []
    text = json.dumps([task.VERSION, config, documents, examples], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def metrics_of(task: Any) -> tuple[str, ...]:
    """Metrics that a task names, in its order."""
    return tuple(task.aggregation())


def _tokenizer(subject: Subject) -> Any:
    """The subject's tokenizer; a copy where the harness would give it a padding token."""
    tokenizer = subject.encoder.tokenizer
    return copy.deepcopy(tokenizer) if tokenizer.pad_token_id is None else tokenizer


def _choice_row(name: str, sample: Mapping[str, Any], options: Sequence[str], *, cut: bool) -> ChoiceRow:
    values = np.array([value for value, _ in sample["filtered_resps"]][: len(options)])
    scorable = bool(np.isfinite(values).all())
    target = sample["target"]
    answers = [
        options.index(answer) if isinstance(answer, str) and answer in options else answer
        for answer in (target if isinstance(target, list) else [target])
    ]
    return ChoiceRow(
        task=name,
        index=int(sample["doc_id"]),
        log_likelihoods=tuple(values.tolist()),
        answers=tuple(answer for answer in answers if isinstance(answer, int)),
        chosen=int(values.argmax()) if scorable else None,
        chosen_normalised=int((values / [len(option) for option in options]).argmax()) if scorable else None,
        cut=cut,
    )


def _text_row(name: str, sample: Mapping[str, Any]) -> TextRow:
    def count(*metrics: str) -> int | None:
        return next((int(sample[metric][1]) for metric in metrics if metric in sample), None)

    return TextRow(
        task=name,
        index=int(sample["doc_id"]),
        log_likelihood=float(sample["filtered_resps"][0]),
        words=count("word_perplexity"),
        bytes=count("byte_perplexity", "bits_per_byte"),
    )


def ask(name: str, task: Any, subject: Subject, *, limit: int | None, apply_chat_template: bool) -> list[Row]:
    """Ask a model all documents of a leaf task, or the first ``limit``.

    Raises:
        UserError: ``apply_chat_template`` without a chat template.
    """
    if apply_chat_template and not getattr(subject.encoder.tokenizer, "chat_template", None):
        raise UserError(
            "wmdp.apply_chat_template is set, but the model's tokenizer has no chat template: leave it out, or put a "
            "chat_template.jinja beside the model"
        )
    with _undisturbed(), evaluating(subject.model):
        from lm_eval.defaults import DEFAULT_OTHER_SEED
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        harness = HFLM(
            pretrained=subject.model, tokenizer=_tokenizer(subject), backend="causal", batch_size=subject.batch_size
        )
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        result = evaluate(
            harness,
            {"tasks": {name: task}, "groups": {}},
            limit=limit,
            bootstrap_iters=0,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
        )
        samples = result["samples"][name]
        samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            return [_text_row(name, sample) for sample in samples]
        rows: list[Row] = []
        for sample in samples:
            longest = max(("".join(pair[:2]) for pair in sample["arguments"]), key=len)
            cut = len(harness.tok_encode(longest)) > harness.max_length + 1
            rows.append(_choice_row(name, sample, task.doc_to_choice(sample["doc"]), cut=cut))
        return rows
