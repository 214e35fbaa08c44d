import random
from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import processors

from falcon_unlearn.corpus.batching import (
    Encoded,
    Encoder,
    batch_indices,
    collate,
    epoch_order,
    fit_to_context,
    length_sorted_batches,
    shuffled_batches,
)
from falcon_unlearn.corpus.records import Record, record_from_row
from falcon_unlearn.engine.pretraining import train_tokenizer
from falcon_unlearn.errors import UserError

TURNS = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
THOUGHT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}{{ eos_token }}\n{% endfor %}"
)


def tokenizer(*, adds_bos: bool = True, chat_template: str | None = None):
    """Byte-level BPE; without ``adds_bos`` it ends in GPT-2's post-processor, which trims offsets."""
    built = train_tokenizer(
        ["Question: Where was Ann born?\nAnswer: Ann was born in the city of Brest in 1921."] * 4, 300, 256
    )
    if not adds_bos:
        built.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    built.chat_template = chat_template
    return built


WITH_BOS = Encoder(tokenizer())
WITHOUT_BOS = Encoder(tokenizer(adds_bos=False))
CHAT = Encoder(tokenizer(chat_template="{{ bos_token }}" + TURNS + PROMPT))
CHAT_NO_BOS = Encoder(tokenizer(chat_template=TURNS + PROMPT))
THINKING = Encoder(tokenizer(chat_template=THOUGHT + PROMPT))


def qa(question: str, answer: str) -> Record:
    return Record("qa", question, answer, "x:1")


def decode(encoder: Encoder, ids) -> str:
    return encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def parts(encoder: Encoder, encoded: Encoded) -> tuple[str, str]:
    """Text before the answer and text under the answer mask, by way of a batch."""
    batch = collate([encoded, Encoded(encoded.ids * 2, 0)], encoder.pad_id)
    mask = batch.answer_mask[0]
    assert batch.input_ids[0][mask].tolist() == list(encoded.ids[encoded.answer_start :])
    return decode(encoder, batch.input_ids[0][~mask & batch.attention_mask[0].bool()]), decode(
        encoder, batch.input_ids[0][mask]
    )


# Control tokens typed by a user are control tokens to any tokenizer: not what is tested here.
words = st.text(min_size=1, max_size=30).filter(lambda t: t.strip() and "<" not in t)
trimmed = words.map(str.strip).filter(bool)
quiet = settings(max_examples=150, deadline=None)


@quiet
@given(words, words)
def test_plain_answer_mask_starts_exactly_at_the_answer(question, answer):
    prompt, masked = parts(WITH_BOS, WITH_BOS.encode(qa(question, answer)))
    assert prompt == f"<s>Question: {question}\nAnswer:"
    assert masked == f" {answer}</s>"


@quiet
@given(words, words)
def test_the_prompt_does_not_depend_on_the_answer(question, answer):
    for encoder in (WITH_BOS, WITHOUT_BOS):
        record = qa(question, "Ann")
        full = encoder.encode(record, answer=answer)
        assert full.ids[: full.answer_start] == encoder.encode_prompt(record).ids


@quiet
@given(trimmed, trimmed)
def test_chat_answer_mask_starts_exactly_at_the_answer(question, answer):
    for encoder, bos in ((CHAT, "<s>"), (CHAT_NO_BOS, "<s>")):
        prompt, masked = parts(encoder, encoder.encode(qa(question, answer)))
        assert prompt == f"{bos}<|user|>\n{question}</s>\n<|assistant|>\n"
        assert masked == f"{answer}</s>\n"


@quiet
@given(trimmed, trimmed)
def test_what_a_template_puts_before_the_answer_belongs_to_the_prompt(question, answer):
    encoded = THINKING.encode(qa(question, answer))
    prompt, masked = parts(THINKING, encoded)
    assert prompt == f"<s><|user|>\n{question}</s>\n<|assistant|>\n<think>\n\n</think>\n\n"
    assert masked == f"{answer}</s>\n"
    assert THINKING.encode_prompt(qa(question, answer)).ids == encoded.ids[: encoded.answer_start]


