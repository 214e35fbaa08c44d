"""Stand-ins: a forget record about somebody the model never heard of, or the retain record that is most like it.

What the original model does with a stand-in is what it would do had it never seen the forget record: the level to
reach, without an oracle.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from falcon_unlearn.corpus.batching import Encoded, Encoder
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.errors import UserError

_WORD = re.compile(r"\w+")

# Digits and letters of scripts that put spaces between words and no particles at names (Latin, Greek, Cyrillic,
# Armenian, with their marks): beside one of them a name is part of a longer word.
_LETTER = r"[0-9A-Za-z\u00c0-\u058f\u1e00-\u1fff]"


def new_names(entities: Sequence[str], known: Sequence[str], seed: int, count: int) -> dict[str, tuple[str, ...]]:
    """Names that nobody has, put together from words of known names: a first word of one, a second of another, ...

    Args:
        entities: whom names are wanted for.
        known: names to take words from; those of other entities than ``entities``.
        seed: the names depend on this and the entity.
        count: names for each entity.

    Returns:
        Names by entity; none for an entity whose number of words no known name has, and repeated where there are too
        few different ones.
    """
    taken = {*known, *entities}
    by_length: dict[int, list[list[str]]] = {}
    for name in sorted(set(known) - set(entities)):
        by_length.setdefault(len(name.split()), []).append(name.split())
    result: dict[str, tuple[str, ...]] = {}
    for entity in entities:
        pool = by_length.get(len(entity.split()), [])
        if not pool:
            continue
        rng = random.Random(f"stand-in {seed} {entity}")
        found: list[str] = []
        for _ in range(50 * count):
            name = " ".join(rng.choice(pool)[i] for i in range(len(entity.split())))
            if len(found) < count and name not in taken and name not in found:
                found.append(name)
        if not found:  # names of one word cannot be mixed: another one's will have to do
            found = [" ".join(words) for words in rng.sample(pool, min(count, len(pool)))]
        result[entity] = tuple(found[i % len(found)] for i in range(count))
    return result


def _standing(entity: str) -> re.Pattern[str]:
    """Where ``entity`` stands as a word of its own: Ann, but not Anna."""
    before = f"(?<!{_LETTER})" if re.match(_LETTER, entity) else ""
    after = f"(?!{_LETTER})" if re.match(_LETTER, entity[-1:]) else ""
    return re.compile(before + re.escape(entity) + after)


def mentions_entity(record: Record) -> bool:
    """Whether the record names its entity, and its question, answer or history has that name."""
    texts = (record.prompt, record.answer, *(content for _, content in record.messages))
    return record.entity is not None and any(_standing(record.entity).search(text) for text in texts)


def renamed(record: Record, entity: str, name: str) -> Record:
    """The record with ``name`` in the place of ``entity``, wherever it stands as a word of its own."""
    pattern = _standing(entity)

    def other(text: str) -> str:
        return pattern.sub(lambda _: name, text)

    return dataclasses.replace(
        record,
        prompt=other(record.prompt),
        answer=other(record.answer),
        messages=tuple((role, other(content)) for role, content in record.messages),
        entity=name,
    )


class Likeness:
    """Finds the retain records whose question (or text) is most like another's, by words in common.

    Args:
        others: to choose from.
    """

    def __init__(self, others: Sequence[Record]) -> None:
        self._others = others
        self._words = [_words(record) for record in others]
        frequency = Counter(word for words in self._words for word in words)
        # Words of one record only are its subject; words of many are the shape of the question.
        self._weight: Mapping[str, float] = {word: min(n, 50) / 50 for word, n in frequency.items() if n > 1}

    def nearest(self, record: Record, count: int, rng: random.Random) -> list[Record]:
        """The ``count`` most alike, ties in random order."""
        words = _words(record)

        def score(i: int) -> float:
            theirs = self._words[i]
            common = sum(self._weight.get(word, 0.0) for word in words & theirs)
            return common / (1 + sum(self._weight.get(word, 0.0) for word in words ^ theirs))

        order = sorted(rng.sample(range(len(self._others)), len(self._others)), key=score, reverse=True)
        return [self._others[i] for i in order[:count]]


def _words(record: Record) -> frozenset[str]:
    return frozenset(_WORD.findall((record.prompt or record.answer).casefold()))


def stand_ins(
    records: Sequence[Record],
    others: Sequence[Record],
    encoder: Encoder,
    seed: int,
    *,
    count: int,
    spare: int = 0,
    limit: int | None = None,
) -> list[tuple[Encoded, ...]]:
    """Stand-ins of each forget record, ``count`` of them, and of renamed ones ``spare`` more.

    A record that names its ``entity`` and mentions it gets that name replaced by one nobody has (the same for all
    records of an entity); any other gets the retain records whose question is most like its own.

    Args:
        records: the forget records.
        others: the retain records.
        encoder: of the model at hand.
        seed: the choice depends on this and the record.
        count: stand-ins for each record.
        spare: further ones under other names, from which those that remind the model of the answer can be replaced.
        limit: tokens; what is longer is cut off.

    Raises:
        UserError: a record has no stand-in, as there are no retain records.
    """
    entities = list(dict.fromkeys(r.entity for r in records if r.entity is not None and mentions_entity(r)))
    names = new_names(entities, [r.entity for r in others if r.entity], seed, count + spare)
    likeness = Likeness(others)
    result = []
    for record in records:
        if record.entity is not None and record.entity in names and mentions_entity(record):
            chosen = [renamed(record, record.entity, name) for name in names[record.entity]]
        else:
            chosen = likeness.nearest(record, count, random.Random(f"stand-in {seed} {record.key}"))
        if not chosen:
            raise UserError(f"{record.origin}: no retain record can stand in for it: add retain records")
        encoded = (encoder.encode(other) for other in chosen)
        result.append(tuple(dataclasses.replace(item, ids=item.ids[:limit]) for item in encoded))
    return result
