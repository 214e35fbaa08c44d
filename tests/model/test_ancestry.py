"""Where on a line of patches a model stands, and the list that a patched checkpoint carries."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_unlearn.errors import UserError
from falcon_unlearn.model.ancestry import LEDGER_FILE, Ancestor, Laid, level, patch_id, read_ledger, write_ledger

NAMES = ("a", "b", "c")


@st.composite
def lines(draw):
    """The states of a model along a line of patches, and the patches between them."""
    state = {name: f"{name}0" for name in NAMES}
    states, chain = [dict(state)], []
    for step in range(draw(st.integers(0, 4))):
        touched = draw(st.sets(st.sampled_from(NAMES), min_size=1))
        chain.append({name: (state[name], f"{name}{step + 1}") for name in touched})
        state = {**state, **{name: after for name, (_, after) in chain[-1].items()}}
        states.append(dict(state))
    return states, chain


@given(lines(), st.data())
def test_the_level_is_the_number_of_patches_that_lie_on_the_model(line, data):
    states, chain = line
    k = data.draw(st.integers(0, len(chain)))
    assert level(chain, states[k].get) == k


@given(lines(), st.data())
def test_a_model_with_a_tensor_of_no_state_or_without_it_has_no_level(line, data):
    states, chain = line
    touched = sorted({name for patch in chain for name in patch})
    if not touched:
        return
    name = data.draw(st.sampled_from(touched))
    stranger = {**data.draw(st.sampled_from(states)), name: data.draw(st.sampled_from(["stranger", None]))}
    assert level(chain, stranger.get) is None


def test_a_patch_in_the_middle_alone_is_no_level():
    chain = [{"a": ("a0", "a1")}, {"b": ("b0", "b1")}]
    assert level(chain, {"a": "a0", "b": "b1"}.get) is None


def test_an_id_covers_the_file_the_tensors_the_data_and_everything_below():
    ancestor = Ancestor("1" * 64, "/runs/1/patch", {"a": ("a0", "a1")})
    given_ = ("f" * 64, {"a": ("a1", "a2")}, (ancestor,), {"forget": "x"})
    others = [
        ("e" * 64, *given_[1:]),
        (given_[0], {"a": ("a1", "a3")}, *given_[2:]),
        (*given_[:2], (), given_[3]),
        (*given_[:2], (Ancestor("2" * 64, "/runs/1/patch", ancestor.tensors),), given_[3]),
        (*given_[:3], {"forget": "y"}),
    ]
    assert len({patch_id(*parts) for parts in (given_, *others)}) == 1 + len(others)
    moved = Ancestor(ancestor.id, "/elsewhere", ancestor.tensors)
    assert patch_id(*given_[:2], (moved,), given_[3]) == patch_id(*given_)


def test_the_list_is_there_from_the_second_patch_on_and_reads_back(tmp_path):
    first, second = Laid("1" * 64, "/runs/1"), Laid("2" * 64, "/runs/2")
    write_ledger(tmp_path, [first])
    assert list(tmp_path.iterdir()) == []
    assert read_ledger(tmp_path) == ()
    write_ledger(tmp_path, [first, second])
    assert read_ledger(tmp_path) == (first, second)
    write_ledger(tmp_path, [first])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"patches": 3}', '{"patches": [{"id": "1"}]}'])
def test_a_damaged_list_is_the_users_to_mend(tmp_path, content):
    (tmp_path / LEDGER_FILE).write_text(content)
    with pytest.raises(UserError, match=f"{LEDGER_FILE}: is not a list of the patches"):
        read_ledger(tmp_path)


def test_the_list_names_ids_and_folders_and_nothing_else(tmp_path):
    write_ledger(tmp_path, [Laid("1", "/runs/1"), Laid("2", "/runs/2")])
    stored = json.loads((tmp_path / LEDGER_FILE).read_text())
    assert stored == {"patches": [{"id": "1", "folder": "/runs/1"}, {"id": "2", "folder": "/runs/2"}]}