@quiet
@given(words, words)
@example("0", " 0")
def test_text_and_completion_are_taken_as_they_are(prompt, completion):
    for encoder, bos in ((WITH_BOS, "<s>"), (WITHOUT_BOS, ""), (CHAT, "<s>")):
        text = encoder.encode(Record("text", "", completion, "x:1"))
        assert parts(encoder, text) == (bos, completion)
        whole = encoder.encode(Record("completion", prompt, completion, "x:1"))
        assert decode(encoder, whole.ids) == f"{bos}{prompt}{completion}</s>"


@quiet
@given(st.text("ab .\n", min_size=1), st.text("ab .\n", min_size=1))
def test_a_token_that_spans_prompt_and_completion_counts_as_answer(prompt, completion):
    before, masked = parts(WITH_BOS, WITH_BOS.encode(Record("completion", prompt, completion, "x:1")))
    assert ("<s>" + prompt).startswith(before)
    assert masked.endswith(f"{completion}</s>")


@pytest.mark.parametrize("encoder", [WITH_BOS, WITHOUT_BOS, CHAT, CHAT_NO_BOS])
def test_bos_stands_once_where_the_tokenizer_or_template_puts_one(encoder):
    bos = encoder.tokenizer.bos_token_id
    for record in (qa("q", "a"), Record("text", "", "<s>t", "x:1"), Record("completion", "<s>p", "c", "x:1")):
        encoded = encoder.encode(record)
        expected = 0 if encoder is WITHOUT_BOS and record.kind == "qa" else 1
        assert encoded.ids.count(bos) == expected
        assert encoded.ids[:1].count(bos) == expected
        assert encoded.ids[encoded.answer_start :].count(bos) == (encoder is WITHOUT_BOS and record.kind == "text")


def test_bos_of_a_chat_template_is_kept_where_the_tokenizer_adds_none():
    encoder = Encoder(tokenizer(adds_bos=False, chat_template="{{ bos_token }}" + TURNS + PROMPT))
    ids = encoder.encode(qa("q", "a")).ids
    assert ids.count(encoder.tokenizer.bos_token_id) == 1
    assert ids[0] == encoder.tokenizer.bos_token_id


def test_end_of_sequence_stands_once():
    eos = WITH_BOS.eos_id
    assert WITH_BOS.encode(qa("q", "a")).ids.count(eos) == 1
    assert WITH_BOS.encode(qa("q", "a</s>")).ids.count(eos) == 1
    assert WITH_BOS.encode(Record("text", "", "t", "x:1")).ids.count(eos) == 0


def test_a_conversation_keeps_its_history():
    turns = [("system", "be brief"), ("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", "2")]
    record = record_from_row({"messages": [{"role": role, "content": text} for role, text in turns]}, "x:1")
    assert parts(WITH_BOS, WITH_BOS.encode(record)) == (
        "<s>System: be brief\nUser: one\nAssistant: 1\nQuestion: two\nAnswer:",
        " 2</s>",
    )
    assert parts(CHAT, CHAT.encode(record)) == (
        "<s><|system|>\nbe brief</s>\n<|user|>\none</s>\n<|assistant|>\n1</s>\n<|user|>\ntwo</s>\n<|assistant|>\n",
        "2</s>\n",
    )


def test_template_choice():
    built = tokenizer(chat_template="{{ bos_token }}" + TURNS + PROMPT)
    plain = Encoder(built, template="plain", plain_template="Q: {question}\n\nA:\n{answer}\n")
    assert not plain.uses_chat_template
    assert plain.describe() == repr("Q: {question}\n\nA:\n{answer}")
    assert parts(plain, plain.encode(qa("who", "Ann"))) == ("<s>Q: who\n\nA:\n", "Ann</s>")
    assert Encoder(built).describe() == Encoder(built, template="chat").describe() == "the tokenizer's chat template"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "chat"}, "corpus.template is 'chat', but the tokenizer has no chat template"),
        ({"plain_template": "{question}"}, "corpus.plain_template must contain {question} and end with {answer}"),
        ({"plain_template": "{answer} {question}"}, "corpus.plain_template must contain"),
    ],
)
def test_impossible_templates(options, message):
    with pytest.raises(UserError, match=message.replace("{", r"\{")):
        Encoder(WITH_BOS.tokenizer, **options)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TURNS.replace("{{ m.content }}", "{{ m.content | upper }}") + PROMPT, "changes the answer"),
        ("{{ messages[0].content }}a", "changes the answer"),
        ("{{ raise_exception('no such role') }}", r"refuses this conversation \(no such role\)"),
    ],
)
def test_a_chat_template_that_cannot_take_the_record(template, message):
    encoder = Encoder(tokenizer(chat_template=template))
    with pytest.raises(UserError, match=f"^x:1: the tokenizer's chat template {message}.*corpus.template to plain"):
        encoder.encode(qa("q", "a"))


