import copy
import dataclasses

import pytest
import torch
from tiny_models import ARCHITECTURES, FORGET_BATCH, RETAIN_BATCH, build_model, shared_model
from torch import nn

from falcon_unlearn.corpus.batching import Batch
from falcon_unlearn.errors import UserError
from falcon_unlearn.model.decoder import SplitDecoder, find_layers, replaced, scope_parameters
from falcon_unlearn.objectives.representation import cosine_retention, info_nce

TEMPERATURE = 0.7
STACKS = {"gpt_neox": "gpt_neox.layers", "gpt2": "transformer.h"}
MLP_OUTPUT = {
    "gpt_neox": ["mlp.dense_4h_to_h.weight"],
    "gpt2": ["mlp.c_proj.weight"],
    "mixtral": ["mlp.experts.down_proj"],
    "qwen3_moe": ["mlp.experts.down_proj"],
}
MLP_INPUT = {
    "gpt_neox": ["mlp.dense_h_to_4h.weight"],
    "gpt2": ["mlp.c_fc.weight"],
    "phi3": ["mlp.gate_up_proj.weight"],
    "mixtral": ["mlp.experts.gate_up_proj"],
    "qwen3_moe": ["mlp.experts.gate_up_proj"],
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def model(architecture):
    return shared_model(architecture)


def offset_vector(width):
    return torch.nn.functional.normalize(torch.randn(width, generator=torch.Generator().manual_seed(9)), dim=0)


def falcon_losses(updated, frozen, forget, retain):
    """FALCON's two losses, given two functions from a batch to target-layer activations."""
    on, kept = forget.answer_mask, retain.answer_mask
    original = frozen(forget)[on]
    forget_loss = info_nce(updated(forget)[on], offset_vector(original.shape[-1]), original[:, None], TEMPERATURE)
    return forget_loss, cosine_retention(updated(retain)[kept], frozen(retain)[kept])


def two_model_way(model, names, target, forget, retain):
    """The published loop: two whole models, every layer and the head run, gradients by ``backward``."""
    frozen, updated = copy.deepcopy(model), copy.deepcopy(model)
    trained = {name: p.requires_grad_() for name, p in updated.named_parameters() if name in names}

    def activations(which):
        return lambda batch: which(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True, use_cache=False
        ).hidden_states[target + 1]

    with torch.no_grad():
        original = {id(batch): activations(frozen)(batch) for batch in (forget, retain)}
    losses = falcon_losses(activations(updated), lambda batch: original[id(batch)], forget, retain)
    gradients = []
    for loss in losses:
        updated.zero_grad(set_to_none=True)
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in trained.items()})
    return losses, gradients


def split_way(decoder, masters, forget, retain):
    prepared = {id(batch): decoder.prepare(batch) for batch in (forget, retain)}
    losses = falcon_losses(
        lambda batch: decoder.updated(prepared[id(batch)], masters),
        lambda batch: prepared[id(batch)].frozen,
        forget,
        retain,
    )
    gradients = [dict(zip(masters, torch.autograd.grad(loss, list(masters.values())), strict=True)) for loss in losses]
    return losses, gradients


def whole_model_target(model, target, batch):
    outputs = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True, use_cache=False
    )
    return outputs.hidden_states[target + 1]


