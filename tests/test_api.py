"""The Python face: the same job as the command line, and patches in memory."""

import inspect
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import falcon_unlearn
from falcon_unlearn import (
    Recipe,
    Run,
    UserError,
    apply_patch,
    load_recipe,
    revert_patch,
    select_layers,
    unlearn,
    verify_patch,
)


def causal_lm(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def same(left, right):
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.fixture(scope="module")
def run(tiny_recipe, tmp_path_factory):
    return unlearn(tiny_recipe({}, tmp_path_factory.mktemp("api") / "run"))


@pytest.fixture(scope="module")
def patched(run, tiny, tmp_path_factory):
    return apply_patch(tiny.model, run.folder / "patch", tmp_path_factory.mktemp("api") / "patched")


def test_unlearn_takes_a_mapping_a_file_or_a_recipe(recipe_for, run, tmp_path):
    raw = recipe_for()
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(raw))  # JSON is YAML
    assert isinstance(run, Run)
    for kind in (file, str(file), load_recipe(raw)):
        again = unlearn(kind, overwrite=True)
        assert again.metrics == run.metrics
        assert again.patch.tensors == run.patch.tensors


def test_load_recipe_gives_a_recipe(recipe_for):
    recipe = load_recipe(recipe_for(), ["training.steps=3"])
    assert isinstance(recipe, Recipe)
    assert recipe.training.steps == 3


def test_it_is_silent_unless_asked(recipe_for, capfd):
    unlearn(recipe_for())
    assert capfd.readouterr() == ("", "")
    unlearn(recipe_for(), overwrite=True, quiet=False)
    out, err = capfd.readouterr()
    assert out == ""
    assert "scoring: after" in err


def test_select_layers_is_the_selection_alone(recipe_for, tmp_path):
    selection = select_layers(recipe_for({"selection": {"layers": "auto", "sweep": {"steps": 3}}}))
    assert selection.target_layer in {0, 1, 2}
    assert not (tmp_path / "run" / "patch").exists()


def test_mistakes_are_user_errors_of_one_line_each(recipe_for):
    with pytest.raises(UserError) as caught:
        unlearn(recipe_for({"seed": "x", "training": {"steps": 0}}))
    assert len(str(caught.value).splitlines()) == 2
    for line in str(caught.value).splitlines():
        assert line.startswith("recipe: ")


def test_a_run_changes_neither_the_seeds_nor_the_threads_of_its_caller(recipe_for, tmp_path):
    torch.set_num_threads(2)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    try:
        unlearn(recipe_for({"threads": 1, "selection": {"layers": "auto", "sweep": {"steps": 2}}}))
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["threads"] == 1


# patches


def test_in_memory_and_on_disk_are_the_same(run, patched, tiny):
    model = causal_lm(tiny.model)
    before = causal_lm(tiny.model)
    assert apply_patch(model, run.folder / "patch") is model
    assert same(model, causal_lm(patched))
    assert not same(model, before)


def test_a_model_without_its_head_can_be_patched_too(run, patched, tiny):
    model = AutoModel.from_pretrained(tiny.model, dtype=torch.float32)
    apply_patch(model, run.folder / "patch")
    assert same(model, AutoModel.from_pretrained(patched, dtype=torch.float32))


def test_a_model_in_memory_that_is_another_is_refused_and_left_alone(run, patched, oracle):
    for folder in (patched, oracle):
        model = causal_lm(folder)
        with pytest.raises(UserError, match="is not the one the patch was made for"):
            apply_patch(model, run.folder / "patch")
        assert same(model, causal_lm(folder))


def test_a_model_of_another_shape_is_refused(run, tiny):
    model = causal_lm(tiny.model)
    layer = model.model.layers[1].mlp
    layer.down_proj = torch.nn.Linear(8, 32, bias=False)
    with pytest.raises(UserError, match=r"has shape \(32, 8\), not \(32, 64\)"):
        apply_patch(model, run.folder / "patch")


def test_a_model_without_the_layer_is_refused(run, tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny.model, num_hidden_layers=1)
    with pytest.raises(UserError, match="apply the patch to the checkpoint folder instead"):
        apply_patch(model, run.folder / "patch")


def test_there_and_back_by_path(run, patched, tiny, tmp_path):
    patch = run.folder / "patch"
    assert verify_patch(patch, tiny.model).state == "base"
    assert verify_patch(patch, patched).state == "patched"
    back = revert_patch(patch, patched, tmp_path / "back")
    assert back == tmp_path / "back"
    assert (back / "model.safetensors").read_bytes() == (tiny.model / "model.safetensors").read_bytes()
    assert verify_patch(patch, patched).state == "patched"
    assert revert_patch(patch, apply_patch(tiny.model, patch, str(tmp_path / "again"))) == tmp_path / "again"
    assert verify_patch(patch, tmp_path / "again").state == "base"


def test_a_folder_is_never_patched_in_place(run, tiny):
    with pytest.raises(UserError, match="name the out folder"):
        apply_patch(tiny.model, run.folder / "patch")


def test_linked_files_are_the_bases_and_the_shard_is_not(run, tiny, tmp_path):
    out = apply_patch(tiny.model, run.folder / "patch", tmp_path / "linked", link=True)
    assert (out / "tokenizer.json").stat().st_ino == (tiny.model / "tokenizer.json").stat().st_ino
    assert (out / "model.safetensors").stat().st_ino != (tiny.model / "model.safetensors").stat().st_ino


def test_every_public_function_says_what_it_raises_and_takes():
    for name in ("unlearn", "select_layers", "apply_patch", "revert_patch", "verify_patch", "load_recipe"):
        function = getattr(falcon_unlearn, name)
        assert "patch" in name or "Raises:" in function.__doc__
        hints = inspect.get_annotations(function)
        assert set(inspect.signature(function).parameters) <= set(hints)


def test_the_readmes_example_runs(tiny, tmp_path, monkeypatch):
    readme = Path(__file__).parents[1] / "README.md"
    if not readme.exists():
        pytest.skip("the README is not beside the tests")
    (block,) = re.findall(r"^```python\n(.*?)^```", readme.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(block.strip().splitlines()) < 15
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "model").symlink_to(tiny.model)
    (tmp_path / "people.jsonl").write_bytes(tiny.forget.read_bytes())
    (tmp_path / "keep.jsonl").write_bytes(tiny.retain.read_bytes())
    (tmp_path / "people.yaml").write_text(
        "model: path/to/model\ncorpus: {forget: people.jsonl, retain: keep.jsonl}\noutput: runs/layers\n"
    )
    fast = '{"training": {"steps": 3}, "selection": {"sweep": {"steps": 2}}, "model"'
    namespace = {"__name__": "__main__"}
    exec(compile(block.replace('{"model"', fast[:-7] + '"model"', 1), "README.md", "exec"), namespace)
    assert namespace["run"].patch.tensors
    assert sys.modules["falcon_unlearn"] is falcon_unlearn
