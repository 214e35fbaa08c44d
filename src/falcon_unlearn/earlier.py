"""Earlier deletion requests: what a run stands on, what it must not teach again, and whether it is still forgotten."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from falcon_unlearn.artifacts import Estimate, SampleScore, SuiteResult, sample_score_from
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.corpus.sources import Corpus, content_hash, load_records, load_side
from falcon_unlearn.errors import UserError
from falcon_unlearn.evaluation.metrics import FORGET_SET, estimates
from falcon_unlearn.evaluation.scoring import score_set
from falcon_unlearn.evaluation.suite import Rows, Subject
from falcon_unlearn.model.patch import DOCUMENT_FILE, Patch
from falcon_unlearn.model.patched import read_stack
from falcon_unlearn.recipe import Recipe, recipe_from
from falcon_unlearn.stages import at_most

SUITE = "earlier"
"""Under this name the earlier forget sets stand among the suites of a run."""
FORGOTTEN = "forgotten"
"""Key of ``corpus.json``: a digest of each forget record, by which later requests know it without its text."""
_DIGITS = 32


def key_digest(record: Record) -> str:
    """SHA-256 of what makes a record the same as another, cut to 128 bits (hex)."""
    return hashlib.sha256(json.dumps(record.key, ensure_ascii=False).encode()).hexdigest()[:_DIGITS]


def forgotten_digests(corpus: Corpus) -> list[str]:
    """:func:`key_digest` of every forget record, in order, for ``corpus.json``."""
    return [key_digest(record) for records in corpus.forget.values() for record in records]


def patch_folder(name: str, key: str = "after") -> Path:
    """The patch that is meant by a patch folder or the folder of a run.

    Raises:
        UserError: it is neither.
    """
    folder = Path(name).expanduser()
    for place in (folder, folder / "patch"):
        if (place / DOCUMENT_FILE).is_file():
            return place.resolve()
    if (folder / "recipe.yaml").is_file():
        raise UserError(f"{key}: the run {name} has no patch yet: finish it with --resume")
    raise UserError(f"{key}: {name} is neither a patch nor the folder of a run (no {DOCUMENT_FILE} in it)")


@dataclass(frozen=True)
class EarlierRequest:
    """A request that was carried out before.

    Attributes:
        number: its place, from 1.
        patch: what it left.
    """

    number: int
    patch: Patch

    @property
    def name(self) -> str:
        """As suites and reports call it."""
        return f"request_{self.number}"

    @property
    def folder(self) -> Path:
        """Its run folder, where the patch still lies in one."""
        return self.patch.folder.parent

    def facts(self) -> Mapping[str, Any]:
        """``corpus.json`` of its run; empty where that is not there."""
        try:
            found = json.loads((self.folder / "corpus.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def recipe(self) -> Recipe:
        """The recipe that its patch records.

        Raises:
            UserError: there is none, or this version does not know its keys.
        """
        plain = self.patch.provenance.get("recipe")
        if not isinstance(plain, dict):
            raise UserError(f"{self.patch.folder / DOCUMENT_FILE}: holds no recipe")
        return recipe_from(plain, str(self.patch.folder / DOCUMENT_FILE))

    def forget_records(self) -> dict[str, tuple[Record, ...]]:
        """Its forget records by domain, read from where its recipe says.

        Raises:
            UserError: they are not there any more, or no longer the same.
        """
        domains, _ = load_side(FORGET_SET, self.recipe().corpus.forget, Path.cwd())
        data = self.patch.provenance.get("data") or {}
        for domain, records in domains.items():
            key = FORGET_SET if domain == FORGET_SET else f"{FORGET_SET}.{domain}"
            if data.get(key) != content_hash(records):
                raise UserError(f"corpus.{key} of {self.folder}: holds other records now than when it was forgotten")
        return domains

    def digests(self) -> frozenset[str]:
        """:func:`key_digest` of its forget records: as its run wrote them down, else from the records themselves.

        Raises:
            UserError: neither is there.
        """
        written = self.facts().get(FORGOTTEN)
        if isinstance(written, list):
            return frozenset(map(str, written))
        return frozenset(key_digest(record) for records in self.forget_records().values() for record in records)

    def scored_records(self) -> list[Record]:
        """The forget set that its own run scored, drawn alike.

        Raises:
            UserError: as :meth:`forget_records`.
        """
        recipe = self.recipe()
        source = recipe.evaluation.forget
        if source is None:
            records = [record for found in self.forget_records().values() for record in found]
        else:
            records = load_records(source, Path.cwd(), "evaluation.forget")
        records = at_most(records, FORGET_SET, recipe.evaluation.max_records, recipe.seed)
        expected = (self.facts().get("hashes") or {}).get(f"evaluation.{FORGET_SET}")
        if expected is not None and expected != content_hash(records):
            raise UserError(f"evaluation.forget of {self.folder}: holds other records now than those its run scored")
        return records


def earlier_requests(after: Sequence[str]) -> tuple[EarlierRequest, ...]:
    """What a run stands on, the first request first.

    Args:
        after: patch or run folders, the last of them the one to stand on; others only help to find what is below it.

    Raises:
        UserError: one of them is no patch or not below the last, or a patch below it is missing.
    """
    if not after:
        return ()
    stack = read_stack([patch_folder(name) for name in after])
    top = stack[-1]
    line = [*(ancestor.id for ancestor in top.ancestry), top.id]
    stranger = next((patch for patch in stack if patch.id not in line), None)
    if stranger is not None:
        raise UserError(
            f"after: {top.folder} does not stand on {stranger.folder}: name only the last request, or with it folders "
            "of those below it"
        )
    by_id = {patch.id: patch for patch in stack}
    return tuple(EarlierRequest(number, by_id[name]) for number, name in enumerate(line, start=1))


def forgotten_before(requests: Sequence[EarlierRequest]) -> tuple[list[Record], frozenset[str]]:
    """Forget records of ``requests``, and :func:`key_digest` of all, as far as either is still there."""
    records: list[Record] = []
    digests: frozenset[str] = frozenset()
    for request in requests:
        with contextlib.suppress(UserError):
            digests |= request.digests()
        with contextlib.suppress(UserError):
            records += [record for found in request.forget_records().values() for record in found]
    return records, digests


def without_forgotten(corpus: Corpus, requests: Sequence[EarlierRequest]) -> tuple[Corpus, list[str]]:
    """Settle retain records that an earlier request had forgotten, by the rule of ``corpus.on_overlap``.

    Returns:
        The corpus without them (or, with ``allow``, as it is), and lines that say so.

    Raises:
        UserError: there are some and the rule is ``error``; none would be left; or it cannot be told.
    """
    rule = corpus.report.on_overlap
    forgotten: dict[str, EarlierRequest] = {}
    lines = []
    for request in requests:
        try:
            forgotten |= dict.fromkeys(request.digests(), request)
        except UserError as error:
            message = (
                f"cannot tell whether retain holds records that {request.patch.folder} has forgotten: no corpus.json "
                f"beside the patch, and {error}"
            )
            if rule != "allow":
                raise UserError(f"corpus: {message}; put one back, or set corpus.on_overlap to allow") from error
            lines.append(message)
    kept: dict[str, tuple[Record, ...]] = {}
    dropped: list[tuple[Record, EarlierRequest]] = []
    for domain, records in corpus.retain.items():
        found = [(record, forgotten[digest]) for record in records if (digest := key_digest(record)) in forgotten]
        taken = {record.key for record, _ in found}
        kept[domain] = tuple(record for record in records if record.key not in taken)
        dropped += found
        if found and not kept[domain] and rule == "drop":
            raise UserError(f"corpus.retain: every record of '{domain}' was forgotten by an earlier request")
    if not dropped:
        return corpus, lines
    example, request = dropped[0]
    what = f"{len(dropped)} retain records were forgotten earlier (first: {example.origin}, by {request.folder})"
    if rule == "error":
        raise UserError(
            f"corpus: {what}; training would teach them again: remove them, or set corpus.on_overlap to drop"
        )
    if rule == "allow":
        return corpus, [*lines, f"{what} and are kept in training (corpus.on_overlap is allow)"]
    keys = {domain: "retain" if domain == "retain" else f"retain.{domain}" for domain in kept}
    counts = {**corpus.report.records, **{keys[domain]: len(records) for domain, records in kept.items()}}
    hashes = {**corpus.hashes, **{keys[domain]: content_hash(records) for domain, records in kept.items()}}
    lines.append(f"{what}: dropped")
    return replace(corpus, retain=kept, report=replace(corpus.report, records=counts), hashes=hashes), lines


@dataclass(frozen=True)
class EarlierSuite:
    """The forget sets of earlier requests, scored again as each of them was: an evaluation suite of a run.

    Attributes:
        records: by name of the request.
        folders: of the requests' runs, for people.
        max_new_tokens: where a generated answer is cut.
    """

    records: Mapping[str, Sequence[Record]]
    folders: Mapping[str, str]
    max_new_tokens: int

    @property
    def parts(self) -> Mapping[str, int]:
        """Name of the request -> number of its records."""
        return {name: len(records) for name, records in self.records.items()}

    @property
    def content(self) -> Mapping[str, str]:
        """SHA-256 of the records."""
        return {name: content_hash(records) for name, records in self.records.items()}

    def score(self, part: str, units: range, subject: Subject) -> list[SampleScore]:
        """Scores of some records of a request."""
        return score_set(
            subject.model,
            subject.encoder,
            self.records[part][units.start : units.stop],
            part,
            batch_size=subject.batch_size,
            max_new_tokens=self.max_new_tokens,
            device=subject.device,
            first_index=units.start,
        )

    def row(self, part: str, plain: Mapping[str, Any]) -> SampleScore:
        """A score read back from JSON."""
        return sample_score_from(plain)

    def summarise(self, rows: Rows, oracle: Rows | None, settings: Mapping[str, Any]) -> SuiteResult:
        """The same means, with the same intervals, as the request's own run had of its forget set."""
        metrics: dict[str, Estimate] = {}
        for part, scores in rows.items():
            found = estimates({FORGET_SET: scores})
            metrics |= {f"{part}_{name.removeprefix(f'{FORGET_SET}_')}": value for name, value in found.items()}
        statements = tuple(f"{name.replace('_', ' ')} is that of {folder}." for name, folder in self.folders.items())
        return SuiteResult(SUITE, metrics, statements, settings)

    def exports(self, rows: Rows, oracle: Rows | None) -> Mapping[str, Any]:
        """None."""
        return {}


def open_earlier(requests: Sequence[EarlierRequest], max_new_tokens: int) -> tuple[dict[str, EarlierSuite], list[str]]:
    """The suite of the earlier forget sets, none where none can be read, and lines that say which cannot.

    A request's records may well be gone: whoever deletes somebody's data deletes the list of it as well.
    """
    records: dict[str, list[Record]] = {}
    folders: dict[str, str] = {}
    lines = []
    for request in requests:
        try:
            records[request.name] = request.scored_records()
            folders[request.name] = str(request.folder)
        except UserError as error:
            lines.append(f"the forget set of {request.folder} is not scored again: {error}")
    return ({SUITE: EarlierSuite(records, folders, max_new_tokens)} if records else {}), lines
