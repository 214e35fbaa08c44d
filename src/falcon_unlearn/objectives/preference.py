"""Objectives on the log-probabilities of whole answers.

Everywhere here: inputs are ``(B,)``, sums over the answer's counted tokens in nats
(:func:`falcon_unlearn.objectives.likelihood.sequence_sums`); the result is a loss per record, ``(B,)``, to be
minimised; the published loss is its ``.mean()``. References get no gradient.

Symbols: pi = probability of the answer; pi_ref = the same under the model as it was; s = logistic function.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def npo(log_probabilities: Tensor, reference: Tensor, beta: float = 0.1) -> Tensor:
    """Negative preference optimisation, ``-(2 / beta) log s(-beta log(pi / pi_ref))``.

    Tends to gradient ascent on the sequence sum (plus a constant) as beta tends to 0; bounded below by 0.

    Source: Zhang et al. 2024, "Negative preference optimization" (arXiv 2404.05868), and its beta.

    Args:
        log_probabilities: log pi of the answers to forget, ``(B,)``.
        reference: log pi_ref of the same, ``(B,)``.
        beta: inverse temperature.
    """
    ratio = log_probabilities - reference.detach()
    return -2 / beta * F.logsigmoid(-beta * ratio)


def simnpo(log_probabilities: Tensor, lengths: Tensor, beta: float = 2.5, gamma: float = 0.0) -> Tensor:
    """NPO without a reference, by length: ``-(2 / beta) log s(-(beta / length) log pi - gamma)``.

    Source: Fan et al. 2024, "Simplicity prevails" (arXiv 2410.07163); beta and gamma are what its authors ran TOFU
    forget05 with (forget10: beta 4.5).

    Args:
        log_probabilities: log pi of the answers to forget, ``(B,)``.
        lengths: counted tokens of each, ``(B,)``; an empty answer, whose log pi is 0, counts as one token.
        beta: inverse temperature.
        gamma: margin.
    """
    return -2 / beta * F.logsigmoid(-beta * log_probabilities / lengths.clamp(min=1) - gamma)


def dpo(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float = 0.1
) -> Tensor:
    """Direct preference optimisation, ``-log s(beta (log(pi / pi_ref)(chosen) - log(pi / pi_ref)(rejected)))``.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), eq. 7, and its beta. Unlearning codes multiply this by
    ``2 / beta``, as NPO does; here the weight of the forget loss says so.

    Args:
        chosen: log pi of the preferred answers ("I don't know"), ``(B,)``.
        rejected: log pi of the answers to forget, ``(B,)``.
        reference_chosen: log pi_ref of the preferred answers, ``(B,)``.
        reference_rejected: log pi_ref of the answers to forget, ``(B,)``.
        beta: inverse temperature.
    """
    ratio = (chosen - reference_chosen.detach()) - (rejected - reference_rejected.detach())
    return -F.logsigmoid(beta * ratio)
