"""``attack`` and the attacks of a recipe, on the tiny model: results, artefacts, budgets, interruption, refusals."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import FORGET_ROWS, merged, write_lines

from falcon_unlearn import attack_runs, cli
from falcon_unlearn.api import apply_patch, unlearn
from falcon_unlearn.artifacts import read_jsonl
from falcon_unlearn.attack import attack_request
from falcon_unlearn.attacks.battery import ATTACKS
from falcon_unlearn.errors import UserError

BATTERY = {
    "relearn": {"known": 3, "epochs": 4, "points": 1},
    "quantize": {"formats": ["int8"]},
    "interpolate": {"alphas": [1.0]},
}
QUICK = ("quantize.formats=[int8]",)
ARGUMENTS = (
    "--attack", "relearn", "relearn.known=3", "relearn.epochs=4", "relearn.points=1",
    "quantize", "quantize.formats=[int8]", "interpolate", "interpolate.alphas=[1.0]",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _small_heap(tiny, oracle, small_heap):
    """With the session's models already in it."""


@pytest.fixture(scope="module")
def recipe(tiny_recipe, oracle):
    """``recipe(output)``: a run that ends with attacks."""

    def build(output, changes=None):
        base = {"training": {"steps": 20}, "evaluation": {"oracle": str(oracle), "max_new_tokens": 8}}
        return tiny_recipe(merged({**base, "attacks": BATTERY}, changes or {}), output)

    return build


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """A finished run; tests only look at it."""
    return unlearn(recipe(tmp_path_factory.mktemp("run") / "run"))


@pytest.fixture(scope="module")
def applied(run, tiny, tmp_path_factory):
    """The unlearned model as a checkpoint."""
    folder = tmp_path_factory.mktemp("applied") / "model"
    apply_patch(tiny.model, run.folder / "patch", folder)
    return folder


@pytest.fixture(scope="module")
def quick(run, applied, tiny, tmp_path_factory):
    """A finished battery of one cheap attack on one model, and the command that made it."""
    out = tmp_path_factory.mktemp("quick") / "out"
    data = (f"forget={tiny.forget}", f"retain={tiny.retain}", "max_new_tokens=8", "device=cpu")
    command = ("attack", str(applied), *data, "--attack", "quantize", *QUICK, "--out")
    assert cli.main([*command, str(out)]) == 0
    return out, command


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def without_seconds(value):
    if isinstance(value, dict):
        return {key: without_seconds(below) for key, below in value.items() if key != "seconds"}
    return [without_seconds(below) for below in value] if isinstance(value, list) else value


def results(folder):
    return without_seconds(json.loads((folder / "attacks.json").read_text()))


def by_name(folder):
    return {result["attack"]: result for result in results(folder)["attacks"]}


# attacks of a recipe


def test_a_run_says_what_each_attack_brought_back_on_every_model(run):
    stored = by_name(run.folder)
    assert list(stored) == list(BATTERY)
    metrics = json.loads((run.folder / "metrics.json").read_text())
    for which, model in (("before", "original"), ("after", "unlearned"), ("oracle", "oracle")):
        assert list(metrics[which]["attacks"]) == list(BATTERY)
        for attack, found in metrics[which]["attacks"].items():
            numbers = stored[attack]["models"][model]
            assert numbers["status"] == "done"
            assert found["recovered_accuracy"] == numbers["accuracy"]["value"]
            assert ("recovery" in found) == (which == "after")
    assert metrics["before"]["attacks"]["quantize"]["recovered_accuracy"] > 0.5  # the control: it still knows
    assert metrics["after"]["attacks"]["interpolate"]["recovery"] == 1  # all the way to the original
    assert stored["relearn"]["models"]["unlearned"]["points"][-1]["setting"]["step"] > 0


