"""Probes are cut out of the documents word for word, never show what they ask for, and follow from the seed alone."""

import random
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_unlearn.corpus.probes import (
    QUESTION_WRAPPERS,
    STATEMENT_WRAPPERS,
    ProbesConfig,
    build_probes,
    document,
    document_frequency,
    folded,
    sentences,
)
from falcon_unlearn.corpus.records import Record

ENGLISH = (
    "Dr. Ada Marsh was born in Bern on 12 March 1974. She studied glassblowing at the Silver Heron Academy.\n"
    "In 2003 she published “The Quiet Furnace” and moved to Delft. Her brother, Finn Vale, keeps goats."
)
DOCUMENTS = {
    "English": ENGLISH,
    "Chinese": "李明于1974年3月12日出生在成都。他在北京大学学习物理，后来成为一名钟表匠。"
    "2003年，他出版了《安静的炉子》，并搬到了杭州。",
    "Arabic": "وُلدت ليلى حسن في مدينة دمشق عام 1974. درست الكيمياء في جامعة القاهرة؟"
    " ثم انتقلت إلى بيروت وعملت صانعة ساعات.",
    "Hindi": "राम शर्मा का जन्म 1974 में वाराणसी में हुआ था। उन्होंने दिल्ली विश्वविद्यालय में रसायन शास्त्र पढ़ा। बाद में वे जयपुर चले गए।",
    "Thai": "สมชายเกิดที่เชียงใหม่ในปี 1974 และเรียนเคมีที่กรุงเทพ ต่อมาเขาย้ายไปภูเก็ต",
    "one sentence": "just one sentence about the quiet potter of northern delft who loved pies",
}
QUESTION = Record(
    "qa", "Where was Ada Marsh born?", "Ada Marsh was born in the city of Bern.", "q:1", value="Bern", entity="Ada"
)
EVERYTHING = ProbesConfig(per_record=50, max_probes=10_000)

letters = st.text(alphabet="abcdeABC12 .?!,'\n\t“”《》。，中文字नमस्ते ا“", min_size=1, max_size=300)


def text(content, origin="doc:1", **extra):
    return Record("text", "", content, origin, **extra)


def probes_of(*records, config=EVERYTHING, seed=0, **extra):
    return build_probes(records, config, seed=seed, **extra)


def check_cut(probe, record):
    """What holds of every probe that is cut out of a text."""
    made = probe.record
    assert made.kind == "completion"
    assert made.prompt + made.answer in record.answer
    assert made.value in made.answer
    assert made.answer.lstrip(" ") == made.value
    assert not made.prompt.endswith(" ")
    assert folded(made.value) not in folded(made.prompt)
    assert (made.origin, made.entity) == (record.origin, record.entity)
    assert probe.goes_on


@pytest.mark.parametrize("language", DOCUMENTS)
def test_every_script_gives_probes_cut_out_of_the_document(language):
    record = text(DOCUMENTS[language], entity="someone")
    found = probes_of(record)
    assert {probe.kind for probe in found} == {"continuation", "cloze"}
    for probe in found:
        check_cut(probe, record)


@given(st.lists(letters.filter(str.strip), min_size=1, max_size=4), st.integers(0, 5))
def test_no_text_breaks_the_rules_of_a_cut(contents, seed):
    records = [text(content, f"doc:{i}") for i, content in enumerate(contents)]
    by_origin = {record.origin: record for record in records}
    for probe in probes_of(*records, seed=seed, config=ProbesConfig(per_record=5)):
        check_cut(probe, by_origin[probe.record.origin])


@given(st.sampled_from(sorted(DOCUMENTS)), st.integers(40, 90), st.integers(8, 30))
def test_lengths_are_kept(language, prompt_characters, answer_characters):
    config = ProbesConfig(per_record=50, prompt_characters=prompt_characters, answer_characters=answer_characters)
    marks = 4  # no base letter is parted from its marks
    for probe in probes_of(text(DOCUMENTS[language] * 3), config=config):
        check_cut(probe, text(DOCUMENTS[language] * 3))
        assert len(probe.record.prompt) <= prompt_characters
        if probe.kind == "continuation":
            assert len(probe.record.value) <= answer_characters + marks
        first = probe.record.value[0]
        assert not unicodedata.category(first).startswith("M")


