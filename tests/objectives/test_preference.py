import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_unlearn.objectives.likelihood import gradient_ascent, sequence_sums
from falcon_unlearn.objectives.preference import dpo, npo, simnpo


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def answers(records, seed, scale=20):
    """Tokens of answers ``(B, L)`` with a mask that leaves every record at least one."""
    generator = torch.Generator().manual_seed(seed)
    tokens = -torch.rand(records, 6, generator=generator, dtype=torch.float64) * scale / 6
    mask = torch.rand(records, 6, generator=generator) < 0.5
    mask[:, 0] = True
    return tokens, mask


def naive_sums(tokens, mask):
    return [
        math.fsum(t for t, counts in zip(row, counted, strict=True) if counts)
        for row, counted in zip(tokens.tolist(), mask.tolist(), strict=True)
    ]


def gradient_of(loss, tokens):
    return torch.autograd.grad(loss, tokens)[0]


def spread(slopes, mask):
    """The derivative by each record's sum, given to its counted tokens."""
    return torch.tensor(slopes, dtype=torch.float64)[:, None] * mask


records_ = st.integers(1, 5)
betas = st.floats(0.01, 5)
seeds = st.integers(0, 999)


@given(records=records_, beta=betas, seed=seeds)
@settings(max_examples=50, deadline=None)
def test_npo_is_its_formula(records, beta, seed):
    tokens, mask = answers(records, seed)
    reference = sequence_sums(*answers(records, seed + 1)).requires_grad_()
    tokens.requires_grad_()
    losses = npo(sequence_sums(tokens, mask), reference, beta)
    ratios = [a - b for a, b in zip(naive_sums(tokens, mask), reference.tolist(), strict=True)]
    assert losses.tolist() == pytest.approx([-2 / beta * math.log(sigmoid(-beta * r)) for r in ratios], rel=1e-9)
    slopes = [2 * sigmoid(beta * r) / records for r in ratios]
    torch.testing.assert_close(gradient_of(losses.mean(), tokens), spread(slopes, mask))
    assert reference.grad is None


@given(records=records_, beta=betas, gamma=st.floats(-1, 2), seed=seeds)
@settings(max_examples=50, deadline=None)
def test_simnpo_is_its_formula(records, beta, gamma, seed):
    tokens, mask = answers(records, seed)
    tokens.requires_grad_()
    lengths = mask.sum(1)
    losses = simnpo(sequence_sums(tokens, mask), lengths, beta, gamma)
    inner = [-beta / n * s - gamma for s, n in zip(naive_sums(tokens, mask), lengths.tolist(), strict=True)]
    assert losses.tolist() == pytest.approx([-2 / beta * math.log(sigmoid(x)) for x in inner], rel=1e-9)
    slopes = [2 / n * sigmoid(-x) / records for x, n in zip(inner, lengths.tolist(), strict=True)]
    torch.testing.assert_close(gradient_of(losses.mean(), tokens), spread(slopes, mask))


@given(records=records_, beta=betas, seed=seeds)
@settings(max_examples=50, deadline=None)
def test_dpo_is_its_formula(records, beta, seed):
    (chosen, chosen_mask), (rejected, rejected_mask) = answers(records, seed), answers(records, seed + 1)
    chosen.requires_grad_()
    rejected.requires_grad_()
    references = [sequence_sums(*answers(records, seed + i)) for i in (2, 3)]
    losses = dpo(sequence_sums(chosen, chosen_mask), sequence_sums(rejected, rejected_mask), *references, beta)
    logits = [
        beta * ((c - rc) - (r - rr))
        for c, r, rc, rr in zip(
            naive_sums(chosen, chosen_mask),
            naive_sums(rejected, rejected_mask),
            *(reference.tolist() for reference in references),
            strict=True,
        )
    ]
    # log s(x) written so that a large x loses no digits
    expected = [math.log1p(math.exp(-abs(x))) + max(-x, 0) for x in logits]
    assert losses.tolist() == pytest.approx(expected, rel=1e-9)
    slopes = [-beta * sigmoid(-x) / records for x in logits]
    by_chosen, by_rejected = torch.autograd.grad(losses.mean(), (chosen, rejected))
    torch.testing.assert_close(by_chosen, spread(slopes, chosen_mask))
    torch.testing.assert_close(by_rejected, spread([-s for s in slopes], rejected_mask))


