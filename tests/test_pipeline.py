"""Whole runs on the tiny model: what they leave, what they do to it, and that they can be stopped anywhere."""

import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import FORGET_ROWS, RETAIN_ROWS, write_lines
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from falcon_unlearn import pipeline
from falcon_unlearn.api import apply_patch, load_recipe, select_layers, unlearn
from falcon_unlearn.artifacts import read_jsonl
from falcon_unlearn.corpus.batching import Encoder
from falcon_unlearn.corpus.records import record_from_row
from falcon_unlearn.errors import UserError
from falcon_unlearn.evaluation.scoring import score_set
from falcon_unlearn.methods import METHODS
from falcon_unlearn.model.shards import tensor_spans
from falcon_unlearn.selection.selectors import SMALLEST

RUN_FILES = {
    "recipe.yaml",
    "corpus.json",
    "layer_selection.json",
    "training.jsonl",
    "patch/patch.safetensors",
    "patch/original.safetensors",
    "patch/patch.json",
    "scores/before.jsonl",
    "scores/after.jsonl",
    "metrics.json",
    "report.html",
    "model_card.md",
    "provenance.json",
}
FAST_SWEEP = {"layers": "auto", "sweep": {"steps": 4}}


def files(folder):
    """Relative name -> bytes of all files."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def outcome(folder):
    """Name -> bytes of what must not depend on how often a run was stopped."""
    names = ("layer_selection.json", "patch/patch.safetensors", "patch/original.safetensors", "metrics.json")
    return {name: (folder / name).read_bytes() for name in names} | {
        p.name: p.read_bytes() for p in (folder / "scores").iterdir()
    }


def steps_of(folder):
    """The training log without its times."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_jsonl(folder / "training.jsonl")]


@pytest.fixture(scope="module")
def finished(tiny_recipe, oracle, tmp_path_factory):
    """One whole run with a sweep and an oracle; tests only look at it."""
    recipe = tiny_recipe(
        {
            "selection": FAST_SWEEP,
            "training": {"steps": 24},
            "evaluation": {"oracle": str(oracle)},
        },
        tmp_path_factory.mktemp("finished") / "run",
    )
    return unlearn(recipe)


# what a run leaves


def test_a_run_leaves_exactly_the_run_folder_of_the_design(finished):
    assert set(files(finished.folder)) == RUN_FILES | {"scores/oracle.jsonl"}


def test_the_forget_set_is_forgotten_and_the_retain_set_is_not(finished):
    before, after = finished.metrics["before"], finished.metrics["after"]
    assert before.forget_accuracy == 1
    assert before.forget_probability > 0.9
    assert after.forget_accuracy <= 0.25
    assert after.forget_probability < 0.3 * before.forget_probability
    assert after.model_utility > 0.85 * before.model_utility
    assert after.utility_parts["retain_probability"] > 0.85 * before.utility_parts["retain_probability"]


def test_metrics_json_is_what_the_run_returns_and_holds_what_the_issue_lists(finished):
    stored = json.loads((finished.folder / "metrics.json").read_text())
    assert list(stored) == ["before", "after", "oracle"]
    wanted = {
        "forget_probability", "forget_accuracy", "forget_accuracy_heldout", "forget_rouge", "forget_quality",
        "model_utility",
    }  # fmt: skip
    for model, values in stored.items():
        assert wanted <= set(values)
        assert all(isinstance(values[key], float) for key in wanted), model
        assert values["forget_quality"] == finished.metrics[model].forget_quality
    assert stored["oracle"]["forget_quality"] == 1.0


def test_without_an_oracle_there_is_no_forget_quality(recipe_for):
    run = unlearn(recipe_for())
    stored = json.loads((run.folder / "metrics.json").read_text())
    assert stored["oracle"] is None
    assert stored["before"]["forget_quality"] is None
    assert stored["after"]["forget_quality"] is None
    assert set(files(run.folder)) == RUN_FILES


def test_every_sample_is_kept_with_its_generation(finished):
    for model in ("before", "after", "oracle"):
        rows = read_jsonl(finished.folder / "scores" / f"{model}.jsonl")
        assert [row["set"] for row in rows] == ["forget"] * len(FORGET_ROWS) + ["retain"] * len(RETAIN_ROWS)
        assert [row["answer"] for row in rows] == [row["answer"] for row in (*FORGET_ROWS, *RETAIN_ROWS)]
    for row, record in zip(read_jsonl(finished.folder / "scores" / "before.jsonl"), FORGET_ROWS, strict=False):
        assert record["value"] in row["generation"]


