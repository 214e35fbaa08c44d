import pytest

from falcon_unlearn.corpus.records import COLUMN_SETS, Record, record_from_row
from falcon_unlearn.errors import UserError

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "kind", "prompt", "answer"),
    [
        ({"text": "t"}, "text", "", "t"),
        ({"question": "q", "answer": "a"}, "qa", "q", "a"),
        ({"prompt": "p", "completion": "c"}, "completion", "p", "c"),
        ({"messages": [USER, ASSISTANT]}, "chat", "q", "a"),
        ({"text": "t", "question": "q", "answer": "a", "id": 7}, "qa", "q", "a"),
        ({"messages": None, "question": "q", "answer": "a"}, "qa", "q", "a"),
    ],
)
def test_columns_are_recognised(row, kind, prompt, answer):
    record = record_from_row(row, "here:1")
    assert (record.kind, record.prompt, record.answer, record.origin) == (kind, prompt, answer, "here:1")


def test_chat_keeps_the_history_and_the_last_answer():
    turns = [{"role": "system", "content": "be brief"}, USER, ASSISTANT, {**USER, "content": "q2"}, ASSISTANT]
    record = record_from_row({"messages": turns}, "x")
    assert record.prompt == "q2"
    assert record.messages == (
        ("system", "be brief"),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "q2"),
        ("assistant", "a"),
    )


def test_fields_of_the_evaluation():
    row = {
        "question": "q",
        "answer": "a",
        "value": "v",
        "paraphrased_answer": "p",
        "perturbed_answer": ["w1", "w2"],
        "heldout_question": "h",
        "entity": "e",
    }
    record = record_from_row(row, "x")
    assert (record.value, record.paraphrased_answer, record.perturbed_answers) == ("v", "p", ("w1", "w2"))
    assert (record.heldout_question, record.entity) == ("h", "e")
    assert record_from_row({**row, "perturbed_answer": "w"}, "x").perturbed_answers == ("w",)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("I can't say.", ("I can't say.",)),
        (["I can't say.", "Who?"], ("I can't say.", "Who?")),
        ([], ()),
        ("", ()),
        (None, ()),
    ],
)
@pytest.mark.parametrize(
    "row", [{"question": "q", "answer": "a"}, {"prompt": "p", "completion": "c"}, {"messages": [USER, ASSISTANT]}]
)
def test_preferred_answers(row, given, expected):
    record = record_from_row({**row, "preferred_answer": given}, "x")
    assert record.preferred_answers == expected
    assert record_from_row(row, "x").preferred_answers == ()
    assert record.key == record_from_row(row, "x").key


@pytest.mark.parametrize("field", ["value", "paraphrased_answer", "heldout_question", "entity"])
@pytest.mark.parametrize("blank", ["", " ", None])
def test_a_blank_optional_field_is_absent(field, blank):
    # An empty value would stand in every generation and score 1.0.
    assert getattr(record_from_row({"question": "q", "answer": "a", field: blank}, "x"), field) is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"body": "t", "id": 1}, f"columns not recognised (body, id); a record needs {COLUMN_SETS}"),
        ({}, "columns not recognised (none)"),
        ({"question": "q"}, "columns not recognised (question)"),
        ({"text": " "}, "column 'text' is empty"),
        ({"question": 3, "answer": "a"}, "column 'question' is int, not text"),
        ({"question": "q", "answer": ["a"]}, "column 'answer' is list, not text"),
        ({"question": "q", "answer": None}, "column 'answer' is NoneType, not text"),
        ({"question": "q", "answer": "a", "value": 3}, "column 'value' is int, not text"),
        ({"question": "q", "answer": "a", "perturbed_answer": 3}, "'perturbed_answer' must be"),
        ({"question": "q", "answer": "a", "perturbed_answer": ["w", None]}, "'perturbed_answer' must be"),
        ({"question": "q", "answer": "a", "preferred_answer": 3}, "'preferred_answer' must be"),
        ({"question": "q", "answer": "a", "preferred_answer": " "}, "'preferred_answer' must be"),
        ({"question": "q", "answer": "a", "preferred_answer": ["w", ""]}, "none of them empty"),
        (
            {"question": "q", "answer": "a", "preferred_answer": "\ud83d"},
            "'preferred_answer' holds half of a surrogate",
        ),
        ({"messages": "hi"}, "'messages' must be a list of {role, content} objects"),
        ({"messages": []}, "'messages' must be a list"),
        ({"messages": [{"role": "user"}]}, "'messages' must be a list"),
        ({"messages": [USER]}, "the last of 'messages' must have the role 'assistant', it has 'user'"),
        ({"messages": [ASSISTANT]}, "'messages' needs a user turn"),
        ({"messages": [USER, {**ASSISTANT, "content": " "}]}, "non-empty answer"),
        ({"messages": [{**USER, "role": "system"}, ASSISTANT]}, "its role is 'system'"),
        ({"text": "half \ud83d"}, "column 'text' holds half of a surrogate pair at character 5"),
        ({"messages": [USER, {**ASSISTANT, "content": "\ude00"}]}, "'messages' holds half of a surrogate pair"),
    ],
)
def test_bad_rows_say_where_and_what(row, message):
    with pytest.raises(UserError) as caught:
        record_from_row(row, "people.jsonl:7")
    assert str(caught.value).startswith("people.jsonl:7: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_key_folds_white_space_and_ignores_everything_but_the_text():
    one = Record("qa", "Who  is\nit?", "Ann ", "a:1", value="Ann")
    assert one.key == Record("completion", "Who is it?", " Ann", "b:9").key
    assert one.key != Record("qa", "Who is it?", "Bob", "a:1").key


def test_key_of_a_conversation_holds_its_history():
    def chat(first: str) -> Record:
        return record_from_row({"messages": [{**USER, "content": first}, ASSISTANT, USER, ASSISTANT]}, "x")

    assert chat("one").key != chat("two").key
    assert record_from_row({"messages": [USER, ASSISTANT]}, "x").key == Record("qa", "q", "a", "y").key
