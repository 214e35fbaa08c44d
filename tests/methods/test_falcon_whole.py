import dataclasses
import json
import math
import random

import pytest
import torch
from conftest import FORGET_ROWS, RETAIN_ROWS, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file
from tiny_whole import (
    FORGET_BATCH,
    RETAIN,
    RETAIN_BATCH,
    Plain,
    assert_same,
    build_llama,
    build_model,
    encoded,
    gradients,
    moved,
    wider,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from falcon_unlearn.api import apply_patch, unlearn
from falcon_unlearn.artifacts import read_jsonl
from falcon_unlearn.corpus.batching import Encoded, Encoder, collate
from falcon_unlearn.corpus.records import record_from_row
from falcon_unlearn.corpus.sources import load_corpus
from falcon_unlearn.corpus.stand_ins import stand_ins
from falcon_unlearn.errors import UserError
from falcon_unlearn.methods import METHODS, FalconConfig, WholeFalcon, WholeModel, WholeSetup, entry_of
from falcon_unlearn.methods.falcon_whole import aligned
from falcon_unlearn.model.activation_cache import record_key
from falcon_unlearn.model.lora import ADAPTER_TENSORS, LoraConfig, add_adapters
from falcon_unlearn.recipe import recipe_from
from falcon_unlearn.stages import alternatives_of, encode_corpus

# (length, answer start): ordinary, one-token answers, texts without a prompt, answers longer than their stand-in's.
SHAPES = [(9, 4), (6, 5), (12, 3), (7, 0), (10, 1), (5, 0)]
STAND_IN_SHAPES = [[(9, 4), (8, 5), (5, 2)], [(7, 3), (6, 5), (9, 2)], [(9, 5), (6, 5), (14, 3)],
                   [(7, 0), (4, 0), (8, 1)], [(3, 1), (10, 1), (11, 4)], [(2, 0), (5, 0), (6, 3)]]  # fmt: skip
RECORDS = encoded(21, SHAPES)
STAND_INS = {record_key(record): tuple(encoded(30 + i, STAND_IN_SHAPES[i])) for i, record in enumerate(RECORDS)}
BATCH, KEEP = collate(RECORDS, 0), collate([*RETAIN, *encoded(5, [(6, 0), (4, 1)])], 0)

# Cosines are taken in fp32, whatever the model's type.
CLOSE = {"rtol": 2e-4, "atol": 2e-6}
NEAR = {"rtol": 1e-5, "atol": 1e-6}

WEIGHTS = ("representation_weight", "distillation_weight", "hinge_weight", "floor_weight", "npo_weight")
OFF = dict.fromkeys(WEIGHTS, 0.0)
FORGET_TERMS = {
    "representation": {**OFF, "representation_weight": 1.3},
    "first layer": {**OFF, "representation_weight": 1.3, "layers": (0,)},
    "last layer": {**OFF, "representation_weight": 1.3, "layers": (1,)},
    "distillation": {**OFF, "distillation_weight": 0.7},
    "hinge": {**OFF, "hinge_weight": 0.9},
    "level": {**OFF, "hinge_weight": 0.9, "floor_weight": 0.6},
    "npo": {**OFF, "npo_weight": 0.4, "npo_beta": 0.3},
    "all": {
        "representation_weight": 1.3,
        "distillation_weight": 0.7,
        "hinge_weight": 0.9,
        "floor_weight": 0.6,
        "npo_weight": 0.4,
        "npo_beta": 0.3,
    },
}
ALL = FORGET_TERMS["all"]
# Without correction, and all stand-ins there are take turns.
PLAIN = {"count": 3, "spare": 0, "prior_smoothing": None, "pass_over_above": 1.0}
PATHS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}


def build(setup, forget_weight=1.0, temperature=0.7, **stand_in):
    stand_in = {**PLAIN, **stand_in}
    config = FalconConfig(positives="stand_in", stand_in=stand_in, forget_weight=forget_weight, temperature=temperature)
    return entry_of(config).build(config, setup)


def setup_of(model=None, loss_mask="answer", records=RECORDS, options=None, retain=(), **changes):
    whole = WholeModel(build_llama() if model is None else model, **changes)
    batches = {"bio": [collate(records[i : i + 2], 0) for i in range(0, len(records), 2)]}
    return WholeSetup(whole, batches, STAND_INS if options is None else options, loss_mask, 0, seed=4, retain=retain)


@pytest.fixture(scope="module")
def setup():
    return setup_of()


@pytest.fixture(scope="module")
def masters(setup):
    return moved(setup.model.masters())


