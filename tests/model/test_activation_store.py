import itertools
import json

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from falcon_unlearn.errors import UserError
from falcon_unlearn.model.activation_store import ActivationStore, Slabs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tensor(seed, shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "activations"


@given(
    puts=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 40), st.sampled_from(DTYPES)), max_size=12),
    budget=st.sampled_from([0, 64, 200, 10_000]),
    slab=st.sampled_from([None, 0, 1, 700, 100_000]),
)
@example(puts=[("a", 1, torch.bfloat16), ("a", 0, torch.float32)], budget=64, slab=0)
def test_is_a_dictionary_whatever_the_budget_and_the_memory(tmp_path_factory, puts, budget, slab):
    slabs = None if slab is None else Slabs(pinned=False, size=slab)
    store, expected = ActivationStore(tmp_path_factory.mktemp("store") / "file", budget, slabs), {}
    for seed, (key, length, dtype) in enumerate(puts):
        expected[key] = tensor(seed, (length, 3), dtype)
        store.put(key, expected[key])
        assert store.bytes_in_memory <= budget
    assert [key in store for key in "abcd"] == [key in expected for key in "abcd"]
    in_memory = sum(v.numel() * v.element_size() for key, v in expected.items() if store.in_memory(key))
    assert in_memory == store.bytes_in_memory
    for key, value in expected.items():
        assert store.get(key).dtype == value.dtype
        assert torch.equal(store.get(key), value)
    kept = sum(v.numel() * v.element_size() for v in expected.values())
    assert store.bytes_in_memory + store.bytes_on_disk >= kept
    assert (store.bytes_on_disk == 0) or not store.path.exists() or store.path.stat().st_size == store.bytes_on_disk


def test_keeps_a_copy(path):
    store, value = ActivationStore(path), tensor(0, (4,))
    store.put("a", value)
    value.zero_()
    assert store.get("a").any()


def test_what_has_the_same_size_is_overwritten_where_it_lies(path):
    store = ActivationStore(path, 0)
    for seed in range(5):
        store.put("a", tensor(seed, (8, 2)))
        store.put("b", tensor(-seed, (3,)))
    assert store.bytes_on_disk == 4 * (16 + 3)
    assert torch.equal(store.get("a"), tensor(4, (8, 2)))
    assert torch.equal(store.get("b"), tensor(-4, (3,)))


def test_nothing_is_written_within_the_budget_and_nothing_is_left_after_close(path):
    store = ActivationStore(path, 1000)
    store.put("a", tensor(0, (10,)))
    assert not path.parent.exists()
    store.put("b", tensor(1, (1000,)))
    assert path.exists()
    store.seal("it")
    store.close()
    assert list(path.parent.iterdir()) == []
    assert "a" not in store
    assert "b" not in store


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/activations: cannot be written .*: free some space$"):
        ActivationStore(tmp_path / "file" / "activations", 0).put("a", tensor(0, (2,)))


def test_tensors_in_slabs_share_blocks_and_nothing_else():
    slabs = Slabs(pinned=False, size=1 << 12)
    values = [tensor(seed, (3, seed), DTYPES[seed % 3]) for seed in range(1, 30)]
    copies = [slabs.copy(value) for value in values]
    assert all(map(torch.equal, copies, values))
    spans = sorted((c.data_ptr(), c.data_ptr() + c.nbytes) for c in copies)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert len({c.untyped_storage().data_ptr() for c in copies}) < 10
    views = tensor(0, (8, 6)).T[2:]
    assert torch.equal(slabs.copy(views), views)
    large = tensor(1, (5000,))
    assert slabs.copy(large).untyped_storage().nbytes() == large.nbytes


class TestReopen:
    @pytest.fixture
    def sealed(self, path):
        store = ActivationStore(path, 0)
        store.put("a", tensor(0, (5, 2), torch.bfloat16))
        store.put("b", tensor(1, (7,)))
        store.seal("weights of today")
        return path

    def test_gives_back_what_was_sealed(self, sealed):
        store = ActivationStore(sealed, 0)
        assert store.reopen("weights of today")
        assert torch.equal(store.get("a"), tensor(0, (5, 2), torch.bfloat16))
        assert torch.equal(store.get("b"), tensor(1, (7,)))
        store.put("c", tensor(2, (3,)))
        assert torch.equal(store.get("b"), tensor(1, (7,)))
        assert torch.equal(store.get("c"), tensor(2, (3,)))

    @pytest.mark.parametrize("damage", ["truncated", "altered", "longer", "gone", "index", "no index", "other index"])
    def test_never_uses_what_is_damaged(self, sealed, damage):
        data, index = sealed.read_bytes(), sealed.with_name("activations.json")
        match damage:
            case "truncated":
                sealed.write_bytes(data[:-1])
            case "altered":
                sealed.write_bytes(data[:9] + bytes([data[9] ^ 1]) + data[10:])
            case "longer":
                sealed.write_bytes(data + b"x")
            case "gone":
                sealed.unlink()
            case "index":
                index.write_text(index.read_text()[:-20])
            case "no index":
                index.unlink()
            case "other index":
                index.write_text(json.dumps([1]))
        store = ActivationStore(sealed, 0)
        assert not store.reopen("weights of today")
        assert "a" not in store
        store.put("a", tensor(5, (2,)))
        assert torch.equal(store.get("a"), tensor(5, (2,)))

    def test_never_uses_those_of_other_weights(self, sealed):
        assert not ActivationStore(sealed, 0).reopen("weights of tomorrow")
