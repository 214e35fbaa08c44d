import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[1] / "model"))
from tiny_models import ARCHITECTURES, VOCABULARY, random_records, shared_model
from transformers import LlamaConfig, LlamaForCausalLM

from falcon_unlearn.corpus.batching import Encoded
from falcon_unlearn.evaluation.token_scores import TokenScores, _numbers, token_scores

LENGTHS = (9, 2, 17, 1, 13, 30, 3)


def naive(model, item, *, answer_only):
    """Token by token, each from a forward pass over its prefix, in fp64 behind the model."""
    log_probability, mean, std, correct = [], [], [], []
    for t in range(max(item.answer_start, 1) if answer_only else 1, len(item)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([item.ids[:t]]), use_cache=False).logits[0, -1].double()
        p = [math.exp(z) for z in (logits - logits.max()).tolist()]
        p = [weight / sum(p) for weight in p]
        mu = sum(x * math.log(x) for x in p)
        log_probability.append(math.log(p[item.ids[t]]))
        mean.append(mu)
        std.append(math.sqrt(sum(x * (math.log(x) - mu) ** 2 for x in p)))
        correct.append(max(range(len(p)), key=p.__getitem__) == item.ids[t])
    return TokenScores(tuple(log_probability), tuple(mean), tuple(std), tuple(correct))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name in ("log_probability", "mean", "std"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=2e-5)
        assert one.correct == other.correct


@pytest.mark.parametrize("answer_only", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "mixtral"])
def test_equals_a_plain_loop_whatever_the_batch(architecture, answer_only):
    model = shared_model(architecture)
    items = random_records(3, LENGTHS)
    expected = [naive(model, item, answer_only=answer_only) for item in items]
    assert any(any(scores.correct) for scores in expected)
    for batch_size in (1, 3, 32):
        assert_same(token_scores(model, items, 0, batch_size, "cpu", answer_only=answer_only), expected)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_sums_to_the_models_own_loss(architecture):
    model = shared_model(architecture)
    items = random_records(4, LENGTHS)
    for item, scores in zip(items, token_scores(model, items, 0, 4, "cpu", answer_only=False), strict=True):
        assert len(scores.log_probability) == len(item) - 1
        if len(item) > 1:
            ids = torch.tensor([item.ids])
            loss = float(model(input_ids=ids, labels=ids).loss)
            assert -sum(scores.log_probability) / (len(item) - 1) == pytest.approx(loss, abs=2e-5)


def test_blocks_change_nothing(monkeypatch):
    model = shared_model("llama")
    items = random_records(5, LENGTHS)
    whole = token_scores(model, items, 0, 4, "cpu", answer_only=False)
    monkeypatch.setattr("falcon_unlearn.evaluation.token_scores._BLOCK_ELEMENTS", 5 * VOCABULARY)
    assert_same(token_scores(model, items, 0, 4, "cpu", answer_only=False), whole)


def test_nothing_to_score_disturbs_nobody():
    model = shared_model("llama")
    fine = random_records(6, (9,))[0]
    items = [Encoded((), 0), fine, Encoded((5,), 0), Encoded((5, 6), 2)]
    nothing = TokenScores((), (), (), ())
    found = token_scores(model, items, 0, 8, "cpu", answer_only=True)
    assert [scores == nothing for scores in found] == [True, False, True, True]
    assert_same([found[1]], token_scores(model, [fine], 0, 1, "cpu", answer_only=True))
    assert token_scores(model, [], 0, 8, "cpu", answer_only=True) == []


@given(
    st.lists(
        st.lists(st.floats(-40, 40) | st.just(-math.inf), min_size=4, max_size=4).filter(lambda r: r[0] > -math.inf),
        min_size=1,
        max_size=5,
    )
)
def test_moments_of_any_distribution(rows):
    logits = torch.tensor(rows, dtype=torch.float32)
    own, mean, std, correct = _numbers(logits, torch.zeros(len(rows), dtype=torch.long))
    for i, row in enumerate(logits.double().tolist()):
        top = max(row)
        weights = [math.exp(z - top) for z in row]
        p = [w / sum(weights) for w in weights]
        mu = sum(x * math.log(x) for x in p if x > 0)
        sigma = math.sqrt(sum(x * (math.log(x) - mu) ** 2 for x in p if x > 0))
        assert own[i] == pytest.approx(row[0] - top - math.log(sum(weights)), abs=1e-4)
        assert mean[i] == pytest.approx(mu, abs=1e-4)
        assert std[i] == pytest.approx(sigma, abs=1e-3)
        if row.count(top) == 1:
            assert correct[i] == (row[0] == top)


def test_a_half_precision_model_is_scored_in_fp32():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    item = random_records(7, (20,))[0]
    (found,) = token_scores(model, [item], 0, 1, "cpu", answer_only=False)
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([item.ids])).logits[0, :-1].float().log_softmax(-1)
    expected = log_p.gather(1, torch.tensor(item.ids[1:])[:, None])[:, 0].tolist()
    assert list(found.log_probability) == pytest.approx(expected, abs=1e-6)
