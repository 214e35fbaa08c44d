import sys

import pytest
import torch
from model.tiny_models import FORGET_BATCH, LAYERS, MIXTURES, RETAIN_BATCH, build_model
from pydantic import ValidationError

from falcon_unlearn.engine.gradient_conflict import GradientConfig
from falcon_unlearn.engine.optimizers import OptimizerConfig
from falcon_unlearn.engine.trainer import TrainingConfig, TrainingData, train
from falcon_unlearn.errors import UserError
from falcon_unlearn.methods import GradDiff, GradDiffConfig, Rmu, RmuConfig, Setup, WholeModel, WholeSetup
from falcon_unlearn.model.decoder import SplitDecoder, replaced
from falcon_unlearn.model.disk_names import to_disk
from falcon_unlearn.model.lora import ADAPTER_TENSORS, LoraConfig, add_adapters, linear_modules
from falcon_unlearn.model.shards import tensor_spans

peft = pytest.importorskip("peft")

KINDS = ("llama", "gpt2", "gemma2", "phi3", "gpt_neox")
EVERY = range(LAYERS)
CONFIG = LoraConfig(rank=3, alpha=12)


def logits(model, batch=FORGET_BATCH):
    with torch.no_grad():
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits


def random_masters(adapters, seed=5):
    """As after training: no adapter is zero."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(adapters.model.named_parameters())
    return {
        f"{name}.{part}.weight": 0.2 * torch.randn(parameters[f"{name}.{part}.weight"].shape, generator=generator)
        for name in adapters.modules
        for part in ADAPTER_TENSORS
    }


@pytest.mark.parametrize("architecture", KINDS)
def test_a_fresh_adapter_changes_no_bit_and_removing_it_leaves_no_trace(architecture):
    model = build_model(architecture)
    before, weights = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    adapters = add_adapters(model, CONFIG, EVERY, "all", seed=0)
    assert torch.equal(logits(model), before)
    assert adapters.model is model
    assert not any(p.requires_grad for p in model.parameters())
    adapters.remove()
    assert torch.equal(logits(model), before)
    after = dict(model.named_parameters())
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    add_adapters(model, CONFIG, [1], "mlp", seed=0)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_of_a_narrow_model_are_wide_and_change_no_bit(dtype):
    model = build_model("llama").to(dtype)
    before = logits(model)
    add_adapters(model, CONFIG, EVERY, "all", seed=0)
    assert torch.equal(logits(model), before)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}


def test_the_random_half_follows_from_the_seed_and_the_global_generator_is_left_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    drawn = []
    for seed in (7, 7, 8):
        model = build_model("llama")
        torch.manual_seed(1)
        adapters = add_adapters(model, CONFIG, [1, 3], "mlp", seed=seed)
        assert torch.equal(torch.rand(3), expected)
        drawn.append(model.get_submodule(adapters.modules[0]).lora_A["default"].weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("modules", ["mlp", "attention", "all", ("q_proj", "down_proj")])
def test_the_scope_is_the_matrices_in_the_recipes_words(modules):
    model = build_model("llama")
    words = {
        "mlp": {"gate_proj", "up_proj", "down_proj"},
        "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
        ("q_proj", "down_proj"): {"q_proj", "down_proj"},
    }
    words["all"] = words["mlp"] | words["attention"]
    names = linear_modules(model, [3, 1], modules)
    assert {name.rsplit(".", 1)[1] for name in names} == words[modules]
    assert {name.split(".")[2] for name in names} == {"1", "3"}
    assert len(names) == 2 * len(words[modules])
    adapters = add_adapters(model, CONFIG, [3, 1], modules, seed=0)
    assert list(adapters.modules) == names
    trained = set(WholeModel(model, [1, 3], ADAPTER_TENSORS).parameter_names)
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert trained == set(random_masters(adapters))


@pytest.mark.parametrize("architecture", KINDS)
def test_merged_weights_equal_the_formula_and_pefts_own(architecture):
    model = build_model(architecture)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    adapters = add_adapters(model, CONFIG, [0, 2, 4], "all", seed=0)
    masters = random_masters(adapters)
    merged = adapters.merged(masters)
    with replaced(model, masters):
        adapted = logits(model)
    assert (adapted - logits(model)).abs().max() > 0.1
    for name in adapters.modules:
        b, a = (masters[f"{name}.lora_{part}.default.weight"].double() for part in "BA")
        change = 4.0 * (b @ a)
        change = change.T if architecture == "gpt2" else change
        expected = weights[f"{name}.weight"].double() + change
        torch.testing.assert_close(merged[f"{name}.weight"].double(), expected, rtol=1e-5, atol=1e-6)
    assert set(merged) == {f"{name}.weight" for name in adapters.modules} == set(adapters.originals())
    assert all(torch.equal(value, weights[name]) for name, value in adapters.originals().items())

    parameters = dict(model.named_parameters())
    for name, value in masters.items():
        parameters[name].copy_(value)
    theirs = dict(adapters.peft_model.merge_and_unload().named_parameters())
    for name, value in weights.items():
        torch.testing.assert_close(merged.get(name, value), theirs[name])
    plain = build_model(architecture)
    with replaced(plain, merged):
        torch.testing.assert_close(logits(plain), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", [*KINDS, "mixtral"])
def test_merged_weights_are_found_on_disk_while_adapters_are_in(architecture, tmp_path):
    build_model(architecture).save_pretrained(tmp_path)
    model = type(build_model(architecture)).from_pretrained(tmp_path)
    adapters = add_adapters(model, CONFIG, [1], "attention", seed=0)
    spans = tensor_spans(tmp_path)
    found = to_disk(model, adapters.merged(random_masters(adapters)), spans)
    assert len(found) == len(adapters.modules)
    assert all(tuple(value.shape) == spans[name].shape for name, value in found.items())


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_folder_gives_the_same_logits_through_peft(architecture, dtype, tmp_path):
    model = build_model(architecture).to(dtype)
    adapters = add_adapters(model, CONFIG, EVERY, "all", seed=0)
    masters = random_masters(adapters)
    with replaced(model, masters):
        expected = logits(model)
    adapters.save(tmp_path / "adapter", masters, "some/model")
    loaded = peft.PeftModel.from_pretrained(build_model(architecture).to(dtype), tmp_path / "adapter")
    assert torch.equal(logits(loaded), expected)
    assert loaded.peft_config["default"].base_model_name_or_path == "some/model"
    first = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    assert first.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    adapters.save(tmp_path / "adapter", masters, "some/model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == first


def test_the_folder_of_a_model_without_its_head_fits_the_whole_one(tmp_path):
    adapters = add_adapters(build_model("llama").model, CONFIG, [1, 2], "mlp", seed=0)
    masters = random_masters(adapters)
    adapters.save(tmp_path, masters, "some/model")
    loaded = peft.PeftModel.from_pretrained(build_model("llama"), tmp_path)
    whole = build_model("llama")
    with replaced(whole, {f"model.{name}": value for name, value in adapters.merged(masters).items()}):
        torch.testing.assert_close(logits(loaded), logits(whole), rtol=1e-4, atol=1e-4)


def data():
    return TrainingData({"forget": FORGET_BATCH.records}, {"retain": RETAIN_BATCH.records}, 0, torch.device("cpu"))


def settings(steps, **changes):
    return TrainingConfig(
        steps=steps, batch_size=3, optimizer=OptimizerConfig(lr=1e-2), gradients=GradientConfig(**changes)
    )


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("combination", ["sum", "falcon", "pcgrad"])
def test_every_adapter_moves_and_nothing_else_does(architecture, combination):
    """At B = 0 the gradient of A is zero: B moves with the first step, A from the second."""
    model = build_model(architecture)
    adapters = add_adapters(model, CONFIG, EVERY, "all", seed=0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    original = logits(model)
    whole = WholeModel(model, EVERY, ADAPTER_TENSORS)
    batches = data()
    setup = WholeSetup(whole, batches.first_batches(3), {}, "answer", 0, 0)
    method = GradDiff(GradDiffConfig(), setup)
    for steps, moved in ((1, ("lora_B",)), (3, ("lora_A", "lora_B"))):
        masters = whole.masters()
        train(method, masters, batches, settings(steps, combination=combination), seed=0, hidden_size=32)
        for name, value in masters.items():
            assert torch.equal(value, before[name]) != any(part in name for part in moved), name
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model), original)
    with replaced(model, masters):
        assert (logits(model) - original).abs().max() > 1e-2
    assert all((value != adapters.originals()[name]).any() for name, value in adapters.merged(masters).items())


def test_gradients_are_those_of_the_formula():
    """dB = s G A', dA = s B' G for G the gradient with respect to the merged weight."""
    model, plain = build_model("llama"), build_model("llama")
    adapters = add_adapters(model, CONFIG, [1, 3], "mlp", seed=0)
    masters = {name: value.requires_grad_() for name, value in random_masters(adapters).items()}
    merged = {name: value.requires_grad_() for name, value in adapters.merged(masters).items()}

    def loss(whole, tensors):
        found = whole.predictions(FORGET_BATCH, "answer", tensors)
        return found.log_probabilities().sum()

    gradients = torch.autograd.grad(loss(WholeModel(model, [1, 3], ADAPTER_TENSORS), masters), [*masters.values()])
    gradients = dict(zip(masters, gradients, strict=True))
    full = torch.autograd.grad(loss(WholeModel(plain, [1, 3], "mlp"), merged), [*merged.values()])
    for name, g in zip(adapters.modules, full, strict=True):
        a, b = (f"{name}.{part}.weight" for part in ADAPTER_TENSORS)
        torch.testing.assert_close(gradients[b], 4 * g @ masters[a].T, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(gradients[a], 4 * masters[b].T @ g, rtol=1e-3, atol=1e-4)


def test_a_released_model_still_merges_and_saves(tmp_path):
    model = build_model("llama")
    adapters = add_adapters(model, CONFIG, EVERY, "mlp", seed=0)
    masters = random_masters(adapters)
    expected = adapters.merged(masters)
    WholeModel(model, EVERY, ADAPTER_TENSORS).release()
    assert all(torch.equal(value, expected[name]) for name, value in adapters.merged(masters).items())
    adapters.save(tmp_path, masters, "some/model")
    peft.PeftModel.from_pretrained(build_model("llama"), tmp_path)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_split_decoder_trains_adapters_too(architecture):
    model = build_model(architecture)
    plain = SplitDecoder(build_model(architecture), (1, 3), "mlp")
    adapters = add_adapters(model, CONFIG, (1, 3), "mlp", seed=0)
    decoder = SplitDecoder(model, (1, 3), ADAPTER_TENSORS)
    prepared = decoder.prepare(FORGET_BATCH)
    original = plain.prepare(FORGET_BATCH)
    assert torch.equal(prepared.frozen, original.frozen)
    masters = random_masters(adapters)
    torch.testing.assert_close(
        decoder.updated(prepared, masters), plain.updated(original, adapters.merged(masters)), rtol=1e-4, atol=1e-4
    )
    batches = data()
    method = Rmu(RmuConfig(), Setup(decoder, batches.first_batches(3), "answer", 0))
    trained = decoder.masters()
    before = {name: value.detach().clone() for name, value in trained.items()}
    train(method, trained, batches, settings(3), seed=0, hidden_size=32)
    assert len(trained) == 2 * len(adapters.modules)
    assert not any(torch.equal(value, before[name]) for name, value in trained.items())


@pytest.mark.parametrize("architecture", MIXTURES)
def test_fused_experts_are_refused_in_one_line(architecture):
    model = build_model(architecture)
    with pytest.raises(
        UserError, match=r"^training.lora: mlp.experts.gate_up_proj belongs to .*Experts.*\(such as att"
    ):
        add_adapters(model, CONFIG, [1], "mlp", seed=0)
    assert not any("lora" in name for name, _ in model.named_parameters())
    add_adapters(model, CONFIG, [1], "attention", seed=0)


def test_vectors_alone_are_refused():
    with pytest.raises(
        UserError, match=r"^training.lora: there is no matrix in training.modules \('input_layernorm',\)"
    ):
        add_adapters(build_model("llama"), CONFIG, [1], ("input_layernorm",), seed=0)


def test_without_peft_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'falcon-unlearn\[lora\]'"):
        add_adapters(build_model("llama"), CONFIG, [1], "mlp", seed=0)


@pytest.mark.parametrize("bad", [{"rank": 0}, {"alpha": 0}, {"r": 8}], ids=str)
def test_unusable_settings_are_refused(bad):
    with pytest.raises(ValidationError):
        LoraConfig.model_validate(bad)
