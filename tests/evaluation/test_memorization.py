"""Both measures equal a plain reading of their definitions."""

import math

from hypothesis import given
from hypothesis import strategies as st

from falcon_unlearn.evaluation.memorization import exact_memorization, extraction_strength

TOKENS = st.lists(st.booleans(), min_size=1, max_size=40)


def naive_strength(correct):
    """1 - min k / n over every k, the whole text (k = n) included: nothing has to be given back then."""
    n = len(correct)
    return 1 - min(k for k in range(n + 1) if all(correct[k:])) / n


def published_strength(correct):
    """OpenUnlearning's loop, which stops at the last token whether it is right or not."""
    n = len(correct)
    for k in range(n):
        if all(correct[k:]):
            break
    return 1 - k / n


@given(TOKENS)
def test_extraction_strength_is_its_definition(correct):
    assert math.isclose(extraction_strength(correct), naive_strength(correct), abs_tol=1e-12)


@given(TOKENS)
def test_extraction_strength_is_the_published_code_wherever_the_last_token_is_right(correct):
    expected = published_strength(correct) if correct[-1] else 0
    assert math.isclose(extraction_strength(correct), expected, abs_tol=1e-12)


@given(TOKENS)
def test_exact_memorization_is_a_share(correct):
    assert exact_memorization(correct) == len([c for c in correct if c]) / len(correct)
    assert extraction_strength(correct) <= exact_memorization(correct)


def test_nothing_scored_is_no_number():
    assert math.isnan(extraction_strength(()))
    assert math.isnan(exact_memorization(()))