class Naive:
    """Two plain models that read one record at a time, without padding; then loops over records, tokens and layers."""

    def __init__(self, setup, masters, path="model.layers"):
        model = setup.model.model
        self.setup, self.path = setup, path
        self.now, self.before = Plain(model, masters), Plain(model)
        self.layers = range(model.config.num_hidden_layers)

    def read(self, plain, record):
        """Outputs of all layers, each (n, D), and log-probabilities of the next token (n, V)."""
        found = []
        stack = plain.model.get_submodule(self.path)
        handles = [
            layer.register_forward_hook(lambda _m, _a, out: found.append(out[0] if isinstance(out, tuple) else out))
            for layer in stack
        ]
        logits = plain.model(input_ids=torch.tensor([record.ids]), use_cache=False).logits
        for handle in handles:
            handle.remove()
        return [out[0] for out in found], logits[0].log_softmax(-1)

    def forget(self, step, batch, config, temperature=0.7, chosen=None, correction=None, least=None):
        chosen = self.layers if chosen is None else chosen
        total = 0.0
        for record in batch.records:
            options = self.setup.alternatives[record_key(record)]
            other = options[step % len(options)]
            a, p = self.read(self.now, record)
            with torch.no_grad():
                (n, p0), (s, q) = self.read(self.before, record), self.read(self.before, other)
                plain = q
                if correction is not None:
                    q = (q + correction).log_softmax(-1)
            value = 0.0
            places = list(zip(reversed(answer(record)), reversed(answer(other)), strict=False))
            for own, theirs in places:
                for layer in chosen:
                    difference = cosine(a[layer][own], s[layer][theirs]) - cosine(a[layer][own], n[layer][own])
                    part = torch.log1p(torch.exp(-difference / temperature))
                    value += config["representation_weight"] * part / (len(places) * len(chosen))
                divergence = sum(math.exp(x) * (x - y) for x, y in zip(q[theirs - 1].tolist(), p[own - 1], strict=True))
                value += config["distillation_weight"] * divergence / len(places)
                level = q[theirs - 1, record.ids[own]]
                if least is not None:
                    level = max(level, min(plain[theirs - 1, record.ids[own]], math.log(least)))
                excess = p[own - 1, record.ids[own]] - level
                value += config["hinge_weight" if excess > 0 else "floor_weight"] * abs(excess) / len(places)
            if config["npo_weight"]:
                ratio = sum(log[t - 1, record.ids[t]] * sign for t in self.counted(record) for log, sign in
                            ((p, 1), (p0, -1)))  # fmt: skip
                beta = config["npo_beta"]
                value += config["npo_weight"] * 2 / beta * torch.log1p(torch.exp(beta * ratio))
            total += value / len(batch.records)
        return total

    def counted(self, record):
        first = record.answer_start if self.setup.loss_mask == "answer" else record.content_start
        return range(max(first, 1), len(record))

    def retain(self, batch, term, weight, cosine_weight, chosen=None):
        chosen = self.layers if chosen is None else chosen
        tokens = sum(len(self.counted(record)) for record in batch.records)
        total = cosine_weight
        for record in batch.records:
            b, p = self.read(self.now, record)
            with torch.no_grad():
                b0, p0 = self.read(self.before, record)
            for t in self.counted(record):
                total -= cosine_weight * sum(cosine(b[i][t], b0[i][t]) for i in chosen) / len(chosen) / tokens
                if term == "nll":
                    total -= weight * p[t - 1, record.ids[t]] / tokens
                if term == "kl":
                    divergence = p0[t - 1].exp() @ (p0[t - 1] - p[t - 1])
                    total += weight * divergence / tokens
        return total


def answer(record):
    return [t for t in range(len(record)) if t >= record.answer_start and t > 0]


def cosine(x, y):
    return (x @ y) / (x.square().sum().sqrt() * y.square().sum().sqrt())


# the formulas


@pytest.mark.parametrize("loss_mask", ["answer", "all"])
@pytest.mark.parametrize("name", FORGET_TERMS)
def test_forget_loss_and_gradient_are_the_formula(name, loss_mask, masters):
    setup, config = setup_of(loss_mask=loss_mask), FORGET_TERMS[name]
    loss = build(setup, forget_weight=2.0, temperature=0.4, **config).forget_loss(4, "bio", BATCH, masters)
    naive = Naive(setup, masters)
    expected = 2 * naive.forget(4, BATCH, config, temperature=0.4, chosen=config.get("layers"))
    assert loss.ndim == 0
    torch.testing.assert_close(loss.double(), expected.double(), **NEAR)
    assert_same(reached(loss, masters), naive_gradients(naive, expected), **CLOSE)


def reached(loss, masters):
    """Gradients, zero where the loss does not reach (layers above the last that is compared)."""
    found = torch.autograd.grad(loss, list(masters.values()), allow_unused=True)
    return {n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(masters.items(), found, strict=True)}


def naive_gradients(naive, loss):
    return reached(loss, naive.now.parameters)


@pytest.mark.parametrize("loss_mask", ["answer", "all"])
@pytest.mark.parametrize("cosine_weight", [0.0, 2.5])
@pytest.mark.parametrize("term", ["none", "nll", "kl"])
def test_retain_loss_and_gradient_are_the_formula(term, cosine_weight, loss_mask, masters):
    setup = setup_of(loss_mask=loss_mask)
    method = build(setup, retain=term, retain_weight=0.6, retain_representation_weight=cosine_weight)
    loss = method.retain_loss(3, KEEP, masters)
    if term == "none" and not cosine_weight:
        assert loss is None
        return
    naive = Naive(setup, masters)
    expected = naive.retain(KEEP, term, 0.6, cosine_weight)
    torch.testing.assert_close(loss.double(), expected.double(), **NEAR)
    assert_same(reached(loss, masters), naive_gradients(naive, expected), **CLOSE)


@pytest.mark.parametrize("layers", [(0,), (1,), (1, 0)])
def test_retained_layers_are_those_named(layers, setup, masters):
    method = build(setup, layers=layers, retain="none", retain_representation_weight=1.0)
    expected = Naive(setup, masters).retain(KEEP, "none", 0, 1.0, chosen=layers)
    assert method.retain_loss(0, KEEP, masters).item() == pytest.approx(expected.item(), rel=1e-4)
    assert method.diagnostics() == {"stand_in_layers": list(layers), "stand_ins_passed_over": 0}


def random_options(records, seed):
    """For each record a stand-in of another length."""
    return {record_key(r): tuple(encoded(seed + i, [(5 + 2 * i, 2 + i)])) for i, r in enumerate(records)}


