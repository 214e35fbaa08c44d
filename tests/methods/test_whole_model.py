import dataclasses

import pytest
import torch
from tiny_whole import (
    ARCHITECTURES,
    FORGET_BATCH,
    RETAIN_BATCH,
    Plain,
    assert_same,
    build_llama,
    build_model,
    gradients,
    moved,
    wider,
)
from torch import nn

from falcon_unlearn.errors import UserError
from falcon_unlearn.methods import WholeModel

TIED = ("gemma2", "gemma3_text", "gpt2")
SCOPES = {"everything": {}, "some": {"layers": (1, 3), "modules": "mlp"}}
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    return build_model(request.param)


def values_of(model):
    return {name: value.clone() for name, value in model.named_parameters()}


def loss_of(whole, batch, loss_mask, masters):
    """Log-probabilities of the counted tokens, and a loss that weighs each of them differently."""
    found = whole.predictions(batch, loss_mask, masters)
    counted = found.log_probabilities()[found.mask]
    return counted, (counted * torch.linspace(0.2, 1.0, len(counted))).mean()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("loss_mask", ["answer", "all"])
def test_log_probabilities_and_gradients_are_those_of_the_plain_way(model, scope, loss_mask):
    whole = WholeModel(model, **SCOPES[scope])
    masters = moved(whole.masters())
    plain = Plain(model, masters)
    for batch in (FORGET_BATCH, RETAIN_BATCH):
        found, loss = loss_of(whole, batch, loss_mask, masters)
        expected = torch.cat(plain.log_probabilities(batch, loss_mask))
        torch.testing.assert_close(found, expected, **CLOSE)
        naive = (expected * torch.linspace(0.2, 1.0, len(expected))).mean()
        assert_same(gradients(loss, masters), plain.gradients(naive), **CLOSE)


def test_everything_is_trained_once_and_a_scope_is_what_it_names(model):
    assert set(WholeModel(model).masters()) == dict(model.named_parameters()).keys()
    some = WholeModel(model, **SCOPES["some"])
    assert {name.removeprefix(f"{some.stack_name}.").split(".")[0] for name in some.parameter_names} == {"1", "3"}
    assert all("mlp" in name for name in some.parameter_names)
    assert all(v.dtype == torch.float32 and v.is_leaf and v.requires_grad for v in some.masters().values())


@pytest.mark.parametrize("architecture", TIED)
def test_the_gradient_of_a_tied_matrix_is_the_sum_over_both_of_its_uses(architecture):
    tied, untied = build_model(architecture), build_model(architecture, tie_word_embeddings=False)
    untied.load_state_dict(tied.state_dict())
    found = []
    for model in (tied, untied):
        whole = WholeModel(model)
        masters = whole.masters()
        found.append(gradients(loss_of(whole, FORGET_BATCH, "answer", masters)[1], masters))
    once, twice = found
    name = next(n for n, p in tied.named_parameters() if p is tied.get_output_embeddings().weight)
    assert once.keys() == twice.keys() - {"lm_head.weight"}
    torch.testing.assert_close(once[name], twice[name] + twice["lm_head.weight"], **CLOSE)
    assert twice[name].any()


