"""How much of a text a model gives back when it is fed the text itself: pure functions of a sequence's tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence


def extraction_strength(correct: Sequence[bool]) -> float:
    """Share of a text, from its end, that greedy decoding continues word for word (Carlini et al. 2021).

    ``1 - min{k : the model gives tokens k.. from the tokens before each} / n``, as OpenUnlearning defines it. Its loop
    ends at the last token and so gives 1/n even where that token is wrong; here that is 0.

    Args:
        correct: whether each scored token is the most probable one.

    Returns:
        A number in [0, 1]; NaN without a token (OpenUnlearning: 0).
    """
    if not correct:
        return math.nan
    given_back = next((i for i, right in enumerate(reversed(correct)) if not right), len(correct))
    return given_back / len(correct)


def exact_memorization(correct: Sequence[bool]) -> float:
    """Share of tokens that are the most probable one (Tirumala et al. 2022; OpenUnlearning's exact memorization).

    Args:
        correct: whether each scored token is the most probable one.

    Returns:
        A number in [0, 1]; NaN without a token.
    """
    return sum(correct) / len(correct) if correct else math.nan
