"""The ridge is the textbook's, the probe reads what is there, and its control finds nothing."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from attacked_models import attacked, fingerprint
from hypothesis import given
from hypothesis import strategies as st
from model.tiny_models import ARCHITECTURES, random_records, shared_model

from falcon_unlearn.attacks.base import Deadline, OutOfTimeError
from falcon_unlearn.attacks.probing import ProbeConfig, last_prompt_states, ridge_predictions
from falcon_unlearn.errors import UserError


@pytest.fixture(scope="module")
def models(tiny, oracle):
    return attacked(tiny.model, oracle)


@given(
    seed=st.integers(0, 10**6),
    samples=st.integers(2, 12),
    features=st.integers(1, 9),
    strength=st.sampled_from([1e-2, 0.5, 10.0]),
)
def test_the_ridge_solves_the_normal_equations(seed, samples, features, strength):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(3, 2, (samples, features)), rng.normal(1, 1, (samples, 3))
    new = rng.normal(3, 2, (4, features))
    centre, spread = x.mean(0), x.std(0)
    z = (x - centre) / spread
    weights = np.linalg.solve(z.T @ z + strength * samples * np.eye(features), z.T @ (y - y.mean(0)))
    expected = (new - centre) / spread @ weights + y.mean(0)
    found = ridge_predictions(*map(torch.from_numpy, (x, y, new)), strength)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-8)


def test_a_feature_that_never_changes_does_no_harm():
    x = torch.cat([torch.arange(6.0)[:, None], torch.ones(6, 1)], 1)
    found = ridge_predictions(x, x[:, :1] * 2, torch.tensor([[2.5, 1.0]]), 1e-9)
    assert found.item() == pytest.approx(5.0, rel=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_are_those_of_each_prompt_alone(architecture):
    model = shared_model(architecture)
    before = fingerprint(model)
    prompts = random_records(4, (7, 3, 11, 5, 1))
    states, passes = last_prompt_states(model, prompts, 0, 2, Deadline())
    assert passes == 3
    assert fingerprint(model) == before
    for i, prompt in enumerate(prompts):
        outputs = model(input_ids=torch.tensor([prompt.ids]), output_hidden_states=True, use_cache=False)
        # The last of these is behind the final norm.
        for layer, hidden in enumerate(outputs.hidden_states[1:-1]):
            torch.testing.assert_close(states[layer, i], hidden[0, -1], rtol=1e-4, atol=1e-4)


def test_the_probe_reads_the_original_and_neither_oracle_nor_control(models):
    outcomes = {name: ProbeConfig(known=1).run(models.target(name, known=1)) for name in ("original", "oracle")}
    for outcome in outcomes.values():
        for p in outcome.points:
            assert abs(p.numbers["control_accuracy"] - 0.25) < 0.25
            assert p.numbers["selectivity"] == pytest.approx(
                p.numbers["choice_accuracy"] - p.numbers["control_accuracy"]
            )
    best = {name: max(p.numbers["choice_accuracy"] for p in outcome.points) for name, outcome in outcomes.items()}
    assert best["original"] >= 0.5
    assert best["oracle"] <= 0.3


def test_accuracy_is_zero_by_chance_and_the_headline_is_the_best_layer(models):
    target = models.target("original")
    before = fingerprint(target.model)
    outcome = ProbeConfig().run(target)
    assert fingerprint(target.model) == before
    for p in outcome.points:
        right = p.numbers["choice_accuracy"]
        assert p.accuracy == pytest.approx(right - (1 - right) / 3)
        assert math.isnan(p.probability)
    assert {s.accuracy for s in outcome.samples} <= {1.0, -1 / 3}
    assert np.mean([s.accuracy for s in outcome.samples]) == pytest.approx(max(p.accuracy for p in outcome.points))
    assert str(ProbeConfig().run(target)) == str(outcome)


def test_no_fact_about_a_forgotten_person_is_taught(models):
    target = models.target("original")
    spoiled = dataclasses.replace(target, retain=(*target.retain, *models.data.forget))
    assert "taught with 28 retain questions" in ProbeConfig().run(spoiled).notes[0]
    assert "taught with 9 retain questions" in ProbeConfig(retain_records=9).run(spoiled).notes[0]


def test_what_has_no_options_is_unscorable(models):
    target = models.target("original")
    bare = dataclasses.replace(target.rest[0], perturbed_answers=())
    outcome = ProbeConfig().run(dataclasses.replace(target, rest=(bare, *target.rest[1:])))
    assert [math.isnan(s.accuracy) for s in outcome.samples] == [True] + [False] * (len(target.rest) - 1)


def test_errors_are_one_line(models):
    target = models.target("original")
    bare = tuple(dataclasses.replace(record, perturbed_answers=()) for record in target.rest)
    with pytest.raises(UserError, match="perturbed_answer"):
        ProbeConfig().run(dataclasses.replace(target, rest=bare))
    with pytest.raises(UserError, match="7 retain questions are too few"):
        ProbeConfig().run(dataclasses.replace(target, retain=target.retain[:7]))
    with pytest.raises(OutOfTimeError):
        ProbeConfig().run(dataclasses.replace(target, deadline=Deadline(0)))
