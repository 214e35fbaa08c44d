import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from falcon_unlearn.selection.separation import FOLDS, PENALTY, _fit, linear_cka, mmd_squared, probe


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_mmd_squared(x, y):
    """Lemma 6 of Gretton et al., written out."""
    every = [*x, *y]
    apart = sorted(float((a - b).square().sum()) for i, a in enumerate(every) for b in every[i + 1 :])
    median = apart[(len(apart) - 1) // 2]

    def kernel(a, b):
        return math.exp(-float((a - b).square().sum()) / median)

    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


class TestMmd:
    @given(n=st.integers(2, 7), m=st.integers(2, 7), seed=st.integers(0, 99))
    def test_is_the_naive_sum(self, n, m, seed):
        x, y = normal(n, 3, seed=seed), normal(m, 3, seed=seed + 100) + 1
        assert mmd_squared(x, y) == pytest.approx(naive_mmd_squared(x, y), abs=1e-12)

    def test_is_zero_on_average_for_equal_distributions(self):
        """Unbiased: the mean over draws is within three standard errors of 0, and some draws are negative."""
        draws = torch.tensor(
            [mmd_squared(normal(20, 4, seed=2 * i), normal(30, 4, seed=2 * i + 1)) for i in range(200)]
        )
        assert abs(draws.mean()) < 3 * draws.std() / math.sqrt(len(draws))
        assert draws.min() < 0

    def test_grows_with_the_distance_up_to_its_bound(self):
        x, y = normal(40, 4), normal(40, 4, seed=1)
        found = [mmd_squared(x, y + shift) for shift in (0.0, 0.5, 1.0, 2.0)]
        assert found == sorted(found)
        assert found[-1] < 2

    def test_does_not_depend_on_the_unit_or_the_origin(self):
        x, y = normal(9, 3), normal(8, 3, seed=1) + 1
        assert mmd_squared(7 * x + 3, 7 * y + 3) == pytest.approx(mmd_squared(x, y))

    def test_of_points_that_are_all_the_same_is_zero(self):
        assert mmd_squared(torch.ones(3, 2), torch.ones(4, 2)) == 0


class TestCka:
    def test_is_one_for_a_rotated_shifted_scaled_copy(self):
        x = normal(30, 5)
        rotation = torch.linalg.qr(normal(5, 5, seed=1)).Q
        assert linear_cka(x, 3 * x @ rotation + 2) == pytest.approx(1)

    @given(seed=st.integers(0, 99), d=st.integers(1, 8), e=st.integers(1, 8))
    def test_is_the_alignment_of_the_kernels(self, seed, d, e):
        """The other form of the definition: cosine of the centred Gram matrices as vectors."""
        x, y = normal(12, d, seed=seed), normal(12, e, seed=seed + 100)
        centre = torch.eye(12).double() - 1 / 12
        k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
        expected = torch.nn.functional.cosine_similarity(k.flatten(), m.flatten(), dim=0)
        assert linear_cka(x, y) == pytest.approx(float(expected), abs=1e-9)
        assert linear_cka(y, x) == pytest.approx(linear_cka(x, y), abs=1e-9)

    def test_is_zero_for_uncorrelated_features(self):
        x = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
        y = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
        assert linear_cka(x, y) == pytest.approx(0)

    def test_of_a_constant_is_no_number(self):
        assert math.isnan(linear_cka(normal(5, 2), torch.ones(5, 2)))


class TestProbe:
    @given(seed=st.integers(0, 20))
    def test_the_fit_is_sklearns(self, seed):
        x = normal(40, 3, seed=seed)
        y = (x[:, 0] + normal(40, seed=seed + 100) > 0).double()
        weights = torch.full((40,), 1 / 40, dtype=torch.float64)
        reference = LogisticRegression(C=1 / (2 * PENALTY * 40), tol=1e-10).fit(x.numpy(), y.numpy())
        beta = _fit(x, y, weights, PENALTY)
        assert beta[:-1].tolist() == pytest.approx(reference.coef_[0].tolist(), abs=1e-4)
        assert float(beta[-1]) == pytest.approx(float(reference.intercept_[0]), abs=1e-4)

    def test_sides_far_apart_are_told_apart(self):
        found = probe(normal(40, 4) + 5, normal(60, 4, seed=1) - 5, range(100))
        assert found.error == 0
        assert 0.6 < found.information <= math.log(2)

    def test_sides_of_one_distribution_are_not(self):
        found = [probe(normal(60, 3, seed=2 * i), normal(90, 3, seed=2 * i + 1), range(150)) for i in range(10)]
        assert sum(f.error for f in found) / 10 == pytest.approx(0.5, abs=0.05)
        assert all(f.information < 0.05 for f in found)

    def test_is_a_lower_bound_on_the_information(self):
        """Two Gaussians a distance of 2 apart: the true information, by quadrature, is above what the probe finds."""
        grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)
        density = [torch.exp(-((grid - at) ** 2) / 2) / math.sqrt(2 * math.pi) for at in (-1, 1)]
        mixture = (density[0] + density[1]) / 2
        true = sum(0.5 * torch.trapezoid(p * torch.log(p / mixture), grid) for p in density)
        forget, retain = normal(2000, 1) + 1, normal(2000, 1, seed=1) - 1
        found = probe(forget, retain, range(4000)).information
        assert found == pytest.approx(float(true), abs=0.03)

    def test_phrasings_of_one_fact_do_not_give_it_away(self):
        """Random features in 50 dimensions, every record twice: the copy in training would tell its side."""
        forget, retain = normal(30, 50).repeat(2, 1), normal(30, 50, seed=1).repeat(2, 1)
        once = [*range(30)] * 2 + [*range(30, 60)] * 2
        assert probe(forget, retain, range(120)).error < 0.2
        assert probe(forget, retain, once).error > 0.3

    def test_the_larger_side_does_not_win(self):
        found = probe(normal(10, 2) + 4, normal(200, 2, seed=1) - 4, range(210))
        assert found.error == 0

    def test_a_single_group_is_chance(self):
        found = probe(normal(4, 2) + 4, normal(4, 2) - 4, [0] * 8)
        assert (found.error, found.information) == (0.5, pytest.approx(0))
        assert FOLDS > 1
