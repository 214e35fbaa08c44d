"""The suite ``muse`` (Shi et al. 2024, arXiv 2407.06460): verbatim and knowledge memorisation, and privacy leakage.

Numbers are those of MUSE's own code: prompts are plain text without a template, ROUGE-L F1 without stemming, greedy
decoding of 128 (verbmem) and 32 tokens (knowmem), the true continuation cut to its first 128 tokens
(beginning-of-sequence among them). MUSE prints ROUGE times 100. For PrivLeak's convention see
:mod:`falcon_unlearn.evaluation.membership`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from falcon_unlearn.artifacts import SuiteResult
from falcon_unlearn.config import Section
from falcon_unlearn.corpus.batching import Encoded, Encoder
from falcon_unlearn.errors import UserError
from falcon_unlearn.evaluation.generation import generate_greedy, stop_ids
from falcon_unlearn.evaluation.intervals import mean_estimate
from falcon_unlearn.evaluation.membership import auc, auc_estimate, privleak_estimate
from falcon_unlearn.evaluation.privacy import (
    PrivacyScore,
    privacy_score_from,
    privacy_scores,
    privleak_statement,
    without_nan,
)
from falcon_unlearn.evaluation.rouge import UnicodeTokenizer
from falcon_unlearn.evaluation.suite import Rows, Subject
from falcon_unlearn.evaluation.token_scores import token_scores
from falcon_unlearn.model.loading import context_length

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

Row = Mapping[str, str]

VERBMEM, KNOWMEM_FORGET, KNOWMEM_RETAIN = "verbmem", "knowmem_forget", "knowmem_retain"
PRIVLEAK_FORGET, PRIVLEAK_HOLDOUT = "privleak_forget", "privleak_holdout"

# Configuration, split and columns on the hub, as in the cards of muse-bench/MUSE-News and MUSE-Books.
_TABLES: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    VERBMEM: ("verbmem", "forget", ("prompt", "gt")),
    KNOWMEM_FORGET: ("knowmem", "forget_qa", ("question", "answer")),
    KNOWMEM_RETAIN: ("knowmem", "retain_qa", ("question", "answer")),
    PRIVLEAK_FORGET: ("privleak", "forget", ("text",)),
    PRIVLEAK_HOLDOUT: ("privleak", "holdout", ("text",)),
}
_EXAMPLES = {KNOWMEM_FORGET: "forget_qa_icl", KNOWMEM_RETAIN: "retain_qa_icl"}

# A model that goes on with a question of its own has finished its answer.
_ANSWER_ENDS = ("\n\n", "\nQuestion", "Question:")


_READING = (
    "verbmem and knowmem_forget should fall to a retrained model's, knowmem_retain stay. MUSE prints them times 100.",
    "auc_min_k: how often a forget text looks more like training data than a never-seen one (MUSE's code: 1 minus it).",
)


@dataclass(frozen=True)
class MuseScore:
    """One continuation or answer; ROUGE is NaN where the prompt leaves no room in the context or nothing is expected.

    Attributes:
        set: name of the part.
        prompt: the prompt, or the question without the examples before it.
        truth: what ROUGE compares with.
        rouge_l_f1: MUSE's number, in [0, 1].
        rouge_l_recall: MUSE's code computes it, too.
    """

    set: str
    index: int
    prompt: str
    truth: str
    generation: str
    rouge_l_f1: float
    rouge_l_recall: float


class MuseConfig(Section):
    """MUSE-News or MUSE-Books."""

    corpus: Literal["News", "Books"] = "News"
    """Which of the two."""
    data: str | None = None
    """Folder with verbmem/, knowmem/ and privleak/, or id on the hub; empty: muse-bench/MUSE-News or -Books."""
    verbmem_tokens: int = Field(128, ge=1)
    """Tokens generated, and compared, of a continuation."""
    knowmem_tokens: int = Field(32, ge=1)
    """Longest answer."""
    min_k: float = Field(0.4, gt=0, le=1)
    """Share of tokens in the Min-K% of PrivLeak."""
    retrain_auc: float | None = Field(None, gt=0, lt=1)
    """AUC of a retrained model with forget records as members, for PrivLeak where there is no oracle.

    MUSE's own retrained models, their AUCs turned round: 0.5228 for News, 0.4607 for Books.
    """
    max_records: int | None = Field(None, ge=1)
    """Score at most so many rows of a part, drawn with the seed; empty: all (100 each on the hub)."""

    def open(self, base_dir: Path, seed: int) -> MuseSuite:
        """Read every table.

        Raises:
            UserError: missing or gated data, or columns that are not MUSE's; names the dataset's page.
        """
        source = _source(self, base_dir)
        tables = {part: source.read(*table) for part, table in _TABLES.items()}
        examples = {part: source.read("knowmem", split, ("question", "answer")) for part, split in _EXAMPLES.items()}
        most = self.max_records
        for part, rows in tables.items():
            if most is not None and len(rows) > most:
                chosen = random.Random(f"muse {part} {seed}").sample(range(len(rows)), most)
                tables[part] = [rows[i] for i in sorted(chosen)]
        return MuseSuite(self, source.name, tables, examples, seed)


@dataclass(frozen=True)
class _Source:
    """Where the tables are: ``folder``, or the hub where it is None; ``page`` is the dataset's."""

    name: str
    folder: Path | None
    page: str

    def read(self, config: str, split: str, columns: Sequence[str]) -> list[Row]:
        """Rows of one split, these columns only.

        Raises:
            UserError: not there, unreadable, empty, or without the columns.
        """
        rows = self._from_hub(config, split) if self.folder is None else self._from_folder(self.folder, config, split)
        place = f"{self.name} ({config}, {split})"
        if not rows:
            raise UserError(f"muse.data: {place} holds no rows: get the data from {self.page}")
        result: list[Row] = []
        for number, row in enumerate(rows, start=1):
            # MUSE's own download script writes privleak as a list of texts.
            given = {columns[0]: row} if isinstance(row, str) and len(columns) == 1 else row
            if not isinstance(given, Mapping) or not set(columns) <= given.keys():
                found = ", ".join(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
                raise UserError(
                    f"muse.data: {place}, row {number}: columns not recognised ({found}); "
                    f"MUSE's are {', '.join(columns)}: see {self.page}"
                )
            wrong = next((column for column in columns if not isinstance(given[column], str)), None)
            if wrong is not None:
                raise UserError(f"muse.data: {place}, row {number}: column '{wrong}' is not text: see {self.page}")
            result.append({column: given[column] for column in columns})
        return result

    def _from_hub(self, config: str, split: str) -> Sequence[Any]:
        import datasets

        try:
            return list(datasets.load_dataset(self.name, config, split=split))
        except Exception as error:  # whatever it is, it is about this dataset
            text = " ".join(str(error).split()) or type(error).__name__
            if "gated dataset" in text:
                raise UserError(
                    f"muse.data: '{self.name}' is gated: ask for access at {self.page}, then log in with "
                    "'hf auth login'"
                ) from error
            raise UserError(
                f"muse.data: '{self.name}' ({config}, {split}) is no local folder and could not be read from the hub "
                f"({text[:200]}): see {self.page}, or name a folder that holds its verbmem/, knowmem/ and privleak/"
            ) from error

    def _from_folder(self, folder: Path, config: str, split: str) -> Sequence[Any]:
        import pyarrow
        from pyarrow import parquet

        inside = folder / config
        files = sorted(inside.glob(f"{split}-*.parquet")) or sorted(inside.glob(f"{split}.*"))
        rows: list[Any] = []
        try:
            for file in files:
                if file.suffix == ".parquet":
                    rows += parquet.read_table(file).to_pylist()
                elif file.suffix in {".json", ".jsonl"}:
                    rows += _json_rows(file.read_text(encoding="utf-8"))
        except (ValueError, OSError, pyarrow.ArrowException) as error:
            raise UserError(
                f"muse.data: {file}: {' '.join(str(error).split())}: get it anew from {self.page}"
            ) from error
        if not rows:
            raise UserError(
                f"muse.data: {inside} has no rows of {split} (.parquet, .json or .jsonl): get them from {self.page}"
            )
        return rows


def _json_rows(text: str) -> Sequence[Any]:
    """A JSON list, or one JSON value a line."""
    value = json.loads(text) if text.lstrip().startswith("[") else None
    return value if isinstance(value, list) else [json.loads(line) for line in text.split("\n") if line.strip()]


def _source(config: MuseConfig, base_dir: Path) -> _Source:
    published = f"muse-bench/MUSE-{config.corpus}"
    page = f"https://huggingface.co/datasets/{published}"
    if config.data is None:
        return _Source(published, None, page)
    path = Path(config.data).expanduser()
    folder = next((p for p in (base_dir / path, path) if p.is_dir()), None)
    if folder is not None:
        return _Source(config.data, folder, page)
    if config.data.startswith((".", "/", "~")) or config.data.count("/") != 1:
        raise UserError(f"muse.data: folder {config.data} does not exist: get the data from {page}")
    return _Source(config.data, None, f"https://huggingface.co/datasets/{config.data}")


class MuseSuite:
    """MUSE's tables, read."""

    def __init__(
        self,
        config: MuseConfig,
        source: str,
        tables: Mapping[str, Sequence[Row]],
        examples: Mapping[str, Sequence[Row]],
        seed: int,
    ) -> None:
        self._config = config
        self._source = source
        self._tables = tables
        self._shots = {part: "".join(map(_shown, rows)) for part, rows in examples.items()}
        self._seed = seed
        self.parts: Mapping[str, int] = {part: len(rows) for part, rows in tables.items()}
        settings = [config.verbmem_tokens, config.knowmem_tokens, config.min_k]
        everything = {**tables, **{f"{part}_examples": rows for part, rows in examples.items()}, "settings": settings}
        self.content: Mapping[str, str] = {
            name: sha256(json.dumps(value, sort_keys=True).encode()).hexdigest() for name, value in everything.items()
        }

    def score(self, part: str, units: range, subject: Subject) -> Sequence[MuseScore | PrivacyScore]:
        """A row a table row."""
        rows = [self._tables[part][i] for i in units]
        if part == VERBMEM:
            return self._continuations(rows, units, subject)
        if part in self._shots:
            return self._answers(part, rows, units, subject)
        limit = context_length(subject.model.config)
        encoded = [_whole(subject.encoder, row["text"], limit) for row in rows]
        scores = token_scores(
            subject.model, encoded, subject.encoder.pad_id, subject.batch_size, subject.device, answer_only=False
        )
        return privacy_scores(subject.encoder, encoded, scores, self._config.min_k, set_name=part, first=units.start)

    def row(self, part: str, plain: Mapping[str, Any]) -> MuseScore | PrivacyScore:
        """A row read back from JSON."""
        if part in {PRIVLEAK_FORGET, PRIVLEAK_HOLDOUT}:
            return privacy_score_from(plain)
        values = {f.name: plain[f.name] for f in dataclasses.fields(MuseScore)}
        missing = {name: math.nan for name, value in values.items() if value is None}
        return MuseScore(**(values | missing))

    def summarise(self, rows: Rows, oracle: Rows | None, settings: Mapping[str, Any]) -> SuiteResult:
        """ROUGE-L F1 of three parts, the AUC of Min-K%, and PrivLeak where there is an oracle or its AUC."""
        metrics = {
            part: mean_estimate([row.rouge_l_f1 for row in rows[part]], seed=self._seed)
            for part in (VERBMEM, KNOWMEM_FORGET, KNOWMEM_RETAIN)
        }
        statements = [*_READING]
        config = self._config
        forget, holdout = _min_k(rows[PRIVLEAK_FORGET]), _min_k(rows[PRIVLEAK_HOLDOUT])
        metrics["auc_min_k"] = auc_estimate(forget, holdout, seed=self._seed)
        retrained: tuple[list[float], list[float]] | float | None = config.retrain_auc
        retrain_auc: float | None = config.retrain_auc
        if oracle is not None:
            retrained = _min_k(oracle[PRIVLEAK_FORGET]), _min_k(oracle[PRIVLEAK_HOLDOUT])
            retrain_auc = auc(*retrained)
        if retrained is None:
            statements.append(
                "No PrivLeak: it compares with a retrained model. Give one (--oracle), or its AUC (muse.retrain_auc)."
            )
        else:
            metrics["privleak"] = privleak_estimate((forget, holdout), retrained, seed=self._seed)
            statements.append(privleak_statement(metrics["privleak"], retrain_auc))
        numbers = (
            row.min_k if isinstance(row, PrivacyScore) else row.rouge_l_f1 for part in rows.values() for row in part
        )
        unscorable = sum(map(math.isnan, numbers))
        if unscorable:
            statements.append(
                f"Not scored: {unscorable} of {sum(map(len, rows.values()))} rows (no room behind the prompt in the "
                "model's context, an empty truth, or a text too short for Min-K%)."
            )
        return SuiteResult(
            "muse",
            {name: without_nan(estimate) for name, estimate in metrics.items()},
            tuple(statements),
            {
                **settings,
                "template": "none: plain text, as in MUSE's code",
                "data": self._source,
                "verbmem_tokens": config.verbmem_tokens,
                "knowmem_tokens": config.knowmem_tokens,
                "min_k": config.min_k,
                "rouge": "ROUGE-L F1, rouge_score without stemming",
            },
        )

    def exports(self, rows: Rows, oracle: Rows | None) -> Mapping[str, Any]:
        """None."""
        return {}

    def _continuations(self, rows: Sequence[Row], units: range, subject: Subject) -> list[MuseScore]:
        most = self._config.verbmem_tokens
        prompts = [_whole(subject.encoder, row["prompt"]) for row in rows]
        generations = _generate(subject, prompts, most)
        scores = []
        for i, row in enumerate(rows):
            truth = _decode(subject.encoder, _whole(subject.encoder, row["gt"]).ids[:most])
            scores.append(_muse_score(VERBMEM, units[i], row["prompt"], truth, generations[i]))
        return scores

    def _answers(self, part: str, rows: Sequence[Row], units: range, subject: Subject) -> list[MuseScore]:
        prompts = [_whole(subject.encoder, f"{self._shots[part]}Question: {row['question']}\nAnswer: ") for row in rows]
        scores = []
        for i, generation in enumerate(_generate(subject, prompts, self._config.knowmem_tokens)):
            answer = None if generation is None else _first_answer(generation)
            scores.append(_muse_score(part, units[i], rows[i]["question"], rows[i]["answer"], answer))
        return scores


def _shown(example: Row) -> str:
    return f"Question: {example['question']}\nAnswer: {example['answer']}\n\n"


def _first_answer(generation: str) -> str:
    for end in _ANSWER_ENDS:
        generation = generation.partition(end)[0]
    return generation


def _whole(encoder: Encoder, text: str, limit: int | None = None) -> Encoded:
    """Plain text as the tokenizer takes it, beginning-of-sequence included, cut to ``limit`` tokens."""
    encoded = encoder.encode_text("", text, add_eos=False)
    return dataclasses.replace(encoded, ids=encoded.ids[:limit])


def _decode(encoder: Encoder, ids: Sequence[int]) -> str:
    return str(encoder.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _generate(subject: Subject, prompts: Sequence[Encoded], max_new_tokens: int) -> list[str | None]:
    """Greedy continuations; None where the prompt is empty or fills the context."""
    limit = context_length(subject.model.config)
    generated = generate_greedy(
        subject.model,
        prompts,
        subject.encoder.pad_id,
        stop_ids(subject.model, subject.encoder),
        max_new_tokens=max_new_tokens,
        batch_size=subject.batch_size,
        device=subject.device,
    )
    return [
        _decode(subject.encoder, ids) if len(prompt) and (limit is None or len(prompt) < limit) else None
        for prompt, ids in zip(prompts, generated, strict=True)
    ]


def _muse_score(part: str, index: int, prompt: str, truth: str, generation: str | None) -> MuseScore:
    f1 = recall = math.nan
    if generation is not None and truth.strip():
        f1, recall = rouge_l(truth, generation)
    return MuseScore(part, index, prompt, truth, generation or "", f1, recall)


def _min_k(rows: Sequence[PrivacyScore]) -> list[float]:
    return [row.min_k for row in rows]


@functools.cache
def _scorer(*, latin: bool) -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=None if latin else UnicodeTokenizer())


def rouge_l(reference: str, candidate: str) -> tuple[float, float]:
    """ROUGE-L F1 and recall as MUSE computes them: ``rouge_score``'s tokenizer without stemming.

    That tokenizer sees nothing but ``[a-z0-9]``, so our :class:`UnicodeTokenizer` takes over where the reference has
    letters of another script.
    """
    letters = (char for char in unicodedata.normalize("NFKC", reference) if char.isalnum())
    latin = all(char.isascii() or "LATIN" in unicodedata.name(char, "") for char in letters)
    score = _scorer(latin=latin).score(reference, candidate)["rougeL"]
    return float(score.fmeasure), float(score.recall)