@pytest.mark.parametrize("architecture", ["mixtral", "gpt2", "gemma2", "gemma3_text", "gpt_neox", "qwen3"])
def test_other_architectures(architecture):
    model = build_model(architecture)
    records = FORGET_BATCH.records
    setup = setup_of(model, records=records, options=random_options(records, 50))
    masters = moved(setup.model.masters(), by=0.02)
    method = build(setup, **ALL, retain="kl")
    naive = Naive(setup, masters, PATHS.get(architecture, "model.layers"))
    assert method.layers == (1, 2, 3, 4)
    for loss, expected in (
        (method.forget_loss(0, "bio", FORGET_BATCH, masters), naive.forget(0, FORGET_BATCH, ALL, chosen=(1, 2, 3, 4))),
        (method.retain_loss(0, RETAIN_BATCH, masters), naive.retain(RETAIN_BATCH, "kl", 1.0, 3.0, (1, 2, 3, 4))),
    ):
        torch.testing.assert_close(loss, expected.float(), rtol=2e-4, atol=1e-5)
        assert_same(reached(loss, masters), naive_gradients(naive, expected), rtol=5e-3, atol=5e-4)


# theorems


def test_with_itself_as_its_stand_in_a_record_pulls_nowhere_at_the_original_weights():
    setup = setup_of(options={record_key(record): (record,) for record in RECORDS})
    start = setup.model.masters()
    contrast = build(setup, **FORGET_TERMS["representation"]).forget_loss(0, "bio", BATCH, start)
    distillation = build(setup, **FORGET_TERMS["distillation"]).forget_loss(0, "bio", BATCH, start)
    hinge = build(setup, **FORGET_TERMS["hinge"]).forget_loss(0, "bio", BATCH, start)
    assert hinge.item() == pytest.approx(0, abs=1e-12)
    assert contrast.item() == pytest.approx(1.3 * math.log(2), rel=1e-6)
    assert distillation.item() == pytest.approx(0, abs=1e-12)
    for loss in (contrast, distillation):
        assert max(g.abs().max().item() for g in reached(loss, start).values()) < 1e-7


def test_what_retains_is_zero_at_the_original_weights_with_its_gradient(setup):
    start = setup.model.masters()
    loss = build(setup, retain="kl").retain_loss(0, KEEP, start)
    away = build(setup, retain="kl").retain_loss(0, KEEP, moved(start))
    assert abs(loss.item()) < 1e-6 < 1e-2 < away.item()
    assert max(g.abs().max().item() for g in reached(loss, start).values()) < 1e-5


def test_npo_alone_is_npo(setup, masters):
    npo = METHODS["npo"].build(METHODS["npo"].config(beta=0.3, retain="none"), setup)
    expected = 0.4 * npo.forget_loss(1, "bio", BATCH, masters)
    found = build(setup, **FORGET_TERMS["npo"]).forget_loss(1, "bio", BATCH, masters)
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-9, atol=0)


def test_terms_add_up_with_their_weights(setup, masters):
    parts = [build(setup, **FORGET_TERMS[name]) for name in ("representation", "distillation", "level", "npo", "all")]
    *single, total = (method.forget_loss(2, "bio", BATCH, masters).item() for method in parts)
    assert total == pytest.approx(sum(single), rel=1e-6)
    assert all(value > 0 for value in single)


def test_descent_brings_the_record_to_what_the_stand_in_was():
    options = random_options(RECORDS, 70)
    setup = setup_of(options=options)
    masters, method = setup.model.masters(), build(setup, **{**ALL, "npo_weight": 0.0})
    naive = Naive(setup, masters)

    def distance():
        now = Naive(setup, masters)
        total = 0.0
        with torch.no_grad():
            for record in RECORDS:
                (other,) = options[record_key(record)]
                a, s = now.read(now.now, record)[0], naive.read(naive.before, other)[0]
                total += sum(1 - cosine(x[-1], y[-1]).item() for x, y in zip(a, s, strict=True))
        return total

    optimizer = torch.optim.Adam(masters.values(), lr=3e-3)
    start = distance()
    losses = []
    for step in range(15):
        loss = method.forget_loss(step, "bio", BATCH, masters)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert distance() < 0.8 * start


def test_stand_ins_take_turns(setup, masters):
    method = build(setup, **ALL)
    values = [method.forget_loss(step, "bio", BATCH, masters).item() for step in range(6)]
    assert values[:3] == values[3:]
    assert len(set(values)) == 3


def test_the_layers_are_all_but_the_lower_third():
    for layers, expected in ((1, (0,)), (2, (0, 1)), (3, (1, 2)), (5, (1, 2, 3, 4)), (6, (2, 3, 4, 5))):
        model = build_model("llama", num_hidden_layers=layers)
        setup = setup_of(model, records=FORGET_BATCH.records)
        assert build(setup).layers == expected


# what the engine relies on


def losses_of(method, masters, batch=BATCH, keep=KEEP):
    return {"forget": (batch, lambda b: method.forget_loss(1, "bio", b, masters)),
            "retain": (keep, lambda b: method.retain_loss(1, b, masters))}  # fmt: skip


