"""One file a method: which forward passes feed which objective.

``METHODS`` is the table: a new method is one file, one line here and one test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from falcon_unlearn.methods.base import Method, Setup
from falcon_unlearn.methods.falcon import Falcon, FalconConfig
from falcon_unlearn.methods.rmu import Rmu, RmuConfig

__all__ = ["METHODS", "Falcon", "FalconConfig", "Method", "MethodConfig", "Rmu", "RmuConfig", "Setup"]

MethodConfig = Annotated[FalconConfig | RmuConfig, Field(discriminator="name")]


@dataclass(frozen=True)
class MethodEntry:
    """One line of the table."""

    config: type[FalconConfig] | type[RmuConfig]
    build: Callable[[Any, Setup], Method]
    summary: str


METHODS: Mapping[str, MethodEntry] = {
    "falcon": MethodEntry(FalconConfig, Falcon, "contrastive orthogonal unalignment of one layer's activations"),
    "rmu": MethodEntry(RmuConfig, Rmu, "steers forget activations to a random direction"),
}