HEADS = {
    "softcap": ("gemma2", {**ARCHITECTURES["gemma2"], "final_logit_softcapping": 1.5}),
    "divided": ("granite", {**ARCHITECTURES["llama"], "logits_scaling": 3.0}),
    "multiplied": ("cohere", {**ARCHITECTURES["llama"], "logit_scale": 0.25}),
    "bias": ("phi", ARCHITECTURES["gpt_neox"]),
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_that_are_more_than_a_matrix(kind, monkeypatch):
    architecture, config = HEADS[kind]
    monkeypatch.setitem(ARCHITECTURES, architecture, config)
    model = build_model(architecture)
    whole = WholeModel(model)
    masters = moved(whole.masters())
    plain = Plain(model, masters)
    found, loss = loss_of(whole, FORGET_BATCH, "answer", masters)
    expected = torch.cat(plain.log_probabilities(FORGET_BATCH))
    torch.testing.assert_close(found, expected, **CLOSE)
    naive = (expected * torch.linspace(0.2, 1.0, len(expected))).mean()
    assert_same(gradients(loss, masters), plain.gradients(naive), **CLOSE)


def test_without_masters_it_is_the_original_model_and_has_no_gradient(model):
    whole = WholeModel(model, **SCOPES["some"])
    original, _ = loss_of(whole, FORGET_BATCH, "answer", None)
    expected = torch.cat(Plain(model).log_probabilities(FORGET_BATCH))
    torch.testing.assert_close(original, expected, **CLOSE)
    at_start, _ = loss_of(whole, FORGET_BATCH, "answer", whole.masters())
    assert torch.equal(original, at_start)
    assert not original.requires_grad
    away, _ = loss_of(whole, FORGET_BATCH, "answer", moved(whole.masters()))
    assert not torch.allclose(original, away, **CLOSE)


def test_no_gradient_where_none_is_wanted_even_if_the_model_would_give_one():
    model = build_model("llama").requires_grad_(True)
    whole = WholeModel(model)
    assert not whole.predictions(FORGET_BATCH, "answer", None).log_probabilities().requires_grad
    with torch.no_grad():
        assert not whole.predictions(FORGET_BATCH, "answer", whole.masters()).log_probabilities().requires_grad


def test_nothing_is_modified(model):
    before = values_of(model)
    whole = WholeModel(model)
    masters = moved(whole.masters())
    _, loss = loss_of(whole, FORGET_BATCH, "all", masters)
    gradients(loss, masters)
    loss_of(whole, FORGET_BATCH, "all", None)
    assert before.keys() == values_of(model).keys()
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert all(value.grad is None and not value.requires_grad for value in model.parameters())


def test_padding_changes_nothing(model):
    whole = WholeModel(model)
    masters = moved(whole.masters())
    for loss_mask in ("answer", "all"):
        found, loss = loss_of(whole, FORGET_BATCH, loss_mask, masters)
        padded, other = loss_of(whole, wider(FORGET_BATCH), loss_mask, masters)
        torch.testing.assert_close(found, padded, **CLOSE)
        assert_same(gradients(loss, masters), gradients(other, masters), **CLOSE)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_released_originals_are_gone_and_training_does_not_notice(architecture, scope):
    model = build_model(architecture)
    whole = WholeModel(model, **SCOPES[scope])
    masters = moved(whole.masters())
    values, loss = loss_of(whole, FORGET_BATCH, "answer", masters)
    before = gradients(loss, masters)
    whole.release()
    assert set(whole.parameter_names) == {
        name for name, value in model.named_parameters(remove_duplicate=False) if value.is_meta
    } - ({"lm_head.weight"} if architecture in TIED else set())
    if scope == "everything":
        assert all(value.is_meta for value in model.parameters())
        assert model.get_output_embeddings().weight.is_meta
    again, loss = loss_of(whole, FORGET_BATCH, "answer", masters)
    assert torch.equal(values, again)
    assert all(torch.equal(value, before[name]) for name, value in gradients(loss, masters).items())


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3_moe"])
def test_a_bf16_model_has_fp32_masters(architecture):
    wide = build_model(architecture)
    narrow = build_model(architecture).bfloat16()
    whole = WholeModel(narrow)
    masters = whole.masters()
    assert {value.dtype for value in masters.values()} == {torch.float32}
    found, loss = loss_of(whole, FORGET_BATCH, "answer", masters)
    original, _ = loss_of(whole, FORGET_BATCH, "answer", None)
    assert torch.equal(found, original)
    assert found.dtype == torch.float32
    if architecture != "qwen3_moe":  # whose routers may decide otherwise
        expected = torch.cat(Plain(wide).log_probabilities(FORGET_BATCH))
        assert (found - expected).abs().mean() < 0.1 * expected.abs().mean()
    assert all(v.dtype == torch.float32 and torch.isfinite(v).all() for v in gradients(loss, masters).values())


STACKS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}


