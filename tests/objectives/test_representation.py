import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from falcon_unlearn.objectives import representation
from falcon_unlearn.objectives.representation import contrast, cosine_retention, info_nce, squared_distance


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def naive_info_nce(anchor, positives, negatives, temperature):
    """Equation 8, token by token; ``negatives[i]`` are those of token i."""
    total = 0.0
    for a, positive, own in zip(anchor, positives, negatives, strict=True):
        top = math.exp(cosine(a, positive) / temperature)
        total -= math.log(top / (top + sum(math.exp(cosine(a, n) / temperature) for n in own)))
    return total / len(anchor)


sizes = st.integers(1, 6)
temperatures = st.floats(0.1, 3)


@given(tokens=sizes, hidden=st.integers(2, 9), count=sizes, temperature=temperatures, seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_info_nce_with_negatives_of_each_token(tokens, hidden, count, temperature, seed):
    anchor, positive = normal(tokens, hidden, seed=seed), normal(hidden, seed=seed + 1)
    negatives = normal(tokens, count, hidden, seed=seed + 2)
    expected = naive_info_nce(anchor.tolist(), [positive.tolist()] * tokens, negatives.tolist(), temperature)
    assert info_nce(anchor, positive, negatives, temperature).item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@given(tokens=sizes, hidden=st.integers(2, 9), count=sizes, temperature=temperatures, seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_info_nce_with_shared_negatives_and_a_positive_each(tokens, hidden, count, temperature, seed):
    anchor, positive = normal(tokens, hidden, seed=seed), normal(tokens, hidden, seed=seed + 1)
    negatives = normal(count, hidden, seed=seed + 2)
    expected = naive_info_nce(anchor.tolist(), positive.tolist(), [negatives.tolist()] * tokens, temperature)
    assert info_nce(anchor, positive, negatives, temperature).item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@given(layers=sizes, tokens=sizes, hidden=st.integers(2, 9), temperature=temperatures, seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_contrast_is_info_nce_of_each_token_with_one_negative(layers, tokens, hidden, temperature, seed):
    anchor, positive, negative = (normal(layers, tokens, hidden, seed=seed + i) for i in range(3))
    found = contrast(anchor, positive, negative, temperature)
    assert found.shape == (layers, tokens)
    for i in range(layers):
        for j in range(tokens):
            a, p, n = (value[i, j].tolist() for value in (anchor, positive, negative))
            assert found[i, j].item() == pytest.approx(naive_info_nce([a], [p], [[n]], temperature), rel=1e-5, abs=1e-5)
        joint = info_nce(anchor[i], positive[i], negative[i][:, None], temperature)
        assert found[i].mean().item() == pytest.approx(joint.item(), rel=1e-5, abs=1e-5)


@given(hidden=st.integers(2, 9), temperature=temperatures, seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3))
@settings(max_examples=50, deadline=None)
def test_contrast_has_its_bounds_and_forgets_lengths(hidden, temperature, seed, scale):
    anchor, positive, negative = (normal(hidden, seed=seed + i) for i in range(3))
    value = contrast(anchor, positive, negative, temperature).item()
    least, most = (math.log1p(math.exp(2 * sign / temperature)) for sign in (-1, 1))
    assert least - 1e-6 <= value <= most + 1e-6
    assert contrast(anchor, anchor, -anchor, temperature).item() == pytest.approx(least, rel=1e-4, abs=1e-6)
    assert contrast(anchor, -anchor, anchor, temperature).item() == pytest.approx(most, rel=1e-4)
    assert contrast(anchor, positive, positive, temperature).item() == pytest.approx(math.log(2), rel=1e-6)
    scaled = contrast(scale * anchor, positive / scale, scale * negative, temperature).item()
    assert scaled == pytest.approx(value, rel=1e-4, abs=1e-5)
    # Either way round, the chances of the two add up to one.
    other = contrast(anchor, negative, positive, temperature).item()
    assert math.exp(-value) + math.exp(-other) == pytest.approx(1, rel=1e-5)


@given(tokens=sizes, hidden=st.integers(2, 9), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_retention_and_distance(tokens, hidden, seed):
    updated, frozen = normal(tokens, hidden, seed=seed), normal(tokens, hidden, seed=seed + 1)
    expected = 1 - sum(cosine(u, f) for u, f in zip(updated.tolist(), frozen.tolist(), strict=True)) / tokens
    assert cosine_retention(updated, frozen).item() == pytest.approx(expected, abs=1e-5)
    naive = np.mean([(u - f) ** 2 for u, f in zip(updated.flatten().tolist(), frozen.flatten().tolist(), strict=True)])
    assert squared_distance(updated, frozen).item() == pytest.approx(naive, rel=1e-5)
    naive = np.mean((updated.numpy() - frozen[0].numpy()) ** 2)
    assert squared_distance(updated, frozen[0]).item() == pytest.approx(naive, rel=1e-5)


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_only_directions_count(scale, seed):
    """Why a steering coefficient has no effect in FALCON: the cosine forgets every length."""
    anchor, positive, negatives = normal(4, 8, seed=seed), normal(8, seed=seed + 1), normal(4, 1, 8, seed=seed + 2)
    plain = info_nce(anchor, positive, negatives, 0.7).item()
    assert info_nce(anchor * scale, positive / scale, negatives * scale, 0.7).item() == pytest.approx(plain, rel=1e-4)
    kept = cosine_retention(anchor, anchor + negatives[:, 0]).item()
    assert cosine_retention(scale * anchor, anchor + negatives[:, 0]).item() == pytest.approx(kept, rel=1e-4, abs=1e-6)


@pytest.fixture
def in_fp64(monkeypatch):
    """The module computes in fp32 whatever it gets; finite differences need its formulas in fp64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    assert representation.cosine_retention(normal(2, 3), normal(2, 3, seed=1)).dtype == torch.float64


@pytest.mark.usefixtures("in_fp64")
class TestGradients:
    @pytest.mark.parametrize("shape", [(3, 2, 5), (4, 5)], ids=["per_token", "shared"])
    def test_info_nce(self, shape):
        anchor = normal(3, 5).requires_grad_()
        assert gradcheck(lambda a: info_nce(a, normal(5, seed=1), normal(*shape, seed=2), 0.7), anchor)

    def test_contrast(self):
        anchor, others = normal(2, 3, 5).requires_grad_(), (normal(2, 3, 5, seed=1), normal(2, 3, 5, seed=2))
        assert gradcheck(lambda a: contrast(a, *others, 0.7), anchor)

    def test_retention_and_distance(self):
        updated, frozen = normal(3, 5).requires_grad_(), normal(3, 5, seed=1)
        assert gradcheck(lambda u: cosine_retention(u, frozen), updated)
        assert gradcheck(lambda u: squared_distance(u, frozen[0]), updated)


class TestZeros:
    def test_retain_loss_and_gradient_are_zero_at_the_original_weights(self):
        frozen = normal(200, 64).float()
        updated = frozen.clone().requires_grad_()
        moved = (frozen + 0.1 * normal(200, 64, seed=1).float()).requires_grad_()
        loss = cosine_retention(updated, frozen)
        (gradient,) = torch.autograd.grad(loss, updated)
        (elsewhere,) = torch.autograd.grad(cosine_retention(moved, frozen), moved)
        assert abs(loss.item()) < 1e-6
        assert gradient.norm() < 1e-5 * elsewhere.norm()
        (exact,) = torch.autograd.grad(squared_distance(updated, frozen), updated)
        assert not exact.any()

    def test_forget_gradient_is_not(self):
        frozen = normal(20, 16).float()
        updated = frozen.clone().requires_grad_()
        loss = info_nce(updated, normal(16, seed=1), frozen[:, None], 0.7)
        (gradient,) = torch.autograd.grad(loss, updated)
        assert gradient.norm() > 1e-3

    def test_forget_loss_falls_towards_the_positive(self):
        frozen, positive = normal(20, 16).float(), normal(16, seed=1).float()
        losses = [
            info_nce((1 - share) * frozen + share * positive, positive, frozen[:, None], 0.7).item()
            for share in (0.0, 0.3, 0.6, 1.0)
        ]
        assert losses == sorted(losses, reverse=True)
        assert losses[0] - losses[-1] > 0.5

    def test_a_zero_activation_gives_no_nan(self):
        updated = torch.zeros(2, 4, requires_grad=True)
        frozen = torch.ones(2, 4)
        for loss in (
            cosine_retention(updated, frozen),
            info_nce(updated, torch.ones(4), frozen[:, None], 0.7),
            contrast(updated, torch.eye(4)[:2], frozen, 0.7).mean(),
        ):
            assert loss.isfinite()
            assert torch.autograd.grad(loss, updated)[0].isfinite().all()


def test_half_precision_activations_are_scored_in_fp32():
    anchor = normal(50, 32).bfloat16()
    loss = info_nce(anchor, normal(32, seed=1).bfloat16(), anchor[:, None], 0.7)
    exact = info_nce(anchor.float(), normal(32, seed=1).bfloat16().float(), anchor.float()[:, None], 0.7)
    assert loss.dtype == torch.float32
    assert loss.item() == exact.item()
    assert cosine_retention(anchor, anchor).item() == pytest.approx(0, abs=1e-6)
    others = normal(50, 32, seed=1).bfloat16(), normal(50, 32, seed=2).bfloat16()
    values = contrast(anchor, *others, 0.7)
    assert values.dtype == torch.float32
    assert torch.equal(values, contrast(anchor.float(), *(other.float() for other in others), 0.7))