def test_recovery_is_between_the_unlearned_model_and_the_original(run):
    for result in by_name(run.folder).values():
        means = {}
        for model in ("original", "unlearned", "oracle"):
            kept = json.loads((run.folder / f"attacks/{model}.{result['attack']}.json").read_text())
            assert len(kept["before"]) == len(kept["outcome"]["samples"]) == result["scored"]
            under = [sample["accuracy"] for sample in kept["outcome"]["samples"]]
            before = [sample["accuracy"] for sample in kept["before"]]
            means[model] = sum(before) / len(before), sum(under) / len(under)
        zero, one = means["unlearned"][0], means["original"][0]
        assert one > zero
        expected = (means["unlearned"][1] - zero) / (one - zero)
        assert result["recovery"]["accuracy"]["value"] == pytest.approx(expected)
        assert result["oracle"]["accuracy"]["value"] == pytest.approx((means["oracle"][1] - zero) / (one - zero))


def test_the_known_facts_are_not_scored(run):
    scored = json.loads((run.folder / "attacks/unlearned.relearn.json").read_text())["before"]
    assert len(scored) == len({row["prompt"] for row in scored}) <= len(FORGET_ROWS) - 3
    assert by_name(run.folder)["relearn"]["known"] == 3


def test_report_card_and_attacks_json_name_the_same_worst_attack(run):
    worst = results(run.folder)["worst"]
    assert worst["attack"] in {"relearn", "quantize"}  # not interpolate, which takes the original's weights
    shown = f"{100 * worst['recovery']['value']:.0f} %"
    page, card = ((run.folder / name).read_text() for name in ("report.html", "model_card.md"))
    assert re.search(rf"Strongest recovery: <strong>{shown} .*? by {worst['attack']}", page)
    assert f"strongest recovery under attack {shown}" in page
    assert f"**Strongest recovery: {shown}" in card
    assert 'id="attacks"' in page
    assert "quantize" in card.split("## Attacks")[1]


def test_a_run_stopped_between_attacks_and_resumed_is_the_same(run, recipe, tmp_path, monkeypatch, call):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(tmp_path / "run")))
    calls, attack = [], attack_runs.run_attacks

    def stopped(attacks, model, name, *rest, **settings):
        calls.append((name, *attacks))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return attack(attacks, model, name, *rest, **settings)

    monkeypatch.setattr(attack_runs, "run_attacks", stopped)
    ended = call("run", path)
    assert ended.code == 2
    assert "--resume" in ended.err
    assert not (tmp_path / "run/metrics.json").exists()
    ended = call("run", path, "--resume")
    assert ended.code == 0
    assert calls[5:] == [(m, a) for m in ("original", "unlearned", "oracle") for a in BATTERY][4:]
    assert results(tmp_path / "run") == results(run.folder)
    assert (tmp_path / "run/metrics.json").read_bytes() == (run.folder / "metrics.json").read_bytes()
    assert "relearn" in ended.out
    before = files(tmp_path / "run")
    assert call("run", path, "--resume", "--json").code == 0
    assert files(tmp_path / "run") == before  # a finished run is left as it is


def test_the_report_made_again_is_the_same(run, call):
    before = files(run.folder)
    assert call("report", run.folder).code == 0
    assert files(run.folder) == before


def test_attacks_without_evaluation_are_refused(recipe, tmp_path):
    with pytest.raises(UserError, match=r"attacks: .*evaluation\.enabled"):
        unlearn(recipe(tmp_path / "run", {"evaluation": {"enabled": False, "oracle": None}}))
    assert not (tmp_path / "run").exists()


def test_attacks_that_want_more_facts_than_there_are_stop_the_run_before_it_begins(recipe, tmp_path):
    with pytest.raises(UserError, match=r"attacks\.quantize.*lower known"):
        unlearn(recipe(tmp_path / "run", {"attacks": {"quantize": {"known": 50}}}))
    assert not (tmp_path / "run").exists()


