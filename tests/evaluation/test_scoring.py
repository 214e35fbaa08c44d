import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from falcon_unlearn.artifacts import read_jsonl, sample_score_from, write_jsonl
from falcon_unlearn.corpus.batching import Encoded, Encoder
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.engine.pretraining import train_tokenizer
from falcon_unlearn.evaluation.generation import stop_ids
from falcon_unlearn.evaluation.scoring import MAX_TEXT_ANSWER_TOKENS, contains_value, normalise, score_set

CONTEXT = 64

TEXTS = ["Question: Where was Ada Lunn born?\nAnswer: Ada Lunn was born in the city of Brask."] * 3


def naive_log_probability(model, item):
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([item.ids])).logits[0].double().log_softmax(-1)
    values = [float(log_p[t - 1, item.ids[t]]) for t in range(max(item.answer_start, 1), len(item))]
    return sum(values) / len(values)


# ---- whole records ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder():
    tokenizer = train_tokenizer(TEXTS, 300, CONTEXT)
    return Encoder(tokenizer)


ROWS = [
    ("Where was Ada Lunn born?", "Ada Lunn was born in Brask."),
    ("What is Ada Lunn's place of birth?", "Ada Lunn was born in Brask."),
    ("Who is Bo Tarn?", "Bo Tarn is a potter."),
]


