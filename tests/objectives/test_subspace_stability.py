import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

from falcon_unlearn.objectives import subspace_stability as module
from falcon_unlearn.objectives.offset_vectors import principal_subspace
from falcon_unlearn.objectives.subspace_stability import principal_angles, subspace_stability


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def rotation(size, seed):
    return torch.linalg.qr(normal(size, size, seed=seed)).Q


def decaying(rows, hidden, power=0.6, seed=0):
    return normal(rows, hidden, seed=seed) * torch.arange(1, hidden + 1).double() ** -power @ rotation(hidden, seed + 1)


def stability(activations, records, rank, resamples=20, seed=0):
    subspace = principal_subspace(activations, rank=rank, variance=0.5)
    return subspace_stability(activations, torch.as_tensor(records), subspace, resamples, seeded(seed))


@st.composite
def pairs(draw):
    hidden = draw(st.integers(2, 24))
    first, second = (draw(st.integers(1, hidden)) for _ in range(2))
    seed = draw(st.integers(0, 999))
    return normal(first, hidden, seed=seed), normal(second, hidden, seed=seed + 1)


class TestPrincipalAngles:
    @given(pairs())
    @settings(max_examples=60, deadline=None)
    def test_equal_scipys_in_either_order(self, pair):
        expected = np.sort(subspace_angles(*(rows.numpy().T for rows in pair)))
        for first, second in (pair, pair[::-1]):
            np.testing.assert_allclose(principal_angles(first, second).numpy(), expected, atol=1e-7)

    @given(pairs(), st.integers(0, 99))
    @settings(max_examples=40, deadline=None)
    def test_change_with_neither_a_rotation_nor_another_basis(self, pair, seed):
        first, second = pair
        turned = rotation(first.shape[1], seed)
        found = principal_angles(rotation(len(first), seed + 1) @ first @ turned, 3 * second @ turned)
        torch.testing.assert_close(found, principal_angles(first, second), atol=1e-7, rtol=0)

    def test_of_a_subspace_to_itself_or_to_one_that_holds_it_are_zero(self):
        rows = normal(5, 12)
        for other in (rows, rows.flip(0), torch.cat((rows, normal(3, 12, seed=7)))):
            assert principal_angles(rows, other).max() < 1e-10
        assert len(principal_angles(rows, torch.cat((rows, normal(3, 12, seed=7))))) == 5

    def test_of_orthogonal_subspaces_are_right_angles(self):
        basis = rotation(9, 3)
        found = principal_angles(basis[:4], basis[4:])
        torch.testing.assert_close(found, torch.full((4,), math.pi / 2).double())

    @pytest.mark.parametrize("angle", [1e-9, 1e-5, 0.3, math.pi / 4, 1.2, math.pi / 2 - 1e-5])
    def test_find_the_angle_that_was_put_in(self, angle):
        basis = rotation(8, 1)
        tilted = torch.stack((basis[0], math.cos(angle) * basis[1] + math.sin(angle) * basis[2]))
        found = principal_angles(basis[:2], tilted)
        assert found[1].item() == pytest.approx(angle, rel=1e-6, abs=1e-14)
        assert found[0].item() < 1e-10

    def test_of_random_subspaces_share_rank_over_dimension(self):
        shares = [
            principal_angles(normal(6, 40, seed=2 * i), normal(6, 40, seed=2 * i + 1)).cos().square().mean().item()
            for i in range(300)
        ]
        assert np.mean(shares) == pytest.approx(6 / 40, abs=4 * np.std(shares) / math.sqrt(300))


