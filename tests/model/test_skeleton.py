"""Guards what ``skeleton`` uses of transformers' internals, on every architecture."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, FORGET_BATCH, LAYERS, build_model, shared_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Gemma3ForConditionalGeneration

from falcon_unlearn.errors import UserError
from falcon_unlearn.model import skeleton as module
from falcon_unlearn.model.decoder import SplitDecoder, find_layers
from falcon_unlearn.model.loading import ModelSource
from falcon_unlearn.model.skeleton import fetch_first_layers, load_first_layers, load_layers, open_skeleton


def source_of(folder, dtype=torch.float32):
    return ModelSource(str(folder), folder, torch.device("cpu"), dtype)


def last_hidden_state(model):
    batch = FORGET_BATCH
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).last_hidden_state


def on_meta(model):
    return {n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta}


def shards(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def of_layer(name, index):
    return re.search(rf"(^|\.)(layers|h)\.{index}\.", name) is not None


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def model(architecture):
    return shared_model(architecture).base_model


@pytest.fixture(scope="module")
def saved(architecture, tmp_path_factory):
    """The folder of the architecture's shared model, in several shards."""
    folder = tmp_path_factory.mktemp(architecture)
    shared_model(architecture).save_pretrained(folder, max_shard_size="12KB")
    return folder


@pytest.fixture
def llama_folder(tmp_path):
    build_model("llama").save_pretrained(tmp_path / "llama", max_shard_size="12KB")
    return tmp_path / "llama"


@pytest.fixture
def reads(monkeypatch):
    """Names of the files and the byte ranges that are read, in order."""
    spans = []
    read_into = module.read_into

    def note(folder, span, out):
        spans.append((span.file, span.start))
        read_into(folder, span, out)

    monkeypatch.setattr(module, "read_into", note)
    return spans


