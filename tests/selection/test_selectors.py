from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_unlearn.selection.selectors import (
    CRITERIA,
    SEPARATIONS,
    SMALLEST,
    WHOLE_MODEL_SELECTORS,
    Selector,
    middle,
)


def test_every_selector_is_in_the_table():
    assert list(CRITERIA) == list(get_args(Selector))
    assert set(SEPARATIONS) | SMALLEST | WHOLE_MODEL_SELECTORS <= set(CRITERIA)


@pytest.mark.parametrize(("total", "layer"), [(1, 0), (2, 1), (4, 2), (5, 2), (6, 3), (8, 4), (32, 16)])
def test_the_middle_of_all_layers(total, layer):
    assert middle(range(total), total) == layer


@given(candidates=st.sets(st.integers(0, 31), min_size=1))
def test_no_candidate_is_nearer_to_the_middle(candidates):
    chosen = middle(sorted(candidates), 32)
    assert chosen in candidates
    assert all(abs(chosen - 16) <= abs(other - 16) for other in candidates)
