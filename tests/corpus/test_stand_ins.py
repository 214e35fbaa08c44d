import dataclasses
import json
import random
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_unlearn.corpus.batching import PLAIN_TEMPLATE, Encoder
from falcon_unlearn.corpus.records import Record, record_from_row
from falcon_unlearn.corpus.stand_ins import Likeness, mentions_entity, new_names, renamed, stand_ins
from falcon_unlearn.engine.pretraining import train_tokenizer
from falcon_unlearn.errors import UserError

KNOWN = ["Dan Stone", "Eva Thorne", "Finn Vale", "Gus West", "Hana York", "Ivo Zeller"]
FORGOTTEN = ["Ada Marsh", "Bo Quill", "Cleo Reed"]
SHAPES = {
    "lives": ("Where does {n} live?", "{n} lives in {v}."),
    "works": ("What is the job of {n}?", "{n} works as a {v}, and {n}'s town knows."),
    "eats": ("What does {n} eat?", "The food of {n} is {v}."),
}


def record(name, shape="lives", value="Cork", **more):
    question, answer = (text.format(n=name, v=value) for text in SHAPES[shape])
    return record_from_row({"question": question, "answer": answer, "entity": name, **more}, f"f:{name}:{shape}")


def records_of(names):
    return [record(name, shape) for name in names for shape in SHAPES]


FORGET, RETAIN = records_of(FORGOTTEN), records_of(KNOWN)


@pytest.fixture(scope="module")
def encoder():
    texts = [PLAIN_TEMPLATE.format(question=r.prompt, answer=r.answer) for r in FORGET + RETAIN]
    return Encoder(train_tokenizer(texts, 320, 64))


def naive_stand_ins(record, names, encoder):
    return tuple(
        encoder.encode(
            dataclasses.replace(
                record,
                prompt=name.join(record.prompt.split(record.entity)),
                answer=name.join(record.answer.split(record.entity)),
                messages=tuple((role, name.join(text.split(record.entity))) for role, text in record.messages),
            )
        )
        for name in names
    )


# names


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 3, 8])
def test_names_are_nobodys_and_made_of_words_at_their_own_places(seed, count):
    found = new_names(FORGOTTEN, KNOWN, seed, count)
    assert list(found) == FORGOTTEN
    firsts, lasts = ({name.split()[i] for name in KNOWN} for i in (0, 1))
    for names in found.values():
        assert len(names) == len(set(names)) == count
        assert not set(names) & {*KNOWN, *FORGOTTEN}
        for name in names:
            first, last = name.split()
            assert first in firsts
            assert last in lasts


def test_names_have_as_many_words_as_the_entity_has():
    known = [*KNOWN, "Ana Maria Sol", "Juan Luis Mar", "Leo de Rey", "Plato", "Sappho"]
    found = new_names(["Bo", "Ada Marsh", "Ada van Marsh", "A B C D"], known, 0, 2)
    assert {entity: {len(name.split()) for name in names} for entity, names in found.items()} == {
        "Bo": {1}, "Ada Marsh": {2}, "Ada van Marsh": {3}}  # fmt: skip
    assert set(found["Bo"]) == {"Plato", "Sappho"}  # words of one name cannot be mixed


def test_names_of_entities_to_be_forgotten_lend_no_words():
    found = new_names(FORGOTTEN, [*KNOWN, *FORGOTTEN], 0, 8)
    words = {word for names in found.values() for name in names for word in name.split()}
    assert words <= {word for name in KNOWN for word in name.split()}


def test_too_few_names_are_repeated_and_the_only_one_is_taken_as_it_is():
    crossed = {"Dan Thorne", "Eva Stone"}
    for seed in range(5):
        (names,) = new_names(["Ada Marsh"], KNOWN[:2], seed, 5).values()
        assert set(names) == crossed
        assert names == (names[0], names[1]) * 2 + names[:1]
    assert new_names(["Ada Marsh"], KNOWN[:1], 0, 2) == {"Ada Marsh": ("Dan Stone", "Dan Stone")}
    assert new_names(["Ada Marsh"], ["Plato"], 0, 2) == {}
    assert new_names(["Ada Marsh"], ["Ada Marsh"], 0, 2) == {}
    assert new_names([], KNOWN, 0, 2) == {}


