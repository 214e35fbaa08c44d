"""Per-token quantities from final hidden states, without the logits of all positions and the whole vocabulary at once.

Shapes: N = positions that predict a counted token, D = hidden size, V = vocabulary size. Every function here takes the
hidden states ``(N, D)`` of those positions and gives one value each, ``(N,)``, in fp32 (fp64 for fp64 input).

The vocabulary is walked in blocks, all positions at a time: a running log-sum-exp on the way forward, the logits once
more on the way back. So the gradient of the head is written row by row, once, where chunks of positions would add up a
dense ``(V, D)`` for each. The price is one product more than a plain backward pass has (two with a reference).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Direction = Literal["forward", "reverse"]

# Of one block of logits; a handful of temporaries of that size exist at a time.
BLOCK_BYTES = 64 * 2**20
_SMALLEST_BLOCK = 64


@dataclass(frozen=True, eq=False)
class Head:
    """From hidden states to logits: ``softcap(scale * (hidden @ weight.T + bias))``.

    ``weight`` is ``(V, D)``, of the same dtype as the hidden states, and may be tied to the embedding; ``bias`` is
    ``(V,)``. ``scale`` multiplies the logits (Cohere's ``logit_scale``, one over Granite's ``logits_scaling``);
    ``softcap`` c stands for ``c * tanh(x / c)`` (Gemma 2). ``shift``, ``(V,)``, is added to the logits at the end; a
    head that has one is a reference, through which no gradient flows.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    shift: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., V)``, in fp32 (fp64 for fp64 input) after the product."""
        raw = F.linear(hidden, self.weight, self.bias)
        logits = raw.to(_wide(raw.dtype))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.shift is None else logits + self.shift

    def rows(self, start: int, end: int) -> Head:
        """The head of a part of the vocabulary."""
        bias = None if self.bias is None else self.bias[start:end]
        shift = None if self.shift is None else self.shift[start:end]
        return dataclasses.replace(self, weight=self.weight[start:end], bias=bias, shift=shift)

    def detach(self) -> Head:
        """The same tensors without their gradients."""
        bias = None if self.bias is None else self.bias.detach()
        return dataclasses.replace(self, weight=self.weight.detach(), bias=bias)

    def _through(self, slope: Tensor, logits: Tensor) -> Tensor:
        """Derivative to the plain product, from that to the logits; overwrites ``slope``."""
        if self.softcap is not None:
            slope *= 1 - (logits / self.softcap).square_()
        if self.scale != 1.0:
            slope *= self.scale
        return slope


def target_log_probabilities(hidden: Tensor, head: Head, targets: Tensor, *, block: int | None = None) -> Tensor:
    """``log p(target)`` of each position, in nats.

    Args:
        hidden: final hidden states, ``(N, D)``.
        head: gradients flow to its weight and bias where these want them.
        targets: token ids, ``(N,)``.
        block: rows of the vocabulary at a time (default: as many as :data:`BLOCK_BYTES` of logits hold).

    Returns:
        ``(N,)``.
    """
    return _per_position(hidden, head, _TargetLogProbability(targets), block)


def kl_divergence(
    hidden: Tensor,
    head: Head,
    reference_hidden: Tensor,
    reference_head: Head,
    direction: Direction = "forward",
    *,
    block: int | None = None,
) -> Tensor:
    """Divergence between the reference's and the current next-token distribution of each position, in nats.

    ``forward`` is KL(reference || current), the retain term of ``kl_min`` (Maini et al. 2024) and both of SCRUB's
    (Kurmanji et al. 2023: teacher || student); ``reverse`` is KL(current || reference).

    Args:
        hidden: current final hidden states, ``(N, D)``.
        head: current head.
        reference_hidden: the reference's final hidden states, ``(N, D')``; no gradient.
        reference_head: head of the reference, over the same vocabulary; no gradient.
        direction: which of the two.
        block: see :func:`target_log_probabilities`.

    Returns:
        ``(N,)``, never below zero but for rounding.
    """
    reference = _Reference(reference_hidden.detach(), reference_head.detach())
    measure = _ForwardKL(reference) if direction == "forward" else _ReverseKL(reference)
    return _per_position(hidden, head, measure, block)


def undial(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    reference_hidden: Tensor,
    reference_head: Head,
    *,
    strength: float = 10.0,
    block: int | None = None,
) -> Tensor:
    """UNDIAL's loss per token (Dong et al. 2024, "UNDIAL: self-distillation with adjusted logits").

    ``-sum_v t_v log p_v`` with ``t = softmax(z' - strength * onehot(target))``: z' are the reference's logits, p is the
    current distribution.

    Args:
        hidden: current final hidden states, ``(N, D)``.
        head: current head.
        targets: token ids, ``(N,)``.
        reference_hidden: hidden states ``(N, D')`` of the model as it was; no gradient.
        reference_head: its head; no gradient.
        strength: what the target's logit is lowered by (default: OpenUnlearning's).
        block: see :func:`target_log_probabilities`.

    Returns:
        ``(N,)``.
    """
    reference = _Reference(reference_hidden.detach(), reference_head.detach())
    return _per_position(hidden, head, _Undial(reference, targets, strength), block)


def ce_u(hidden: Tensor, head: Head, targets: Tensor, *, block: int | None = None) -> Tensor:
    """CE-U's loss per token (Yang 2025, "CE-U: cross entropy unlearning", arXiv 2503.01224).

    ``-sum_v t_v log p_v`` with ``t = softmax(z)`` where the target's own logit z is minus infinity; t is constant.

    Args:
        hidden: final hidden states, ``(N, D)``.
        head: see :func:`target_log_probabilities`.
        targets: token ids, ``(N,)``. The paper leaves out the first token of each answer.
        block: see :func:`target_log_probabilities`.

    Returns:
        ``(N,)``.
    """
    return _per_position(hidden, head, _CrossEntropyUnlearning(targets), block)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _per_position(hidden: Tensor, head: Head, measure: _Measure, block: int | None) -> Tensor:
    if block is None:
        rows = BLOCK_BYTES // (4 * max(len(hidden), 1))
        block = max(rows - rows % _SMALLEST_BLOCK, _SMALLEST_BLOCK)
    values: Tensor = _PerPosition.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, head.scale, head.softcap, head.shift, measure, block
    )
    return values


@dataclass(frozen=True, eq=False)
class _Block:
    """Logits ``(N, rows)`` of the vocabulary's rows from ``start`` on."""

    start: int
    logits: Tensor

    def find(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each target ``(N, 1)``, and whether it is in this block at all."""
        column = (targets - self.start)[:, None]
        inside = (column >= 0) & (column < self.logits.shape[1])
        return column.clamp(0, self.logits.shape[1] - 1), inside

    def at(self, targets: Tensor) -> Tensor:
        """The targets' logits ``(N,)``, zero for those elsewhere."""
        column, inside = self.find(targets)
        return torch.where(inside, self.logits.gather(1, column), 0)[:, 0]

    def lowered(self, targets: Tensor, by: float) -> Tensor:
        """A copy of the logits with the targets' reduced."""
        column, inside = self.find(targets)
        old = self.logits.gather(1, column)
        return self.logits.scatter(1, column, torch.where(inside, old - by, old))


def _blocks(hidden: Tensor, head: Head, rows: int) -> Iterator[_Block]:
    size = head.weight.shape[0]
    for start in range(0, size, rows):
        yield _Block(start, head.rows(start, min(start + rows, size)).logits(hidden))


class _Mean:
    """Softmax-weighted mean of something over the vocabulary, and the log-sum-exp of the weights, block by block."""

    def __init__(self, like: Tensor) -> None:
        shape = (len(like), 1)
        # Not minus infinity: a block may hold nothing but that.
        self._top = torch.full(shape, torch.finfo(like.dtype).min, dtype=like.dtype, device=like.device)
        self._mass = torch.zeros_like(self._top)
        self._sum = torch.zeros_like(self._top)

    def add(self, scores: Tensor, payload: Tensor | None = None) -> None:
        top = torch.maximum(self._top, scores.amax(1, keepdim=True))
        shrink = torch.exp(self._top - top)
        weights = (scores - top).exp_()
        self._mass = self._mass * shrink + weights.sum(1, keepdim=True)
        if payload is not None:
            self._sum = self._sum * shrink + weights.mul_(payload).sum(1, keepdim=True)
        self._top = top

    @property
    def log_sum(self) -> Tensor:
        return (self._top + self._mass.log())[:, 0]

    @property
    def mean(self) -> Tensor:
        return (self._sum / self._mass)[:, 0]


class _Measure(ABC):
    """What the logits of a position come to, and its derivative by each of them."""

    @abstractmethod
    def reduce(self, blocks: Iterable[_Block], like: Tensor) -> tuple[Tensor, ...]:
        """The value ``(N,)``, then what :meth:`slope` needs to know of the whole vocabulary, each ``(N,)``."""

    @abstractmethod
    def slope(self, block: _Block, known: tuple[Tensor, ...]) -> Tensor:
        """Derivative of the value by the logits of ``block``, a new tensor."""


def _probabilities(logits: Tensor, log_sum: Tensor) -> Tensor:
    return (logits - log_sum[:, None]).exp_()


@dataclass(frozen=True, eq=False)
class _TargetLogProbability(_Measure):
    targets: Tensor

    def reduce(self, blocks: Iterable[_Block], like: Tensor) -> tuple[Tensor, ...]:
        current = _Mean(like)
        target = torch.zeros_like(like[:, 0])
        for block in blocks:
            current.add(block.logits)
            target += block.at(self.targets)
        return target - current.log_sum, current.log_sum

    def slope(self, block: _Block, known: tuple[Tensor, ...]) -> Tensor:
        slope = _probabilities(block.logits, known[0]).neg_()
        column, inside = block.find(self.targets)
        return slope.scatter_add_(1, column, inside.to(slope.dtype))


@dataclass(frozen=True, eq=False)
class _Reference:
    hidden: Tensor
    head: Head

    def beside(self, block: _Block) -> _Block:
        """The reference's logits of the same rows, as wide as the current ones."""
        rows = self.head.rows(block.start, block.start + block.logits.shape[1])
        return _Block(block.start, rows.logits(self.hidden).to(block.logits.dtype))


@dataclass(frozen=True, eq=False)
class _ForwardKL(_Measure):
    reference: _Reference

    def reduce(self, blocks: Iterable[_Block], like: Tensor) -> tuple[Tensor, ...]:
        current, reference = _Mean(like), _Mean(like)
        for block in blocks:
            other = self.reference.beside(block).logits
            current.add(block.logits)
            reference.add(other, other - block.logits)
        value = reference.mean - reference.log_sum + current.log_sum
        return value, current.log_sum, reference.log_sum

    def slope(self, block: _Block, known: tuple[Tensor, ...]) -> Tensor:
        log_sum, reference_log_sum = known
        reference = _probabilities(self.reference.beside(block).logits, reference_log_sum)
        return _probabilities(block.logits, log_sum).sub_(reference)


@dataclass(frozen=True, eq=False)
class _ReverseKL(_Measure):
    reference: _Reference

    def reduce(self, blocks: Iterable[_Block], like: Tensor) -> tuple[Tensor, ...]:
        current, reference = _Mean(like), _Mean(like)
        for block in blocks:
            other = self.reference.beside(block).logits
            reference.add(other)
            current.add(block.logits, block.logits - other)
        value = current.mean - current.log_sum + reference.log_sum
        return value, current.log_sum, current.mean

    def slope(self, block: _Block, known: tuple[Tensor, ...]) -> Tensor:
        log_sum, mean = known
        excess = block.logits - self.reference.beside(block).logits - mean[:, None]
        return _probabilities(block.logits, log_sum).mul_(excess)


@dataclass(frozen=True, eq=False)
class _CrossEntropy(_Measure):
    """Cross-entropy of the current distribution to a constant one, whose logits :meth:`aim` gives."""

    @abstractmethod
    def aim(self, block: _Block) -> Tensor: ...

    def reduce(self, blocks: Iterable[_Block], like: Tensor) -> tuple[Tensor, ...]:
        current, aim = _Mean(like), _Mean(like)
        for block in blocks:
            current.add(block.logits)
            aim.add(self.aim(block), block.logits)
        return current.log_sum - aim.mean, current.log_sum, aim.log_sum

    def slope(self, block: _Block, known: tuple[Tensor, ...]) -> Tensor:
        log_sum, aim_log_sum = known
        return _probabilities(block.logits, log_sum).sub_(_probabilities(self.aim(block), aim_log_sum))


@dataclass(frozen=True, eq=False)
class _Undial(_CrossEntropy):
    reference: _Reference
    targets: Tensor
    strength: float

    def aim(self, block: _Block) -> Tensor:
        return self.reference.beside(block).lowered(self.targets, self.strength)


@dataclass(frozen=True, eq=False)
class _CrossEntropyUnlearning(_CrossEntropy):
    targets: Tensor

    def aim(self, block: _Block) -> Tensor:
        return block.lowered(self.targets, float("inf"))


class _PerPosition(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        shift: Tensor | None,
        measure: _Measure,
        rows: int,
    ) -> Tensor:
        like = torch.empty((len(hidden), 1), dtype=_wide(hidden.dtype), device=hidden.device)
        value, *known = measure.reduce(_blocks(hidden, Head(weight, bias, scale, softcap, shift), rows), like)
        ctx.save_for_backward(hidden, weight, bias, *known)
        assert shift is None or not any(ctx.needs_input_grad)
        ctx.scale, ctx.softcap, ctx.measure, ctx.rows = scale, softcap, measure, rows
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *known = ctx.saved_tensors
        head = Head(weight, bias, ctx.scale, ctx.softcap)
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        # One sum over all blocks, hence wide; rows of the head are in one block each.
        hidden_gradient = torch.zeros_like(hidden, dtype=_wide(hidden.dtype)) if for_hidden else None
        weight_gradient = torch.empty_like(weight) if for_weight else None
        bias_gradient = torch.empty_like(bias) if for_bias else None
        for block in _blocks(hidden, head, ctx.rows):
            rows = slice(block.start, block.start + block.logits.shape[1])
            slope = ctx.measure.slope(block, tuple(known)).mul_(upstream[:, None])
            slope = head._through(slope, block.logits).to(hidden.dtype)
            if hidden_gradient is not None:
                hidden_gradient += slope @ weight[rows]
            if weight_gradient is not None:
                torch.mm(slope.T, hidden, out=weight_gradient[rows])
            if bias_gradient is not None:
                bias_gradient[rows] = slope.sum(0)
            del block, slope  # or they stay until the next block's logits are made
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient.to(hidden.dtype)
        return hidden_gradient, weight_gradient, bias_gradient, None, None, None, None, None