def test_the_log_has_one_line_a_step(finished):
    rows = read_jsonl(finished.folder / "training.jsonl")
    assert [row["step"] for row in rows] == list(range(24))
    for key in ("forget_loss", "retain_loss", "forget_grad_norm", "retain_grad_norm", "cosine", "conflicts"):
        assert all(isinstance(row[key], float) for row in rows[1:]), key


def test_the_selection_shows_every_candidate(finished):
    stored = json.loads((finished.folder / "layer_selection.json").read_text())
    scores = {entry["layer"]: entry["score"] for entry in stored["scores"]}
    assert set(scores) == {0, 1, 2}
    assert scores[stored["target_layer"]] == max(scores.values())
    assert stored["layers"] == [stored["target_layer"]] == list(finished.selection.layers)


def test_the_corpus_is_described(finished):
    facts = json.loads((finished.folder / "corpus.json").read_text())
    assert facts["report"]["records"] == {"forget": len(FORGET_ROWS), "retain": len(RETAIN_ROWS)}
    assert facts["lengths"]["forget"] == {"longer": 0, "limit": 64, "action": "error", "left_out": 0}
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in facts["hashes"].values())


def test_the_provenance_says_what_it_took(finished):
    facts = json.loads((finished.folder / "provenance.json").read_text())
    assert set(facts["stage_seconds"]) == {
        "layer_selection",
        "training",
        "score_before",
        "score_after",
        "score_oracle",
    }
    assert all(seconds > 0 for seconds in facts["stage_seconds"].values())
    assert facts["peak_memory_mb"] > 0
    assert facts["versions"]["torch"] == torch.__version__


def test_the_resolved_recipe_runs_again_to_the_same_result(recipe_for, tmp_path):
    first = unlearn(recipe_for())
    again = unlearn(load_recipe(first.folder / "recipe.yaml", [f"output={tmp_path / 'again'}"]))
    assert outcome(again.folder) == outcome(first.folder)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(recipe_for, tmp_path):
    selection = {"selection": FAST_SWEEP}
    first = unlearn(recipe_for(selection))
    second = unlearn(recipe_for({**selection, "output": str(tmp_path / "second")}))
    other = unlearn(recipe_for({**selection, "output": str(tmp_path / "other"), "seed": 1}))
    assert outcome(second.folder) == outcome(first.folder)
    assert steps_of(second.folder) == steps_of(first.folder)
    name = "patch/patch.safetensors"
    assert (other.folder / name).read_bytes() != (first.folder / name).read_bytes()


def test_only_the_selected_layer_is_in_the_patch(recipe_for):
    run = unlearn(recipe_for({"selection": {"layers": [0, 2]}, "training": {"modules": "down_proj"}}))
    assert set(run.patch.tensors) == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 2)}


# the patch is the model that was scored


def generations(folder, rows):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return score_set(
        model,
        Encoder(tokenizer),
        [record_from_row(row, "") for row in rows],
        "forget",
        batch_size=32,
        max_new_tokens=12,
        device="cpu",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_patched_checkpoint_scores_exactly_what_the_run_scored(recipe_for, model_copy, tmp_path, dtype):
    AutoModelForCausalLM.from_pretrained(model_copy).to(dtype).save_pretrained(model_copy)
    run = unlearn(recipe_for({"model": str(model_copy), "training": {"steps": 20}}))
    apply_patch(model_copy, run.folder / "patch", tmp_path / "patched")
    after = [row for row in read_jsonl(run.folder / "scores" / "after.jsonl") if row["set"] == "forget"]
    assert after != [row for row in read_jsonl(run.folder / "scores" / "before.jsonl") if row["set"] == "forget"]
    for score, row in zip(generations(tmp_path / "patched", FORGET_ROWS), after, strict=True):
        assert (score.generation, score.probability) == (row["generation"], row["probability"])
    assert {span.dtype for span in tensor_spans(tmp_path / "patched").values()} == {
        {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    }


def test_the_base_is_never_touched(tiny, finished):
    stored = load_file(finished.folder / "patch" / "original.safetensors")
    base = load_file(tiny.model / "model.safetensors")
    assert all(torch.equal(base[name], value) for name, value in stored.items())
    assert sorted(p.name for p in tiny.model.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


# every part of the recipe


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"name": "falcon", "preset": "paper"}},
        {"method": {"name": "falcon", "preset": "published_code"}},
        {"method": {"name": "falcon", "offset": "random", "negatives": "batch"}},
        {"method": {"name": "rmu"}},
        {"method": {"name": "rmu", "preset": "paper"}},
        {"training": {"optimizer": {"name": "sophia", "lr": 1e-3, "betas": [0.965, 0.99]}}},
        {"training": {"optimizer": {"name": "sgd", "lr": 1e-1}}},
        {"training": {"gradients": {"combination": "pcgrad"}}},
        {"training": {"modules": "all"}},
        {"training": {"modules": ["self_attn.o_proj", "mlp.up_proj"]}},
        {"dtype": "bfloat16"},
        {"corpus": {"template": "plain", "plain_template": "Q: {question} A: {answer}"}},
    ],
    ids=json.dumps,
)
def test_every_choice_runs_and_changes_the_weights(recipe_for, changes):
    run = unlearn(recipe_for({**changes, "selection": {"layers": [1, 2]}}))
    assert len(read_jsonl(run.folder / "training.jsonl")) == 12
    assert {name.split(".")[2] for name in run.patch.tensors} == {"1", "2"}
    assert run.metrics["after"].forget_probability != run.metrics["before"].forget_probability


