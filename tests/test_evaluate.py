"""``evaluate`` and ``score-log``: what they score, write, print and refuse."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import FORGET_ROWS, RETAIN_ROWS, write_lines
from safetensors.torch import load_file, save_file

from falcon_unlearn import cli, suite_scores
from falcon_unlearn.api import apply_patch, unlearn
from falcon_unlearn.artifacts import read_jsonl
from falcon_unlearn.evaluation.tofu import TofuSuite
from falcon_unlearn.model.patch import write_patch

PARTS = ("forget", "retain", "real_authors", "world_facts")
COLUMNS = ("question", "answer", "perturbed_answer", "entity")


@pytest.fixture(scope="module", autouse=True)
def _small_heap(tiny, oracle, small_heap):
    """With the session's models already in it."""


def write_tofu(folder):
    """TOFU's four configurations, six questions each."""
    for name, rows in (
        ("forget10", FORGET_ROWS[:6]),
        ("retain", RETAIN_ROWS[:6]),
        ("real_authors", RETAIN_ROWS[8:14]),
        ("world_facts", RETAIN_ROWS[16:22]),
    ):
        columns = (*COLUMNS, "paraphrased_answer") if name in {"forget10", "retain"} else COLUMNS
        write_lines(folder / f"{name}_perturbed.jsonl", [{c: row[c] for c in columns} for row in rows])
    return folder


@pytest.fixture(scope="module")
def tofu(tmp_path_factory):
    """Arguments that score TOFU quickly."""
    data = write_tofu(tmp_path_factory.mktemp("data") / "tofu")
    return ("--suite", "tofu", f"tofu.data={data}", "tofu.max_new_tokens=8", "device=cpu")


@pytest.fixture(scope="module")
def privacy(tiny, tmp_path_factory):
    """The overrides of the quickest suite."""
    holdout = write_lines(
        tmp_path_factory.mktemp("data") / "holdout.jsonl",
        [{**row, "question": row["question"].replace("?", ", really?")} for row in FORGET_ROWS],
    )
    return (f"privacy.forget={tiny.forget}", f"privacy.holdout={holdout}")


@pytest.fixture(scope="module")
def run(tiny_recipe, oracle, tmp_path_factory):
    """A finished run; tests only look at it."""
    changes = {"training": {"steps": 20}, "evaluation": {"oracle": str(oracle), "max_records": 2}}
    return unlearn(tiny_recipe(changes, tmp_path_factory.mktemp("run") / "run"))


