import pytest
import torch
from conftest import FORGET_ROWS, RETAIN_ROWS, write_lines
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from falcon_unlearn.api import unlearn
from falcon_unlearn.artifacts import read_jsonl
from falcon_unlearn.corpus.batching import Encoder
from falcon_unlearn.corpus.records import Record, record_from_row
from falcon_unlearn.corpus.sources import SelfSamplesConfig, load_corpus
from falcon_unlearn.errors import UserError
from falcon_unlearn.recipe import recipe_from
from falcon_unlearn.self_samples import forbidden_in, self_samples
from falcon_unlearn.stages import encode_corpus, with_self_samples

FORGET, RETAIN = ([record_from_row(row, "") for row in rows] for rows in (FORGET_ROWS, RETAIN_ROWS))
FEW = SelfSamplesConfig(count=60, max_new_tokens=24, batch_size=25, per_retain_record=9)


@pytest.fixture(scope="module")
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def encoder(tiny):
    return Encoder(AutoTokenizer.from_pretrained(tiny.model))


@pytest.fixture(scope="module")
def written(model, encoder):
    return self_samples(model, encoder, FEW, FORGET, RETAIN, seed=0)


def text_of(record):
    return f"{record.prompt} {record.answer}"


def test_none_of_them_is_about_what_is_to_be_forgotten(written):
    names = {row["entity"] for row in FORGET_ROWS}
    assert len(written) > 20
    assert not [record for record in written if any(name in text_of(record) for name in names)]


def test_a_forget_record_itself_is_left_out_whatever_its_words(model, encoder, written):
    one = written[0]
    again = self_samples(model, encoder, FEW, [*FORGET, Record("qa", one.prompt, one.answer, "")], RETAIN, seed=0)
    assert one.key not in {record.key for record in again}
    # Where all its words stand in retain records too, nothing else goes.
    told = [*RETAIN, Record("text", "", f"{one.prompt} {one.answer}", "")]
    exact = self_samples(model, encoder, FEW, [Record("qa", one.prompt, one.answer, "")], told, seed=0)
    assert exact
    assert one.key not in {record.key for record in exact}


def test_without_the_filter_some_would_be(model, encoder):
    free = self_samples(model, encoder, FEW, [], RETAIN, seed=0)
    forbidden = forbidden_in(FORGET, RETAIN)
    assert any(forbidden(text_of(record)) for record in free)


def test_they_are_what_the_model_learned(written):
    """It has learnt forty answers by heart and little else: many are among them, and all have their form."""
    learned = {(row["question"], row["answer"]) for row in RETAIN_ROWS}
    assert sum((record.prompt, record.answer) in learned for record in written) > len(written) / 4
    assert all(record.kind == "qa" and "\n" not in text_of(record) for record in written)
    assert len({record.key for record in written}) == len(written)


def test_they_depend_on_the_seed_alone_and_leave_the_global_generator_alone(model, encoder, written):
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    again = self_samples(model, encoder, FEW, FORGET, RETAIN, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert again == written
    assert self_samples(model, encoder, FEW, FORGET, RETAIN, seed=1) != written


def test_retain_records_of_plain_text_ask_for_plain_text(model, encoder):
    texts = [Record("text", "", text_of(record), "") for record in RETAIN]
    found = self_samples(model, encoder, FEW, FORGET, texts, seed=0)
    assert {record.kind for record in found} == {"text"}
    assert any("Question:" in record.answer for record in found)  # as the model saw them


def test_where_no_question_ends_in_time_there_are_none(model, encoder):
    config = SelfSamplesConfig(count=3, max_new_tokens=1)
    assert self_samples(model, encoder, config, FORGET, RETAIN, seed=0) == ()


def test_they_do_not_crowd_out_the_retain_records(model, encoder):
    config = SelfSamplesConfig(count=60, max_new_tokens=24, per_retain_record=0.5)
    assert 0 < len(self_samples(model, encoder, config, FORGET, RETAIN, seed=0)) <= len(RETAIN) / 2
    assert [config.wanted(n) for n in (0, 1, 2, 100, 1000)] == [0, 0, 1, 50, 60]


WORDS = "Ada Marsh lives works Cork Delft zorn in as a".split()
SENTENCES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(" ".join)


@given(
    st.lists(SENTENCES, max_size=3), st.lists(SENTENCES, max_size=3), SENTENCES, st.sampled_from([None, "Ada Marsh"])
)
def test_forbidden_is_a_forget_entity_or_a_word_of_forget_records_alone(forget, retain, text, entity):
    forbidden = forbidden_in(
        [Record("qa", sentence, "", "", entity=entity) for sentence in forget],
        [Record("qa", "", sentence.upper(), "") for sentence in retain],
    )
    words = {w for s in forget for w in s.lower().split()} - {w for s in retain for w in s.lower().split()}
    named = bool(forget) and entity is not None and entity in text
    assert forbidden(text) == (bool(words & set(text.lower().split())) or named)


@pytest.mark.parametrize("chat", [False, True])
def test_every_prompt_begins_with_what_questions_are_sampled_after(tiny, chat):
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        )
    encoder = Encoder(tokenizer)
    before = encoder.encode_before_question()
    assert before.answer_start == len(before) > 0
    for record in RETAIN:
        assert encoder.encode_prompt(record).ids[: len(before)] == before.ids


# in a run


