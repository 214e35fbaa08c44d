import hashlib
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from falcon_unlearn.errors import UserError
from falcon_unlearn.model.shards import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorSpan,
    file_spans,
    iter_bytes,
    read_bytes,
    sha256_of,
    tensor_spans,
    write_safetensors,
)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def raw(tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def random_tensor(dtype, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 3).to(DTYPES[dtype])


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
layouts = st.dictionaries(
    st.text("abc.é0", min_size=1, max_size=8), st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=6
)


@pytest.fixture
def single(tmp_path):
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, tmp_path / SINGLE_FILE)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    save_file({"a": torch.arange(6.0)}, tmp_path / "x-1.safetensors")
    save_file({"b": torch.ones(4), "c": torch.zeros(2)}, tmp_path / "x-2.safetensors")
    write_index(tmp_path, {"a": "x-1.safetensors", "b": "x-2.safetensors", "c": "x-2.safetensors"})
    return tmp_path


def write_index(folder, weight_map):
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def rewrite_header(path, change):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@settings(max_examples=40, deadline=None)
@given(layouts, st.integers(0, 2**16))
def test_spans_are_the_bytes_that_safetensors_wrote(layout, seed):
    tensors = {name: random_tensor(dtype, shape, seed + i) for i, (name, (dtype, shape)) in enumerate(layout.items())}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
        spans = tensor_spans(folder)
        assert {n: (s.dtype, s.shape) for n, s in spans.items()} == layout
        for n, tensor in tensors.items():
            assert read_bytes(folder, spans[n]) == raw(tensor)
            assert sha256_of(folder, spans[n]) == hashlib.sha256(raw(tensor)).hexdigest()


@settings(max_examples=40, deadline=None)
@given(layouts, st.integers(0, 2**16))
def test_safetensors_reads_what_write_safetensors_wrote(layout, seed):
    tensors = {name: random_tensor(dtype, shape, seed + i) for i, (name, (dtype, shape)) in enumerate(layout.items())}
    like = {n: TensorSpan("", layout[n][0], layout[n][1], 0, len(raw(t))) for n, t in tensors.items()}
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "out.safetensors"
        digest = write_safetensors(path, like, lambda n: [raw(tensors[n])[:3], raw(tensors[n])[3:]])
        assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
        loaded = load_file(path)
        assert {n: (t.dtype, t.shape) for n, t in loaded.items()} == {n: (t.dtype, t.shape) for n, t in tensors.items()}
        assert all(raw(loaded[n]) == raw(t) for n, t in tensors.items())
        assert all(s.start % loaded[n].element_size() == 0 for n, s in file_spans(path).items())


def test_chunks_add_up_for_tensors_larger_than_one_chunk(tmp_path):
    data = torch.randn(1_500_000)
    save_file({"small": torch.ones(3), "w": data}, tmp_path / SINGLE_FILE)
    span = tensor_spans(tmp_path)["w"]
    chunks = list(iter_bytes(tmp_path, span))
    assert len(chunks) == 2
    assert b"".join(chunks) == raw(data)


def test_index_gives_the_file_of_each_tensor(sharded):
    spans = tensor_spans(sharded)
    assert {n: s.file for n, s in spans.items()} == {
        "a": "x-1.safetensors",
        "b": "x-2.safetensors",
        "c": "x-2.safetensors",
    }
    assert read_bytes(sharded, spans["a"]) == raw(torch.arange(6.0))


def test_single_file_wins_over_the_index_as_in_transformers(sharded):
    save_file({"only": torch.ones(1)}, sharded / SINGLE_FILE)
    assert set(tensor_spans(sharded)) == {"only"}


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_every_truncation_is_refused(data):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / SINGLE_FILE
        save_file({"a": torch.arange(6.0), "b": torch.ones(3, dtype=torch.float16)}, path)
        whole = path.read_bytes()
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(UserError, match=SINGLE_FILE):
            tensor_spans(path.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["a"].update(shape=[2, 4]), "'a' do not fit"),
        (lambda h: h["a"].update(dtype="F16"), "'a' do not fit"),
        (lambda h: h["a"].update(dtype="F7"), "'a' do not fit"),
        (lambda h: h["a"].update(dtype=["F32"]), "'a' do not fit"),
        (lambda h: h["a"].update(shape=[-2, -3]), "'a' do not fit"),
        (lambda h: h["a"].update(shape=3), "'a' do not fit"),
        (lambda h: h["a"].update(data_offsets=[0]), "'a' do not fit"),
        (lambda h: h["a"].pop("data_offsets"), "'a' do not fit"),
        (lambda h: h.update(a=None), "'a' do not fit"),
        (lambda h: h.pop("b"), "longer than its header says|gap"),
        (lambda h: h["b"].update(data_offsets=[0, 8]), "gap or an overlap"),
    ],
)
def test_altered_headers_are_refused(single, change, message):
    rewrite_header(single / SINGLE_FILE, change)
    with pytest.raises(UserError, match=message):
        tensor_spans(single)


def test_trailing_bytes_are_refused(single):
    with (single / SINGLE_FILE).open("ab") as handle:
        handle.write(b"\0")
    with pytest.raises(UserError, match="longer than its header says"):
        tensor_spans(single)


def test_header_that_is_not_an_object_is_refused(single):
    (single / SINGLE_FILE).write_bytes((2).to_bytes(8, "little") + b"[]")
    with pytest.raises(UserError, match="not a safetensors file"):
        tensor_spans(single)


def test_git_lfs_pointer_is_recognised(tmp_path):
    (tmp_path / SINGLE_FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="git lfs pull"):
        tensor_spans(tmp_path)


def test_folders_without_safetensors_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        tensor_spans(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither"):
        tensor_spans(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"only safetensors.*save_pretrained"):
        tensor_spans(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "gone.safetensors"}, "names 'gone.safetensors'"),
        ({"a": "../x-1.safetensors"}, "outside"),
        ({"a": "/etc/passwd"}, "outside"),
        ({"z": "x-1.safetensors"}, "no tensor 'z'"),
        ({"a": 7}, "weight_map"),
        (None, "weight_map"),
    ],
)
def test_wrong_indexes_are_refused(sharded, weight_map, message):
    write_index(sharded, weight_map)
    with pytest.raises(UserError, match=message):
        tensor_spans(sharded)


def test_index_that_is_not_json_is_refused(sharded):
    (sharded / INDEX_FILE).write_text("{")
    with pytest.raises(UserError, match="weight_map"):
        tensor_spans(sharded)


def test_shard_cut_after_its_header_was_read_is_refused(single):
    span = tensor_spans(single)["b"]
    path = single / SINGLE_FILE
    path.write_bytes(path.read_bytes()[: span.end - 1])
    with pytest.raises(UserError, match="truncated"):
        read_bytes(single, span)
