"""AdamW (also paged, through bitsandbytes), SGD and Sophia on fp32 masters.

Sophia (Liu et al., ICLR 2024) divides momentum by a diagonal curvature estimate and clips each coordinate to the
learning rate:  ``theta -= lr * sign(m) * min(|m| / (rho * scale * h + eps), 1)``.  What ``h`` is differs:

================  ===================================================================================
published_code    FALCON's (zetascale's SophiaG): squared combined gradient every step, momentum updated
                  twice a step, scale 5120. Unclipped steps shrink as gradients grow.
ema_grad2         squared combined gradient every ``hessian_every`` steps, momentum once, scale = batch size:
                  the empirical-Fisher form of the paper's estimator (labels are not resampled).
none              h = 0: every step is clipped, sign descent with momentum.
================  ===================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from falcon_unlearn.config import Section
from falcon_unlearn.errors import UserError

Hessian = Literal["published_code", "ema_grad2", "none"]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]

_PUBLISHED_SCALE = 5120
_REFERENCE_WIDTH = 128


class OptimizerConfig(Section):
    """Which optimiser, and its settings."""

    name: Literal["adamw", "paged_adamw_32bit", "paged_adamw_8bit", "sgd", "sophia"] = "adamw"
    """adamw, on CUDA paged (moments move to the CPU when memory is short) in 32 or 8 bits, sgd (momentum betas[0]) or
    sophia."""
    lr: Rate | Literal["auto"] = "auto"
    """Learning rate; auto takes lr_at_width_128 * 128 / hidden size."""
    lr_at_width_128: Rate = 1e-2
    """Reference of lr: auto. An Adam-like step changes a layer's output in proportion to its width."""
    schedule: Literal["constant", "linear"] = "constant"
    """linear: the learning rate falls to zero over the run."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of momentum and second moment (Sophia's usual: 0.965, 0.99)."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay; decoupled, except in sgd, where it is part of the gradient."""
    hessian: Hessian = "ema_grad2"
    """Sophia's curvature estimate."""
    rho: float = Field(0.04, gt=0)
    """Sophia's clipping factor."""
    hessian_every: int = Field(10, ge=1)
    """ema_grad2: steps between curvature estimates."""


def learning_rate(config: OptimizerConfig, hidden_size: int) -> float:
    """Resolve ``lr: auto`` for a model of width ``hidden_size``."""
    if config.lr == "auto":
        return config.lr_at_width_128 * _REFERENCE_WIDTH / hidden_size
    return config.lr


def scheduled(config: OptimizerConfig, rate: float, step: int, steps: int) -> float:
    """The learning rate of ``step`` (from 0) of ``steps``, a function of nothing else."""
    return rate * (1 - step / steps) if config.schedule == "linear" else rate


class Sophia(torch.optim.Optimizer):
    """Sophia with the curvature estimates of the module's table.

    Args:
        parameters: fp32 leaves.
        lr: largest change of a weight per step.
        betas: decay of momentum and of the curvature.
        rho: clipping factor.
        weight_decay: decoupled.
        hessian: curvature estimate.
        scale: factor on the curvature (batch size).
        hessian_every: steps between estimates, for ``ema_grad2``.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        lr: float,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        weight_decay: float = 0.0,
        hessian: Hessian = "ema_grad2",
        scale: float = 1.0,
        hessian_every: int = 10,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self._hessian = hessian
        self._rho_scale = rho * (_PUBLISHED_SCALE if hessian == "published_code" else scale)
        self._every = 1 if hessian == "published_code" else hessian_every
        self._momentum_updates = 2 if hessian == "published_code" else 1

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update from the parameters' ``.grad``."""
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    state["momentum"] = torch.zeros_like(p)
                    state["hessian"] = torch.zeros_like(p)
                momentum, curvature = state["momentum"], state["hessian"]
                if self._hessian != "none" and int(state["step"]) % self._every == 0:
                    curvature.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                for _ in range(self._momentum_updates):
                    momentum.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                ratio = (momentum.abs() / (self._rho_scale * curvature + 1e-15)).clamp_(max=1)
                p.addcmul_(momentum.sign(), ratio, value=-group["lr"])
                state["step"] += 1


def build_optimizer(
    config: OptimizerConfig, parameters: Iterable[Tensor], *, hidden_size: int, batch_size: int
) -> torch.optim.Optimizer:
    """The configured optimiser over ``parameters``.

    Raises:
        UserError: a paged one without CUDA or bitsandbytes.
    """
    lr = learning_rate(config, hidden_size)
    if config.name in {"paged_adamw_32bit", "paged_adamw_8bit"}:
        return _paged_adamw(config, list(parameters), lr)
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, betas=config.betas, weight_decay=config.weight_decay)
    if config.name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=config.betas[0], weight_decay=config.weight_decay)
    return Sophia(
        parameters,
        lr=lr,
        betas=config.betas,
        rho=config.rho,
        weight_decay=config.weight_decay,
        hessian=config.hessian,
        scale=batch_size,
        hessian_every=config.hessian_every,
    )


def _paged_adamw(config: OptimizerConfig, parameters: list[Tensor], lr: float) -> torch.optim.Optimizer:
    off = {parameter.device.type for parameter in parameters} - {"cuda"}
    if off:
        raise UserError(f"training.optimizer.name {config.name} needs CUDA, this runs on {off.pop()}: use adamw")
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            f"training.optimizer.name {config.name} needs bitsandbytes: pip install 'falcon-unlearn[bitsandbytes]'"
        ) from error
    kinds = {"paged_adamw_32bit": "PagedAdamW32bit", "paged_adamw_8bit": "PagedAdamW8bit"}
    build: Any = getattr(bitsandbytes.optim, kinds[config.name])
    optimizer: torch.optim.Optimizer = build(parameters, lr=lr, betas=config.betas, weight_decay=config.weight_decay)
    return optimizer


def state_tensors(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """What ``optimizer`` knows of ``parameter``; empty before its first step. Counts become tensors.

    bitsandbytes' tables of quantisation levels (``qmap``) are constants, shared by all parameters, and left out.
    """
    state: Mapping[str, Any] = optimizer.state.get(parameter, {})
    return {
        key: value.detach() if isinstance(value, Tensor) else torch.tensor(value)
        for key, value in state.items()
        if value is not None and not key.startswith("qmap")
    }


def restore_state(optimizer: torch.optim.Optimizer, parameter: Tensor, saved: Mapping[str, Tensor]) -> None:
    """Put back what :func:`state_tensors` gave, wherever its tensors are now."""
    if not saved:
        return
    if not hasattr(optimizer, "init_state"):
        # Optimisers keep their step count on the CPU and moments beside the parameter.
        optimizer.state[parameter] = {
            key: value if value.ndim == 0 else value.to(parameter.device) for key, value in saved.items()
        }
        return
    # bitsandbytes allocates its own buffers, paged ones among them, and counts steps in a plain number.
    for group_index, group in enumerate(optimizer.param_groups):
        for index, candidate in enumerate(group["params"]):
            if candidate is parameter:
                optimizer.init_state(group, parameter, group_index, index)
    state = optimizer.state[parameter]
    for key, value in saved.items():
        if isinstance(state[key], Tensor):
            state[key].copy_(value)
        else:
            state[key] = value.item()
