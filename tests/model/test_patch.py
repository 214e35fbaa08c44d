import errno
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from falcon_unlearn.errors import UserError
from falcon_unlearn.model import patch as patch_module
from falcon_unlearn.model.patch import (
    DOCUMENT_FILE,
    ORIGINAL_FILE,
    PATCH_FILE,
    Mismatch,
    apply_patch,
    read_patch,
    revert_patch,
    verify_patch,
    write_patch,
)
from falcon_unlearn.model.shards import INDEX_FILE, SINGLE_FILE, read_bytes, tensor_spans

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def contents(folder):
    """Relative name -> bytes of every file below a folder, links followed."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def listing(folder):
    return sorted(p.name for p in folder.iterdir())


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def save_checkpoint(folder, shards):
    """Write tensors (one dict a shard) the way transformers lays them out, with a few other files beside."""
    folder.mkdir(parents=True)
    if len(shards) == 1:
        save_file(shards[0], folder / SINGLE_FILE)
    else:
        weight_map = {}
        for i, tensors in enumerate(shards):
            save_file(tensors, folder / f"model-{i}.safetensors")
            weight_map |= dict.fromkeys(tensors, f"model-{i}.safetensors")
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    (folder / "extra").mkdir()
    (folder / "extra" / "tokenizer.json").write_text('{"a": 1}')
    return folder


@dataclass
class Case:
    shards: list
    changed: dict

    @property
    def base(self):
        return {name: tensor for shard in self.shards for name, tensor in shard.items()}

    @property
    def expected(self):
        """The whole model after the patch, in the dtypes on the disk."""
        return {name: self.changed.get(name, tensor).to(tensor.dtype) for name, tensor in self.base.items()}

    @property
    def really_changed(self):
        return {name for name, tensor in self.base.items() if raw(tensor) != raw(self.expected[name])}


@st.composite
def cases(draw):
    shapes = st.lists(st.integers(0, 4), max_size=3)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shards, changed = [], {}
    for s in range(draw(st.integers(1, 3))):
        shards.append({})
        for t in range(draw(st.integers(1, 3))):
            name, dtype = f"layer.{s}.{t}.weight", draw(st.sampled_from(DTYPES))
            tensor = torch.randn(draw(shapes), generator=generator).to(dtype)
            shards[-1][name] = tensor
            match draw(st.sampled_from(["leave", "same", "new", "new in fp32"])):
                case "same":
                    changed[name] = tensor.float()
                case "new":
                    changed[name] = (tensor.float() * 1.5 + 1).to(dtype)
                case "new in fp32":
                    changed[name] = torch.randn(tensor.shape, generator=generator)
    return Case(shards, changed)


@pytest.fixture
def case():
    """Three shards; the patch touches one tensor in the first and two in the second, none in the third."""
    generator = torch.Generator().manual_seed(0)
    shards = [
        {f"layer.{s}.{t}.weight": torch.randn(3, 5, generator=generator).to(DTYPES[t]) for t in range(3)}
        for s in range(3)
    ]
    names = ("layer.0.1.weight", "layer.1.0.weight", "layer.1.2.weight")
    return Case(shards, {name: torch.randn(3, 5, generator=generator) for name in names})


@pytest.fixture
def base(case, tmp_path):
    return save_checkpoint(tmp_path / "base", case.shards)


@pytest.fixture
def patch(case, base, tmp_path):
    return write_patch(tmp_path / "patch", base, case.changed, "someone/model", {"seed": 3})


def header(path):
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


@settings(max_examples=25, deadline=None)
@given(cases())
def test_apply_changes_exactly_the_patched_tensors_and_revert_gives_the_base_back(case):
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        base = save_checkpoint(root / "base", case.shards)
        before = contents(base)
        patch = write_patch(root / "patch", base, case.changed, "base", {})
        assert set(patch.tensors) == case.really_changed

        report = apply_patch(patch, base, root / "out")
        assert contents(base) == before
        after = contents(root / "out")
        assert after.keys() == before.keys()
        spans = tensor_spans(root / "out")
        assert {n: read_bytes(root / "out", s) for n, s in spans.items()} == {
            n: raw(t) for n, t in case.expected.items()
        }
        touched = {spans[n].file for n in patch.tensors}
        assert {file for file in before if after[file] != before[file]} == touched
        assert report.files_rewritten == len(touched)
        assert report.files_copied + report.files_reflinked == len(before) - len(touched)
        for file in touched:
            assert header(root / "out" / file) == header(base / file)

        if patch.tensors:
            assert revert_patch(patch, root / "out", root / "back").files_linked == 0
            assert contents(root / "back") == before
            revert_patch(patch, root / "out", None)
            assert contents(root / "out") == before
        else:
            with pytest.raises(UserError, match="base already"):
                revert_patch(patch, root / "out", None)
        assert {p.name for p in root.iterdir()} <= {"base", "patch", "out", "back"}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_other_float_dtypes(tmp_path, dtype):
    base = save_checkpoint(tmp_path / "base", [{"w": torch.randn(4, 4).to(dtype), "scale": torch.tensor(2.0)}])
    new = torch.randn(4, 4)
    patch = write_patch(tmp_path / "patch", base, {"w": new, "scale": torch.tensor(3.0)}, "b", {})
    apply_patch(patch, base, tmp_path / "out")
    loaded = load_file(tmp_path / "out" / SINGLE_FILE)
    assert raw(loaded["w"]) == raw(new.to(dtype))
    assert loaded["scale"] == 3


def test_patch_files_hold_the_tensors_after_and_before(case, base, patch):
    after, before = load_file(patch.folder / PATCH_FILE), load_file(patch.folder / ORIGINAL_FILE)
    assert after.keys() == before.keys() == case.changed.keys()
    for name in case.changed:
        assert raw(after[name]) == raw(case.expected[name])
        assert raw(before[name]) == raw(case.base[name])
    assert patch.base_model == "someone/model"
    assert patch.provenance == {"seed": 3}
    assert patch == read_patch(patch.folder)


def test_tensors_that_share_memory_or_are_not_contiguous(tmp_path):
    base = save_checkpoint(
        tmp_path / "base", [{"a": torch.zeros(3, 4), "b": torch.zeros(3, 4), "c": torch.zeros(4, 3)}]
    )
    new = torch.randn(3, 4)
    changed = {"a": new, "b": new, "c": torch.nn.Parameter(new).t()}
    apply_patch(write_patch(tmp_path / "patch", base, changed, "b", {}), base, tmp_path / "out")
    loaded = load_file(tmp_path / "out" / SINGLE_FILE)
    assert all(torch.equal(loaded[n], t) for n, t in {"a": new, "b": new, "c": new.t()}.items())


def test_a_new_patch_replaces_the_old_one_and_what_does_not_belong_to_it(case, base, patch):
    second = write_patch(patch.folder, base, {"layer.2.0.weight": torch.ones(3, 5)}, "b", {}, keep_original=False)
    assert set(second.tensors) == {"layer.2.0.weight"}
    assert set(contents(patch.folder)) == {PATCH_FILE, DOCUMENT_FILE}


@pytest.mark.parametrize(
    "changed",
    [
        {"nobody": torch.ones(3, 5)},
        {"layer.0.0.weight": torch.ones(5, 3)},
        {"layer.0.0.weight": torch.ones(3, 5, dtype=torch.int64)},
    ],
)
def test_changes_that_do_not_fit_the_base_are_our_bug(base, tmp_path, changed):
    with pytest.raises(ValueError, match=r"nobody|layer"):
        write_patch(tmp_path / "p", base, changed, "b", {})
    assert not (tmp_path / "p").exists()


def test_overflow_of_the_dtype_on_the_disk_is_refused(base, tmp_path):
    with pytest.raises(UserError, match="overflow"):
        write_patch(tmp_path / "p", base, {"layer.0.1.weight": torch.full((3, 5), 1e6)}, "b", {})
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("shard_size", ["50KB", "1GB"])
def test_patched_model_loads_in_transformers_with_exactly_the_new_weights(tmp_path, shard_size):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, dtype="bfloat16", tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    base, out = tmp_path / "base", tmp_path / "out"
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(base, max_shard_size=shard_size)
    assert (base / INDEX_FILE).is_file() == (shard_size == "50KB")
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 2)]
    changed = {name: torch.randn(32, 64) for name in names}
    expected = model.state_dict() | {name: tensor.bfloat16() for name, tensor in changed.items()}
    apply_patch(write_patch(tmp_path / "patch", base, changed, "b", {}), base, out)
    loaded, info = LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    state = loaded.state_dict()
    assert state.keys() == expected.keys()
    assert all(raw(state[name]) == raw(tensor) for name, tensor in expected.items())


def overwrite(folder, name, tensor):
    span = tensor_spans(folder)[name]
    with (folder / span.file).open("r+b") as handle:
        handle.seek(span.start)
        handle.write(raw(tensor))


def test_wrong_base_is_refused_and_nothing_is_left(base, patch, tmp_path):
    overwrite(base, "layer.1.0.weight", torch.zeros(3, 5))
    with pytest.raises(UserError, match=r"wrong base: 1 of .* 3 tensors .*someone/model.*layer\.1\.0\.weight, hash"):
        apply_patch(patch, base, tmp_path / "out")
    assert listing(tmp_path) == ["base", "patch"]


def test_states_of_verify(case, base, patch, tmp_path):
    names = tuple(sorted(case.changed))
    report = verify_patch(patch, base)
    assert (report.state, report.at_base, report.at_patched, report.mismatches) == ("base", names, (), ())
    out = tmp_path / "out"
    apply_patch(patch, base, out)
    report = verify_patch(patch, out)
    assert (report.state, report.at_base, report.at_patched) == ("patched", (), names)
    overwrite(out, names[0], case.base[names[0]])
    report = verify_patch(patch, out)
    assert (report.state, report.at_base, report.at_patched) == ("mixed", names[:1], names[1:])
    overwrite(out, names[1], torch.ones(3, 5))
    report = verify_patch(patch, out)
    assert (report.state, report.mismatches) == ("other", (Mismatch(names[1], "hash"),))


def test_verify_names_missing_tensors_dtypes_and_shapes(patch, tmp_path):
    model = save_checkpoint(
        tmp_path / "stranger", [{"layer.0.1.weight": torch.ones(3, 5), "layer.1.0.weight": torch.ones(15)}]
    )
    report = verify_patch(patch, model)
    assert report.state == "other"
    assert {m.name: m.reason for m in report.mismatches} == {
        "layer.0.1.weight": "dtype",
        "layer.1.0.weight": "shape",
        "layer.1.2.weight": "missing",
    }


def test_apply_refuses_what_is_patched_already_wholly_or_in_part(case, base, patch, tmp_path):
    apply_patch(patch, base, tmp_path / "out")
    with pytest.raises(UserError, match="already patched"):
        apply_patch(patch, tmp_path / "out", tmp_path / "again")
    overwrite(tmp_path / "out", "layer.0.1.weight", case.base["layer.0.1.weight"])
    with pytest.raises(UserError, match="in part"):
        apply_patch(patch, tmp_path / "out", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_out_folders_that_are_refused(base, patch, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "link").symlink_to(base)
    before = contents(tmp_path)
    for out in (base, base / "inside", tmp_path / "link", tmp_path / "link" / "x", base / "extra" / ".." / "y"):
        with pytest.raises(UserError, match="own folder or inside"):
            apply_patch(patch, base, out)
    with pytest.raises(UserError, match="own folder or inside"):
        apply_patch(patch, tmp_path / "link", base)
    for out in (tmp_path / "full", tmp_path / "full" / "mine", tmp_path):
        with pytest.raises(UserError, match="not empty"):
            apply_patch(patch, base, out)
    assert contents(tmp_path) == before


def test_out_may_be_an_empty_folder_or_lie_deep(base, patch, tmp_path):
    (tmp_path / "empty").mkdir()
    apply_patch(patch, base, tmp_path / "empty")
    apply_patch(patch, base, tmp_path / "a" / "b")
    assert contents(tmp_path / "empty") == contents(tmp_path / "a" / "b")


def test_hard_links_only_for_untouched_files(base, patch, tmp_path):
    out = tmp_path / "out"
    report = apply_patch(patch, base, out, link=True)
    linked = {file for file in contents(base) if (base / file).samefile(out / file)}
    assert linked == {"model-2.safetensors", INDEX_FILE, "config.json", "extra/tokenizer.json"}
    assert (report.files_linked, report.files_copied, report.files_reflinked) == (4, 0, 0)
    before = contents(base)
    for shard in ("model-0.safetensors", "model-1.safetensors"):
        with (out / shard).open("r+b") as handle:
            handle.write(b"\xff" * 8)
    assert contents(base) == before


def test_without_link_no_file_is_shared(base, patch, tmp_path):
    apply_patch(patch, base, tmp_path / "out")
    assert not any((base / file).samefile(tmp_path / "out" / file) for file in contents(base))


def test_reflinks_are_asked_for_and_save_all_but_the_changed_bytes(case, base, patch, tmp_path, monkeypatch):
    def ficlone(target, request, source):
        assert request == 0x40049409
        os.write(target, os.pread(source, 1 << 20, 0))

    monkeypatch.setattr("fcntl.ioctl", ficlone)
    report = apply_patch(patch, base, tmp_path / "out")
    assert (report.files_rewritten, report.files_copied, report.files_reflinked) == (2, 0, 4)
    assert report.bytes_written == sum(len(raw(case.expected[name])) for name in case.changed)
    revert_patch(patch, tmp_path / "out", None)
    assert contents(tmp_path / "out") == contents(base)


def test_revert_in_place_does_not_write_through_links(case, base, patch, tmp_path):
    out, twin = tmp_path / "out", tmp_path / "twin"
    apply_patch(patch, base, out)
    patched = contents(out)
    shutil.copytree(out, twin, copy_function=os.link)
    report = revert_patch(patch, twin, None)
    assert report.files_rewritten == 2
    assert contents(twin) == contents(base)
    assert contents(out) == patched


def test_revert_finishes_one_that_was_interrupted(base, patch, tmp_path):
    out = tmp_path / "out"
    apply_patch(patch, base, out)
    shutil.copy(base / "model-1.safetensors", out / "model-1.safetensors")
    assert verify_patch(patch, out).state == "mixed"
    assert revert_patch(patch, out, None).files_rewritten == 1
    assert contents(out) == contents(base)


def test_revert_refuses_base_and_strangers(base, patch, tmp_path):
    with pytest.raises(UserError, match="base already"):
        revert_patch(patch, base, None)
    overwrite(base, "layer.1.0.weight", torch.zeros(3, 5))
    before = contents(base)
    with pytest.raises(UserError, match="not a model with this patch"):
        revert_patch(patch, base, None)
    assert contents(base) == before


def test_revert_without_the_original_says_what_to_do(case, base, patch, tmp_path):
    apply_patch(patch, base, tmp_path / "out")
    assert patch.holds_original
    (patch.folder / ORIGINAL_FILE).unlink()
    assert not patch.holds_original
    with pytest.raises(UserError, match=r"original\.safetensors: is not there.*base 'someone/model'"):
        revert_patch(read_patch(patch.folder), tmp_path / "out", None)
    bare = write_patch(tmp_path / "bare", base, case.changed, "b", {}, keep_original=False)
    assert not bare.holds_original


def test_altered_original_is_noticed_and_changes_nothing(base, patch, tmp_path):
    out = tmp_path / "out"
    apply_patch(patch, base, out)
    before = contents(out)
    overwrite_file(patch.folder / ORIGINAL_FILE, -1)
    with pytest.raises(UserError, match=r"not what patch\.json says"):
        revert_patch(patch, out, None)
    with pytest.raises(UserError, match=r"not what patch\.json says"):
        revert_patch(patch, out, tmp_path / "back")
    assert contents(out) == before
    assert listing(tmp_path) == ["base", "out", "patch"]


def overwrite_file(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_changed_or_missing_byte_of_the_patched_tensors_is_refused(data):
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        base = save_checkpoint(root / "base", [{"w": torch.zeros(5), "v": torch.zeros(2, dtype=torch.bfloat16)}])
        folder = write_patch(root / "patch", base, {"w": torch.ones(5), "v": torch.ones(2)}, "b", {}).folder
        path = folder / PATCH_FILE
        position = data.draw(st.integers(0, path.stat().st_size - 1))
        if data.draw(st.booleans(), label="truncate"):
            path.write_bytes(path.read_bytes()[:position])
        else:
            overwrite_file(path, position)
        with pytest.raises(UserError, match=PATCH_FILE):
            read_patch(folder)


def edit_document(folder, change):
    document = json.loads((folder / DOCUMENT_FILE).read_text())
    change(document)
    (folder / DOCUMENT_FILE).write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format_version=2), "format_version"),
        (lambda d: d.pop("base_model"), "base_model"),
        (lambda d: d["tensors"]["layer.0.1.weight"].pop("sha256_after"), "sha256_after"),
        (lambda d: d["tensors"]["layer.0.1.weight"].update(shape=[5, 3]), "does not hold"),
        (lambda d: d["tensors"]["layer.0.1.weight"].update(shape=["3", 5]), "shape"),
        (lambda d: d["tensors"].pop("layer.0.1.weight"), "does not hold"),
        (lambda d: d.update(patch_sha256="0" * 64), "altered"),
    ],
)
def test_wrong_documents_are_refused(patch, change, message):
    edit_document(patch.folder, change)
    with pytest.raises(UserError, match=message) as caught:
        read_patch(patch.folder)
    assert "\n" not in str(caught.value)


def test_folders_that_are_no_patch_are_refused(patch, tmp_path):
    with pytest.raises(UserError, match="patch is a folder"):
        read_patch(tmp_path / "nowhere")
    (patch.folder / DOCUMENT_FILE).write_text('{"format_version": 1,')
    with pytest.raises(UserError, match="not a patch"):
        read_patch(patch.folder)


def test_hash_in_the_document_that_the_tensor_does_not_have_stops_apply(base, patch, tmp_path):
    edit_document(patch.folder, lambda d: d["tensors"]["layer.1.2.weight"].update(sha256_after="0" * 64))
    with pytest.raises(UserError, match=r"layer\.1\.2\.weight.*SHA-256 differs"):
        apply_patch(read_patch(patch.folder), base, tmp_path / "out")
    assert listing(tmp_path) == ["base", "patch"]


def test_hub_cache_links_are_followed_and_its_blobs_never_written(base, patch, tmp_path):
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    blobs.mkdir(parents=True)
    for i, (file, data) in enumerate(contents(base).items()):
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        (blobs / str(i)).write_bytes(data)
        (blobs / str(i)).chmod(0o444)
        (snapshot / file).symlink_to(os.path.relpath(blobs / str(i), (snapshot / file).parent))
    stored = contents(blobs)
    apply_patch(patch, base, tmp_path / "plain")
    for out, link in ((tmp_path / "copied", False), (tmp_path / "linked", True)):
        apply_patch(patch, snapshot, out, link=link)
        assert contents(out) == contents(tmp_path / "plain")
        assert not any(p.is_symlink() for p in out.rglob("*"))
    assert contents(blobs) == stored
    assert contents(snapshot) == contents(base)

    for i, file in enumerate(contents(base)):  # a cache that holds the patched model, reverted in place
        (blobs / str(i)).chmod(0o644)
        (blobs / str(i)).write_bytes((tmp_path / "plain" / file).read_bytes())
    stored = contents(blobs)
    revert_patch(patch, snapshot, None)
    assert contents(snapshot) == contents(base)
    assert contents(blobs) == stored


def test_broken_links_and_link_cycles_are_refused(base, patch, tmp_path):
    (base / "loop").symlink_to(tmp_path)
    with pytest.raises(UserError, match="link to a folder above"):
        apply_patch(patch, base, tmp_path / "out")
    (base / "loop").unlink()
    (base / "dangling").symlink_to("nowhere")
    with pytest.raises(UserError, match="dangling: is a broken link"):
        apply_patch(patch, base, tmp_path / "out")
    assert listing(tmp_path) == ["base", "patch"]


def test_permissions_are_kept(base, patch, tmp_path):
    (base / "model-0.safetensors").chmod(0o440)
    (base / "config.json").chmod(0o600)
    apply_patch(patch, base, tmp_path / "out")
    for file in ("model-0.safetensors", "config.json", "model-1.safetensors"):
        assert (tmp_path / "out" / file).stat().st_mode == (base / file).stat().st_mode


def test_other_weights_that_keep_the_knowledge_are_named(base, patch, tmp_path):
    (base / "pytorch_model.bin").write_bytes(b"old")
    save_file({"x": torch.ones(2)}, base / "extra" / "consolidated.safetensors")
    report = apply_patch(patch, base, tmp_path / "out")
    assert report.other_weights == ("extra/consolidated.safetensors", "pytorch_model.bin")


def fail_at(monkeypatch, owner, name, call, error):
    """Let the call number ``call`` of a function fail; return how often it was called."""
    real, calls = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)
    return calls


DISK_FULL = OSError(errno.ENOSPC, "No space left on device", "somewhere")


@pytest.mark.parametrize("call", range(1, 7))
@pytest.mark.parametrize("where", ["fsync", "copyfile"])
def test_disk_full_during_apply_leaves_nothing(base, patch, tmp_path, monkeypatch, where, call):
    monkeypatch.setattr(patch_module, "_reflink", lambda source, target: False)
    before = contents(tmp_path)
    owner = os if where == "fsync" else shutil
    calls = fail_at(monkeypatch, owner, where, call, DISK_FULL)
    with pytest.raises(UserError, match="disk full"):
        apply_patch(patch, base, tmp_path / "out")
    assert len(calls) == call
    assert listing(tmp_path) == ["base", "patch"]
    assert contents(tmp_path) == before


@pytest.mark.parametrize("call", [1, 2])
def test_disk_full_during_revert_in_place_changes_nothing(base, patch, tmp_path, monkeypatch, call):
    apply_patch(patch, base, tmp_path / "out")
    before = contents(tmp_path)
    fail_at(monkeypatch, os, "fsync", call, DISK_FULL)
    with pytest.raises(UserError, match="disk full"):
        revert_patch(patch, tmp_path / "out", None)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("call", [1, 2, 3])
def test_disk_full_during_write_patch_keeps_the_old_patch(base, patch, tmp_path, monkeypatch, call):
    before = contents(tmp_path)
    fail_at(monkeypatch, os, "fsync", call, DISK_FULL)
    with pytest.raises(UserError, match="disk full"):
        write_patch(patch.folder, base, {"layer.2.0.weight": torch.ones(3, 5)}, "b", {})
    assert contents(tmp_path) == before


def test_interrupt_leaves_nothing(base, patch, tmp_path, monkeypatch):
    fail_at(monkeypatch, os, "fsync", 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        apply_patch(patch, base, tmp_path / "out")
    assert listing(tmp_path) == ["base", "patch"]


def test_folder_that_cannot_be_written_is_the_users_mistake(base, patch, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        apply_patch(patch, base, tmp_path / "file" / "out")
    with pytest.raises(UserError, match="cannot write the patch"):
        write_patch(tmp_path / "file" / "p", base, {}, "b", {})
