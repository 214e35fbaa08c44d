import dataclasses

import pytest
import torch
from pydantic import ValidationError
from tiny_whole import FORGET, RETAIN, Plain, assert_same, moved, whole_setup

from falcon_unlearn.corpus.batching import collate
from falcon_unlearn.errors import UserError
from falcon_unlearn.methods import METHODS, SsdConfig, TaskVector, TaskVectorConfig
from falcon_unlearn.methods.ssd import Ssd

EDITORS = [name for name, entry in METHODS.items() if entry.kind == "edit"]
KEEP = [collate(RETAIN[:4], 0), collate(RETAIN[4:], 0)]
FORGET_RECORDS = [record for records in FORGET.values() for record in records]
FINETUNE = {"finetune_steps": 4, "finetune_lr": 1e-2, "finetune_batch_size": 3}


@pytest.fixture(scope="module")
def setup():
    return whole_setup()


def edited(editor, setup, masters=None):
    masters = setup.model.masters() if masters is None else masters
    editor.edit(KEEP, masters)
    return masters


def bits(masters):
    return {name: value.detach().numpy().tobytes() for name, value in masters.items()}


@pytest.mark.parametrize("name", EDITORS)
def test_every_line_builds_an_editor_that_edits_in_place(name, setup):
    entry = METHODS[name]
    config = entry.config()
    assert config.name == name
    assert entry.summary
    if name == "ssd":
        config = entry.config(alpha=1)
    masters = setup.model.masters()
    tensors, before = dict(masters), bits(masters)
    editor = entry.build(config, setup)
    editor.edit(KEEP, masters)
    assert all(masters[key] is value and value.is_leaf and value.grad is None for key, value in tensors.items())
    assert all(v.requires_grad and v.dtype == torch.float32 and torch.isfinite(v).all() for v in masters.values())
    assert bits(masters) != before
    assert all(isinstance(value, float) for value in editor.diagnostics().values())
    assert editor.diagnostics()


@pytest.mark.parametrize("name", EDITORS)
def test_an_editor_leaves_the_model_alone_and_repeats_to_the_bit(name, setup):
    before = bits(dict(setup.model.model.named_parameters()))
    config = METHODS[name].config(**({"alpha": 1} if name == "ssd" else {}))
    first, second = (bits(edited(METHODS[name].build(config, setup), setup)) for _ in range(2))
    assert first == second
    assert bits(dict(setup.model.model.named_parameters())) == before
    assert all(parameter.grad is None for parameter in setup.model.model.parameters())


# selective synaptic dampening


def naive_fisher(plain, records, loss_mask):
    """Mean over records of the squared gradient of each record's mean negative log-likelihood."""
    total = {name: torch.zeros_like(value) for name, value in plain.parameters.items()}
    for record in records:
        (values,) = plain.log_probabilities(collate([record], 0), loss_mask)
        for name, gradient in plain.gradients(-values.mean()).items():
            total[name] += gradient**2 / len(records)
    return total


@pytest.mark.parametrize("loss_mask", ["answer", "all"])
@pytest.mark.parametrize(("alpha", "dampening"), [(1.0, 1.0), (1.3, 0.4), (0.5, 2.0)])
def test_ssd_is_a_naive_loop_over_records(loss_mask, alpha, dampening):
    setup = whole_setup(loss_mask=loss_mask)
    start = moved(setup.model.masters())
    plain = Plain(setup.model.model, start)
    on_forget = naive_fisher(plain, FORGET_RECORDS, loss_mask)
    on_all = naive_fisher(plain, [*FORGET_RECORDS, *RETAIN], loss_mask)
    expected, selected = {}, 0
    for name, value in start.items():
        chosen = on_forget[name] > alpha * on_all[name]
        factor = (dampening * on_all[name] / on_forget[name]).clamp(max=1)
        expected[name] = torch.where(chosen, value.detach() * factor, value.detach())
        selected += chosen.sum().item()
    editor = Ssd(SsdConfig(alpha=alpha, dampening=dampening), setup)
    found = edited(editor, setup, {n: v.detach().clone().requires_grad_() for n, v in start.items()})
    assert_same(found, expected, rtol=1e-4, atol=1e-7)
    share = selected / sum(value.numel() for value in start.values())
    assert 0.05 < share < 1
    assert editor.diagnostics()["share_dampened"] == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("alpha", [1e30, (len(FORGET_RECORDS) + len(RETAIN)) / len(FORGET_RECORDS) + 1e-3])
def test_ssd_with_a_large_alpha_changes_nothing(alpha, setup):
    editor = Ssd(SsdConfig(alpha=alpha), setup)
    assert bits(edited(editor, setup)) == bits(setup.model.masters())
    assert editor.diagnostics() == {"share_dampened": 0}


