"""SCRUB: away from the teacher on the forget data, along with it on the retain data (Kurmanji et al. 2023, 2302.09880).

max step:  forget = -<KL(p0 || p)>                          every other turn, as long as they last
min step:  retain = a <KL(p0 || p)> + g <-log p>            all other steps

p0: next-token distribution of the teacher, which is the original model. A turn is one step, or with several domains so
many that each domain of both sides has its share of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from falcon_unlearn.corpus.batching import Batch
from falcon_unlearn.methods.base import WholeSetup
from falcon_unlearn.methods.whole_method import WholeConfig, WholeMethod, nll


class ScrubConfig(WholeConfig):
    """Knobs of SCRUB; ``retain_weight`` is a."""

    name: Literal["scrub"] = "scrub"
    retain: Literal["kl"] = "kl"
    """The teacher; nothing else is SCRUB."""
    nll_weight: float = Field(1.0, ge=0)
    """g, factor on the ordinary loss in min steps (0.99 in the authors' code for images, with a = 0.001)."""
    max_steps: int | None = Field(None, ge=1)
    """So many max steps (rounded up to whole turns), then min steps only; empty: to the end."""


class Scrub(WholeMethod):
    """SCRUB."""

    def __init__(self, config: ScrubConfig, setup: WholeSetup) -> None:
        super().__init__(config, setup)
        self.config = config
        self._turn = math.lcm(len(setup.forget_batches), setup.retain_domains)

    def _is_max_step(self, step: int) -> bool:
        turn, most = step // self._turn, self.config.max_steps
        return turn % 2 == 0 and (most is None or turn // 2 * self._turn < most)

    def forget_loss(self, step: int, domain: str, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor | None:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        if not self._is_max_step(step):
            return None
        return -self.config.forget_weight * self.divergence(batch, self.predictions(batch, masters))

    def retain_loss(self, step: int, batch: Batch, masters: Mapping[str, Tensor]) -> Tensor | None:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        if self._is_max_step(step):
            return None
        now = self.predictions(batch, masters)
        return self.config.retain_weight * self.divergence(batch, now) + self.config.nll_weight * nll(now)
