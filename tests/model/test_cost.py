import gc

import pytest
import torch
from tiny_models import ARCHITECTURES, FORGET_BATCH, MIXTURES, RETAIN_BATCH, build_model, shared_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING

from falcon_unlearn.errors import UserError
from falcon_unlearn.model.cost import (
    EXTRA_FLOPS,
    BatchShape,
    Meter,
    blueprint,
    generation_peak,
    head_flops,
    layers_flops,
    metered,
    scoring_peak,
    shape_of,
    step_flops,
    step_memory,
    tensor_bytes,
)
from falcon_unlearn.model.decoder import SplitDecoder, find_layers

FORGET, RETAIN = (shape_of(batch, batch.content_mask) for batch in (FORGET_BATCH, RETAIN_BATCH))
LAYERS = (2, 3)


def config_of(architecture):
    return CONFIG_MAPPING[architecture](**ARCHITECTURES[architecture])


def squares(updated, frozen):
    return (updated - frozen).square().mean() + updated.square().mean()


def adam(masters):
    return torch.optim.AdamW(masters, foreach=False)


def counter():
    return FlopCounterMode(display=False, custom_mapping=dict(EXTRA_FLOPS))


def real_loss(decoder, masters, batch):
    counted = batch.content_mask
    prepared = decoder.prepare(batch)
    return squares(decoder.updated(prepared, masters)[counted], prepared.frozen[counted])


def real_gradients(decoder, masters, batch):
    return torch.autograd.grad(real_loss(decoder, masters, batch), list(masters.values()), allow_unused=True)


def test_the_meter_counts_each_storage_once_while_it_is_alive():
    with Meter() as meter:
        a = torch.empty(1000)
        b = a[:500].view(5, 100)
        assert (meter.live, meter.peak) == (4000, 4000)
        c = a + 1
        assert (meter.live, meter.peak) == (8000, 8000)
        del a, c
        assert meter.live == 4000  # b is a view of it
        meter.restart_peak()
        assert meter.peak == 4000
        del b
        assert meter.live == 0
        left, right = torch.empty(7, 11), torch.empty(11, 13)
        assert meter.flops == 0
        _ = left @ right
        assert meter.flops == 2 * 7 * 11 * 13


def test_known_tensors_and_their_views_count_from_the_start():
    weight = torch.empty(10, 10)
    with Meter([weight]) as meter:
        _ = weight.t()
        assert meter.live == 400


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_bytes_of_a_blueprint_are_those_of_the_model(architecture):
    model = shared_model(architecture)
    config = config_of(architecture)
    assert tensor_bytes(blueprint(config, torch.float32)) == tensor_bytes(model)
    parameters = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in blueprint(config, torch.bfloat16).parameters()) == parameters
    before = config.to_dict()
    assert len(find_layers(blueprint(config, torch.float32, layers=2))[1]) == 2
    assert config.to_dict() == before


def test_tied_weights_count_once():
    tied, untied = (
        blueprint(CONFIG_MAPPING["llama"](**ARCHITECTURES["llama"], tie_word_embeddings=tie), torch.float32)
        for tie in (True, False)
    )
    assert tensor_bytes(untied) - tensor_bytes(tied) == tied.get_output_embeddings().weight.numel() * 4


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("length", [1, 9, 33])
def test_flops_of_a_forward_pass_are_the_counted_ones(architecture, length):
    model = shared_model(architecture)
    with counter() as counted, torch.no_grad():
        model(input_ids=torch.ones(3, length, dtype=torch.long), use_cache=False)
    whole = blueprint(config_of(architecture), torch.float32)
    assert 3 * (layers_flops(whole)(length) + length * head_flops(whole)) == counted.get_total_flops()


@pytest.mark.parametrize("architecture", MIXTURES)
def test_flops_of_a_mixture_count_the_chosen_experts(architecture):
    config = config_of(architecture)
    linear = layers_flops(blueprint(config, torch.float32)).linear
    config.num_experts_per_tok = 1
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    expert = 3 * 2 * config.hidden_size * width
    assert linear - layers_flops(blueprint(config, torch.float32)).linear == config.num_hidden_layers * expert


def test_flops_of_a_next_token_with_a_cache_are_the_counted_ones():
    model = shared_model("llama")
    flops = layers_flops(blueprint(config_of("llama"), torch.float32))
    ids = torch.ones(1, 12, dtype=torch.long)
    with torch.no_grad():
        cache = model.model(input_ids=ids, use_cache=True).past_key_values
        with counter() as counted:
            model.model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    assert counted.get_total_flops() == flops.next_token(13)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("modules", ["mlp", "all"])
