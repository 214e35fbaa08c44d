"""Templates stand where they should, token by token, and the best of them is reported with what it cost in luck."""

import copy
import dataclasses
import math

import numpy as np
import pytest
from attacked_models import attacked, fingerprint
from pydantic import ValidationError

from falcon_unlearn.attacks import prompting
from falcon_unlearn.attacks.base import Deadline, OutOfTimeError
from falcon_unlearn.attacks.prompting import NAMES, TEMPLATES, PromptConfig, PromptTemplate, ask
from falcon_unlearn.corpus.batching import Encoder
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.errors import UserError

CHAT = "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHAT
SHOTS = (Record("qa", "Who is it?", "It is Eva.", ""), Record("qa", "Who else?", "It is Gus.", ""))
QUESTION = Record("qa", "Where does Ada live?", "Ada lives in Bern.", "", value="Bern")


@pytest.fixture(scope="module")
def models(tiny, oracle):
    return attacked(tiny.model, oracle)


@pytest.fixture(scope="module")
def plain(models):
    return models.encoder


@pytest.fixture(scope="module", params=[CHAT, NO_SYSTEM], ids=["system", "no system"])
def chat(models, request):
    tokenizer = copy.deepcopy(models.encoder.tokenizer)
    tokenizer.chat_template = request.param
    return Encoder(tokenizer)


def texts(encoder, encoded):
    """Prompt and answer, as text with the beginning of sequence."""
    start = encoded.answer_start
    return tuple(encoder.tokenizer.decode(ids) for ids in (encoded.ids[:start], encoded.ids[start:]))


def test_the_plain_template_is_followed_to_the_letter(plain):
    template = PromptTemplate("t", "Please: {question}", "You know it.", "Sure, it is", shots=True)
    prompt, answer = texts(plain, ask(plain, QUESTION, template, SHOTS))
    assert prompt == (
        "<s>You know it.\n\nQuestion: Who is it?\nAnswer: It is Eva.\n\nQuestion: Who else?\nAnswer: It is Gus.\n\n"
        "Question: Please: Where does Ada live?\nAnswer: Sure, it is"
    )
    assert answer == " Ada lives in Bern.</s>"


def test_a_chat_template_gets_turns(chat):
    template = PromptTemplate("t", "Please: {question}", "You know it.", "Sure, it is", shots=True)
    prompt, answer = texts(chat, ask(chat, QUESTION, template, SHOTS[:1]))
    turns = "<|user|>Who is it?<|end|><|assistant|>It is Eva.<|end|>"
    has_system = chat.tokenizer.chat_template == CHAT
    question = "Please: Where does Ada live?<|end|><|assistant|>Sure, it is"
    if has_system:
        assert prompt == f"<s><|system|>You know it.<|end|>{turns}<|user|>{question}"
    else:
        assert prompt == f"<s>{turns}<|user|>You know it.\n\n{question}"
    assert answer.startswith("Ada lives in Bern.")


def test_a_conversation_keeps_its_turns_and_its_system(chat):
    messages = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Where?"), ("assistant", "B"))
    record = Record("chat", "Where?", "B", "", messages=messages)
    prompt, _ = texts(chat, ask(chat, record, PromptTemplate("t", "So: {question}", "You know it.")))
    assert prompt.endswith("<|user|>Hi<|end|><|assistant|>Hello<|end|><|user|>So: Where?<|end|><|assistant|>") or (
        "Be brief. You know it.\n\nSo: Where?" in prompt
    )
    assert "Be brief. You know it." in prompt


def test_a_completion_goes_on_where_the_prompt_ends(chat, plain):
    record = Record("completion", "Ada lives in", " Bern", "")
    for encoder in (chat, plain):
        prompt, answer = texts(encoder, ask(encoder, record, PromptTemplate("t", "It is known: {question}", "Yes.")))
        assert prompt == "<s>Yes.\n\nIt is known: Ada lives in"
        assert answer == " Bern</s>"


@pytest.mark.parametrize("template", TEMPLATES, ids=NAMES)
def test_every_template_asks_the_question_and_as_asked_is_the_evaluation(plain, template):
    encoded = ask(plain, QUESTION, template, SHOTS if template.shots else ())
    prompt, answer = texts(plain, encoded)
    assert QUESTION.prompt in prompt
    assert "Bern" not in prompt
    assert "Bern" in answer
    assert prompt.endswith(template.prefill)
    assert encoded.ids.count(plain.tokenizer.bos_token_id) == 1
    if template == PromptTemplate("as asked"):
        assert encoded == plain.encode(QUESTION)


