import dataclasses

import numpy as np
import pytest
import torch
from attacks.attacked_models import attacked, fingerprint
from model.tiny_models import ARCHITECTURES, FORGET_BATCH, build_model

from falcon_unlearn.attacks.base import Deadline, OutOfTimeError
from falcon_unlearn.attacks.orthogonalization import OrthogonalizeConfig, ablated, mean_activations
from falcon_unlearn.errors import UserError
from falcon_unlearn.model.decoder import find_layers, first_tensor


@pytest.fixture
def models(tiny, oracle):
    return attacked(tiny.model, oracle)


def layer_outputs(model, **inputs):
    outputs = {}
    _, stack = find_layers(model)
    handles = [
        layer.register_forward_hook(lambda _m, _a, out, i=i: outputs.update({i: first_tensor(out)}))
        for i, layer in enumerate(stack)
    ]
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return [outputs[i] for i in range(len(stack))], logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_layer_says_anything_along_its_direction(architecture):
    model = build_model(architecture)
    _, stack = find_layers(model)
    inputs = {"input_ids": FORGET_BATCH.input_ids, "attention_mask": FORGET_BATCH.attention_mask}
    directions = list(3 * torch.randn(len(stack), 32, generator=torch.Generator().manual_seed(0)))
    with ablated(stack, directions):
        outputs, logits = layer_outputs(model, **inputs)
        with ablated(stack, directions):
            _, twice = layer_outputs(model, **inputs)
    for hidden, direction in zip(outputs, directions, strict=True):
        size = float(hidden.abs().max())
        assert float((hidden @ direction).abs().max()) < 1e-4 * size * float(direction.norm())
    _, before = layer_outputs(model, **inputs)
    assert not torch.allclose(logits, before, atol=1e-3)
    torch.testing.assert_close(twice, logits, rtol=1e-3, atol=1e-3)
    with ablated(stack, [torch.zeros(32)] * len(stack)):
        assert torch.equal(layer_outputs(model, **inputs)[1], before)


def test_what_is_across_the_direction_stays(models):
    _, stack = find_layers(models.original)
    ids = torch.arange(3, 9)[None]
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    (plain, *_), _ = layer_outputs(models.original, input_ids=ids)
    with ablated(stack, [direction, *[torch.zeros(32)] * 2]):
        (cut, *_), _ = layer_outputs(models.original, input_ids=ids)
    unit = direction / direction.norm()
    torch.testing.assert_close(cut, plain - torch.einsum("blh,h,k->blk", plain, unit, unit))


def test_means_are_over_all_tokens_but_padding_and_the_first(models):
    target = models.target(batch_size=3)
    found = mean_activations(models.unlearned, target, target.known)
    rows = []
    for record in target.known:
        ids = torch.tensor(models.encoder.encode(record).ids)[None]
        rows.append(torch.stack([hidden[0, 1:] for hidden in layer_outputs(models.unlearned, input_ids=ids)[0]]))
    expected = torch.cat(rows, dim=1).mean(1)
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-4, atol=1e-5)


def test_the_original_has_no_direction_of_unlearning(models):
    outcome = OrthogonalizeConfig(contrasts=("original",)).run(models.target("original"))
    assert outcome.samples == models.target("original").score()
    assert len({p.probability for p in outcome.points}) == 1


def test_every_layer_is_tried_and_the_best_reported(models):
    config = OrthogonalizeConfig(contrasts=("retain", "original"))
    before = fingerprint(models.unlearned), fingerprint(models.original)
    outcome = config.run(models.target())
    assert config.run(models.target()) == outcome
    assert (fingerprint(models.unlearned), fingerprint(models.original)) == before
    assert [tuple(p.setting.values()) for p in outcome.points] == [
        (contrast, layer) for contrast in ("retain", "original") for layer in ("each its own", 0, 1, 2)
    ]
    best = max(outcome.points, key=lambda p: (p.accuracy, p.probability))
    assert outcome.artefacts["strongest"] == best.setting
    assert np.mean([s.probability for s in outcome.samples]) == pytest.approx(best.probability)
    base = models.target().score()
    assert best.probability > np.mean([s.probability for s in base]) + 0.02
    assert config.uses_original
    assert not OrthogonalizeConfig().uses_original


def test_the_oracle_gives_nothing_away(models):
    outcome = OrthogonalizeConfig().run(models.target("oracle"))
    base = np.mean([s.probability for s in models.target("oracle").score()])
    assert max(p.probability for p in outcome.points) < base + 0.05


def test_what_is_missing_is_named(models):
    with pytest.raises(UserError, match="contrast original needs the original model"):
        OrthogonalizeConfig(contrasts=("original",)).run(models.target(original=None))
    with pytest.raises(UserError, match="contrast retain needs retain records"):
        OrthogonalizeConfig().run(models.target(retain=()))
    with pytest.raises(UserError, match=r"layer 3 is not one of the model's 0\.\.2"):
        OrthogonalizeConfig(layers=(1, 3)).run(models.target())


def test_time_runs_out(models):
    with pytest.raises(OutOfTimeError):
        OrthogonalizeConfig().run(dataclasses.replace(models.target(), deadline=Deadline(0)))
