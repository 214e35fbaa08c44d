"""The search against naive loops: losses, gradients, candidates, the filter, and what an attack may touch."""

import dataclasses
import math

import pytest
import torch
from conftest import FORGET_ROWS, RETAIN_ROWS
from hypothesis import given
from hypothesis import strategies as st
from model.tiny_models import ARCHITECTURES, VOCABULARY, build_model, shared_model
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from falcon_unlearn.attacks.base import Deadline, OutOfTimeError, Target
from falcon_unlearn.attacks.gcg import (
    GcgConfig,
    Loss,
    SearchSettings,
    TransferConfig,
    TriggerScorer,
    allowed_tokens,
    propose,
    score_with_trigger,
    search,
)
from falcon_unlearn.attacks.gcg_prompts import Prompt, TriggerSlot, apply_trigger, place
from falcon_unlearn.corpus.batching import PLAIN_TEMPLATE, Encoder
from falcon_unlearn.corpus.records import record_from_row
from falcon_unlearn.errors import UserError

BEFORE = (1, 5, 6, 7, 8, 9, 10, 11, 12)
PROMPTS = (
    Prompt(BEFORE, (20, 21), (30, 31, 32)),  # two that begin alike, of different lengths
    Prompt(BEFORE, (22,), (33,)),
    Prompt((1, 9), (23, 24, 25), (34, 35)),
    Prompt((1, 7, 7), (), (36, 37)),  # the answer right behind the trigger
    Prompt((), (41,), (42, 43), (43, 44, 45)),  # nothing before it, and letters to choose from
)
TRIGGERS = [(11, 12, 13), (14, 15, 16), (17, 18, 19), (11, 12, 11), (60, 3, 3)]
LOSSES = {"plain": Loss(), "enhanced": Loss(solved_at=0.3, fluency_weight=0.4)}
ALL = torch.ones(VOCABULARY, dtype=torch.bool)