@pytest.fixture(scope="module")
def whole(tiny, oracle, tofu, tmp_path_factory):
    """An evaluation of the model and its oracle that nobody interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite_scores, "_UNITS_PER_CHUNK", 2)
        assert cli.main(["evaluate", str(tiny.model), *tofu, "--out", str(out), "--oracle", str(oracle)]) == 0
    return out


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def results(folder, *, settings=False):
    metrics = json.loads((folder / "metrics.json").read_text())
    for suites in metrics.values():
        for result in (suites or {}).values():
            result["settings"] = result["settings"] if settings else None
    return metrics


def scores_of(folder, which="model"):
    return {name: content for name, content in files(folder).items() if name.startswith(f"scores/{which}.")}


# what it leaves


def test_a_folder_beside_its_oracle_leaves_scores_numbers_and_a_log(whole):
    assert set(files(whole)) == {
        "evaluation.yaml",
        "metrics.json",
        "TOFU_EVAL.json",
        "TOFU_SUMMARY.json",
        *(f"scores/{which}.tofu.{part}.jsonl" for which in ("model", "oracle") for part in PARTS),
    }
    metrics = results(whole, settings=True)
    assert list(metrics) == ["model", "oracle"]
    for which, suites in metrics.items():
        found = suites["tofu"]["metrics"]
        rows = read_jsonl(whole / "scores" / f"{which}.tofu.forget.jsonl")
        assert found["forget_probability"]["value"] == pytest.approx(math.fsum(r["probability"] for r in rows) / 6)
        assert found["forget_probability"]["n"] == len(rows) == 6
        assert suites["tofu"]["settings"]["device"] == "cpu"
        assert "Question" in suites["tofu"]["settings"]["template"]
    model, oracle = (metrics[which]["tofu"]["metrics"] for which in ("model", "oracle"))
    assert model["forget_probability"]["value"] > 0.9 > 0.1 > oracle["forget_probability"]["value"]
    assert model["forget_quality"]["value"] is not None
    # The oracle has nobody to be compared with.
    assert oracle["forget_quality"]["value"] is None


def test_the_log_read_by_score_log_gives_the_numbers_of_metrics_json(whole, call):
    ours = results(whole)["model"]["tofu"]["metrics"]
    ended = call("score-log", whole / "TOFU_EVAL.json", "--json")
    assert (ended.code, ended.err) == (0, "")
    found = json.loads(ended.out)
    assert found["model_utility"] == pytest.approx(ours["model_utility"]["value"])
    assert found["forget_quality"] == pytest.approx(ours["forget_quality"]["value"])
    assert found["log10_forget_quality"] == pytest.approx(ours["log10_forget_quality"]["value"])
    assert found["forget_probability"] == pytest.approx(ours["forget_probability"]["value"])
    # As somebody else's retain log it makes every model its equal's equal.
    same = json.loads(call("score-log", whole / "TOFU_EVAL.json", "--retain", whole / "TOFU_EVAL.json", "--json").out)
    assert same["forget_quality"] == pytest.approx(1)


def test_base_and_patch_are_the_patched_checkpoint_without_one_being_written(run, tiny, tofu, call, tmp_path):
    apply_patch(tiny.model, run.folder / "patch", tmp_path / "applied")
    beside, base = sorted(p.name for p in tiny.model.parent.iterdir()), files(tiny.model)
    for out, arguments in (("a", (tmp_path / "applied",)), ("b", (tiny.model, "--patch", run.folder / "patch"))):
        assert call("evaluate", *arguments, *tofu, "--out", tmp_path / out).code == 0
    assert scores_of(tmp_path / "a") == scores_of(tmp_path / "b")
    assert results(tmp_path / "a") == results(tmp_path / "b")
    assert results(tmp_path / "a")["oracle"] is None
    assert not list((tmp_path / "b").rglob("*.safetensors"))
    assert sorted(p.name for p in tiny.model.parent.iterdir()) == beside
    assert files(tiny.model) == base
    # The folder of the run brings patch and oracle.
    assert call("evaluate", run.folder, *tofu, "--out", tmp_path / "c").code == 0
    assert scores_of(tmp_path / "c") == scores_of(tmp_path / "b")
    assert results(tmp_path / "c")["oracle"]["tofu"]["metrics"]["forget_probability"]["value"] < 0.2
    assert read_jsonl(tmp_path / "b/scores/model.tofu.forget.jsonl")[0]["probability"] < 0.9


def test_a_patch_beside_a_run_stands_on_the_patch_of_the_run(run, tofu, call, tmp_path):
    ended = call("evaluate", run.folder, "--patch", run.folder / "patch", *tofu, "--out", tmp_path / "out")
    assert ended.code == 2
    assert "already patched" in ended.err
    assert not (tmp_path / "out").exists()


def test_several_suites_may_stand_behind_one_option_or_several(tiny, tofu, privacy, call, tmp_path):
    base = ("evaluate", tiny.model, *tofu, *privacy)
    assert call(*base, "--suite", "privacy", "--out", tmp_path / "a").code == 0
    together = ("--suite", "tofu", "privacy", *tofu[2:], *privacy)
    ended = call("evaluate", tiny.model, *together, "--out", tmp_path / "b", "--json")
    assert ended.code == 0
    assert results(tmp_path / "a") == results(tmp_path / "b")
    assert set(json.loads(ended.out)["model"]) == {"tofu", "privacy"}
    assert "scores/model.privacy.holdout.jsonl" in files(tmp_path / "a")


def test_json_prints_json_and_nothing_else(whole, tiny, oracle, tofu, call, tmp_path):
    ended = call("evaluate", tiny.model, *tofu, "--oracle", oracle, "--out", tmp_path / "out", "--json")
    assert (ended.code, ended.err) == (0, "")
    printed = json.loads(ended.out)
    assert printed.pop("output") == str(tmp_path / "out")
    assert printed == json.loads((tmp_path / "out/metrics.json").read_text())
    assert results(tmp_path / "out") == results(whole)  # whatever the chunks were


def test_the_table_shows_the_oracle_beside_the_model_and_what_can_be_concluded(whole, tiny, oracle, tofu, call):
    ended = call("evaluate", tiny.model, *tofu, "--oracle", oracle, "--out", whole, "--resume")
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[0].split() == ["tofu", "value", "95", "%", "interval", "n", "oracle"]
    row = next(line for line in lines if line.startswith("forget_probability")).split()
    ours, theirs = (results(whole)[which]["tofu"]["metrics"]["forget_probability"] for which in ("model", "oracle"))
    assert row[1] == f"{ours['value']:.3f}"
    assert row[2:5] == [f"{ours['low']:.3f}", "..", f"{ours['high']:.3f}"]
    assert row[-1] == f"{theirs['value']:.3f}"
    assert [line for line in lines if line.startswith("- ")]
    assert str(whole / "metrics.json") in ended.out


# what it refuses


def out_of(arguments):
    return Path(arguments[arguments.index("--out") + 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "tofuu"), r"tofuu.*did you mean 'tofu'"),
        (("--suite", "tofu", "muse.max_records=3"), r"muse is not among --suite tofu"),
        (("--suite", "tofu", "privacy.forget=x", "tofu.splt=forget05"), r"privacy is not among"),
        (("--suite", "seed=1"), r"--suite: name at least one of tofu"),
        (("--suite", "tofu", "tofu.splt=forget05"), r"suites\.tofu\.splt.*unknown key.*did you mean 'split'"),
        (("--suite", "tofu", "tofu.split=forget07"), r"suites\.tofu\.split is 'forget07'.*forget05"),
        (("--suite", "tofu", "tofu.max_records=none"), r"suites\.tofu\.max_records is 'none'"),
        (("--suite", "tofu", "tofu=3"), r"suites\.tofu is 3: expected a mapping"),
        (("--suite", "tofu", "sed=1"), r"sed.*unknown key.*did you mean 'seed'"),
        (("--suite", "tofu", "batch_size=0"), r"batch_size is 0"),
        (("--suite", "tofu", "nonsense"), r"--suite nonsense: unknown; known: tofu"),
        (("--suite", "tofu", "=3"), r"'=3': write it as key=value"),
        (("--suite", "tofu", "tofu.data=/nowhere"), r"tofu\.data"),
        (("--suite", "own"), r"suites\.own\.forget: required, but missing"),
        (("--suite", "tofu", "--oracle", "/nowhere"), r"--oracle: folder /nowhere does not exist"),
        (("--suite", "tofu", "--patch", "/nowhere"), r"/nowhere"),
        (("--suite", "tofu", "device=abacus"), r"abacus"),
    ],
)
def test_a_mistake_is_one_line_that_names_it_and_nothing_is_written(tiny, tofu, call, tmp_path, arguments, message):

    given = () if any(a.startswith("tofu.data") for a in arguments) else tofu[2:3]
    given = given if "tofu" in arguments else ()
    ended = call("evaluate", tiny.model, "device=cpu", *given, "--out", tmp_path / "out", *arguments)
    assert ended.code == 2, ended
    assert ended.out == ""
    assert len(ended.err.splitlines()) == 1, ended.err
    assert re.search(message, ended.err), ended.err
    assert not (tmp_path / "out").exists()


def test_several_mistakes_are_named_at_once(tiny, tofu, call, tmp_path):
    ended = call("evaluate", tiny.model, *tofu, "tofu.splt=1", "sed=1", "--out", tmp_path / "out")
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 2


@pytest.mark.parametrize("model", ["/nowhere", "config.json", "empty"])
def test_a_model_that_is_none_is_named(tiny, tofu, call, tmp_path, model):
    (tmp_path / "empty").mkdir()
    name = {"config.json": tiny.model / "config.json", "empty": tmp_path / "empty"}.get(model, model)
    ended = call("evaluate", name, *tofu, "--out", tmp_path / "out")
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1
    assert "MODEL" in ended.err
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_patch_says_so(run, tofu, call, tmp_path):
    folder = tmp_path / "unfinished"
    folder.mkdir()
    shutil.copy(run.folder / "recipe.yaml", folder)
    ended = call("evaluate", folder, *tofu, "--out", tmp_path / "out")
    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert "no patch yet" in ended.err


@pytest.mark.parametrize("model", ["patched", "other"])
def test_a_patch_of_another_model_is_refused(run, tiny, oracle, tofu, call, tmp_path, model):
    base = oracle
    if model == "patched":
        base = tmp_path / "applied"
        apply_patch(tiny.model, run.folder / "patch", base)
    ended = call("evaluate", base, "--patch", run.folder / "patch", *tofu, "--out", tmp_path / "out")
    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert ("already patched" in ended.err) == (model == "patched")
    assert not (tmp_path / "out").exists()


# an output folder that is in use


@pytest.fixture
def used(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "out"))


@pytest.fixture
def again(tiny, oracle, tofu, call):
    """The command that made ``whole``, with changes."""

    def run(out, *arguments, model=tiny.model):
        return call("evaluate", model, *tofu, "--oracle", oracle, "--out", out, *arguments)

    return run


def test_a_used_folder_needs_resume_or_overwrite(used, again):
    before = files(used)
    ended = again(used)
    assert ended.code == 2
    assert "--resume" in ended.err
    assert "--overwrite" in ended.err
    assert files(used) == before


@pytest.mark.parametrize(
    "change", ["seed=7", "tofu.max_records=2", "batch_size=3", "plain_template='{question} {answer}'"]
)
def test_resume_with_other_settings_is_refused(used, again, change):
    before = files(used)
    ended = again(used, "--resume", change)
    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert change.split("=")[0].split(".")[-1] in ended.err
    assert files(used) == before


def test_resume_with_other_weights_is_refused(tiny, model_copy, again, tmp_path):
    out = tmp_path / "out"
    assert again(out, model=model_copy).code == 0
    weights = load_file(model_copy / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] += 1
    save_file(weights, model_copy / "model.safetensors", {"format": "pt"})
    before = files(out)
    ended = again(out, "--resume", model=model_copy)
    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert "weights.model" in ended.err
    assert "weights.oracle" not in ended.err
    assert files(out) == before


def test_resume_with_other_data_or_another_patch_is_refused(run, tiny, call, tmp_path):
    data = write_tofu(tmp_path / "tofu")
    patch = Path(shutil.copytree(run.folder / "patch", tmp_path / "patch"))
    out = tmp_path / "out"
    suite = ("--suite", "tofu", f"tofu.data={data}", "tofu.max_new_tokens=4", "device=cpu")
    command = ("evaluate", tiny.model, "--patch", patch, *suite, "--out", out)
    assert call(*command).code == 0
    before = files(out)
    rows = read_jsonl(data / "retain_perturbed.jsonl")
    write_lines(data / "retain_perturbed.jsonl", [{**rows[0], "answer": "No."}, *rows[1:]])
    ended = call(*command, "--resume")
    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert "tofu.retain" in ended.err
    assert "weights" not in ended.err
    assert files(out) == before
    write_tofu(data)
    other = shutil.copytree(tiny.model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    change = {"model.layers.2.mlp.down_proj.weight": weights["model.layers.2.mlp.down_proj.weight"] + 1}
    write_patch(patch, other, change, "base", {})
    ended = call(*command, "--resume")
    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert "weights.model" in ended.err
    assert "tofu" not in ended.err
    assert files(out) == before


def test_overwrite_begins_anew_and_leaves_what_is_not_ours(used, whole, again):
    (used / "scores/.model.tofu.forget.jsonl.partial.tmp").write_text("left behind")
    for foreign in ("notes.txt", "scores/notes.jsonl", "scores/model.tofu.forget.jsonl.bak"):
        (used / foreign).write_text("mine")
        before = files(used)
        ended = again(used, "--overwrite")
        assert (ended.code, len(ended.err.splitlines())) == (2, 1)
        assert foreign in ended.err
        assert files(used) == before
        (used / foreign).unlink()
    assert again(used, "--overwrite").code == 0
    assert set(files(used)) == set(files(whole))


def test_a_folder_of_something_else_is_never_touched(run, tiny, tofu, call, tmp_path):
    for folder in (run.folder, tiny.model):
        before = files(folder)
        for state in ((), ("--overwrite",), ("--resume",)):
            ended = call("evaluate", tiny.model, *tofu, "--out", folder, *state)
            assert (ended.code, len(ended.err.splitlines())) == (2, 1)
        assert files(folder) == before


@pytest.mark.parametrize("stop", [2, 8])
def test_resumed_in_the_middle_of_a_part_every_byte_is_the_same(whole, again, tmp_path, monkeypatch, stop):
    monkeypatch.setattr(suite_scores, "_UNITS_PER_CHUNK", 2)
    calls, score = [], TofuSuite.score

    def interrupted(self, part, units, subject):
        calls.append((subject.name, part, units))
        if len(calls) == stop:
            raise KeyboardInterrupt
        return score(self, part, units, subject)

    monkeypatch.setattr(TofuSuite, "score", interrupted)
    out = tmp_path / "out"
    ended = again(out)
    assert ended.code == 2
    assert "--resume" in ended.err
    assert not (out / "metrics.json").exists()
    first = list(calls)
    stop = None
    assert again(out, "--resume").code == 0
    assert calls[len(first)] == first[-1]  # what was cut off is done again, what was kept is not
    assert len(calls) == 2 * 4 * 3 + 1
    here, there = files(out), files(whole)
    for settings in (here, there):
        content = yaml.safe_load(settings.pop("evaluation.yaml"))
        assert "output" in content
    assert here == there


def test_a_finished_evaluation_resumed_scores_nothing(whole, again, monkeypatch):
    before = files(whole)
    monkeypatch.setattr(TofuSuite, "score", None)
    monkeypatch.setattr("falcon_unlearn.subjects.load_patched", None)
    assert again(whole, "--resume").code == 0
    assert files(whole) == before


# score-log


def test_score_log_without_a_retain_log_prints_a_dash_and_why(whole, call, tmp_path):
    log = json.loads((whole / "TOFU_EVAL.json").read_text())
    log.pop("forget_quality", None)
    path = tmp_path / "log.json"
    path.write_text(json.dumps(log))
    ended = call("score-log", path)
    assert ended.code == 0
    rows = {line.rsplit(maxsplit=1)[0].strip(): line.split()[-1] for line in ended.out.splitlines()[:12]}
    assert rows["forget quality (p)"] == rows["log10"] == "-"
    utility = results(whole)["model"]["tofu"]["metrics"]["model_utility"]["value"]
    assert rows["model utility"] == f"{utility:.3f}"
    assert len(rows) == 12
    assert "retain" in ended.out.splitlines()[-1]


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"forget_truth_ratio": 3}', "\x00"])
def test_a_log_that_is_none_is_one_line(call, tmp_path, whole, content):
    path = tmp_path / "log.json"
    if content is not None:
        path.write_text(content)
    for arguments in ((path,), (whole / "TOFU_EVAL.json", "--retain", path)):
        ended = call("score-log", *arguments)
        assert (ended.code, ended.out) == (2, "")
        assert len(ended.err.splitlines()) == 1
        assert "log.json" in ended.err


def test_a_folder_is_no_log(call, tmp_path):
    ended = call("score-log", tmp_path)
    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