class TestSubspaceStability:
    @pytest.mark.parametrize("shape", [(30, 50), (60, 20)])
    def test_is_the_naive_bootstrap(self, shape):
        activations = decaying(*shape)
        records = [i // 3 for i in range(shape[0])]
        found = stability(activations, records, 4, resamples=5, seed=3)

        rows = activations.numpy()
        own = np.linalg.svd(rows, full_matrices=False)[2][:4]
        generator, count, angles = seeded(3), shape[0] // 3, []
        for _ in range(5):
            drawn = torch.randint(count, (count,), generator=generator).tolist()
            again = np.concatenate([rows[3 * record : 3 * record + 3] for record in drawn])
            angles.append(subspace_angles(own.T, np.linalg.svd(again, full_matrices=False)[2][:4].T))
        assert (found.resamples, found.records) == (5, count)
        assert found.largest_angle == pytest.approx(np.mean([np.max(a) for a in angles]), abs=1e-5)
        assert found.shared == pytest.approx(np.mean(np.cos(angles) ** 2), abs=1e-5)
        assert found.shared_at_random == pytest.approx(4 / shape[1])
        assert found.median_angle == pytest.approx(np.mean([np.median(a) for a in angles]), abs=1e-5)

    def test_draws_whole_records_whatever_they_are_called_and_wherever_their_rows_are(self):
        activations, records = decaying(40, 16), torch.arange(40) % 8
        order = torch.randperm(40, generator=seeded(1))
        one = stability(activations, records, 3)
        assert stability(activations[order], records[order], 3).shared == pytest.approx(one.shared, abs=1e-6)
        assert stability(activations, 10 * records + 5, 3) == one
        assert stability(activations, torch.arange(40), 3).shared != pytest.approx(one.shared, abs=1e-3)

    def test_does_not_change_with_a_rotation(self):
        activations, records = decaying(40, 16), torch.arange(40) // 4
        one, turned = stability(activations, records, 3), stability(activations @ rotation(16, 5), records, 3)
        assert turned.shared == pytest.approx(one.shared, abs=1e-6)
        assert turned.largest_angle == pytest.approx(one.largest_angle, abs=1e-5)

    def test_records_that_are_all_alike_leave_no_angle(self):
        low_rank = normal(6, 3) @ normal(3, 20, seed=1)
        found = stability(low_rank.repeat(7, 1), torch.arange(7).repeat_interleave(6), 3)
        assert found.largest_angle < 1e-6
        assert found.shared == pytest.approx(1)

    def test_directions_that_a_resample_lacks_are_at_right_angles(self):
        # Each record is a direction of its own: a resample shares what it drew, and nothing else.
        count = 12
        found = stability(torch.eye(20)[:count], range(count), count)
        generator = seeded()
        drawn = [len(torch.randint(count, (count,), generator=generator).unique()) for _ in range(20)]
        assert found.shared == pytest.approx(np.mean(drawn) / count)
        assert found.largest_angle == pytest.approx(math.pi / 2)

    def test_structure_is_told_from_none(self):
        records = torch.arange(300)
        clear = normal(300, 4, seed=1) @ normal(4, 40, seed=2) + 0.3 * normal(300, 40)
        structure, none = stability(clear, records, 4), stability(normal(300, 40), records, 4)
        assert none.shared_at_random == structure.shared_at_random == 0.1
        assert structure.shared > 0.98
        assert 0.1 < none.shared < 0.7
        assert structure.largest_angle < none.median_angle < none.largest_angle

    def test_the_iteration_is_near_the_exact_way(self, monkeypatch):
        activations, records = decaying(300, 200), torch.arange(300) // 3
        exact = stability(activations, records, 12, resamples=3)
        monkeypatch.setattr(module, "_WORTH_APPROXIMATING", 10)
        near = stability(activations, records, 12, resamples=3)
        assert (near.resamples, stability(activations, records, 12, resamples=9).resamples) == (3, 5)
        assert near != exact
        assert near.shared == pytest.approx(exact.shared, abs=0.01)
        assert near.median_angle == pytest.approx(exact.median_angle, abs=0.02)

    def test_leaves_the_global_generator_alone(self):
        before = torch.get_rng_state()
        stability(decaying(20, 8), range(20), 3)
        assert torch.equal(torch.get_rng_state(), before)
