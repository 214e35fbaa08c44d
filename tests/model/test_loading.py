import http.server
import json
import shutil
import threading
from collections import defaultdict
from urllib.parse import unquote

import pytest
import torch
from safetensors import safe_open
from tiny_models import ARCHITECTURES, FORGET_BATCH, build_model, shared_model
from transformers.utils import logging as hf_logging

from falcon_unlearn.errors import UserError
from falcon_unlearn.model.decoder import SplitDecoder, find_layers
from falcon_unlearn.model.loading import (
    ModelSource,
    checkpoint_folder,
    context_length,
    fetch_weights,
    load_causal_lm,
    load_config,
    load_tokenizer,
    number_of_layers,
    quiet_transformers,
    resolve_device,
    resolve_model,
)
from falcon_unlearn.model.skeleton import fetch_first_layers, load_first_layers, open_skeleton

COUNT = 3
HUB_ID, COMMIT = "owner/llama", "5" * 40


def source_of(folder, dtype=torch.float32):
    return ModelSource(str(folder), folder, torch.device("cpu"), dtype)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def model(architecture):
    return shared_model(architecture)


@pytest.fixture(scope="module")
def saved(architecture, tmp_path_factory):
    """The folder of the architecture's shared model, in several shards."""
    folder = tmp_path_factory.mktemp(architecture)
    shared_model(architecture).save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    build_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def own_folder(llama_folder, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(llama_folder, tmp_path / "model")
    return tmp_path / "model"


class TestFirstLayers:
    def test_activations_equal_the_whole_models(self, model, saved):
        partial = load_first_layers(source_of(saved), COUNT)
        layers = tuple(range(1, COUNT))
        whole, part = SplitDecoder(model, layers, "all"), SplitDecoder(partial, layers, "all")
        expected, got = whole.prepare(FORGET_BATCH), part.prepare(FORGET_BATCH)
        assert torch.equal(got.hidden, expected.hidden)
        assert torch.equal(got.frozen, expected.frozen)
        assert torch.equal(part.updated(got, part.masters()), expected.frozen)

    def test_nothing_above_the_target_is_loaded(self, model, saved):
        partial = load_first_layers(source_of(saved), COUNT)
        stack_name, stack = find_layers(partial)
        assert len(stack) == COUNT
        assert partial.get_output_embeddings() is None
        kept = {f"{stack_name}.{i}." for i in range(COUNT)}
        whole_base = dict(model.base_model.named_parameters())
        loaded = dict(partial.named_parameters())
        outside = {n for n in whole_base if n.startswith(f"{stack_name}.") and not n.startswith(tuple(kept))}
        assert set(loaded) == set(whole_base) - outside
        assert all(torch.equal(value, whole_base[name]) for name, value in loaded.items())

    def test_is_frozen_and_in_eval_mode(self, saved):
        partial = load_first_layers(source_of(saved), COUNT)
        assert not partial.training
        assert not any(p.requires_grad for p in partial.parameters())

    def test_all_layers_can_be_asked_for(self, model, saved):
        partial = load_first_layers(source_of(saved), model.config.num_hidden_layers)
        last = (model.config.num_hidden_layers - 1,)
        expected = SplitDecoder(model, last, "mlp").prepare(FORGET_BATCH).frozen
        assert torch.equal(SplitDecoder(partial, last, "mlp").prepare(FORGET_BATCH).frozen, expected)

    @pytest.mark.parametrize("count", [0, 6])
    def test_a_count_out_of_range_is_refused(self, llama_folder, count):
        with pytest.raises(UserError, match=f"has 5 layers, {count} were asked for"):
            load_first_layers(source_of(llama_folder), count)


def test_whole_model_is_what_was_saved(model, saved):
    loaded = load_causal_lm(source_of(saved))
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_dtype_auto_keeps_the_checkpoints_and_a_choice_casts(tmp_path):
    build_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in load_first_layers(source_of(tmp_path, None), 2).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_first_layers(source_of(tmp_path), 2).parameters()} == {torch.float32}