def test_rmu_forgets_too(recipe_for):
    run = unlearn(recipe_for({"method": "rmu", "training": {"steps": 20}}))
    assert run.metrics["after"].forget_accuracy <= 0.25


@pytest.mark.parametrize("preset", ["paper", "published_code"])
def test_the_published_presets_choose_by_mutual_information(recipe_for, preset):
    recipe = recipe_for({"method": {"name": "falcon", "preset": preset}, "selection": {"layers": "auto"}})
    run = unlearn(recipe)
    curve = run.selection.mutual_information
    assert run.selection.selector == "mutual_information"
    assert curve.layers == (0, 1, 2)
    assert run.selection.target_layer == curve.argmin
    assert len(run.selection.layers) == min(3, curve.argmin + 1)


@pytest.mark.parametrize("selector", ["domain_information", "probe_error", "mmd", "gradient_conflict"])
def test_a_selector_without_training_chooses_by_its_scores(recipe_for, selector):
    recipe = recipe_for({"selection": {"layers": "auto", "selector": selector, "show_mutual_information": False}})
    chosen = select_layers(recipe)
    scores = {score.layer: score.score for score in chosen.scores}
    assert list(scores) == [0, 1, 2]
    best = (min if selector in SMALLEST else max)(scores, key=scores.get)
    assert (chosen.selector, chosen.layers, chosen.target_layer) == (selector, (best,), best)
    assert chosen.mutual_information is None


def test_the_middle_is_chosen_without_a_look(recipe_for):
    chosen = select_layers(
        recipe_for({"selection": {"layers": "auto", "selector": "middle", "show_mutual_information": False}})
    )
    assert (chosen.layers, chosen.scores) == ((1,), ())


def test_an_estimate_that_is_impossible_stops_the_run_where_it_decides(recipe_for, tmp_path):
    few = write_lines(tmp_path / "few.jsonl", FORGET_ROWS[:4])
    changes = {"corpus": {"forget": {"source": str(few)}}, "selection": {"layers": "auto"}}
    by_information = {**changes, "selection": {"layers": "auto", "selector": "mutual_information"}}
    with pytest.raises(UserError, match="layer 0"):
        unlearn(recipe_for({**by_information, "output": str(tmp_path / "information")}))
    selection = unlearn(recipe_for({**changes, "selection": FAST_SWEEP})).selection
    assert selection.mutual_information is None
    assert any("Mutual information is not shown" in note for note in selection.notes)


def test_several_domains_take_turns(recipe_for, tmp_path):
    halves = {
        name: {"source": str(write_lines(tmp_path / f"{name}.jsonl", FORGET_ROWS[part]))}
        for name, part in (("first", slice(0, 6)), ("second", slice(6, 12)))
    }
    recipe = recipe_for({"selection": FAST_SWEEP, "training": {"steps": 24}})
    recipe["corpus"]["forget"] = halves
    recipe["corpus"]["retain"] = {"a": str(write_lines(tmp_path / "a.jsonl", RETAIN_ROWS))}
    run = unlearn(recipe)
    facts = json.loads((run.folder / "corpus.json").read_text())
    assert facts["report"]["records"] == {"forget.first": 6, "forget.second": 6, "retain.a": len(RETAIN_ROWS)}
    assert run.metrics["after"].forget_accuracy <= 0.25
    assert len(read_jsonl(run.folder / "scores" / "after.jsonl")) == 40


