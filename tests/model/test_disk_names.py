"""Guards ``revert_weight_conversion``, which is internal to transformers."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, FORGET_BATCH, MIXTURES, build_model, shared_model
from transformers import AutoModel

from falcon_unlearn.errors import UserError
from falcon_unlearn.model.decoder import SplitDecoder
from falcon_unlearn.model.disk_names import TORCH_DTYPES, to_disk
from falcon_unlearn.model.loading import ModelSource, load_causal_lm
from falcon_unlearn.model.skeleton import load_first_layers

LAYERS = (1, 2)


def read_folder(folder):
    return {name: value for shard in folder.glob("*.safetensors") for name, value in load_file(shard).items()}


def source_of(folder):
    return ModelSource(str(folder), folder, torch.device("cpu"), torch.float32)


def layer_names(names, layers):
    return {name for name in names if any(f".{part}.{i}." in f".{name}" for i in layers for part in ("layers", "h"))}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def saved(architecture, tmp_path_factory):
    """The folder of the architecture's shared model, in several shards."""
    folder = tmp_path_factory.mktemp(architecture)
    shared_model(architecture).save_pretrained(folder, max_shard_size="40KB")
    return folder


LOADERS = {"whole": load_causal_lm, "first_layers": lambda source: load_first_layers(source, 3)}


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
class TestEveryArchitecture:
    def test_names_and_values_are_the_checkpoints(self, saved, loader):
        stored = read_folder(saved)
        masters = SplitDecoder(loader(source_of(saved)), LAYERS, "all").masters()
        written = to_disk(loader(source_of(saved)), masters, stored)
        assert set(written) == layer_names(stored, LAYERS)
        assert all(torch.equal(value, stored[name]) for name, value in written.items())
        assert not any(value.requires_grad for value in written.values())

    def test_one_tensor_at_a_time_gives_the_same_names(self, saved, loader):
        """The pipeline asks for the disk name of each trained tensor on its own."""
        stored, model = read_folder(saved), loader(source_of(saved))
        masters = SplitDecoder(model, LAYERS, "mlp").masters()
        single = {name: to_disk(model, {name: value}, stored) for name, value in masters.items()}
        together = to_disk(model, masters, stored)
        assert sorted(key for part in single.values() for key in part) == sorted(together)
        assert all(torch.equal(value, together[key]) for part in single.values() for key, value in part.items())

    def test_a_change_comes_back_through_the_disk(self, saved, loader, tmp_path):
        """memory -> disk names -> checkpoint -> memory is the identity on what was trained."""
        model, stored = loader(source_of(saved)), read_folder(saved)
        decoder = SplitDecoder(model, LAYERS, "mlp")
        with torch.no_grad():
            masters = {
                name: value + 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(i))
                for i, (name, value) in enumerate(decoder.masters().items())
            }
        changed = to_disk(model, masters, stored)
        assert all(not torch.equal(value, stored[name]) for name, value in changed.items())
        save_file(
            {k: v.contiguous() for k, v in {**stored, **changed}.items()},
            tmp_path / "model.safetensors",
            metadata={"format": "pt"},
        )
        (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
        reloaded = SplitDecoder(load_first_layers(source_of(tmp_path), 3), LAYERS, "mlp")
        assert torch.equal(
            reloaded.prepare(FORGET_BATCH).frozen, decoder.updated(decoder.prepare(FORGET_BATCH), masters)
        )


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_checkpoints_without_the_models_prefix(architecture, tmp_path):
    """GPT-2 on the hub stores ``h.0...`` where the model with a head says ``transformer.h.0...``."""
    build_model(architecture).base_model.save_pretrained(tmp_path)
    stored = read_folder(tmp_path)
    assert not any(name.startswith(("transformer.", "model.")) for name in stored)
    model = AutoModel.from_pretrained(tmp_path) if architecture == "llama" else load_causal_lm(source_of(tmp_path))
    masters = SplitDecoder(model, LAYERS, "all").masters()
    written = to_disk(model, masters, stored)
    assert set(written) == layer_names(stored, LAYERS)
    assert all(torch.equal(value, stored[name]) for name, value in written.items())


class TestExperts:
    @pytest.fixture(params=MIXTURES)
    def folder(self, request, tmp_path):
        build_model(request.param).save_pretrained(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(("fused", "parts"), [("down_proj", 1), ("gate_up_proj", 2)])
    def test_one_changed_expert_changes_its_tensors_only(self, folder, fused, parts):
        stored, model = read_folder(folder), load_first_layers(source_of(folder), 3)
        decoder = SplitDecoder(model, (2,), "mlp")
        masters = decoder.masters()
        (name,) = [name for name in masters if name.endswith(fused)]
        with torch.no_grad():
            masters[name][3] += 1.0
        written = to_disk(model, masters, stored)
        differing = {key for key, value in written.items() if not torch.equal(value, stored[key])}
        assert len(differing) == parts
        assert all(".layers.2." in key and ".experts.3." in key for key in differing)
        assert all(torch.equal(written[key], stored[key] + 1.0) for key in differing)

    def test_every_expert_is_a_tensor_of_its_own(self, folder):
        stored, model = read_folder(folder), load_first_layers(source_of(folder), 3)
        masters = SplitDecoder(model, (2,), "mlp").masters()
        assert all(value.ndim == 3 for value in masters.values())
        written = to_disk(model, masters, stored)
        assert len(written) == 3 * 4
        assert all(value.ndim == 2 for value in written.values())


def test_a_tensor_the_checkpoint_does_not_have_is_our_defect():
    model = build_model("llama")
    masters = SplitDecoder(model, (1,), "down_proj").masters()
    with pytest.raises(UserError, match="no counterpart"):
        to_disk(model, masters, {"something.else"})


def test_dtypes_are_those_safetensors_writes(tmp_path):
    save_file({name: torch.zeros(1, dtype=dtype) for name, dtype in TORCH_DTYPES.items()}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as handle:
        assert {name: handle.get_slice(name).get_dtype() for name in TORCH_DTYPES} == {n: n for n in TORCH_DTYPES}