def naive_loss(model, prompts, trigger, loss):
    """One prompt, one trigger, every token, a full softmax."""
    total = 0.0
    for prompt in prompts:
        ids = [*prompt.before, *trigger, *prompt.after, *prompt.target]
        log_p = model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
        first = len(ids) - len(prompt.target)
        if prompt.choices:
            letters = log_p[-2, list(prompt.choices)].exp()
            nll = -math.log(letters[0] / letters.sum())
        else:
            nll = -sum(float(log_p[first + i - 1, t]) for i, t in enumerate(prompt.target)) / len(prompt.target)
        start = len(prompt.before)
        fluency = -sum(float(log_p[start + i - 1, trigger[i]]) for i in range(1, len(trigger))) / (len(trigger) - 1)
        total += max(nll, -math.log(loss.solved_at)) + loss.fluency_weight * fluency
    return total / len(prompts)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_with_and_without_cache_and_one_by_one_the_losses_are_the_same(architecture, kind):
    model, loss = shared_model(architecture), LOSSES[kind]
    for prompts in (PROMPTS, PROMPTS[:2], PROMPTS[3:4]):
        cached = TriggerScorer(model, prompts, TRIGGERS[0], loss=loss)
        plain = TriggerScorer(model, prompts, TRIGGERS[0], loss=loss, use_cache=False)
        assert cached.cached
        assert not plain.cached
        with torch.no_grad():
            expected = torch.tensor([naive_loss(model, prompts, t, loss) for t in TRIGGERS], dtype=torch.float64)
        torch.testing.assert_close(cached.score(TRIGGERS).loss, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(plain.score(TRIGGERS).loss, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(cached.gradient(TRIGGERS[0]), plain.gradient(TRIGGERS[0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
def test_the_gradient_is_that_of_the_one_hot_tokens(architecture):
    model = build_model(architecture).double()
    embed = model.get_input_embeddings()
    trigger = TRIGGERS[0]
    table = embed(torch.arange(VOCABULARY))  # scaled, where the architecture scales

    def loss_of(one_hot):
        total = 0.0
        for prompt in PROMPTS[:4]:
            rest = [*prompt.after, *prompt.target]
            parts = [table[list(prompt.before)], one_hot @ table, table[rest]]
            logits = model(inputs_embeds=torch.cat(parts)[None], use_cache=False).logits[0]
            n = len(prompt.target)
            total = total + F.cross_entropy(logits[-n - 1 : -1], torch.tensor(prompt.target))
        return total / 4

    one_hot = F.one_hot(torch.tensor(trigger), VOCABULARY).double()
    leaf = one_hot.clone().requires_grad_()
    expected = torch.autograd.grad(loss_of(leaf), leaf)[0]
    gradient = TriggerScorer(model, PROMPTS[:4], trigger).gradient(trigger)
    assert gradient.shape == (3, VOCABULARY)
    torch.testing.assert_close(gradient.double(), expected, atol=1e-6, rtol=1e-5)

    for position, token in ((0, 40), (2, 13)):
        step = torch.zeros_like(one_hot)
        step[position, token] = 3e-3  # norms are computed in single precision
        slope = (loss_of(one_hot + step) - loss_of(one_hot - step)) / 6e-3
        assert float(gradient[position, token]) == pytest.approx(float(slope), rel=1e-2, abs=1e-4)


def test_a_prompt_is_matched_when_its_target_is_said_greedily():
    model = shared_model("llama")
    ids = torch.tensor([[*BEFORE, *TRIGGERS[0], 20]])
    for _ in range(2):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    said = tuple(ids[0, -2:].tolist())
    right = Prompt(BEFORE, (20,), said)
    wrong = Prompt(BEFORE, (20,), (said[0], (said[1] + 1) % VOCABULARY))
    assert TriggerScorer(model, [right], TRIGGERS[0]).score(TRIGGERS[:1]).matched.tolist() == [True]
    assert TriggerScorer(model, [right, wrong], TRIGGERS[0]).score(TRIGGERS[:1]).matched.tolist() == [False]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), RuntimeError("DefaultCPUAllocator: not enough memory")])
def test_without_memory_for_all_candidates_fewer_are_scored_at_a_time(monkeypatch, error):
    scorer = TriggerScorer(shared_model("llama"), PROMPTS, TRIGGERS[0])
    expected = scorer.score(TRIGGERS)
    values = TriggerScorer._values

    def short_of_memory(self, prompts, embeds, trigger):
        if len(trigger) > 2:
            raise error
        return values(self, prompts, embeds, trigger)

    monkeypatch.setattr(TriggerScorer, "_values", short_of_memory)
    scores = scorer.score(TRIGGERS)
    assert scorer.rows <= 2
    torch.testing.assert_close(scores.loss, expected.loss, atol=1e-5, rtol=0)
    monkeypatch.setattr(TriggerScorer, "_values", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        scorer.score(TRIGGERS[:1])


@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 6),
    topk=st.integers(1, 30),
    replace=st.integers(1, 3),
    forbidden=st.sets(st.integers(0, 49), max_size=48),
)
def test_candidates_are_near_the_trigger_allowed_among_the_topk_and_all_different(
    seed, length, topk, replace, forbidden
):
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(length, 50, generator=generator)
    trigger = tuple(torch.randint(50, (length,), generator=generator).tolist())
    allowed = torch.tensor([token not in forbidden for token in range(50)])
    settings = SearchSettings(candidates=40, topk=topk, replace=replace)

    def draw():
        return propose(
            trigger,
            gradient,
            allowed,
            settings,
            generator=torch.Generator().manual_seed(seed),
            keep=lambda candidate: candidate[0] != 7,
        )

    candidates = draw()
    assert candidates == draw()
    assert len(set(candidates)) == len(candidates) <= 40
    for candidate in candidates:
        assert candidate[0] != 7
        changed = [i for i in range(length) if candidate[i] != trigger[i]]
        assert 1 <= len(changed) <= replace
        for i in changed:
            usable = [t for t in range(50) if t not in forbidden and t != trigger[i]]
            assert candidate[i] in sorted(usable, key=lambda t, i=i: float(gradient[i, t]))[:topk]


def run_search(seed=0, deadline=None, loss=None, **settings):
    scorer = TriggerScorer(shared_model("llama"), PROMPTS[:3], (3, 3, 3, 3), loss=loss)
    settings = SearchSettings(**{"steps": 12, "candidates": 32, "topk": 16, "early_stop": False, **settings})
    return scorer, search(
        scorer, [(3, 3, 3, 3), (4, 4, 4)], settings, allowed=ALL, seed=seed, deadline=deadline or Deadline()
    )


@pytest.mark.parametrize("from_best", [False, True])
def test_the_best_so_far_only_gets_better_and_the_targets_more_likely(from_best):
    scorer, result = run_search(from_best=from_best)
    losses = [step.loss for step in result.trace]
    probabilities = [step.probability for step in result.trace]
    assert losses == sorted(losses, reverse=True)
    assert probabilities == sorted(probabilities)
    assert probabilities[-1] > 1.3 * probabilities[0]
    assert losses[-1] == min(step.step_loss for step in result.trace)
    assert float(scorer.score([result.trigger]).loss) == pytest.approx(result.loss, abs=1e-5)
    assert [step.step for step in result.trace] == list(range(13))
    assert result.stopped == "steps"


def test_enhanced_loss_only_gets_better_as_well():
    _, result = run_search(loss=LOSSES["enhanced"], from_best=True)
    losses = [step.loss for step in result.trace]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def untimed(result):
    return dataclasses.replace(result, trace=tuple(dataclasses.replace(step, seconds=0.0) for step in result.trace))


def test_equal_seeds_give_equal_searches_and_others_do_not():
    first, second, other = (untimed(run_search(seed)[1]) for seed in (1, 1, 2))
    assert first == second
    assert first.trace != other.trace


def test_the_search_begins_at_the_best_start():
    scorer, result = run_search(steps=1)
    losses = [float(scorer.score([start]).loss) for start in ((3, 3, 3, 3), (4, 4, 4))]
    assert result.trace[0].loss == pytest.approx(min(losses), abs=1e-6)


def test_it_stops_where_told():
    assert run_search(stop_loss=100.0)[1].stopped == "loss"
    _, late = run_search(deadline=Deadline(0))
    assert late.stopped == "time"
    assert len(late.trace) == 1
    assert run_search(candidates=1, topk=1)[1].stopped in {"steps", "no candidates"}
    scorer = TriggerScorer(shared_model("llama"), PROMPTS[:1], (3, 3))
    nothing = search(scorer, [(3, 3)], SearchSettings(), allowed=ALL, seed=0, keep_everywhere=lambda _: False)
    assert nothing.stopped == "no candidates"
    assert nothing.trigger == (3, 3)
    with pytest.raises(OutOfTimeError):
        TriggerScorer(shared_model("llama"), PROMPTS[:1], (3, 3), deadline=Deadline(0))


def records_of(rows):
    return tuple(record_from_row(row, f"row {i}") for i, row in enumerate(rows))


FORGET, RETAIN = records_of(FORGET_ROWS), records_of(RETAIN_ROWS)
CHAT = (
    "{{ '<s>' }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def trained_tokenizer(kind):
    """Byte-level (Llama 3, Qwen) or with spaces as letters (Llama 2, Mistral), both with a beginning of sequence."""
    texts = [PLAIN_TEMPLATE.format(question=r.prompt, answer=r.answer) for r in (*FORGET, *RETAIN)]
    texts += ["A: A B: B C: C D: D"] * 40
    raw = Tokenizer(models.BPE(unk_token=None))
    special = ["<s>", "</s>"]
    if kind == "metaspace":
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        alphabet = sorted({*"".join(texts), "▁", *"\nxZ07#!.[]?abcdefghijklmnopqrstuvwxyz"})
    else:
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=list(alphabet))
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    if kind == "chat":
        tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="module", params=["bytes", "metaspace", "chat"])