def test_running_text(recipe_for, tmp_path):
    def text(rows):
        people = {row["entity"]: [] for row in rows}
        for row in rows:
            people[row["entity"]].append(row["answer"])
        return "\n\n".join(" ".join(answers) for answers in people.values())

    (tmp_path / "forget.txt").write_text(text(FORGET_ROWS))
    (tmp_path / "retain.txt").write_text(text(RETAIN_ROWS))
    recipe = recipe_for({"selection": FAST_SWEEP})
    recipe["corpus"] = {"forget": str(tmp_path / "forget.txt"), "retain": str(tmp_path / "retain.txt")}
    run = unlearn(recipe)
    rows = read_jsonl(run.folder / "scores" / "before.jsonl")
    assert [row["set"] for row in rows] == ["forget"] * 3 + ["retain"] * 7
    assert run.metrics["after"].forget_probability < run.metrics["before"].forget_probability
    assert run.metrics["after"].forget_accuracy_heldout is None


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
)


def test_a_tokenizer_with_a_chat_template_uses_it(recipe_for, model_copy, tmp_path):
    (model_copy / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    conversations = [
        {"messages": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]}
        for r in FORGET_ROWS
    ]
    recipe = recipe_for({"model": str(model_copy)})
    recipe["corpus"]["forget"] = str(write_lines(tmp_path / "chats.jsonl", conversations))
    run = unlearn(recipe)
    assert json.loads((run.folder / "corpus.json").read_text())["template"] == "the tokenizer's chat template"
    assert run.patch.tensors
    plain = unlearn(recipe | {"output": str(tmp_path / "plain"), "corpus": recipe["corpus"] | {"template": "plain"}})
    assert plain.metrics["before"].forget_probability > run.metrics["before"].forget_probability


def test_evaluation_sets_of_their_own(recipe_for, tmp_path):
    utility = write_lines(tmp_path / "utility.jsonl", RETAIN_ROWS[:5])
    evaluation = {
        "forget": str(write_lines(tmp_path / "ask.jsonl", FORGET_ROWS[:3])),
        "retain": {"source": str(utility), "limit": 2},
        "utility": {"facts": str(utility)},
        "max_records": 4,
    }
    run = unlearn(recipe_for({"evaluation": evaluation}))
    rows = read_jsonl(run.folder / "scores" / "before.jsonl")
    assert [row["set"] for row in rows] == ["forget"] * 3 + ["retain"] * 2 + ["facts"] * 4
    assert {"retain_probability", "facts_probability"} <= set(run.metrics["after"].utility_parts)


def test_a_utility_set_cannot_take_the_name_of_another(recipe_for, tiny, tmp_path):
    with pytest.raises(UserError, match="'retain' is already"):
        unlearn(recipe_for({"evaluation": {"utility": {"retain": str(tiny.retain)}}}))
    assert not (tmp_path / "run").exists()


def test_duplicates_overlap_and_long_records_are_counted(recipe_for, tmp_path):
    long = {"question": "What does Ada Marsh say?", "answer": "ha " * 80}
    forget = write_lines(tmp_path / "f.jsonl", [*FORGET_ROWS, FORGET_ROWS[0], long])
    retain = write_lines(tmp_path / "r.jsonl", [*RETAIN_ROWS, FORGET_ROWS[1]])
    corpus = {"forget": str(forget), "retain": str(retain), "on_overlap": "drop", "on_long": "drop"}
    recipe = recipe_for() | {"corpus": corpus}
    unlearn(recipe)
    facts = json.loads((tmp_path / "run" / "corpus.json").read_text())
    assert facts["report"]["duplicates"] == {"forget": 1, "retain": 0}
    assert facts["report"]["overlap"] == 1
    assert facts["report"]["records"]["retain"] == len(RETAIN_ROWS)
    assert facts["lengths"]["forget"] == {"longer": 1, "limit": 64, "action": "drop", "left_out": 1}


def test_a_diverging_run_stops_with_the_step_and_its_last_good_state(recipe_for, tmp_path, monkeypatch):
    forget_loss = METHODS["falcon"].build.forget_loss

    def spoilt(self, step, *rest, **more):
        found = forget_loss(self, step, *rest, **more)
        return found * float("nan") if step == 9 else found

    monkeypatch.setattr(METHODS["falcon"].build, "forget_loss", spoilt)
    with pytest.raises(UserError, match=r"step 9: forget_loss .* not finite; the last good state is in"):
        unlearn(recipe_for())
    monkeypatch.undo()
    assert len(read_jsonl(tmp_path / "run" / "training.jsonl")) == 9
    resumed = unlearn(recipe_for(), resume=True)
    whole = unlearn(recipe_for({"output": str(tmp_path / "whole")}))
    assert outcome(resumed.folder) == outcome(whole.folder)


# stop and go on


STAGE_FILES = (
    "scores/before.jsonl",
    "layer_selection.json",
    "training.jsonl",
    "patch/original.safetensors",
    "patch/patch.safetensors",
    "patch/patch.json",
    "scores/after.jsonl",
    "scores/oracle.jsonl",
    "metrics.json",
    "provenance.json",
    "report.html",
    "model_card.md",
)


