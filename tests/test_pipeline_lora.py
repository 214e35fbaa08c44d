import pytest
import torch
from test_pipeline import FAST_SWEEP
from transformers import AutoModelForCausalLM

from falcon_unlearn.api import apply_patch, unlearn
from falcon_unlearn.errors import UserError

peft = pytest.importorskip("peft")
LORA = {"rank": 4, "alpha": 8, "keep_adapter": True}
IDS = torch.arange(3, 20)[None]


@pytest.mark.parametrize(
    ("method", "selection"),
    [("falcon", FAST_SWEEP), ("rmu", {"layers": [0, 1]}), ("grad_diff", {"layers": "all"}), ("npo", {"layers": [1]})],
)
def test_a_run_with_adapters_leaves_a_merged_patch_and_the_adapters(tiny_recipe, tmp_path, method, selection):
    changes = {"method": {"name": method}, "selection": selection, "training": {"steps": 6, "lora": LORA}}
    recipe = tiny_recipe(changes, tmp_path / "run")
    run = unlearn(recipe)
    apply_patch(recipe["model"], run.folder / "patch", tmp_path / "patched")
    before, patched = (AutoModelForCausalLM.from_pretrained(m) for m in (recipe["model"], tmp_path / "patched"))
    with torch.no_grad():
        original = before(IDS).logits
        adapted = peft.PeftModel.from_pretrained(before, run.folder / "adapter")(IDS).logits
        merged = patched(IDS).logits
    assert not any("lora" in name for name in run.patch.tensors)
    torch.testing.assert_close(merged, adapted, rtol=1e-3, atol=1e-3)
    assert (merged - original).abs().max() > 10 * (merged - adapted).abs().max()


def test_weight_editors_are_refused(tiny_recipe, tmp_path):
    recipe = tiny_recipe(
        {"method": {"name": "ssd"}, "selection": {"layers": "all"}, "training": {"lora": LORA}}, tmp_path
    )
    with pytest.raises(UserError, match=r"training.lora: ssd edits the weights themselves"):
        unlearn(recipe)


def test_an_earlier_adapter_is_overwritten(tiny_recipe, tmp_path):
    recipe = tiny_recipe({"selection": {"layers": [1]}, "training": {"steps": 2, "lora": LORA}}, tmp_path / "run")
    first = (unlearn(recipe).folder / "adapter/adapter_model.safetensors").read_bytes()
    again = unlearn({**recipe, "seed": 5}, overwrite=True).folder / "adapter/adapter_model.safetensors"
    assert again.read_bytes() != first
