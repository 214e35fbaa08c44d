"""Whole runs of methods on the whole model, through the Python API."""

import json
from functools import reduce

import pytest
import torch
from conftest import FORGET_ROWS, RETAIN_ROWS, merged, write_lines
from safetensors.torch import load_file

from falcon_unlearn.api import apply_patch, unlearn
from falcon_unlearn.artifacts import read_jsonl
from falcon_unlearn.errors import UserError
from falcon_unlearn.methods import Npo, Scrub

WHOLE = {"selection": {"layers": "all"}, "training": {"optimizer": {"lr": 2e-3}}}
UNSCORED = {"evaluation": {"enabled": False}}
SHORT = {**UNSCORED, "training": {"steps": 9}}
FEW = {**UNSCORED, "training": {"steps": 2}}
METHODS = {
    "npo": {"name": "npo", "retain": "kl"},
    "dpo": {"name": "dpo"},
    "scrub": {"name": "scrub", "max_steps": 4},
    "ssd": {"name": "ssd", "alpha": 1.5},
    "task_vector": {"name": "task_vector", "finetune_steps": 10, "finetune_lr": 5e-3, "scale": 2},
}
EDITS = ("ssd", "task_vector")


@pytest.fixture
def whole(recipe_for, tmp_path):
    """A recipe over all tensors, writing to ``tmp_path / name``."""

    def build(method, *changes, name="run"):
        recipe = {**WHOLE, "method": METHODS[method] if isinstance(method, str) else method}
        return recipe_for(reduce(merged, changes, {**recipe, "output": str(tmp_path / name)}))

    return build


def patch_of(run):
    return (run.folder / "patch" / "patch.safetensors").read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_a_run_forgets_and_leaves_a_patch_of_everything(whole, tiny, tmp_path, method):
    run = unlearn(whole(method, {"evaluation": {"max_new_tokens": 1}}))
    before, after = run.metrics["before"], run.metrics["after"]
    assert after.forget_probability < 0.8 * before.forget_probability
    assert after.forget_probability < after.utility_parts["retain_probability"]
    base = load_file(tiny.model / "model.safetensors")
    assert run.patch.tensors.keys() <= base.keys()
    changed = load_file(run.folder / "patch" / "patch.safetensors")
    assert any(not torch.equal(base[name], value) for name, value in changed.items())
    apply_patch(tiny.model, run.folder / "patch", tmp_path / "patched")
    patched = load_file(tmp_path / "patched" / "model.safetensors")
    assert all(torch.equal(patched[name], changed.get(name, value)) for name, value in base.items())
    assert len(read_jsonl(run.folder / "training.jsonl")) == (0 if method in EDITS else 12)
    found = json.loads((run.folder / "provenance.json").read_text())["method_diagnostics"]
    assert bool(found) == (method in EDITS)
    assert run.selection.layers == (0, 1, 2)


def one_loss_a_step(rows, max_steps):
    for row in rows:
        is_max = row["step"] % 2 == 0 and row["step"] < 2 * max_steps
        assert (row["forget_grad_norm"] > 0) == (is_max and row["step"] > 0)  # at 0 student and teacher are one
        assert (row["retain_grad_norm"] > 0) is not is_max


@pytest.mark.parametrize(("method", "build"), [("npo", Npo), ("scrub", Scrub)])
def test_an_interrupted_run_goes_on_to_the_same_bytes(whole, monkeypatch, method, build):
    expected = unlearn(whole(method, SHORT, name="whole"))
    retain_loss = build.retain_loss

    def stopping(self, step, *rest, **more):
        if step == 7:
            raise KeyboardInterrupt
        return retain_loss(self, step, *rest, **more)

    monkeypatch.setattr(build, "retain_loss", stopping)
    recipe = whole(method, SHORT)
    with pytest.raises(KeyboardInterrupt):
        unlearn(recipe)
    monkeypatch.undo()
    assert len(read_jsonl(expected.folder.parent / "run" / "training.jsonl")) == 7
    resumed = unlearn(recipe, resume=True)
    assert patch_of(resumed) == patch_of(expected)
    rows = read_jsonl(resumed.folder / "training.jsonl")
    assert len(rows) == 9
    if method == "scrub":
        one_loss_a_step(rows, max_steps=4)


