import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_causal import CONTEXT, PAD, VOCABULARY, gpt2, llama, random_items
from transformers import GPT2Config, GPT2LMHeadModel

from falcon_unlearn.corpus.batching import Encoded
from falcon_unlearn.evaluation.log_probabilities import (
    answer_log_probabilities,
    grouped_log_probabilities,
    length_sorted_trees,
    prefix_tree,
    shares_prefixes,
)

sys.path.append(str(Path(__file__).parents[1] / "model"))
from tiny_models import ARCHITECTURES, build_model


@pytest.fixture(scope="module", params=[llama, gpt2])
def model(request):
    torch.manual_seed(0)
    return request.param().eval()


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


def test_a_model_without_a_head_to_reach_into_scores_the_same(model, monkeypatch):
    items = random_items(6, 30)
    expected = answer_log_probabilities(model, items, PAD, 4, "cpu")
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    assert answer_log_probabilities(model, items, PAD, 4, "cpu") == pytest.approx(expected, abs=1e-6)


def test_logits_are_made_where_an_answer_token_is_predicted_only(model):
    kept = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _head, _args, out: kept.append(out.shape[:-1]))
    answer_log_probabilities(model, [Encoded((5,) * 30, 25), Encoded((6,) * 30, 28)], PAD, 2, "cpu")
    hook.remove()
    assert kept == [(1, 7)]


def test_no_answer_token_scores_nan_and_disturbs_nobody(model):
    item = Encoded((5, 6, 7), 1)
    empties = [Encoded((), 0), Encoded((5,), 0), Encoded((5, 6), 2)]
    for batch_size in (1, 8):
        found = answer_log_probabilities(model, [empties[0], item, *empties[1:]], PAD, batch_size, "cpu")
        assert [math.isnan(value) for value in found] == [True, False, True, True]
        assert found[1] == pytest.approx(naive_log_probability(model, item), abs=1e-5)


def test_scoring_leaves_the_mode_alone_and_runs_without_dropout():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=CONTEXT))
    items = random_items(4, 20)
    expected = answer_log_probabilities(model.eval(), items, PAD, 2, "cpu")
    model.train()
    model.transformer.wte.eval()
    assert answer_log_probabilities(model, items, PAD, 2, "cpu") == expected
    assert [name for name, module in model.named_modules() if not module.training] == ["transformer.wte"]


# ---- all answers of a question in one pass ----------------------------------------------------------------------


def question(seed, prompt, answers):
    """Answers of random lengths that share the prompt, some of them their first words too."""
    generator = torch.Generator().manual_seed(seed)

    def some(count):
        return tuple(torch.randint(3, VOCABULARY, (count,), generator=generator).tolist())

    shared, opening = some(prompt), some(3)
    lengths = torch.randint(1, 9, (answers,), generator=generator).tolist()
    return [Encoded(shared + opening * (i % 2) + some(n), prompt) for i, n in enumerate(lengths)]


QUESTIONS = [question(0, 5, 7), question(1, 9, 3), question(2, 4, 1), [], question(3, 7, 14)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_answers_that_share_a_pass_score_as_alone(architecture, attention):
    wide = {"sliding_window": 40} if "sliding_window" in ARCHITECTURES[architecture] else {}
    try:
        model = build_model(architecture, **wide, attn_implementation=attention)
    except ValueError:
        pytest.skip(f"{architecture} has no {attention} attention in this version")
    assert shares_prefixes(model, QUESTIONS[0], PAD, "cpu")
    expected = [[naive_log_probability(model, item) for item in group] for group in QUESTIONS]
    for batch_size in (1, 4, 12, 64):
        found = grouped_log_probabilities(model, QUESTIONS, PAD, batch_size, "cpu")
        assert list(map(len, found)) == list(map(len, expected))
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, abs=1e-5)


def test_what_exceeds_a_sliding_window_is_scored_apart():
    model = build_model("mistral", sliding_window=12)
    assert not shares_prefixes(model, QUESTIONS[0], PAD, "cpu")
    assert any(len(item) > 12 for group in QUESTIONS for item in group)
    assert sum(len(item) <= 12 for item in QUESTIONS[0]) > 1
    found = grouped_log_probabilities(model, QUESTIONS, PAD, 8, "cpu")
    for one, group in zip(found, QUESTIONS, strict=True):
        assert one == pytest.approx([naive_log_probability(model, item) for item in group], abs=1e-5)


@pytest.mark.parametrize("fault", ["mask ignored", "mask refused"])
def test_a_model_that_does_not_allow_it_gets_plain_batches(model, monkeypatch, fault):
    forward = type(model).forward

    def spoiled(self, input_ids, attention_mask, **options):
        if attention_mask.ndim == 4:
            if fault == "mask refused":
                raise ValueError("wrong shape")
            attention_mask = None
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **options)

    expected = grouped_log_probabilities(model, QUESTIONS, PAD, 8, "cpu")
    monkeypatch.setattr(type(model), "forward", spoiled)
    assert not shares_prefixes(model, QUESTIONS[0], PAD, "cpu")
    found = grouped_log_probabilities(model, QUESTIONS, PAD, 8, "cpu")
    assert [v for one in found for v in one] == pytest.approx([v for one in expected for v in one], abs=1e-5)


def test_a_model_with_memory_beside_attention_gets_plain_batches():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2, initializer_range=0.5)
    ).eval()
    assert not shares_prefixes(model, QUESTIONS[0], PAD, "cpu")
    found = grouped_log_probabilities(model, QUESTIONS, PAD, 8, "cpu")
    for one, group in zip(found, QUESTIONS, strict=True):
        assert one == pytest.approx([naive_log_probability(model, item) for item in group], abs=1e-5)


def test_every_beginning_runs_once(model):
    positions = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _m, args, _out: positions.append(args[0].numel()))
    grouped_log_probabilities(model, [QUESTIONS[0]], PAD, 64, "cpu")
    hook.remove()
    beginnings = {item.ids[:n] for item in QUESTIONS[0] for n in range(1, len(item) + 1)}
    assert positions[-1] == len(beginnings)
    assert len(beginnings) < sum(map(len, QUESTIONS[0]))


tokens = st.lists(st.integers(0, 2), min_size=2, max_size=7).map(tuple)
small_groups = st.lists(st.lists(tokens, min_size=1, max_size=5), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None)
@given(small_groups, st.integers(0, 3), st.integers(1, 9))
def test_any_group_of_sequences(groups, start, batch_size):
    # Module-level fixtures and hypothesis do not mix; building this one takes milliseconds.
    torch.manual_seed(0)
    model = llama().eval()
    encoded = [[Encoded(ids, min(start, len(ids) - 1)) for ids in group] for group in groups]
    found = grouped_log_probabilities(model, encoded, PAD, batch_size, "cpu")
    for one, group in zip(found, encoded, strict=True):
        assert one == pytest.approx([naive_log_probability(model, item) for item in group], abs=1e-5)


@given(st.lists(st.lists(tokens, min_size=1, max_size=5), max_size=8), st.integers(1, 9))
def test_batches_of_trees_hold_all_once_and_no_more_sequences_than_asked(groups, batch_size):
    trees = [prefix_tree([Encoded(ids, 1) for ids in group]) for group in groups]
    batches = length_sorted_trees(trees, batch_size)
    assert sorted(i for batch in batches for i in batch) == list(range(len(trees)))
    for batch in batches:
        assert sum(len(trees[i].paths) for i in batch) <= batch_size or len(batch) == 1
