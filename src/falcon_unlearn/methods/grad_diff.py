"""GradDiff: ascent on the forget data, descent on the retain data (Liu et al. 2022, arXiv 2203.12817; TOFU's baseline).

forget = <log p>        retain = <-log p>
"""

from __future__ import annotations

from typing import Literal

from falcon_unlearn.methods.grad_ascent import GradAscent
from falcon_unlearn.methods.whole_method import WholeConfig


class GradDiffConfig(WholeConfig):
    """Knobs of GradDiff."""

    name: Literal["grad_diff"] = "grad_diff"


class GradDiff(GradAscent):
    """GradDiff: ascent with a retain term."""