class TestResolve:
    def test_relative_to_the_recipe_first(self, own_folder, tmp_path, monkeypatch):
        elsewhere = tmp_path / "cwd"
        shutil.copytree(own_folder, elsewhere / "model")
        monkeypatch.chdir(elsewhere)
        assert checkpoint_folder("model", tmp_path, "model") == own_folder.resolve()
        assert checkpoint_folder("model", tmp_path / "other", "model") == (elsewhere / "model").resolve()
        assert checkpoint_folder(str(own_folder), tmp_path / "other", "model") == own_folder.resolve()

    @pytest.mark.parametrize("name", ["./absent", "/absent/model", "~/absent", "a/b/c"])
    def test_absent_folder(self, name, tmp_path):
        with pytest.raises(UserError, match=rf"^evaluation\.oracle: folder {name} does not exist$"):
            checkpoint_folder(name, tmp_path, "evaluation.oracle")

    def test_folder_without_a_model(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match=r"^model: .*empty has no config\.json"):
            checkpoint_folder("empty", tmp_path, "model")

    def test_file_instead_of_a_folder(self, own_folder, tmp_path):
        with pytest.raises(UserError, match=r"^model: .* is a file; give the model's folder"):
            checkpoint_folder("model/config.json", tmp_path, "model")

    def test_hub_id_is_fetched_without_code(self, llama_folder, tmp_path, monkeypatch):
        asked = defaultdict(list)

        def fetch(name, revision, allow_patterns):
            asked[name].append((revision, allow_patterns))
            return str(llama_folder)

        monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
        assert checkpoint_folder("owner/name", tmp_path, "model") == llama_folder
        (first, patterns), weights = asked["owner/name"]
        assert first is None
        assert weights == (llama_folder.name, ["model.safetensors"])
        assert not any(pattern.endswith((".py", ".bin", ".safetensors")) for pattern in patterns)
        checkpoint_folder("owner/coded", tmp_path, "model", trust_remote_code=True)
        assert "*.py" in asked["owner/coded"][0][1]

    def test_hub_failure_is_one_line(self, tmp_path, monkeypatch):
        def fail(name, revision, allow_patterns):
            raise OSError("no route to host\nand a long story")

        monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
        with pytest.raises(UserError, match=r"OSError: no route to host\); gated models") as caught:
            checkpoint_folder("owner/name", tmp_path, "model")
        assert "\n" not in str(caught.value)

    def test_dtype_on_the_cpu(self, own_folder, tmp_path):
        assert resolve_model("model", tmp_path, device="cpu").dtype == torch.float32
        source = resolve_model("model", tmp_path, device="cpu", dtype="bfloat16")
        assert (source.dtype, source.device.type, source.trust_remote_code) == (torch.bfloat16, "cpu", False)

    def test_devices(self):
        assert resolve_device("auto").type in ("cpu", "cuda", "mps")
        assert resolve_device("cpu") == torch.device("cpu")
        for device in ("gpu", "cuda:99"):
            with pytest.raises(UserError, match=f"^device '{device}' cannot be used .*set device to auto or cpu"):
                resolve_device(device)


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a model hub as huggingface_hub needs: the revision, its list of files, the files."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        hub = self.server
        path = unquote(self.path.partition("?")[0])
        if path == f"/api/models/{HUB_ID}/revision/main":
            data = json.dumps({"id": HUB_ID, "sha": COMMIT, "siblings": []}).encode()
        elif path == f"/api/models/{HUB_ID}/tree/{COMMIT}":
            files = [(file.name, file.stat().st_size) for file in sorted(hub.folder.iterdir())]
            data = json.dumps([{"type": "file", "path": n, "size": s, "oid": n} for n, s in files]).encode()
        elif path.startswith(f"/{HUB_ID}/resolve/{COMMIT}/"):
            name = path.rpartition("/")[2]
            data = (hub.folder / name).read_bytes()
            if body:
                hub.fetched.append(name)
                if name in hub.truncated:
                    data = data[:-10]
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{path.rpartition("/")[2]}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one llama of five layers in many shards; ``fetched`` lists what was downloaded."""
    from huggingface_hub import constants

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.fetched, server.truncated = tmp_path / "served", [], set()
    build_model("llama").save_pretrained(server.folder, max_shard_size="12KB")
    (server.folder / "consolidated.safetensors").write_bytes(b"the same again")
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


class TestHub:
    def source(self, tmp_path, **options):
        return resolve_model(HUB_ID, tmp_path, device="cpu", **options)

    def files_of(self, hub, *layers, head=False):
        index = json.loads((hub.folder / "model.safetensors.index.json").read_text())["weight_map"]
        return {
            file
            for name, file in index.items()
            if (int(name.split(".")[2]) in layers if ".layers." in name else head or name != "lm_head.weight")
        }

    def weights(self, hub):
        return {name for name in hub.fetched if name.endswith(".safetensors")}

    def test_everything_by_default_once(self, hub, tmp_path):
        source = self.source(tmp_path)
        assert source.revision == COMMIT
        assert self.weights(hub) == self.files_of(hub, *range(5), head=True)  # no file that the index does not name
        assert checkpoint_folder(HUB_ID, tmp_path, "model") == source.folder
        assert len(hub.fetched) == len(set(hub.fetched))
        assert load_causal_lm(source) is not None

    def test_weights_are_fetched_by_what_is_used(self, hub, tmp_path):
        source = self.source(tmp_path, weights=False)
        assert {"config.json", "model.safetensors.index.json"} <= set(hub.fetched)
        assert self.weights(hub) == set()
        assert load_config(source).num_hidden_layers == 5
        fetch_first_layers(source, 2)
        first = self.weights(hub)
        assert first == self.files_of(hub, 0, 1)
        model = load_first_layers(source, 2)
        assert torch.equal(model.embed_tokens.weight, build_model("llama").model.embed_tokens.weight)
        assert self.weights(hub) == first
        load_first_layers(source, 3)  # what is not there yet is fetched by who needs it
        assert self.weights(hub) == self.files_of(hub, 0, 1, 2)
        open_skeleton(source).load(4)
        assert self.weights(hub) == self.files_of(hub, 0, 1, 2, 4)
        fetch_weights(source)
        assert self.weights(hub) == self.files_of(hub, *range(5), head=True)
        assert len(hub.fetched) == len(set(hub.fetched))

    def test_loading_a_part_fetches_that_part(self, hub, tmp_path):
        load_first_layers(self.source(tmp_path, weights=False), 1)
        assert self.weights(hub) == self.files_of(hub, 0)

    def test_the_whole_model_is_fetched_to_be_loaded(self, hub, tmp_path):
        load_causal_lm(self.source(tmp_path, weights=False))
        assert self.weights(hub) == self.files_of(hub, *range(5), head=True)

    def test_one_file(self, hub, tmp_path):
        shutil.rmtree(hub.folder)
        build_model("llama").save_pretrained(hub.folder)
        source = self.source(tmp_path, weights=False)
        assert self.weights(hub) == set()
        load_first_layers(source, 1)
        assert self.weights(hub) == {"model.safetensors"}

    def test_no_safetensors_on_the_hub(self, hub, tmp_path):
        shutil.rmtree(hub.folder)
        hub.folder.mkdir()
        build_model("llama").config.save_pretrained(hub.folder)
        source = self.source(tmp_path)
        for load in (load_causal_lm, lambda source: load_first_layers(source, 1)):
            with pytest.raises(UserError, match=r"no \.safetensors|neither model\.safetensors nor"):
                load(source)

    def test_a_truncated_download_is_one_line(self, hub, tmp_path):
        source = self.source(tmp_path, weights=False)
        hub.truncated |= self.files_of(hub, 1) - self.files_of(hub, 0)
        fetch_first_layers(source, 1)
        with pytest.raises(UserError, match=r"^model: 'owner/llama' .*could not be fetched .*should be of") as caught:
            load_first_layers(source, 2)
        assert "\n" not in str(caught.value)
        hub.truncated.clear()
        assert load_first_layers(source, 2) is not None

    def test_an_unknown_id_is_one_line(self, hub, tmp_path):
        with pytest.raises(UserError, match=r"^model: 'owner/other' is no local folder and could not be fetched") as e:
            resolve_model("owner/other", tmp_path, device="cpu")
        assert "\n" not in str(e.value)

    def test_a_local_folder_is_left_as_it_is(self, hub, llama_folder, tmp_path):
        source = resolve_model(str(llama_folder), tmp_path, device="cpu", weights=False)
        assert source.revision is None
        fetch_weights(source)
        fetch_first_layers(source, 2)
        assert hub.fetched == []


class TestUnusable:
    def test_unknown_architecture(self, own_folder):
        (own_folder / "config.json").write_text(json.dumps({"model_type": "perceptron", "architectures": ["X"]}))
        for load in (load_config, load_causal_lm, lambda source: load_first_layers(source, 1)):
            with pytest.raises(UserError, match=r"architecture that cannot be loaded \(.*perceptron") as caught:
                load(source_of(own_folder))
            assert "\n" not in str(caught.value)

    def test_config_that_is_no_json(self, own_folder):
        (own_folder / "config.json").write_text("{")
        with pytest.raises(UserError, match="architecture that cannot be loaded"):
            load_config(source_of(own_folder))

    def test_encoder_decoder(self, own_folder):
        (own_folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
        with pytest.raises(UserError, match=r"encoder-decoder \(t5\); only decoders"):
            load_config(source_of(own_folder))

    def test_known_but_no_decoder(self, own_folder):
        (own_folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
        with pytest.raises(UserError, match="could not be loaded"):
            load_causal_lm(source_of(own_folder))

    def test_no_safetensors(self, own_folder):
        (own_folder / "model.safetensors").unlink()
        torch.save({}, own_folder / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"holds no \.safetensors weights"):
            load_causal_lm(source_of(own_folder))

    def test_truncated_weights(self, own_folder):
        path = own_folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(UserError, match="could not be loaded"):
            load_causal_lm(source_of(own_folder))

    def test_missing_tensors(self, own_folder):
        """transformers fills a hole with random weights and says so in a log line; that is no model to unlearn."""
        from safetensors.torch import load_file, save_file

        tensors = load_file(own_folder / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, own_folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"no weights for model\.layers\.1\.mlp\.up_proj\.weight: get"):
            load_causal_lm(source_of(own_folder))
        with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight"):
            load_first_layers(source_of(own_folder), 2)
        assert load_first_layers(source_of(own_folder), 1) is not None

    def test_tensor_of_another_shape(self, own_folder):
        config = json.loads((own_folder / "config.json").read_text())
        (own_folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
        with pytest.raises(UserError, match="could not be loaded"):
            load_causal_lm(source_of(own_folder))

    def test_no_tokenizer(self, llama_folder):
        with pytest.raises(UserError, match="has no usable tokenizer"):
            load_tokenizer(source_of(llama_folder))

    def test_config_without_a_layer_count(self):
        class Config:
            model_type = "odd"

            def get_text_config(self, decoder):
                return self

        with pytest.raises(UserError, match="architecture 'odd' has no num_hidden_layers"):
            number_of_layers(Config())
        assert context_length(Config()) is None


def test_config_facts(saved):
    config = load_config(source_of(saved))
    assert number_of_layers(config) == 5
    assert context_length(config) == 64


def test_saved_folder_has_several_shards(saved):
    """Otherwise the tests above would not touch the index."""
    shards = list(saved.glob("*.safetensors"))
    assert len(shards) > 1
    with safe_open(shards[0], framework="pt") as handle:
        assert list(handle.keys())


def test_quiet_is_put_back():
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity(25)

    def fail():
        assert hf_logging.get_verbosity() == 40
        assert not hf_logging.is_progress_bar_enabled()
        raise ZeroDivisionError

    try:
        with pytest.raises(ZeroDivisionError), quiet_transformers():
            fail()
        assert hf_logging.get_verbosity() == 25
        assert hf_logging.is_progress_bar_enabled()
    finally:
        hf_logging.set_verbosity(before)