def test_ssd_only_shrinks_and_more_so_with_a_smaller_lambda(setup):
    start = setup.model.masters()
    sizes = []
    for dampening in (2.0, 1.0, 0.3, 0.0):
        found = edited(Ssd(SsdConfig(alpha=0.8, dampening=dampening), setup), setup)
        assert all((found[name].abs() <= value.abs()).all() for name, value in start.items())
        assert all((found[name] * value >= 0).all() for name, value in start.items())
        sizes.append(sum(value.abs().sum().item() for value in found.values()))
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


def test_ssd_selects_less_with_a_larger_alpha(setup):
    shares = []
    for alpha in (0.5, 1.0, 1.5, 3.0):
        editor = Ssd(SsdConfig(alpha=alpha), setup)
        edited(editor, setup)
        shares.append(editor.diagnostics()["share_dampened"])
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[2] > 0
    assert shares[3] == 0


def test_ssd_of_identical_data_finds_nothing_that_matters_more_to_one_of_them(setup):
    editor = Ssd(SsdConfig(alpha=1.001), setup)
    masters = setup.model.masters()
    editor.edit([batch for batches in setup.forget_batches.values() for batch in batches], masters)
    assert bits(masters) == bits(setup.model.masters())


def test_ssds_batch_size_averages_gradients_before_squaring(setup):
    found = [edited(Ssd(SsdConfig(alpha=1.0, fisher_batch_size=size), setup), setup) for size in (1, 2)]
    assert bits(found[0]) != bits(found[1])


# task vectors


def task_vector(setup, **settings):
    return edited(TaskVector(TaskVectorConfig(**{**FINETUNE, **settings}), setup), setup)


def test_task_vector_with_scale_zero_changes_nothing_to_the_bit():
    setup = whole_setup()
    with torch.no_grad():
        setup.model.model.get_input_embeddings().weight[:, 0] = -0.0
    assert bits(task_vector(setup, scale=0)) == bits(setup.model.masters())


def finetuned(setup):
    """The other way of going the other way."""
    config = TaskVectorConfig.model_construct(**{**TaskVectorConfig(**FINETUNE).model_dump(), "scale": -1.0})
    return edited(TaskVector(config, setup), setup)


def test_task_vector_is_linear_in_its_scale_and_at_minus_one_the_finetuned_weights(setup):
    start, towards = setup.model.masters(), finetuned(setup)
    for scale in (0.3, 1.0, 2.5):
        expected = {n: v.detach() - scale * (towards[n].detach() - v.detach()) for n, v in start.items()}
        assert_same(task_vector(setup, scale=scale), expected, rtol=1e-5, atol=1e-6)


def test_task_vector_finetunes_as_plain_adamw_does(setup):
    """All forget records in every batch, so that the order of the data is none of the matter."""
    settings = {"finetune_steps": 3, "finetune_lr": 1e-2, "finetune_batch_size": len(FORGET_RECORDS)}
    found = task_vector(setup, **settings, scale=1)
    start = setup.model.masters()
    plain = Plain(setup.model.model, start)
    optimizer = torch.optim.AdamW(plain.parameters.values(), lr=1e-2, weight_decay=0)
    for _ in range(3):
        loss = -torch.cat(plain.log_probabilities(collate(FORGET_RECORDS, 0))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    way = {n: 2 * v.detach().double() - plain.parameters[n].detach() for n, v in start.items()}
    assert_same(found, way, rtol=1e-3, atol=2e-4)


def test_task_vector_learns_forget_data_one_way_and_unlearns_it_the_other(setup):
    def loss(masters):
        plain = Plain(setup.model.model, masters)
        return -torch.cat(plain.log_probabilities(collate(FORGET_RECORDS, 0))).mean().item()

    editor = TaskVector(TaskVectorConfig(**FINETUNE), setup)
    away = edited(editor, setup)
    assert loss(finetuned(setup)) < loss(setup.model.masters()) < loss(away)
    assert editor.diagnostics()["finetune_last_loss"] < editor.diagnostics()["finetune_first_loss"]


def test_task_vector_depends_on_the_seed_alone(setup):
    other = dataclasses.replace(setup, seed=setup.seed + 1)
    assert bits(task_vector(setup)) == bits(task_vector(setup)) != bits(task_vector(other))


def test_a_finetuning_that_diverges_is_refused(setup):
    with pytest.raises(UserError, match=r"finetuning step \d+: the loss is not finite; lower method.finetune_lr"):
        task_vector(setup, finetune_lr=1e20, finetune_steps=4)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("ssd", {"alpha": 0}),
        ("ssd", {"dampening": -1}),
        ("ssd", {"fisher_batch_size": 0}),
        ("task_vector", {"scale": -1}),
        ("task_vector", {"finetune_steps": 0}),
        ("task_vector", {"retain": "kl"}),
    ],
    ids=str,
)
def test_unusable_settings_are_refused(name, bad):
    with pytest.raises(ValidationError):
        METHODS[name].config.model_validate(bad)
