"""ROUGE-L recall as TOFU computes it, and in a form that also works outside the Latin script."""

from __future__ import annotations

import functools
import unicodedata
from typing import TYPE_CHECKING

from falcon_unlearn.corpus.probes import UNSPACED_SCRIPTS

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_JOINERS = "\u200c\u200d"


class UnicodeTokenizer:
    """Words of letters and digits with their combining marks; letters of unspaced scripts one by one.

    ASCII words come out as ``rouge_score``'s own tokenizer makes them, Porter's stemmer included.
    """

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._ascii = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """Split NFKC-normalised, case-folded ``text``."""
        tokens: list[str] = []
        in_token = extendable = False
        for char in unicodedata.normalize("NFKC", text).casefold():
            if in_token and (unicodedata.category(char).startswith("M") or char in _JOINERS):
                tokens[-1] += char
            elif char.isalnum():
                spaced = unicodedata.name(char, "").split(" ", 1)[0] not in UNSPACED_SCRIPTS
                if extendable and spaced:
                    tokens[-1] += char
                else:
                    tokens.append(char)
                in_token, extendable = True, spaced
            else:
                in_token = extendable = False
        return [self._ascii.tokenize(token)[0] if token.isascii() else token for token in tokens]


@functools.cache
def _scorer(unicode: bool) -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    if unicode:
        return RougeScorer(["rougeL"], tokenizer=UnicodeTokenizer())
    return RougeScorer(["rougeL"], use_stemmer=True)


def _needs_unicode(text: str) -> bool:
    alphanumeric = [char for char in unicodedata.normalize("NFKC", text) if char.isalnum()]
    beyond_ascii = [char for char in alphanumeric if not char.isascii()]
    return len(beyond_ascii) == len(alphanumeric) or any("LATIN" not in unicodedata.name(c, "") for c in beyond_ascii)


def rouge_l_recall(reference: str, candidate: str) -> float:
    """Share of the reference's tokens in the longest common subsequence with ``candidate`` (Lin 2004).

    ``rouge_score``'s own tokenizer (TOFU's choice, with Porter's stemmer) sees nothing but ``[a-z0-9]``. It is used
    for every reference in Latin letters, accented or not, and so for all of TOFU's evaluation sets;
    :class:`UnicodeTokenizer` takes over where the reference has other letters, or no ASCII letter or digit at all.
    The candidate has no say in that.

    Returns:
        A number in [0, 1]; 0 if the reference has no tokens.
    """
    scores = _scorer(_needs_unicode(reference)).score(reference, candidate)
    return float(scores["rougeL"].recall)