@pytest.mark.parametrize("loss_mask", ["answer", "all"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_loss_of_a_batch_is_the_weighted_mean_of_its_parts(size, loss_mask, masters):
    method = build(setup_of(loss_mask=loss_mask), **ALL, retain="kl")
    for side, (batch, loss_of) in losses_of(method, masters).items():
        parts = batch.parts(size)
        weights = [method.weight(side, part) for part in parts]
        assert sum(weights) == method.weight(side, batch)
        shares = [weight / sum(weights) for weight in weights]
        mean = sum(share * loss_of(part) for share, part in zip(shares, parts, strict=True))
        whole = loss_of(batch)
        assert mean.item() == pytest.approx(whole.item(), rel=1e-6)
        assert_same(gradients(mean, masters), gradients(whole, masters), **CLOSE)


@pytest.mark.parametrize("loss_mask", ["answer", "all"])
def test_padding_and_order_change_nothing(loss_mask, masters):
    method = build(setup_of(loss_mask=loss_mask), **ALL, retain="kl")
    for batch, loss_of in losses_of(method, masters).values():
        expected = loss_of(batch)
        slopes = gradients(expected, masters)
        for same in (wider(batch), collate(batch.records[::-1], 0), collate(batch.records[2:] + batch.records[:2], 9)):
            found = loss_of(same)
            assert found.item() == pytest.approx(expected.item(), rel=1e-6)
            assert_same(gradients(found, masters), slopes, **CLOSE)


def test_originals_stay_and_frozen_passes_have_no_gradient():
    model = build_llama().requires_grad_(True)  # as a model is that was just loaded
    before = {name: value.clone() for name, value in model.state_dict().items()}
    setup = setup_of(model)
    masters = moved(setup.model.masters())
    method = build(setup, **ALL, retain="kl")
    for batch, loss_of in losses_of(method, masters).values():
        loss_of(batch).backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())
    assert all(value.grad is not None and value.grad.any() for name, value in masters.items())
    frozen = setup.model.run(BATCH, method.layers, None)
    assert not any(value.requires_grad for value in (frozen.layers, frozen.final, frozen.head.weight))
    assert method.keeps_reference


def test_only_the_tensors_in_scope_get_gradients():
    setup = setup_of(layers=(1,), modules="mlp")
    masters = moved(setup.model.masters())
    naive = Naive(setup, masters)
    loss, expected = build(setup, **ALL).forget_loss(0, "bio", BATCH, masters), naive.forget(0, BATCH, ALL)
    assert len(masters) == 3
    assert_same(gradients(loss, masters), naive.now.gradients(expected), **CLOSE)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_bf16_models(architecture):
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        records = FORGET_BATCH.records
        setup = setup_of(build_model(architecture).to(dtype), records=records, options=random_options(records, 50))
        masters = setup.model.masters()
        method = build(setup, **ALL, retain="kl")
        losses = (method.forget_loss(0, "bio", FORGET_BATCH, masters), method.retain_loss(0, RETAIN_BATCH, masters))
        assert {loss.dtype for loss in losses} == {torch.float32}
        for loss in losses:
            assert all(g.dtype == torch.float32 and g.isfinite().all() for g in reached(loss, masters).values())
        assert abs(losses[1].item()) < 1e-5
        found.append(losses[0].item())
        same = setup_of(setup.model.model, records=records, options={record_key(r): (r,) for r in records})
        itself = build(same, **FORGET_TERMS["representation"]).forget_loss(0, "bio", FORGET_BATCH, masters)
        assert itself.item() == pytest.approx(1.3 * math.log(2), rel=1e-6)
    assert found[1] == pytest.approx(found[0], rel=0.05)


def test_with_adapters_the_reference_is_the_original_model():
    pytest.importorskip("peft")
    plain = build_model("llama")
    records = FORGET_BATCH.records
    options = random_options(records, 50)
    model = build_model("llama")
    add_adapters(model, LoraConfig(rank=2), range(5), "all", 0)
    setup = setup_of(model, records=records, options=options, layers=range(5), modules=ADAPTER_TENSORS)
    masters = setup.model.masters()
    expected = setup_of(plain, records=records, options=options)
    for moving in (False, True):
        values = moved(masters) if moving else masters
        found = build(setup, **ALL).forget_loss(0, "bio", FORGET_BATCH, values)
        same = build(expected, **ALL).forget_loss(0, "bio", FORGET_BATCH, expected.model.masters())
        assert (found.item() == pytest.approx(same.item(), rel=1e-5)) is not moving
        assert any(g.any() for g in gradients(found, values).values())
    frozen, original = setup.model.run(FORGET_BATCH, (0, 4), None), expected.model.run(FORGET_BATCH, (0, 4), None)
    assert torch.equal(frozen.layers, original.layers)


# the hinge


def test_the_hinge_pulls_down_to_the_level_and_no_further(setup):
    method = build(setup, **FORGET_TERMS["hinge"])
    record, other = RECORDS[1], STAND_INS[record_key(RECORDS[1])][0]
    token, one = record.ids[-1], collate([record], 0)  # an answer of one token
    masters = setup.model.masters()
    naive = Naive(setup, masters)
    with torch.no_grad():
        level = naive.read(naive.before, other)[1][-2, token].item()
    optimizer = torch.optim.SGD(masters.values(), lr=0.02)
    for sign in (-1, 1):  # first up, until the hinge is open
        for _ in range(200):
            now = setup.model.predictions(one, "answer", masters).log_probabilities()[0, -1]
            loss = method.forget_loss(0, "bio", one, masters)
            assert loss.item() == pytest.approx(0.9 * max(0, now.item() - level), rel=1e-6, abs=1e-12)
            if (sign < 0 and now > level + 0.5) or (sign > 0 and loss == 0):
                break
            optimizer.zero_grad()
            (loss if sign > 0 else -now).backward()
            optimizer.step()
        else:
            pytest.fail("did not get there")
    assert not any(g.any() for g in reached(loss, masters).values())


def test_with_the_floor_descent_comes_to_the_level_from_below_too(setup):
    method, hinge = build(setup, **FORGET_TERMS["level"]), build(setup, **FORGET_TERMS["hinge"])
    record, other = RECORDS[1], STAND_INS[record_key(RECORDS[1])][0]
    token, one = record.ids[-1], collate([record], 0)
    masters = setup.model.masters()
    with torch.no_grad():
        level = Naive(setup, masters).read(Naive(setup, masters).before, other)[1][-2, token].item()
    optimizer = torch.optim.SGD(masters.values(), lr=0.02)

    def now():
        return setup.model.predictions(one, "answer", masters).log_probabilities()[0, -1]

    def descend(loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(200):
        if now().item() < level - 0.5:
            break
        descend(now())
    below = now().item()
    assert below < level - 0.5
    assert hinge.forget_loss(0, "bio", one, masters).item() == 0
    for _ in range(200):
        loss = method.forget_loss(0, "bio", one, masters)
        assert loss.item() == pytest.approx(0.6 * (level - now().item()), rel=1e-5)
        descend(loss)
        if now().item() > level:
            break
    else:
        pytest.fail("did not get there")


# the correction


shapes = st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))