class TestEveryArchitecture:
    def test_all_but_the_stack_is_real(self, model, saved):
        skeleton = open_skeleton(source_of(saved))
        whole, loaded = dict(model.named_parameters()), dict(skeleton.model.named_parameters())
        assert loaded.keys() == whole.keys()
        inside = {n for n in whole if n.startswith(f"{skeleton.stack_name}.")}
        assert on_meta(skeleton.model) == inside
        assert len(skeleton) == LAYERS == skeleton.model.config.get_text_config().num_hidden_layers
        assert all(torch.equal(loaded[n], whole[n]) for n in whole.keys() - inside)
        assert all(loaded[n].shape == whole[n].shape for n in inside)
        buffers = dict(skeleton.model.named_buffers())
        assert all(torch.equal(buffers[n], b) for n, b in model.named_buffers())
        assert skeleton.model.get_output_embeddings() is None

    def test_layers_come_and_go(self, model, saved, reads):
        _, expected = find_layers(model)
        skeleton = open_skeleton(source_of(saved))
        for index in (2, 0, 2):
            reads.clear()
            skeleton.load(index)
            assert {file for file, _ in reads} == {f for n, f in shards(saved).items() if of_layer(n, index)}
            assert len(reads) == len([n for n in shards(saved) if of_layer(n, index)])
            assert on_meta(skeleton.model) == {
                f"{skeleton.stack_name}.{i}.{n}"
                for i in range(LAYERS)
                if i != index
                for n, _ in expected[i].named_parameters()
            }
            layer = dict(skeleton.stack[index].named_parameters())
            assert all(torch.equal(layer[n], p) for n, p in expected[index].named_parameters())
            assert skeleton.layer_bytes == sum(p.nbytes for p in layer.values())
            assert not any(p.requires_grad for p in layer.values())
            assert not any(part.training for part in skeleton.model.modules())
            skeleton.drop(index)
            assert all(p.is_meta for p in skeleton.stack[index].parameters())

    def test_all_layers_give_the_whole_models_output(self, model, saved):
        loaded = load_layers(source_of(saved), 0, LAYERS - 1)
        assert on_meta(loaded) == set()
        assert torch.equal(last_hidden_state(loaded), last_hidden_state(model))

    def test_a_span_of_layers(self, model, saved):
        loaded = load_layers(source_of(saved), 2, 3)
        name, stack = find_layers(loaded)
        assert len(stack) == LAYERS
        assert {n.split(f"{name}.")[1].split(".")[0] for n in on_meta(loaded)} == {"0", "1", "4"}
        assert not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())
        whole, part = SplitDecoder(model, (2, 3), "mlp"), SplitDecoder(loaded, (2, 3), "mlp")
        prepared = whole.prepare(FORGET_BATCH)
        assert torch.equal(part.updated(prepared, part.masters()), prepared.frozen)

    def test_shards_of_later_layers_need_not_be_there(self, model, saved, tmp_path, reads):
        count = 2
        later = {n for n in shards(saved) if any(of_layer(n, i) for i in range(count, LAYERS))}
        used = shards(saved).keys() - later - {"lm_head.weight", "embed_out.weight"}
        assert fetch_first_layers(source_of(saved), count) == {shards(saved)[n] for n in used}
        folder = shutil.copytree(saved, tmp_path / "part")
        for file in set(shards(saved).values()) - fetch_first_layers(source_of(saved), count):
            (folder / file).unlink()
        assert len(list(folder.glob("*.safetensors"))) < len(set(shards(saved).values()))
        loaded = load_first_layers(source_of(folder), count)
        assert len(find_layers(loaded)[1]) == count == loaded.config.num_hidden_layers
        expected = SplitDecoder(model, (count - 1,), "mlp").prepare(FORGET_BATCH).frozen
        assert torch.equal(SplitDecoder(loaded, (count - 1,), "mlp").prepare(FORGET_BATCH).frozen, expected)
        assert len(reads) == len(used)
        with pytest.raises(UserError, match=r"names 'model-\d+-of-\d+\.safetensors', which is not in .*: get the miss"):
            open_skeleton(source_of(folder)).load(LAYERS - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_dtypes_are_those_of_from_pretrained(architecture, dtype, tmp_path):
    build_model(architecture).to(torch.bfloat16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype or "auto").base_model
    loaded = load_layers(source_of(tmp_path, dtype), 0, LAYERS - 1)
    wanted = dict(expected.named_parameters())
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {n: p.dtype for n, p in wanted.items()}
    assert all(torch.equal(p, wanted[n]) for n, p in loaded.named_parameters())


def test_buffers_that_no_checkpoint_holds_are_computed(tmp_path):
    """GPT-Neo keeps its causal masks in the layers, one kind for global and one for local attention."""
    torch.manual_seed(0)
    types = [[["global", "local"], 2], [["global"], 1]]
    config = CONFIG_MAPPING["gpt_neo"](
        vocab_size=67, hidden_size=32, num_layers=5, num_heads=4, attention_types=types, window_size=6,
        max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    skeleton = open_skeleton(source_of(tmp_path))
    for _ in range(2):
        for index, layer in enumerate(find_layers(model.base_model)[1]):
            skeleton.load(index)
            expected = dict(layer.named_buffers())
            assert expected
            assert all(torch.equal(b, expected[n]) for n, b in skeleton.stack[index].named_buffers())
            skeleton.drop(index)
            assert on_meta(skeleton.stack[index]) >= expected.keys()
    assert torch.equal(last_hidden_state(load_layers(source_of(tmp_path), 0, 4)), last_hidden_state(model.base_model))


def test_the_language_model_inside_a_multi_modal_one(tmp_path):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CONFIG_MAPPING["gemma3"](
        text_config=ARCHITECTURES["gemma3_text"],
        vision_config={**vision, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=1,
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    loaded = load_layers(source_of(tmp_path), 0, LAYERS - 1)
    assert "language_model" in find_layers(loaded)[0]
    assert torch.equal(last_hidden_state(loaded), last_hidden_state(model.base_model))


def test_checkpoints_without_the_models_prefix(tmp_path):
    model = build_model("gpt2").base_model
    model.save_pretrained(tmp_path)
    assert torch.equal(last_hidden_state(load_layers(source_of(tmp_path), 0, LAYERS - 1)), last_hidden_state(model))


class TestUnusable:
    def refused(self, folder, index, match):
        skeleton = open_skeleton(source_of(folder))
        with pytest.raises(UserError, match=match) as caught:
            skeleton.load(index)
        assert "\n" not in str(caught.value)
        assert all(p.is_meta for p in skeleton.stack[index].parameters())

    def shard_of(self, folder, ending):
        return folder / next(file for name, file in shards(folder).items() if name.endswith(ending))

    def test_truncated(self, llama_folder):
        path = self.shard_of(llama_folder, "layers.1.mlp.up_proj.weight")
        path.write_bytes(path.read_bytes()[:-100])
        self.refused(llama_folder, 1, r"model-.*\.safetensors: is truncated .*: get the file again")

    def test_truncated_while_it_is_read(self, llama_folder, monkeypatch):
        def fail(folder, span, out):
            raise UserError(f"{folder / span.file}: is truncated: get the file again")

        skeleton = open_skeleton(source_of(llama_folder))
        monkeypatch.setattr(module, "read_into", fail)
        with pytest.raises(UserError, match="is truncated: get the file again"):
            skeleton.load(1)
        assert all(p.is_meta for p in skeleton.stack[1].parameters())

    def test_fused_tensors_truncated_while_they_are_read(self, tmp_path, monkeypatch):
        build_model("mixtral").save_pretrained(tmp_path)
        self.test_truncated_while_it_is_read(tmp_path, monkeypatch)

    def test_altered(self, llama_folder):
        path = self.shard_of(llama_folder, "layers.1.mlp.up_proj.weight")
        path.write_bytes(path.read_bytes().replace(b"up_proj", b"pu_proj"))
        self.refused(llama_folder, 1, r"has no tensor '.*up_proj\.weight', but .*index\.json says so: get both again")

    def test_of_another_shape(self, llama_folder):
        path = self.shard_of(llama_folder, "layers.1.mlp.up_proj.weight")
        tensors = load_file(path)
        name = "model.layers.1.mlp.up_proj.weight"
        save_file({**tensors, name: tensors[name][:-1].clone()}, path, metadata={"format": "pt"})
        self.refused(llama_folder, 1, r"could not be loaded .*up_proj\.weight is \(47, 32\) in the checkpoint and \(48")

    def test_missing(self, tmp_path):
        build_model("llama").save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        outer, inner = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
        del tensors[inner]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        self.refused(tmp_path, 1, r"has no weights for layers\.1\.mlp\.up_proj\.weight: get the complete checkpoint")
        del tensors[outer]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"has no weights for norm\.weight: get the complete checkpoint"):
            open_skeleton(source_of(tmp_path))

    def test_quantised(self, llama_folder):
        config = json.loads((llama_folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8"}
        (llama_folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="is quantised: give the unquantised checkpoint"):
            open_skeleton(source_of(llama_folder))

    def test_dtype_that_is_no_weight(self, llama_folder):
        path = self.shard_of(llama_folder, "layers.1.mlp.up_proj.weight")
        name = "model.layers.1.mlp.up_proj.weight"
        tensors = load_file(path)
        save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, path, metadata={"format": "pt"})
        self.refused(llama_folder, 1, r"'model\.layers\.1\.mlp\.up_proj\.weight' is F8_E4M3: give an unquantised")

    def test_no_safetensors(self, llama_folder):
        for file in [*llama_folder.glob("*.safetensors"), llama_folder / "model.safetensors.index.json"]:
            file.unlink()
        with pytest.raises(UserError, match=r"has neither model\.safetensors nor"):
            open_skeleton(source_of(llama_folder))

    def test_layers_there_are_not(self, llama_folder):
        with pytest.raises(UserError, match="has 5 layers, 6 were asked for"):
            load_layers(source_of(llama_folder), 2, 5)
        with pytest.raises(UserError, match="has 5 layers, 6 were asked for"):
            fetch_first_layers(source_of(llama_folder), 6)
