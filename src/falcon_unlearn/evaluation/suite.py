"""What every evaluation suite is: its inputs read first, per-sample rows per part, numbers from the rows alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from falcon_unlearn.artifacts import SuiteResult
from falcon_unlearn.corpus.batching import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rows = Mapping[str, Sequence[Any]]
"""Per-sample records (frozen dataclasses) by name of the part."""


@dataclass(frozen=True)
class Subject:
    """A model under evaluation.

    ``model`` is in memory, on its device; ``name`` says what it is, for the settings.
    """

    model: PreTrainedModel
    encoder: Encoder
    batch_size: int
    name: str

    @property
    def device(self) -> torch.device:
        """Where batches are put."""
        device: torch.device = self.model.device
        return device


class Suite(Protocol):
    """An evaluation suite with its inputs read and checked.

    A suite is cut into parts (a set of questions, a task), a part into units (a question; a whole task where it
    cannot be cut), so that an interrupted evaluation goes on behind the last finished units.
    """

    @property
    def parts(self) -> Mapping[str, int]:
        """Name of the part -> number of its units."""
        ...

    @property
    def content(self) -> Mapping[str, str]:
        """SHA-256 of everything the scores depend on beside the model, by name."""
        ...

    def score(self, part: str, units: range, subject: Subject) -> Sequence[Any]:
        """Per-sample rows (frozen dataclasses) of some units of a part."""
        ...

    def row(self, part: str, plain: Mapping[str, Any]) -> Any:
        """A row read back from JSON."""
        ...

    def summarise(self, rows: Rows, oracle: Rows | None, settings: Mapping[str, Any]) -> SuiteResult:
        """The numbers, from all rows of this model and, where there is one, of the oracle. Pure."""
        ...

    def exports(self, rows: Rows, oracle: Rows | None) -> Mapping[str, Any]:
        """Further files in other tools' formats: name -> JSON."""
        ...


class SuiteConfig(Protocol):
    """The section that configures a suite."""

    def open(self, base_dir: Path, seed: int) -> Suite:
        """Read and check everything the suite needs.

        Raises:
            UserError: naming the key, the file or dataset page, and what to do.
        """
        ...
