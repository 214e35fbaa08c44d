import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from falcon_unlearn.engine.gradient_conflict import GradientConfig, coefficients, combine

FALCON, PCGRAD, SUM = (GradientConfig(combination=name) for name in ("falcon", "pcgrad", "sum"))

values = st.floats(-10, 10).map(lambda x: round(x, 3))


@st.composite
def pairs(draw):
    """Two gradients of one shape, neither of them zero."""
    shape = draw(hnp.array_shapes(max_dims=3, max_side=5))
    forget, retain = (torch.from_numpy(draw(hnp.arrays(np.float64, shape, elements=values))) for _ in range(2))
    assume(forget.any() and retain.any())
    return forget, retain


@st.composite
def conflicts(draw):
    forget, retain = draw(pairs())
    dot = (forget * retain).sum()
    assume(abs(dot) > 1e-3)
    return (forget, retain) if dot < 0 else (forget, -retain)


def dot(a, b):
    return float((a * b).sum())


def combine_tensor(forget, retain, config):
    """The tensor that ``combine`` makes of one pair, which it leaves as it was."""
    [combined], _ = combine([forget.clone()], [retain], config)
    return combined


def project_out(gradient, direction):
    return gradient - dot(gradient, direction) / dot(direction, direction) * direction


def cosine(a, b):
    return dot(a, b) / float(a.norm() * b.norm())


class TestFalcon:
    @given(conflicts())
    @settings(deadline=None)
    def test_in_conflict_the_forget_part_is_orthogonal_to_retain(self, pair):
        forget, retain = pair
        on_forget, on_retain = FALCON.conflict_weights
        forget_part = (combine_tensor(forget, retain, FALCON) - on_retain * retain) / on_forget
        assert dot(forget_part, retain) == pytest.approx(0, abs=1e-9 * float(forget.norm() * retain.norm()))
        # Nothing but the part along the retain gradient is lost.
        assert float(forget_part.norm()) ** 2 == pytest.approx(
            float(forget.norm()) ** 2 * (1 - cosine(forget, retain) ** 2), abs=1e-9 * float(forget.norm()) ** 2
        )
        assert dot(forget_part, forget) >= -1e-9

    @given(conflicts())
    @settings(deadline=None)
    def test_in_conflict_a_step_never_raises_the_retain_loss_to_first_order(self, pair):
        forget, retain = pair
        assert dot(combine_tensor(forget, retain, FALCON), retain) == pytest.approx(1.2 * dot(retain, retain))

    @given(conflicts())
    @settings(deadline=None)
    def test_aligned_gradients_get_their_exact_weights(self, pair):
        forget, retain = pair[0], -pair[1]
        torch.testing.assert_close(combine_tensor(forget, retain, FALCON), 0.1 * forget + 1.9 * retain)

    @given(pairs(), st.tuples(values, values), st.tuples(values, values))
    @settings(deadline=None)
    def test_weights_are_those_of_the_config(self, pair, in_conflict, aligned):
        forget, retain = pair
        config = GradientConfig(combination="falcon", conflict_weights=in_conflict, aligned_weights=aligned)
        conflict = dot(forget, retain) < 0
        a, b = in_conflict if conflict else aligned
        projected = forget - dot(forget, retain) / dot(retain, retain) * retain if conflict else forget
        torch.testing.assert_close(combine_tensor(forget, retain, config), a * projected + b * retain)

    @given(pairs())
    @settings(deadline=None)
    def test_without_a_retain_gradient_the_forget_direction_stays(self, pair):
        """The first step of a representation method: the retain gradient is zero there."""
        forget, _ = pair
        combined = combine_tensor(forget, torch.zeros_like(forget), FALCON)
        assert cosine(combined, forget) == pytest.approx(1)
        assert torch.equal(combined, 0.1 * forget)

    @given(conflicts(), st.floats(1e-3, 1e3))
    @settings(deadline=None)
    def test_the_retain_weight_cancels_in_the_projection(self, pair, weight):
        forget, retain = pair
        plain = combine_tensor(forget, retain, FALCON) - 1.2 * retain
        weighted = combine_tensor(forget, weight * retain, FALCON) - 1.2 * weight * retain
        torch.testing.assert_close(weighted, plain, atol=1e-6, rtol=1e-6)


class TestPcgrad:
    @given(pairs())
    @settings(deadline=None)
    def test_is_symmetric(self, pair):
        torch.testing.assert_close(combine_tensor(*pair, PCGRAD), combine_tensor(*pair[::-1], PCGRAD))

    @given(conflicts())
    @settings(deadline=None)
    def test_in_conflict_neither_loss_rises(self, pair):
        forget, retain = pair
        combined = combine_tensor(forget, retain, PCGRAD)
        for own in pair:
            other = retain if own is forget else forget
            expected = dot(own, own) * (1 - cosine(own, other) ** 2)
            assert dot(combined, own) == pytest.approx(expected, abs=1e-9 * dot(own, own))

    @given(conflicts())
    @settings(deadline=None)
    def test_aligned_gradients_are_summed(self, pair):
        forget, retain = pair[0], -pair[1]
        assert torch.equal(combine_tensor(forget, retain, PCGRAD), forget + retain)


