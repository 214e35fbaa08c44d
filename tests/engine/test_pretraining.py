import math

import pytest
import torch

from falcon_unlearn.corpus.batching import Encoded
from falcon_unlearn.engine.pretraining import (
    LlamaShape,
    PretrainingConfig,
    build_llama,
    train_causal_lm,
    train_tokenizer,
)

TEXTS = [f"{name} lives in {town} and keeps a {pet}." for name, town, pet in (
    ("Ada", "Cork", "newt"), ("Bo", "Delft", "owl"), ("Cleo", "Essen", "crab"), ("Dan", "Faro", "goat"),
    ("Eva", "Ghent", "swan"), ("Finn", "Hull", "mole"),
)]  # fmt: skip
SHAPE = LlamaShape(layers=2, hidden=32, heads=2, mlp=48, context=48)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300, SHAPE.context)


@pytest.fixture(scope="module")
def encoded(tokenizer):
    return [Encoded(tuple(tokenizer(text)["input_ids"]), 1) for text in TEXTS]


def trained(tokenizer, encoded, *, model_seed=0, **settings):
    model, losses = build_llama(SHAPE, tokenizer, model_seed), []
    config = PretrainingConfig(**{"epochs": 12, "batch_size": 4, "lr": 1e-2, **settings})
    train_causal_lm(model, encoded, tokenizer.pad_token_id, config, lambda epoch, loss: losses.append((epoch, loss)))
    return model, losses


def test_loss_falls_from_chance(tokenizer, encoded):
    model, losses = trained(tokenizer, encoded)
    assert [epoch for epoch, _ in losses] == list(range(12))
    assert losses[0][1] == pytest.approx(math.log(len(tokenizer)), rel=0.2)
    assert losses[-1][1] < 0.5 * losses[0][1]
    assert not model.training


def test_is_deterministic(tokenizer, encoded):
    first, losses = trained(tokenizer, encoded, epochs=3)
    torch.manual_seed(99)
    second, again = trained(tokenizer, encoded, epochs=3)
    assert losses == again
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    _, other_order = trained(tokenizer, encoded, epochs=3, seed=1)
    assert losses != other_order
    other = build_llama(SHAPE, tokenizer, 1)
    assert not torch.equal(other.lm_head.weight, build_llama(SHAPE, tokenizer, 0).lm_head.weight)


def test_padding_is_in_no_loss(tokenizer, encoded):
    """A pad id that is a real token of the text would show if it were trained on."""
    one = encoded[:1]
    padded = [one[0], Encoded(one[0].ids[:2], 1)]
    losses = []
    for pad_id in (tokenizer.pad_token_id, one[0].ids[3]):
        model = build_llama(SHAPE, tokenizer, 0)
        config = PretrainingConfig(epochs=3, batch_size=2, lr=1e-2)
        train_causal_lm(model, padded, pad_id, config, lambda epoch, loss: losses.append(loss))
    assert losses[:3] == losses[3:]


def test_the_callback_can_stop_it(tokenizer, encoded):
    model, seen = build_llama(SHAPE, tokenizer, 0), []

    def stop(epoch, loss):
        seen.append(epoch)
        return epoch == 1

    train_causal_lm(model, encoded, 0, PretrainingConfig(epochs=9, batch_size=4), stop)
    assert seen == [0, 1]
    assert not model.training


def test_a_single_step_is_enough_to_run(tokenizer, encoded):
    model = build_llama(SHAPE, tokenizer, 0)
    before = model.lm_head.weight.detach().clone()
    train_causal_lm(model, encoded, 0, PretrainingConfig(epochs=1, batch_size=99))
    assert not torch.equal(model.lm_head.weight, before)


def test_model_has_the_shape_asked_for(tokenizer):
    config = build_llama(SHAPE, tokenizer, 0).config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (2, 32, 48)
    assert (config.vocab_size, config.max_position_embeddings) == (len(tokenizer), 48)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    model = build_llama(SHAPE, tokenizer, 0)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_tokenizer_is_lossless_and_begins_once(tokenizer):
    for text in (*TEXTS, "not in the corpus: Zürich 北京 \n\t 🙂"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) <= 300
    assert train_tokenizer(TEXTS, 300, 48).get_vocab() == tokenizer.get_vocab()