def hooks(model):
    """How many forward hooks the model has (transformers leaves its own after ``output_hidden_states``)."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("layers", [(2,), (1, 2, 3)], ids=["one", "three"])
def test_equals_two_full_models_to_the_bit(model, layers):
    decoder = SplitDecoder(model, layers, "all")
    masters = decoder.masters()
    losses, gradients = split_way(decoder, masters, FORGET_BATCH, RETAIN_BATCH)
    expected_losses, expected_gradients = two_model_way(model, set(masters), layers[-1], FORGET_BATCH, RETAIN_BATCH)
    assert [loss.item() for loss in losses] == [loss.item() for loss in expected_losses]
    for got, expected in zip(gradients, expected_gradients, strict=True):
        assert got.keys() == expected.keys()
        assert [name for name in got if not torch.equal(got[name], expected[name])] == []
    assert all(gradient.any() for name, gradient in gradients[0].items() if "k_proj.bias" not in name)


def test_stays_equal_after_an_update(model):
    """Retain gradients are zero at the original weights; away from them both losses have something to say."""
    decoder = SplitDecoder(model, (1, 2, 3), "mlp")
    masters = decoder.masters()
    with torch.no_grad():
        for value in masters.values():
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(4)))
    losses, gradients = split_way(decoder, masters, FORGET_BATCH, RETAIN_BATCH)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in masters.items():
            changed.get_parameter(name).copy_(value)
            changed.get_parameter(name).requires_grad_()
    originals = {id(b): whole_model_target(model, 3, b).detach() for b in (FORGET_BATCH, RETAIN_BATCH)}
    expected = falcon_losses(
        lambda b: whole_model_target(changed, 3, b), lambda b: originals[id(b)], FORGET_BATCH, RETAIN_BATCH
    )
    assert losses[1] > 1e-3
    for i in range(2):
        assert losses[i].item() == expected[i].item()
        changed.zero_grad(set_to_none=True)
        expected[i].backward()
        for name in masters:
            assert gradients[i][name].any()
            assert torch.equal(gradients[i][name], changed.get_parameter(name).grad)


def test_layers_between_trained_ones_stay_frozen():
    model = build_model("llama")
    decoder = SplitDecoder(model, (3, 1), "mlp")
    masters = decoder.masters()
    assert {name.split(".")[2] for name in masters} == {"1", "3"}
    losses, gradients = split_way(decoder, masters, FORGET_BATCH, RETAIN_BATCH)
    expected_losses, expected = two_model_way(model, set(masters), 3, FORGET_BATCH, RETAIN_BATCH)
    assert losses[0].item() == expected_losses[0].item()
    assert all(torch.equal(gradients[0][name], expected[0][name]) for name in masters)


def test_last_layer_can_be_the_target(model):
    last = model.config.num_hidden_layers - 1
    decoder = SplitDecoder(model, (last,), "mlp")
    seen = []
    handle = find_layers(model)[1][last].register_forward_hook(lambda m, a, out: seen.append(out))
    try:
        model(input_ids=FORGET_BATCH.input_ids, attention_mask=FORGET_BATCH.attention_mask, use_cache=False)
    finally:
        handle.remove()
    expected = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    prepared = decoder.prepare(FORGET_BATCH)
    assert torch.equal(prepared.frozen, expected)
    assert torch.equal(decoder.updated(prepared, decoder.masters()), expected)


def test_runs_the_prefix_once_and_nothing_above_the_target(model):
    counts = {}
    handles = [
        module.register_forward_pre_hook(lambda m, a, name=name: counts.update({name: counts.get(name, 0) + 1}))
        for name, module in model.named_modules()
    ]
    stack_name, stack = find_layers(model)
    try:
        decoder = SplitDecoder(model, (2, 3), "mlp")
        masters = decoder.masters()
        prepared = decoder.prepare(FORGET_BATCH)
        assert [counts.get(f"{stack_name}.{i}", 0) for i in range(len(stack))] == [1, 1, 1, 1, 0]
        counts_after_prepare = dict(counts)
        decoder.updated(prepared, masters)
    finally:
        for handle in handles:
            handle.remove()
    ran_again = {name for name in counts if counts[name] != counts_after_prepare.get(name, 0)}
    assert {name for name in ran_again if not name.startswith((f"{stack_name}.2", f"{stack_name}.3"))} == set()
    assert counts[f"{stack_name}.2"] == 2
    head = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    assert head
    assert not set(head) & set(counts)
    norms = [
        name
        for name, m in model.named_modules()
        if name.startswith(stack_name.rpartition(".")[0])
        and not list(m.children())
        and name.rpartition(".")[2] in ("norm", "final_layer_norm", "ln_f")
    ]
    assert len(norms) == 1
    assert norms[0] not in counts


def test_prepare_leaves_no_hooks_and_no_changes(model):
    before, hooks_before = {name: value.clone() for name, value in model.state_dict().items()}, hooks(model)
    decoder = SplitDecoder(model, (1, 2), "all")
    masters = decoder.masters()
    loss = decoder.updated(decoder.prepare(FORGET_BATCH), masters).square().sum()
    torch.autograd.backward(loss)
    with torch.no_grad():
        for value in masters.values():
            value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert hooks(model) == hooks_before
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_hooks_go_when_the_forward_fails():
    model = build_model("llama")
    bad = dataclasses.replace(FORGET_BATCH, input_ids=FORGET_BATCH.input_ids + 10_000)
    with pytest.raises(IndexError):
        SplitDecoder(model, (1,), "mlp").prepare(bad)
    assert hooks(model) == 0


def test_padding_does_not_change_what_counts(model):
    def widened(value, fill):
        return torch.nn.functional.pad(value, (0, 7), value=fill)

    wide = Batch(
        widened(FORGET_BATCH.input_ids, 5),
        widened(FORGET_BATCH.attention_mask, 0),
        widened(FORGET_BATCH.answer_mask, fill=False),
        widened(FORGET_BATCH.content_mask, fill=False),
    )
    decoder = SplitDecoder(model, (1, 2, 3), "mlp")
    narrow = decoder.prepare(FORGET_BATCH).frozen[FORGET_BATCH.loss_mask("all")]
    torch.testing.assert_close(decoder.prepare(wide).frozen[wide.loss_mask("all")], narrow, atol=1e-5, rtol=1e-5)


def test_bf16_model_trains_fp32_masters(architecture):
    model = build_model(architecture).to(torch.bfloat16)
    decoder = SplitDecoder(model, (1, 2), "all")
    masters = decoder.masters()
    assert all(m.dtype == torch.float32 and m.is_leaf and m.requires_grad for m in masters.values())
    assert all(torch.equal(m.detach().bfloat16(), model.get_parameter(n)) for n, m in masters.items())
    prepared = decoder.prepare(FORGET_BATCH)
    assert prepared.frozen.dtype == torch.bfloat16
    assert torch.equal(decoder.updated(prepared, masters), prepared.frozen)
    losses, gradients = split_way(decoder, masters, FORGET_BATCH, RETAIN_BATCH)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for part in gradients for g in part.values())
    assert any(g.any() for g in gradients[0].values())


def test_parameters_kept_in_fp32_stay_so():
    """Some models keep norms or routers in fp32 inside a bf16 model: masters take the dtype of each parameter."""
    model = build_model("gpt2").to(torch.bfloat16)
    model.transformer.h[1].mlp.float()
    block = model.transformer.h[1].mlp
    block.register_forward_pre_hook(lambda m, args: (args[0].float(),))
    block.register_forward_hook(lambda m, args, out: out.bfloat16())
    decoder = SplitDecoder(model, (1,), "mlp")
    prepared = decoder.prepare(FORGET_BATCH)
    assert torch.equal(decoder.updated(prepared, decoder.masters()), prepared.frozen)


def test_finds_the_stack(architecture, model):
    name, stack = find_layers(model)
    assert name == STACKS.get(architecture, "model.layers")
    assert len(stack) == model.config.num_hidden_layers


def test_as_many_experts_as_layers_do_not_hide_the_stack():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.attention = nn.Linear(8, 8)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Experts() for _ in range(3))
            self.config = type(
                "C", (), {"get_text_config": lambda self, decoder: type("T", (), {"num_hidden_layers": 3})}
            )()

    assert find_layers(Model())[0] == "blocks"


def test_unknown_architecture_is_refused():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.LSTM(8, 8, num_layers=3)
            self.config = type(
                "C", (), {"get_text_config": lambda self, decoder: type("T", (), {"num_hidden_layers": 3})}
            )()

    with pytest.raises(UserError, match="no stack of 3 decoder layers found in Recurrent"):
        find_layers(Recurrent())


class TestScope:
    def test_mlp_holds_its_matrices_and_no_router(self, architecture, model):
        layer = find_layers(model)[1][2]
        inputs = MLP_INPUT.get(architecture, ["mlp.gate_proj.weight", "mlp.up_proj.weight"])
        outputs = MLP_OUTPUT.get(architecture, ["mlp.down_proj.weight"])
        assert set(scope_parameters(layer, "mlp")) == {*inputs, *outputs}
        assert scope_parameters(layer, "down_proj") == outputs

    def test_scopes_divide_the_matrices(self, architecture, model, request):
        layer = find_layers(model)[1][2]
        parameters = dict(layer.named_parameters())
        mlp, attention = set(scope_parameters(layer, "mlp")), set(scope_parameters(layer, "attention"))
        rest = {n for n, p in parameters.items() if p.ndim >= 2} - mlp - attention
        assert not mlp & attention
        assert all("attn" in n or "attention" in n for n in attention)
        assert rest == ({"mlp.gate.weight"} if architecture in ("mixtral", "qwen3_moe") else set())
        assert scope_parameters(layer, "all") == list(parameters)

    def test_endings_are_taken_exactly(self):
        layer = build_model("llama").model.layers[0]
        assert scope_parameters(layer, ["self_attn.o_proj", "up_proj"]) == [
            "self_attn.o_proj.weight",
            "mlp.up_proj.weight",
        ]
        assert scope_parameters(layer, ("input_layernorm",)) == ["input_layernorm.weight"]

    def test_a_list_may_name_groups(self):
        layer = build_model("llama").model.layers[0]
        assert set(scope_parameters(layer, ["mlp", "o_proj"])) == {
            *scope_parameters(layer, "mlp"),
            "self_attn.o_proj.weight",
        }

    @pytest.mark.parametrize("modules", ["downproj", ["o_project"], []])
    def test_no_match_says_what_there_is(self, modules):
        with pytest.raises(
            UserError, match=r"training\.modules: .* matches nothing in LlamaDecoderLayer: self_attn\.q_proj"
        ):
            SplitDecoder(build_model("llama"), (1,), modules)

    def test_names_are_the_models_own(self, model):
        decoder = SplitDecoder(model, (1, 3), "all")
        parameters = dict(model.named_parameters())
        assert set(decoder.parameter_names) <= set(parameters)
        assert list(decoder.masters()) == list(decoder.parameter_names)
        assert all(torch.equal(m, parameters[n]) for n, m in decoder.masters().items())
        assert decoder.hidden_size == 32


class TestReplaced:
    def test_computes_with_the_masters_inside_and_restores_after(self, model):
        decoder = SplitDecoder(model, (1, 2), "mlp")
        masters = {name: value + 0.1 for name, value in decoder.masters().items()}
        before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
        prepared = decoder.prepare(FORGET_BATCH)
        with replaced(model, masters):
            inside = whole_model_target(model, 2, FORGET_BATCH)
            assert torch.equal(inside, decoder.updated(prepared, masters))
        assert not torch.equal(inside, prepared.frozen)
        for name, parameter in model.named_parameters():
            assert parameter.data_ptr() == before[name][0]
            assert torch.equal(parameter, before[name][1])

    def test_restores_after_an_error(self):
        model = build_model("llama")
        name = "model.layers.1.mlp.up_proj.weight"
        before = model.get_parameter(name).clone()

        def fail():
            assert not model.get_parameter(name).any()
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError), replaced(model, {name: torch.zeros_like(before)}):
            fail()
        assert torch.equal(model.get_parameter(name), before)

    def test_takes_the_models_dtype(self):
        model = build_model("llama").to(torch.bfloat16)
        masters = SplitDecoder(model, (1,), "mlp").masters()
        with replaced(model, masters):
            assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

    def test_unknown_name_changes_nothing(self):
        model = build_model("llama")
        name = "model.layers.1.mlp.up_proj.weight"
        before = model.get_parameter(name).clone()
        with pytest.raises(KeyError), replaced(model, {name: torch.zeros_like(before), "nowhere": torch.zeros(1)}):
            pass
        assert torch.equal(model.get_parameter(name), before)
