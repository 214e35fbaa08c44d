import dataclasses

import numpy as np
import pytest
import torch
from attacks.attacked_models import attacked, fingerprint
from hypothesis import given
from hypothesis import strategies as st
from model.tiny_models import MIXTURES, build_model

from falcon_unlearn.attacks.base import Deadline, OutOfTimeError
from falcon_unlearn.attacks.weights import InterpolateConfig, PruneConfig, interpolated, layer_matrices, pruned
from falcon_unlearn.errors import UserError


@pytest.fixture
def models(tiny, oracle):
    return attacked(tiny.model, oracle)


def test_the_ends_of_the_way_are_the_two_models(models):
    outcome = InterpolateConfig(alphas=(0.0, 0.5, 1.0)).run(models.target())
    start, middle, end = outcome.points
    assert outcome.samples == models.target().score()
    assert end.probability == pytest.approx(np.mean([s.probability for s in models.target("original").score()]))
    assert end.numbers["utility"] == models.target("original").utility_probability()
    assert start.probability < middle.probability < end.probability
    assert "3 of 29 tensors differ" in outcome.notes[0]


@given(st.floats(0, 1), st.integers(0, 9))
def test_interpolation_is_the_weighted_mean(alpha, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 5, 7, generator=generator)
    expected = (1 - alpha) * a.double() + alpha * b.double()
    np.testing.assert_allclose(interpolated(a, b, alpha).double(), expected, rtol=1e-5, atol=1e-6)
    for dtype in (torch.float32, torch.bfloat16):
        low, high = a.to(dtype), b.to(dtype)
        assert torch.equal(interpolated(low, high, 0.0), low)
        assert torch.equal(interpolated(low, high, 1.0), high)


def test_interpolation_needs_an_original_of_the_same_shape(models):
    with pytest.raises(UserError, match="needs the original model"):
        InterpolateConfig().run(models.target(original=None))
    with pytest.raises(UserError, match="other tensors"):
        InterpolateConfig().run(models.target(original=build_model("llama")))


@given(st.floats(0, 1), st.integers(1, 6), st.integers(1, 9), st.integers(0, 9))
def test_pruning_takes_the_smallest(sparsity, rows, columns, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    result = pruned(weight, sparsity)
    order = np.argsort(np.abs(weight.numpy().ravel()), kind="stable")
    expected = weight.numpy().ravel().copy()
    expected[order[: round(sparsity * weight.numel())]] = 0
    np.testing.assert_array_equal(result.numpy().ravel(), expected)


def test_pruning_counts_exactly_where_magnitudes_tie():
    weight = torch.ones(4, 10)
    assert int((pruned(weight, 0.3) == 0).sum()) == 12
    assert torch.equal(weight, torch.ones(4, 10))


def test_nothing_pruned_is_the_model_itself_and_everything_pruned_knows_nothing(models):
    for name in ("original", "unlearned"):
        outcome = PruneConfig(sparsities=(0.0, 1.0)).run(models.target(name))
        nothing, everything = outcome.points
        before = models.target(name).score()
        assert nothing.probability == pytest.approx(np.mean([s.probability for s in before]))
        assert nothing.accuracy == pytest.approx(np.mean([s.accuracy for s in before]))
        assert everything.numbers["utility"] < 0.2
    assert outcome.steps == 2


@pytest.mark.parametrize("architecture", ["llama", "gpt2", *MIXTURES])
def test_all_matrices_of_the_layers_and_nothing_else(architecture):
    model = build_model(architecture)
    names = layer_matrices(model)
    outside = {n for n, p in model.named_parameters() if p.ndim >= 2} - set(names)
    assert all(model.get_parameter(name).ndim >= 2 for name in names)
    assert all("layers." not in name and ".h." not in name for name in outside)
    assert outside  # the embedding


@pytest.mark.parametrize("config", [InterpolateConfig(), PruneConfig()], ids=lambda config: config.name)
def test_weights_stay_and_results_repeat_and_time_may_run_out(models, config):
    before = fingerprint(models.unlearned), fingerprint(models.original)
    target = models.target()
    assert config.run(target) == config.run(target)
    assert (fingerprint(models.unlearned), fingerprint(models.original)) == before
    with pytest.raises(OutOfTimeError):
        config.run(dataclasses.replace(target, deadline=Deadline(0)))
    with pytest.raises(OutOfTimeError):
        config.run(dataclasses.replace(target, deadline=OneThenNone(0)))
    cut = config.run(dataclasses.replace(target, deadline=OneThenNone(1)))
    assert not cut.complete
    assert cut.points == config.run(target).points[:1]


class OneThenNone(Deadline):
    """Passes after ``n`` looks."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    @property
    def passed(self):
        self.left -= 1
        return self.left < 0
