"""The forget gradient taken part of the way back to the original weights.

Finetuning on a few forget records brings the rest back because it goes back the way that unlearning came. So what is
to be forgotten has to stay forgotten on that way too: at step t the forget gradient is that at

    w + a (w0 - w),    a uniform in [0, ``training.interpolation``), drawn anew each step

with w0 the weights that training began with, and is applied to w; the retain gradient is that at w. With adapters w is
their factors, so that their product is taken back on a curve. It costs two more copies of the trained tensors and no
further pass. The weights between two models are what is looked at under the name of linear mode connectivity (Frankle
et al., ICML 2020, arXiv 1912.05671); ours is to train on them, measured in docs/science.md.
``falcon-unlearn attack`` looks at the same line (interpolate).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from falcon_unlearn.methods.base import generator_for


def drawn_share(most: float, seed: int, step: int) -> float:
    """How far back the forget gradient of a step is taken, in ``[0, most)``: the same on every process."""
    return most * float(torch.rand((), generator=generator_for(seed, "interpolation", step)))


@contextmanager
def on_the_way_back(parameters: Sequence[Tensor], origin: Sequence[Tensor], share: float) -> Iterator[None]:
    """Inside the block the parameters lie ``share`` of the way to ``origin``; behind it where they were, to the bit.

    Args:
        parameters: leaves; changed in place.
        origin: of the same shapes.
        share: 0 stays, 1 is the origin.
    """
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            torch._foreach_lerp_(list(parameters), list(origin), share)
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(parameters), before)
