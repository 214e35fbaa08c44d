import pytest
import torch
from pydantic import ValidationError
from tiny_setup import build_data, build_decoder, losses_of

from falcon_unlearn.corpus.batching import Batch
from falcon_unlearn.engine.gradient_conflict import GradientConfig
from falcon_unlearn.engine.optimizers import OptimizerConfig
from falcon_unlearn.engine.trainer import TrainingConfig, train
from falcon_unlearn.methods import (
    METHODS,
    AdaptiveRmu,
    AdaptiveRmuConfig,
    CircuitBreakers,
    CircuitBreakersConfig,
    Setup,
)

HIDDEN = 32
SEED = 2
RIVALS = ("adaptive_rmu", "circuit_breakers")


@pytest.fixture(scope="module")
def decoder():
    return build_decoder(3, 1)


@pytest.fixture(scope="module")
def data():
    return build_data()


@pytest.fixture(scope="module", params=["answer", "all"])
def setup(decoder, data, request):
    return Setup(decoder, data.first_batches(4), request.param, SEED)


@pytest.fixture
def moved(decoder):
    generator = torch.Generator().manual_seed(1)
    return {
        name: (value.detach() + 0.05 * torch.randn(value.shape, generator=generator)).requires_grad_()
        for name, value in decoder.masters().items()
    }


@torch.no_grad()
def tokens(decoder, setup, batch, masters):
    """(updated, frozen) of each counted token, record by record without padding, in fp64."""
    pairs = []
    for part in batch.parts(1):
        prepared = decoder.prepare(part)
        updated = decoder.updated(prepared, masters)[0]
        for t, counts in enumerate(part.loss_mask(setup.loss_mask)[0].tolist()):
            if counts:
                pairs.append((updated[t].double(), prepared.frozen[0, t].double()))
    return pairs


def mean(values):
    values = list(values)
    return (sum(values) / len(values)).item()


def test_adaptive_rmu_is_the_formula(decoder, setup, data, moved):
    method = AdaptiveRmu(AdaptiveRmuConfig(scale=3.0, forget_weight=2.0, retain_weight=7.0), setup)
    for step in (0, 1):
        domain, forget, retain = data.at(step, 4, SEED)
        found = losses_of(method, step, domain, forget, retain, moved)
        u = method._directions[domain].double()
        expected = 2 * mean(((a - 3 * a0.norm() * u) ** 2).mean() for a, a0 in tokens(decoder, setup, forget, moved))
        kept = 7 * mean(((b - b0) ** 2).mean() for b, b0 in tokens(decoder, setup, retain, moved))
        assert found.forget.item() == pytest.approx(expected, rel=1e-5)
        assert found.retain.item() == pytest.approx(kept, rel=1e-4)
        assert kept > 0.01


def test_adaptive_rmus_target_follows_the_norm_of_each_token(decoder, setup, data, moved):
    """The loss falls to zero exactly where each token lies its own norm times the scale along the direction."""
    method = AdaptiveRmu(AdaptiveRmuConfig(scale=3.0), setup)
    domain, forget, _ = data.at(0, 4, SEED)
    frozen = decoder.prepare(forget).frozen
    norms = frozen[forget.loss_mask(setup.loss_mask)].norm(dim=-1)
    assert norms.std() > 0.05 * norms.mean()
    target = 3.0 * frozen.norm(dim=-1, keepdim=True) * method._directions[domain]

    class Arrived:
        hidden_size = HIDDEN
        prepare = staticmethod(decoder.prepare)

        def updated(self, prepared, masters):
            return target

    arrived = AdaptiveRmu(AdaptiveRmuConfig(scale=3.0), Setup(Arrived(), setup.forget_batches, setup.loss_mask, SEED))
    assert arrived.forget_loss(0, domain, forget, moved).item() == pytest.approx(0, abs=1e-10)
    assert method.forget_loss(0, domain, forget, moved).item() > 0.1


def test_adaptive_rmus_directions_are_unit_vectors_of_their_domain_and_seed(setup):
    method = AdaptiveRmu(AdaptiveRmuConfig(), setup)
    bio, cyber = (method._directions[domain] for domain in ("bio", "cyber"))
    assert bio.norm().item() == pytest.approx(1, rel=1e-6)
    assert (bio >= 0).all()
    assert not torch.allclose(bio, cyber, atol=1e-2)
    assert torch.equal(AdaptiveRmu(AdaptiveRmuConfig(), setup)._directions["bio"], bio)


@pytest.mark.parametrize(("schedule", "step", "forget_factor", "retain_factor"), [
    (None, 0, 1.0, 1.0), (None, 50, 1.0, 1.0), (20, 0, 1.0, 0.0), (20, 10, 0.75, 0.25), (20, 20, 0.5, 0.5),
    (20, 100, 0.0, 1.0),
])  # fmt: skip
def test_circuit_breakers_are_the_formula(decoder, setup, data, moved, schedule, step, forget_factor, retain_factor):
    config = CircuitBreakersConfig(schedule_steps=schedule, forget_weight=2.0, retain_weight=7.0)
    domain, forget, retain = data.at(1, 4, SEED)
    found = losses_of(CircuitBreakers(config, setup), step, domain, forget, retain, moved)
    expected = mean(
        torch.clamp(a @ a0 / a.norm() / a0.norm(), min=0) for a, a0 in tokens(decoder, setup, forget, moved)
    )
    kept = mean((b - b0).norm() for b, b0 in tokens(decoder, setup, retain, moved))
    assert found.forget.item() == pytest.approx(2 * forget_factor * expected, rel=1e-5)
    assert found.retain.item() == pytest.approx(7 * retain_factor * kept, rel=1e-4)
    assert expected > 0.1
    assert kept > 0.1


