"""Patches laid on a base in memory give what the patched checkpoint gives."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import MIXTURES, build_model

from falcon_unlearn.errors import UserError
from falcon_unlearn.model import patched
from falcon_unlearn.model.loading import load_causal_lm, resolve_model
from falcon_unlearn.model.patch import apply_patch, read_patch, write_patch
from falcon_unlearn.model.patched import apply_in_memory, load_patched, read_patches

NAME = "model.layers.1.mlp.down_proj.weight"


def changed(folder, seed):
    model = load_causal_lm(resolve_model(str(folder), folder, device="cpu"))
    return {
        NAME: dict(model.named_parameters())[NAME].detach() + torch.randn(32, 64, generator=torch.manual_seed(seed))
    }


@pytest.fixture
def stacked(tiny, tmp_path):
    """A base, two patches one on the other, and the checkpoint that has both."""
    first = write_patch(tmp_path / "p1", tiny.model, changed(tiny.model, 1), "base", {})
    apply_patch(first, tiny.model, tmp_path / "once")
    second = write_patch(tmp_path / "p2", tmp_path / "once", changed(tmp_path / "once", 2), "once", {})
    apply_patch(second, tmp_path / "once", tmp_path / "twice")
    return tiny.model, (tmp_path / "p1", tmp_path / "p2"), tmp_path / "twice"


def source(folder):
    return resolve_model(str(folder), folder, device="cpu")


def test_a_stack_of_patches_in_memory_is_the_checkpoint_that_has_them(stacked):
    base, folders, twice = stacked
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    ours = load_patched(source(base), read_patches(source(base), folders))
    theirs = load_causal_lm(source(twice))
    for (name, value), (other, expected) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(value, expected)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


@pytest.mark.parametrize("order", [(1,), (1, 0), (0, 0)])
def test_patches_that_do_not_stand_on_each_other_are_refused(stacked, order):
    base, folders, _ = stacked
    with pytest.raises(UserError, match="is not the one the patch was made for"):
        read_patches(source(base), [folders[i] for i in order])


def test_a_patch_on_the_patched_model_says_that_it_is_there_already(stacked):
    _, folders, twice = stacked
    with pytest.raises(UserError, match="already patched"):
        read_patches(source(twice), folders[1:])


def test_a_patch_of_another_shape_is_refused(stacked, tmp_path):
    base, folders, _ = stacked
    patch = read_patch(folders[0])
    assert list(patch.tensors) == [NAME]
    other = shutil.copytree(base, tmp_path / "other")
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    save_file(
        {("x." + NAME if name == NAME else name): value for name, value in weights.items()}, other / "model.safetensors"
    )
    with pytest.raises(UserError, match="has no"):
        read_patches(source(other), folders[:1])


# experts, which lie side by side on the disk and in one tensor in memory


def expert_patch(base, folder, seed):
    """A patch of one matrix of one expert."""
    weights = load_file(base / "model.safetensors")
    name = next(name for name in sorted(weights) if ".experts.2." in name and "layers.1." in name)
    noise = torch.randn(weights[name].shape, generator=torch.manual_seed(seed))
    return write_patch(folder, base, {name: weights[name] + noise}, "base", {})


def in_links(base, folder):
    """The checkpoint as the hub's cache keeps it."""
    snapshot = folder / "models--x--y/snapshots/0123"
    snapshot.mkdir(parents=True)
    (folder / "models--x--y/blobs").mkdir()
    for i, path in enumerate(sorted(base.iterdir())):
        blob = path.rename(folder / f"models--x--y/blobs/{i}")
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("layout", ["folder", "hub", "read-only parent"])
@pytest.mark.parametrize("architecture", MIXTURES)
def test_a_mixture_of_experts_goes_by_links_and_is_the_patched_checkpoint(tmp_path, monkeypatch, architecture, layout):
    base = tmp_path / "base" / "model"
    build_model(architecture, num_hidden_layers=2).save_pretrained(base)
    if layout == "hub":
        base = in_links(base, tmp_path / "cache")
    if layout == "read-only parent":
        monkeypatch.setattr(patched.os, "access", lambda *_: False)
        monkeypatch.setattr(patched.tempfile, "tempdir", str(tmp_path))
    first = expert_patch(base, tmp_path / "p1", 1)
    apply_patch(first, base, tmp_path / "once")
    second = expert_patch(tmp_path / "once", tmp_path / "p2", 2)
    apply_patch(second, tmp_path / "once", tmp_path / "twice")
    before = contents(tmp_path)
    used = []
    by_links = patched._load_by_links
    monkeypatch.setattr(patched, "_load_by_links", lambda *given: used.append(given) or by_links(*given))
    for folders, expected in (((), base), ((tmp_path / "p1",), "once"), ((tmp_path / "p1", tmp_path / "p2"), "twice")):
        ours = load_patched(source(base), read_patches(source(base), folders))
        theirs = load_causal_lm(source(tmp_path / expected))
        for (name, value), (other, wanted) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert name == other
            assert torch.equal(value, wanted), (expected, name)
            assert not value.requires_grad
    assert len(used) == 2
    assert contents(tmp_path) == before  # nothing is left behind, and links were not written through


def test_a_mixture_cannot_be_patched_where_it_is_in_memory_and_stays_as_it_is(tmp_path):
    build_model("mixtral", num_hidden_layers=2).save_pretrained(tmp_path / "model")
    patch = expert_patch(tmp_path / "model", tmp_path / "patch", 1)
    model = load_causal_lm(source(tmp_path / "model"))
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(UserError, match="has no tensor of its own"):
        apply_in_memory(patch, model)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("which", ["base", "changed"])
def test_in_memory_a_patch_needs_its_base(stacked, which):
    base, folders, _ = stacked
    patch, model = read_patch(folders[0]), load_causal_lm(source(base))
    expected = load_patched(source(base), [patch])
    if which == "changed":
        model.get_parameter(NAME).data[0, 0] += 1
        kept = model.get_parameter(NAME).clone()
        with pytest.raises(UserError, match="is not the one the patch was made for"):
            apply_in_memory(patch, model)
        assert torch.equal(model.get_parameter(NAME), kept)
        return
    apply_in_memory(patch, model)
    assert torch.equal(model.get_parameter(NAME), expected.get_parameter(NAME))
