"""Objectives on the log-probabilities of tokens.

Everywhere here: ``log_probabilities`` are ``(B, L)``, entry ``[b, t]`` the log-probability (nats) of token t of record
b given those before it; ``mask`` is a boolean ``(B, L)``, true where the token counts. What the mask leaves out may
hold anything, NaN too, and gets gradient zero; padding changes nothing. All losses are to be minimised, scalar, and
means over the counted tokens of the batch; where none counts they are zero.

Symbols: p = probability of a counted token; <.> = mean over the counted tokens; [.] = constant, without gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def at_counted_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Put ``values`` ``(N,)`` where ``mask`` ``(B, L)`` is true, in row-major order as ``x[mask]`` takes them out.

    Returns:
        ``(B, L)``, zero elsewhere.
    """
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def sequence_sums(log_probabilities: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of each record's counted tokens together, ``(B,)``."""
    return _counted(log_probabilities, mask).sum(1)


def sequence_means(log_probabilities: Tensor, mask: Tensor) -> Tensor:
    """Mean log-probability of each record's counted tokens, ``(B,)``; zero where none counts."""
    return sequence_sums(log_probabilities, mask) / mask.sum(1).clamp(min=1)


def negative_log_likelihood(log_probabilities: Tensor, mask: Tensor) -> Tensor:
    """``-<log p>``, the loss of ordinary training and the usual retain term."""
    return -_token_mean(_counted(log_probabilities, mask), mask)


def gradient_ascent(log_probabilities: Tensor, mask: Tensor) -> Tensor:
    """``<log p>``: training backwards (Jang et al. 2023, arXiv 2210.01504, as a mean). Not bounded below."""
    return _token_mean(_counted(log_probabilities, mask), mask)


def wga(log_probabilities: Tensor, mask: Tensor, alpha: float = 1.0) -> Tensor:
    """Weighted gradient ascent, ``<[p^alpha] log p>``.

    Ascent's gradient carries 1/p, so tokens already forgotten weigh most; the weight takes that back.

    Source: Wang et al. 2025, "Rethinking LLM unlearning objectives" (arXiv 2502.19301), a mean instead of its sum.

    Args:
        log_probabilities: see the module.
        mask: see the module.
        alpha: inverse temperature of the weight; 0 is plain ascent (default: OpenUnlearning's).
    """
    counted = _counted(log_probabilities, mask)
    return _token_mean((alpha * counted.detach()).exp() * counted, mask)


def satimp(log_probabilities: Tensor, mask: Tensor, beta1: float = 5.0, beta2: float = 1.0) -> Tensor:
    """Saturation and importance, ``<[p^beta1 (1 - p)^beta2] log p>``.

    Source: Yang et al. 2025, "Exploring criteria of loss reweighting" (arXiv 2505.11953).

    Args:
        log_probabilities: see the module.
        mask: see the module.
        beta1: saturation; large values leave alone what is improbable by now (default: OpenUnlearning's).
        beta2: importance; large values leave alone what is all but certain (default: OpenUnlearning's).
    """
    counted = _counted(log_probabilities, mask)
    constant = counted.detach()
    # Rounding may leave a log-probability just above zero, whose power would be NaN.
    rest = (-torch.expm1(constant)).clamp(min=0)
    return _token_mean((beta1 * constant).exp() * rest**beta2 * counted, mask)


def _counted(log_probabilities: Tensor, mask: Tensor) -> Tensor:
    """Zero where the mask is false, by selection and not by product: NaN times zero is NaN."""
    return torch.where(mask, log_probabilities, 0)


def _token_mean(values: Tensor, mask: Tensor) -> Tensor:
    return values.sum() / mask.sum().clamp(min=1)