class Turned:
    """A decoder whose updated activations are the frozen ones, turned."""

    def __init__(self, decoder, turn):
        self.prepare, self._turn = decoder.prepare, turn

    def updated(self, prepared, masters):
        return self._turn(prepared.frozen)


def orthogonal(frozen):
    result = torch.zeros_like(frozen)
    result[..., 0::2], result[..., 1::2] = -frozen[..., 1::2], frozen[..., 0::2]
    return result


@pytest.mark.parametrize(
    ("turn", "expected"), [(orthogonal, 0), (torch.neg, 0), (torch.clone, 1), (lambda x: 3 * x, 1)]
)
def test_circuit_breakers_ask_for_activations_that_do_not_point_where_they_did(decoder, setup, data, turn, expected):
    domain, forget, _ = data.at(0, 4, SEED)
    turned = Setup(Turned(decoder, turn), setup.forget_batches, setup.loss_mask, SEED)
    loss = CircuitBreakers(CircuitBreakersConfig(), turned).forget_loss(0, domain, forget, {})
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_gradients_of_circuit_breakers_are_finite_at_the_original_weights(decoder, setup, data):
    masters = decoder.masters()
    found = losses_of(CircuitBreakers(CircuitBreakersConfig(), setup), 0, *data.at(0, 4, SEED), masters)
    assert found.forget.item() == pytest.approx(1, abs=1e-6)
    assert found.retain.item() == pytest.approx(0, abs=1e-5)
    for loss in found:
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, list(masters.values())))


def test_circuit_breakers_start_where_neither_loss_has_a_slope(decoder, setup, data):
    masters = decoder.masters()
    forget, retain = (
        torch.autograd.grad(loss, list(masters.values()))
        for loss in losses_of(CircuitBreakers(CircuitBreakersConfig(), setup), 0, *data.at(0, 4, SEED), masters)
    )
    assert max(g.abs().max().item() for g in forget) < 1e-6
    assert not any(g.any() for g in retain)


@pytest.mark.parametrize("name", RIVALS)
def test_the_loss_of_a_batch_is_the_weighted_mean_of_its_parts(name, setup, data, moved):
    method = METHODS[name].build(METHODS[name].config(), setup)
    domain, forget, retain = data.at(0, 7, SEED)
    whole = losses_of(method, 0, domain, forget, retain, moved)
    for size in (1, 3):
        for side, batch, loss in (("forget", forget, whole.forget), ("retain", retain, whole.retain)):
            parts = batch.parts(size)
            weights = [method.weight(side, part) for part in parts]
            pieces = [getattr(losses_of(method, 0, domain, part, part, moved), side).item() for part in parts]
            total = sum(w * piece for w, piece in zip(weights, pieces, strict=True)) / sum(weights)
            assert total == pytest.approx(loss.item(), rel=1e-5)


def padded(batch, by=6):
    def pad(value, fill):
        return torch.nn.functional.pad(value, (0, by), value=fill)

    masks = (pad(batch.attention_mask, 0), pad(batch.answer_mask, False), pad(batch.content_mask, False))
    return Batch(pad(batch.input_ids, 11), *masks, batch.records)


@pytest.mark.parametrize("name", RIVALS)
def test_padding_changes_nothing(name, setup, data, moved):
    method = METHODS[name].build(METHODS[name].config(), setup)
    domain, forget, retain = data.at(0, 4, SEED)
    plain = losses_of(method, 0, domain, forget, retain, moved)
    other = losses_of(method, 0, domain, padded(forget), padded(retain), moved)
    assert [loss.item() for loss in other] == pytest.approx([loss.item() for loss in plain], rel=1e-5)


# The retain norm of circuit breakers has a slope of one wherever it is not zero, their forget loss none at the start.
@pytest.mark.parametrize(("name", "retain_weight"), [("adaptive_rmu", 0.2), ("circuit_breakers", 0.05)])
def test_training_lowers_the_forget_loss(name, retain_weight, decoder, data):
    setup = Setup(decoder, data.first_batches(8), "answer", SEED)
    method, masters = METHODS[name].build(METHODS[name].config(retain_weight=retain_weight), setup), decoder.masters()
    domain, forget, _ = data.at(0, 8, SEED)
    before = method.forget_loss(0, domain, forget, masters).item()
    config = TrainingConfig(
        steps=60, batch_size=8, optimizer=OptimizerConfig(lr=1e-2), gradients=GradientConfig(combination="sum")
    )
    train(method, masters, data, config, seed=SEED, hidden_size=HIDDEN)
    assert method.forget_loss(0, domain, forget, masters).item() < 0.7 * before


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("adaptive_rmu", {"scale": 0}),
        ("adaptive_rmu", {"retain_weight": -1}),
        ("circuit_breakers", {"schedule_steps": 0}),
        ("circuit_breakers", {"forget_weight": 0}),
    ],
    ids=str,
)
def test_unusable_settings_are_refused(name, bad):
    with pytest.raises(ValidationError):
        METHODS[name].config.model_validate(bad)