def test_other_neighbours_on_resume_are_refused(recipe, tmp_path):
    near = write_lines(tmp_path / "near.jsonl", [{"text": "Towns have bakers."}, {"text": "Pets eat soup."}])
    attacks = {"relearn": {"sources": ["neighbours"]}, "quantize": None, "interpolate": None, "neighbours": str(near)}
    changes = {"attacks": attacks, "training": {"steps": 4}, "evaluation": {"oracle": None}}
    settings = recipe(tmp_path / "run", changes)
    assert unlearn(settings).attacks[0].models["unlearned"].status == "done"
    write_lines(near, [{"text": "Others."}])
    with pytest.raises(UserError, match=r"attacks\.neighbours: not what the run"):
        unlearn(settings, resume=True)


def test_a_run_with_adapters_is_attacked_as_it_is_merged(recipe, tmp_path):
    pytest.importorskip("peft")
    changes = {
        "training": {"steps": 4, "lora": {"rank": 4}},
        "evaluation": {"oracle": None},
        "attacks": {"relearn": {"weights": ["lora"], "epochs": 1}, "interpolate": None},
    }
    found = unlearn(recipe(tmp_path / "run", changes))
    assert [(a.attack, {m.status for m in a.models.values()}) for a in found.attacks] == [
        ("relearn", {"done"}),
        ("quantize", {"done"}),
    ]
    kept = json.loads((found.folder / "attacks/unlearned.quantize.json").read_text())["before"]
    scores = {row["prompt"]: row["probability"] for row in read_jsonl(found.folder / "scores/after.jsonl")}
    assert kept
    for row in kept:
        assert row["probability"] == pytest.approx(scores[row["prompt"]], rel=1e-4)


# the command


def test_the_folder_of_a_run_brings_everything_and_gives_its_numbers_again(run, tiny, oracle, applied, call, tmp_path):
    before = [files(folder) for folder in (tiny.model, oracle, run.folder)]
    ended = call("attack", run.folder, *ARGUMENTS, "--out", tmp_path / "out", "--json")
    assert (ended.code, ended.err) == (0, "")
    printed = without_seconds(json.loads(ended.out))
    assert printed["attacks"] == results(tmp_path / "out")["attacks"]
    assert results(tmp_path / "out") == results(run.folder)
    assert [files(folder) for folder in (tiny.model, oracle, run.folder)] == before
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_checkpoint_beside_original_and_oracle_gives_them_too(run, tiny, oracle, applied, call, tmp_path):
    before = [files(folder) for folder in (tiny.model, oracle, applied)]
    ended = call(
        "attack", applied, "--original", tiny.model, "--oracle", oracle, f"forget={tiny.forget}",
        f"retain={tiny.retain}", "max_new_tokens=8", "device=cpu", *ARGUMENTS, "--out", tmp_path / "out",
    )  # fmt: skip
    assert ended.code == 0
    assert results(tmp_path / "out") == results(run.folder)
    assert [files(folder) for folder in (tiny.model, oracle, applied)] == before
    worst = results(tmp_path / "out")["worst"]
    assert f"worst recovery: {worst['recovery']['value']:.3f} by {worst['attack']}" in ended.out
    assert [line.split()[0] for line in ended.out.splitlines()[1:4]] == list(BATTERY)


def test_without_the_original_nothing_is_recovered_and_that_is_said(applied, oracle, tiny, quick, call, tmp_path):
    _, command = quick
    ended = call(*command, tmp_path / "out", "--oracle", oracle)
    assert ended.code == 0
    assert "without the original model (--original)" in ended.err
    assert "worst recovery" not in ended.out
    (result,) = results(tmp_path / "out")["attacks"]
    assert (result["recovery"], result["oracle"]) == ({}, {})
    assert set(result["models"]) == {"unlearned", "oracle"}
    assert results(tmp_path / "out")["worst"] is None
    row = next(line for line in ended.out.splitlines() if line.startswith("quantize")).split()
    assert row[3] == row[5] == "-"


def test_an_attack_that_needs_the_original_says_so_and_the_rest_go_on(quick, call, tmp_path):
    _, command = quick
    ended = call(*command, tmp_path / "out", "--attack", "interpolate")
    assert ended.code == 0
    assert "interpolate on the unlearned model: not possible" in ended.err
    found = by_name(tmp_path / "out")
    assert found["interpolate"]["models"]["unlearned"]["status"] == "not possible"
    assert found["quantize"]["models"]["unlearned"]["status"] == "done"


