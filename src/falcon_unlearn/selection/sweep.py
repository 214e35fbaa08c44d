"""Choose a layer by trying: a short unlearning run at each candidate, judged on records the run did not train on."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from pydantic import Field

from falcon_unlearn.artifacts import LayerScore
from falcon_unlearn.config import Section
from falcon_unlearn.errors import UserError


class SweepConfig(Section):
    """Trial runs of the sweep selector."""

    steps: int = Field(40, ge=1)
    """Optimiser steps of each trial."""
    validation_share: float = Field(0.25, gt=0, lt=1)
    """Share of forget and of retain records that trials are judged on and not trained on."""
    max_validation: int = Field(128, ge=1)
    """At most so many validation records of each kind."""


@dataclass(frozen=True)
class TrialOutcome:
    """A trial's mean answer probability on validation records, divided by the original model's.

    ``forget_left`` is 0 where the forget answers are gone, ``retain_kept`` is 1 where nothing was lost.
    """

    forget_left: float
    retain_kept: float

    @property
    def score(self) -> float:
        """Kept minus left: 1 is perfect, 0 is what doing nothing scores."""
        return min(self.retain_kept, 1.0) - self.forget_left


def spaced_candidates(layers: int, most: int, *, lowest: int = 0) -> tuple[int, ...]:
    """At most ``most`` layer indices from ``lowest`` to the last, evenly spaced, both ends included."""
    count = min(most, layers - lowest)
    if count <= 1:
        return (layers - 1,)
    step = (layers - 1 - lowest) / (count - 1)
    return tuple(sorted({lowest + round(i * step) for i in range(count)}))


def split_validation(groups: Sequence[Hashable], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split record indices into (training, validation) so that no group stands on both sides.

    Args:
        groups: one key per record; records with equal keys (phrasings of one fact) stay together.
        share: wanted share of groups in the validation part; at least one group stays on each side. A single
            group cannot be split: it then stands on both sides.
        seed: of the draw.
    """
    keys = list(dict.fromkeys(groups))
    if len(keys) < 2:
        everything = list(range(len(groups)))
        return everything, everything
    random.Random(f"validation {seed}").shuffle(keys)
    held = set(keys[: min(max(1, round(share * len(keys))), len(keys) - 1)])
    training = [i for i, key in enumerate(groups) if key not in held]
    return training, [i for i, key in enumerate(groups) if key in held]


def sweep(candidates: Sequence[int], trial: Callable[[int], TrialOutcome]) -> tuple[int, tuple[LayerScore, ...]]:
    """Run ``trial`` at every candidate; return the best layer (the lower one of equals) and all scores.

    A trial that gives no finite number scores minus infinity.

    Raises:
        UserError: no trial gives one.
    """
    scores = []
    for layer in candidates:
        outcome = trial(layer)
        value = outcome.score if math.isfinite(outcome.score) else -math.inf
        details = {"forget_left": outcome.forget_left, "retain_kept": outcome.retain_kept}
        scores.append(LayerScore(layer, value, details))
    best = max(scores, key=lambda s: (s.score, -s.layer))
    if best.score == -math.inf:
        raise UserError(
            "selection: the trial diverged at every layer; lower training.optimizer.lr or give selection.layers"
        )
    return best.layer, tuple(scores)
