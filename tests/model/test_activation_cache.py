import copy

import pytest
import torch
from tiny_models import ARCHITECTURES, build_model, random_records, shared_model

from falcon_unlearn.corpus.batching import Encoded, collate
from falcon_unlearn.model.activation_cache import ActivationCache, record_key
from falcon_unlearn.model.activation_store import ActivationStore
from falcon_unlearn.model.decoder import SplitDecoder
from falcon_unlearn.model.loading import ModelSource
from falcon_unlearn.model.skeleton import open_skeleton
from falcon_unlearn.model.streaming import stream_activations
from falcon_unlearn.selection.activations import layer_means, streamed_layer_means

RECORDS = random_records(5, (9, 17, 13, 6, 11, 17))
LAYERS = (2, 3)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


def kept(model, tmp_path, records=RECORDS, budget=float("inf"), modules="mlp"):
    decoder = SplitDecoder(model, LAYERS, modules)
    decoder.keep(ActivationCache(ActivationStore(tmp_path / "activations", budget)), records, pad_id=0, batch_size=4)
    return decoder


def moved(masters):
    generator = torch.Generator().manual_seed(3)
    return {
        name: (value.detach() + 0.05 * torch.randn(value.shape, generator=generator)).requires_grad_()
        for name, value in masters.items()
    }


def step(decoder, masters, batch):
    prepared = decoder.prepare(batch)
    on = batch.content_mask
    loss = (decoder.updated(prepared, masters)[on] - 0.5 * prepared.frozen[on]).square().sum()
    return torch.autograd.grad(loss, list(masters.values()))


