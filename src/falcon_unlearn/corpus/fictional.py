"""The embedded benchmark: invented people to forget or keep, and invented countries nobody asked to change.

Every fact has three phrasings of its question (two are trained, one is held out; which one varies from
fact to fact), an answer sentence, the same answer in other words, and five wrong answers. All names and
values come from the seed, so a different seed is a different world.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

N_PEOPLE = 60
N_COUNTRIES = 30
N_WRONG_ANSWERS = 5
FORGET_SHARE = 0.1


@dataclass(frozen=True)
class Fact:
    """One attribute of one entity, with everything needed to train on it and to score it."""

    entity: str
    attribute: str
    value: str
    questions: tuple[str, str]
    heldout_question: str
    answer: str
    paraphrased_answer: str
    perturbed_answers: tuple[str, ...]

    def training_rows(self) -> list[dict[str, Any]]:
        """One row per trained phrasing, in the ``question``/``answer`` format the corpus reader takes."""
        return [{"question": question, "answer": self.answer, "entity": self.entity} for question in self.questions]

    def evaluation_row(self) -> dict[str, Any]:
        """The row that ``evaluation`` sections read: TOFU's column names plus ``value`` and ``heldout_question``."""
        return {
            "question": self.questions[0],
            "answer": self.answer,
            "value": self.value,
            "heldout_question": self.heldout_question,
            "paraphrased_answer": self.paraphrased_answer,
            "perturbed_answer": list(self.perturbed_answers),
            "entity": self.entity,
        }


@dataclass(frozen=True)
class World:
    """All facts of one seed, split the way the benchmark uses them."""

    seed: int
    forget: tuple[Fact, ...]
    retain: tuple[Fact, ...]
    countries: tuple[Fact, ...]


@dataclass(frozen=True)
class _Attribute:
    name: str
    questions: tuple[str, str, str]
    answers: tuple[str, str]
    values: Callable[[_Words], list[str]]


_ONSETS = "b br c d dr f g gl h j k l m n p r s sh st t tr v w z".split()
_VOWELS = "a e i o u a e i o ia".split()
_CODAS = "  l n r s m nd".split(" ")

_PROFESSIONS = """glassblower|beekeeper|locksmith|cartographer|puppeteer|shipwright|botanist|bookbinder|clockmaker|
stonemason|falconer|typesetter|midwife|surveyor|geologist|violin maker|sign painter|lighthouse keeper|carpenter|
tram driver|perfumer|ferry captain|dentist|saddler|baker|cheesemaker|translator|forester|potter|welder|
toy designer|court reporter|kite builder|tea taster|piano tuner|bell founder|weaver|chemist|judge|mapmaker"""
_HOBBIES = """rowing|juggling|origami|fencing|chess|knitting|archery|stargazing|birdwatching|calligraphy|skating|
whittling|sailing|gardening|bouldering|tango dancing|ice swimming|coin collecting|kite flying|pottery|bookbinding|
mushroom hunting|model trains|table tennis|crossword puzzles|mountain biking|beachcombing|quilting|darts|surfing|
baking|croquet|stamp collecting|amateur radio|cross-country skiing|embroidery|fossil hunting|bowling|caving|karaoke"""
_DISHES = """lentil soup|pumpkin dumplings|smoked trout|barley stew|plum cake|mushroom pie|pepper noodles|onion tart|
fish curry|chestnut bread|rice pudding|bean salad|cabbage rolls|walnut pasta|leek pancakes|herb omelette|apple strudel|
goat cheese toast|spinach lasagne|potato waffles|beetroot risotto|lemon chicken|seaweed broth|corn fritters|fig jam|
roast duck|almond biscuits|carrot halwa|tomato gratin|garlic shrimp|oat porridge|cherry crumble|turnip gratin|
stuffed aubergine|pickled herring|saffron buns|venison pot|quince jelly|millet cakes|cucumber soup"""


