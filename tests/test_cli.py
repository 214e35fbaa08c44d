"""The command line: what it prints where, what it refuses, and how it ends."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from conftest import FORGET_ROWS, RETAIN_ROWS, write_lines
from transformers import CONFIG_MAPPING

import falcon_unlearn
from falcon_unlearn import cli, embedded, pipeline
from falcon_unlearn.api import unlearn
from falcon_unlearn.artifacts import LayerScore, LayerSelection
from falcon_unlearn.methods import METHODS
from falcon_unlearn.report import html

NAMES = ("layer_selection.json", "patch/patch.safetensors", "metrics.json", "scores/before.jsonl", "scores/after.jsonl")


@pytest.fixture
def recipe_file(recipe_for, tmp_path):
    """Write a recipe with changes and return its path."""

    def write(changes=None):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe_for(changes), sort_keys=False))
        return path

    return write


@pytest.fixture(scope="module")
def finished(tiny_recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    return unlearn(tiny_recipe({}, folder)).folder


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def outcome(folder):
    return {name: (folder / name).read_bytes() for name in NAMES}


# bad input: one clear line a mistake, exit code 2, nothing written

LONG_ROW = {"question": "What does Ada Marsh say?", "answer": "ha " * 80}


def forget(text):
    """The forget file has this content."""

    def spoil(recipe, folder):
        path = folder / "bad.jsonl"
        path.write_text(text)
        recipe["corpus"]["forget"] = str(path)

    return spoil


def setting(**changes):
    def spoil(recipe, folder):
        for key, value in changes.items():
            *path, last = key.split("__")
            node = recipe
            for part in path:
                node = node.setdefault(part, {})
            node[last] = value

    return spoil


def model(change):
    """Spoil a copy of the model folder."""

    def spoil(recipe, folder):
        path = Path(shutil.copytree(recipe["model"], folder / "model"))
        change(path)
        recipe["model"] = str(path)

    return spoil


def another_config(architecture):
    def change(path):
        config = CONFIG_MAPPING[architecture]()
        config.save_pretrained(path)

    return model(change)


def edit_config(**values):
    def change(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | values))

    return model(change)


def remove(*names):
    return model(lambda path: [(path / name).unlink() for name in names])


def overlap(recipe, folder):
    recipe["corpus"]["retain"] = str(write_lines(folder / "retain.jsonl", [*RETAIN_ROWS, FORGET_ROWS[2]]))


def output_in_use(recipe, folder):
    (folder / "run").mkdir()
    (folder / "run" / "mine.txt").write_text("mine")


def output_is_a_file(recipe, folder):
    (folder / "run").write_text("mine")


def output_below_a_file(recipe, folder):
    (folder / "file").write_text("mine")
    recipe["output"] = str(folder / "file" / "run")


def truncate(path):
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


good_line = json.dumps(FORGET_ROWS[0])
BAD_INPUTS = {
    "unknown key": (setting(training__stebs=3), r"recipe\.yaml:\d+: training\.stebs is 3: unknown key .*'steps'"),
    "missing file": (setting(corpus__forget="./none.jsonl"), r"corpus\.forget: missing file '\./none\.jsonl'"),
    "missing retain file": (setting(corpus__retain="/none.jsonl"), r"corpus\.retain: missing file '/none\.jsonl'"),
    "empty forget set": (forget(""), r"corpus\.forget: '.*bad\.jsonl' holds no records"),
    "blank lines only": (forget("\n\n"), r"corpus\.forget: '.*bad\.jsonl' holds no records"),
    "malformed JSON": (forget(f'{good_line}\n{{"question": "x\n'), r"bad\.jsonl:2: malformed JSON"),
    "wrong columns": (
        forget(good_line + '\n{"q": "x", "a": "y"}\n'),
        r"bad\.jsonl:2: columns not recognised \(a, q\); a record needs text \| question\+answer",
    ),
    "empty answer": (forget('{"question": "x", "answer": " "}\n'), r"bad\.jsonl:1: column 'answer' is empty"),
    "record too long": (
        forget(f"{good_line}\n{json.dumps(LONG_ROW)}\n"),
        r"corpus\.forget: 1 of 2 records are longer than 64 tokens \(first: .*bad\.jsonl:2, \d+ tokens\); set",
    ),
    "overlap": (overlap, r"corpus: 1 retain records also stand in forget \(first: .*:3 and .*:29\)"),
    "unknown architecture": (edit_config(model_type="nonesuch"), r"model: .* architecture .*nonesuch"),
    "not a language model": (another_config("vit"), r"model: .* architecture \('vit'\) that cannot be used"),
    "encoder-decoder": (another_config("t5"), r"model: .* is an encoder-decoder \(t5\)"),
    "config of no model": (model(lambda p: (p / "config.json").write_text("{")), r"model: .*"),
    "layer out of range": (setting(selection__layers=[1, 3]), r"selection\.layers: layer 3 is out of range, .* 0\.\.2"),
    "candidate out of range": (
        setting(selection={"layers": "auto", "candidates": [0, 9]}),
        r"selection\.candidates: layer 9 is out of range, .* 0\.\.2",
    ),
    "nothing to train": (
        setting(training__modules="mpl"),
        r"training\.modules: 'mpl' matches nothing in Llama.*: self",
    ),
    "output in use": (
        output_in_use,
        r"output: .*run is not empty and holds no run \(but 'mine\.txt'\); choose another",
    ),
    "output is a file": (output_is_a_file, r"output: .*run is a file; name a folder"),
    "output below a file": (output_below_a_file, r"output: .*run cannot be created \(Not a directory\)"),
    "missing model": (setting(model="./no/model"), r"model: folder \./no/model does not exist"),
    "model is a file": (model(lambda p: shutil.rmtree(p) or p.write_text("")), r"model: .* is a file"),
    "no config": (remove("config.json"), r"model: .* has no config\.json"),
    "no weights": (remove("model.safetensors"), r"model\.safetensors"),
    "truncated weights": (model(truncate), r"model\.safetensors: is truncated"),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), r"model: .* has no usable tokenizer"),
    "missing oracle": (setting(evaluation__oracle="./no/oracle"), r"evaluation\.oracle: folder \./no/oracle does not"),
    "missing utility set": (
        setting(evaluation__utility={"facts": "./none.csv"}),
        r"evaluation\.utility\.facts: missing file '\./none\.csv'",
    ),
    "no chat template": (
        setting(corpus__template="chat"),
        r"corpus\.template is 'chat', but the tokenizer has no chat",
    ),
    "template without answer": (setting(corpus__plain_template="{question}"), r"corpus\.plain_template must contain"),
    "no such device": (setting(device="cuda:99"), r"device 'cuda:99' cannot be used \(.*\): set device to auto or cpu"),
    "learning rate below zero": (setting(training__optimizer__lr=-1), r"training\.optimizer\.lr is -1: "),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
@pytest.mark.parametrize("command", ["run", "layers"])
def test_bad_input_is_one_clear_line_and_writes_nothing(call, recipe_for, tmp_path, case, command):
    spoil, expected = BAD_INPUTS[case]
    recipe = recipe_for()
    spoil(recipe, tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    before = contents(tmp_path)
    ended = call(command, file)
    assert ended.code == 2
    assert ended.out == ""
    assert re.fullmatch(rf"error: [^\n]*{expected}[^\n]*\n", ended.err), ended.err
    assert contents(tmp_path) == before
    assert "run" not in {p.name for p in tmp_path.iterdir()} or case.startswith("output")


def test_every_mistake_of_a_recipe_is_a_line_of_its_own(call, recipe_file):
    ended = call("run", recipe_file({"training": {"steps": 0, "stebs": 1}, "seed": "x"}))
    assert ended.code == 2
    assert len(ended.errors) == len(ended.err.splitlines()) == 3


def test_a_hub_id_that_cannot_be_fetched(call, recipe_file, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    ended = call("run", recipe_file({"model": "nobody/nothing-at-all"}))
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert line.startswith("error: model: 'nobody/nothing-at-all' is no local folder and could not be fetched")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "a command is needed"),
        ("rum recipe.yaml", "invalid choice: 'rum'"),
        ("run", "the following arguments are required: RECIPE.yaml"),
        ("run recipe.yaml --resme", "unrecognised: --resme"),
        ("run recipe.yaml seed", "override 'seed': write it as key=value"),
        ("run recipe.yaml --resume --overwrite", "not allowed with argument --resume"),
        ("report somewhere seed=1", "unrecognised: seed=1"),
        ("report somewhere", "somewhere is no run folder"),
        ("run nowhere.yaml", "recipe nowhere.yaml: No such file or directory"),
        ("patch info nowhere", "nowhere"),
        ("patch undo nowhere", "invalid choice: 'undo'"),
        ("demo --seed x", "invalid int value: 'x'"),
    ],
)
def test_a_wrong_command_line_is_one_line_too(call, recipe_file, monkeypatch, line, expected):
    monkeypatch.chdir(recipe_file().parent)
    ended = call(*shlex.split(line))
    assert (ended.code, ended.out) == (2, "")
    (told,) = ended.err.splitlines()
    assert told.startswith("error: ")
    assert expected in told


def test_debug_shows_the_traceback_and_ends_the_same_way(call, recipe_file):
    plain, debug = (call("run", recipe_file({"seed": "x"}), *options) for options in ((), ("--debug",)))
    assert (debug.code, debug.out) == (plain.code, plain.out) == (2, "")
    assert "Traceback" not in plain.err
    assert debug.err.startswith("Traceback (most recent call last):")
    assert debug.errors == plain.errors


def test_a_defect_of_ours_is_no_users_mistake(call, recipe_file, monkeypatch):
    monkeypatch.setattr(pipeline, "load_corpus", None)
    with pytest.raises(TypeError):
        call("run", recipe_file())
    code = "from falcon_unlearn import cli; cli._load = None; raise SystemExit(cli.main(['run', 'x']))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 1


# disk full


def test_whenever_the_disk_is_full_it_says_so_and_the_run_can_go_on(call, recipe_file, tmp_path, monkeypatch):
    """Every flush to the disk fails once, one after the other."""
    assert call("run", recipe_file({"output": str(tmp_path / "whole")})).code == 0
    real, options = os.fsync, []
    for failing in range(1, 100):
        calls = iter(range(1, 10_000))

        def fsync(descriptor, calls=calls, failing=failing):
            if next(calls) == failing:
                raise OSError(28, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        ended = call("run", recipe_file(), *options)
        if ended.code == 0:
            break
        assert ended.code == 2, ended
        assert len(ended.errors) == 1, ended.err
        assert "space" in ended.err or "disk full" in ended.err
        assert not list((tmp_path / "run").rglob("*.tmp"))
        if failing == 1:
            assert contents(tmp_path / "run") == {}
        options = ["--resume"]
    assert failing > 8
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_disk_that_is_really_full(call, recipe_file, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(disk)]
    if not mounted or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        ended = call("run", recipe_file({"output": str(disk / "run")}))
        left = contents(disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert ended.code == 2
    assert len(ended.errors) == 1
    assert "space" in ended.err or "disk full" in ended.err
    assert not [name for name in left if name.endswith(".tmp")]
    assert json.loads(left["run/corpus.json"])


def test_a_folder_that_cannot_be_written(call, recipe_file, tmp_path, monkeypatch):
    real = Path.mkdir

    def mkdir(path, *rest, **options):
        if path == tmp_path / "run":
            raise PermissionError(13, "Permission denied", str(path))
        real(path, *rest, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    ended = call("run", recipe_file())
    assert (ended.code, ended.err) == (
        2,
        f"error: output: {tmp_path / 'run'} cannot be created (Permission denied)\n",
    )


# results


def test_run_prints_a_table_and_where_things_are(call, recipe_file, tmp_path):
    ended = call("run", recipe_file())
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[0].split() == ["before", "after"]
    assert [line[:24].strip() for line in lines[1:6]] == [
        "forget probability",
        "forget accuracy",
        "on held-out phrasing",
        "forget ROUGE-L",
        "model utility",
    ]
    assert lines[-2:] == [f"report  {tmp_path / 'run' / 'report.html'}", f"patch   {tmp_path / 'run' / 'patch'}"]
    assert ended.err.splitlines()[0] == "corpus: 12 forget, 28 retain"


def test_json_prints_json_on_stdout_and_nothing_anywhere_else(call, recipe_file, tmp_path, tiny):
    run = call("run", recipe_file(), "--json")
    assert (run.code, run.err) == (0, "")
    found = json.loads(run.out)
    assert found["output"] == str(tmp_path / "run")
    assert found["metrics"] == json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["layer_selection"]["layers"] == [1]

    patch = tmp_path / "run" / "patch"
    for arguments, key in (
        (("layers", recipe_file({"output": str(tmp_path / "layers")})), "target_layer"),
        (("methods",), "methods"),
        (("doctor",), "facts"),
        (("report", tmp_path / "run"), "report"),
        (("patch", "info", patch), "tensors"),
        (("patch", "verify", patch, "--model", tiny.model), "state"),
        (("patch", "apply", patch, "--model", tiny.model, "--out", tmp_path / "patched"), "files_rewritten"),
        (("patch", "revert", patch, "--model", tmp_path / "patched"), "files_rewritten"),
    ):
        ended = call(*arguments, "--json")
        assert (ended.code, ended.err) == (0, ""), arguments
        assert key in json.loads(ended.out)


def test_json_says_errors_on_stderr(call, recipe_file):
    ended = call("run", recipe_file({"seed": "x"}), "--json")
    assert (ended.code, ended.out, len(ended.errors)) == (2, "", 1)


def test_layers_shows_scores_and_nulls_and_saves_them(call, recipe_file, tmp_path):
    ended = call("layers", recipe_file({"selection": {"layers": "auto", "sweep": {"steps": 4}}}))
    assert ended.code == 0
    head, *rows = [line.split() for line in ended.out.splitlines()[:4]]
    assert " ".join(head) == "layer score forget left retain kept MI (nats) null: retain null: permuted"
    assert sorted(int(row[0]) for row in rows) == [0, 1, 2]
    (chosen,) = [int(row[0]) for row in rows if "*" in row]
    stored = json.loads((tmp_path / "run" / "layer_selection.json").read_text())
    assert f"train layers {chosen}; target layer {chosen}" in ended.out
    assert stored["target_layer"] == chosen
    assert stored["mutual_information"]["null_retain"]
    assert ended.out.splitlines()[-1] == f"saved   {tmp_path / 'run' / 'layer_selection.json'}"


def test_a_trial_that_diverged_is_a_dash():
    scores = (
        LayerScore(0, float("-inf"), {"forget_left": None, "retain_kept": float("nan")}),
        LayerScore(1, 0.5, {"forget_left": 0.25, "retain_kept": 0.75}),
    )
    table = cli.selection_table(LayerSelection("sweep", (1,), 1, "by trial", scores))
    assert table.splitlines()[1].split() == ["0", "-", "-", "-"]
    assert table.splitlines()[2].split() == ["1", "*", "0.500", "0.250", "0.750"]


def test_scores_of_a_selector_without_trials_stand_in_the_table():
    scores = (LayerScore(0, 0.25), LayerScore(1, -0.0625))
    table = cli.selection_table(LayerSelection("mmd", (0,), 0, "by distance", scores))
    assert [line.split() for line in table.splitlines()[:3]] == [
        ["layer", "score"],
        ["0", "*", "0.25"],
        ["1", "-0.0625"],
    ]


def test_options_and_overrides_stand_in_any_order(call, recipe_file, tmp_path):
    file = recipe_file({"training": {"steps": 2}})
    orders = (
        ("run", file, "seed=3", "training.batch_size=4", "--json"),
        ("run", file, "--json", "seed=3", "training.batch_size=4"),
        ("run", "--json", file, "seed=3", "training.batch_size=4"),
        ("run", file, "seed=3", "--json", "training.batch_size=4"),
    )
    for i, order in enumerate(orders):
        output = tmp_path / f"run{i}"
        ended = call(*order, f"output={output}")
        assert ended.code == 0, ended.err
        recipe = yaml.safe_load((output / "recipe.yaml").read_text())
        assert (recipe["seed"], recipe["training"]["batch_size"], recipe["output"]) == (3, 4, str(output))


def test_methods_lists_what_is_built_in(call):
    found = json.loads(call("methods", "--json").out)
    assert set(found) == {"methods", "attacks", "selectors", "suites"}
    assert found["methods"] == list(METHODS)
    assert {"sweep", "mutual_information"} <= set(found["selectors"])
    assert all(name in call("methods").out for name in METHODS)


def test_doctor_knows_the_machine(call):
    found = json.loads(call("doctor", "--json").out)
    assert found["facts"]["torch"] == torch.__version__
    assert all(isinstance(text, str) for text in (*found["facts"].values(), *found["advice"]))
    assert torch.__version__ in call("doctor").out


def test_report_writes_the_same_page_again(call, recipe_file, tmp_path):
    assert call("run", recipe_file({"report": {"samples": 3}})).code == 0
    page = tmp_path / "run" / "report.html"
    before = page.read_bytes()
    page.unlink()
    ended = call("report", tmp_path / "run")
    assert (ended.code, ended.out) == (0, f"{page}\n")
    assert page.read_bytes() == before


# resume and overwrite


def test_resume_goes_on_and_overwrite_starts_again(call, recipe_file, tmp_path):
    file = recipe_file({"training": {"steps": 2}})
    assert call("run", file).code == 0
    refused = call("run", file)
    assert refused.code == 2
    assert "--resume" in refused.err
    assert "--overwrite" in refused.err
    assert call("run", file, "--resume").code == 0
    first = (tmp_path / "run" / "provenance.json").read_bytes()
    (tmp_path / "run" / ".metrics.json.99.tmp").write_text("left by a crash")
    assert call("run", file, "--overwrite", "seed=1").code == 0
    assert (tmp_path / "run" / "provenance.json").read_bytes() != first
    assert not (tmp_path / "run" / ".metrics.json.99.tmp").exists()


@pytest.mark.parametrize(
    "name", ["notes.txt", "patch/notes.txt", "scores/mine.jsonl", "mine/data.jsonl", "inputs/a.jsonl"]
)
def test_overwrite_never_deletes_what_no_run_wrote(call, recipe_file, finished, tmp_path, name):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    before = contents(folder)
    ended = call("run", recipe_file(), "--overwrite")
    assert ended.code == 2
    assert "which no run wrote" in ended.err
    assert contents(folder) == before


@pytest.mark.parametrize("option", ["--overwrite", "--resume"])
def test_a_folder_without_a_run_is_left_alone(call, recipe_file, tmp_path, option):
    write_lines(tmp_path / "run" / "scores" / "before.jsonl", [{"mine": 1}])
    before = contents(tmp_path)
    ended = call("run", recipe_file(), option)
    assert ended.code == 2
    assert "holds no run (but 'scores')" in ended.err
    assert contents(tmp_path) == before | {"recipe.yaml": (tmp_path / "recipe.yaml").read_bytes()}


def test_overwrite_with_bad_input_deletes_nothing(call, recipe_file, finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    before = contents(folder)
    assert call("run", recipe_file({"selection": {"layers": [7]}}), "--overwrite").code == 2
    assert contents(folder) == before


# patches


def test_a_patch_goes_there_and_back(call, finished, tiny, tmp_path):
    patch, patched = finished / "patch", tmp_path / "patched"
    ended = call("patch", "apply", patch, "--model", tiny.model, "--out", patched)
    assert ended.code == 0
    assert str(patched) in ended.out
    assert call("patch", "verify", patch, "--model", patched).out.startswith("patched: ")
    verified = call("patch", "verify", patch, "--model", tiny.model)
    assert verified.out.startswith("base: ")
    assert verified.code == 0
    assert call("patch", "revert", patch, "--model", patched, "--out", tmp_path / "back").code == 0
    assert contents(tmp_path / "back") == contents(tiny.model)
    assert call("patch", "revert", patch, "--model", patched).code == 0
    assert contents(patched) == contents(tiny.model)


def test_patch_info_names_base_tensors_and_the_danger(call, finished, tiny):
    out = call("patch", "info", finished / "patch").out
    assert str(tiny.model) in out
    assert "model.layers.1.mlp.down_proj.weight  F32 [32, 64]" in out
    assert "it still holds what was forgotten" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("apply PATCH", "--model is needed"),
        ("verify PATCH", "--model is needed"),
        ("apply PATCH --model BASE", "--out is needed"),
        ("apply PATCH --model OTHER --out NEW", "wrong base"),
        ("apply PATCH --model BASE --out BASE", "own folder"),
        ("apply PATCH --model ./none --out NEW", "--model: folder ./none does not exist"),
        ("revert PATCH --model BASE", "is the base already"),
        ("revert PATCH --model OTHER", "not a model with this patch"),
        ("info BASE", "patch"),
    ],
)
def test_a_patch_is_not_put_where_it_does_not_belong(call, finished, tiny, oracle, tmp_path, arguments, expected):
    places = {"PATCH": finished / "patch", "BASE": tiny.model, "OTHER": oracle, "NEW": tmp_path / "new"}
    before = contents(tiny.model)
    ended = call("patch", *[places.get(word, word) for word in arguments.split()])
    assert (ended.code, ended.out) == (2, "")
    (line,) = ended.errors
    assert expected in line
    assert not (tmp_path / "new").exists()
    assert contents(tiny.model) == before


def test_verify_ends_with_2_where_the_model_is_neither(call, finished, oracle):
    ended = call("patch", "verify", finished / "patch", "--model", oracle)
    assert ended.code == 2
    assert ended.out.startswith("other: ")
    assert "model.layers.1.mlp" in ended.out


# stopped


def test_ctrl_c_before_anything_is_written(call, recipe_file, monkeypatch):
    def stop(*rest, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "load_corpus", stop)
    ended = call("run", recipe_file())
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "error: stopped; go on with the same command and --resume\n"


def test_ctrl_c_where_there_is_nothing_to_resume(call, finished, monkeypatch):
    def stop(*rest, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(html, "write_report", stop)
    assert call("report", finished).err == "error: stopped\n"


@pytest.mark.parametrize("option", ["--resume", "--overwrite"])
def test_a_demo_that_was_stopped_early_can_go_on_or_start_again(call, tmp_path, monkeypatch, option):
    def stop(*rest, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(embedded, "write_models", stop)
        assert "stopped" in call("demo", "--out", tmp_path / "demo").err
    started = []
    monkeypatch.setattr(pipeline, "_read_inputs", lambda recipe, *_: started.append(recipe) or stop())
    assert "go on there with --resume" in call("demo", "--out", tmp_path / "demo").err
    assert call("demo", "--out", tmp_path / "demo", option).err.startswith("error: stopped")
    assert started[0].output == str(tmp_path / "demo")
    assert (tmp_path / "demo" / "inputs" / "model" / "config.json").exists()


@pytest.mark.parametrize("options", [[], ["--resume"], ["--overwrite"]])
def test_the_demo_leaves_other_peoples_inputs_alone(call, tmp_path, options):
    mine = write_lines(tmp_path / "demo" / "inputs" / "forget.jsonl", [{"mine": 1}])
    ended = call("demo", "--out", tmp_path / "demo", *options)
    assert (ended.code, len(ended.errors)) == (2, 1)
    assert contents(tmp_path) == {"demo/inputs/forget.jsonl": mine.read_bytes()}


# quick to answer


def test_help_imports_nothing_heavy_and_answers_at_once():
    code = (
        "import sys\n"
        "from falcon_unlearn.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as leave:\n    assert leave.code == 0\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'numpy', 'scipy', 'yaml', 'datasets', 'matplotlib', 'jinja2'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)\n"
    )
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        seconds.append(time.perf_counter() - began)
        assert done.returncode == 0, done.stderr
        assert "demo" in done.stdout
    assert min(seconds) < 2  # measured: 0.1; the margin is for busy machines


@pytest.mark.parametrize("command", ["demo", "run", "layers", "patch", "report", "methods", "doctor"])
def test_every_command_explains_itself(call, command):
    ended = call(command, "--help")
    assert ended.code == 0
    assert "--json" in ended.out


def test_version(call):
    assert call("--version").out == f"{falcon_unlearn.__version__}\n"