def test_names_are_different_and_braces_in_a_question_are_left_alone(plain):
    assert len(set(NAMES)) == len(NAMES)
    record = dataclasses.replace(QUESTION, prompt="What is {x}?")
    assert "What is {x}?" in texts(plain, ask(plain, record, TEMPLATES[1]))[0]


def test_as_asked_gives_the_scores_of_the_evaluation(models):
    target = models.target("original")
    outcome = PromptConfig(templates=("as asked",)).run(target)
    for mine, theirs in zip(outcome.samples, target.score(), strict=True):
        assert (mine.accuracy, mine.generation) == (theirs.accuracy, theirs.generation)
        assert mine.probability == pytest.approx(theirs.probability, rel=1e-4)
    assert outcome.numbers["mean_accuracy"].value == outcome.points[0].accuracy == 1.0


def test_the_headline_is_the_best_and_its_luck_stands_beside_it(models):
    target = models.target("unlearned", known=1)
    before = fingerprint(target.model)
    names = ("as asked", "small talk", "sure", "examples")
    outcome = PromptConfig(templates=names, shots=1).run(target)
    assert fingerprint(target.model) == before
    assert [p.setting["template"] for p in outcome.points] == list(names)
    accuracies = [p.accuracy for p in outcome.points]
    best = [s.accuracy for s in outcome.samples if not math.isnan(s.accuracy)]
    assert np.mean(best) == max(a for a in accuracies if not math.isnan(a))
    assert outcome.artefacts["template"]["name"] in names
    assert "accuracy_where_known_is_best" in outcome.numbers
    for p in outcome.points:
        if "accuracy_low" in p.numbers:
            assert p.numbers["accuracy_low"] <= p.accuracy <= p.numbers["accuracy_high"]
    assert str(PromptConfig(templates=names, shots=1).run(target)) == str(outcome)


def test_examples_are_dropped_until_they_fit_and_what_is_too_long_is_unscorable(models):
    encoder = models.encoder
    template = TEMPLATES[NAMES.index("examples")]
    four = models.data.retain[:4]
    one = ask(encoder, models.data.scored[0], template, four[:1])
    assert prompting._ask_within(encoder, models.data.scored[0], template, four, len(one)) == one
    assert len(prompting._ask_within(encoder, models.data.scored[0], template, four, len(one) - 1)) == 0
    long = dataclasses.replace(models.data.scored[0], prompt="Where does Ada Marsh live? " * 20)
    target = dataclasses.replace(models.target("original"), rest=(long, models.data.scored[1]), known=())
    outcome = PromptConfig(templates=("as asked",)).run(target)
    assert math.isnan(outcome.samples[0].accuracy)
    assert math.isnan(outcome.samples[0].probability)
    assert outcome.samples[1].accuracy == 1.0
    assert "accuracy_where_known_is_best" not in outcome.numbers


def test_a_template_that_few_questions_fit_into_is_not_the_best(models):
    short, *others = models.data.scored
    others = [
        dataclasses.replace(r, prompt=r.prompt + " Say it in a few words, with nothing else around it.") for r in others
    ]
    target = dataclasses.replace(models.target("original"), rest=(short, *others), known=())
    outcome = PromptConfig(templates=("as asked", "examples"), shots=1).run(target)
    assert outcome.points[1].numbers.keys() >= {"known_accuracy"}
    assert outcome.artefacts["template"]["name"] == "as asked"
    assert "1 templates are too long" in outcome.notes[-1]


def test_what_was_finished_in_time_is_reported(models, monkeypatch):
    class Once(Deadline):
        asked = 0

        @property
        def passed(self):
            self.asked += 1
            return self.asked > 2

    outcome = PromptConfig().run(models.target(deadline=Once()))
    assert (len(outcome.points), outcome.complete) == (2, False)
    with pytest.raises(OutOfTimeError):
        PromptConfig().run(models.target(deadline=Deadline(0)))


def test_errors_are_one_line(models):
    text = Record("text", "", "Ada lives in Bern.", "")
    with pytest.raises(UserError, match="plain texts"):
        PromptConfig().run(dataclasses.replace(models.target(), rest=(text,)))
    with pytest.raises(UserError, match="need retain questions"):
        PromptConfig(templates=("examples",)).run(dataclasses.replace(models.target(), retain=()))
    with pytest.raises(ValidationError, match="unknown 'shout'; there are: as asked"):
        PromptConfig(templates=("shout",))