def counted_in(records, token):
    return sum(1 for r in records for t in range(len(r)) if t >= r.answer_start and r.ids[t] == token)


def naive_correction(forget, retain, smoothing, vocabulary):
    values = []
    for token in range(vocabulary):
        f, r = counted_in(forget, token), counted_in(retain, token)
        values.append(math.log((r + smoothing) / (f + r + smoothing)))
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("smoothing", [1e-3, 0.7])
@pytest.mark.parametrize("name", ["distillation", "hinge", "level", "all"])
def test_the_correction_is_of_what_the_stand_in_predicts(name, smoothing, masters):
    setup, config = setup_of(retain=RETAIN), FORGET_TERMS[name]
    loss = build(setup, prior_smoothing=smoothing, **config).forget_loss(4, "bio", BATCH, masters)
    naive, correction = Naive(setup, masters), naive_correction(RECORDS, RETAIN, smoothing, 41)
    expected = naive.forget(4, BATCH, config, correction=correction)
    assert abs(naive.forget(4, BATCH, config).item() - expected.item()) > 1e-2
    torch.testing.assert_close(loss.double(), expected.double(), **NEAR)
    assert_same(reached(loss, masters), naive_gradients(naive, expected), **CLOSE)


def naive_words(record, begins):
    """The answer's places, word by word."""
    words = []
    for place in range(record.answer_start, len(record)):
        if begins[record.ids[place]] or not words:
            words.append([])
        words[-1].append(place)
    return words


def naive_rarities(record, forget, retain, begins, smoothing):
    """By place, what the level is corrected by: the token's rarity, or its word's where that is rarer."""

    def spelt(records):
        return [tuple(r.ids[p] for p in word) for r in records for word in naive_words(r, begins)]

    def rarity(f, r):
        return math.log((r + smoothing) / (f + r + smoothing))

    result = {}
    for word in naive_words(record, begins):
        ids = tuple(record.ids[place] for place in word)
        whole = rarity(spelt(forget).count(ids), spelt(retain).count(ids))
        for place in word:
            token = record.ids[place]
            result[place] = min(whole, rarity(counted_in(forget, token), counted_in(retain, token)))
    return result


def test_a_token_is_as_rare_as_its_word(masters):
    begins = tuple(token % 3 == 0 for token in range(41))
    setup = dataclasses.replace(setup_of(retain=RETAIN), begins_word=begins)
    plain = setup_of(retain=RETAIN)
    config = FORGET_TERMS["hinge"]
    found, without = (
        build(each, prior_smoothing=0.5, **config).forget_loss(4, "bio", BATCH, masters).item()
        for each in (setup, plain)
    )
    naive, correction = Naive(setup, masters), naive_correction(RECORDS, RETAIN, 0.5, 41)
    expected = 0.0
    for record in RECORDS:
        options = STAND_INS[record_key(record)]
        other = options[4 % len(options)]
        with torch.no_grad():
            (_, p), (_, q) = naive.read(naive.now, record), naive.read(naive.before, other)
        normaliser = (q + correction).logsumexp(-1)
        rarities = naive_rarities(record, RECORDS, RETAIN, begins, 0.5)
        places = list(zip(reversed(answer(record)), reversed(answer(other)), strict=False))
        for own, theirs in places:
            token = record.ids[own]
            level = q[theirs - 1, token] + rarities[own] - normaliser[theirs - 1]
            expected += 0.9 * max(0.0, (p[own - 1, token] - level).item()) / len(places) / len(RECORDS)
    assert found == pytest.approx(expected, rel=1e-5)
    assert abs(found - without) > 1e-3
    one_each = dataclasses.replace(setup_of(retain=RETAIN), begins_word=(True,) * 41)  # every token a word
    switched_off = build(setup, prior_smoothing=0.5, whole_words=False, **config)
    for same in (build(one_each, prior_smoothing=0.5, **config), switched_off):
        assert same.forget_loss(4, "bio", BATCH, masters).item() == without


@pytest.mark.parametrize("least", [1e-6, 0.02, 0.9])
def test_the_correction_lowers_the_level_to_the_least_one_at_most(least, masters):
    setup, config = setup_of(retain=RETAIN), FORGET_TERMS["level"]
    method = build(setup, prior_smoothing=1e-3, least_level=least, **config)
    loss = method.forget_loss(4, "bio", BATCH, masters)
    naive, correction = Naive(setup, masters), naive_correction(RECORDS, RETAIN, 1e-3, 41)
    expected = naive.forget(4, BATCH, config, correction=correction, least=least)
    torch.testing.assert_close(loss.double(), expected.double(), **NEAR)
    all_the_way = naive.forget(4, BATCH, config, correction=correction).item()
    assert (abs(expected.item() - all_the_way) > 1e-3) == (least > 1e-6)


@pytest.mark.parametrize("name", ["representation", "npo"])
def test_terms_without_the_stand_ins_predictions_are_not_corrected(name, masters):
    setup = setup_of(retain=RETAIN)
    with_it, without = (
        build(setup, prior_smoothing=smoothing, **FORGET_TERMS[name]).forget_loss(4, "bio", BATCH, masters)
        for smoothing in (1e-3, None)
    )
    assert with_it.item() == without.item()


