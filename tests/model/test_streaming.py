import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, FORGET_BATCH, LAYERS, RETAIN_BATCH, build_model, shared_model
from transformers import LlamaConfig, LlamaForCausalLM

from falcon_unlearn.errors import UserError
from falcon_unlearn.model.activation_store import ActivationStore
from falcon_unlearn.model.decoder import find_layers, first_tensor
from falcon_unlearn.model.loading import ModelSource
from falcon_unlearn.model.skeleton import open_skeleton
from falcon_unlearn.model.streaming import stream_layers

BATCHES = (FORGET_BATCH, RETAIN_BATCH)
CPU = torch.device("cpu")


def source_of(folder):
    return ModelSource(str(folder), folder, CPU, torch.float32)


def resident(model, batches):
    """Input and output of every layer, by hooks on the whole model."""
    seen = {}
    _, stack = find_layers(model)
    for number, batch in enumerate(batches):
        handles = []
        for index, layer in enumerate(stack):

            def keep(module, args, kwargs, output, key=(index, number)):
                before = args[0] if args else kwargs["hidden_states"]
                seen[key] = (before.clone(), first_tensor(output).clone())

            handles.append(layer.register_forward_hook(keep, with_kwargs=True))
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        for handle in handles:
            handle.remove()
    return seen


@pytest.mark.parametrize("budget", [0, float("inf")])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equal_to_the_resident_way_to_the_bit(architecture, budget, tmp_path):
    model = shared_model(architecture)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    skeleton, seen = open_skeleton(source_of(tmp_path)), {}
    store = ActivationStore(tmp_path / "hidden", budget)

    def visit(layer, number, before, after):
        assert (layer, number) not in seen
        seen[layer, number] = (before.clone(), after.clone())
        real = [i for i, part in enumerate(skeleton.stack) if not any(p.is_meta for p in part.parameters())]
        assert real == [layer]

    stream_layers(skeleton, BATCHES, LAYERS - 1, visit, store)
    expected = resident(model.base_model, BATCHES)
    assert list(seen) == [(layer, number) for layer in range(LAYERS) for number in range(len(BATCHES))]
    for key, pair in expected.items():
        assert all(torch.equal(got, wanted) for got, wanted in zip(seen[key], pair, strict=True)), key
    assert not any(value.requires_grad for pair in seen.values() for value in pair)
    assert all(p.is_meta for p in skeleton.stack.parameters())
    assert (store.bytes_on_disk > 0) == (budget == 0)


def test_it_stops_at_the_last_layer_and_starts_afresh(tmp_path):
    model = build_model("llama")
    model.save_pretrained(tmp_path)
    skeleton, store = open_skeleton(source_of(tmp_path)), ActivationStore(tmp_path / "hidden")
    expected, seen = resident(model.base_model, BATCHES), {}
    for last in (2, 0, 1):  # one store for all: what an earlier pass left in it is not used
        seen.clear()
        stream_layers(
            skeleton, BATCHES, last, lambda layer, number, _, after: seen.update({(layer, number): after}), store
        )
        assert {layer for layer, _ in seen} == set(range(last + 1))
        assert all(torch.equal(after, expected[key][1]) for key, after in seen.items())


def test_a_truncated_shard_is_refused_and_nothing_is_left_behind(tmp_path):
    build_model("llama").save_pretrained(tmp_path, max_shard_size="12KB")
    files = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    path = tmp_path / files["model.layers.2.mlp.up_proj.weight"]
    assert load_file(path)
    path.write_bytes(path.read_bytes()[:-1])
    skeleton, visited = open_skeleton(source_of(tmp_path)), set()
    with pytest.raises(UserError, match=r"is truncated .*: get the file again$") as caught:
        stream_layers(skeleton, BATCHES, 4, lambda layer, *_: visited.add(layer), ActivationStore(tmp_path / "hidden"))
    assert "\n" not in str(caught.value)
    assert visited == {0, 1}
    assert all(p.is_meta for p in skeleton.stack.parameters())


def test_an_error_of_the_visitor_leaves_the_model_as_it_was(tmp_path):
    build_model("llama").save_pretrained(tmp_path)
    skeleton, store = open_skeleton(source_of(tmp_path)), ActivationStore(tmp_path / "hidden")

    def fail(layer, *_):
        if layer == 1:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stream_layers(skeleton, BATCHES, 3, fail, store)
    assert all(p.is_meta for p in skeleton.stack.parameters())
    seen = []
    stream_layers(skeleton, BATCHES[:1], 0, lambda *event: seen.append(event[3]), store)
    assert torch.equal(seen[0], resident(build_model("llama").base_model, BATCHES[:1])[0, 0][1])


# Twelve layers of 16 MiB, half a MiB of hidden states, and a budget of 128 KiB for these.
MEASURE = """
import sys, pathlib, torch
from falcon_unlearn.corpus.batching import Batch
from falcon_unlearn.model.activation_store import ActivationStore
from falcon_unlearn.model.loading import ModelSource
from falcon_unlearn.model.skeleton import load_first_layers, open_skeleton
from falcon_unlearn.model.streaming import stream_layers

torch.set_num_threads(1)

def batch(seed):
    ids = torch.randint(1, 64, (2, 16), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0
    return Batch(ids, mask, mask.bool(), mask.bool())

def streamed(source, batches):
    sums = []
    def visit(layer, number, before, after):
        if layer == 11:
            sums.append(after.sum().item())
    stream_layers(open_skeleton(source), batches, 11, visit, ActivationStore(source.folder / "hidden", 1 << 17))
    return sums

def resident(source, batches):
    model = load_first_layers(source, 12)
    model.norm = torch.nn.Identity()
    with torch.no_grad():
        outputs = (model(input_ids=b.input_ids, attention_mask=b.attention_mask) for b in batches)
        return [output.last_hidden_state.sum().item() for output in outputs]

def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def sums_of(folder):
    source = ModelSource("m", pathlib.Path(sys.argv[2]) / folder, torch.device("cpu"), torch.float32)
    return globals()[sys.argv[1]](source, [batch(seed) for seed in range(8)])

sums_of("small")  # imports, and what libraries allocate once
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
before = peak()
print(*sums_of("large"), peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_peak_memory_is_about_one_layer(tmp_path):
    def run(way):
        command = [sys.executable, "-c", MEASURE, way, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    for name, hidden in (("small", 32), ("large", 512)):
        config = LlamaConfig(
            vocab_size=64, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=12,
            num_attention_heads=8, pad_token_id=0,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(tmp_path / name, max_shard_size="40MB")
    weights = sum(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    *streamed, little = run("streamed")
    *resident, much = run("resident")
    assert streamed == resident
    allowed = (2 * 16 + 8) << 20  # two layers and the rest
    assert weights > 4 * allowed
    assert int(little) < allowed < int(much), (int(little) >> 20, int(much) >> 20)
