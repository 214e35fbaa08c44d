import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_unlearn.errors import UserError
from falcon_unlearn.objectives import offset_vectors
from falcon_unlearn.objectives.offset_vectors import (
    paper_vector,
    principal_subspace,
    published_code_vector,
    random_vector,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def decaying(rows, hidden, decay, seed=0):
    """A matrix with singular values 1, decay, decay^2, ... and random singular vectors."""
    rank = min(rows, hidden)
    left, right = (
        torch.linalg.qr(torch.randn(n, rank, generator=seeded(seed + i), dtype=torch.float64)).Q
        for i, n in enumerate((rows, hidden))
    )
    return (left * decay ** torch.arange(rank).double()) @ right.T


@st.composite
def problems(draw):
    hidden = draw(st.integers(2, 40))
    rows = draw(st.integers(1, 60))
    rank = draw(st.integers(1, hidden - 1))
    decay = draw(st.sampled_from([1.0, 0.95, 0.7, 0.4, 0.1]))
    seed = draw(st.integers(0, 1000))
    return decaying(rows, hidden, decay, seed), rank, seed


class TestPrincipalSubspace:
    @given(problems())
    @settings(max_examples=60, deadline=None)
    def test_directions_are_orthonormal_on_both_gram_sides(self, problem):
        activations, rank, _ = problem
        directions = principal_subspace(activations, rank=rank, variance=0.5).directions.double()
        assert len(directions) <= rank
        torch.testing.assert_close(directions @ directions.T, torch.eye(len(directions)).double(), atol=1e-6, rtol=0)

    @given(rows=st.integers(4, 50), hidden=st.integers(6, 40), rank=st.integers(1, 4), seed=st.integers(0, 99))
    @settings(max_examples=40, deadline=None)
    def test_equals_the_singular_value_decomposition(self, rows, hidden, rank, seed):
        activations = decaying(rows, hidden, 0.8, seed).float()
        found = principal_subspace(activations, rank=rank, variance=0.5)
        _, singular, right = np.linalg.svd(activations.double().numpy(), full_matrices=False)
        assert len(found.directions) == rank
        np.testing.assert_allclose(found.singular_values.numpy(), singular[:rank], rtol=1e-5)
        projector = found.directions.double().T @ found.directions.double()
        np.testing.assert_allclose(projector.numpy(), right[:rank].T @ right[:rank], atol=1e-5)
        assert found.variance_share == pytest.approx((singular[:rank] ** 2).sum() / (singular**2).sum(), rel=1e-6)

    @pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
    @pytest.mark.parametrize("variance", [0.3, 0.9, 0.999])
    def test_variance_takes_the_smallest_rank_that_holds_it(self, shape, variance):
        activations = decaying(*shape, 0.85)
        shares = np.cumsum(0.85 ** (2 * np.arange(20))) / np.sum(0.85 ** (2 * np.arange(20)))
        found = principal_subspace(activations, rank=None, variance=variance)
        assert len(found.directions) == int(np.argmax(shares >= variance)) + 1
        assert found.variance_share >= variance

    def test_repeated_rows_are_not_taken_for_directions(self):
        activations = torch.randn(3, 16, generator=seeded()).repeat(4, 1)
        assert len(principal_subspace(activations, rank=10, variance=0.5).directions) == 3

    @pytest.mark.parametrize("rank", [8, 20])
    def test_a_full_rank_is_refused(self, rank):
        with pytest.raises(UserError, match=r"method\.offset_rank: 8 directions span all 8 dimensions"):
            principal_subspace(torch.randn(30, 8, generator=seeded()), rank=rank, variance=0.5)

    def test_a_variance_that_needs_all_is_refused(self):
        with pytest.raises(UserError, match="lower offset_rank or offset_variance"):
            principal_subspace(torch.eye(8), rank=None, variance=0.95)

    @pytest.mark.parametrize("bad", [torch.zeros(4, 3), torch.full((4, 3), math.nan), torch.full((4, 3), math.inf)])
    def test_unusable_activations_are_refused(self, bad):
        with pytest.raises(UserError, match="zero or not finite"):
            principal_subspace(bad, rank=1, variance=0.5)


def wide(rows, hidden, seed=0):
    """A large matrix of rank 60, singular values falling as 0.8^k, and its right singular vectors as rows."""
    left, right = (
        torch.linalg.qr(torch.randn(n, 60, generator=seeded(seed + i), dtype=torch.float64)).Q
        for i, n in enumerate((rows, hidden))
    )
    return (left * 0.8 ** torch.arange(60).double()) @ right.T, right.T


def refuse(side):
    raise AssertionError("the exact decomposition was called")


class TestIteration:
    @pytest.mark.parametrize("shape", [(2048, 2304), (2304, 2048)])
    @pytest.mark.parametrize("wanted", [{"rank": 8, "variance": 0.5}, {"rank": None, "variance": 0.99}])
    def test_few_of_many_directions_are_the_exact_ones_and_the_same_every_time(self, shape, wanted, monkeypatch):
        monkeypatch.setattr(offset_vectors, "_all_pairs", refuse)
        activations, right = wide(*shape)
        squares = 0.8 ** (2 * np.arange(60))
        shares = np.cumsum(squares) / squares.sum()
        found = principal_subspace(activations.float(), **wanted)
        k = wanted["rank"] or int(np.argmax(shares >= 0.99)) + 1
        assert len(found.directions) == k
        assert found.variance_share == pytest.approx(shares[k - 1], rel=1e-6)
        np.testing.assert_allclose(found.singular_values.numpy(), np.sqrt(squares[:k]), rtol=1e-5)
        r = torch.randn(shape[1], generator=seeded(5)).double()
        expected = r - (right[:k] @ r) @ right[:k]
        vector = paper_vector(found, seeded(5))
        np.testing.assert_allclose(vector.numpy(), (expected / expected.norm()).numpy(), atol=1e-6)
        again = principal_subspace(activations.float(), **wanted)
        assert torch.equal(found.directions, again.directions)

    @pytest.mark.parametrize("rank", [2, 10])
    def test_no_more_directions_than_the_matrix_has(self, rank):
        rows = torch.randn(3, 2304, generator=seeded(), dtype=torch.float64)
        directions = principal_subspace(rows.repeat(700, 1), rank=rank, variance=0.9).directions.double()
        assert len(directions) == min(rank, 3)
        torch.testing.assert_close(directions @ directions.T, torch.eye(len(directions)).double(), atol=1e-6, rtol=0)
        inside = torch.linalg.lstsq(rows.T, directions.T).solution
        torch.testing.assert_close(rows.T @ inside, directions.T, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("rank", [8, 33, None])
    def test_a_flat_spectrum_or_many_directions_are_left_to_the_exact_way(self, rank, monkeypatch):
        monkeypatch.setattr(offset_vectors, "_all_pairs", refuse)
        activations = torch.randn(2048, 2304, generator=seeded())
        with pytest.raises(AssertionError, match="exact decomposition"):
            principal_subspace(activations, rank=rank, variance=0.9)


class TestPaperVector:
    @given(problems())
    @settings(max_examples=60, deadline=None)
    def test_leaves_the_subspace(self, problem):
        activations, rank, seed = problem
        subspace = principal_subspace(activations, rank=rank, variance=0.5)
        vector = paper_vector(subspace, seeded(seed))
        assert (subspace.directions @ vector).square().sum() < 1e-5
        assert vector.norm().item() == pytest.approx(1, abs=1e-5)

    @given(
        rows=st.integers(3, 40),
        hidden=st.integers(8, 32),
        weight=st.floats(-2, 2),
        nonlinearity=st.sampled_from(["none", "tanh"]),
        seed=st.integers(0, 99),
    )
    @settings(max_examples=40, deadline=None)
    def test_equals_decomposition_and_one_rank_at_a_time(self, rows, hidden, weight, nonlinearity, seed):
        activations = decaying(rows, hidden, 0.8, seed)
        rank = min(rows, 5)
        r = torch.randn(hidden, generator=seeded(seed)).double().numpy()
        _, _, right = np.linalg.svd(activations.numpy(), full_matrices=False)
        matrix = np.eye(hidden)
        for k in range(rank):
            matrix -= weight * np.outer(right[k], right[k])
        expected = r @ matrix
        if nonlinearity == "tanh":
            expected = np.tanh(expected)
        expected /= np.linalg.norm(expected)
        subspace = principal_subspace(activations, rank=rank, variance=0.5)
        got = paper_vector(subspace, seeded(seed), weight=weight, nonlinearity=nonlinearity)
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)

    def test_weight_zero_is_the_random_vector(self):
        subspace = principal_subspace(torch.randn(50, 12, generator=seeded()), rank=4, variance=0.5)
        torch.testing.assert_close(paper_vector(subspace, seeded(3), weight=0.0), random_vector(12, seeded(3)))
        assert not torch.allclose(paper_vector(subspace, seeded(3)), random_vector(12, seeded(3)))

    def test_tanh_does_not_stay_outside(self):
        """Why ``none`` is the default: an elementwise function mixes the subspace back in."""
        subspace = principal_subspace(decaying(50, 12, 0.8), rank=6, variance=0.5)
        vector = paper_vector(subspace, seeded(1), nonlinearity="tanh")
        assert (subspace.directions @ vector).square().sum() > 1e-4


def test_random_vector_is_unit_isotropic_and_seeded():
    draws = torch.stack([random_vector(6, seeded(seed)) for seed in range(2000)])
    torch.testing.assert_close(draws.norm(dim=1), torch.ones(2000))
    torch.testing.assert_close(draws.mean(0), torch.zeros(6), atol=0.04, rtol=0)
    torch.testing.assert_close(draws.T @ draws / 2000, torch.eye(6) / 6, atol=0.02, rtol=0)
    assert torch.equal(draws[5], random_vector(6, seeded(5)))


class TestPublishedCode:
    @staticmethod
    def loop_version(activations, noise, max_rank=1000):
        """The repository's arithmetic, one rank-1 term and one scalar at a time, in fp64."""
        _, singular, right = np.linalg.svd(activations.double().numpy(), full_matrices=False)
        hidden = right.shape[1]
        matrix = np.eye(hidden)
        for k in range(min(max_rank, len(right))):
            weight = -1000.0 / (1.0 + math.exp(-singular[k] / singular[0]))
            matrix -= weight * np.outer(right[k], right[k])
        matrix = np.tanh(matrix + 0.01 * noise.double().numpy())
        vector = np.ones(hidden) / math.sqrt(hidden)
        for _ in range(6):
            vector = np.tanh(vector @ matrix)
            vector /= math.sqrt(sum(x * x for x in vector)) + 1e-6
        return vector

    @pytest.mark.parametrize("shape", [(100, 24), (10, 24)])
    @pytest.mark.parametrize("max_rank", [1000, 4])
    @pytest.mark.parametrize("seed", range(3))
    def test_equals_the_loop(self, shape, max_rank, seed):
        activations = decaying(*shape, 0.8, seed).float()
        noise = torch.randn(24, 24, generator=seeded(seed))
        got = published_code_vector(activations, seeded(seed), max_rank=max_rank)
        np.testing.assert_allclose(got.numpy(), self.loop_version(activations, noise, max_rank), atol=1e-3)
        assert got.norm().item() == pytest.approx(1, abs=1e-5)

    def test_lies_inside_the_subspace_it_is_said_to_leave(self):
        """Energy in the top 8 of 64 directions; a random vector has 8/64, the paper's none."""
        shares = {"published": [], "random": [], "paper": []}
        for seed in range(10):
            activations = decaying(300, 64, 0.7, seed).float()
            subspace = principal_subspace(activations, rank=8, variance=0.5)
            vectors = {
                "published": published_code_vector(activations, seeded(seed)),
                "random": random_vector(64, seeded(seed)),
                "paper": paper_vector(subspace, seeded(seed)),
            }
            for name, vector in vectors.items():
                shares[name].append(float((subspace.directions @ vector).square().sum()))
        mean = {name: sum(values) / len(values) for name, values in shares.items()}
        assert min(shares["published"]) > 0.5
        assert mean["random"] == pytest.approx(8 / 64, abs=0.06)
        assert max(shares["paper"]) < 1e-8