def diagnostics_of(folder):
    return json.loads((folder / "provenance.json").read_text())["method_diagnostics"]


@pytest.mark.parametrize("kept", range(len(STAGE_FILES)))
def test_a_run_goes_on_from_any_stage_to_the_same_result(finished, tmp_path, kept):
    """As if it had been stopped after ``kept`` of its files."""
    folder = tmp_path / "run"
    for name, content in files(finished.folder).items():
        if name not in STAGE_FILES[kept:]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    recipe = load_recipe(finished.folder / "recipe.yaml", [f"output={folder}"])
    (folder / "recipe.yaml").write_text((folder / "recipe.yaml").read_text().replace(str(finished.folder), str(folder)))
    run = unlearn(recipe, resume=True)
    assert set(files(folder)) == RUN_FILES | {"scores/oracle.jsonl"}
    assert outcome(folder) == outcome(finished.folder)
    assert steps_of(folder) == steps_of(finished.folder)
    assert run.metrics == finished.metrics
    assert run.selection == finished.selection
    assert diagnostics_of(folder) == diagnostics_of(finished.folder) != {}


def test_resuming_a_finished_run_does_nothing(recipe_for, monkeypatch):
    run = unlearn(recipe_for())
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in run.folder.rglob("*")}
    monkeypatch.setattr(pipeline, "load_causal_lm", None)
    monkeypatch.setattr(pipeline, "load_first_layers", None)
    again = unlearn(recipe_for(), resume=True)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in run.folder.rglob("*")} == before
    assert (again.metrics, again.selection, again.patch) == (run.metrics, run.selection, run.patch)