@pytest.fixture(scope="module")
def trained(encoder):
    """A model that has learned ROWS by heart."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(encoder.tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=encoder.tokenizer.bos_token_id,
        eos_token_id=encoder.eos_id,
        pad_token_id=encoder.pad_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    items = [torch.tensor([encoder.encode(Record("qa", *row, "t:1")).ids]) for row in ROWS]
    for _ in range(100):
        optimizer.zero_grad()
        loss = sum(model(input_ids=ids, labels=ids).loss for ids in items)
        torch.autograd.backward(loss)
        optimizer.step()
    return model.eval()


def score(model, encoder, *records, **options):
    return score_set(model, encoder, records, "retain", **({"batch_size": 4, "device": "cpu"} | options))


def test_a_learned_answer_scores_full_marks(trained, encoder):
    record = Record("qa", *ROWS[0], "t:1", value="brask", entity="Ada")
    (found,) = score(trained, encoder, record)
    assert (found.set, found.index, found.entity) == ("retain", 0, "Ada")
    assert (found.prompt, found.answer) == ROWS[0]
    assert found.generation == ROWS[0][1]
    assert found.accuracy == found.rouge == 1
    assert found.probability > 0.8
    assert (
        found.truth_ratio is found.accuracy_heldout is found.generation_heldout is found.normalised_probability is None
    )


def test_accuracy_takes_the_value_or_else_the_whole_answer(trained, encoder):
    question, answer = ROWS[0]
    right, wrong, whole, not_whole = score(
        trained,
        encoder,
        Record("qa", question, answer, "t:1", value="  BRASK!"),
        Record("qa", question, answer, "t:2", value="Oslo"),
        Record("qa", question, answer, "t:3"),
        Record("qa", question, answer + " Probably.", "t:4"),
    )
    assert [s.accuracy for s in (right, wrong, whole, not_whole)] == [1, 0, 1, 0]
    assert not_whole.rouge == pytest.approx(6 / 7)


def test_heldout_accuracy_is_that_of_the_other_question(trained, encoder):
    first, second, third = score(
        trained,
        encoder,
        Record("qa", *ROWS[0], "t:1", value="Brask", heldout_question=ROWS[1][0]),
        Record("qa", *ROWS[0], "t:2", value="Brask"),
        Record("qa", *ROWS[0], "t:3", value="Brask", heldout_question=ROWS[2][0]),
    )
    assert (first.accuracy_heldout, first.generation_heldout) == (1, ROWS[0][1])
    assert (second.accuracy_heldout, second.generation_heldout) == (None, None)
    assert (third.accuracy, third.accuracy_heldout) == (1, 0)
    assert third.generation_heldout.startswith("Bo Tarn is")


def mean_log_probability(model, encoder, question, answer):
    return naive_log_probability(model, encoder.encode(Record("qa", question, answer, "t:1")))


def test_truth_ratio_and_normalised_probability_by_hand(trained, encoder):
    question, answer = ROWS[0]
    paraphrase, wrong = "Brask is where Ada was born.", ("Ada was born in Oslo.", "It is Ulm.")
    both, no_paraphrase, no_wrong = score(
        trained,
        encoder,
        Record("qa", question, answer, "t:1", paraphrased_answer=paraphrase, perturbed_answers=wrong),
        Record("qa", question, answer, "t:2", perturbed_answers=wrong),
        Record("qa", question, answer, "t:3", paraphrased_answer=paraphrase),
    )
    right, para, *losses = (mean_log_probability(trained, encoder, question, a) for a in (answer, paraphrase, *wrong))
    assert both.probability == pytest.approx(math.exp(right), rel=1e-4)
    assert both.truth_ratio == pytest.approx(math.exp(sum(losses) / 2) / math.exp(para), rel=1e-4)
    assert both.normalised_probability is None
    assert no_paraphrase.truth_ratio == pytest.approx(math.exp(sum(losses) / 2) / math.exp(right), rel=1e-4)
    share = math.exp(right) / (math.exp(right) + sum(map(math.exp, losses)))
    assert no_paraphrase.normalised_probability == pytest.approx(share, rel=1e-4)
    assert (no_wrong.truth_ratio, no_wrong.normalised_probability) == (None, None)
    assert no_wrong.probability == pytest.approx(math.exp(right), rel=1e-4)


def mixed_records():
    question, answer = ROWS[0]
    return [
        Record("qa", question, answer, "t:1", perturbed_answers=("It is Ulm.",), heldout_question=ROWS[1][0]),
        Record("text", "", TEXTS[0], "t:2"),
        Record("completion", "Bo Tarn is", " a potter.", "t:3", paraphrased_answer="x", perturbed_answers=("y", "z")),
        Record("chat", ROWS[2][0], ROWS[2][1], "t:4", messages=(("user", ROWS[2][0]), ("assistant", ROWS[2][1]))),
    ]


def test_scores_do_not_depend_on_the_batch_size(trained, encoder):
    one, many = (score(trained, encoder, *mixed_records(), batch_size=size) for size in (1, 64))
    for a, b in zip(one, many, strict=True):
        assert (a.index, a.prompt, a.answer) == (b.index, b.prompt, b.answer)
        assert (a.generation, a.generation_heldout) == (b.generation, b.generation_heldout)
        assert (a.accuracy, a.rouge) == (b.accuracy, b.rouge)
        assert a.probability == pytest.approx(b.probability, rel=1e-4)
        assert a.truth_ratio == (None if b.truth_ratio is None else pytest.approx(b.truth_ratio, rel=1e-4))


def same_up_to_rounding(one, other):
    """Field by field: whether numbers are close (or both NaN) and all else is equal."""
    a, b = to_comparable(one), to_comparable(other)
    assert a.keys() == b.keys()
    return all(
        a[name] == (pytest.approx(b[name], rel=1e-4, nan_ok=True) if isinstance(b[name], float) else b[name])
        for name in a
    )


def to_comparable(score):
    plain = {name: value for name, value in vars(score).items() if name != "perturbed_log_probabilities"}
    return plain | {f"perturbed {i}": value for i, value in enumerate(score.perturbed_log_probabilities)}


@pytest.mark.parametrize("size", [1, 3])
def test_slices_score_as_the_whole_set_does(trained, encoder, size):
    # The last one is longer than all others: nothing may hang on the longest of the set.
    records = [*mixed_records(), Record("qa", ROWS[0][0], "far away " * 20, "t:5"), Record("text", "", " ", "t:6")]
    whole = score(trained, encoder, *records)
    parts = [
        found
        for start in range(0, len(records), size)
        for found in score(trained, encoder, *records[start : start + size], first_index=start)
    ]
    assert [found.index for found in parts] == list(range(len(records)))
    for part, one in zip(parts, whole, strict=True):
        assert same_up_to_rounding(part, one)


def test_log_probabilities_are_kept_and_survive_the_disk(trained, encoder, tmp_path):
    question, answer = ROWS[0]
    paraphrase, wrong = "Brask is where Ada was born.", ("Ada was born in Oslo.", "why " * 300, "It is Ulm.")
    found = score(
        trained,
        encoder,
        Record("qa", question, answer, "t:1", paraphrased_answer=paraphrase, perturbed_answers=wrong),
        Record("qa", question, answer, "t:2", paraphrased_answer=paraphrase),
        Record("qa", "why " * 300, answer, "t:3"),
        Record("qa", question, answer, "t:4"),
    )
    by_hand = [mean_log_probability(trained, encoder, question, text) for text in (answer, paraphrase, *wrong[::2])]
    first = found[0]
    kept = (first.log_probability, first.paraphrased_log_probability, *first.perturbed_log_probabilities[::2])
    assert kept == pytest.approx(by_hand, abs=1e-5)
    assert math.isnan(first.perturbed_log_probabilities[1])
    assert math.isnan(first.truth_ratio)
    assert first.probability == math.exp(first.log_probability)
    assert found[1].paraphrased_log_probability == pytest.approx(by_hand[1], abs=1e-5)
    assert math.isnan(found[2].log_probability)
    assert (found[3].paraphrased_log_probability, found[3].perturbed_log_probabilities) == (None, ())

    write_jsonl(tmp_path / "scores.jsonl", found)
    read = [sample_score_from(row) for row in read_jsonl(tmp_path / "scores.jsonl")]
    assert [type(one.perturbed_log_probabilities) for one in read] == [tuple] * 4
    assert same_up_to_rounding(read[0], dataclasses.replace(first, truth_ratio=None))
    assert math.isnan(read[2].log_probability)


def test_scores_of_an_older_run_are_read():
    row = {"set": "forget", "index": 0, "prompt": "p", "answer": "a", "generation": "g"}
    row |= {"probability": 0.5, "accuracy": 1.0, "rouge": 1.0}
    found = sample_score_from(row)
    assert (found.log_probability, found.perturbed_log_probabilities) == (None, ())


@pytest.mark.parametrize("text", [TEXTS[0], TEXTS[0] + "!"])
def test_a_text_is_prompted_with_its_first_half(trained, encoder, text):
    (found,) = score(trained, encoder, Record("text", "", text, "t:1", heldout_question="ignored"))
    ids = encoder.encode(Record("text", "", text, "t:1")).ids
    half = (len(ids) + 1) // 2
    assert found.prompt + " " + found.answer == text or found.prompt + found.answer == text
    assert found.probability == pytest.approx(math.exp(naive_log_probability(trained, Encoded(ids, half))), rel=1e-4)
    assert found.accuracy_heldout is None


def test_a_long_text_is_cut_to_the_context_and_to_the_answer_limit(trained, encoder):
    text = " ".join(str(n) for n in range(400))
    ids = encoder.encode(Record("text", "", text, "t:1")).ids
    assert len(ids) > 256
    (found,) = score(trained, encoder, Record("text", "", text, "t:1"))
    expected = Encoded(ids[:256], 128)
    assert found.probability == pytest.approx(math.exp(naive_log_probability(trained, expected)), rel=1e-4)
    assert MAX_TEXT_ANSWER_TOKENS == 128


def test_what_cannot_be_scored_is_nan_in_every_score(trained, encoder):
    too_long = Record("qa", "why " * 300, "because", "t:1", perturbed_answers=("so",), heldout_question=ROWS[0][0])
    no_token = Record("text", "", " ", "t:2")
    fine = Record("qa", *ROWS[0], "t:3")
    long_score, text_score, fine_score = score(trained, encoder, too_long, no_token, fine)
    for found in (long_score, text_score):
        assert all(map(math.isnan, (found.probability, found.accuracy, found.rouge)))
        assert found.generation == ""
    assert math.isnan(long_score.truth_ratio)
    assert fine_score.accuracy == 1


def test_generation_never_exceeds_max_new_tokens(trained, encoder):
    record = Record("qa", *ROWS[0], "t:1")
    (found,) = score(trained, encoder, record, max_new_tokens=3)
    assert ROWS[0][1].startswith(found.generation)
    assert found.accuracy == 0


def test_generation_that_does_not_end_is_cut_at_max_new_tokens_whatever_the_answer(trained, encoder, monkeypatch):
    record = Record("qa", *ROWS[2], "t:1")
    passes = []
    monkeypatch.setattr("falcon_unlearn.evaluation.scoring.stop_ids", lambda *_: ())
    hook = trained.register_forward_hook(lambda *_: passes.append(1))
    score(trained, encoder, record, max_new_tokens=30)
    hook.remove()
    # One pass for the log-probabilities, then one for each new token.
    assert len(passes) == 1 + 30


def test_no_records_no_scores(trained, encoder):
    assert score(trained, encoder) == []


def test_chat_models_stop_at_their_end_of_turn_too(trained, encoder):
    own = trained.generation_config.eos_token_id
    trained.generation_config.eos_token_id = [encoder.eos_id, 17]
    try:
        assert set(stop_ids(trained, encoder)) == {encoder.eos_id, 17}
    finally:
        trained.generation_config.eos_token_id = own


# ---- rules on text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "value", "expected"),
    [
        ("She was born in Brask.", "brask", 1),
        ("She was born\n in  New   Brask", "new brask!", 1),
        ("STRASSE", "Straße", 1),
        ("She was born in Oslo.", "Brask", 0),
        ("Bras k", "Brask", 0),
        ("", "Brask", 0),
        ("C++ and C", "C++", 1),
        ("why?", "?", 0),
        ("?", "?", 1),
        ("住在北京。", "「北京」", 1),
    ],
)
def test_accuracy_rule(generation, value, expected):
    assert contains_value(generation, value) == expected


@pytest.mark.parametrize(
    ("answer", "value", "wrong"),
    [
        ("她出生在北京市，后来住在上海。", "北京市", "广州"),
        ("彼女は東京で生まれました。", "「東京」", "大阪"),
        ("เธอเกิดที่กรุงเทพมหานคร", "กรุงเทพ", "เชียงใหม่"),
        ("وُلِدَت في القاهرة، عاصمة مصر.", "القاهرة", "بغداد"),
        ("उनका जन्म नई दिल्ली में हुआ था।", "नई दिल्ली।", "मुंबई"),
    ],
    ids=["chinese", "japanese", "thai", "arabic", "hindi"],
)
def test_other_scripts_through_a_model_that_learned_the_answer(answer, value, wrong):
    torch.manual_seed(0)
    # Byte-level: tokens are pieces of letters.
    encoder = Encoder(train_tokenizer(["Question: Answer: abc"], 280, 256))
    right = Record("qa", "Where?", answer, "t:1", value=value, perturbed_answers=(answer.replace(value, wrong),))
    config = LlamaConfig(
        vocab_size=len(encoder.tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    ids = torch.tensor([encoder.encode(right).ids])
    for _ in range(400):
        optimizer.zero_grad()
        output = model(input_ids=ids, labels=ids)
        if (output.logits[0, :-1].argmax(-1) == ids[0, 1:]).all():
            break
        output.loss.backward()
        optimizer.step()
    half = answer[: len(answer) // 2]
    found = score(
        model.eval(),
        encoder,
        right,
        dataclasses.replace(right, value=wrong),
        dataclasses.replace(right, value=None),
        max_new_tokens=200,
    )
    assert {one.generation for one in found} == {answer}
    assert [one.accuracy for one in found] == [1, 0, 1]
    assert [one.rouge for one in found] == [1, 1, 1]
    (cut,) = score(model, encoder, right, max_new_tokens=len(half.encode()))
    assert 0 < cut.rouge < 1


@given(st.text(max_size=30))
def test_normalising_keeps_nothing_to_normalise(text):
    once = normalise(text)
    assert once == " ".join(once.split())
    assert contains_value(text, text) == 1
    assert contains_value(f"  {text}\t", once) == 1
