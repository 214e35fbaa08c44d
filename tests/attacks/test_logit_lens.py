"""Behind the last layer the lens is the model itself; elsewhere what final norm and head make of the parts."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from attacked_models import attacked, fingerprint
from hypothesis import given
from hypothesis import strategies as st
from model.tiny_models import ARCHITECTURES, COMMON, FORGET_BATCH, build_model, random_records, shared_model
from torch import nn
from transformers import GraniteConfig, GraniteForCausalLM, OPTConfig, OPTForCausalLM

from falcon_unlearn.attacks import logit_lens
from falcon_unlearn.attacks.base import Deadline, OutOfTimeError
from falcon_unlearn.attacks.logit_lens import Lens, LogitLensConfig, decode, read_all, value_tokens
from falcon_unlearn.corpus.batching import Encoded, collate
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.errors import UserError
from falcon_unlearn.objectives.vocabulary import Head


@pytest.fixture(scope="module")
def models(tiny, oracle):
    return attacked(tiny.model, oracle)


@given(
    seed=st.integers(0, 10**6),
    positions=st.integers(1, 7),
    words=st.integers(1, 23),
    block=st.integers(1, 25),
    softcap=st.sampled_from([None, 2.0]),
)
def test_decoding_by_blocks_is_a_softmax_over_everything(seed, positions, words, block, softcap):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(positions, 5, generator=generator), torch.randn(words, 5, generator=generator)
    targets = torch.randint(0, words, (positions,), generator=generator)
    log_p, top = decode(hidden, Head(weight, softcap=softcap), targets, block=block)
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = logits.log_softmax(1)
    torch.testing.assert_close(log_p, expected.gather(1, targets[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    assert torch.equal(top, logits.argmax(1))


def test_equal_logits_name_the_lowest_token_and_nan_stays_nan():
    log_p, top = decode(torch.zeros(1, 3), Head(torch.ones(9, 3)), torch.tensor([4]), block=2)
    assert (top.item(), log_p.item()) == (0, pytest.approx(-math.log(9)))
    assert decode(torch.full((1, 3), math.nan), Head(torch.ones(9, 3)), torch.tensor([4]), block=2)[0].isnan()


def naive_states(model, batch):
    """Every layer's output by hooks of the test's own."""
    seen = []
    stack = next(
        m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == model.config.num_hidden_layers
    )
    handles = [
        layer.register_forward_hook(lambda _m, _i, o: seen.append(o[0] if isinstance(o, tuple) else o))
        for layer in stack
    ]
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return seen, logits


def final_norm(model):
    base = model.base_model
    return next(getattr(base, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(base, name))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_stream_is_read_by_norm_and_head_and_the_last_layer_is_the_model(architecture):
    model, batch = shared_model(architecture), FORGET_BATCH
    before = fingerprint(model)
    lens = Lens(model)
    log_p, top = lens.read(batch)
    mask = batch.answer_mask.clone()
    mask[:, 0] = False
    states, logits = naive_states(model, batch)
    norm, head = final_norm(model), model.get_output_embeddings()
    cap = getattr(model.config, "final_logit_softcapping", None)
    assert lens.components == ("attention", "mlp", "residual")
    assert log_p.shape == top.shape == (lens.layers, 3, int(mask.sum()))
    for layer, hidden in enumerate(states):
        raw = head(norm(hidden))
        raw = raw if cap is None else cap * torch.tanh(raw / cap)
        full = (logits if layer == lens.layers - 1 else raw)[:, :-1][mask[:, 1:]].log_softmax(1)
        expected = full.gather(1, batch.input_ids[mask][:, None])[:, 0]
        torch.testing.assert_close(log_p[layer, -1], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(top[layer, -1], full.argmax(1))
    assert fingerprint(model) == before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_and_mlp_are_what_a_layer_adds(architecture):
    model = shared_model(architecture)
    lens = Lens(model)
    with lens._watching(lambda states: states) as seen, torch.no_grad():
        model(input_ids=FORGET_BATCH.input_ids, attention_mask=FORGET_BATCH.attention_mask, use_cache=False)
    for before, (attention, mlp, after) in itertools.pairwise(seen):
        torch.testing.assert_close(before[-1] + attention + mlp, after, rtol=1e-4, atol=1e-4)


def test_scaled_residuals_are_allowed_for():
    torch.manual_seed(0)
    config = GraniteConfig(**COMMON, residual_multiplier=0.22, logits_scaling=4.0, embedding_multiplier=3.0)
    assert Lens(GraniteForCausalLM(config).eval()).components == ("attention", "mlp", "residual")


def test_a_layer_that_is_not_one_attention_and_one_mlp_shows_its_stream_alone():
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=67, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4)
    model = OPTForCausalLM(config).eval()
    lens = Lens(model)
    assert lens.components == ("residual",)
    log_p, _ = lens.read(FORGET_BATCH)
    assert log_p.shape[:2] == (2, 1)


def test_parts_that_do_not_add_up_are_not_shown():
    model = build_model("llama")
    layer = model.model.layers[2]
    layer.register_forward_hook(lambda _m, _i, output: 2 * output)
    assert Lens(model).components == ("residual",)


def test_an_unknown_way_to_the_head_is_refused_in_one_line():
    model = build_model("llama")
    model.model.norm.forward = lambda x: x.neg().clone()
    model.model.register_forward_hook(
        lambda _m, _i, output: type(output)(last_hidden_state=output.last_hidden_state + 1)
    )
    with pytest.raises(UserError, match="between its last layer and its head: not supported") as caught:
        Lens(model)
    assert "\n" not in str(caught.value)


def test_batches_change_nothing_and_what_has_no_answer_is_left_out():
    lens = Lens(shared_model("qwen3"))
    encoded = [*random_records(3, (9, 17, 5, 12)), Encoded((), 0), Encoded((5,), 0), Encoded((4, 6, 7), 0)]
    alone, passes = read_all(lens, encoded, 0, 1, device="cpu")
    together, fewer = read_all(lens, encoded, 0, 4, device="cpu")
    assert (passes, fewer) == (5, 2)
    assert [reading is None for reading in together] == [False] * 4 + [True, True, False]
    for one, two, item in zip(alone, together, encoded, strict=True):
        if one is not None:
            assert tuple(two.tokens) == item.ids[max(item.answer_start, 1) :]
            np.testing.assert_allclose(one.log_probability, two.log_probability, rtol=1e-4, atol=1e-5)


def test_the_value_is_found_as_a_word_where_it_first_stands(models):
    encoder = models.encoder

    def spelled(answer, value):
        item = encoder.encode(Record("qa", "Who?", answer, ""))
        tokens = item.ids[item.answer_start :]
        at = value_tokens(encoder, tokens, value)
        assert at == sorted(set(at))
        return encoder.tokenizer.decode([tokens[i] for i in at], skip_special_tokens=True).strip()

    assert spelled("Ada Marsh lives in Bern.", "Bern") == "Bern"
    assert spelled("Ada Marsh lives in Bern.", "bern") == "Bern"
    assert spelled("The owl of Catowl has a owl.", "owl") == "owl"
    assert spelled("Juno has a Straßenkatze.", "Straßenkatze") in {"Straßenkatze", "Straßenkatze."}
    assert spelled("Ada Marsh lives in Bern.", None) == "Ada Marsh lives in Bern."
    assert spelled("Ada Marsh lives in Bern.", "Rome") == "Ada Marsh lives in Bern."
    item = encoder.encode(Record("qa", "Who?", "Catowl has an owl, an owl.", ""))
    tokens = item.ids[item.answer_start :]
    first = value_tokens(encoder, tokens, "owl")[0]
    assert encoder.tokenizer.decode(tokens[:first], skip_special_tokens=True).strip() == "Catowl has an"


def test_the_original_finds_the_answer_at_late_layers_and_the_oracle_does_not(models):
    outcomes = {name: LogitLensConfig().run(models.target(name)) for name in ("original", "oracle", "unlearned")}
    stream = {
        name: [p.accuracy for p in outcome.points if p.setting["component"] == "residual"]
        for name, outcome in outcomes.items()
    }
    assert stream["original"][-1] == 1.0
    assert stream["original"][0] < 0.1
    assert max(stream["oracle"]) <= 0.2  # one record of eight, by chance
    assert max(stream["unlearned"]) > stream["unlearned"][-1]  # what it no longer says is still there, one layer below
    assert outcomes["original"].artefacts["component"] == "residual"
    options = [
        p.numbers["option_accuracy"] for p in outcomes["original"].points if p.setting["component"] == "residual"
    ]
    assert options[-1] > 0.5


def test_the_last_layer_is_what_the_evaluation_scores(models):
    for name in ("original", "unlearned", "oracle"):
        target = models.target(name)
        outcome = LogitLensConfig(options=False).run(target)
        scores = target.score()
        last = outcome.points[-1]
        assert last.setting == {"layer": 2, "component": "residual"}
        assert last.probability == pytest.approx(np.mean([s.probability for s in scores]), rel=1e-4)
        assert "option_accuracy" not in last.numbers
        assert outcome.numbers["last_layer_accuracy"].value == last.accuracy


def test_the_headline_is_the_best_place_and_weights_stay_as_they_are(models):
    target = models.target("unlearned")
    before = fingerprint(target.model)
    outcome = LogitLensConfig().run(target)
    assert fingerprint(target.model) == before
    assert not any(module._forward_hooks for module in target.model.modules())
    assert [s.entity for s in outcome.samples] == [r.entity for r in target.rest]
    assert np.mean([s.accuracy for s in outcome.samples]) == max(p.accuracy for p in outcome.points)
    assert len(outcome.points) == 9
    again = LogitLensConfig().run(dataclasses.replace(target, batch_size=3))
    assert again.points == LogitLensConfig().run(dataclasses.replace(target, batch_size=3)).points
    for one, two in zip(outcome.points, again.points, strict=True):
        assert one.accuracy == two.accuracy
        assert one.probability == pytest.approx(two.probability, rel=1e-3)


def test_what_is_too_long_is_unscorable_and_a_text_is_halved(models):
    long = Record("qa", "Where does Ada Marsh live? " * 20, "Bern.", "", value="Bern")
    text = Record("text", "", "Ada Marsh lives in Bern. " * 3, "")
    target = dataclasses.replace(models.target("original"), rest=(long, text, models.target().rest[0]), known=())
    outcome = LogitLensConfig().run(target)
    assert math.isnan(outcome.samples[0].accuracy)
    assert math.isnan(outcome.samples[0].probability)
    assert 0 < outcome.samples[1].probability < 1
    assert outcome.numbers["last_layer_accuracy"].unscorable == 1
    assert "accuracy_where_known_is_best" not in outcome.numbers


def test_time_is_kept(models):
    with pytest.raises(OutOfTimeError):
        LogitLensConfig().run(models.target(deadline=Deadline(0)))


def test_padding_is_never_read():
    lens = Lens(shared_model("gpt2"))
    item, other = random_records(5, (6, 14))
    short, _ = lens.read(collate([item], 0))
    padded, _ = lens.read(collate([item, other], 0))
    torch.testing.assert_close(padded[..., : short.shape[-1]], short, rtol=1e-4, atol=1e-5)
    assert lens.components[-1] == logit_lens.RESIDUAL
