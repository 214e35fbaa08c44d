import math
from dataclasses import asdict

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from tiny_setup import build_data, build_decoder, losses_of, widened

from falcon_unlearn.engine.optimizers import OptimizerConfig
from falcon_unlearn.engine.trainer import TrainingConfig, TrainingData, train
from falcon_unlearn.errors import UserError
from falcon_unlearn.methods import METHODS, Falcon, FalconConfig, MethodConfig, RmuConfig, Setup
from falcon_unlearn.methods.base import generator_for, masked_activations, masked_records
from falcon_unlearn.objectives.offset_vectors import principal_subspace, published_code_vector, random_vector
from falcon_unlearn.objectives.subspace_stability import subspace_stability

HIDDEN = 32
TARGET = 2
SEED = 5


@pytest.fixture(scope="module")
def decoder():
    return build_decoder(4, TARGET)


@pytest.fixture(scope="module")
def data():
    return build_data()


@pytest.fixture(scope="module")
def setup(decoder, data):
    return Setup(decoder, data.first_batches(4), "answer", SEED)


def build(setup, **settings):
    return Falcon(FalconConfig(**{"offset_rank": 6, **settings}), setup)


@torch.no_grad()
def activations(decoder, batch, masters, mask="answer"):
    """(updated, frozen) at the tokens that count."""
    prepared = decoder.prepare(batch)
    on = batch.loss_mask(mask)
    return decoder.updated(prepared, masters)[on], prepared.frozen[on]


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=-1).mean().item()


def moved(decoder):
    """Masters away from the original weights, where both losses say something."""
    generator = torch.Generator().manual_seed(8)
    return {
        name: (value.detach() + 0.05 * torch.randn(value.shape, generator=generator)).requires_grad_()
        for name, value in decoder.masters().items()
    }


class TestLosses:
    @pytest.mark.parametrize("negatives", ["same_token", "batch"])
    @pytest.mark.parametrize("mask", ["answer", "all"])
    def test_are_the_equations(self, decoder, data, negatives, mask):
        setup = Setup(decoder, data.first_batches(4), mask, SEED)
        method = build(setup, negatives=negatives, temperature=0.5, forget_weight=3.0, retain_weight=7.0)
        masters = moved(decoder)
        domain, forget, retain = data.at(1, 4, SEED)
        losses = losses_of(method, 1, domain, forget, retain, masters)
        (anchor, frozen), kept = (activations(decoder, b, masters, mask) for b in (forget, retain))
        positive, total = method.offset_vector(1, domain), 0.0
        for i in range(len(anchor)):
            top = math.exp(cosine(anchor[i], positive) / 0.5)
            others = [frozen[i]] if negatives == "same_token" else frozen
            total -= math.log(top / (top + sum(math.exp(cosine(anchor[i], n) / 0.5) for n in others)))
        assert losses.forget.item() == pytest.approx(3.0 * total / len(anchor), rel=1e-4)
        assert losses.retain.item() == pytest.approx(7.0 * (1 - cosine(*kept)), rel=1e-4)
        assert losses.retain.item() > 0.01

    def test_retain_has_no_gradient_at_the_original_weights(self, decoder, setup, data):
        masters = decoder.masters()
        domain, forget, retain = data.at(0, 4, SEED)
        losses = losses_of(build(setup), 0, domain, forget, retain, masters)
        assert losses.retain.item() == pytest.approx(0, abs=1e-6)
        norms = [
            math.sqrt(sum(g.square().sum().item() for g in torch.autograd.grad(loss, list(masters.values()))))
            for loss in (losses.retain, losses.forget)
        ]
        assert norms[0] < 1e-4 * norms[1]

    @pytest.mark.parametrize("mask", ["answer", "all"])
    @pytest.mark.parametrize("negatives", ["same_token", "batch"])
    def test_do_not_change_with_padding(self, decoder, data, mask, negatives):
        setup = Setup(decoder, data.first_batches(4), mask, SEED)
        method, masters = build(setup, negatives=negatives), moved(decoder)
        domain, forget, retain = data.at(0, 4, SEED)
        plain = losses_of(method, 0, domain, forget, retain, masters)
        padded = losses_of(method, 0, domain, widened(forget), widened(retain), masters)
        assert padded.forget.item() == pytest.approx(plain.forget.item(), abs=1e-6)
        assert padded.retain.item() == pytest.approx(plain.retain.item(), abs=1e-6)

    def test_loss_mask_matters(self, decoder, data):
        masters = moved(decoder)
        domain, forget, _ = data.at(0, 4, SEED)
        losses = [
            build(Setup(decoder, data.first_batches(4), mask, SEED), offset="random")
            .forget_loss(0, domain, forget, masters)
            .item()
            for mask in ("answer", "all")
        ]
        assert abs(losses[0] - losses[1]) > 1e-4