@given(pairs())
@settings(deadline=None)
def test_sum_is_the_sum(pair):
    assert torch.equal(combine_tensor(*pair, SUM), sum(pair))


def naive(forget, retain, config):
    """The three combinations as their papers write them."""
    if config.combination == "sum" or (config.combination == "pcgrad" and dot(forget, retain) >= 0):
        return forget + retain
    if config.combination == "pcgrad":
        return project_out(forget, retain) + project_out(retain, forget)
    if dot(forget, retain) < 0:
        a, b = config.conflict_weights
        return a * project_out(forget, retain) + b * retain
    a, b = config.aligned_weights
    return a * forget + b * retain


@given(st.lists(pairs(), min_size=1, max_size=4), st.sampled_from([FALCON, PCGRAD, SUM]))
@settings(deadline=None)
def test_every_tensor_is_combined_by_itself_in_place_of_its_forget_gradient(several, config):
    forget, retain = ([tensor.clone() for tensor in side] for side in zip(*several, strict=True))
    combined, _ = combine(forget, retain, config)
    for got, into, other, (f, r) in zip(combined, forget, retain, several, strict=True):
        torch.testing.assert_close(got, naive(f, r, config), atol=1e-9, rtol=1e-9)
        assert got is into
        assert torch.equal(other, r)


@given(conflicts(), st.sampled_from([FALCON, PCGRAD]))
@settings(deadline=None)
def test_three_inner_products_decide(pair, config):
    forget, retain = pair
    a, b = coefficients(dot(forget, retain), dot(forget, forget), dot(retain, retain), config)
    torch.testing.assert_close(a * forget + b * retain, naive(forget, retain, config), atol=1e-9, rtol=1e-9)


def test_gradients_whose_squares_underflow_are_no_error():
    tiny = torch.full((3,), 1e-30)
    combined, _ = combine([torch.ones(3)], [-tiny], FALCON)
    assert combined[0].isfinite().all()


def test_conflict_is_not_a_matter_of_the_whole():
    """Two tensors that agree on the whole, one of them in conflict: only that one is projected."""
    forget = [torch.tensor([10.0, 0.0]), torch.tensor([1.0, 1.0])]
    retain = [torch.tensor([10.0, 0.0]), torch.tensor([-1.0, 0.0])]
    combined, statistics = combine(forget, retain, FALCON)
    torch.testing.assert_close(combined[0], torch.tensor([20.0, 0.0]))
    torch.testing.assert_close(combined[1], torch.tensor([-1.2, 0.8]))
    assert statistics.conflicts == 0.5


class TestStatistics:
    @given(st.lists(pairs(), min_size=1, max_size=4))
    @settings(deadline=None)
    def test_are_over_tensors(self, several):
        forget, retain = map(list, zip(*several, strict=True))
        _, got = combine([f.clone() for f in forget], retain, FALCON)
        assert got.forget_norm == pytest.approx(math.sqrt(sum(dot(f, f) for f in forget)))
        assert got.retain_norm == pytest.approx(math.sqrt(sum(dot(r, r) for r in retain)))
        assert got.cosine == pytest.approx(sum(map(cosine, forget, retain)) / len(forget), abs=1e-9)
        assert got.conflicts == pytest.approx(sum(dot(f, r) < 0 for f, r in several) / len(forget))

    def test_cosine_leaves_out_tensors_without_a_gradient(self):
        a, b, zero = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0]), torch.zeros(2)
        _, got = combine([a, a], [b, zero], FALCON)
        assert got.cosine == pytest.approx(-math.sqrt(0.5))
        assert got.conflicts == 0.5

    def test_cosine_is_nan_where_nothing_has_both(self):
        _, got = combine([torch.ones(2)], [torch.zeros(2)], FALCON)
        assert math.isnan(got.cosine)
        assert (got.retain_norm, got.conflicts) == (0.0, 0.0)

    def test_non_finite_gradients_show_in_the_norms(self):
        _, got = combine([torch.tensor([math.nan, 1.0])], [torch.ones(2)], FALCON)
        assert math.isnan(got.forget_norm)


def test_unknown_combination_is_refused():
    with pytest.raises(ValidationError, match="'sum', 'falcon' or 'pcgrad'"):
        GradientConfig(combination="average")


def test_gradient_lists_must_match():
    with pytest.raises(ValueError, match="zip"):
        combine([torch.ones(1)], [torch.ones(1), torch.ones(1)], SUM)