@given(
    seed=st.integers(0, 99),
    forget=st.lists(shapes, min_size=1, max_size=5),
    retain=st.lists(shapes, max_size=8),
    smoothing=st.sampled_from([1e-6, 1e-3, 1.0]),
)
@settings(max_examples=30)
def test_only_tokens_of_forget_answers_are_corrected(setup, seed, forget, retain, smoothing):
    forget, retain = encoded(seed, forget), encoded(seed + 1, retain)
    batches = {"bio": [collate(forget[:1], 0)], **({"cyber": [collate(forget[1:], 0)]} if forget[1:] else {})}
    other = dataclasses.replace(setup, forget_batches=batches, alternatives={}, retain=retain)
    found = build(other, **{**FORGET_TERMS["distillation"], "prior_smoothing": smoothing})._shift
    torch.testing.assert_close(found.double(), naive_correction(forget, retain, smoothing, 41), rtol=1e-5, atol=1e-6)
    in_answers = [counted_in(forget, token) > 0 for token in range(41)]
    assert (found < 0).tolist() == in_answers
    assert (found == 0).tolist() == [not value for value in in_answers]


def test_without_forget_answers_the_correction_changes_nothing(setup, masters):
    prompts = [collate([Encoded(record.ids, len(record)) for record in RECORDS], 0)]
    other = dataclasses.replace(setup, forget_batches={"bio": prompts}, retain=RETAIN)
    losses = (
        build(other, **{**ALL, "npo_weight": 0.0}, prior_smoothing=smoothing).forget_loss(0, "bio", BATCH, masters)
        for smoothing in (1e-3, None)
    )
    first, second = losses
    assert first.item() == second.item()


# passing over


def reminds(model, stand_in, retain, above):
    """Whether all rare tokens of the answer are as probable as that, one by one."""
    with torch.no_grad():
        log = model(input_ids=torch.tensor([stand_in.ids]), use_cache=False).logits[0].log_softmax(-1)
    found = []
    for t in answer(stand_in):
        token = stand_in.ids[t]
        known = sum(token in record.ids[record.answer_start :] for record in retain)
        if known < max(2, 0.02 * len(retain)) and token not in stand_in.ids[: stand_in.answer_start]:
            found.append(log[t - 1, token].item() >= math.log(above))
    return bool(found) and all(found)


def used(method, records=RECORDS, steps=12):
    """Stand-ins of each record in the order of their turns, once each."""
    turns = [method.setup.alternative(step, collate(records, 0)).records for step in range(steps)]
    return [tuple(dict.fromkeys(column)) for column in zip(*turns, strict=True)]


@given(
    seed=st.integers(0, 999),
    count=st.integers(1, 4),
    retained=st.sampled_from([0, 6, 150]),
    above=st.sampled_from([0.005, 0.02, 0.1]),
)
@settings(max_examples=25)
def test_stand_ins_that_remind_are_passed_over(setup, seed, count, retained, above):
    generator = random.Random(seed)
    lengths = [[(s + n, s) for s, n in ((generator.randrange(7), generator.randint(1, 3)) for _ in range(6))]
               for _ in RECORDS]  # fmt: skip
    options = {record_key(r): tuple(encoded(seed + 7 * i, lengths[i])) for i, r in enumerate(RECORDS)}
    # Many retain answers of one token, so that tokens are rare, common, and at the border.
    retain = encoded(seed, [(generator.randint(2, 4), 1 + (retained > 99)) for _ in range(retained)])
    other = dataclasses.replace(setup, alternatives=options, retain=retain)
    method = build(other, count=count, spare=6 - count, pass_over_above=above)
    expected, passed_over = [], 0
    for record in RECORDS:
        known = {o: reminds(setup.model.model, o, retain, above) for o in options[record_key(record)]}
        order = [o for o in known if not known[o]] + [o for o in known if known[o]]
        expected.append(tuple(order[:count]))
        passed_over += sum(list(known.values())[:count])
    assert used(method) == expected
    assert method.diagnostics()["stand_ins_passed_over"] == passed_over


def test_the_spare_ones_come_in_where_the_first_remind(setup):
    model, above = setup.model.model, 0.1
    pool = [Encoded((*record.ids, token), len(record)) for record in RETAIN for token in range(3, 41)]
    pool = [one for one in pool if one.ids[-1] not in one.ids[:-1]]
    known = [one for one in pool if reminds(model, one, (), above)][:2]
    new = [one for one in pool if not reminds(model, one, (), above)][:3]
    assert len(known) == 2
    options = {record_key(record): (known[0], new[0], known[1], new[1], new[2]) for record in RECORDS}
    method = build(dataclasses.replace(setup, alternatives=options), count=2, spare=3, pass_over_above=above)
    assert used(method) == [(new[0], new[1])] * len(RECORDS)
    assert method.diagnostics()["stand_ins_passed_over"] == len(RECORDS)


def test_where_all_remind_the_first_are_used(setup):
    method = build(setup, count=2, spare=1, pass_over_above=1e-30)
    rare = [r for r in RECORDS if all(reminds(setup.model.model, o, (), 1e-30) for o in STAND_INS[record_key(r)])]
    assert rare
    for record, options in zip(RECORDS, used(method), strict=True):
        if record in rare:
            assert options == STAND_INS[record_key(record)][:2]
    assert method.diagnostics()["stand_ins_passed_over"] >= 2 * len(rare)


@pytest.mark.parametrize("total", [20, 150])
def test_tokens_of_many_retain_answers_or_of_the_question_remind_of_nothing(total, setup):
    border = max(2, math.ceil(0.02 * total))
    stand_in, again = Encoded((5, 6, 7, 8, 9), 3), Encoded((5, 6, 8, 9, 8, 9), 4)
    found = {}
    for times in (border - 1, border):
        # Twice in an answer is once; the question does not count.
        retain = [Encoded((8, 9, 10, 8, 8, 9, 9) if i < times else (8, 9, 10), 2) for i in range(total)]
        one = {record_key(RECORDS[0]): (stand_in,)}
        method = build(dataclasses.replace(setup, alternatives=one, retain=retain), pass_over_above=1e-30)
        found[times] = method.diagnostics()["stand_ins_passed_over"]
        in_question = {record_key(RECORDS[0]): (again,)}
        method = build(dataclasses.replace(setup, alternatives=in_question, retain=retain), pass_over_above=1e-30)
        assert method.diagnostics()["stand_ins_passed_over"] == 0
    assert found == {border - 1: 1, border: 0}


