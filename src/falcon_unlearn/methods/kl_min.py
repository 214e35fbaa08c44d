"""KL minimisation: ascent on the forget data, close to the original model on the retain data (Maini et al. 2024, TOFU).

forget = <log p>        retain = <KL(p0 || p)>, p0 the original model's next-token distribution
"""

from __future__ import annotations

from typing import Literal

from falcon_unlearn.methods.grad_ascent import GradAscent
from falcon_unlearn.methods.whole_method import WholeConfig


class KlMinConfig(WholeConfig):
    """Knobs of KL minimisation."""

    name: Literal["kl_min"] = "kl_min"
    retain: Literal["none", "nll", "kl"] = "kl"
    """kl, as published."""


class KlMin(GradAscent):
    """KL minimisation: ascent with a divergence as retain term."""