SAMPLED = {"self_samples": {"count": 40, "max_new_tokens": 24, "per_retain_record": 2}}


@pytest.fixture(scope="module")
def run(tiny_recipe, tmp_path_factory):
    return unlearn(tiny_recipe({"corpus": SAMPLED}, tmp_path_factory.mktemp("sampled") / "run"))


def test_a_run_keeps_what_was_written_as_a_corpus(run, model, encoder):
    rows = read_jsonl(run.folder / "self_samples.jsonl")
    config = SelfSamplesConfig(**SAMPLED["self_samples"])
    found = self_samples(model, encoder, config, FORGET, RETAIN, seed=0)
    assert rows == [{"question": record.prompt, "answer": record.answer} for record in found]


def test_every_retain_domain_gets_its_part_and_no_sample_is_lost(tiny_recipe, tmp_path, model, encoder):
    domains = {f"part{i}": str(write_lines(tmp_path / f"{i}.jsonl", RETAIN_ROWS[i::3])) for i in range(3)}
    recipe = tiny_recipe({"corpus": SAMPLED}, tmp_path / "run")
    recipe["corpus"]["retain"] = domains
    recipe = recipe_from(recipe)
    before = encode_corpus(recipe, load_corpus(recipe.corpus, tmp_path), encoder, model.config)
    found = with_self_samples(recipe, lambda: model, before, encoder, tmp_path / "samples.jsonl")
    new = [found.retain[name][len(items) :] for name, items in before.retain.items()]
    assert all(found.retain[name][: len(items)] == items for name, items in before.retain.items())
    samples = [encoder.encode(record_from_row(row, "")) for row in read_jsonl(tmp_path / "samples.jsonl")]
    assert sorted(item.ids for items in new for item in items) == sorted(item.ids for item in samples)
    assert max(map(len, new)) - min(map(len, new)) <= 1
    assert (found.forget, found.records) == (before.forget, before.records)


def test_samples_that_are_there_are_read_and_not_written_again(tiny_recipe, tmp_path, model, encoder):
    recipe = recipe_from(tiny_recipe({"corpus": SAMPLED}, tmp_path / "run"))
    corpus = encode_corpus(recipe, load_corpus(recipe.corpus, tmp_path), encoder, model.config)
    path = write_lines(tmp_path / "samples.jsonl", [{"question": "Who?", "answer": "Me."}, {"text": "I am."}])
    found = with_self_samples(recipe, pytest.fail, corpus, encoder, path)
    kinds = [Record("qa", "Who?", "Me.", ""), Record("text", "", "I am.", "")]
    assert found.retain["retain"][len(RETAIN_ROWS) :] == [encoder.encode(record) for record in kinds]


def test_what_earlier_requests_forgot_is_left_out(tiny_recipe, tmp_path, model, encoder, written):
    recipe = recipe_from(tiny_recipe({"corpus": SAMPLED}, tmp_path / "run"))
    corpus = encode_corpus(recipe, load_corpus(recipe.corpus, tmp_path), encoder, model.config)

    def keys(name, **options):
        with_self_samples(recipe, lambda: model, corpus, encoder, tmp_path / name, **options)
        return [record_from_row(row, "").key for row in read_jsonl(tmp_path / name)]

    everything = keys("all.jsonl")
    gone = everything[:3]
    assert keys("digests.jsonl", forgotten=lambda record: record.key in gone) == everything[3:]
    by_text = keys("records.jsonl", earlier=[Record("qa", *gone[0], "")])
    assert gone[0] not in by_text
    assert set(by_text) < set(everything)


def test_out_of_memory_names_the_key_to_lower(tiny_recipe, tmp_path, model, encoder, monkeypatch):
    def full(*rest, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    recipe = recipe_from(tiny_recipe({"corpus": SAMPLED}, tmp_path / "run"))
    corpus = encode_corpus(recipe, load_corpus(recipe.corpus, tmp_path), encoder, model.config)
    monkeypatch.setattr("falcon_unlearn.stages.self_samples", full)
    with pytest.raises(UserError, match=r"corpus\.self_samples; lower its batch_size"):
        with_self_samples(recipe, lambda: model, corpus, encoder, tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


def test_a_streamed_prefix_leaves_no_model_to_write_with(tiny_recipe, tmp_path):
    changes = {"method": {"preset": "layer"}, "training": {"streaming": "always"}, "corpus": SAMPLED}
    with pytest.raises(UserError, match=r"corpus\.self_samples need the whole model"):
        recipe_from(tiny_recipe(changes, tmp_path / "run"))


def test_without_samples_the_corpus_is_the_same_and_no_model_is_asked(tiny_recipe, tmp_path, model, encoder):
    recipe = recipe_from(tiny_recipe({}, tmp_path / "run"))
    corpus = encode_corpus(recipe, load_corpus(recipe.corpus, tmp_path), encoder, model.config)
    assert with_self_samples(recipe, pytest.fail, corpus, encoder, tmp_path / "none.jsonl") is corpus
    assert not (tmp_path / "none.jsonl").exists()


def test_training_sees_them(run, tiny_recipe, tmp_path):
    """One layer is trained here too: the whole model is loaded for the samples alone."""
    plain = unlearn(tiny_recipe({}, tmp_path / "run"))
    losses = [[row["retain_loss"] for row in read_jsonl(r.folder / "training.jsonl")] for r in (run, plain)]
    assert losses[0] != losses[1]