class TestOffsetVector:
    @pytest.mark.parametrize("offset", ["paper", "random", "published_code"])
    def test_is_a_unit_vector_of_its_domain(self, setup, offset):
        method = build(setup, offset=offset)
        vectors = [method.offset_vector(0, domain) for domain in ("bio", "cyber")]
        assert all(v.norm().item() == pytest.approx(1, abs=1e-5) for v in vectors)
        assert abs(cosine(*vectors)) < 0.9
        assert torch.equal(build(setup, offset=offset).offset_vector(0, "bio"), vectors[0])

    @pytest.mark.parametrize("offset", ["paper", "random", "published_code"])
    def test_refresh_run_keeps_one_and_step_draws_anew(self, setup, offset):
        run, step = (build(setup, offset=offset, offset_refresh=refresh) for refresh in ("run", "step"))
        assert torch.equal(run.offset_vector(0, "bio"), run.offset_vector(9, "bio"))
        drawn = [step.offset_vector(n, "bio") for n in (0, 9)]
        assert not torch.allclose(*drawn, atol=1e-3)
        # Any step can be replayed on its own, which is what makes a resumed run identical.
        assert torch.equal(build(setup, offset=offset, offset_refresh="step").offset_vector(9, "bio"), drawn[1])

    def test_depends_on_the_seed(self, setup, decoder, data):
        other = Setup(decoder, data.first_batches(4), "answer", SEED + 1)
        assert not torch.allclose(build(setup).offset_vector(0, "bio"), build(other).offset_vector(0, "bio"), atol=1e-3)

    @pytest.mark.parametrize("mask", ["answer", "all"])
    def test_paper_leaves_the_principal_directions_of_its_own_domain(self, decoder, data, mask):
        setup = Setup(decoder, data.first_batches(4), mask, SEED)
        method = build(setup)
        for domain, batches in setup.forget_batches.items():
            rows = torch.cat([activations(decoder, b, decoder.masters(), mask)[1] for b in batches])
            principal = torch.linalg.svd(rows.double(), full_matrices=False).Vh[:6].float()
            assert (principal @ method.offset_vector(0, domain)).norm() < 1e-4

    def test_random_and_published_code_are_the_objectives(self, setup, decoder):
        expected = random_vector(HIDDEN, generator_for(SEED, "offset", "bio", "run"))
        assert torch.equal(build(setup, offset="random").offset_vector(3, "bio"), expected)
        got = build(setup, offset="published_code", offset_refresh="step").offset_vector(3, "bio")
        candidates = [
            published_code_vector(
                activations(decoder, batch, decoder.masters())[1], generator_for(SEED, "offset", "bio", 3)
            )
            for batch in setup.forget_batches["bio"]
        ]
        assert sum(torch.equal(got, candidate) for candidate in candidates) == 1

    def test_diagnostics_name_rank_and_share(self, setup):
        found = build(setup, offset_rank=None, offset_variance=0.8).diagnostics()
        assert set(found) == {"bio", "cyber"}
        for part in found.values():
            assert 1 <= part["rank"] < HIDDEN
            assert 0.8 <= part["variance_share"] < 1
        assert build(setup, offset="random").diagnostics() == {}

    def test_the_stability_of_the_subspace_is_that_of_its_records(self, setup):
        for domain, part in build(setup, offset_bootstrap=7).diagnostics().items():
            rows = masked_activations(setup, domain, 10_000)
            records = [i for i, item in enumerate(b for s in setup.forget_batches[domain] for b in s.records)
                       for _ in item.ids[item.answer_start :]]  # fmt: skip
            assert masked_records(setup, domain, 10_000).tolist() == records
            found = subspace_stability(
                rows, torch.tensor(records), principal_subspace(rows, rank=6, variance=0.5), 7,
                generator_for(SEED, "offset bootstrap", domain),
            )  # fmt: skip
            assert part["stability"] == asdict(found)
            assert (found.records, found.resamples, found.shared_at_random) == (8, 7, 6 / HIDDEN)
        assert masked_records(setup, "bio", 10).tolist() == masked_records(setup, "bio", 10_000).tolist()[:10]

    def test_the_stability_changes_nothing_else(self, setup, decoder, data):
        with_it, without = build(setup), build(setup, offset_bootstrap=0)
        assert not any("stability" in part for part in without.diagnostics().values())
        losses = []
        for method in (with_it, without):
            masters = decoder.masters()
            torch.manual_seed(3)
            config = TrainingConfig(steps=3, batch_size=4, optimizer=OptimizerConfig(lr=1e-3))
            train(method, masters, data, config, seed=SEED, hidden_size=HIDDEN)
            losses.append([value.detach().clone() for value in masters.values()])
        assert all(torch.equal(one, other) for one, other in zip(*losses, strict=True))

    def test_a_rank_of_the_full_width_is_refused(self, setup):
        with pytest.raises(UserError, match=f"{HIDDEN} directions span all {HIDDEN}"):
            build(setup, offset_rank=HIDDEN)

    def test_at_most_so_many_tokens_are_factorised(self, setup, decoder):
        rows = masked_activations(setup, "bio", 10)
        assert rows.shape == (10, HIDDEN)
        everything = masked_activations(setup, "bio", 10_000)
        assert len(everything) == sum(int(b.answer_mask.sum()) for b in setup.forget_batches["bio"])
        assert torch.equal(everything[:10], rows)
        assert build(setup, offset_rank=20, offset_tokens=10).diagnostics()["bio"]["rank"] == 10


