import copy

import numpy as np
import pytest
import torch
from attacks.attacked_models import attacked, fingerprint
from hypothesis import given
from hypothesis import strategies as st
from model.tiny_models import build_model
from pydantic import ValidationError

from falcon_unlearn.attacks.quantization import (
    QuantizeConfig,
    int4_round_trip,
    int8_round_trip,
    nf4_levels,
    nf4_round_trip,
)
from falcon_unlearn.model.decoder import replaced

# Dettmers et al. 2023, appendix E
PUBLISHED_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@pytest.fixture
def models(tiny, oracle):
    return attacked(tiny.model, oracle)


def matrices(seed, rows, columns):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator) * 10


shapes = st.tuples(st.integers(0, 9), st.integers(1, 5), st.integers(1, 150))


def in_blocks(row, quantise):
    return np.concatenate([quantise(row[i : i + 64]) for i in range(0, len(row), 64)])


def naive_absmax(block, largest):
    scale = np.abs(block).max() / largest
    return np.array([round(float(v / scale)) * scale for v in block]) if scale else block


def naive_nf4(block):
    scale = np.abs(block).max()
    return np.array([min(PUBLISHED_NF4, key=lambda level: abs(level - v / scale)) * scale for v in block])


@given(shapes)
def test_round_trips_are_those_of_plain_loops(shape):
    matrix = matrices(*shape)
    rows = matrix.double().numpy()
    for ours, naive in (
        (int8_round_trip, lambda row: naive_absmax(row, 127)),
        (int4_round_trip, lambda row: in_blocks(row, lambda block: naive_absmax(block, 7))),
        (nf4_round_trip, lambda row: in_blocks(row, naive_nf4)),
    ):
        expected = np.stack([naive(row) for row in rows])
        # In fp32 a value on the border of two levels may take the other one.
        close = np.isclose(ours(matrix).numpy(), expected, rtol=1e-5, atol=1e-6)
        assert (~close).sum() <= 1


@given(shapes)
def test_rounding_moves_no_weight_by_more_than_half_a_step(shape):
    matrix = matrices(*shape)
    largest = matrix.abs().amax(1, keepdim=True)
    for round_trip, half_step in ((int8_round_trip, 1 / 254), (int4_round_trip, 1 / 14), (nf4_round_trip, 0.153)):
        result = round_trip(matrix)
        assert ((result - matrix).abs() <= largest * half_step * 1.0001).all()
        np.testing.assert_allclose(round_trip(result), result, rtol=1e-5, atol=1e-6)


def test_zeros_stay_zeros():
    for round_trip in (int8_round_trip, int4_round_trip, nf4_round_trip):
        assert torch.equal(round_trip(torch.zeros(3, 70)), torch.zeros(3, 70))


def test_the_levels_are_the_published_ones():
    np.testing.assert_allclose(nf4_levels(), PUBLISHED_NF4, atol=1e-6)


def test_a_quantised_original_keeps_its_knowledge_and_the_oracle_gains_none(models):
    config = QuantizeConfig(formats=("int8", "int4", "nf4"))
    for p in config.run(models.target("original")).points:
        assert p.accuracy == 1
        assert p.probability > 0.95
        assert p.numbers["utility"] > 0.95
    base = models.target("oracle").score()
    for p in config.run(models.target("oracle")).points:
        assert p.probability == pytest.approx(np.mean([s.probability for s in base]), abs=0.02)


def test_weights_stay_and_results_repeat(models):
    before = fingerprint(models.unlearned)
    config = QuantizeConfig()
    outcome = config.run(models.target())
    assert config.run(models.target()) == outcome
    assert fingerprint(models.unlearned) == before
    assert [p.setting for p in outcome.points] == [
        {"format": "int8", "backend": "simulated"},
        {"format": "nf4", "backend": "simulated"},
    ]
    assert outcome.notes == ("backend simulated; 21 matrices of the decoder layers, weights only",)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "qwen3_moe"])
def test_scales_are_per_output_in_every_architecture(models, architecture, monkeypatch):
    from transformers.pytorch_utils import Conv1D

    from falcon_unlearn.attacks import quantization

    model = build_model(architecture)
    kept = {}

    def keep(target, settings, changed, notes):
        kept.update(changed(0))

    monkeypatch.setattr(quantization, "score_changes", keep)
    QuantizeConfig(formats=("int8",)).run(models.target(model=model))
    assert kept
    for name, value in kept.items():
        weight = model.get_parameter(name)
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, Conv1D):
            expected = int8_round_trip(weight.T).T
        else:
            expected = (
                torch.stack([int8_round_trip(m) for m in weight]) if weight.ndim == 3 else int8_round_trip(weight)
            )
        assert torch.equal(value, expected)
        assert not torch.equal(value, weight)
    with replaced(model, kept):
        assert torch.isfinite(model(input_ids=torch.arange(4)[None]).logits).all()


def test_half_precision_stays_half_precision(models):
    model = copy.deepcopy(models.original).to(torch.bfloat16)
    outcome = QuantizeConfig().run(models.target(model=model))
    assert all(p.accuracy == 1 for p in outcome.points)


@pytest.mark.parametrize(
    ("backend", "formats"), [("bitsandbytes", ("int8", "nf4")), ("torchao", ("int8", "int4"))], ids=lambda v: v
)
def test_other_backends_agree_with_ours(models, backend, formats):
    pytest.importorskip(backend)
    from falcon_unlearn.attacks.quantization import _round_trips

    theirs, ours = _round_trips(backend), _round_trips("simulated")
    for columns in (64, 96, 160):
        matrix = matrices(0, 96, columns)
        for name in formats:
            error, expected = (float((f(matrix) - matrix).norm()) for f in (theirs[name], ours[name]))
            assert error == pytest.approx(expected, rel=0.2)
    config = QuantizeConfig(backend=backend, formats=formats)
    outcome = config.run(models.target("original"))
    assert all(p.accuracy == 1 for p in outcome.points)
    assert backend in outcome.notes[0]


def test_a_format_must_be_known_to_the_backend():
    with pytest.raises(ValidationError, match="bitsandbytes has no int4 here, only int8, nf4"):
        QuantizeConfig(backend="bitsandbytes", formats=("int4",))


@pytest.mark.parametrize("backend", ["bitsandbytes", "torchao"])
def test_an_absent_backend_is_named(models, backend, monkeypatch):
    import sys

    from falcon_unlearn.errors import UserError

    monkeypatch.setitem(sys.modules, backend, None)
    monkeypatch.setitem(sys.modules, f"{backend}.quantization", None)
    with pytest.raises(UserError, match=rf"pip install 'falcon-unlearn\[{backend}\]'"):
        QuantizeConfig(backend=backend, formats=("int8",)).run(models.target())
