"""Principal offset vector: one factorisation and products of rank K against the loop over D x D matrices.

Reference: ``torch.linalg.svd`` of the activations, then ``P -= w v_k v_k'`` for every k, then ``r P``, as the
authors' code has it. Beside it the same loop without its temporaries (``addr_``), which is the fairer loop. Both run
once by default (``--reference-runs``): the loop takes minutes. Activations: a common mean and a spectrum that falls
as k^-0.6.

``limit``: FLOPs of half a Gram matrix, tridiagonal form (4/3 n^3), K vectors transformed back and K directions, over
the measured fp64 matrix product. Where iteration finds the directions there is no such count.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import flops_per_second, options, show, timed
from torch import Tensor
from torch.nn import functional as F

from falcon_unlearn.objectives.offset_vectors import paper_vector, principal_subspace

VARIANCE = 0.9


@dataclass(frozen=True)
class Shape:
    """Activations ``(rows, hidden)`` and K, or None for the K that holds 90 % of the variance."""

    rows: int
    hidden: int
    rank: int | None


FULL = (
    Shape(2048, 4096, 1000),  # a batch of 4 x 512 on a 7B model, the authors' K
    Shape(2048, 4096, 8),
    Shape(8192, 4096, 1000),
    Shape(8192, 2048, None),  # the shapes of our own runs: 1B, and the embedded models
    Shape(8192, 256, None),
    Shape(8192, 128, None),
)
QUICK = (Shape(512, 1024, 250), Shape(512, 1024, 8), Shape(4096, 1024, 250), *FULL[-2:])


def synthetic(shape: Shape, device: str) -> Tensor:
    """Activations with a common mean and a falling spectrum, ``(N, D)`` fp32."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.arange(1, shape.hidden + 1) ** -0.6
    mixing = torch.randn(shape.hidden, shape.hidden, generator=generator) / shape.hidden**0.5
    noise = torch.randn(shape.rows, shape.hidden, generator=generator) * scales
    activations: Tensor = noise @ mixing + 0.7 * scales.norm() * mixing[0]
    return activations.to(device)


def subtract(projection: Tensor, direction: Tensor) -> None:
    """One term as the authors' code has it: two D x D temporaries."""
    projection -= 1.0 * torch.outer(direction, direction)


def subtract_in_place(projection: Tensor, direction: Tensor) -> None:
    """The same without temporaries."""
    projection.addr_(direction, direction, alpha=-1.0)


def reference(activations: Tensor, rank: int, r: Tensor, update: Callable[[Tensor, Tensor], None]) -> Tensor:
    """The paper's vector the authors' way, in the dtype of ``activations``."""
    _, _, directions = torch.linalg.svd(activations, full_matrices=False)
    projection = torch.eye(activations.shape[1], dtype=activations.dtype, device=activations.device)
    for k in range(rank):
        update(projection, directions[k])
    vector = r @ projection
    return F.normalize(vector, dim=0)


def precise(activations: Tensor, rank: int, r: Tensor) -> Tensor:
    """The same in fp64, the loop taken together."""
    directions = torch.linalg.svd(activations.double(), full_matrices=False).Vh[:rank]
    vector = r.double() - (directions @ r.double()) @ directions
    return F.normalize(vector, dim=0)


def limit_flops(shape: Shape, rank: int) -> float:
    """FLOPs of the exact way; see the head of this file."""
    small, large = sorted((shape.rows, shape.hidden))
    directions = 2 * rank * small * large if shape.rows < shape.hidden else 0
    return small**2 * large + 4 / 3 * small**3 + 2 * small**2 * rank + directions


def measure(shape: Shape, arguments: argparse.Namespace, fp64_rate: float) -> dict[str, Any]:
    """One row."""
    device = arguments.device
    activations = synthetic(shape, device)

    def ours() -> tuple[int, Tensor]:
        subspace = principal_subspace(activations, rank=shape.rank, variance=VARIANCE)
        return len(subspace.directions), paper_vector(subspace, torch.Generator().manual_seed(1))

    rank, vector = ours()
    r = torch.randn(shape.hidden, generator=torch.Generator().manual_seed(1)).to(device)
    theirs: dict[str, Tensor] = {}

    def loop(update: Callable[[Tensor, Tensor], None]) -> None:
        theirs[update.__name__] = reference(activations, rank, r, update)

    seconds_ours = timed(ours, device=device, runs=arguments.runs, warmup=0).median
    runs = arguments.reference_runs
    seconds_reference = timed(lambda: loop(subtract), device=device, runs=runs, warmup=0).median
    seconds_in_place = timed(lambda: loop(subtract_in_place), device=device, runs=runs, warmup=0).median
    exact = precise(activations, rank, r)
    return {
        "rows": shape.rows,
        "hidden": shape.hidden,
        "rank": rank,
        "seconds_reference": seconds_reference,
        "seconds_reference_in_place": seconds_in_place,
        "seconds_ours": seconds_ours,
        "speedup": seconds_reference / seconds_ours,
        "speedup_over_in_place": seconds_in_place / seconds_ours,
        "max_abs_diff": float((vector - theirs["subtract"]).abs().max()),
        "max_abs_diff_fp64": float((vector - exact).abs().max()),
        "reference_max_abs_diff_fp64": float((theirs["subtract"] - exact).abs().max()),
        "limit_seconds": limit_flops(shape, rank) / fp64_rate,
    }


def main() -> None:
    """Run and print; the first row is the headline."""
    parser = options(__doc__)
    parser.add_argument("--first", type=int, help="only so many rows (all six take half an hour on one core)")
    parser.add_argument("--reference-runs", type=int, default=1, help="timed runs of the reference (default: 1, cold)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    fp64_rate = flops_per_second(arguments.device, torch.float64)
    shapes = (QUICK if arguments.quick else FULL)[: arguments.first]
    results = [measure(shape, arguments, fp64_rate) for shape in shapes]
    head = (
        "N",
        "D",
        "K",
        "loop s",
        "in place s",
        "ours s",
        "x",
        "x in place",
        "limit s",
        "max diff",
        "fp64",
        "loop fp64",
    )
    rows = [
        (
            row["rows"],
            row["hidden"],
            row["rank"],
            *(f"{row[key]:.3f}" for key in ("seconds_reference", "seconds_reference_in_place", "seconds_ours")),
            *(f"{row[key]:.1f}" for key in ("speedup", "speedup_over_in_place")),
            f"{row['limit_seconds']:.3f}",
            *(f"{row[k]:.1e}" for k in ("max_abs_diff", "max_abs_diff_fp64", "reference_max_abs_diff_fp64")),
        )
        for row in results
    ]
    title = (
        f"Ours: median of {arguments.runs} after a warm-up; loops: {arguments.reference_runs} run(s), cold.\n"
        "max diff: of the unit vectors, ours from the loop (fp32); fp64: of ours, and of the loop, from an fp64 SVD."
    )
    show(arguments, title, [head, *rows], {**results[0], "rows": results})


if __name__ == "__main__":
    main()