@pytest.mark.parametrize("settings", [{}, {"offset": "random"}, {"negatives": "batch"}], ids=str)
def test_training_turns_forget_to_the_offset_and_leaves_retain(decoder, data, setup, settings):
    method, masters = build(setup, **settings), decoder.masters()
    batches = {d: TrainingData({d: data.forget[d]}, data.retain, 0, data.device).at(0, 8, 0)[1] for d in data.forget}
    retain = data.at(0, 24, 0)[2]

    def state():
        towards = {
            domain: cosine(activations(decoder, batch, masters)[0], method.offset_vector(0, domain))
            for domain, batch in batches.items()
        }
        return towards, cosine(*activations(decoder, retain, masters))

    before, kept_before = state()
    log = []
    config = TrainingConfig(steps=40, batch_size=8, optimizer=OptimizerConfig(lr=1e-2))
    train(method, masters, data, config, seed=SEED, hidden_size=HIDDEN, on_step=log.append)
    after, kept = state()
    assert kept_before == pytest.approx(1, abs=1e-5)
    assert all(after[domain] > before[domain] + 0.3 for domain in before)
    assert kept > 0.9
    assert log[-1].forget_loss < log[0].forget_loss
    # Each domain goes its own way.
    for domain, batch in batches.items():
        (other,) = set(batches) - {domain}
        anchor = activations(decoder, batch, masters)[0]
        assert cosine(anchor, method.offset_vector(0, domain)) > cosine(anchor, method.offset_vector(0, other)) + 0.2


def test_weights_scale_the_losses(decoder, setup, data):
    masters = moved(decoder)
    domain, forget, retain = data.at(0, 4, SEED)
    plain = losses_of(build(setup, retain_weight=1.0), 0, domain, forget, retain, masters)
    weighted = losses_of(build(setup, forget_weight=2.5, retain_weight=0.0), 0, domain, forget, retain, masters)
    assert weighted.forget.item() == pytest.approx(2.5 * plain.forget.item())
    assert weighted.retain.item() == 0


class TestTable:
    def test_recipes_choose_by_name(self):
        adapter = TypeAdapter(MethodConfig)
        assert isinstance(adapter.validate_python({"name": "falcon", "temperature": "0.3"}), FalconConfig)
        assert isinstance(adapter.validate_python({"name": "rmu"}), RmuConfig)
        with pytest.raises(ValidationError):
            adapter.validate_python({"name": "rmu", "temperature": 0.3})

    @pytest.mark.parametrize("name", [name for name, entry in METHODS.items() if entry.kind == "representation"])
    def test_every_line_builds_a_method_with_two_losses(self, name, decoder, setup, data):
        entry = METHODS[name]
        config = entry.config()
        assert config.name == name
        assert entry.summary
        losses = losses_of(entry.build(config, setup), 0, *data.at(0, 4, SEED), decoder.masters())
        assert losses.forget.ndim == losses.retain.ndim == 0
        assert losses.forget.requires_grad
        assert losses.retain.requires_grad

    @pytest.mark.parametrize(
        "bad",
        [{"temperature": 0}, {"offset_variance": 1.0}, {"offset_rank": 0}, {"retain_weight": -1}, {"offset": "tanh"}],
        ids=str,
    )
    def test_unusable_settings_are_refused(self, bad):
        with pytest.raises(ValidationError):
            FalconConfig.model_validate(bad)


def test_generators_depend_on_their_arguments_alone():
    def draw(*arguments):
        return torch.rand(4, generator=generator_for(*arguments)).tolist()

    variants = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", 1), (0, "a", "1"), (0, "a1")]
    assert len({tuple(draw(*v)) for v in variants}) == len(variants)
    torch.manual_seed(3)
    assert draw(0, "a") == draw(0, "a")