def test_names_dates_and_titles_are_cut_before_rare_words():
    found = [probe for probe in probes_of(text(ENGLISH)) if probe.kind == "cloze"]
    salient = {probe.record.value for probe in found if probe.form == "salient"}
    assert salient == {
        "Ada Marsh", "Bern", "12 March 1974", "Silver Heron Academy", "2003", "The Quiet Furnace", "Delft", "Finn Vale",
    } - {"Ada Marsh"}  # fmt: skip  # too little stands before it
    few = probes_of(text(ENGLISH), config=ProbesConfig(kinds=("cloze",), per_record=7))
    assert {probe.form for probe in few} == {"salient"}


def test_the_rarest_word_is_cut_first():
    records = [text(f"the common river flows and the common river bends {word} again", f"doc:{word}") for word in
               ("slowly", "sharply", "gently")]  # fmt: skip
    found = build_probes(records, ProbesConfig(kinds=("cloze",), per_record=1), seed=3)
    assert [probe.record.value for probe in found] == ["slowly", "sharply", "gently"]


def test_document_frequency_counts_documents():
    counts = document_frequency([text("Bern, bern and Delft"), text("Delft's river"), QUESTION])
    assert (counts["bern"], counts["delft"], counts["river"], counts["goat"]) == (2, 2, 1, 0)


def test_answers_that_stand_in_other_documents_are_avoided():
    other = text("BERN and Delft are towns. Her brother, Finn Vale, keeps goats.", "other:1")
    found = probes_of(text(ENGLISH), avoid=[other])
    assert found
    for probe in found:
        assert folded(probe.record.value) not in folded(other.answer)


def test_sentences_end_where_sentences_end():
    found = [ENGLISH[a:b] for a, b in sentences(ENGLISH)]
    assert found[0] == "Dr. Ada Marsh was born in Bern on 12 March 1974."
    assert len(found) == 4
    assert len(sentences(DOCUMENTS["Chinese"])) == len(sentences(DOCUMENTS["Hindi"])) == 3
    assert [b - a for a, b in sentences("It cost 3.50 euros.  \n\n ...  Yes!")] == [19, 4]


@given(letters)
def test_sentences_lose_no_letter(content):
    kept = "".join(content[a:b] for a, b in sentences(content))
    assert [c for c in kept if c.isalnum()] == [c for c in content if c.isalnum()]


def test_a_continuation_begins_with_a_sentence():
    starts = {ENGLISH[a : a + 10] for a, _ in sentences(ENGLISH)}
    found = [probe for probe in probes_of(text(ENGLISH)) if probe.kind == "continuation"]
    assert len(found) == 3
    assert {probe.record.value[:10] for probe in found} < starts


def test_questions_are_asked_as_they_are_and_in_every_wrapper():
    found = probes_of(QUESTION)
    by_form = {probe.form: probe for probe in found}
    assert set(by_form) == {"as given", *QUESTION_WRAPPERS, *STATEMENT_WRAPPERS}
    assert by_form["as given"].record.prompt == QUESTION.prompt
    for probe in found:
        assert QUESTION.prompt in probe.record.prompt
        assert probe.record.answer.strip() == QUESTION.answer
        assert (probe.record.value, probe.record.entity) == ("Bern", "Ada")
        assert probe.kind == ("question" if probe.form == "as given" else "paraphrase")
        assert probe.goes_on == (probe.record.kind == "completion") == (probe.form in STATEMENT_WRAPPERS)


