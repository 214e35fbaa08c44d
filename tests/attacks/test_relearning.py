import copy

import numpy as np
import pytest
import torch
from attacks.attacked_models import attacked, fingerprint, mean_loss

from falcon_unlearn.attacks.base import Deadline, OutOfTimeError
from falcon_unlearn.attacks.relearning import RelearnConfig
from falcon_unlearn.corpus.batching import batch_indices
from falcon_unlearn.errors import UserError


@pytest.fixture
def models(tiny, oracle):
    return attacked(tiny.model, oracle)


class AfterChecks(Deadline):
    """Passes at its ``n``-th check."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    @property
    def passed(self):
        self.left -= 1
        return self.left < 0


FULL = RelearnConfig(epochs=4)


def test_it_is_plain_finetuning(models):
    target = models.target()
    outcome = FULL.run(target)
    model = copy.deepcopy(models.unlearned).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 * 128 / 32, weight_decay=0)
    encoded = [models.encoder.encode(record) for record in target.known]
    for step in range(4):
        loss = mean_loss(model, [encoded[i] for i in batch_indices(4, 4, step, 0, "relearn")], models.encoder.pad_id)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.requires_grad_(False)
    expected = target.score(model)
    assert [s.generation for s in outcome.samples] == [s.generation for s in expected]
    np.testing.assert_allclose([s.probability for s in outcome.samples], [s.probability for s in expected], rtol=1e-3)
    assert outcome.steps == 4


def test_what_was_hidden_comes_back_and_what_was_never_there_does_not(models):
    found = {}
    for name in ("unlearned", "oracle"):
        target = models.target(name)
        points = FULL.run(target).points
        assert [p.setting["step"] for p in points] == [0, 1, 2, 3, 4]
        found[name] = points[-1].probability - points[0].probability
    assert found["unlearned"] > 0.3
    assert found["oracle"] < 0.1


def test_no_known_fact_is_scored(models):
    target = models.target()
    outcome = FULL.run(target)
    assert [s.prompt for s in outcome.samples] == [r.prompt for r in target.rest]
    assert not {s.answer for s in outcome.samples} & {r.answer for r in target.known}


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_the_model_is_left_as_it_was_and_the_outcome_is_the_same_again(models, weights):
    if weights == "lora":
        pytest.importorskip("peft")
    config = RelearnConfig(weights=(weights,), points=2)
    before, names = fingerprint(models.unlearned), [name for name, _ in models.unlearned.named_modules()]
    first = config.run(models.target())
    assert fingerprint(models.unlearned) == before
    assert [name for name, _ in models.unlearned.named_modules()] == names
    assert not any(p.requires_grad for p in models.unlearned.parameters())
    assert config.run(models.target()) == first
    assert config.run(models.target(seed=1)) != first
    assert first.points[-1].probability != first.points[0].probability


def test_the_area_is_that_of_the_curve(models):
    config = RelearnConfig(epochs=5, points=3)
    outcome = config.run(models.target())
    steps, heights = zip(*((p.setting["step"], p.probability) for p in outcome.points), strict=True)
    assert steps == (0, 2, 4, 5)
    area = sum((b - a) * (p + q) / 2 for a, b, p, q in zip(steps, steps[1:], heights, heights[1:], strict=False)) / 5
    found = outcome.numbers["area_probability"]
    assert found.value == pytest.approx(area)
    assert found.low < found.value < found.high


def test_a_grid_reports_every_curve_and_the_strongest_end(models):
    config = RelearnConfig(sources=("forget", "retain"), lrs_at_width_128=(1e-4, 1e-3), points=1, epochs=3)
    outcome = config.run(models.target())
    assert [tuple(p.setting.values()) for p in outcome.points] == [
        (source, "full", lr, step) for source in ("forget", "retain") for lr in (1e-4, 1e-3) for step in (0, 3)
    ]
    assert outcome.steps == 12
    ends = [p for p in outcome.points if p.setting["step"]]
    best = max(ends, key=lambda p: (p.accuracy, p.probability))
    assert outcome.artefacts["strongest"] == best.setting
    assert np.mean([s.accuracy for s in outcome.samples]) == best.accuracy


def test_neighbours_must_be_given(models):
    config = RelearnConfig(sources=("neighbours",))
    with pytest.raises(UserError, match="no neighbours records"):
        config.run(models.target())
    target = models.target(neighbours=models.data.retain[:4])
    assert config.run(target).points[-1].setting["source"] == "neighbours"


def test_time_runs_out(models):
    before = fingerprint(models.unlearned)
    with pytest.raises(OutOfTimeError):
        FULL.run(models.target(deadline=Deadline(0)))
    cut = FULL.run(models.target(deadline=AfterChecks(2)))
    assert not cut.complete
    assert [p.setting["step"] for p in cut.points] == [0, 1, 2]
    assert cut.points == FULL.run(models.target()).points[:3]
    assert fingerprint(models.unlearned) == before


def test_a_curve_that_diverges_ends(models):
    outcome = RelearnConfig(lrs_at_width_128=(1e30, 1e-3), epochs=4).run(models.target())
    assert any("not finite" in note for note in outcome.notes)
    assert [p.setting["step"] for p in outcome.points if p.setting["lr_at_width_128"] == 1e-3] == [0, 1, 2, 3, 4]


def test_half_precision_models_are_finetuned_in_single_precision(models):
    half = copy.deepcopy(models.unlearned).to(torch.bfloat16)
    before = fingerprint(half)
    outcome = FULL.run(models.target(model=half))
    assert outcome.points[-1].probability - outcome.points[0].probability > 0.2
    assert fingerprint(half) == before
