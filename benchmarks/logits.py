"""Log-probabilities of targets and their gradients: the vocabulary in blocks against logits materialised.

Forward and backward from final hidden states ``(N, D)`` and a trained head ``(V, D)`` to both gradients. References:
``plain`` is the head, then ``F.cross_entropy``; ``checkpoint`` is the same on chunks of positions whose logits are as
large as one of our blocks, each recomputed in the backward pass.

Memory is the peak above inputs, both gradients included; ``least`` are these gradients alone.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass
from typing import Any

import torch
from harness import gib, interleaved, options, peak_memory, show
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from falcon_unlearn.objectives.vocabulary import BLOCK_BYTES, Head, target_log_probabilities


@dataclass(frozen=True)
class Shape:
    """N positions, D hidden, V vocabulary."""

    positions: int
    hidden: int
    vocabulary: int
    dtype: torch.dtype = torch.float32


FULL = Shape(2048, 1024, 128 * 1024)
QUICK = Shape(512, 256, 64 * 1024)


@functools.cache
def inputs(shape: Shape, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and targets; logits have a standard deviation of about 3."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape.positions, shape.hidden, generator=generator)
    weight = torch.randn(shape.vocabulary, shape.hidden, generator=generator) * 3 / shape.hidden**0.5
    targets = torch.randint(shape.vocabulary, (shape.positions,), generator=generator)
    hidden, weight = (tensor.to(device, shape.dtype).requires_grad_() for tensor in (hidden, weight))
    return hidden, weight, targets.to(device)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


def checkpointed(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    chunk = max(BLOCK_BYTES // (4 * len(weight)), 1)
    parts = [
        checkpoint(plain, hidden[i : i + chunk], weight, targets[i : i + chunk], use_reentrant=False)
        for i in range(0, len(hidden), chunk)
    ]
    return torch.cat(parts)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return target_log_probabilities(hidden, Head(weight), targets)


WAYS = {"plain": plain, "checkpoint": checkpointed, "ours": ours}


def forward_and_backward(way: str, shape: Shape, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Values, and the gradients of their sum to hidden states and head."""
    hidden, weight, targets = inputs(shape, device)
    values = WAYS[way](hidden, weight, targets)
    by_hidden, by_weight = torch.autograd.grad(values.sum(), (hidden, weight))
    return values.detach(), by_hidden, by_weight


def prepare(shape: Shape, device: str, threads: int) -> None:
    """The inputs, and what the first product of a process sets up."""
    torch.set_num_threads(threads)
    inputs(shape, device)
    (torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)).sum().item()


def measure(shape: Shape, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time, memory and difference of every way."""
    device = arguments.device
    setup = functools.partial(prepare, shape, device, torch.get_num_threads())
    memory = {way: peak_memory(forward_and_backward, way, shape, device, device=device, prepare=setup) for way in WAYS}
    timings = interleaved(
        {way: functools.partial(forward_and_backward, way, shape, device) for way in WAYS},
        device=device,
        runs=arguments.runs,
    )
    expected = forward_and_backward("plain", shape, device)
    results = forward_and_backward("ours", shape, device)
    differences = [float((a - b).abs().max()) for a, b in zip(results, expected, strict=True)]
    seconds = {way: timing.median for way, timing in timings.items()}
    return {
        "positions": shape.positions,
        "hidden": shape.hidden,
        "vocabulary": shape.vocabulary,
        "speedup": seconds["plain"] / seconds["ours"],
        "memory_ratio": memory["ours"] / memory["plain"],
        "max_abs_diff": max(differences),
        "seconds": seconds,
        "bytes": memory,
        "least_bytes": sum(tensor.nbytes for tensor in expected[1:]),
        "timings": {way: str(timing) for way, timing in timings.items()},
    }


def main() -> None:
    """Run and print."""
    parser = options(__doc__)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    base = QUICK if arguments.quick else FULL
    shape = Shape(base.positions, base.hidden, base.vocabulary, getattr(torch, arguments.dtype))
    result = measure(shape, arguments)
    timings = result.pop("timings")
    rows = [
        (way, timings[way], gib(result["bytes"][way]), f"{result['bytes'][way] / result['bytes']['plain']:.2f}")
        for way in WAYS
    ]
    title = (
        f"N = {shape.positions}, D = {shape.hidden}, V = {shape.vocabulary}, {arguments.dtype}; "
        f"median of {arguments.runs} after a warm-up\n"
        f"speedup {result['speedup']:.2f}, largest difference of values and gradients {result['max_abs_diff']:.1e}, "
        f"least {gib(result['least_bytes'])}"
    )
    show(arguments, title, [("way", "forward and backward", "peak memory", "of plain"), *rows], result)


if __name__ == "__main__":
    main()