@given(records=records_, seed=seeds)
@settings(max_examples=30, deadline=None)
def test_npo_tends_to_gradient_ascent(records, seed):
    tokens, mask = answers(records, seed)
    reference = sequence_sums(*answers(records, seed + 1))
    tokens.requires_grad_()
    ascent = gradient_of(sequence_sums(tokens, mask).mean(), tokens)
    distances = [
        (gradient_of(npo(sequence_sums(tokens, mask), reference, beta).mean(), tokens) - ascent).norm().item()
        for beta in (1e-1, 1e-2, 1e-3, 1e-6)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-4 * ascent.norm()


@given(records=records_, beta=betas, seed=seeds)
@settings(max_examples=30, deadline=None)
def test_npo_at_the_reference(records, beta, seed):
    tokens, mask = answers(records, seed)
    tokens.requires_grad_()
    sums = sequence_sums(tokens, mask)
    losses = npo(sums, sums.detach(), beta)
    assert losses.tolist() == pytest.approx([2 / beta * math.log(2)] * records)
    # Ascent on the sequence sums: its token mean, times the tokens a record has on average.
    ascent = gradient_ascent(tokens, mask) * mask.sum() / records
    torch.testing.assert_close(gradient_of(losses.mean(), tokens), gradient_of(ascent, tokens))


def test_simnpo_knows_no_reference():
    assert list(inspect.signature(simnpo).parameters) == ["log_probabilities", "lengths", "beta", "gamma"]


@given(records=records_, times=st.integers(1, 4), seed=seeds)
@settings(max_examples=20, deadline=None)
def test_simnpo_of_an_answer_repeated_is_that_of_the_answer(records, times, seed):
    tokens, mask = answers(records, seed)
    once = simnpo(sequence_sums(tokens, mask), mask.sum(1))
    again = simnpo(sequence_sums(tokens.repeat(1, times), mask.repeat(1, times)), times * mask.sum(1))
    torch.testing.assert_close(once, again)


@given(records=records_, beta=betas, seed=seeds)
@settings(max_examples=30, deadline=None)
def test_dpo_of_an_answer_against_itself_has_no_gradient(records, beta, seed):
    tokens, mask = answers(records, seed)
    tokens.requires_grad_()
    sums, reference = sequence_sums(tokens, mask), sequence_sums(*answers(records, seed + 1))
    losses = dpo(sums, sums, reference, reference, beta)
    assert losses.tolist() == pytest.approx([math.log(2)] * records)
    assert not gradient_of(losses.mean(), tokens).any()


@given(records=records_, beta=betas, seed=seeds)
@settings(max_examples=30, deadline=None)
def test_dpo_swapped_changes_the_sign_of_the_logit(records, beta, seed):
    """As ``-log s(-x) + log s(x) = x``."""
    a, b, ra, rb = (sequence_sums(*answers(records, seed + i)) for i in range(4))
    logit = beta * ((a - ra) - (b - rb))
    torch.testing.assert_close(dpo(b, a, rb, ra, beta) - dpo(a, b, ra, rb, beta), logit)


def test_forgotten_beyond_all_measure_stays_finite_and_stops():
    log_probabilities = torch.tensor([-1e4, -1.0], requires_grad=True)
    for losses in (npo(log_probabilities, torch.zeros(2), 1.0), simnpo(log_probabilities, torch.ones(2), 1.0)):
        assert losses.isfinite().all()
        assert losses[0] == 0
        slope = gradient_of(losses.sum(), log_probabilities)
        assert slope[0] == 0
        assert slope[1] > 0


def test_simnpo_of_an_empty_answer_is_finite_and_has_no_gradient_in_its_tokens():
    tokens, mask = torch.full((1, 3), -1.0, requires_grad=True), torch.zeros(1, 3, dtype=torch.bool)
    loss = simnpo(sequence_sums(tokens, mask), mask.sum(1)).mean()
    assert loss.isfinite()
    assert not gradient_of(loss, tokens).any()