def encoder(request):
    return Encoder(trained_tokenizer(request.param))


@pytest.fixture(
    scope="module", params=["prefix", "suffix", "Note: {trigger}! {question} Think.", "{question}{trigger}"]
)
def slot(request, encoder):
    return TriggerSlot(encoder, FORGET[:5], request.param, "x x x x", 32), request.param


def test_the_parts_put_together_are_the_prompt(encoder, slot):
    slot, placement = slot
    assert len(slot.prompts) == 5
    for record, prompt in zip(FORGET[:5], slot.prompts, strict=True):
        placed = apply_trigger([record], "x x x x", placement)[0]
        encoded = encoder.encode(placed)
        assert (*prompt.before, *slot.start, *prompt.after, *prompt.target) == encoded.ids
        assert prompt.target == encoded.ids[encoded.answer_start :]
    assert slot.text(slot.start) == "x x x x"
    assert slot.ids("x x x x") == slot.start


def test_a_trigger_passes_the_filter_exactly_if_its_text_gives_the_same_tokens_everywhere(encoder, slot):
    slot, placement = slot
    vocabulary = len(encoder.tokenizer)
    generator = torch.Generator().manual_seed(0)
    passed = 0
    for _ in range(150):
        trigger = list(slot.start)
        for position in torch.randint(4, (2,), generator=generator).tolist():
            trigger[position] = int(torch.randint(2, vocabulary, (1,), generator=generator))
        text = slot.text(trigger)
        same = text is not None and all(
            encoder.encode(apply_trigger([record], text, placement)[0]).ids
            == (*prompt.before, *trigger, *prompt.after, *prompt.target)
            for record, prompt in zip(FORGET[:5], slot.prompts, strict=True)
        )
        assert slot.keeps_everywhere(trigger) == same
        assert slot.keeps(trigger) or not same
        passed += same
    assert 10 < passed < 150


