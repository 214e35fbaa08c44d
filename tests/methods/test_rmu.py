import pytest
import torch
from pydantic import ValidationError
from tiny_setup import build_data, build_decoder, losses_of, widened

from falcon_unlearn.engine.gradient_conflict import GradientConfig
from falcon_unlearn.engine.optimizers import OptimizerConfig
from falcon_unlearn.engine.trainer import TrainingConfig, train
from falcon_unlearn.methods import Rmu, RmuConfig, Setup

HIDDEN = 32
SEED = 2


@pytest.fixture(scope="module")
def decoder():
    return build_decoder(3, 1)


@pytest.fixture(scope="module")
def data():
    return build_data()


@pytest.fixture(scope="module")
def setup(decoder, data):
    return Setup(decoder, data.first_batches(4), "answer", SEED)


@torch.no_grad()
def activations(decoder, batch, masters):
    prepared = decoder.prepare(batch)
    return decoder.updated(prepared, masters)[batch.answer_mask], prepared.frozen[batch.answer_mask]


def test_losses_are_the_equations(decoder, setup, data):
    method = Rmu(RmuConfig(steering_coefficient=6.5, forget_weight=2.0, retain_weight=1200.0), setup)
    generator = torch.Generator().manual_seed(1)
    masters = {
        name: (value.detach() + 0.05 * torch.randn(value.shape, generator=generator)).requires_grad_()
        for name, value in decoder.masters().items()
    }
    domain, forget, retain = data.at(0, 4, SEED)
    losses = losses_of(method, 0, domain, forget, retain, masters)
    (anchor, _), (updated, frozen) = (activations(decoder, b, masters) for b in (forget, retain))
    target = method._targets[domain]
    assert losses.forget.item() == pytest.approx(2.0 * ((anchor - target) ** 2).mean().item(), rel=1e-5)
    assert losses.retain.item() == pytest.approx(1200.0 * ((updated - frozen) ** 2).mean().item(), rel=1e-5)
    assert losses.retain.item() > 0.01


def test_target_is_a_non_negative_direction_of_the_given_length(setup):
    method = Rmu(RmuConfig(steering_coefficient=6.5), setup)
    for target in method._targets.values():
        assert target.norm().item() == pytest.approx(6.5, rel=1e-5)
        assert (target >= 0).all()
    bio, cyber = method._targets.values()
    assert not torch.allclose(bio, cyber, atol=1e-2)
    again = Rmu(RmuConfig(steering_coefficient=6.5), setup)._targets
    assert torch.equal(again["bio"], bio)


def test_auto_coefficient_is_a_multiple_of_the_activations_mean_norm(decoder, setup):
    method = Rmu(RmuConfig(steering_scale=3.0), setup)
    for domain, batches in setup.forget_batches.items():
        norms = torch.cat([activations(decoder, b, decoder.masters())[1].norm(dim=-1) for b in batches])
        coefficient = method.diagnostics()[domain]["steering_coefficient"]
        assert coefficient == pytest.approx(3.0 * norms.mean().item(), rel=1e-5)
        assert method._targets[domain].norm().item() == pytest.approx(coefficient, rel=1e-5)


def test_retain_loss_and_gradient_are_exactly_zero_at_the_original_weights(decoder, setup, data):
    masters = decoder.masters()
    losses = losses_of(Rmu(RmuConfig(), setup), 0, *data.at(0, 4, SEED), masters)
    assert losses.retain.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(losses.retain, list(masters.values())))
    assert losses.forget.item() > 0


def test_padding_changes_nothing(decoder, setup, data):
    method, masters = Rmu(RmuConfig(), setup), {n: (v * 1.1).detach() for n, v in decoder.masters().items()}
    domain, forget, retain = data.at(1, 4, SEED)
    plain = losses_of(method, 1, domain, forget, retain, masters)
    padded = losses_of(method, 1, domain, widened(forget), widened(retain), masters)
    assert padded.forget.item() == pytest.approx(plain.forget.item(), rel=1e-6, abs=1e-6)
    assert padded.retain.item() == pytest.approx(plain.retain.item(), rel=1e-6, abs=1e-6)


def test_training_steers_forget_and_leaves_retain(decoder, data, setup):
    method, masters = Rmu(RmuConfig(retain_weight=2.0), setup), decoder.masters()
    batches = {domain: parts[0] for domain, parts in data.first_batches(8).items()}
    retain = data.at(0, 24, 0)[2]

    def distances():
        return {
            domain: (activations(decoder, batch, masters)[0] - method._targets[domain]).norm(dim=-1).mean().item()
            for domain, batch in batches.items()
        }

    before = distances()
    config = TrainingConfig(
        steps=40, batch_size=8, optimizer=OptimizerConfig(lr=1e-2), gradients=GradientConfig(combination="sum")
    )
    train(method, masters, data, config, seed=SEED, hidden_size=HIDDEN)
    after = distances()
    assert all(after[domain] < 0.7 * before[domain] for domain in before)
    updated, frozen = activations(decoder, retain, masters)
    assert torch.nn.functional.cosine_similarity(updated, frozen, dim=-1).mean() > 0.9


@pytest.mark.parametrize(
    "bad", [{"steering_scale": 0}, {"retain_weight": -1}, {"steering_coefficient": "big"}], ids=str
)
def test_unusable_settings_are_refused(bad):
    with pytest.raises(ValidationError):
        RmuConfig.model_validate(bad)