def test_names_depend_on_seed_and_entity_alone():
    assert new_names(FORGOTTEN, KNOWN, 0, 3) == new_names(FORGOTTEN, [*KNOWN[::-1], KNOWN[0]], 0, 3)
    assert new_names(FORGOTTEN, KNOWN, 0, 3) != new_names(FORGOTTEN, KNOWN, 1, 3)
    one, two = (new_names(entities, KNOWN, 0, 3)["Bo Quill"] for entities in (FORGOTTEN, ["Bo Quill"]))
    assert one == two


def test_names_are_the_same_in_another_process():
    code = "import json, sys; from falcon_unlearn.corpus.stand_ins import new_names; print(json.dumps(new_names(*json.loads(sys.argv[1]))))"  # noqa: E501
    arguments = [FORGOTTEN, KNOWN, 0, 3]
    out = subprocess.run([sys.executable, "-c", code, json.dumps(arguments)], check=True, capture_output=True).stdout
    assert {entity: tuple(names) for entity, names in json.loads(out).items()} == new_names(*arguments)


# replacing


WORDS = ("Ann", "Anna", "Joann", "Anné", "Ann2", "Lee", "Leer", "Ölee", "met", "in", "Анн")


def naive_replaced(words, entity, name):
    """Word by word from the left."""
    own, result, i = entity.split(), [], 0
    while i < len(words):
        if words[i : i + len(own)] == own:
            result += name.split()
            i += len(own)
        else:
            result.append(words[i])
            i += 1
    return result


@given(
    words=st.lists(st.sampled_from(WORDS), max_size=12),
    entity=st.sampled_from(["Ann", "Lee", "Ann Lee", "Анн", "Ann Ann"]),
    ends=st.sampled_from(["", ".", "?", "'s", "”", ", etc"]),
)
@settings(max_examples=200)
def test_the_name_is_replaced_wherever_it_is_a_word_and_nowhere_else(words, entity, ends):
    text = " ".join(words) + ends
    one = Record("qa", text, f"({text})", "f:1", entity=entity)
    found = renamed(one, entity, r"Bo\1 Quill")
    expected = " ".join(naive_replaced(words, entity, r"Bo\1 Quill")) + ends
    assert found == Record("qa", expected, f"({expected})", "f:1", entity=r"Bo\1 Quill")
    assert mentions_entity(one) == (expected != text)


@pytest.mark.parametrize(
    ("entity", "name", "text", "expected"),
    [
        ("王芳", "李伟", "王芳住在哪里？我认识王芳吗", "李伟住在哪里？我认识李伟吗"),
        ("王芳", "李伟", "王芳2020年", "李伟2020年"),
        ("Ann", "Bo", "我认识Ann吗", "我认识Bo吗"),
        ("さくら", "みどり", "さくらさんは", "みどりさんは"),
        ("김철수", "이영희", "김철수는 어디에", "이영희는 어디에"),
        ("สมชาย", "มานี", "คุณสมชายอยู่", "คุณมานีอยู่"),
        ("דנה", "רות", "לדנה יש", "לרות יש"),
        ("Анна", "Ольга", "Анна и Анна-Мария, не Аннам", "Ольга и Ольга-Мария, не Аннам"),
        ("Ann", "Bo", "Anne\u0301 Ann\u0301 Ann.", "Anne\u0301 Ann\u0301 Bo."),
        ("A. (Bo) C+", "X", "Is A. (Bo) C+ here? A. (Bo) C+", "Is X here? X"),
        ("Ann", "Anna Ann", "Ann, Ann", "Anna Ann, Anna Ann"),
    ],
)
def test_other_scripts_and_signs(entity, name, text, expected):
    assert renamed(Record("text", "", text, "f:1", entity=entity), entity, name).answer == expected