# words


@pytest.mark.parametrize("encoder", [WITH_BOS, WITHOUT_BOS], ids=["bos", "no bos"])
def test_words_begin_at_spaces_at_punctuation_and_at_special_tokens(encoder):
    begins = encoder.begins_word()
    assert len(begins) == len(encoder.tokenizer)
    encoded = encoder.encode(Record("completion", "x", " unbelievably, Ann-Marie saw  42 quilts.", "x:1"))
    words = []
    for token in encoded.ids[encoded.answer_start :]:
        if begins[token] or not words:
            words.append([])
        words[-1].append(token)
    found = [decode(encoder, word) for word in words]
    assert "".join(found).startswith(" unbelievably, Ann-Marie saw  42 quilts.")
    # A space of its own is a word; what follows a hyphen belongs to it.
    assert found[:9] == [" unbelievably", ",", " Ann", "-Marie", " saw", " ", " 42", " quilts", "."]
    assert all(begins[i] for i in encoder.tokenizer.all_special_ids)


def test_continuations_that_are_marked_begin_no_word_and_a_tokenizer_without_marks_says_nothing():
    class Fake:
        is_fast, eos_token_id, bos_token_id, pad_token_id, chat_template = True, None, None, 0, None
        all_special_ids = (0,)

        def __init__(self, *tokens):
            self.tokens = tokens

        def __len__(self):
            return len(self.tokens)

        def __call__(self, text):
            return {"input_ids": [1]}

        def convert_ids_to_tokens(self, ids):
            return [self.tokens[i] for i in ids]

    assert Encoder(Fake("[PAD]", "quilt", "##ing", ".")).begins_word() == (True, True, False, True)
    assert Encoder(Fake("<pad>", "\u2581quilt", "ing", ".")).begins_word() == (True, True, False, True)
    assert Encoder(Fake("<pad>", "a", "b")).begins_word() is None


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Encoder(Slow())


# --- batches ----------------------------------------------------------------------------------------------------

samples = st.lists(
    st.lists(st.integers(0, 9), min_size=1, max_size=9).flatmap(
        lambda ids: st.integers(0, len(ids)).map(lambda start: Encoded(tuple(ids), start))
    ),
    min_size=1,
    max_size=6,
)


@given(samples)
def test_padding_is_in_no_mask(encoded):
    batch = collate(encoded, 7)
    assert batch.input_ids.shape == (len(encoded), max(map(len, encoded)))
    for row, item in enumerate(encoded):
        real = batch.loss_mask("all")[row]
        assert real.tolist() == [i < len(item) for i in range(len(real))]
        assert batch.input_ids[row][real].tolist() == list(item.ids)
        assert (batch.input_ids[row][~real] == 7).all()
        assert batch.loss_mask("answer")[row].tolist() == [item.answer_start <= i < len(item) for i in range(len(real))]
    assert batch.loss_mask("all").dtype == batch.loss_mask("answer").dtype == torch.bool


def test_the_pad_id_is_a_token_of_the_vocabulary():
    built = tokenizer()
    assert Encoder(built).pad_id == built.pad_token_id
    built.pad_token = None
    assert Encoder(built).pad_id == built.eos_token_id
    built.eos_token = None
    assert Encoder(built).pad_id == built.bos_token_id
    built.bos_token = None
    assert Encoder(built).pad_id == 0


