"""Quantisation: small changes of the weights may fall away when they are rounded, and the old knowledge comes back.

Source: Zhang et al. 2025, "Catastrophic failure of LLM unlearning via quantization" (arXiv 2410.16454). Only weights
are rounded: every matrix of the decoder layers is quantised and taken back to the model's dtype, which is what
weight-only inference computes with. Activations are not (LLM.int8() rounds them too).

format   levels of a block
======   ===================================================================================================
int8     a row of outputs: 255 even steps, the largest magnitude is 127
int4     64 inputs of a row: 15 even steps, the largest magnitude is 7
nf4      64 entries: 16 quantiles of a normal distribution (Dettmers et al. 2023, arXiv 2305.14314)

backend        formats
============   =============================================================================================
simulated      all; written here, needs no extra
bitsandbytes   int8, nf4; its own kernels, CPU or CUDA
torchao        int8, int4; its weight-only configurations, CPU or CUDA
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from falcon_unlearn.attacks.base import AttackConfig, Outcome, Target
from falcon_unlearn.attacks.weights import layer_matrices, score_changes
from falcon_unlearn.errors import UserError

Format = Literal["int8", "int4", "nf4"]
Backend = Literal["simulated", "bitsandbytes", "torchao"]

BLOCK = 64
_FORMATS: Mapping[str, tuple[str, ...]] = {
    "simulated": ("int8", "int4", "nf4"),
    "bitsandbytes": ("int8", "nf4"),
    "torchao": ("int8", "int4"),
}


class QuantizeConfig(AttackConfig):
    """A round trip of the weights through few bits."""

    name: Literal["quantize"] = "quantize"
    formats: tuple[Format, ...] = Field(("int8", "nf4"), min_length=1)
    """int8 (a scale per output), int4 or nf4 (a scale per 64 weights)."""
    backend: Backend = "simulated"
    """simulated needs nothing; bitsandbytes (int8, nf4) and torchao (int8, int4) are extras."""

    @model_validator(mode="after")
    def _known_to_backend(self) -> QuantizeConfig:
        unknown = [name for name in self.formats if name not in _FORMATS[self.backend]]
        if unknown:
            raise ValueError(f"{self.backend} has no {unknown[0]} here, only {', '.join(_FORMATS[self.backend])}")
        return self

    def run(self, target: Target) -> Outcome:
        """See :class:`~falcon_unlearn.attacks.base.AttackConfig`."""
        names = layer_matrices(target.model)
        transposed = _conv1d_weights(target)
        round_trip = _round_trips(self.backend)

        def changed(position: int) -> dict[str, Tensor]:
            quantise = round_trip[self.formats[position]]
            result = {}
            for name in names:
                weight = target.model.get_parameter(name).detach()
                value = weight.T if name in transposed else weight
                quantised = quantise(value.reshape(-1, value.shape[-1]).float()).reshape(value.shape)
                result[name] = (quantised.T if name in transposed else quantised).to(weight.dtype).contiguous()
            return result

        return score_changes(
            target,
            [{"format": name, "backend": self.backend} for name in self.formats],
            changed,
            notes=[f"backend {self.backend}; {len(names)} matrices of the decoder layers, weights only"],
        )


def _conv1d_weights(target: Target) -> set[str]:
    from transformers.pytorch_utils import Conv1D

    return {f"{name}.weight" for name, module in target.model.named_modules() if isinstance(module, Conv1D)}


def _round_trips(backend: Backend) -> Mapping[str, Callable[[Tensor], Tensor]]:
    """Format -> a matrix ``(outputs, inputs)`` in fp32 and back, by one backend."""
    if backend == "bitsandbytes":
        return _bitsandbytes()
    if backend == "torchao":
        return _torchao()
    return {"int8": int8_round_trip, "int4": int4_round_trip, "nf4": nf4_round_trip}


def _absmax_round_trip(blocks: Tensor, largest: int) -> Tensor:
    """Rows of ``blocks`` to integers of magnitude ``largest`` at most, and back; a row of zeros stays one."""
    scale = (blocks.abs().amax(-1, keepdim=True) / largest).clamp(min=torch.finfo(blocks.dtype).tiny)
    return (blocks / scale).round().clamp(-largest, largest) * scale


def _by_block(matrix: Tensor, quantise: Callable[[Tensor], Tensor]) -> Tensor:
    """Each row of ``matrix`` ``(rows, columns)`` in blocks of :data:`BLOCK`, the last one filled up with zeros."""
    rows, columns = matrix.shape
    blocks = F.pad(matrix, (0, -columns % BLOCK)).reshape(-1, BLOCK)
    return quantise(blocks).reshape(rows, -1)[:, :columns]


def int8_round_trip(matrix: Tensor) -> Tensor:
    """``(outputs, inputs)`` through int8 with a scale per output."""
    return _absmax_round_trip(matrix, 127)


def int4_round_trip(matrix: Tensor) -> Tensor:
    """``(outputs, inputs)`` through symmetric int4 with a scale per :data:`BLOCK` inputs."""
    return _by_block(matrix, lambda blocks: _absmax_round_trip(blocks, 7))


@functools.cache
def nf4_levels() -> tuple[float, ...]:
    """The 16 levels of NF4 in -1..1: normal quantiles, 8 above zero, 7 below, and zero.

    The outermost quantile is the mean of 1 - 1/30 and 1 - 1/32 (Dettmers et al. 2023, appendix E).
    """
    import numpy as np
    from scipy.stats import norm

    outermost = ((1 - 1 / 30) + (1 - 1 / 32)) / 2
    above = norm.ppf(np.linspace(outermost, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(outermost, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([above, [0.0], below]))
    return tuple((levels / levels[-1]).tolist())


def nf4_round_trip(matrix: Tensor) -> Tensor:
    """``(outputs, inputs)`` through NF4 with a scale per :data:`BLOCK` inputs of a row (scales are not quantised)."""
    levels = torch.tensor(nf4_levels(), dtype=matrix.dtype, device=matrix.device)
    between = (levels[1:] + levels[:-1]) / 2

    def quantise(blocks: Tensor) -> Tensor:
        scale = blocks.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(blocks.dtype).tiny)
        return levels[torch.bucketize(blocks / scale, between)] * scale

    return _by_block(matrix, quantise)


def _bitsandbytes() -> Mapping[str, Callable[[Tensor], Tensor]]:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise UserError(
            "attack quantize: backend bitsandbytes needs it: pip install 'falcon-unlearn[bitsandbytes]', "
            "or take backend simulated"
        ) from error

    def int8(matrix: Tensor) -> Tensor:
        quantised, scales, _ = functional.int8_vectorwise_quant(matrix.half())
        result: Tensor = functional.int8_vectorwise_dequant(quantised, scales)
        return result.float()

    def nf4(blocks: Tensor) -> Tensor:
        quantised, state = functional.quantize_4bit(blocks, blocksize=BLOCK, quant_type="nf4")
        result: Tensor = functional.dequantize_4bit(quantised, state)
        return result

    # Block by block: its CPU kernel (0.50.2) reads wrong scales where a block spans two rows.
    return {"int8": int8, "nf4": lambda matrix: _by_block(matrix, nf4)}


def _torchao() -> Mapping[str, Callable[[Tensor], Tensor]]:
    try:
        from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
    except ImportError as error:
        raise UserError(
            "attack quantize: backend torchao needs it: pip install 'falcon-unlearn[torchao]', "
            "or take backend simulated"
        ) from error

    def round_trip(matrix: Tensor, config: Any) -> Tensor:
        linear = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device=matrix.device, dtype=matrix.dtype)
        linear.weight.data = matrix
        quantize_(linear, config)
        weight: Any = linear.weight
        result: Tensor = weight.dequantize()
        return result

    def int8(matrix: Tensor) -> Tensor:
        return round_trip(matrix, IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0)))

    def int4(matrix: Tensor) -> Tensor:
        four_bits: Any = getattr(torch, "int4")  # noqa: B009 (torch's stubs do not know it)
        size = math.gcd(matrix.shape[1], BLOCK)  # torchao's groups must divide a row
        return round_trip(matrix, IntxWeightOnlyConfig(weight_dtype=four_bits, granularity=PerGroup(size)))

    return {"int8": int8, "int4": int4}
