import pytest

from falcon_unlearn.corpus.alternatives import DONT_KNOW, PER_RECORD, dont_know, random_answers
from falcon_unlearn.corpus.batching import Encoder
from falcon_unlearn.corpus.records import Record, record_from_row
from falcon_unlearn.engine.pretraining import train_tokenizer
from falcon_unlearn.errors import UserError

KINDS = ("qa", "completion", "completion with a space", "chat", "long chat")


@pytest.fixture(scope="module")
def encoder():
    texts = [*DONT_KNOW, "Question: Where does Ada live?\nAnswer: Ada lives in Cork. User: Assistant: home of"]
    return Encoder(train_tokenizer(texts, 300, 64))


def record(kind="qa", number=0, answer=None, **more):
    answer = f"Ada{number} lives in Cork." if answer is None else answer
    question = f"Where does Ada{number} live?"
    if "chat" in kind:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        history = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
        return record_from_row({"messages": [*history, *turns] if kind == "long chat" else turns, **more}, "f:1")
    if kind == "completion":
        return record_from_row({"prompt": f"The home of Ada{number}: ", "completion": answer, **more}, "f:1")
    if kind == "completion with a space":
        return record_from_row({"prompt": f"The home of Ada{number} is", "completion": f" {answer}", **more}, "f:1")
    return record_from_row({"question": question, "answer": answer, **more}, "f:1")


OTHERS = [record(number=i, answer=f"Answer {i} of another.") for i in range(40)]


def answers(encoder, found, of):
    """Texts of the answers; what stands before them is the same as in the record itself."""
    own, result = encoder.encode(of), []
    for item in found:
        assert item.ids[: item.answer_start] == own.ids[: own.answer_start]
        assert (item.answer_start, item.content_start) == (own.answer_start, own.content_start)
        assert item.ids[-1] == encoder.eos_id == own.ids[-1]
        result.append(encoder.tokenizer.decode(item.ids[item.answer_start : -1]).strip())
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_every_record_gets_some_in_the_place_of_its_answer(encoder, kind):
    for number in range(5):
        one = record(kind, number)
        ignorant = answers(encoder, dont_know(one, encoder, 0), one)
        assert len(ignorant) == len(set(ignorant)) == PER_RECORD
        assert set(ignorant) <= set(DONT_KNOW)
        drawn = answers(encoder, random_answers(one, OTHERS, encoder, 0), one)
        assert len(drawn) == len(set(drawn)) == PER_RECORD
        assert set(drawn) <= {other.answer for other in OTHERS} - {one.answer}


def test_the_choice_is_a_function_of_seed_and_record(encoder):
    def choices(seed):
        pairs = [
            (dont_know(r, encoder, seed), random_answers(r, OTHERS, encoder, seed)) for r in map(numbered, range(6))
        ]
        return [
            [tuple(item.ids[item.answer_start :] for item in found) for found in kind]
            for kind in zip(*pairs, strict=True)
        ]

    def numbered(number):
        return record(number=number)

    assert choices(0) == choices(0)
    for one, other in zip(choices(0), choices(1), strict=True):
        assert one != other
        assert len(set(one)) > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", ["Nobody can say.", ["Nobody can say.", "Who is Ada?"]])
def test_preferred_answers_of_the_data_win(encoder, kind, given):
    one = record(kind, preferred_answer=given)
    expected = [given] if isinstance(given, str) else given
    assert answers(encoder, dont_know(one, encoder, 0), one) == expected
    assert not set(answers(encoder, random_answers(one, OTHERS, encoder, 0), one)) & set(expected)


def test_a_completion_keeps_the_space_it_begins_with(encoder):
    one = record("completion with a space", preferred_answer="Who knows.")
    (found,) = dont_know(one, encoder, 0)
    assert encoder.tokenizer.decode(found.ids[found.content_start : -1]) == "The home of Ada0 is Who knows."


@pytest.mark.parametrize("own", ["Answer 3 of another.", " Answer  3 of another.\n"])
def test_random_answers_never_equal_the_own_one(encoder, own):
    for seed in range(30):
        one = record(answer=own)
        assert "Answer 3 of another." not in answers(encoder, random_answers(one, OTHERS[:6], encoder, seed), one)


def test_few_or_repeated_answers_of_others_will_do(encoder):
    one = record()
    rare = [record(number=i, answer=one.answer) for i in range(300)] + OTHERS[:1]
    assert answers(encoder, random_answers(one, rare, encoder, 0), one) == [OTHERS[0].answer]
    with pytest.raises(UserError, match="f:1: no retain record has another answer") as caught:
        random_answers(one, rare[:300], encoder, 0)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no retain record"):
        random_answers(one, [], encoder, 0)


@pytest.mark.parametrize("preferred", [{}, {"preferred_answer": "No."}])
def test_plain_text_is_refused(encoder, preferred):
    text = record_from_row({"text": "Ada lives in Cork.", **preferred}, "people.txt:7")
    for find in (dont_know, lambda *args: random_answers(args[0], OTHERS, *args[1:])):
        with pytest.raises(UserError, match=r"people\.txt:7: a plain text has no question") as caught:
            find(text, encoder, 0)
        assert "\n" not in str(caught.value)


def test_what_is_longer_than_the_limit_is_cut_off(encoder):
    one = record()
    limit = encoder.encode(one).answer_start + 3
    whole, cut = random_answers(one, OTHERS, encoder, 0), random_answers(one, OTHERS, encoder, 0, limit=limit)
    assert [item.ids for item in cut] == [item.ids[:limit] for item in whole]
    assert any(len(item) > limit for item in whole)
    assert all(len(item) <= limit for item in dont_know(one, encoder, 0, limit=limit))
    assert dont_know(one, encoder, 0, limit=10**6) == dont_know(one, encoder, 0)


class Counting(list):
    looked_at = 0

    def __getitem__(self, index):
        self.looked_at += 1
        return super().__getitem__(index)

    def __iter__(self):
        self.looked_at += len(self)
        return super().__iter__()


def test_of_many_others_only_some_are_looked_at(encoder):
    many = Counting(Record("qa", f"q{i}", f"another answer {i}", "r:1") for i in range(5000))
    assert len(random_answers(record(), many, encoder, 0)) == PER_RECORD
    assert many.looked_at < 50