# alignment


@given(pairs=st.lists(st.tuples(shapes, shapes), min_size=1, max_size=5), seed=st.integers(0, 99))
@settings(max_examples=100)
def test_answers_are_paired_from_their_ends(pairs, seed):
    own, theirs = (encoded(seed + i, [pair[i] for pair in pairs]) for i in (0, 1))
    found = aligned(collate(own, 0), collate(theirs, 0))
    expected = {}
    for row, (record, other) in enumerate(zip(own, theirs, strict=True)):
        places = list(zip(answer(record)[::-1], answer(other)[::-1], strict=False))
        expected |= {(row, t, u): 1 / len(places) / len(own) for t, u in places}
    rows = zip(found.rows.tolist(), found.columns.tolist(), found.stand_in_columns.tolist(), strict=True)
    assert dict(zip(rows, found.weights.tolist(), strict=True)) == pytest.approx(expected)


def test_a_record_without_answer_tokens_adds_nothing(setup, masters):
    empty = Encoded((3, 4, 5), 3)
    one = Encoded((7,), 0)
    options = {**STAND_INS, record_key(empty): (RECORDS[0],), record_key(one): (RECORDS[1],)}
    method = build(dataclasses.replace(setup, alternatives=options), **{**ALL, "npo_weight": 0.0})
    alone = method.forget_loss(0, "bio", collate([empty, one], 0), masters)
    assert alone.item() == 0
    assert not any(g.any() for g in reached(alone, masters).values())
    full, half = (method.forget_loss(0, "bio", collate(items, 0), masters).item()
                  for items in ([RECORDS[2]], [RECORDS[2], empty]))  # fmt: skip
    assert half == pytest.approx(full / 2, rel=1e-6)


# settings


def test_stand_ins_are_a_line_of_their_own():
    assert entry_of(FalconConfig()) is METHODS["falcon"]
    entry = entry_of(FalconConfig(positives="stand_in"))
    assert (entry.build, entry.kind, entry.alternatives) == (WholeFalcon, "whole", "stand_in")
    for name, other in METHODS.items():
        assert entry_of(other.config()) is METHODS[name]


@pytest.mark.parametrize(
    "bad",
    [
        {"count": 0},
        {"spare": -1},
        {"prior_smoothing": 0},
        {"pass_over_above": 0},
        {"pass_over_above": 1.5},
        {"hinge_weight": -1},
        {"layers": ()},
        {"layers": "all"},
        {"representation_weight": -1},
        {"representation_weight": 0},
        {"npo_beta": 0},
        {"retain": "mse"},
        {"retain_weight": -1},
        {"steering": 1},
    ],
    ids=str,
)
def test_unusable_settings_are_refused(bad):
    with pytest.raises(ValidationError):
        FalconConfig.model_validate({"positives": "stand_in", "stand_in": bad})


def test_any_one_weight_will_do_but_not_none():
    for name in set(OFF) - {"floor_weight"}:
        FalconConfig.model_validate({"positives": "stand_in", "stand_in": {**OFF, name: 0.1}})
    for nothing in (OFF, {**OFF, "floor_weight": 0.1}):  # the floor alone forgets nothing
        with pytest.raises(ValidationError, match="hinge"):
            FalconConfig.model_validate({"positives": "stand_in", "stand_in": nothing})


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_is_not_there_is_refused(setup, layer):
    with pytest.raises(UserError, match=rf"method\.stand_in\.layers: layer {layer} is out of range.*0\.\.1") as caught:
        build(setup, layers=(0, layer))
    assert "\n" not in str(caught.value)


# whole runs

OPTIMIZER = {"lr": 2e-3}
DEFAULT = {
    "method": {"name": "falcon", "preset": "default"},
    "selection": {"layers": "auto"},
    "training": {"steps": 12, "optimizer": OPTIMIZER},
}
SHORT = {**DEFAULT, "training": {"steps": 9, "optimizer": OPTIMIZER}, "evaluation": {"enabled": False}}


def patch_of(run):
    return (run.folder / "patch" / "patch.safetensors").read_bytes()


def probability(model, tokenizer, rows):
    """Mean probability of the answers' tokens, one record at a time."""
    encoder, total = Encoder(tokenizer), []
    for row in rows:
        one = encoder.encode(record_from_row(row, ""))
        with torch.no_grad():
            log = model(torch.tensor([one.ids])).logits[0].log_softmax(-1)
        total += [log[t - 1, one.ids[t]].exp().item() for t in range(one.answer_start, len(one))]
    return sum(total) / len(total)


def assert_forgets(run, folder, model):
    """Judged by what the patch makes of the model, apart from the run's own figures."""
    apply_patch(model, run.folder / "patch", folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (model, folder))
    assert probability(after, tokenizer, FORGET_ROWS) < 0.9 * probability(before, tokenizer, FORGET_ROWS)
    assert probability(after, tokenizer, RETAIN_ROWS) > 0.95 * probability(before, tokenizer, RETAIN_ROWS)


def passed_over_in(recipe, path, written):
    """How many records of a run have a first stand-in that reminds the model."""
    encoder, model = Encoder(AutoTokenizer.from_pretrained(path)), AutoModelForCausalLM.from_pretrained(path)
    corpus = encode_corpus(recipe, load_corpus(recipe.corpus, path), encoder, model.config)
    retain = [encoder.encode(record_from_row(row, "")) for row in [*RETAIN_ROWS, *written]]
    firsts = [options[0] for options in alternatives_of(recipe, corpus, encoder).values()]
    return sum(reminds(model, first, retain, 0.1) for first in firsts)