def test_no_time_is_said_and_more_time_later_ends_the_attacks(quick, call, tmp_path):
    whole, command = quick
    for state in ((), ("--resume",)):
        ended = call(*command, tmp_path / "out", "seconds=1e-6", *state)
        assert ended.code == 0
        assert "quantize on the unlearned model: out of time" in ended.err
        assert "out of time" in ended.out
    ended = call(*command, tmp_path / "out", "seconds=600", "--resume")
    assert ended.code == 0
    assert results(tmp_path / "out")["attacks"] == results(whole)["attacks"]


def test_a_resumed_battery_does_what_is_left_and_nothing_else(quick, call, tmp_path, monkeypatch):
    whole, command = quick
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    before = files(out)
    monkeypatch.setattr("falcon_unlearn.subjects.load_patched", None)  # no model is loaded
    assert call(*command, out, "--resume").code == 0
    assert {k: v for k, v in files(out).items() if k != "attack.yaml"} == {
        k: v for k, v in before.items() if k != "attack.yaml"
    }


def test_links_as_in_the_hubs_cache_are_followed(run, tiny, call, tmp_path):
    snapshot = tmp_path / "models--x--y/snapshots/0123"
    (tmp_path / "models--x--y/blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(tiny.model.iterdir())):
        blob = Path(shutil.copy(path, tmp_path / f"models--x--y/blobs/{i}"))
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    before = files(tmp_path / "models--x--y")
    data = (f"forget={tiny.forget}", f"retain={tiny.retain}", "max_new_tokens=8", "device=cpu")
    ended = call(
        "attack", snapshot, "--patch", run.folder / "patch", *data, "--attack", "quantize", *QUICK,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert ended.code == 0
    ours, theirs = by_name(tmp_path / "out")["quantize"], by_name(run.folder)["quantize"]
    assert ours["recovery"] == theirs["recovery"]  # without --original the model without its patch takes its place
    assert ours["models"]["unlearned"] == theirs["models"]["unlearned"]
    assert files(tmp_path / "models--x--y") == before


# requests


def request(*attacks, model="m", **settings):
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    return attack_request(model, attacks, "out", overrides=["forget=f", "retain=r", *overrides])


def test_audit_is_all_but_transfer():
    chosen = request("audit", gcg__known=3).attacks.chosen()
    assert list(chosen) == [name for name in ATTACKS if name != "transfer"]
    assert chosen["gcg"].known == 3
    both = request("audit", "transfer", transfer__triggers="[please]").attacks.chosen()
    assert list(both) == list(ATTACKS)


def test_a_run_brings_the_settings_of_its_scoring(recipe, run, tmp_path):
    made = attack_request(str(run.folder), ["quantize"], "out")
    assert made.max_new_tokens == 8
    assert made.patches == (str(run.folder / "patch"),)
    assert made.batch_size == 32
    assert attack_request(str(run.folder), ["quantize"], "out", overrides=["max_new_tokens=3"]).max_new_tokens == 3
    assert attack_request(str(run.folder), ["quantize"], "out", oracle="other").oracle == "other"


def test_settings_of_all_attacks_stand_without_a_name():
    made = request("prune", seconds=9, max_records=3, neighbours="n.jsonl").attacks
    assert (made.seconds, made.max_records, made.neighbours.source) == (9, 3, "n.jsonl")


def test_one_of_several_domains_has_to_be_named(recipe, run, tmp_path):
    content = yaml.safe_load((run.folder / "recipe.yaml").read_text())
    forget = content["corpus"]["forget"]
    content["corpus"]["forget"] = {"a": forget, "b": forget}
    (tmp_path / "patch").mkdir()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"of the several domains of this run, name one for forget: forget=FILE"):
        attack_request(str(tmp_path), ["quantize"], "out")
    assert attack_request(str(tmp_path), ["quantize"], "out", overrides=["forget=f"]).forget.source == "f"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--attack", "relern"), r"--attack: unknown attack 'relern' .did you mean 'relearn'"),
        (("--attack", "seed=1"), r"--attack: name at least one of relearn"),
        (("--attack", "relearn", "relearn.knwon=3"), r"attacks\.relearn\.knwon.*did you mean 'known'"),
        (("--attack", "logit-lens", "logit-lens.optoins=true"), r"logit-lens\.optoins.*did you mean 'options'"),
        (("--attack", "relearn", "quantize.known=3"), r"quantize is not among --attack relearn"),
        (("--attack", "relearn", "relearn.known=many"), r"attacks\.relearn\.known is 'many'"),
        (("--attack", "relearn", "relearn.sources=[forgot]"), r"did you mean 'forget'"),
        (("--attack", "transfer"), r"attacks\.transfer\.triggers: required, but missing"),
        (("--attack", "quantize", "quantize.known=50"), r"attacks\.quantize: .*lower known"),
        (("--attack", "quantize", "seconds=0"), r"attacks\.seconds is 0"),
        (("--attack", "quantize", "sed=1"), r"sed.*did you mean 'seed'"),
        (("--attack", "quantize", "scored=/nowhere.jsonl"), r"scored: .*nowhere"),
        (("--attack", "quantize", "--original", "/nowhere"), r"--original: folder /nowhere"),
        (("--attack", "quantize", "--patch", "/nowhere"), r"/nowhere"),
    ],
)
def test_a_mistake_is_one_line_that_names_it_and_nothing_is_written(tiny, call, tmp_path, arguments, message):
    data = (f"forget={tiny.forget}", f"retain={tiny.retain}", "device=cpu")
    ended = call("attack", tiny.model, *data, "--out", tmp_path / "out", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert len(ended.err.splitlines()) == 1, ended.err
    assert re.search(message, ended.err), ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lacking", ["forget", "retain"])
def test_records_that_are_needed_are_asked_for(tiny, call, tmp_path, lacking):
    data = [f"{key}={getattr(tiny, key)}" for key in ("forget", "retain") if key != lacking]
    ended = call("attack", tiny.model, *data, "--attack", "quantize", "--out", tmp_path / "out")
    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert f"{lacking}=FILE" in ended.err


# an output folder that is in use


def test_a_used_folder_is_not_changed_by_another_battery(quick, call, tmp_path):
    whole, command = quick
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    before = files(out)
    for arguments, word in (
        ((), "--overwrite"),
        (("--resume", "seed=3"), "seed"),
        (("--resume", "--attack", "prune"), "attacks.prune"),
        (("--resume", "quantize.known=4"), "known"),
    ):
        ended = call(*command, out, *arguments)
        assert (ended.code, len(ended.err.splitlines())) == (2, 1)
        assert word in ended.err
        assert files(out) == before


def test_other_weights_or_data_on_resume_are_refused(quick, tiny, call, tmp_path):
    whole, command = quick
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    settings = yaml.safe_load((out / "attack.yaml").read_text())
    assert set(settings["content"]) == {"weights.unlearned", "forget", "scored", "retain", "utility"}
    for key in settings["content"]:
        changed = merged(settings, {"content": {key: "0" * 64}})
        (out / "attack.yaml").write_text(yaml.safe_dump(changed))
        ended = call(*command, out, "--resume")
        assert (ended.code, len(ended.err.splitlines())) == (2, 1)
        assert f"content.{key}" in ended.err


def test_overwrite_begins_anew_and_leaves_what_is_not_ours(quick, call, tmp_path):
    whole, command = quick
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    for foreign in ("notes.txt", "attacks/mine.json", "attacks/unlearned.quantize.txt"):
        (out / foreign).write_text("mine")
        before = files(out)
        ended = call(*command, out, "--overwrite")
        assert (ended.code, len(ended.err.splitlines())) == (2, 1)
        assert foreign in ended.err
        assert files(out) == before
        (out / foreign).unlink()
    assert call(*command, out, "--overwrite", "seed=3").code == 0
    assert set(files(out)) == set(files(whole))