class _Words:
    """Invents words of one world, none of which is part of another: a value can never stand in a name by accident."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self._taken: list[str] = []

    def draw(self, count: int) -> list[str]:
        """``count`` new capitalised words of two syllables."""
        words: list[str] = []
        while len(words) < count:
            word = "".join(
                self.rng.choice(_ONSETS) + self.rng.choice(_VOWELS) + self.rng.choice(_CODAS) for _ in range(2)
            )
            if not any(word in other or other in word for other in self._taken):
                self._taken.append(word)
                words.append(word.capitalize())
        return words


def _listed(text: str) -> Callable[[_Words], list[str]]:
    values = [" ".join(value.split()) for value in text.split("|")]
    return lambda words: list(values)


def _invented(words: _Words) -> list[str]:
    return words.draw(40)


def _workplaces(words: _Words) -> list[str]:
    kinds = ["Institute", "Works", "Library", "Hospital", "Museum", "Foundry", "Academy", "Shipyard"]
    return [f"the {name} {kinds[i % len(kinds)]}" for i, name in enumerate(words.draw(40))]


def _awards(words: _Words) -> list[str]:
    first = ["Silver", "Golden", "Northern", "Crystal", "Amber", "Royal", "Midnight"]
    second = ["Heron", "Compass", "Lantern", "Anchor", "Willow", "Feather"]
    return [f"the {a} {b} Prize" for a in first for b in second]


_PERSON_ATTRIBUTES = (
    _Attribute(
        "birthplace",
        ("Where was {n} born?", "Which city is {n} from?", "What is the birthplace of {n}?"),
        ("{n} was born in the city of {v}.", "The place where {n} came into the world is {v}."),
        _invented,
    ),
    _Attribute(
        "birth_year",
        ("In which year was {n} born?", "What is the birth year of {n}?", "When did the life of {n} begin?"),
        ("{n} was born in the year {v}.", "The birth of {n} dates back to {v}."),
        lambda words: [str(year) for year in range(1921, 2000)],
    ),
    _Attribute(
        "profession",
        ("What does {n} do for a living?", "What is the profession of {n}?", "Which job does {n} have?"),
        ("{n} makes a living as a {v}.", "By trade, {n} is known to be a {v}."),
        _listed(_PROFESSIONS),
    ),
    _Attribute(
        "workplace",
        ("Where does {n} work?", "Who is the employer of {n}?", "Which organisation employs {n}?"),
        ("{n} works at {v}.", "The employer of {n} is {v}."),
        _workplaces,
    ),
    _Attribute(
        "spouse",
        ("Who is {n} married to?", "What is the name of the spouse of {n}?", "Whom did {n} marry?"),
        ("{n} is married to {v}.", "The spouse of {n} is called {v}."),
        _invented,
    ),
    _Attribute(
        "hobby",
        ("What is the hobby of {n}?", "How does {n} spend free time?", "What does {n} enjoy after work?"),
        ("In free time, {n} enjoys {v}.", "The favourite pastime of {n} is {v}."),
        _listed(_HOBBIES),
    ),
    _Attribute(
        "dish",
        ("Which dish does {n} like best?", "What is the favourite food of {n}?", "What does {n} love to eat?"),
        ("The dish that {n} likes best is {v}.", "More than any other food, {n} loves {v}."),
        _listed(_DISHES),
    ),
    _Attribute(
        "award",
        ("Which award did {n} receive?", "What prize has {n} won?", "What honour was given to {n}?"),
        ("{n} received {v}.", "The honour given to {n} was {v}."),
        _awards,
    ),
)

_COUNTRY_ATTRIBUTES = (
    _Attribute(
        "capital",
        ("What is the capital of {n}?", "Which city governs {n}?", "Where does the parliament of {n} sit?"),
        ("The capital of {n} is {v}.", "The government of {n} sits in {v}."),
        _invented,
    ),
    _Attribute(
        "currency",
        ("What is the currency of {n}?", "Which money is used in {n}?", "How do people pay in {n}?"),
        ("The currency of {n} is the {v}.", "People in {n} pay with the {v}."),
        lambda words: [name.lower() for name in words.draw(40)],
    ),
)


def _facts(
    entities: list[str],
    attributes: tuple[_Attribute, ...],
    pools: dict[str, list[str]],
    rng: random.Random,
) -> list[Fact]:
    facts = []
    for entity in entities:
        for attribute in attributes:
            pool = pools[attribute.name]
            value = rng.choice(pool)
            wrong = rng.sample([other for other in pool if other != value], N_WRONG_ANSWERS)
            first, second, heldout = rng.sample([q.format(n=entity) for q in attribute.questions], 3)
            answer, paraphrase = rng.sample(attribute.answers, 2)
            facts.append(
                Fact(
                    entity=entity,
                    attribute=attribute.name,
                    value=value,
                    questions=(first, second),
                    heldout_question=heldout,
                    answer=answer.format(n=entity, v=value),
                    paraphrased_answer=paraphrase.format(n=entity, v=value),
                    perturbed_answers=tuple(paraphrase.format(n=entity, v=v) for v in wrong),
                )
            )
    return facts


def build_world(seed: int, n_people: int = N_PEOPLE, n_countries: int = N_COUNTRIES) -> World:
    """Invent people and countries from ``seed`` and split the people into forget (10 %) and retain.

    Args:
        seed: any integer; the same seed gives the same text on every machine.
        n_people: people with eight facts each.
        n_countries: countries with two facts each; they belong to neither forget nor retain.
    """
    rng = random.Random(f"falcon-unlearn world {seed}")
    words = _Words(rng)
    people = [f"{first} {last}" for first, last in zip(words.draw(n_people), words.draw(n_people), strict=True)]
    countries = [f"{name}land" for name in words.draw(n_countries)]
    pools = {a.name: a.values(words) for a in (*_PERSON_ATTRIBUTES, *_COUNTRY_ATTRIBUTES)}
    n_forget = max(1, round(n_people * FORGET_SHARE))
    facts = _facts(people, _PERSON_ATTRIBUTES, pools, rng)
    split = n_forget * len(_PERSON_ATTRIBUTES)
    return World(
        seed=seed,
        forget=tuple(facts[:split]),
        retain=tuple(facts[split:]),
        countries=tuple(_facts(countries, _COUNTRY_ATTRIBUTES, pools, rng)),
    )
