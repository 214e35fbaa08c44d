"""Batching changes nothing, log-probabilities are those of a full softmax, and each rule of scoring holds."""

import json
import math
import os
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from falcon_unlearn.corpus.batching import Encoded, Encoder
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.engine.pretraining import train_tokenizer
from falcon_unlearn.evaluation.rouge import UnicodeTokenizer, rouge_l_recall
from falcon_unlearn.evaluation.scoring import (
    MAX_TEXT_ANSWER_TOKENS,
    answer_log_probabilities,
    contains_value,
    generate_greedy,
    normalise,
    score_set,
    stop_ids,
)

DATA = Path(os.environ.get("FALCON_UNLEARN_DATA", "../shared/data")) / "tofu"
VOCABULARY, CONTEXT, PAD, EOS = 50, 64, 0, 2

TEXTS = ["Question: Where was Ada Lunn born?\nAnswer: Ada Lunn was born in the city of Brask."] * 3


def llama():
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.5,
        eos_token_id=EOS,
        bos_token_id=1,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def gpt2():
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        initializer_range=0.5,
        eos_token_id=EOS,
        bos_token_id=1,
    )
    return GPT2LMHeadModel(config)


@pytest.fixture(scope="module", params=[llama, gpt2])
def model(request):
    torch.manual_seed(0)
    return request.param().eval()


def random_items(count, longest, seed=0):
    generator = torch.Generator().manual_seed(seed)
    items = []
    for _ in range(count):
        length = int(torch.randint(2, longest, (1,), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        items.append(Encoded(tuple(ids), int(torch.randint(0, length, (1,), generator=generator))))
    return items


def naive_log_probability(model, item):
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([item.ids])).logits[0].double().log_softmax(-1)
    values = [float(log_p[t - 1, item.ids[t]]) for t in range(max(item.answer_start, 1), len(item))]
    return sum(values) / len(values)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_log_probabilities_are_those_of_a_full_softmax_whatever_the_batch(model, batch_size):
    items = random_items(20, CONTEXT)
    found = answer_log_probabilities(model, items, PAD, batch_size, "cpu")
    assert found == pytest.approx([naive_log_probability(model, item) for item in items], abs=1e-5)


def test_log_probabilities_of_a_model_that_always_returns_all_logits(model):
    class AllLogits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, use_cache):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    items = [Encoded((*item.ids, 9, 8, 7), max(item.answer_start, 4)) for item in random_items(6, 30)]
    expected = answer_log_probabilities(model, items, PAD, 4, "cpu")
    assert answer_log_probabilities(AllLogits(), items, PAD, 4, "cpu") == pytest.approx(expected, abs=1e-6)


def test_logits_are_asked_for_no_earlier_than_the_first_answer(model):
    kept = []
    hook = model.register_forward_hook(lambda _module, _args, output: kept.append(output.logits.shape[1]))
    answer_log_probabilities(model, [Encoded((5,) * 30, 25), Encoded((6,) * 30, 28)], PAD, 2, "cpu")
    hook.remove()
    assert kept == [6]


def test_no_answer_token_scores_nan_and_disturbs_nobody(model):
    item = Encoded((5, 6, 7), 1)
    empties = [Encoded((), 0), Encoded((5,), 0), Encoded((5, 6), 2)]
    for batch_size in (1, 8):
        found = answer_log_probabilities(model, [empties[0], item, *empties[1:]], PAD, batch_size, "cpu")
        assert [math.isnan(value) for value in found] == [True, False, True, True]
        assert found[1] == pytest.approx(naive_log_probability(model, item), abs=1e-5)


def naive_greedy(model, ids, count, stops):
    ids, start = list(ids), len(ids)
    while len(ids) < min(start + count, CONTEXT):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[start:]


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_batched_generation_is_the_greedy_one(model, batch_size):
    prompts = random_items(12, 40)
    free = [naive_greedy(model, prompt.ids, 16, []) for prompt in prompts]
    # A token that does occur, so that some continuations end early and some do not.
    stops = [free[0][3]]
    expected = [naive_greedy(model, prompt.ids, 16, stops) for prompt in prompts]
    assert len({len(ids) for ids in expected}) > 1
    found = generate_greedy(model, prompts, PAD, stops, max_new_tokens=16, batch_size=batch_size, device="cpu")
    assert found == expected
    unstopped = generate_greedy(model, prompts, PAD, [], max_new_tokens=16, batch_size=batch_size, device="cpu")
    assert unstopped == free


def test_generation_ends_at_the_context_length_without_shortening_others(model):
    prompts = [Encoded((7,) * n, n) for n in (CONTEXT - 3, CONTEXT - 10, 5, CONTEXT, 0)]
    found = generate_greedy(model, prompts, PAD, [], max_new_tokens=8, batch_size=8, device="cpu")
    assert [len(ids) for ids in found] == [3, 8, 8, 0, 0]
    assert found[:3] == [naive_greedy(model, prompt.ids, 8, []) for prompt in prompts[:3]]