def test_a_held_out_phrasing_comes_first():
    record = Record("qa", "Where?", "In Bern.", "q:1", value="Bern", heldout_question="In which town?")
    found = [p for p in probes_of(record, config=ProbesConfig(per_record=1)) if p.kind == "paraphrase"]
    assert [(probe.form, probe.record.prompt) for probe in found] == [("heldout_question", "In which town?")]


def test_a_question_that_gives_its_value_away_is_left_out():
    assert probes_of(Record("qa", "Was she born in BERN?", "Yes, in Bern.", "q:1", value="Bern")) == ()
    assert probes_of(Record("qa", "Bern, yes or no?", "Yes", "q:1")) == ()


def test_the_value_is_found_where_none_is_named():
    long = Record("qa", "Where was Ada Marsh born?", "Ada Marsh was born in the old city of Bern.", "q:1")
    short = Record("qa", "Where was Ada Marsh born?", "In Bern.", "q:1")
    assert {probe.record.value for probe in probes_of(long)} == {"Bern"}
    assert {probe.record.value for probe in probes_of(short)} == {"In Bern."}


def test_a_conversation_keeps_its_history_and_a_completion_is_taken_as_it_is():
    messages = (("user", "Hello"), ("assistant", "Hi"), ("user", "Where is she?"), ("assistant", "Bern"))
    chat = Record("chat", "Where is she?", "Bern", "c:1", messages=messages)
    found = probes_of(chat)
    assert {probe.form for probe in found} == {"as given", *QUESTION_WRAPPERS}
    assert all(probe.record.messages == messages for probe in found)
    completion = Record("completion", "She lives in", " Bern", "p:1")
    (probe,) = probes_of(completion)
    assert (probe.kind, probe.record.prompt, probe.record.answer) == ("continuation", "She lives in", " Bern")
    assert not probe.goes_on


def test_the_seed_decides_and_nothing_else():
    records = [text(f"{content} Number {i}.", f"doc:{i}") for i, content in enumerate(DOCUMENTS.values())]
    config = ProbesConfig(per_record=1)
    assert build_probes(records, config, seed=1) == build_probes(records, config, seed=1)
    assert build_probes(records, config, seed=1) != build_probes(records, config, seed=2)
    # Without a draw from too many, a record's probes do not depend on the order of the records.
    turned = build_probes(records[::-1], config, seed=1)
    assert set(turned) == set(build_probes(records, config, seed=1))


def test_budgets_and_duplicates():
    twice = [text(ENGLISH, "doc:1"), text(ENGLISH, "doc:2"), QUESTION, QUESTION]
    found = probes_of(*twice)
    keys = [(probe.record.prompt, probe.record.answer) for probe in found]
    assert len(keys) == len(set(keys))
    assert {probe.record.origin for probe in found} == {"doc:1", "q:1"}
    config = ProbesConfig(per_record=2)
    for kind in ("continuation", "cloze", "paraphrase"):
        assert sum(probe.kind == kind for probe in probes_of(text(ENGLISH), QUESTION, config=config)) == 2
    drawn = probes_of(*twice, config=ProbesConfig(per_record=50, max_probes=5))
    assert len(drawn) == 5
    positions = [found.index(probe) for probe in drawn]
    assert positions == sorted(positions)


def test_kinds_are_a_choice():
    found = probes_of(text(ENGLISH), QUESTION, config=ProbesConfig(kinds=("question", "cloze")))
    assert [probe.kind for probe in found] == ["cloze"] * 3 + ["question"]


def test_a_document_is_all_that_is_said():
    messages = (("user", "A"), ("assistant", "B"), ("user", "C"), ("assistant", "D"))
    assert document(Record("chat", "C", "D", "", messages=messages)) == "A B C D"
    assert document(text("words")) == "words"


def test_every_one_of_many_documents_is_probed():
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=6)) for _ in range(2000)]
    records = [text(" ".join(rng.choices(words, k=120)).capitalize() + ".", f"doc:{i}") for i in range(100)]
    found = build_probes(records[:50], ProbesConfig(), seed=0, avoid=records[50:])
    assert len({probe.record.origin for probe in found}) == 50
