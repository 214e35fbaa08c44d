import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import gaussian_kde
from sklearn.decomposition import PCA

from falcon_unlearn.artifacts import MutualInformationCurve
from falcon_unlearn.corpus.batching import epoch_order
from falcon_unlearn.errors import UserError
from falcon_unlearn.selection.mutual_information import (
    EstimationError,
    MutualInformationConfig,
    aggregate,
    curve,
    entropy,
    fit_pca,
    kde_entropy,
    mutual_information,
    pair_rows,
    published_mutual_information,
    rank_correlation,
    statements,
)

VARIANCE = 0.95


def activations(n, dimensions, seed, decay=0.6):
    """Correlated samples far from the origin, with a falling spectrum in a random basis."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(dimensions, dimensions)))[0]
    spread = decay ** np.arange(dimensions)
    return torch.from_numpy(rng.normal(size=(n, dimensions)) * spread @ basis + 3 * rng.normal(size=dimensions))


def scipy_entropy(projected):
    return -gaussian_kde(projected.T).logpdf(projected.T).mean()


def published_entropy(samples, variance=VARIANCE):
    return scipy_entropy(PCA(n_components=variance).fit_transform(samples.numpy()))


def reference_mutual_information(forget, retain, variance=VARIANCE):
    joint = torch.cat([forget, retain], dim=1)
    return sum(sign * published_entropy(x, variance) for sign, x in ((1, forget), (1, retain), (-1, joint)))


shapes = given(
    n=st.integers(4, 40),
    dimensions=st.integers(1, 50),
    decay=st.floats(0.3, 1.0),
    variance=st.floats(0.5, 0.99),
    seed=st.integers(0, 10_000),
)


@shapes
@settings(max_examples=60, deadline=None)
def test_pca_and_entropy_equal_sklearn_and_scipy_or_refuse(n, dimensions, decay, variance, seed):
    samples = activations(n, dimensions, seed, decay)
    reference = PCA(n_components=variance).fit_transform(samples.numpy())
    projected = fit_pca(samples, variance).numpy()
    assert projected.shape == reference.shape
    signs = np.sign((projected * reference).sum(axis=0))
    np.testing.assert_allclose(projected * signs, reference, atol=1e-6)
    if n < reference.shape[1] + 2:
        with pytest.raises(EstimationError, match="do not determine a density"):
            entropy(samples, variance)
    else:
        assert entropy(samples, variance) == pytest.approx(scipy_entropy(reference), abs=1e-6)


@given(n=st.integers(8, 40), dimensions=st.integers(1, 5), seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_kde_entropy_equals_scipy_on_correlated_dimensions(n, dimensions, seed):
    samples = activations(n, dimensions, seed)
    assert kde_entropy(samples) == pytest.approx(scipy_entropy(samples.numpy()), abs=1e-6)


@pytest.mark.parametrize("dimensions", [6, 90])
def test_mutual_information_equals_sklearn_and_scipy(dimensions):
    forget, retain = activations(60, dimensions, 0), activations(60, dimensions, 1)
    forget[:, 0] += retain[:, 0]
    assert mutual_information(forget, retain, VARIANCE) == pytest.approx(
        reference_mutual_information(forget, retain), abs=1e-6
    )


@pytest.mark.parametrize(("n_forget", "n_retain"), [(60, 200), (60, 60), (200, 60)])
@pytest.mark.parametrize("dimensions", [6, 90])
def test_published_estimate_takes_all_rows_for_the_marginals_and_the_first_for_the_joint(
    n_forget, n_retain, dimensions
):
    forget, retain = activations(n_forget, dimensions, 0), activations(n_retain, dimensions, 1)
    joint = torch.cat([forget[:60], retain[:60]], dim=1)
    expected = published_entropy(forget) + published_entropy(retain) - published_entropy(joint)
    assert published_mutual_information(forget, retain, VARIANCE) == pytest.approx(expected, abs=1e-6)
    if n_forget == n_retain:
        assert published_mutual_information(forget, retain) == pytest.approx(mutual_information(forget, retain))


def test_published_estimate_names_what_is_wrong():
    forget, retain = activations(30, 4, 0), torch.zeros(40, 4)
    with pytest.raises(EstimationError, match=r"^retain: all 40 activations are the same"):
        published_mutual_information(forget, retain)


@given(n=st.integers(8, 40), dimensions=st.integers(1, 60), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_entropy_is_the_density_estimate_of_the_principal_components(n, dimensions, seed):
    samples = activations(n, dimensions, seed)
    assert entropy(samples) == pytest.approx(kde_entropy(fit_pca(samples)), abs=1e-9)


def test_samples_far_from_all_others_do_not_underflow():
    samples = torch.cat([activations(40, 2, 0), 1e6 * activations(3, 2, 1)])
    assert kde_entropy(samples) == pytest.approx(scipy_entropy(samples.numpy()), abs=1e-6)


@pytest.mark.parametrize("block", [1, 7, 64, 65])
def test_block_size_does_not_change_the_entropy(block):
    samples = activations(65, 4, 3)
    assert kde_entropy(samples, block=block) == pytest.approx(kde_entropy(samples, block=10_000), abs=1e-12)


def test_entropy_of_many_gaussian_samples_is_the_closed_form():
    samples = 2.5 * torch.randn(4000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert kde_entropy(samples) == pytest.approx(0.5 * math.log(2 * math.pi * math.e * 2.5**2), abs=0.03)


def test_dependent_gaussians_share_more_than_independent_ones():
    noise = torch.randn(3, 500, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    forget, independent = noise[0], noise[1]
    dependent = 0.9 * forget + math.sqrt(1 - 0.9**2) * noise[2]
    assert mutual_information(forget, dependent) > mutual_information(forget, independent) + 0.4


@given(
    factor=st.floats(1e-3, 1e3),
    n=st.integers(30, 60),
    dimensions=st.integers(1, 80),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_unit_dependence(factor, n, dimensions, seed):
    """I(cF;cR) = I(F;R) + (kF + kR - kJ) ln c: a defect of the published estimator, stated as it is."""
    forget, retain = activations(n, dimensions, seed), activations(n, dimensions, seed + 1, decay=0.5)
    joint = torch.cat([forget, retain], dim=1)
    surplus = sum(sign * fit_pca(x, VARIANCE).shape[1] for sign, x in ((1, forget), (1, retain), (-1, joint)))
    expected = mutual_information(forget, retain, VARIANCE) + surplus * math.log(factor)
    assert mutual_information(factor * forget, factor * retain, VARIANCE) == pytest.approx(expected, abs=1e-7)


def test_unit_moves_the_value_where_dimensions_do_not_add_up():
    forget, retain = activations(50, 40, 0, decay=0.95), activations(50, 40, 1, decay=0.95)
    moved = mutual_information(100 * forget, 100 * retain) - mutual_information(forget, retain)
    assert moved / math.log(100) == pytest.approx(round(moved / math.log(100)), abs=1e-6)
    assert moved > math.log(100) / 2


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_joint_permutation_and_rotation_leave_mutual_information_unchanged(seed):
    forget, retain = activations(40, 12, seed), activations(40, 12, seed + 1)
    value = mutual_information(forget, retain)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    assert mutual_information(forget[order], retain[order]) == pytest.approx(value, abs=1e-8)
    rotation = torch.linalg.qr(activations(12, 12, seed + 2, decay=1.0)).Q
    assert mutual_information(forget @ rotation, retain + 7.0) == pytest.approx(value, abs=1e-8)
    assert mutual_information(forget[order], retain) != pytest.approx(value, abs=1e-8)


@pytest.mark.parametrize(("dimensions", "nats"), [(5, 1.9), (20, 2.4), (50, 4.2)])
def test_independent_gaussians_do_not_give_zero(dimensions, nats):
    generator = torch.Generator().manual_seed(dimensions)
    forget, retain = torch.randn(2, 512, dimensions, generator=generator).unbind()
    assert mutual_information(forget, retain) == pytest.approx(nats, abs=0.5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 2.0])
def test_aggregate_is_the_sum_of_its_parts(eta):
    forget = {name: activations(50, 10, i) for i, name in enumerate(("bio", "cyber", "law"))}
    retain = activations(50, 10, 9)
    bio, cyber, law = forget.values()
    with_retain = sum(mutual_information(x, retain) for x in (bio, cyber, law))
    between = mutual_information(bio, cyber) + mutual_information(bio, law) + mutual_information(cyber, law)
    assert aggregate(forget, retain, eta=eta) == pytest.approx(with_retain + eta * between, abs=1e-9)


def test_aggregate_of_one_domain_is_its_mutual_information_whatever_eta():
    forget, retain = activations(50, 10, 0), activations(50, 10, 1)
    assert aggregate({"bio": forget}, retain, eta=5.0) == pytest.approx(mutual_information(forget, retain), abs=1e-9)


def test_half_precision_samples_are_estimated_in_double():
    samples = activations(40, 6, 0).to(torch.bfloat16)
    assert entropy(samples) == entropy(samples.double())


# --- entropies that cannot be estimated


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_activations_are_counted(value):
    samples = activations(20, 3, 0)
    samples[4, 1] = samples[9, 2] = value
    with pytest.raises(EstimationError, match="in 2 of 20 activations"):
        entropy(samples)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_constant_activations_are_an_error_even_with_rounding_noise(dtype):
    constant = torch.full((20, 3), 0.1, dtype=dtype)
    with pytest.raises(EstimationError, match="all 20 activations are the same"):
        entropy(constant)
    constant[3] *= 1 + torch.finfo(dtype).eps
    with pytest.raises(EstimationError, match="all 20 activations are the same"):
        entropy(constant)


def test_small_but_real_differences_are_no_constant():
    samples = activations(30, 3, 0)
    shifted = 1e-6 * samples + 1.0
    assert entropy(shifted) == pytest.approx(entropy(1e-6 * samples), abs=1e-6)


@pytest.mark.parametrize("n", [5, 6, 7])
def test_kde_needs_two_samples_more_than_dimensions(n):
    samples = activations(n, 5, 0)
    if n < 7:
        with pytest.raises(EstimationError, match=rf"{n} samples in 5 dimensions .*\(7 are needed\).*lower 'variance'"):
            kde_entropy(samples)
    else:
        assert kde_entropy(samples) == pytest.approx(scipy_entropy(samples.numpy()), abs=1e-6)


def test_simplex_carries_nothing_but_its_volume():
    """Why n = d + 1 is refused: scipy then gives the log-determinant plus a constant that ignores the data."""

    def beyond_volume(samples):
        return scipy_entropy(samples) - 0.5 * np.linalg.slogdet(np.cov(samples.T))[1]

    first, second = (activations(6, 5, seed).numpy() for seed in (0, 1))
    assert beyond_volume(first) == pytest.approx(beyond_volume(second), abs=1e-8)


@pytest.mark.parametrize("duplicate", ["copy", "sum", "constant"])
def test_singular_covariance_is_an_error(duplicate):
    samples = activations(30, 3, 0)
    extra = {"copy": samples[:, 0], "sum": samples.sum(dim=1), "constant": torch.ones(30)}[duplicate]
    with pytest.raises(EstimationError, match="singular"):
        kde_entropy(torch.cat([samples, extra[:, None]], dim=1))


def test_pca_drops_dimensions_that_are_only_rounding():
    samples = activations(30, 3, 0)
    redundant = torch.cat([samples, samples @ torch.ones(3, 2, dtype=torch.float64)], dim=1)
    assert fit_pca(redundant, 1 - 1e-12).shape == (30, 3)


def test_single_sample_is_an_error():
    with pytest.raises(EstimationError, match="too few"):
        entropy(torch.ones(1, 3))


def test_unequal_rows_cannot_be_paired():
    with pytest.raises(EstimationError, match="30 and 31 rows cannot be paired"):
        mutual_information(activations(30, 2, 0), activations(31, 2, 0))


def test_estimation_error_is_the_users_to_solve():
    assert issubclass(EstimationError, UserError)


# --- the curve and its nulls


LAYERS = (2, 5, 7)


def by_layer(n, seed, dimensions=70):
    return [activations(n, dimensions, seed + 100 * layer, decay=0.3 + 0.1 * layer) for layer in LAYERS]


@pytest.fixture(scope="module")
def forget():
    return {"bio": by_layer(45, 0), "cyber": by_layer(60, 1)}


@pytest.fixture(scope="module")
def retain():
    return by_layer(130, 2)


CONFIG = MutualInformationConfig(permutations=3)


@pytest.fixture(scope="module")
def result(forget, retain):
    return curve(LAYERS, forget, retain, CONFIG, seed=4)


@given(
    forget_rows=st.dictionaries(st.sampled_from("abc"), st.integers(3, 40), min_size=1),
    retain_rows=st.integers(12, 100),
    max_samples=st.integers(3, 30),
    seed=st.integers(0, 100),
)
def test_pairing_counts(forget_rows, retain_rows, max_samples, seed):
    rows = pair_rows(forget_rows, retain_rows, max_samples, seed)
    assert rows.pairs == min(max_samples, *forget_rows.values(), retain_rows // (len(forget_rows) + 1))
    for name, chosen in rows.forget.items():
        assert len(set(chosen)) == len(chosen) == rows.pairs
        assert set(chosen) <= set(range(forget_rows[name]))
    from_retain = [*rows.retain, *(row for chosen in rows.held_back.values() for row in chosen)]
    assert rows.held_back.keys() == forget_rows.keys()
    assert len(set(from_retain)) == len(from_retain) == rows.pairs * (len(forget_rows) + 1)
    assert set(from_retain) <= set(range(retain_rows))


def test_pairing_is_seeded_and_shuffled():
    first = pair_rows({"bio": 50}, 120, 40, 0)
    assert first == pair_rows({"bio": 50}, 120, 40, 0)
    assert first != pair_rows({"bio": 50}, 120, 40, 1)
    assert first.forget["bio"] != tuple(sorted(first.forget["bio"]))


@pytest.mark.parametrize(("forget_rows", "retain_rows"), [({"bio": 2}, 100), ({"bio": 50, "law": 50}, 8), ({}, 50)])
def test_too_few_records_to_pair(forget_rows, retain_rows):
    with pytest.raises(UserError, match="at least"):
        pair_rows(forget_rows, retain_rows, 512, 0)


def test_curve_equals_the_published_estimate_on_the_paired_rows(result, forget, retain):
    rows = pair_rows({"bio": 45, "cyber": 60}, 130, 512, 4)
    assert result.pairs == rows.pairs == 43
    assert result.layers == LAYERS
    assert result.domains == ("bio", "cyber")
    for i in range(len(LAYERS)):
        bio, cyber = forget["bio"][i][list(rows.forget["bio"])], forget["cyber"][i][list(rows.forget["cyber"])]
        kept = retain[i][list(rows.retain)]
        parts = ((bio, kept), (cyber, kept), (bio, cyber))
        assert result.value[i] == pytest.approx(sum(reference_mutual_information(*p) for p in parts), abs=1e-6)


def test_retain_null_is_the_same_estimate_on_held_back_retain_rows(result, retain):
    rows = pair_rows({"bio": 45, "cyber": 60}, 130, 512, 4)
    for i in range(len(LAYERS)):
        held_back = {name: retain[i][list(chosen)] for name, chosen in rows.held_back.items()}
        expected = aggregate(held_back, retain[i][list(rows.retain)])
        assert result.null_retain[i] == pytest.approx(expected, abs=1e-6)


def test_permutation_null_is_the_mean_over_pairings_broken_anew(forget, retain):
    """The null over three permutations is the mean of three nulls, each the estimate with other pairings."""
    nulls = [
        curve(LAYERS, forget, retain, MutualInformationConfig(permutations=p), seed=4).null_permutation
        for p in (1, 2, 3)
    ]
    singles = [nulls[0], [2 * b - a for a, b in zip(*nulls[:2], strict=True)]]
    singles.append([3 * c - 2 * b for b, c in zip(*nulls[1:], strict=True)])
    value = curve(LAYERS, forget, retain, CONFIG, seed=4).value
    for i in range(len(LAYERS)):
        draws = [value[i], *(single[i] for single in singles)]
        assert len({round(draw, 6) for draw in draws}) == 4
        assert max(draws) - min(draws) < 0.25 * abs(value[i]) + 5


def test_permutation_null_forgets_a_dependence_that_the_estimate_sees():
    shared = activations(80, 2, 0, decay=0.9)
    kept = torch.cat([shared, activations(100, 2, 1, decay=0.9)])
    rows = pair_rows({"bio": 80}, 180, 512, 0)
    paired = torch.empty(80, 2, dtype=torch.float64)
    paired[list(rows.forget["bio"])] = kept[list(rows.retain)] + 0.01 * activations(80, 2, 2, decay=0.9)
    found = curve([0], {"bio": [paired]}, [kept], CONFIG, seed=0)
    assert found.value[0] > found.null_permutation[0] + 0.5
    assert found.value[0] > found.null_retain[0] + 0.5


def test_curve_is_a_function_of_its_seed(result, forget, retain):
    assert curve(LAYERS, forget, retain, CONFIG, seed=4) == result
    other = curve(LAYERS, forget, retain, CONFIG, seed=5)
    assert other.value != result.value
    assert other.null_permutation != result.null_permutation


def test_computing_on_a_named_device_is_the_same(result, forget, retain):
    assert curve(LAYERS, forget, retain, CONFIG, seed=4, device="cpu") == result


def test_permuted_pairings_are_estimated_as_given(forget, retain):
    """The null from reordered inner products equals the plain estimate on reordered rows."""
    config = MutualInformationConfig(permutations=1)
    found = curve(LAYERS, {"bio": forget["bio"]}, retain, config, seed=4)
    rows = pair_rows({"bio": 45}, 130, 512, 4)
    order = epoch_order(rows.pairs, 0, 4, "mutual information, permutation bio")
    for i in range(len(LAYERS)):
        shuffled = forget["bio"][i][list(rows.forget["bio"])][order]
        expected = published_mutual_information(shuffled, retain[i][list(rows.retain)])
        assert found.null_permutation[i] == pytest.approx(expected, abs=1e-9)


def test_a_layer_does_not_depend_on_the_other_layers(result, forget, retain):
    alone = curve(LAYERS[1:2], {n: x[1:2] for n, x in forget.items()}, retain[1:2], CONFIG, seed=4)
    assert (alone.value[0], alone.null_retain[0], alone.null_permutation[0]) == (
        result.value[1],
        result.null_retain[1],
        result.null_permutation[1],
    )


def test_max_samples_bounds_the_pairs(forget, retain):
    config = MutualInformationConfig(max_samples=30, permutations=1)
    assert curve(LAYERS, forget, retain, config, seed=0).pairs == 30


def test_eta_weights_the_information_between_domains(forget, retain):
    none, one, two = (
        curve(LAYERS, forget, retain, MutualInformationConfig(eta=eta, permutations=1), seed=0) for eta in (0, 1, 2)
    )
    for field in ("value", "null_retain", "null_permutation"):
        a, b, c = (np.array(getattr(found, field)) for found in (none, one, two))
        np.testing.assert_allclose(c - b, b - a, atol=1e-8)
        assert np.abs(b - a).max() > 0.1


def test_errors_name_layer_and_domain(forget, retain):
    dead = [forget["cyber"][0], torch.zeros(60, 70), forget["cyber"][2]]
    with pytest.raises(EstimationError, match=r"^layer 5, forget domain 'cyber': all 43 activations are the same"):
        curve(LAYERS, {**forget, "cyber": dead}, retain, CONFIG, seed=4)
    overflow = [retain[0], retain[1], torch.full((130, 70), math.inf)]
    with pytest.raises(EstimationError, match=r"^layer 7, retain: NaN or infinity in 43 of 43"):
        curve(LAYERS, forget, overflow, CONFIG, seed=4)
    flat = [activations(n, 70, 0, decay=1.0) for n in (60, 130)]
    with pytest.raises(EstimationError, match=r"^layer 3, forget domain 'bio': 8 samples in 7 dimensions"):
        curve([3], {"bio": flat[:1]}, flat[1:], MutualInformationConfig(max_samples=8), seed=0)
    wide = MutualInformationConfig(max_samples=8, variance=0.99)
    with pytest.raises(EstimationError, match=r"^layer 3, 'bio' joint with retain: 8 samples in 7 dimensions"):
        curve([3], {"bio": [flat[0][:, :4]]}, [flat[1][:, :4]], wide, seed=0)


@pytest.mark.parametrize(
    "bad",
    [{"variance": 0.0}, {"variance": 1.0}, {"eta": -1.0}, {"eta": math.inf}, {"permutations": 0}, {"max_samples": 2}],
)
def test_config_refuses(bad):
    with pytest.raises(ValidationError):
        MutualInformationConfig(**bad)


# --- what is said of a curve


def made_up(value, null_retain, null_permutation):
    layers = tuple(range(len(value)))
    return MutualInformationCurve(layers, tuple(value), tuple(null_retain), tuple(null_permutation), 50, ("bio",))


def test_rank_correlation():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, -1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3, 4, 5], [1, 3, 2, 4, 5]) == 0.9
    assert rank_correlation([1, 2, 3], [5, 5, 5]) is None
    assert rank_correlation([1, 2], [1, 2]) is None


def test_statements_say_when_the_curve_is_its_null():
    lines = statements(made_up([1, 2, 3, 4], [1.5, 2, 3, 4], [5, 3, 2, 1]))
    assert "lowest at layer 0 (1.00 nats from 50 pairs)" in lines[0]
    assert "lowest at layer 0, 1.50 nats at layer 0; rank correlation of the two curves +1.00" in lines[1]
    assert "not distinguishable" in lines[2]
    assert "nothing about what is to be forgotten" in lines[2]
    assert "lowest at layer 3, 5.00 nats at layer 0; rank correlation of the two curves -1.00" in lines[3]
    assert len(lines) == 4


def test_statements_say_when_only_the_choice_is_the_nulls():
    lines = statements(made_up([1, 2, 3, 4], [4, 3, 2, 1], [1, 4, 3, 2]))
    assert [line for line in lines if "same layer" in line] == ["The same layer is chosen without that pairing."]
    assert not any("not distinguishable" in line for line in lines)


def test_statements_leave_a_distinct_curve_alone():
    assert len(statements(made_up([1, 2, 3, 4], [4, 3, 2, 1], [4, 3, 2, 1]))) == 3
    assert len(statements(made_up([1.0], [2.0], [2.0]))) == 3


def test_statements_point_at_negative_values():
    plain = made_up([1, 2, 3, 4], [4, 3, 2, 1], [4, 3, 2, 1])
    negative = dataclasses.replace(plain, value=(-1.0, 2.0, 3.0, 4.0))
    assert statements(negative)[-1].startswith("No mutual information is negative")
    assert len(statements(negative)) == len(statements(plain)) + 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_forget_samples_like_the_retain_samples_are_called_indistinguishable(seed):
    layers = [activations(450, 40, i, decay) for i, decay in enumerate((0.1, 0.4, 0.6, 0.75))]
    found = curve(range(4), {"bio": [x[:150] for x in layers]}, [x[150:] for x in layers], CONFIG, seed)
    assert sum("not distinguishable" in line for line in statements(found)) == 2
