"""What a run says while it works: lines and progress bars, on stderr only."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol


class Bar(Protocol):
    """The part of a progress bar that stages use."""

    def update(self, n: int = 1) -> object:
        """Count ``n`` more as done."""
        ...

    def set_postfix_str(self, s: str) -> object:
        """Show ``s`` behind the bar."""
        ...


@dataclass(frozen=True)
class Console:
    """Lines and bars on stderr; ``quiet`` says nothing at all."""

    quiet: bool = False

    def say(self, message: str) -> None:
        """Print one line."""
        if not self.quiet:
            print(message, file=sys.stderr, flush=True)

    @contextmanager
    def bar(self, total: int, label: str) -> Iterator[Bar]:
        """A progress bar of ``total`` ticks that disappears when it is done; none where stderr is no terminal."""
        from tqdm import tqdm

        disable = self.quiet or not sys.stderr.isatty()
        with tqdm(total=total, desc=label, file=sys.stderr, leave=False, disable=disable) as bar:
            yield bar


def in_columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as left-aligned columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def number(value: float | None) -> str:
    """Three decimals, or two digits where that would show nothing; a dash where there is no number."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.2g}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"