def test_a_default_run_forgets_and_keeps(recipe_for, tiny, tmp_path):
    recipe = recipe_from(recipe_for({**DEFAULT, "evaluation": {"max_new_tokens": 1}}))
    run = unlearn(recipe)
    before, after = run.metrics["before"], run.metrics["after"]
    assert after.forget_probability < 0.9 * before.forget_probability
    assert after.utility_parts["retain_probability"] > 0.95 * before.utility_parts["retain_probability"]
    base = load_file(tiny.model / "model.safetensors")
    assert run.patch.tensors.keys() <= base.keys()
    assert run.selection.layers == (0, 1, 2)
    found = json.loads((run.folder / "provenance.json").read_text())["method_diagnostics"]
    written = read_jsonl(run.folder / "self_samples.jsonl")
    assert 0 < len(written) <= len(RETAIN_ROWS) / 2
    passed_over = passed_over_in(recipe, tiny.model, written)
    assert found == {"stand_in_layers": [1, 2], "stand_ins_passed_over": passed_over}
    assert_forgets(run, tmp_path / "patched", tiny.model)


def test_an_interrupted_run_goes_on_to_the_same_bytes(tiny_recipe, monkeypatch, tmp_path):
    recipes = [
        tiny_recipe({**SHORT, "method": {**SHORT["method"], "stand_in": {"count": 3, **ALL}}}, tmp_path / name)
        for name in ("whole", "run")
    ]
    expected = unlearn(recipes[0])
    retain_loss = WholeFalcon.retain_loss

    def stopping(self, step, *rest, **more):
        if step == 6:
            raise KeyboardInterrupt
        return retain_loss(self, step, *rest, **more)

    monkeypatch.setattr(WholeFalcon, "retain_loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        unlearn(recipes[1])
    monkeypatch.undo()
    assert len(read_jsonl(tmp_path / "run" / "training.jsonl")) == 6
    resumed = unlearn(recipes[1], resume=True)
    assert patch_of(resumed) == patch_of(expected)
    assert len(read_jsonl(resumed.folder / "training.jsonl")) == 9


def test_a_run_with_adapters(recipe_for, tiny, tmp_path):
    pytest.importorskip("peft")
    training = {"steps": 20, "optimizer": {"lr": 1e-2}, "lora": {"rank": 4}}
    run = unlearn(recipe_for({**SHORT, "training": training}))
    assert not any("lora" in name for name in run.patch.tensors)
    assert_forgets(run, tmp_path / "patched", tiny.model)


def test_micro_batches_of_a_run_change_nothing_but_rounding(tiny_recipe, tmp_path):
    found = []
    for size in (8, 3):
        training = {"steps": 2, "micro_batch_size": size, "optimizer": {"name": "sgd", "lr": 1e-2}}
        changes = {**SHORT, "training": training, "corpus": {"loss_mask": "all"}}
        changes["method"] = {**SHORT["method"], "stand_in": {**ALL, "retain": "nll"}}
        run = unlearn(tiny_recipe(changes, tmp_path / str(size)))
        found.append(load_file(run.folder / "patch" / "patch.safetensors"))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)


def test_every_forget_record_has_its_stand_ins(recipe_for, tiny, tmp_path):
    halves = {
        name: {"source": str(write_lines(tmp_path / f"{name}.jsonl", FORGET_ROWS[part]))}
        for name, part in (("one", slice(0, 6)), ("two", slice(6, None)))
    }
    raw = recipe_for({**DEFAULT, "method": {**DEFAULT["method"], "stand_in": {"count": 2}}})
    raw["corpus"]["forget"] = halves
    recipe = recipe_from(raw)
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny.model))
    corpus = encode_corpus(
        recipe, load_corpus(recipe.corpus, tmp_path), encoder, AutoConfig.from_pretrained(tiny.model)
    )
    found = alternatives_of(recipe, corpus, encoder)
    others = [record_from_row(row, "") for row in RETAIN_ROWS]
    for rows in (FORGET_ROWS[:6], FORGET_ROWS[6:]):
        records = [record_from_row(row, "") for row in rows]
        expected = stand_ins(
            records, others, encoder, 0, count=recipe.method.stand_in.count, spare=recipe.method.stand_in.spare
        )
        for record, options in zip(records, expected, strict=True):
            assert len(options) == 2 + 4  # spare ones
            assert found.pop(record_key(encoder.encode(record))) == options
    assert not found


def test_texts_and_records_without_entity_have_stand_ins_too(recipe_for, tmp_path):
    rows = [
        {"text": FORGET_ROWS[0]["answer"], "entity": FORGET_ROWS[0]["entity"]},
        {"text": FORGET_ROWS[5]["answer"]},
        {"prompt": "The home of Bo Quill is", "completion": " Cork"},
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Bo Quill."}]},
    ]
    changes = {"corpus": {"forget": {"source": str(write_lines(tmp_path / "mixed.jsonl", rows))}}}
    run = unlearn(recipe_for({**SHORT, "training": {"steps": 2, "optimizer": OPTIMIZER}, **changes}))
    losses = read_jsonl(run.folder / "training.jsonl")
    assert all(row["forget_grad_norm"] > 0 and math.isfinite(row["retain_loss"]) for row in losses)


def test_weights_that_forget_nothing_are_named(recipe_for):
    recipe = recipe_for({**DEFAULT, "method": {**DEFAULT["method"], "stand_in": OFF}})
    with pytest.raises(UserError, match=r"method\.stand_in: one of the representation, .*weights") as caught:
        unlearn(recipe)
    assert "\n" not in str(caught.value)
