import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_unlearn.objectives.likelihood import (
    at_counted_tokens,
    gradient_ascent,
    negative_log_likelihood,
    satimp,
    sequence_means,
    sequence_sums,
    wga,
)


def batch(records, length, seed):
    generator = torch.Generator().manual_seed(seed)
    log_probabilities = -torch.rand(records, length, generator=generator, dtype=torch.float64) * 6
    mask = torch.rand(records, length, generator=generator) < 0.6
    return log_probabilities, mask


def naive(log_probabilities, mask, weight):
    """Sum over records and tokens of a weight, constant for the gradient, times log p; and its derivative."""
    count = sum(counts for row in mask.tolist() for counts in row)
    total, slopes = 0.0, []
    for row, counted in zip(log_probabilities.tolist(), mask.tolist(), strict=True):
        slopes.append([])
        for log_p, counts in zip(row, counted, strict=True):
            w = weight(math.exp(log_p)) / count if counts else 0.0
            total += w * log_p if counts else 0.0
            slopes[-1].append(w)
    return total, slopes


OBJECTIVES = {
    "nll": (negative_log_likelihood, lambda p: -1),
    "ascent": (gradient_ascent, lambda p: 1),
    "wga": (wga, lambda p: p),
    "wga_soft": (lambda x, m: wga(x, m, 0.3), lambda p: p**0.3),
    "satimp": (satimp, lambda p: p**5 * (1 - p)),
    "satimp_soft": (lambda x, m: satimp(x, m, 0.5, 0.2), lambda p: p**0.5 * (1 - p) ** 0.2),
}
every = pytest.mark.parametrize(("objective", "weight"), OBJECTIVES.values(), ids=OBJECTIVES)
shapes = {"records": st.integers(1, 5), "length": st.integers(1, 7), "seed": st.integers(0, 999)}


@every
@given(**shapes)
@settings(max_examples=40, deadline=None)
def test_objective_and_gradient_are_those_of_a_loop(objective, weight, records, length, seed):
    log_probabilities, mask = batch(records, length, seed)
    expected, slopes = naive(log_probabilities, mask, weight)
    loss = objective(log_probabilities.requires_grad_(), mask)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, log_probabilities)
    torch.testing.assert_close(gradient, torch.tensor(slopes, dtype=torch.float64))


@given(**shapes)
@settings(max_examples=40, deadline=None)
def test_sequence_sums_and_means(records, length, seed):
    log_probabilities, mask = batch(records, length, seed)
    for row, counted, total, mean in zip(
        log_probabilities.tolist(),
        mask.tolist(),
        sequence_sums(log_probabilities, mask).tolist(),
        sequence_means(log_probabilities, mask).tolist(),
        strict=True,
    ):
        kept = [value for value, counts in zip(row, counted, strict=True) if counts]
        assert total == pytest.approx(math.fsum(kept))
        assert mean == pytest.approx(math.fsum(kept) / len(kept) if kept else 0)


def total_of(function):
    return lambda log_probabilities, mask: function(log_probabilities, mask).sum()


REDUCTIONS = {name: objective for name, (objective, _) in OBJECTIVES.items()}
REDUCTIONS |= {"sums": total_of(sequence_sums), "means": total_of(sequence_means)}


@pytest.mark.parametrize("objective", REDUCTIONS.values(), ids=REDUCTIONS)
@pytest.mark.parametrize("garbage", [0.0, 88.0, math.nan, math.inf, -math.inf])
@given(**shapes, padding=st.integers(0, 4))
@settings(max_examples=20, deadline=None)
def test_what_does_not_count_changes_nothing(objective, garbage, records, length, seed, padding):
    log_probabilities, mask = batch(records, length, seed)
    wide = torch.full((records, length + padding), garbage, dtype=torch.float64)
    wide[:, :length] = torch.where(mask, log_probabilities, garbage)
    wide_mask = torch.zeros(wide.shape, dtype=torch.bool)
    wide_mask[:, :length] = mask
    expected = objective(log_probabilities.requires_grad_(), mask)
    loss = objective(wide.requires_grad_(), wide_mask)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, wide)
    assert not gradient[~wide_mask].any()
    torch.testing.assert_close(gradient[:, :length], torch.autograd.grad(expected, log_probabilities)[0])


@given(**shapes)
@settings(max_examples=20, deadline=None)
def test_weights_of_power_zero_leave_plain_ascent(records, length, seed):
    log_probabilities, mask = batch(records, length, seed)
    log_probabilities[0, 0] = 0.0  # certain: 0 to the power of 0 is 1
    ascent = gradient_ascent(log_probabilities, mask)
    assert wga(log_probabilities, mask, 0.0) == ascent
    assert satimp(log_probabilities, mask, 0.0, 0.0) == ascent
    assert negative_log_likelihood(log_probabilities, mask) == -ascent
    torch.testing.assert_close(satimp(log_probabilities, mask, 0.4, 0.0), wga(log_probabilities, mask, 0.4))


@pytest.mark.parametrize("objective", REDUCTIONS.values(), ids=REDUCTIONS)
def test_no_counted_token_is_no_loss(objective):
    log_probabilities = torch.full((2, 3), -1.0, requires_grad=True)
    loss = objective(log_probabilities, torch.zeros(2, 3, dtype=torch.bool))
    assert loss == 0
    assert not torch.autograd.grad(loss, log_probabilities)[0].any()


def test_satimp_of_a_probability_rounded_above_one():
    log_probabilities = torch.tensor([[1e-7, -1.0]], requires_grad=True)
    loss = satimp(log_probabilities, torch.ones(1, 2, dtype=torch.bool), 1.0, 0.5)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, log_probabilities)[0].isfinite().all()


@given(**shapes)
@settings(max_examples=20, deadline=None)
def test_selected_tokens_go_back_to_their_places(records, length, seed):
    log_probabilities, mask = batch(records, length, seed)
    selected = log_probabilities[mask].requires_grad_()
    placed = at_counted_tokens(selected, mask)
    assert torch.equal(placed, torch.where(mask, log_probabilities, 0))
    upstream = log_probabilities * 3
    (gradient,) = torch.autograd.grad(placed, selected, upstream)
    assert torch.equal(gradient, upstream[mask])