def test_micro_batches_change_nothing_but_rounding(whole):
    found = [
        load_file(unlearn(whole(
            {"name": "llmu"}, FEW,
            {"training": {"micro_batch_size": size, "optimizer": {"name": "sgd", "lr": 1e-2}}},
            name=str(size))).folder / "patch" / "patch.safetensors")
        for size in (8, 3)
    ]  # fmt: skip
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["npo", "ssd"])
def test_only_the_named_layers_and_modules_are_trained(whole, tiny, method):
    scope = {"selection": {"layers": [0, 2]}, "training": {"modules": ["mlp.down_proj", "attention"]}}
    run = unlearn(whole(method, scope, FEW))
    names = {
        f"model.layers.{layer}.{module}.weight"
        for layer in (0, 2)
        for module in ("mlp.down_proj", *(f"self_attn.{x}_proj" for x in "qkvo"))
    }
    assert set(run.patch.tensors) == names
    assert run.selection.layers == (0, 2)
    base, changed = load_file(tiny.model / "model.safetensors"), load_file(run.folder / "patch" / "patch.safetensors")
    assert all(not torch.equal(base[name], changed[name]) for name in names)


def test_a_scale_or_a_selection_of_nothing_changes_nothing(whole, tiny):
    base = load_file(tiny.model / "model.safetensors")
    for name, method in (("scale", {"name": "task_vector", "scale": 0}), ("alpha", {"name": "ssd", "alpha": 1e30})):
        run = unlearn(whole(method, UNSCORED, name=name))
        stored = load_file(run.folder / "patch" / "patch.safetensors")
        assert all(base[key].numpy().tobytes() == value.numpy().tobytes() for key, value in stored.items())


def test_several_domains(whole, tmp_path):
    halves = {
        side: {name: {"source": str(write_lines(tmp_path / f"{side}-{name}.jsonl", rows[part]))}
               for name, part in (("one", slice(0, 6)), ("two", slice(6, None)))}
        for side, rows in (("forget", FORGET_ROWS), ("retain", RETAIN_ROWS))
    }  # fmt: skip
    run = unlearn(whole("scrub", {**UNSCORED, "training": {"steps": 8}}) | {"corpus": halves})
    rows = read_jsonl(run.folder / "training.jsonl")
    assert [row["retain_grad_norm"] == 0 for row in rows] == [True, True, False, False] * 2


def test_the_datas_own_preferred_answers_are_used(whole, tmp_path):
    rows = [{**row, "preferred_answer": f"{row['entity']} is nobody."} for row in FORGET_ROWS]
    given = {"corpus": {"forget": {"source": str(write_lines(tmp_path / "preferred.jsonl", rows))}}}
    runs = [unlearn(whole("dpo", FEW, changes, name=name)) for name, changes in (("a", {}), ("b", given))]
    assert patch_of(runs[0]) != patch_of(runs[1])


def one_line(caught):
    return "\n" not in str(caught.value)


def test_auto_is_all_for_a_method_on_the_whole_model(whole):
    runs = [unlearn(whole("npo", FEW, {"selection": {"layers": layers}}, name=layers)) for layers in ("auto", "all")]
    assert runs[0].selection.layers == runs[1].selection.layers
    assert patch_of(runs[0]) == patch_of(runs[1])


@pytest.mark.parametrize("method", ["dpo", "llmu"])
def test_texts_have_no_question_to_answer_otherwise(whole, tmp_path, method):
    texts = [{"text": row["answer"]} for row in FORGET_ROWS]
    corpus = {"forget": {"source": str(write_lines(tmp_path / "texts.jsonl", texts))}}
    with pytest.raises(UserError, match=r"texts\.jsonl:1: a plain text has no question") as caught:
        unlearn(whole({"name": method}, {"corpus": corpus}, UNSCORED))
    assert one_line(caught)


def test_a_finetuning_that_diverges_leaves_no_patch(whole, tmp_path):
    with pytest.raises(UserError, match=r"not finite; lower method\.finetune_lr") as caught:
        unlearn(whole({"name": "task_vector", "finetune_lr": 1e20}, UNSCORED))
    assert one_line(caught)
    assert not (tmp_path / "run" / "patch").exists()