def test_other_starts_stand_in_the_same_place(slot):
    slot, _ = slot
    ids = slot.ids("Where is home")
    assert ids is not None
    assert slot.text(ids) == "Where is home"


def test_letters_are_choices_and_sentences_are_not(encoder):
    letters = record_from_row({"question": "Pick: A B C D?", "answer": "B", "perturbed_answer": ["A", "C", "D"]}, "x")
    slot = TriggerSlot(encoder, [letters, *FORGET[:2]], "prefix", "x x x x", 32)
    choices = slot.prompts[0].choices
    assert len(set(choices)) == 4
    assert choices[0] == slot.prompts[0].target[-1]
    assert slot.prompts[1].choices == slot.prompts[2].choices == ()


def test_allowed_tokens_are_text_and_nothing_special():
    tokenizer = trained_tokenizer("bytes")
    allowed = allowed_tokens(tokenizer, len(tokenizer) + 5)
    assert not allowed[[tokenizer.bos_token_id, tokenizer.eos_token_id]].any()
    assert not allowed[len(tokenizer) :].any()
    texts = [tokenizer.decode([i]) for i in allowed.nonzero().flatten().tolist()]
    assert all(text.isascii() and text.isprintable() for text in texts)
    assert " " in texts
    assert allowed_tokens(tokenizer, len(tokenizer), ascii_only=False).sum() > allowed.sum()


def test_a_trigger_is_put_into_questions_of_every_kind():
    row = {"messages": [{"role": "user", "content": "Hi {trigger}"}, {"role": "assistant", "content": "Yes"}]}
    chat, qa = apply_trigger([record_from_row(row, "x"), FORGET[0]], "T {question}", "prefix")
    assert chat.prompt == chat.messages[0][1] == "T {question} Hi {trigger}"
    assert chat.answer == "Yes"
    assert qa.prompt == "T {question} " + FORGET[0].prompt
    assert qa.heldout_question == "T {question} " + FORGET[0].heldout_question
    assert place("q", "t", "a {trigger} b {question} c") == "a t b q c"
    with pytest.raises(UserError, match="x:3"):
        apply_trigger([record_from_row({"text": "Once"}, "x:3")], "T", "prefix")


@pytest.mark.parametrize("placement", ["middle", "{question}", "{trigger} {question} {trigger}"])
def test_a_placement_needs_both_slots_once(placement):
    with pytest.raises(ValidationError, match="placement"):
        GcgConfig(placement=placement)
    with pytest.raises(ValidationError, match="placement"):
        TransferConfig(triggers=("x",), placement=placement)


@pytest.fixture(scope="module")
def loaded(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny.model).eval()
    return model, Encoder(AutoTokenizer.from_pretrained(tiny.model))


def with_wrong_answers(records):
    wrong = [records[(i + 4) % len(records)] for i in range(len(records))]
    return tuple(
        dataclasses.replace(r, answer=r.answer.replace(r.value, w.value), value=w.value)
        for r, w in zip(records, wrong, strict=True)
    )


QUICK = {"steps": 6, "candidates": 48, "topk": 32, "starts": ("x x x x",)}