def test_flops_of_a_training_pass_are_the_counted_ones(architecture, modules):
    decoder = SplitDecoder(shared_model(architecture), LAYERS, modules)
    masters = decoder.masters()
    with counter() as counted:
        real_gradients(decoder, masters, FORGET_BATCH)
    model = blueprint(config_of(architecture), torch.float32, layers=LAYERS[-1] + 1)
    flops = step_flops(model, LAYERS, modules, squares)
    rows, length = FORGET_BATCH.input_ids.shape
    assert rows * (flops.frozen(length) + flops.trained(length)) == counted.get_total_flops()
    with counter() as counted:
        decoder.prepare(FORGET_BATCH)
    assert rows * flops.frozen(length) == counted.get_total_flops()


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("modules", ["mlp", "all"])
def test_memory_of_a_step_is_that_of_the_real_tensors(architecture, modules):
    """The same meter, on tensors that exist: what differs is how they come about (kernels, masks, experts)."""
    model = build_model(architecture)
    model = getattr(model, model.base_model_prefix)
    decoder = SplitDecoder(model, LAYERS, modules)
    with metered(model) as meter:
        weights = meter.live
        masters = decoder.masters()
        parameters = list(masters.values())
        held = meter.live
        optimizer = adam(parameters)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with_state = meter.live
        meter.restart_peak()
        kept = [real_gradients(decoder, masters, FORGET_BATCH), real_gradients(decoder, masters, RETAIN_BATCH)]
        gc.collect()
        peak = meter.peak
        del kept
    predicted = step_memory(
        blueprint(config_of(architecture), torch.float32, layers=LAYERS[-1] + 1),
        LAYERS,
        modules,
        FORGET,
        RETAIN,
        objectives=(squares, squares),
        optimizer=adam,
    )
    assert predicted.masters == held - weights
    assert predicted.optimizer == with_state - held
    assert predicted.phase == "retain"
    assert predicted.gradients == predicted.masters
    assert predicted.peak - predicted.weights == pytest.approx(peak - weights, rel=0.05)


def predicted_step(dtype=torch.float32, forget=FORGET, **changes):
    model = blueprint(config_of("llama"), dtype, layers=LAYERS[-1] + 1)
    return step_memory(model, LAYERS, "mlp", forget, RETAIN, objectives=(squares, squares), optimizer=adam, **changes)


def test_cached_activations_make_prefix_and_originals_unnecessary():
    without, cached = predicted_step(), predicted_step(cached=True)
    _, stack = find_layers(blueprint(config_of("llama"), torch.float32, layers=LAYERS[-1] + 1))
    assert without.weights - cached.weights == LAYERS[0] * tensor_bytes(stack[0]) + cached.masters
    model = blueprint(config_of("llama"), torch.float32, layers=LAYERS[-1] + 1)
    flops = step_flops(model, LAYERS, "mlp", squares)
    assert 0 < flops.trained.linear < flops.frozen.linear + flops.trained.linear


def test_half_precision_halves_the_weights_and_nothing_of_the_masters():
    full, half = predicted_step(), predicted_step(torch.bfloat16)
    assert half.weights < 0.51 * full.weights
    assert (half.masters, half.optimizer, half.gradients) == (full.masters, full.optimizer, full.gradients)


def test_padding_costs_a_mask_in_every_attention_that_gradients_pass():
    rows, length = 3, 17
    even, ragged = (
        predicted_step(forget=BatchShape(8 * rows, 4 * length, 100, padded)).peak for padded in (False, True)
    )
    passed = len(LAYERS) - 1  # only the MLP of the first layer is trained
    assert ragged - even >= passed * 8 * rows * (4 * length) ** 2 * 4


def test_micro_batches_keep_their_sum():
    once, summed = predicted_step(), predicted_step(micro_batches=True)
    assert summed.gradients >= once.gradients


@pytest.mark.parametrize(
    ("forget", "copies"), [(BatchShape(1, 2, 2, padded=False), 1), (BatchShape(200, 60, 12_000, padded=False), 2)]
)
def test_interpolation_holds_the_original_values_and_in_the_forget_pass_the_present_ones(forget, copies):
    without, within = predicted_step(forget=forget), predicted_step(forget=forget, interpolation=True)
    assert within.phase == without.phase == ("forget" if copies == 2 else "retain")
    assert within.interpolation == copies * within.masters
    assert within.peak == without.peak + within.interpolation
    assert without.interpolation == 0


def test_scoring_holds_weights_and_logits():
    config = CONFIG_MAPPING["llama"](**{**ARCHITECTURES["llama"], "vocab_size": 20_000})
    whole = blueprint(config, torch.float32)
    peak = scoring_peak(whole, BatchShape(4, 32, 50, padded=True))
    logits = 50 * 20_000 * 4
    assert peak >= tensor_bytes(whole) + 2 * logits
    assert peak <= tensor_bytes(whole) + 4 * logits + 500_000


def test_generation_holds_the_cache_of_keys_and_values():
    whole = blueprint(config_of("llama"), torch.float32)
    keys_and_values = 2 * config_of("llama").num_hidden_layers * 2 * 8 * 4  # a token: two heads of eight
    grown = generation_peak(whole, 4, 60) - generation_peak(whole, 4, 30)
    assert grown >= 4 * 30 * keys_and_values


def test_a_config_that_cannot_be_built_is_refused():
    config = config_of("llama")
    config.hidden_act = "no-such-function"
    with pytest.raises(UserError, match="architecture 'llama' cannot be built"):
        blueprint(config, torch.float32)
    with pytest.raises(UserError, match="it has 5 layers, 9 were asked for"):
        blueprint(config_of("llama"), torch.float32, layers=9)