def test_what_a_kill_leaves_is_removed_and_what_it_spoilt_is_done_again(recipe_for, finished, tmp_path):
    """Killed when all was there but the working files, and a second time while the page was written anew."""
    folder = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text()) | {"output": str(folder)}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    left = ("checkpoint.safetensors", "checkpoint.1.safetensors", "activations", "activations.json", ".patch.71.tmp/f")
    for name in left:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"left")
    recipe["report"] = {"samples": 1}
    run_recipe = functools.partial(unlearn, recipe, resume=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pipeline, "write_report", functools.partial(stopping, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_recipe()
    page = (folder / "report.html").read_text()
    run_recipe()
    assert (folder / "report.html").read_text() != page
    assert set(files(folder)) == set(files(finished.folder))
    assert outcome(folder) == outcome(finished.folder)


def stopping(error, *arguments, **more):
    raise error


def test_resuming_in_an_empty_or_missing_folder_is_a_plain_run(recipe_for, tmp_path):
    run = unlearn(recipe_for(), resume=True)
    assert set(files(tmp_path / "run")) == set(files(run.folder)) == RUN_FILES


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"training": {"steps": 13}}, "training.steps"),
        ({"method": {"temperature": 0.5}}, "method.temperature"),
        ({"selection": {"layers": [2]}}, "selection.layers"),
    ],
)
def test_a_changed_recipe_cannot_resume(finished, tmp_path, changes, named):
    folder = tmp_path / "run"
    for name in ("recipe.yaml", "corpus.json"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes((finished.folder / name).read_bytes())
    raw = yaml.safe_load((folder / "recipe.yaml").read_text()) | {"output": str(folder)}
    for section, value in changes.items():
        raw[section] = raw[section] | value if isinstance(value, dict) else value
    with pytest.raises(UserError, match=rf"another recipe \({named} differ\)"):
        unlearn(raw, resume=True)
    assert set(files(folder)) == {"recipe.yaml", "corpus.json"}


def test_changed_records_cannot_resume(recipe_for, tmp_path):
    forget = write_lines(tmp_path / "f.jsonl", FORGET_ROWS)
    recipe = recipe_for({"corpus": {"forget": {"source": str(forget)}}})
    run = unlearn(recipe)
    before = files(run.folder)
    write_lines(forget, FORGET_ROWS[:-1])
    with pytest.raises(UserError, match=r"corpus\.forget: not what the run in"):
        unlearn(recipe, resume=True)
    assert files(run.folder) == before


def test_what_only_the_report_shows_may_change(recipe_for):
    first = unlearn(recipe_for())
    before = outcome(first.folder)
    page = (first.folder / "report.html").read_text()
    unlearn(recipe_for({"report": {"samples": 1}}), resume=True)
    assert outcome(first.folder) == before
    assert (first.folder / "report.html").read_text() != page


def test_selection_first_and_the_run_from_there(recipe_for, tmp_path):
    recipe = recipe_for({"selection": FAST_SWEEP})
    selection = select_layers(recipe)
    assert set(files(tmp_path / "run")) == {"recipe.yaml", "corpus.json", "layer_selection.json", "provenance.json"}
    stored = (tmp_path / "run" / "layer_selection.json").read_bytes()
    run = unlearn(recipe, resume=True)
    assert run.selection == selection
    assert (run.folder / "layer_selection.json").read_bytes() == stored
    whole = unlearn(recipe | {"output": str(tmp_path / "whole")})
    assert outcome(run.folder) == outcome(whole.folder)


# Ctrl-C


def start(recipe_file, *options):
    return subprocess.Popen(
        [sys.executable, "-m", "falcon_unlearn", "run", str(recipe_file), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
    )


def wait_until(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def logged_steps(folder):
    log = folder / "training.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


LONG = {"training": {"steps": 300, "checkpoint_every": 20}}


@pytest.fixture(scope="module")
def whole(tiny_recipe, tmp_path_factory):
    """A run of the recipe LONG that nobody stopped."""
    return unlearn(tiny_recipe(LONG, tmp_path_factory.mktemp("whole") / "run"))


def test_ctrl_c_in_the_middle_of_training_and_on_to_the_same_bits(recipe_for, whole, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_for(LONG)))
    process = start(tmp_path / "recipe.yaml")
    # The moment is drawn anew whenever the tests run.
    stop_at = random.SystemRandom().randrange(1, 150)
    wait_until(lambda: logged_steps(tmp_path / "run") >= stop_at, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    (line,) = [text for text in err.splitlines() if text.startswith("error: ")]
    assert (process.returncode, out) == (2, ""), err
    assert "Traceback" not in err
    done = int(re.search(r"stopped after training step (\d+)", line)[1])
    assert done == logged_steps(tmp_path / "run") < 300
    assert line.endswith("go on with the same command and --resume")
    run = unlearn(recipe_for(LONG), resume=True)
    assert outcome(run.folder) == outcome(whole.folder)
    assert steps_of(run.folder) == steps_of(whole.folder)
    assert set(files(run.folder)) == RUN_FILES


def test_stopped_again_and_again_it_ends_in_the_same_bits(recipe_for, tmp_path, monkeypatch):
    """At the first step, right after a checkpoint, right before one, at the last step."""
    once = unlearn(recipe_for({"output": str(tmp_path / "once")}))
    add = pipeline._TrainingLog.add
    options = {}
    for stop_at in (0, 4, 7, 11):

        def interrupt(log, record, stop_at=stop_at):
            add(log, record)
            if record.step == stop_at:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(pipeline._TrainingLog, "add", interrupt)
        with pytest.raises(pipeline.Interrupted, match=f"stopped after training step {stop_at + 1};"):
            unlearn(recipe_for(), **options)
        options = {"resume": True}
    monkeypatch.undo()
    run = unlearn(recipe_for(), resume=True)
    assert outcome(run.folder) == outcome(once.folder)
    assert steps_of(run.folder) == steps_of(once.folder)


def test_ctrl_c_anywhere_leaves_a_run_that_can_go_on(recipe_for, tmp_path):
    """The signal comes after a time drawn at random: while reading, scoring, selecting, training, writing."""
    recipe = recipe_for({"selection": {"layers": "auto", "sweep": {"steps": 10}}, "training": {"steps": 30}})
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    whole = unlearn(recipe | {"output": str(tmp_path / "whole")})
    process = start(file)
    wait_until((tmp_path / "run").exists, process)
    time.sleep(random.SystemRandom().uniform(0, 2))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    # Finished, stopped, or hit by the signal while the interpreter was on its way out.
    assert process.returncode in {0, 2, -signal.SIGINT}, err
    if process.returncode == 2:
        assert len([line for line in err.splitlines() if line.startswith("error: stopped")]) == 1, err
    assert not list((tmp_path / "run").rglob("*.tmp"))
    run = unlearn(recipe, resume=True)
    assert outcome(run.folder) == outcome(whole.folder)


def test_a_run_that_was_killed_goes_on_too(recipe_for, whole, tmp_path):
    recipe = recipe_for(LONG)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    process = start(file)
    wait_until(lambda: logged_steps(tmp_path / "run") >= 45, process)
    process.kill()
    process.communicate()
    with (tmp_path / "run" / "training.jsonl").open("a") as handle:
        handle.write('{"step": 99, "forget_l')  # as a kill in the middle of a line leaves it
    run = unlearn(recipe, resume=True)
    assert outcome(run.folder) == outcome(whole.folder)
    assert steps_of(run.folder) == steps_of(whole.folder)


def test_one_forget_record_is_enough(recipe_for, tmp_path):
    forget = write_lines(tmp_path / "one.jsonl", FORGET_ROWS[:1])
    changes = {
        "corpus": {"forget": {"source": str(forget)}},
        "selection": {"layers": "auto", "sweep": {"steps": 2}},
    }
    run = unlearn(recipe_for(changes))
    assert run.selection.selector == "sweep"
    assert run.selection.mutual_information is None
    assert any("too few records" in note for note in run.selection.notes)


def test_other_scored_records_cannot_resume(recipe_for, tmp_path):
    scored = write_lines(tmp_path / "scored.jsonl", FORGET_ROWS)
    recipe = recipe_for({"evaluation": {"forget": {"source": str(scored)}}})
    run = unlearn(recipe)
    (run.folder / "scores" / "after.jsonl").unlink()
    write_lines(scored, FORGET_ROWS[:-1])
    with pytest.raises(UserError, match=r"evaluation\.forget: not what the run in"):
        unlearn(recipe, resume=True)


def test_another_model_in_the_same_folder_cannot_resume(recipe_for, model_copy, oracle):
    recipe = recipe_for({"model": str(model_copy)})
    run = unlearn(recipe)
    (run.folder / "scores" / "after.jsonl").unlink()
    (model_copy / "model.safetensors").write_bytes((oracle / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"^model: not what the run in"):
        unlearn(recipe, resume=True)


def test_weights_of_another_shape_are_refused_before_anything_is_written(recipe_for, model_copy):
    config = json.loads((model_copy / "config.json").read_text())
    config["intermediate_size"] += 8
    (model_copy / "config.json").write_text(json.dumps(config))
    recipe = recipe_for({"model": str(model_copy)})
    with pytest.raises(UserError, match=r"config\.json asks for shape .* they do not belong together"):
        unlearn(recipe)
    assert not Path(recipe["output"]).exists()


def test_a_broken_config_is_one_line(recipe_for, model_copy):
    config = json.loads((model_copy / "config.json").read_text())
    config["num_hidden_layers"] = "six"
    (model_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"architecture that cannot be loaded") as caught:
        unlearn(recipe_for({"model": str(model_copy)}))
    assert "\n" not in str(caught.value)


def test_the_rank_of_the_offset_vector_is_recorded(finished):
    found = json.loads((finished.folder / "provenance.json").read_text())["method_diagnostics"]["forget"]
    assert found["rank"] >= 1
    assert 0.9 <= found["variance_share"] < 1


# what does not fit


def lean(recipe_for, tmp_path, name, **changes):
    """Layers given and nothing scored: the whole model is never loaded."""
    return recipe_for({
        "output": str(tmp_path / name), "selection": {"layers": [1]}, "evaluation": {"enabled": False}, **changes
    })  # fmt: skip


def test_without_scoring_only_the_first_layers_are_needed(recipe_for, tiny, tmp_path):
    from safetensors.torch import save_file

    model = tmp_path / "sharded"
    shutil.copytree(tiny.model, model)
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    upper = {name for name in tensors if ".layers.2." in name}
    save_file({n: t for n, t in tensors.items() if n not in upper}, model / "a.safetensors", {"format": "pt"})
    shards = {name: "gone.safetensors" if name in upper else "a.safetensors" for name in tensors}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    run = unlearn(lean(recipe_for, tmp_path, "lean", model=str(model)))
    assert run.metrics == {"before": None, "after": None, "oracle": None}
    assert not (run.folder / "scores").exists()
    whole = unlearn(recipe_for({"output": str(tmp_path / "whole"), "selection": {"layers": [1]}}))
    got, expected = (load_file(r.folder / "patch" / "patch.safetensors") for r in (run, whole))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert "Nothing was scored" in (run.folder / "report.html").read_text()
    again = unlearn(lean(recipe_for, tmp_path, "lean", model=str(model)), resume=True)
    assert again.metrics == run.metrics
    with pytest.raises(UserError, match=r"names 'gone\.safetensors', which is not in"):
        unlearn(recipe_for({"output": str(tmp_path / "scored"), "model": str(model)}))


def test_a_cache_on_disk_gives_the_weights_of_one_in_memory(recipe_for, tmp_path):
    runs = [
        unlearn(lean(recipe_for, tmp_path, name, training={"steps": 12, "cache": "always", "cache_gb": budget}))
        for name, budget in (("memory", 1), ("disk", 0))
    ]
    patches = [(run.folder / "patch" / "patch.safetensors").read_bytes() for run in runs]
    assert patches[0] == patches[1]
    assert not (runs[1].folder / "activations").exists()


@pytest.mark.parametrize("budget", [1, 0])
@pytest.mark.parametrize("more", [{}, {"lora": {"rank": 2}}], ids=["matrices", "lora"])
def test_a_streamed_prefix_gives_the_weights_of_one_in_memory(recipe_for, tmp_path, budget, more, capsys):
    training = {"steps": 6, "cache": "always", "cache_gb": budget, **more}
    runs = [
        unlearn(lean(recipe_for, tmp_path, streaming, training={**training, "streaming": streaming}), quiet=False)
        for streaming in ("never", "always")
    ]
    assert capsys.readouterr().err.count("one in memory at a time") == 1
    got, expected = (load_file(run.folder / "patch" / "patch.safetensors") for run in runs)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert not list(runs[1].folder.glob("activations*"))


def test_a_prefix_larger_than_the_free_memory_is_streamed(recipe_for, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("falcon_unlearn.pipeline._room", lambda device: 1000)
    for name, cache, streamed in (("kept", "auto", True), ("not", "never", False)):
        unlearn(lean(recipe_for, tmp_path, name, training={"steps": 2, "cache": cache}), quiet=False)
        assert ("one in memory at a time" in capsys.readouterr().err) == streamed


def test_streaming_needs_the_cache_and_a_method_that_has_one(recipe_for, tmp_path):
    with pytest.raises(UserError, match=r"training: streaming is always, which keeps activations: set cache to auto"):
        unlearn(lean(recipe_for, tmp_path, "a", training={"streaming": "always", "cache": "never"}))
    whole = {"method": {"name": "npo", "preset": "default"}, "training": {"streaming": "always", "cache": "auto"}}
    with pytest.raises(UserError, match=r"training\.streaming is always, but npo \(default\) runs the whole model"):
        unlearn(lean(recipe_for, tmp_path, "b", **whole))


@pytest.mark.parametrize("damage", ["none", "truncated", "altered", "unsealed"])
def test_a_resumed_run_uses_a_cache_file_only_if_it_is_whole(recipe_for, tmp_path, monkeypatch, capsys, damage):
    recipe = lean(recipe_for, tmp_path, "run", training={"steps": 12, "cache": "always", "cache_gb": 0})
    expected = unlearn(lean(recipe_for, tmp_path, "whole", training={"steps": 12, "cache": "always", "cache_gb": 0}))
    forget_loss = METHODS["falcon"].build.forget_loss

    def stopping(self, step, *rest, **more):
        if step == 7:
            raise KeyboardInterrupt
        return forget_loss(self, step, *rest, **more)

    monkeypatch.setattr(METHODS["falcon"].build, "forget_loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        unlearn(recipe)
    monkeypatch.undo()
    cache = tmp_path / "run" / "activations"
    data = cache.read_bytes()
    if damage == "truncated":
        cache.write_bytes(data[:-1])
    elif damage == "altered":
        cache.write_bytes(data[:40] + bytes([data[40] ^ 255]) + data[41:])
    elif damage == "unsealed":
        (tmp_path / "run" / "activations.json").unlink()
    run = unlearn(recipe, resume=True, quiet=False)
    assert ("computed again" in capsys.readouterr().err) == (damage != "none")
    names = [folder / "patch" / "patch.safetensors" for folder in (run.folder, expected.folder)]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_the_cache_changes_nothing_but_rounding(recipe_for, tmp_path):
    found = [
        load_file(unlearn(lean(recipe_for, tmp_path, cache, training={"steps": 12, "cache": cache})).folder
                  / "patch" / "patch.safetensors")
        for cache in ("always", "never")
    ]  # fmt: skip
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=0.05, atol=5e-3)


@pytest.mark.parametrize("selector", ["mutual_information", "domain_information"])
def test_streamed_selection_chooses_as_the_resident_one(recipe_for, tmp_path, selector):
    chosen = [
        select_layers(recipe_for({
            "output": str(tmp_path / name),
            "selection": {"selector": selector, "streaming": streaming, "streaming_gb": 0},
            "evaluation": {"enabled": False},
        }))
        for name, streaming in (("resident", "never"), ("streamed", "always"))
    ]  # fmt: skip
    assert chosen[0] == chosen[1]
    assert not (tmp_path / "streamed" / "activations").exists()


def test_streaming_and_the_sweep_exclude_each_other(recipe_for):
    with pytest.raises(
        UserError, match=r"selection\.streaming is always, but the sweep trains and scores the whole model"
    ):
        unlearn(recipe_for({"selection": {"layers": "auto", "streaming": "always"}}))