@pytest.mark.parametrize("variant", ["plain", "enhanced"])
def test_a_trigger_makes_wrong_answers_more_likely_and_leaves_the_model_alone(loaded, variant):
    model, encoder = loaded
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = [p.requires_grad for p in model.parameters()]
    records = with_wrong_answers(FORGET)
    target = Target(model, encoder, records[:4], records[4:], batch_size=8, max_new_tokens=12)
    config = GcgConfig(variant=variant, placement="prefix", **QUICK)
    outcome = config.run(target)
    again = config.run(target)
    assert outcome.artefacts == again.artefacts
    assert outcome.samples == again.samples
    assert outcome.complete
    assert outcome.steps == 6
    start = score_with_trigger(target, target.known, "x x x x", "prefix")
    found = score_with_trigger(target, target.known, outcome.artefacts["trigger"], "prefix")
    assert sum(math.log(s.probability) for s in found) > sum(math.log(s.probability) for s in start) + 0.5
    assert outcome.numbers["known_probability"].value == pytest.approx(sum(s.probability for s in found) / 4)
    assert [s.answer for s in outcome.samples] == [r.answer for r in records[4:]]
    assert all(outcome.artefacts["trigger"] in s.prompt for s in outcome.samples)
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_scored_facts_do_not_enter_the_search(loaded):
    model, encoder = loaded
    records = with_wrong_answers(FORGET)
    config = GcgConfig(prompts=3, **{**QUICK, "steps": 1})
    slot, _, result = config.find(Target(model, encoder, records[:4], records[4:]))
    _, _, other = config.find(Target(model, encoder, records[:4], RETAIN))
    assert untimed(result) == untimed(other)
    assert len(slot.prompts) == 3
    known = {encoder.encode(r).ids[encoder.encode(r).answer_start :] for r in records[:4]}
    assert {prompt.target for prompt in slot.prompts} <= known


def test_what_the_model_knows_ends_the_search_at_once(loaded):
    model, encoder = loaded
    known = TriggerSlot(encoder, FORGET[:1], "suffix", "x", 32)
    record = FORGET[0]
    for text in ("x", "!", "0", "Ada"):
        if TriggerScorer(model, known.prompts, known.ids(text)).score([known.ids(text)]).matched:
            outcome = GcgConfig(**{**QUICK, "starts": (text,)}).run(Target(model, encoder, (record,), FORGET[4:]))
            assert outcome.steps == 0
            assert "stopped for: match" in outcome.notes[0]
            return
    pytest.fail("no neutral trigger leaves the model its answer")


def test_out_of_time_it_reports_what_it_had_and_says_so(loaded):
    model, encoder = loaded
    records = with_wrong_answers(FORGET)

    class Third(Deadline):
        left = 6

        @property
        def passed(self):
            self.left -= 1
            return self.left < 0

    outcome = GcgConfig(**QUICK).run(Target(model, encoder, records[:2], records[4:], deadline=Third()))
    assert not outcome.complete
    assert "stopped for: time" in outcome.notes[0]
    assert len(outcome.samples) == len(records[4:])
    with pytest.raises(OutOfTimeError):
        GcgConfig(**QUICK).run(Target(model, encoder, records[:2], records[4:], deadline=Deadline(0)))


@pytest.mark.parametrize("length", [1, 3, 6])
def test_neutral_starts_are_cut_to_the_length(loaded, length):
    model, encoder = loaded
    target = Target(model, encoder, FORGET[:1], FORGET[4:])
    slot, _, _ = GcgConfig(length=length, steps=1, candidates=1, early_stop=False).find(target)
    word = encoder.tokenizer(" x", add_special_tokens=False)["input_ids"]
    assert len(slot.start) <= max(length + 1, len(word))  # the space before it may be a token
    assert len(slot.start) > length - 2 * len(word)


def test_what_cannot_be_attacked_is_said(loaded):
    model, encoder = loaded
    text = record_from_row({"text": "Once there was a town."}, "x")
    with pytest.raises(UserError, match="question"):
        GcgConfig().run(Target(model, encoder, (text,), FORGET))
    with pytest.raises(UserError, match="longer than 64"):
        GcgConfig(starts=("x " * 80,)).run(Target(model, encoder, FORGET[:1], FORGET[4:]))


def test_transfer_tries_every_trigger_and_keeps_the_strongest(loaded):
    model, encoder = loaded
    target = Target(model, encoder, FORGET[:1], FORGET[4:], batch_size=8, max_new_tokens=12)
    outcome = TransferConfig(triggers=("x x", "Ada"), placement="prefix").run(target)
    scores = {t: score_with_trigger(target, FORGET[4:], t, "prefix") for t in ("x x", "Ada")}
    assert [p.setting["trigger"] for p in outcome.points] == ["x x", "Ada"]
    assert outcome.samples == scores[outcome.artefacts["trigger"]]
    assert max(p.accuracy for p in outcome.points) == pytest.approx(
        sum(s.accuracy for s in outcome.samples) / len(outcome.samples)
    )