@given(st.integers(1, 23), st.integers(1, 9), st.integers(1, 60), st.integers(0, 3))
def test_the_stream_uses_every_sample_equally_often(n, batch_size, steps, seed):
    batches = [batch_indices(n, batch_size, step, seed, "forget") for step in range(steps)]
    stream = [index for batch in batches for index in batch]
    assert {len(batch) for batch in batches} == {min(n, batch_size)}
    for end in range(n, len(stream) + 1, n):
        assert sorted(stream[end - n : end]) == list(range(n))
    assert len(set(stream[len(stream) // n * n :])) == len(stream) % n


def test_order_depends_on_seed_epoch_and_stream_and_nothing_else():
    orders = [tuple(epoch_order(50, e, s, name)) for e in (0, 1) for s in (0, 1) for name in ("forget", "retain")]
    assert len(set(orders)) == 8
    random.seed(5)
    assert tuple(epoch_order(50, 0, 0, "forget")) == orders[0]
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(50))}


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(1, 8))
def test_epoch_batches_hold_every_sample_once(lengths, batch_size):
    encoded = [Encoded((0,) * length, 0) for length in lengths]
    for batches in (list(shuffled_batches(encoded, batch_size, 0, 0)), length_sorted_batches(encoded, batch_size)):
        assert Counter(i for batch in batches for i in batch) == Counter(range(len(lengths)))
        assert max(map(len, batches)) <= batch_size
    assert [lengths[i] for batch in length_sorted_batches(encoded, batch_size) for i in batch] == sorted(lengths)


# --- records longer than the context ----------------------------------------------------------------------------

LENGTHS = (Encoded((1,) * 4, 1), Encoded((2,) * 9, 2), Encoded((3,) * 6, 5), Encoded((4,) * 7, 6))
RECORDS = [Record("text", "", str(i), f"f.jsonl:{i + 1}") for i in range(4)]


def test_records_that_fit_are_left_alone():
    encoded, records, report = fit_to_context(LENGTHS, RECORDS, 9, "error", "corpus.forget")
    assert (encoded, records, report.longer) == (list(LENGTHS), RECORDS, 0)


def test_long_records_are_an_error_with_the_count_and_the_first():
    with pytest.raises(UserError) as caught:
        fit_to_context(LENGTHS, RECORDS, 6, "error", "corpus.forget")
    message = "corpus.forget: 2 of 4 records are longer than 6 tokens (first: f.jsonl:2, 9 tokens)"
    assert str(caught.value).startswith(message)
    assert "corpus.on_long" in str(caught.value)


def test_long_records_are_dropped():
    encoded, records, report = fit_to_context(LENGTHS, RECORDS, 6, "drop", "corpus.forget")
    assert encoded == [LENGTHS[0], LENGTHS[2]]
    assert records == [RECORDS[0], RECORDS[2]]
    assert (report.longer, report.limit, report.action) == (2, 6, "drop")


def test_long_records_are_truncated_and_those_without_any_answer_left_go():
    encoded, records, report = fit_to_context(LENGTHS, RECORDS, 6, "truncate", "corpus.forget")
    assert encoded == [LENGTHS[0], Encoded((2,) * 6, 2), LENGTHS[2]]
    assert records == RECORDS[:3]
    assert (report.longer, report.left_out) == (2, len(RECORDS) - 3)


@pytest.mark.parametrize("action", ["drop", "truncate"])
def test_nothing_left_is_an_error(action):
    with pytest.raises(UserError, match=f"^corpus.retain: no record is left after corpus.on_long={action} at 1 tokens"):
        fit_to_context(LENGTHS, RECORDS, 1, action, "corpus.retain")


@pytest.mark.parametrize("mask", ["all", "answer"])
@pytest.mark.parametrize(("encoder", "has_bos"), [(WITH_BOS, True), (WITHOUT_BOS, False), (CHAT, True)])
def test_beginning_of_sequence_is_in_no_mask(encoder, has_bos, mask):
    records = [
        record_from_row({"question": "Who?", "answer": "Ada Marsh."}, "x"),
        record_from_row({"text": "Ada."}, "x"),
    ]
    encoded = [encoder.encode(record) for record in records]
    batch = collate(encoded, encoder.pad_id)
    counted = batch.loss_mask(mask)
    bos = encoder.tokenizer.bos_token_id
    assert ((batch.input_ids[:, 0] == bos).all().item()) is has_bos
    assert not (counted & (batch.input_ids == bos)).any()
    assert counted.any(dim=1).all()
    if mask == "all":
        lengths = torch.tensor([len(item) for item in encoded])
        assert torch.equal(counted.sum(1), lengths - int(has_bos))