def plain_layers(plain, batch):
    """Outputs of all decoder layers by hooks of our own, and logits, of the plain model."""
    found = []
    stack = plain.model.get_submodule(STACKS.get(plain.model.config.model_type, "model.layers"))
    handles = [
        layer.register_forward_hook(lambda _m, _a, out: found.append(out[0] if isinstance(out, tuple) else out))
        for layer in stack
    ]
    arguments = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    outputs = plain.model(**arguments, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    return found, outputs


@pytest.mark.parametrize("scope", SCOPES)
def test_a_run_gives_the_layers_outputs_and_the_final_states(model, scope):
    whole = WholeModel(model, **SCOPES[scope])
    masters, order = moved(whole.masters()), (4, 0, 3)
    real = FORGET_BATCH.attention_mask.bool()
    for values in (masters, None):
        found, (expected, outputs) = (
            whole.run(FORGET_BATCH, order, values),
            plain_layers(Plain(model, values), FORGET_BATCH),
        )
        assert found.layers.shape == (3, *FORGET_BATCH.input_ids.shape, whole.hidden_size)
        for i, layer in enumerate(order):
            torch.testing.assert_close(found.layers[i][real], expected[layer][real], **CLOSE)
        torch.testing.assert_close(found.final[real], outputs.hidden_states[-1][real], **CLOSE)
        torch.testing.assert_close(found.head.logits(found.final)[real], outputs.logits[real], **CLOSE)
        torch.testing.assert_close(found.layers[1][real], outputs.hidden_states[1][real], **CLOSE)
        # The last layer's output stands before the final norm.
        assert not torch.allclose(found.layers[0][real], found.final[real], **CLOSE)


@pytest.mark.parametrize("scope", SCOPES)
def test_gradients_flow_from_every_layer(model, scope):
    whole = WholeModel(model, **SCOPES[scope])
    masters = moved(whole.masters())
    plain = Plain(model, masters)
    real = FORGET_BATCH.attention_mask.bool()
    weights = torch.randn(5, int(real.sum()), whole.hidden_size, generator=torch.Generator().manual_seed(3))
    found = (whole.run(FORGET_BATCH, range(5), masters).layers[:, real] * weights).mean()
    expected = (torch.stack(plain_layers(plain, FORGET_BATCH)[0])[:, real] * weights).mean()

    def reached(loss, tensors):
        slopes = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
        return {name: slope for name, slope in zip(tensors, slopes, strict=True) if slope is not None}

    assert_same(reached(found, masters), reached(expected, plain.parameters), **CLOSE)


def test_a_run_leaves_no_hooks_and_no_layers_are_none(model):
    whole = WholeModel(model)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    found = whole.run(FORGET_BATCH, (), None)
    assert found.layers.shape == (0, *found.final.shape)
    broken = dataclasses.replace(FORGET_BATCH, input_ids=FORGET_BATCH.input_ids + 10**6)
    with pytest.raises((IndexError, RuntimeError)):
        whole.run(broken, (1, 2), whole.masters())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_a_frozen_run_has_no_gradient_even_if_the_model_would_give_one():
    whole = WholeModel(build_model("llama").requires_grad_(True))
    found = whole.run(FORGET_BATCH, (1, 4), None)
    assert not any(value.requires_grad for value in (found.layers, found.final, found.head.weight))
    live = whole.run(FORGET_BATCH, (1, 4), whole.masters())
    assert all(value.requires_grad for value in (live.layers, live.final, live.head.weight))
    assert torch.equal(found.layers, live.layers)


def test_predictions_are_those_of_a_run(model):
    whole = WholeModel(model)
    masters = moved(whole.masters())
    for loss_mask in ("answer", "all"):
        run = whole.run(FORGET_BATCH, (2,), masters).predictions(FORGET_BATCH, loss_mask)
        alone = whole.predictions(FORGET_BATCH, loss_mask, masters)
        for name in ("hidden", "targets", "mask"):
            assert torch.equal(getattr(run, name), getattr(alone, name))
        assert not run.mask[:, 0].any()


class Doubled(nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


@pytest.mark.parametrize("kind", ["no matrix", "another logit", "another shape", "none"])
def test_a_head_that_is_not_understood_is_refused(kind):
    model = build_llama()
    head = model.get_output_embeddings()
    if kind == "no matrix":
        model.set_output_embeddings(nn.Sequential(head, nn.Tanh()))
    elif kind == "another logit":
        doubled = Doubled(head.in_features, head.out_features, bias=False).double().requires_grad_(False)
        doubled.weight = head.weight
        model.set_output_embeddings(doubled)
    elif kind == "another shape":
        cut = type("Cut", (nn.Linear,), {"forward": lambda self, x: nn.Linear.forward(self, x)[..., :-1]})
        head.__class__ = cut
    else:
        model.get_output_embeddings = lambda: None
    with pytest.raises(UserError, match="head of LlamaForCausalLM") as caught:
        WholeModel(model)
    assert "\n" not in str(caught.value)


def test_a_scope_that_names_nothing_is_refused():
    with pytest.raises(UserError, match="matches nothing"):
        WholeModel(build_llama(), (0,), ["nosuch"])
