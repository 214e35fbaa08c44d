"""Runs killed with SIGKILL at drawn moments, and resumed, leave every byte that the uninterrupted run leaves."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import merged

pytestmark = pytest.mark.slow

SEED = 0
SHORT = {"training": {"steps": 9, "checkpoint_every": 2}}
UNSCORED = {"evaluation": {"enabled": False}}
WHOLE = {"selection": {"layers": "all"}, "training": {"optimizer": {"lr": 2e-3}}}
TRAINING = ["training.jsonl", "checkpoint", "training.jsonl", "patch/"]
END = "metrics|provenance|report|model_card|remove"
SCENARIOS = {
    "the default, with everything": (
        {
            "method": {"preset": "default", "stand_in": {"count": 2}},
            "selection": {"layers": "auto"},
            "training": {"optimizer": {"lr": 2e-3}},
            "attacks": {"relearn": {"known": 3, "epochs": 2, "points": 1}, "quantize": {"formats": ["int8"]}},
        },
        [
            "recipe.yaml", "corpus.json", "rename corpus.json", "scores/before.jsonl", "scores/before.own",
            "layer_selection", "training.jsonl", "training.jsonl", "checkpoint", *TRAINING, "patch/",
            "scores/after.jsonl", "scores/after.own", "scores/oracle", "attacks", "attacks", "attacks.json", END, END,
        ],
    ),
    "a sweep, activations on the disk, Sophia, micro-batches": (
        {
            **UNSCORED,
            "selection": {"layers": "auto", "sweep": {"steps": 4}},
            "training": {
                "cache": "always", "cache_gb": 0, "micro_batch_size": 3, "keep_checkpoints": 3,
                "optimizer": {"name": "sophia", "schedule": "linear", "lr": 1e-3},
            },
        },
        ["trial", "trial", "activations", "rename activations.json", *TRAINING, END],
    ),
    "mutual information, streamed, and RMU with adapters": (
        {
            **UNSCORED,
            "method": {"name": "rmu"},
            "selection": {
                "layers": "auto", "selector": "mutual_information", "streaming": "always", "streaming_gb": 0
            },
            "training": {"lora": {"rank": 4, "keep_adapter": True}, "optimizer": {"name": "sgd"}},
        },
        ["activations", "training.jsonl", "checkpoint", "adapter", "patch/"],
    ),
    "NPO": ({**UNSCORED, "method": {"name": "npo", "retain": "kl"}, **WHOLE}, TRAINING),
    "SCRUB": ({**UNSCORED, "method": {"name": "scrub", "max_steps": 4}, **WHOLE}, TRAINING),
    "SSD": ({**UNSCORED, "method": {"name": "ssd", "alpha": 1.5}, **WHOLE}, ["training.jsonl", "patch/", END]),
    "task vectors": (
        {**UNSCORED, "method": {"name": "task_vector", "finetune_steps": 10, "finetune_lr": 5e-3}, **WHOLE},
        ["training.jsonl", "rename training.jsonl", "patch/"],
    ),
}  # fmt: skip
STAGES = {
    "selection": "trial|layer_selection|activations",
    "training": "training.jsonl|checkpoint",
    "writing the patch": "patch",
    "scoring": "scores/|corpus.json",
    "attacks": "attacks",
    "the end": END,
}
CLOCKS = {"seconds", "started", "finished", "stage_seconds", "peak_memory_mb"}


def without_clocks(value):
    if isinstance(value, dict):
        return {key: without_clocks(below) for key, below in value.items() if key not in CLOCKS}
    return [without_clocks(below) for below in value] if isinstance(value, list) else value


def content(folder):
    """Relative name -> what is in it; times and memory left out, and the page that shows them."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, data = path.relative_to(folder).as_posix(), path.read_bytes()
        if path.suffix == ".jsonl":
            data = [without_clocks(json.loads(line)) for line in data.decode().split("\n") if line]
        elif path.suffix == ".json":
            data = without_clocks(json.loads(data))
        found[name] = "" if name == "report.html" else data
    return found


@pytest.fixture
def plan(tiny_recipe, tiny, oracle, tmp_path):
    """What ``kill_runs.py`` is to do."""
    scored = {"oracle": str(oracle), "suites": {"own": {"forget": str(tiny.forget), "retain": str(tiny.retain)}}}
    runs = {}
    for number, (name, (changes, kills)) in enumerate(SCENARIOS.items()):
        folder = tmp_path / str(number) / "run"
        folder.parent.mkdir()
        evaluation = {} if changes.get("evaluation") else {"evaluation": scored}
        recipe = tiny_recipe(merged(merged(SHORT, evaluation), changes), folder)
        file = tmp_path / f"{number}.yaml"
        file.write_text(yaml.safe_dump(recipe))
        runs[name] = {"recipe": str(file), "folder": str(folder), "whole": f"{folder}-whole", "kills": kills}
    return {"runs": runs, "seed": SEED}


@pytest.mark.skipif(sys.platform != "linux", reason="sessions are forks of a process with torch in it")
def test_killed_anywhere_and_resumed_every_byte_is_the_same(plan, tmp_path):
    pytest.importorskip("peft")
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    script = Path(__file__).with_name("kill_runs.py")
    done = subprocess.run([sys.executable, script, tmp_path / "plan.json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    hits = json.loads(done.stdout)
    moments = [what for found in hits.values() for what, _ in found]
    of_stage = {stage: sum(bool(re.search(pattern, what)) for what in moments) for stage, pattern in STAGES.items()}
    print(len(moments), "kills:", of_stage)
    for name, run in plan["runs"].items():
        whole, killed = content(Path(run["whole"])), content(Path(run["folder"]))
        assert killed.keys() == whole.keys(), name
        assert [file for file in whole if killed[file] != whole[file]] == [], name
    assert len(moments) >= 20
    assert all(of_stage.values())
