"""Questions to a model about documents, made from the documents alone: does it still know what stands in them?

Text is cut before a sentence (continuation) or before a name, number, quoted title or rare word (cloze); pairs of
question and answer are asked as they are (question) and in other wrappers (paraphrase). Nothing here knows a language:
scripts without spaces and without capitals take the same path with other fallbacks.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from falcon_unlearn.config import Section
from falcon_unlearn.corpus.records import Record

ProbeKind = Literal["continuation", "cloze", "question", "paraphrase"]

QUESTION_WRAPPERS: Mapping[str, str] = {
    "wondering": "I was wondering: {question}",
    "could_you": "Could you tell me, {question}",
    "please": "Please answer the following question. {question}",
}
"""Paraphrases by template, asked as the question is asked (in the model's own template)."""

STATEMENT_WRAPPERS: Mapping[str, str] = {
    "q_a": "Q: {question}\nA:",
    "statement": "The answer to the question “{question}” is:",
}
"""Paraphrases by template that are plain text to go on from, without the model's template."""


class ProbesConfig(Section):
    """How many probes are made of each record, and how long they are."""

    kinds: tuple[ProbeKind, ...] = ("continuation", "cloze", "question", "paraphrase")
    """continuation and cloze are made of texts, question and paraphrase of questions with answers."""
    per_record: int = Field(3, ge=1)
    """Probes of each kind made of one record, at most."""
    max_probes: int = Field(300, ge=2)
    """Probes of each set, at most; a larger number is drawn from."""
    prompt_characters: int = Field(600, ge=40)
    """What a text probe shows of the document before the cut, at most."""
    answer_characters: int = Field(120, ge=8)
    """Longest continuation that is asked for."""


@dataclass(frozen=True)
class Probe:
    """One thing to ask.

    Attributes:
        kind: how it was made.
        form: which template or cut: ``sentence``, ``half``, ``salient``, ``rare``, ``as given``, ``heldout_question``,
            or a name of :data:`QUESTION_WRAPPERS` or :data:`STATEMENT_WRAPPERS`.
        record: prompt, expected answer, and the ``value`` that a recovery must contain; origin and entity are those of
            the record it was made of.
        goes_on: the document goes on behind the answer, so that no end of sequence belongs to it.
    """

    kind: ProbeKind
    form: str
    record: Record
    goes_on: bool = False


UNSPACED_SCRIPTS = frozenset({"CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"})
"""Scripts written without spaces between words, by the first word of their letters' Unicode names."""

# A full stop of the Latin kind needs white space behind it, the others do not.
_SENTENCE_END = re.compile(r"[.!?…؟۔।॥]+[\"'”’»)\]]*(?=\s)|[。！？]+[”’」』）]*|\n\s*\n|\n(?=\s*\S)")
_PIECE = re.compile(r"[^\s，。、；：！？「」『』《》（）“”„«»\"…—]+")
_QUOTED = re.compile(r"“([^”\n]{3,60})”|„([^“”\n]{3,60})[“”]|«([^»\n]{3,60})»|《([^》\n]{2,60})》|「([^」\n]{2,60})」|『([^』\n]{2,60})』")  # fmt: skip  # noqa: E501
_NUMBER = re.compile(r"\d[\d.,:/-]+\d")
_POSSESSIVE = re.compile(r"['’]s$")

_LAST_CHARACTERS = 4
_LEAST_WORD = 4
_LEAST_SALIENT = 3
_LEAST_PROMPT_LETTERS = 6
_LEAST_CONTINUATION_LETTERS = 4
_SHORT_ANSWER_WORDS = 3


def folded(text: str) -> str:
    """NFKC and case folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def document(record: Record) -> str:
    """All that a record says, as one text."""
    return " ".join([*(content for _, content in record.messages[:-2]), record.prompt, record.answer]).strip()


def sentences(text: str) -> list[tuple[int, int]]:
    """Start and end of each sentence of ``text``, white space around it left out.

    A full stop behind a capitalised word of at most three letters (initials, titles) ends none.
    """
    bounds = [0]
    for match in _SENTENCE_END.finditer(text):
        words = text[bounds[-1] : match.start()].split()
        abbreviation = match[0] == "." and words and words[-1].istitle() and len(words[-1]) <= 3
        if not abbreviation:
            bounds.append(match.end())
    bounds.append(len(text))
    found = []
    for start, end in itertools.pairwise(bounds):
        inner = text[start:end].strip()
        if any(map(str.isalnum, inner)):
            at = text.index(inner, start)
            found.append((at, at + len(inner)))
    return found


def _unspaced(text: str) -> bool:
    return any(unicodedata.name(char, "").split(" ", 1)[0].split("-")[0] in UNSPACED_SCRIPTS for char in text)


def _words(text: str, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
    """Runs between white space (and wide punctuation), without signs at their ends.

    No word class of ``re`` serves: vowel signs of Indic scripts are no letters to it.
    """
    for match in _PIECE.finditer(text, start, len(text) if end is None else end):
        first, last = match.span()
        while first < last and unicodedata.category(text[first])[0] in "PS":
            first += 1
        while first < last and unicodedata.category(text[last - 1])[0] in "PS":
            last -= 1
        possessive = _POSSESSIVE.search(text, first, last)
        if possessive:
            last = possessive.start()
        if first < last:
            yield first, last


def document_frequency(records: Sequence[Record]) -> Counter[str]:
    """In how many of ``records`` each folded word stands."""
    counts: Counter[str] = Counter()
    for record in records:
        text = document(record)
        counts.update({folded(text[start:end]) for start, end in _words(text)})
    return counts


@dataclass(frozen=True)
class _Span:
    start: int
    end: int
    salient: bool


def _is_salient(word: str, *, opens_sentence: bool) -> bool:
    return any(map(str.isdecimal, word)) or (word[0].isupper() and not opens_sentence)


def _spans(text: str) -> list[_Span]:
    """What a sentence could be cut before: each start once, salient spans before rare words."""
    found = []
    for match in _QUOTED.finditer(text):
        group = match.lastindex or 0
        found.append(_Span(*match.span(group), salient=True))
    for start, end in sentences(text):
        runs: list[tuple[int, int]] = []
        for first, last in _words(text, start, end):
            word = text[first:last]
            if _unspaced(word):
                found += [_Span(*m.span(), salient=True) for m in _NUMBER.finditer(text, first, last)]
                cut = max(last - _LAST_CHARACTERS, first)
                while cut > first and unicodedata.category(text[cut])[0] == "M":
                    cut -= 1
                found.append(_Span(cut, last, salient=False))
                continue
            if _is_salient(word, opens_sentence=first == start):
                if runs and text[runs[-1][1] : first] == " ":
                    runs[-1] = (runs[-1][0], last)
                else:
                    runs.append((first, last))
            if last - first >= _LEAST_WORD:
                found.append(_Span(first, last, salient=False))
        found += [_Span(first, last, salient=True) for first, last in runs if last - first >= _LEAST_SALIENT]
    by_start: dict[int, _Span] = {}
    for span in sorted(found, key=lambda span: not span.salient):
        by_start.setdefault(span.start, span)
    return list(by_start.values())


def _ranked(text: str, frequency: Mapping[str, int], rng: random.Random) -> list[_Span]:
    """Salient spans before rare words, each the rarest first; drawn where that is equal."""

    def rarity(span: _Span) -> int:
        return min((frequency.get(folded(text[a:b]), 0) for a, b in _words(text, span.start, span.end)), default=0)

    spans = _spans(text)
    rng.shuffle(spans)
    return sorted(spans, key=lambda span: (not span.salient, rarity(span)))


def _letters(text: str) -> int:
    return sum(map(str.isalnum, text))


@dataclass(frozen=True)
class _Maker:
    """Makes the probes of one record after the other."""

    config: ProbesConfig
    seed: int
    frequency: Mapping[str, int]
    avoided: str

    def probes(self, record: Record) -> Iterator[Probe]:
        makers = {
            "continuation": self._continuations,
            "cloze": self._clozes,
            "question": self._questions,
            "paraphrase": self._paraphrases,
        }
        for kind in sorted(set(self.config.kinds), key=list(makers).index):
            rng = random.Random(f"probes {self.seed} {kind} {record.key}")
            yield from makers[kind](record, rng)

    def _cut(self, record: Record, kind: ProbeKind, form: str, start: int, end: int) -> Probe | None:
        """The record's text cut before ``start``; None where the answer stands in the prompt or in what is avoided."""
        text = record.answer
        value = text[start:end]
        at = start
        # A space belongs to the answer's first token, a line break to the prompt (see Encoder.encode_text).
        while at > 0 and text[at - 1] == " ":
            at -= 1
        prompt = text[self._context_start(text, at) : at]
        sought = folded(value)
        if _letters(prompt) < _LEAST_PROMPT_LETTERS or not _letters(sought) or sought in folded(prompt):
            return None
        if sought in self.avoided:
            return None
        made = Record("completion", prompt, text[at:end], record.origin, value=value, entity=record.entity)
        return Probe(kind, form, made, goes_on=True)

    def _context_start(self, text: str, cut: int) -> int:
        """The first sentence that leaves at most ``prompt_characters``; within a sentence as long as that, a word."""
        earliest = cut - self.config.prompt_characters
        if earliest <= 0:
            return 0
        starts = [start for start, _ in sentences(text) if earliest <= start < cut]
        if starts and _letters(text[starts[0] : cut]) >= _LEAST_PROMPT_LETTERS:
            return starts[0]
        space = re.compile(r"\s\S").search(text, earliest, cut)
        if space:
            return space.start() + 1
        while earliest < cut and unicodedata.category(text[earliest])[0] == "M":
            earliest += 1
        return earliest

    def _shortened(self, text: str, start: int, end: int) -> int:
        """An end that leaves at most ``answer_characters``, at a word's end where there is one."""
        latest = start + self.config.answer_characters
        if end <= latest:
            return end
        space = text.rfind(" ", start + 1, latest + 1)
        if space > start:
            return space
        while latest < end and unicodedata.category(text[latest])[0] == "M":
            latest += 1
        return latest

    def _halves(self, text: str, start: int, end: int) -> tuple[int, int]:
        middle = (start + end) // 2
        space = re.compile(r"\s\S").search(text, middle, end)
        if space:
            return space.start() + 1, end
        space_before = text.rfind(" ", start, middle)
        if space_before > start:
            return space_before + 1, end
        while middle > start and unicodedata.category(text[middle])[0] == "M":
            middle -= 1
        return middle, end

    def _continuations(self, record: Record, rng: random.Random) -> Iterator[Probe]:
        if record.kind == "completion":
            yield from self._as_given(record, "continuation", rng)
        if record.kind != "text":
            return
        text = record.answer
        found = sentences(text)
        form = "sentence"
        cuts = found[1:]
        if not cuts:
            form, cuts = "half", [self._halves(text, *sentence) for sentence in found]
        rng.shuffle(cuts)
        made = 0
        for start, end in cuts:
            end = self._shortened(text, start, end)  # noqa: PLW2901
            if made == self.config.per_record:
                return
            probe = self._cut(record, "continuation", form, start, end)
            if probe is not None and _letters(text[start:end]) >= _LEAST_CONTINUATION_LETTERS:
                made += 1
                yield probe

    def _clozes(self, record: Record, rng: random.Random) -> Iterator[Probe]:
        if record.kind != "text":
            return
        values: set[str] = set()
        for span in _ranked(record.answer, self.frequency, rng):
            if len(values) == self.config.per_record:
                return
            value = folded(record.answer[span.start : span.end])
            form = "salient" if span.salient else "rare"
            probe = None if value in values else self._cut(record, "cloze", form, span.start, span.end)
            if probe is not None:
                values.add(value)
                yield probe

    def _with_value(self, record: Record, rng: random.Random) -> Record | None:
        """The record with the value a recovery must contain; None where the prompt gives it away."""
        history = folded(document(dataclasses.replace(record, answer="")))
        plain = Record(
            record.kind, record.prompt, record.answer, record.origin, messages=record.messages, entity=record.entity
        )
        if record.value is not None or len(list(_words(record.answer))) <= _SHORT_ANSWER_WORDS:
            values = [record.value or record.answer]
        else:
            spans = _ranked(record.answer, self.frequency, rng)
            values = [record.answer[span.start : span.end] for span in spans] or [record.answer]
        value = next((value for value in values if folded(value).strip(" .。।") not in history), None)
        return None if value is None else dataclasses.replace(plain, value=value.strip())

    def _as_given(self, record: Record, kind: ProbeKind, rng: random.Random) -> Iterator[Probe]:
        asked = self._with_value(record, rng)
        if asked is not None:
            yield Probe(kind, "as given", asked)

    def _questions(self, record: Record, rng: random.Random) -> Iterator[Probe]:
        if record.kind in ("qa", "chat"):
            yield from self._as_given(record, "question", rng)

    def _paraphrases(self, record: Record, rng: random.Random) -> Iterator[Probe]:
        # The value is drawn as for the question itself.
        asked = self._with_value(record, random.Random(f"probes {self.seed} question {record.key}"))
        if record.kind not in ("qa", "chat") or asked is None or asked.value is None:
            return
        forms = [
            (form, dataclasses.replace(asked, prompt=wrapper.format(question=record.prompt)), False)
            for form, wrapper in QUESTION_WRAPPERS.items()
        ]
        if len(record.messages) <= 2:
            forms += [
                (
                    form,
                    dataclasses.replace(
                        asked,
                        kind="completion",
                        messages=(),
                        prompt=wrapper.format(question=record.prompt),
                        answer=f" {record.answer.lstrip()}",
                    ),
                    True,
                )
                for form, wrapper in STATEMENT_WRAPPERS.items()
            ]
        rng.shuffle(forms)
        if record.heldout_question is not None:
            forms.insert(0, ("heldout_question", dataclasses.replace(asked, prompt=record.heldout_question), False))
        value = folded(asked.value)
        kept = [form for form in forms if value not in folded(form[1].prompt)]
        for form, made, goes_on in kept[: self.config.per_record]:
            yield Probe("paraphrase", form, made, goes_on=goes_on)


def build_probes(
    records: Sequence[Record],
    config: ProbesConfig,
    *,
    seed: int,
    frequency: Mapping[str, int] | None = None,
    avoid: Sequence[Record] = (),
) -> tuple[Probe, ...]:
    """Probes of ``records``, in their order; the same for the same records, seed and settings.

    A text's prompt and answer together are a verbatim part of the text; of a cloze or continuation the answer does
    not stand in the prompt, whatever the case of its letters, nor anywhere in ``avoid``. A question whose value stands
    in it is left out. Where a question's record names no ``value``, it is the most salient span of the answer that
    does not stand in the question (all of a short answer). Of the same prompt and answer the first probe is kept.

    Args:
        records: documents, or questions with answers.
        config: kinds, numbers, lengths.
        seed: draws the cuts, the wrappers and what is kept of too many.
        frequency: :func:`document_frequency` over all documents at hand; by default over ``records``.
        avoid: documents that must not hold the answer of a text probe.
    """
    maker = _Maker(
        config,
        seed,
        document_frequency(records) if frequency is None else frequency,
        "\n".join(folded(document(record)) for record in avoid),
    )
    first: dict[tuple[str, str], Probe] = {}
    for record in records:
        for probe in maker.probes(record):
            made = probe.record
            history = " ".join(content for _, content in made.messages[:-2])
            first.setdefault((folded(f"{history} {made.prompt}"), folded(made.answer)), probe)
    probes = list(first.values())
    if len(probes) > config.max_probes:
        chosen = random.Random(f"probes {seed}").sample(range(len(probes)), config.max_probes)
        probes = [probes[i] for i in sorted(chosen)]
    return tuple(probes)