def test_cached_gradients_are_those_of_the_whole_way(architecture, tmp_path):
    """In a batch padded otherwise than the cache's, rounding differs; nothing else does."""
    model = shared_model(architecture)
    plain, cached = SplitDecoder(model, LAYERS, "mlp"), kept(model, tmp_path)
    masters = moved(plain.masters())
    batch = collate([RECORDS[i] for i in (3, 1, 4)], pad_id=5)
    for got, expected in zip(step(cached, masters, batch), step(plain, masters, batch), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_batch_as_the_cache_was_filled_gives_the_same_bits(architecture, tmp_path):
    model = shared_model(architecture)
    records = random_records(6, (12, 12, 12))
    plain, cached = SplitDecoder(model, LAYERS, "all"), kept(model, tmp_path, records, modules="all")
    masters = moved(plain.masters())
    batch = collate(records, pad_id=0)
    assert all(map(torch.equal, step(cached, masters, batch), step(plain, masters, batch)))


@pytest.mark.parametrize("budget", [0, 3000])
def test_on_disk_it_holds_the_same_bits_as_in_memory(tmp_path, budget):
    model = shared_model("llama")
    batch = collate(RECORDS[:4], pad_id=0)
    in_memory, on_disk = kept(model, tmp_path / "a"), kept(model, tmp_path / "b", budget=budget)
    assert (tmp_path / "b" / "activations").exists()
    masters = moved(in_memory.masters())
    assert all(map(torch.equal, step(on_disk, masters, batch), step(in_memory, masters, batch)))


@pytest.mark.parametrize("budget", [0, 3000, float("inf")])
def test_batches_that_were_fetched_ahead_are_the_same_bits(tmp_path, budget):
    """Whatever is then read of them, in whatever cuts, and however often."""
    model, device = shared_model("llama"), torch.device("cpu")
    decoder, late = kept(model, tmp_path / "a", budget=budget), kept(model, tmp_path / "b")
    cache = ActivationCache(ActivationStore(tmp_path / "c" / "activations", budget))
    decoder.keep(cache, RECORDS, pad_id=0, batch_size=4)
    masters = moved(decoder.masters())
    for batches in ([RECORDS[:3], RECORDS[2:]], [RECORDS[4:], RECORDS[:1]]):
        cache.fetch_ahead(batches, device)
        for records in (batches[1][:1], batches[0], batches[0][1:], batches[1], RECORDS):
            batch = collate(records, pad_id=0)
            assert all(map(torch.equal, step(decoder, masters, batch), step(late, masters, batch)))


def test_what_was_fetched_ahead_is_read_once_from_there_and_then_from_the_store(tmp_path, monkeypatch):
    store, device = ActivationStore(tmp_path / "activations"), torch.device("cpu")
    cache = ActivationCache(store)
    SplitDecoder(shared_model("llama"), LAYERS, "mlp").keep(cache, RECORDS, pad_id=0, batch_size=4)
    asked, get = [], store.get
    monkeypatch.setattr(store, "get", lambda key: (asked.append(key), get(key))[1])
    cache.fetch_ahead([RECORDS[:2], RECORDS[2:3]], device)
    assert len(asked) == 6
    assert {key.split()[1] for key in asked} == {record_key(record) for record in RECORDS[:3]}
    cache.read("input", RECORDS[:3], 17, device)
    assert len(asked) == 6
    cache.read("input", RECORDS[:3], 17, device)
    assert len(asked) == 9


def test_a_cache_file_that_holds_a_part_is_completed_from_the_model(tmp_path):
    """Wherever memory ran out while it was filled: what was in memory is gone, and computed again."""
    model = shared_model("llama")
    batch = collate(RECORDS[:5], pad_id=0)
    whole = kept(model, tmp_path / "whole")
    masters = moved(whole.masters())
    expected = step(whole, masters, batch)
    for budget in range(0, 40_000, 1700):
        first = ActivationStore(tmp_path / str(budget), budget)
        SplitDecoder(model, LAYERS, "mlp").keep(ActivationCache(first), RECORDS, pad_id=0, batch_size=4)
        if not first.bytes_on_disk:
            break
        first.seal("same")
        again = ActivationStore(tmp_path / str(budget), budget)
        assert again.reopen("same")
        decoder = SplitDecoder(model, LAYERS, "mlp")
        decoder.keep(ActivationCache(again), RECORDS, pad_id=0, batch_size=4)
        assert all(map(torch.equal, step(decoder, masters, batch), expected))
    else:
        pytest.fail("no budget was enough")


@pytest.mark.parametrize("architecture", ["bloom", "gptj", "gpt_neo"])
def test_layers_that_return_a_tuple_are_bypassed_too(architecture, tmp_path):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    sizes = {
        "bloom": {"hidden_size": 32, "n_layer": 6, "n_head": 4},
        "gptj": {"n_embd": 32, "n_layer": 6, "n_head": 4, "rotary_dim": 4, "n_positions": 64},
        "gpt_neo": {"hidden_size": 32, "num_layers": 6, "num_heads": 4, "attention_types": [[["global", "local"], 3]],
                    "max_position_embeddings": 64},
    }  # fmt: skip
    torch.manual_seed(0)
    config = CONFIG_MAPPING[architecture](vocab_size=67, **sizes[architecture])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    plain = SplitDecoder(model, (4,), "mlp")
    masters = moved(plain.masters())
    batch = collate(RECORDS[:3], pad_id=0)
    expected = step(plain, masters, batch)
    store = ActivationStore(tmp_path / "activations", 0)
    decoder = SplitDecoder(model, (4,), "mlp")
    decoder.keep(ActivationCache(store), RECORDS[:3], pad_id=0, batch_size=3)
    assert all(map(torch.equal, step(decoder, masters, batch), expected))
    store.seal("same")
    reopened = ActivationStore(tmp_path / "activations", 0)
    assert reopened.reopen("same")
    other = SplitDecoder(model, (4,), "mlp")
    other.keep(ActivationCache(reopened), RECORDS[:3], pad_id=0, batch_size=3)
    assert all(map(torch.equal, step(other, masters, batch), expected))
    model.save_pretrained(tmp_path / "model")
    source = ModelSource("tiny", tmp_path / "model", torch.device("cpu"), torch.float32)
    settings = {"mask": "answer", "pad_id": 0, "batch_size": 3}
    streamed = streamed_layer_means(
        open_skeleton(source), RECORDS, (5, 1), store=ActivationStore(tmp_path / "spill", 0), **settings
    )
    assert all(map(torch.equal, streamed, layer_means(model, RECORDS, (5, 1), **settings)))


def test_the_frozen_layers_do_not_run_again(tmp_path):
    model = build_model("llama")
    decoder = kept(model, tmp_path)
    masters, ran = moved(decoder.masters()), []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, a, out: ran.append(m))
    batch = collate(RECORDS[:2], pad_id=0)
    decoder.prepare(batch)
    assert ran == []
    step(decoder, masters, batch)
    inside = {id(m) for layer in model.model.layers[2:4] for m in layer.modules()}
    assert ran
    assert {id(m) for m in ran} <= inside


