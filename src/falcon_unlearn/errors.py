"""The one exception for mistakes a user can make; the command line prints it as a single line and exits with 2.

Beside it, how to tell that memory ran out, which libraries say in several ways.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something in the user's input is wrong: the message says what, where and what to do."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest known word, or the empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocator of torch raised it, of whatever device."""
    import torch

    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in text for words in ("can't allocate memory", "not enough memory", "backend out of memory")
    )
