import math

import pytest
import torch
from model.tiny_models import LAYERS, build_model
from torch.nn import functional as F

from falcon_unlearn.corpus.batching import Encoded, collate
from falcon_unlearn.selection.gradients import gradient_relations, related


def records(seed, count=6):
    generator = torch.Generator().manual_seed(seed)
    return [
        Encoded(tuple(torch.randint(3, 67, (5 + i,), generator=generator).tolist()), 2 + i // 2) for i in range(count)
    ]


def batch(items):
    return collate(items, 0)


def naive_gradient(model, items, layer):
    """Of the mean over all answer tokens, one record at a time."""
    names = [n for n, _ in model.named_parameters() if f"layers.{layer}.mlp" in n]
    chosen = [model.get_parameter(n) for n in names]
    for parameter in chosen:
        parameter.requires_grad_()
    losses = []
    for item in items:
        logits = model(input_ids=torch.tensor([item.ids])).logits[0]
        losses += [
            -F.log_softmax(logits[i - 1], dim=-1)[item.ids[i]] for i in range(max(1, item.answer_start), len(item))
        ]
    found = torch.autograd.grad(torch.stack(losses).mean(), chosen)
    model.requires_grad_(False)
    return torch.cat([g.flatten() for g in found])


@pytest.fixture(scope="module")
def model():
    return build_model("llama")


class TestRelated:
    def test_known_angles(self):
        x, y = [torch.tensor([3.0, 0.0]), torch.tensor([[0.0]])], [torch.tensor([0.0, 0.0]), torch.tensor([[2.0]])]
        assert related(x, y).cosine == 0
        assert related(x, x).cosine == pytest.approx(1)
        assert related(x, [-2 * v for v in x]).cosine == pytest.approx(-1)
        assert related(x, y).forget_norm == 3
        assert related(x, y).selectivity == pytest.approx(math.log(3 / 2))

    def test_nothing_is_known_of_a_zero_gradient(self):
        found = related([torch.zeros(3)], [torch.ones(3)])
        assert math.isnan(found.cosine)
        assert math.isnan(found.selectivity)


class TestRelations:
    def test_is_the_naive_gradient_however_batches_are_cut(self, model):
        forget, retain = records(0), records(1)
        for sides in (
            ([batch(forget)], [batch(retain)]),
            ([batch(forget[:1]), batch(forget[1:])], [batch(retain[:4]), batch(retain[4:])]),
        ):
            for layer, found in zip((0, 3), gradient_relations(model, *sides, (0, 3)), strict=True):
                f, r = (naive_gradient(model, items, layer) for items in (forget, retain))
                assert found.cosine == pytest.approx(float(F.cosine_similarity(f, r, dim=0)), abs=1e-5)
                assert found.forget_norm == pytest.approx(float(f.norm()), rel=1e-4)
                assert found.retain_norm == pytest.approx(float(r.norm()), rel=1e-4)

    def test_the_same_records_on_both_sides_conflict_wholly(self, model):
        found = gradient_relations(model, [batch(records(0))], [batch(records(0))], range(LAYERS))
        assert [r.cosine for r in found] == pytest.approx([1.0] * LAYERS)
        assert [r.selectivity for r in found] == pytest.approx([0.0] * LAYERS, abs=1e-9)

    def test_leaves_the_model_as_it_was(self, model):
        before = {n: p.clone() for n, p in model.named_parameters()}
        gradient_relations(model, [batch(records(0))], [batch(records(1))], (1,))
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name])
            assert not parameter.requires_grad
            assert parameter.grad is None

    def test_works_where_layers_are_named_otherwise(self):
        (found,) = gradient_relations(build_model("gpt2"), [batch(records(0))], [batch(records(1))], (2,), "down_proj")
        assert -1 <= found.cosine <= 1
        assert found.forget_norm > 0