def test_records_that_are_not_cached_are_computed(tmp_path):
    model = shared_model("llama")
    decoder, plain = kept(model, tmp_path, RECORDS[:3]), SplitDecoder(model, LAYERS, "mlp")
    batch = collate([RECORDS[0], RECORDS[5]], pad_id=0)
    assert torch.equal(decoder.prepare(batch).frozen, plain.prepare(batch).frozen)


def test_a_record_is_known_by_its_tokens_alone():
    record = RECORDS[0]
    assert record_key(record) == record_key(Encoded(record.ids, 1, 1))
    changed = [Encoded((*record.ids[:i], record.ids[i] + 1, *record.ids[i + 1 :]), 3) for i in range(len(record))]
    others = [*changed, Encoded(record.ids[:-1], 3), Encoded((*record.ids, 0), 3)]
    assert len({record_key(r) for r in [record, *others]}) == len(others) + 1


def test_a_released_model_still_trains_to_the_same_bits(architecture, tmp_path):
    model = build_model(architecture)
    decoder, whole = kept(copy.deepcopy(model), tmp_path / "a"), kept(model, tmp_path / "b")
    masters = moved(decoder.masters())
    decoder.release()
    on_meta = {name for name, p in decoder.model.named_parameters() if p.is_meta}
    assert set(decoder.parameter_names) <= on_meta
    assert {name for name, _ in decoder.model.named_parameters() if f"{decoder.stack_name}.1." in name} <= on_meta
    batch = collate([RECORDS[i] for i in (2, 0)], pad_id=0)
    assert all(map(torch.equal, step(decoder, masters, batch), step(whole, masters, batch)))


@pytest.mark.parametrize("budget", [0, float("inf")])
def test_filled_by_streaming_it_trains_to_the_same_bits(architecture, tmp_path, budget):
    """With nothing but the trained layers ever in memory together."""
    model = build_model(architecture)
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    skeleton = open_skeleton(ModelSource("tiny", tmp_path / "model", torch.device("cpu"), torch.float32))
    cache = ActivationCache(ActivationStore(tmp_path / "activations", budget))
    between = ActivationStore(tmp_path / "between", budget)
    as_tuple = stream_activations(skeleton, LAYERS, RECORDS, cache, between, pad_id=0, batch_size=4)
    assert all(p.is_meta for p in skeleton.stack.parameters())
    for layer in LAYERS:
        skeleton.load(layer)
    decoder, resident = SplitDecoder(skeleton.model, LAYERS, "mlp"), kept(model, tmp_path / "resident")
    decoder.rely_on(cache, as_tuple=as_tuple)
    masters = moved(resident.masters())
    own = dict(zip(decoder.parameter_names, masters.values(), strict=True))
    decoder.release()
    for indices in ((2, 0), (1, 3, 4, 5)):
        batch = collate([RECORDS[i] for i in indices], pad_id=0)
        assert all(map(torch.equal, step(decoder, own, batch), step(resident, masters, batch)))


class TestIdentity:
    def test_depends_on_the_weights_below_and_in_the_target_only(self):
        model = build_model("llama")
        before = SplitDecoder(model, (1,), "mlp").identity()
        assert SplitDecoder(build_model("llama"), (1,), "mlp").identity() == before
        with torch.no_grad():
            model.model.layers[2].mlp.up_proj.weight[0, 0] += 1
        assert SplitDecoder(model, (1,), "mlp").identity() == before
        for layer in (0, 1):
            with torch.no_grad():
                model.model.layers[layer].self_attn.q_proj.weight[3, 2] += 1
            after = SplitDecoder(model, (1,), "mlp").identity()
            assert after != before
            before = after

    def test_depends_on_the_layers_and_the_dtype(self):
        model = shared_model("llama")
        found = {SplitDecoder(model, layers, "mlp").identity() for layers in ((1,), (2,), (1, 2))}
        found.add(SplitDecoder(build_model("llama").bfloat16(), (1,), "mlp").identity())
        assert len(found) == 4