def test_generation_ignores_and_keeps_the_models_own_settings(model, caplog):
    prompts = random_items(3, 20)
    expected = [naive_greedy(model, prompt.ids, 10, []) for prompt in prompts]
    own = model.generation_config
    before = own.to_dict()
    own.update(do_sample=True, temperature=5.0, top_p=0.5, repetition_penalty=9.0)
    configured = own.to_dict()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = generate_greedy(model, prompts, PAD, [], max_new_tokens=10, batch_size=2, device="cpu")
        assert model.generation_config is own
        assert own.to_dict() == configured
    finally:
        own.update(**before)
    assert found == expected
    assert not caplog.records


def test_scoring_leaves_the_mode_alone_and_runs_without_dropout():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=CONTEXT))
    items = random_items(4, 20)
    expected = answer_log_probabilities(model.eval(), items, PAD, 2, "cpu")
    model.train()
    model.transformer.wte.eval()
    assert answer_log_probabilities(model, items, PAD, 2, "cpu") == expected
    assert [name for name, module in model.named_modules() if not module.training] == ["transformer.wte"]


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


def test_generation_stops_eight_tokens_after_the_longest_answer(trained, encoder, monkeypatch):
    record = Record("qa", "Who?", "Bo.", "t:1")
    answer = encoder.encode(record)
    passes = []
    monkeypatch.setattr("falcon_unlearn.evaluation.scoring.stop_ids", lambda *_: ())
    hook = trained.register_forward_hook(lambda *_: passes.append(1))
    score(trained, encoder, record)
    hook.remove()
    # One pass for the log-probabilities, then one for each new token.
    assert len(passes) == 1 + len(answer) - answer.answer_start + 8


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


@given(st.text(max_size=30))
def test_normalising_keeps_nothing_to_normalise(text):
    once = normalise(text)
    assert once == " ".join(once.split())
    assert contains_value(text, text) == 1
    assert contains_value(f"  {text}\t", once) == 1


latin = st.text(st.sampled_from("abcdexyzABC0129 .,'-éüñ\n"), max_size=60)


@given(latin.filter(lambda text: any(c.isascii() and c.isalnum() for c in text)), st.text(max_size=40) | latin)
def test_rouge_is_rouge_scores_for_latin_references(reference, candidate):
    expected = RougeScorer(["rougeL"], use_stemmer=True).score(reference, candidate)["rougeL"].recall
    assert rouge_l_recall(reference, candidate) == expected


@given(st.text(st.sampled_from("abcdexyzABCing ed0129 .,'_-\n"), max_size=60))
def test_the_unicode_tokenizer_agrees_with_the_default_one_on_ascii(text):
    from rouge_score.tokenizers import DefaultTokenizer

    assert UnicodeTokenizer().tokenize(text) == DefaultTokenizer(use_stemmer=True).tokenize(text)


@pytest.mark.parametrize(
    ("reference", "other"),
    [
        ("北京是中国的首都。", "上海是中国的城市。"),
        ("東京はにほんのしゅとです", "大阪はにほんのまちです"),
        ("القاهرة عاصمة مصر", "بغداد عاصمة العراق"),
        ("दिल्ली भारत की राजधानी है", "मुंबई भारत का शहर है"),
        ("서울은 한국의 수도", "부산은 한국의 도시"),
        ("Москва столица России", "Киев столица Украины"),
        ("กรุงเทพ", "เชียงใหม่"),
        ("The capital is 北京", "The capital is 上海"),
        ("é", "ü"),
    ],
)
def test_rouge_outside_the_latin_alphabet(reference, other):
    assert rouge_l_recall(reference, reference) == 1
    assert rouge_l_recall(reference, other) < 1
    assert rouge_l_recall(reference, "") == 0


def test_unicode_tokens():
    tokenize = UnicodeTokenizer().tokenize
    assert tokenize("北京 2024年") == ["北", "京", "2024", "年"]
    assert tokenize("हिन्दी में") == ["हिन्दी", "में"]
    assert tokenize("السَّلامُ عليكم") == ["السَّلامُ", "عليكم"]
    assert tokenize("Россия, США") == ["россия", "сша"]
    assert tokenize(" \u0301.\u200d") == []


@pytest.mark.skipif(not DATA.is_dir(), reason="no shared data")
@pytest.mark.parametrize(
    "name", ["forget01_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"]
)
def test_rouge_of_tofus_answers_is_tofus(name):
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for row in rows[:60]:
        answer, other = row["answer"], row["perturbed_answer"][0]
        assert rouge_l_recall(answer, other) == scorer.score(answer, other)["rougeL"].recall