def test_every_message_of_a_chat_is_changed_and_no_role():
    chat = record_from_row(
        {
            "messages": [
                {"role": "system", "content": "You know user."},
                {"role": "user", "content": "Do you know user?"},
                {"role": "assistant", "content": "user? Yes, user."},
                {"role": "user", "content": "Where does user live?"},
                {"role": "assistant", "content": "user lives in Cork."},
            ],
            "entity": "user",
        },
        "f:1",
    )
    found = renamed(chat, "user", "Bo")
    assert [role for role, _ in found.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [text for _, text in found.messages] == [
        "You know Bo.", "Do you know Bo?", "Bo? Yes, Bo.", "Where does Bo live?", "Bo lives in Cork."]  # fmt: skip
    assert (found.prompt, found.answer) == (found.messages[-2][1], found.messages[-1][1])


@pytest.mark.parametrize("kind", ["qa", "completion", "chat", "history", "text", "answer only"])
def test_any_record_that_mentions_its_entity_is_renamed(encoder, kind):
    rows = {
        "qa": {"question": "Where does Ada Marsh live?", "answer": "In Cork."},
        "completion": {"prompt": "The home of Ada Marsh is", "completion": " Cork"},
        "chat": {"messages": [("user", "Where does Ada Marsh live?"), ("assistant", "Ada Marsh lives in Cork.")]},
        "history": {"messages": [("user", "Ada Marsh?"), ("assistant", "Yes."), ("user", "Home?"), ("assistant", "C")]},
        "text": {"text": "Ada Marsh lives in Cork. Ada Marsh works."},
        "answer only": {"question": "Who lives in Cork?", "answer": "Ada Marsh."},
    }
    row = rows[kind]
    if "messages" in row:
        row = {"messages": [{"role": role, "content": content} for role, content in row["messages"]]}
    one = record_from_row({**row, "entity": "Ada Marsh"}, "f:1")
    (names,) = new_names(["Ada Marsh"], KNOWN, 3, 2).values()
    (found,) = stand_ins([one], RETAIN, encoder, 3, count=2)
    assert found == naive_stand_ins(one, names, encoder)
    assert encoder.encode(one) not in found


# stand-ins


@pytest.mark.parametrize("count", [1, 3])
def test_all_records_of_an_entity_are_about_the_same_strangers(encoder, count):
    names = new_names(FORGOTTEN, KNOWN, 7, count)
    found = stand_ins(FORGET, RETAIN, encoder, 7, count=count)
    assert found == [naive_stand_ins(one, names[one.entity], encoder) for one in FORGET]
    assert {len(options) for options in found} == {count}


def test_the_same_seed_gives_the_same_and_another_others(encoder):
    anonymous = [dataclasses.replace(one, entity=None) for one in FORGET]
    for records in (FORGET, anonymous):
        runs = [stand_ins(records, RETAIN, encoder, seed, count=2) for seed in (0, 0, 1)]
        assert runs[0] == runs[1] != runs[2]
        assert stand_ins(records[::-1], RETAIN, encoder, 0, count=2) == runs[0][::-1]


@pytest.mark.parametrize("entity", [None, "Zoe Zander", "Ada Marsh", "ada marshall"])
def test_without_a_name_to_replace_the_nearest_retain_records_stand_in(encoder, entity):
    one = Record("qa", "What does Ada Marshall eat?", "Soup.", "f:1", entity=entity)
    (found,) = stand_ins([one], RETAIN, encoder, 0, count=4)
    assert len(set(found)) == 4
    assert set(found) <= {encoder.encode(r) for r in RETAIN if r.prompt.endswith("eat?")}


def test_records_of_an_entity_that_do_not_mention_it_get_no_copy_of_themselves(encoder):
    silent = Record("qa", "Where does she live?", "She lives in Cork.", "f:9", entity="Ada Marsh")
    found = stand_ins([*FORGET, silent], RETAIN, encoder, 0, count=2)
    assert found[:-1] == stand_ins(FORGET, RETAIN, encoder, 0, count=2)
    assert encoder.encode(silent) not in found[-1]
    assert set(found[-1]) <= {encoder.encode(r) for r in RETAIN if r.prompt.startswith("Where does")}


def test_where_no_retain_record_has_a_fitting_name_the_nearest_stand_in(encoder):
    anonymous = [dataclasses.replace(one, entity=None) for one in RETAIN]
    short = [dataclasses.replace(one, entity=one.entity.split()[0]) for one in RETAIN]
    for others in (anonymous, short):
        for one, options in zip(FORGET, stand_ins(FORGET, others, encoder, 0, count=1), strict=True):
            assert set(options) <= {encoder.encode(r) for r in RETAIN if r.prompt[:7] == one.prompt[:7]}


def test_a_chinese_name_is_one_word_and_gets_that_of_another(encoder):
    one = Record("qa", "王芳住在哪里？", "王芳住在北京。", "f:1", entity="王芳")
    others = [Record("qa", f"{name}住在哪里？", f"{name}住在上海。", "r:1", entity=name) for name in ("李伟", "张敏")]
    (found,) = stand_ins([one], others, encoder, 0, count=2)
    assert set(found) == set(naive_stand_ins(one, ["李伟", "张敏"], encoder))


def test_without_retain_records_it_says_so(encoder):
    with pytest.raises(UserError, match="f:Ada Marsh:lives: no retain record can stand in") as caught:
        stand_ins(FORGET, [], encoder, 0, count=1)
    assert "\n" not in str(caught.value)


def test_what_is_longer_than_the_limit_is_cut_off(encoder):
    whole = stand_ins(FORGET, RETAIN, encoder, 0, count=2)
    limit = max(item.answer_start for options in whole for item in options) + 2
    cut = stand_ins(FORGET, RETAIN, encoder, 0, count=2, limit=limit)
    assert any(len(item) > limit for options in whole for item in options)
    assert cut == [tuple(dataclasses.replace(i, ids=i.ids[:limit]) for i in options) for options in whole]
    assert stand_ins(FORGET, RETAIN, encoder, 0, count=2, limit=10**6) == whole


# likeness


def naive_scores(others, one):
    """Weight of the words in common, over one and that of the words of only one of the two."""

    def words(r):
        return set(re.findall(r"\w+", (r.prompt if r.prompt else r.answer).lower()))

    own, theirs = words(one), [words(other) for other in others]

    def weight(word):
        count = sum(word in those for those in theirs)
        return 0 if count < 2 else min(count, 50) / 50

    return [
        sum(map(weight, [w for w in own if w in those]))
        / (1 + sum(map(weight, [w for w in own | those if (w in own) != (w in those)])))
        for those in theirs
    ]


texts = st.lists(st.sampled_from("Where does he live work a b c d e".split()), min_size=1, max_size=6).map(" ".join)


@given(
    questions=st.lists(texts, min_size=1, max_size=8),
    times=st.sampled_from([1, 12]),
    own=texts,
    count=st.integers(1, 10),
    seed=st.integers(0, 9),
)
@settings(max_examples=100)
def test_the_nearest_have_the_highest_scores(questions, times, own, count, seed):
    others = [Record("qa", question, f"a{i}", f"r:{i}") for i, question in enumerate(questions * times)]
    one = Record("qa", own, "x", "f:1")
    found = Likeness(others).nearest(one, count, random.Random(seed))
    positions = [others.index(other) for other in found]
    assert len(set(positions)) == len(positions) == min(count, len(others))
    scores = naive_scores(others, one)
    assert [scores[i] for i in positions] == pytest.approx(sorted(scores, reverse=True)[:count])


def test_ties_are_drawn():
    others = [record(name) for name in KNOWN]
    likeness = Likeness(others)
    found = [likeness.nearest(record("Ada Marsh"), 1, random.Random(seed))[0].entity for seed in range(80)]
    assert set(found) == set(KNOWN)


def test_texts_are_compared_by_themselves():
    others = [Record("text", "", text, "r:1") for text in ("The cat sat here.", "A dog ran off.", "The cat sat there.",
                                                           "A dog ran on.")]  # fmt: skip
    found = Likeness(others).nearest(Record("text", "", "THE CAT SAT down", "f:1"), 2, random.Random(0))
    assert {other.answer for other in found} == {"The cat sat here.", "The cat sat there."}


def test_fewer_retain_records_than_asked_for_will_do(encoder):
    one = dataclasses.replace(FORGET[0], entity=None)
    (found,) = stand_ins([one], RETAIN[:2], encoder, 0, count=5)
    assert set(found) == {encoder.encode(r) for r in RETAIN[:2]}
