"""Deletion requests one after another: what each stands on, what it may not teach again, and what can be taken back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import FORGET_ROWS, RETAIN_ROWS, write_lines
from safetensors.torch import load_file, save_file

from falcon_unlearn import cli
from falcon_unlearn.api import apply_patch, load_recipe, revert_patch, unlearn, verify_patch
from falcon_unlearn.artifacts import read_jsonl
from falcon_unlearn.compare import _score_folder, run_plan
from falcon_unlearn.console import Console
from falcon_unlearn.corpus.batching import Encoder
from falcon_unlearn.corpus.records import record_from_row
from falcon_unlearn.corpus.sources import CorpusConfig, load_corpus
from falcon_unlearn.earlier import earlier_requests, key_digest, without_forgotten
from falcon_unlearn.errors import UserError
from falcon_unlearn.evaluation.scoring import score_set
from falcon_unlearn.grid import Plan, load_grid, plan_grid
from falcon_unlearn.model.ancestry import LEDGER_FILE
from falcon_unlearn.model.loading import load_causal_lm, load_tokenizer, resolve_model
from falcon_unlearn.model.patch import ORIGINAL_FILE, PATCH_FILE, apply_stack, read_patch
from falcon_unlearn.model.patched import load_patched, read_patches, read_stack
from falcon_unlearn.recipe import recipe_from
from falcon_unlearn.recompute import recompute_without, stack_on
from falcon_unlearn.report.curve import sustainability_figure, sustainability_table
from falcon_unlearn.subjects import ModelRequest, known_model, run_defaults
from falcon_unlearn.sustainability import sustainability

WEEKS = [FORGET_ROWS[4 * k : 4 * k + 4] for k in range(3)]
CHANGES = (
    {"selection": {"layers": [1]}, "training": {"steps": 8, "modules": "mlp"}},
    {"selection": {"layers": [2]}, "training": {"steps": 8, "modules": "mlp"}},  # tensors that week 1 leaves alone
    {"method": {"name": "npo"}, "selection": {"layers": [1]}, "training": {"steps": 8}},  # the whole model's forward
)


def source(folder):
    return resolve_model(str(folder), Path(folder), device="cpu")


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def same_weights(ours, theirs):
    pairs = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
    return all(name == other and torch.equal(value, expected) for (name, value), (other, expected) in pairs)


def week_recipe(tiny_recipe, folder, number, **changes):
    """Week ``number`` (from 1), run in ``folder``: its person is to be forgotten, retain is everyone."""
    everyone = write_lines(folder / "everyone.jsonl", [*FORGET_ROWS, *RETAIN_ROWS])
    asking = write_lines(folder / f"asking{number}.jsonl", WEEKS[number - 1])
    utility = write_lines(folder / "utility.jsonl", RETAIN_ROWS[:12])
    recipe = tiny_recipe(
        {
            **CHANGES[number - 1],
            "corpus": {"forget": {"source": str(asking)}, "retain": {"source": str(everyone)}, "on_overlap": "drop"},
        },
        folder / f"week{number}",
    )
    recipe["evaluation"] = {"max_new_tokens": 8, "retain": {"source": str(utility)}}
    return {**recipe, **changes}


@pytest.fixture(scope="module")
def weeks(tiny_recipe, tmp_path_factory):
    """Three requests, each after the one before; tests only look at them."""
    folder = tmp_path_factory.mktemp("weeks")
    runs = []
    for number in (1, 2, 3):
        after = [str(runs[-1].folder)] if runs else []
        runs.append(unlearn(week_recipe(tiny_recipe, folder, number, after=after)))
    return runs


@pytest.fixture(scope="module")
def checkpoints(tiny, weeks, tmp_path_factory):
    """The base and the three patches applied in order, each to the checkpoint before."""
    folder = tmp_path_factory.mktemp("checkpoints")
    made = [tiny.model]
    for number, run in enumerate(weeks, start=1):
        apply_patch(made[-1], run.patch.folder, folder / str(number))
        made.append(folder / str(number))
    return made


# what a run stands on


def test_the_ancestry_lists_the_patches_below_in_order(weeks):
    patches = [read_patch(run.patch.folder) for run in weeks]
    for number, patch in enumerate(patches):
        assert [ancestor.id for ancestor in patch.ancestry] == [below.id for below in patches[:number]]
        assert [ancestor.folder for ancestor in patch.ancestry] == [str(run.patch.folder) for run in weeks[:number]]
    assert len({patch.id for patch in patches}) == 3
    assert len({patch.provenance["model_fingerprint"] for patch in patches}) == 1  # the base's, whatever lies on it


def test_a_run_after_a_patch_is_a_run_on_the_checkpoint_that_has_it(tiny_recipe, weeks, checkpoints, tmp_path):
    for number in (2, 3):
        recipe = week_recipe(tiny_recipe, tmp_path, number, model=str(checkpoints[number - 1]))
        gone = [str(record["question"]) for week in WEEKS[: number - 1] for record in week]
        left = [row for row in [*FORGET_ROWS, *RETAIN_ROWS] if row["question"] not in gone]
        write_lines(tmp_path / "everyone.jsonl", left)
        on_disk, in_memory = unlearn(recipe), weeks[number - 1]
        for file in (PATCH_FILE, ORIGINAL_FILE):
            assert (on_disk.patch.folder / file).read_bytes() == (in_memory.patch.folder / file).read_bytes()
        for model in ("before", "after"):
            assert read_jsonl(on_disk.folder / f"scores/{model}.jsonl") == read_jsonl(
                in_memory.folder / f"scores/{model}.jsonl"
            )
        shutil.rmtree(on_disk.folder)


def test_no_checkpoint_is_written_and_the_base_stays_as_it_was(tiny, weeks, checkpoints):
    assert not [path for run in weeks for path in run.folder.rglob("model*.safetensors")]
    assert contents(tiny.model) == contents(checkpoints[0])
    assert sorted(path.name for path in tiny.model.parent.iterdir()) == ["forget.jsonl", "model", "retain.jsonl"]


def test_patches_applied_in_order_are_the_runs_final_weights(tiny, weeks, checkpoints):
    for number in (1, 2, 3):
        patch = read_patch(weeks[number - 1].patch.folder)
        stored = load_file(checkpoints[number] / "model.safetensors")
        for name, value in load_file(patch.folder / PATCH_FILE).items():
            assert torch.equal(stored[name], value)
        in_memory = load_patched(source(tiny.model), read_patches(source(tiny.model), [patch.folder]))
        assert same_weights(in_memory, load_causal_lm(source(checkpoints[number])))


def test_a_whole_stack_in_one_go_is_the_patches_one_by_one(tiny, weeks, checkpoints, call, tmp_path):
    stack = read_stack([weeks[2].patch.folder])
    apply_stack(stack, tiny.model, tmp_path / "from-base")
    apply_stack(stack, checkpoints[1], tmp_path / "from-week1")
    apply_stack(stack, checkpoints[2], tmp_path / "from-week2", link=True)
    for made in ("from-base", "from-week1", "from-week2"):
        assert contents(tmp_path / made) == contents(checkpoints[3])
    with pytest.raises(UserError, match="already patched"):
        apply_stack(stack, checkpoints[3], tmp_path / "again")
    out = tmp_path / "by-command"
    assert call("patch", "apply", weeks[2].patch.folder, "--model", tiny.model, "--out", out, "--stack").code == 0
    assert contents(out) == contents(checkpoints[3])


def test_a_stack_on_another_model_is_refused(weeks, checkpoints, oracle, tmp_path):
    with pytest.raises(UserError, match="wrong base"):
        apply_stack(read_stack([weeks[2].patch.folder]), oracle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_folder_of_a_run_brings_all_that_it_stands_on(weeks, checkpoints, tmp_path):
    defaults = run_defaults(str(weeks[2].folder))
    request = ModelRequest(model=defaults["model"], patches=tuple(defaults["patches"]), output="x", device="cpu")
    model = known_model(request, request.model, "MODEL", request.patches).load()
    assert same_weights(model, load_causal_lm(source(checkpoints[3])))


def test_what_already_lies_on_the_base_is_not_laid_on_it_again(weeks, checkpoints):
    base = source(checkpoints[2])
    patches = read_patches(base, [weeks[2].patch.folder])
    assert [patch.folder for patch in patches] == [weeks[2].patch.folder]
    assert same_weights(load_patched(base, patches), load_causal_lm(source(checkpoints[3])))


# apply and revert


def test_revert_of_the_last_gives_every_state_back_byte_for_byte(weeks, checkpoints, tmp_path):
    for number in (3, 2, 1):
        out = tmp_path / f"back-{number}"
        revert_patch(weeks[number - 1].patch.folder, checkpoints[number], out)
        assert contents(out) == contents(checkpoints[number - 1])
    model = shutil.copytree(checkpoints[3], tmp_path / "in-place")
    for number in (3, 2, 1):
        revert_patch(weeks[number - 1].patch.folder, model)
        assert contents(model) == contents(checkpoints[number - 1])


def test_a_revert_in_place_that_was_stopped_before_its_list_is_finished(weeks, checkpoints, tmp_path):
    model = shutil.copytree(checkpoints[3], tmp_path / "model")
    revert_patch(weeks[2].patch.folder, model)
    shutil.copyfile(checkpoints[3] / LEDGER_FILE, model / LEDGER_FILE)  # shards are renamed first, the list after them
    revert_patch(weeks[2].patch.folder, model)
    assert contents(model) == contents(checkpoints[2])


@pytest.mark.parametrize(("patch", "on", "missing"), [(2, 0, 1), (3, 0, 1), (3, 1, 2)])
def test_apply_without_what_is_below_is_refused_and_names_it(weeks, checkpoints, call, tmp_path, patch, on, missing):
    out = tmp_path / "out"
    ended = call("patch", "apply", weeks[patch - 1].patch.folder, "--model", checkpoints[on], "--out", out)
    lacking = weeks[missing - 1].patch
    assert ended.code == 2
    assert len(ended.errors) == 1
    assert f"lacks the patch {read_patch(lacking.folder).id[:12]} ({lacking.folder})" in ended.errors[0]
    assert not out.exists()
    verified = verify_patch(weeks[patch - 1].patch.folder, checkpoints[on])
    assert verified.lacks.folder == str(lacking.folder)
    assert call("patch", "verify", weeks[patch - 1].patch.folder, "--model", checkpoints[on]).code == 2


def test_a_model_that_only_resembles_what_is_below_is_a_wrong_base(weeks, checkpoints, tmp_path):
    """Week 2 leaves week 1's tensors alone, so its own are as they should be."""
    model, patch = shutil.copytree(checkpoints[1], tmp_path / "model"), weeks[1].patch.folder
    weights = load_file(model / "model.safetensors")
    name = next(iter(read_patch(weeks[0].patch.folder).tensors))
    weights[name][0, 0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="wrong base"):
        apply_patch(model, patch, tmp_path / "out")
    report = verify_patch(patch, model)
    assert (report.state, [mismatch.name for mismatch in report.mismatches]) == ("other", [name])


def test_in_memory_too(weeks, checkpoints):
    model = load_causal_lm(source(checkpoints[0]))
    with pytest.raises(UserError, match="lacks the patch"):
        apply_patch(model, weeks[1].patch.folder)
    apply_patch(model, weeks[0].patch.folder)
    apply_patch(model, weeks[1].patch.folder)
    assert same_weights(model, load_causal_lm(source(checkpoints[2])))


@pytest.mark.parametrize(("patch", "on", "above"), [(1, 2, [2]), (1, 3, [2, 3]), (2, 3, [3])])
def test_revert_in_the_middle_is_refused_and_names_what_stands_on_it(
    weeks, checkpoints, call, tmp_path, patch, on, above
):
    model = shutil.copytree(checkpoints[on], tmp_path / "model")
    for out in ((), ("--out", tmp_path / "out")):
        ended = call("patch", "revert", weeks[patch - 1].patch.folder, "--model", model, *out)
        assert ended.code == 2
        assert len(ended.errors) == 1
        assert "is not the last patch on it" in ended.errors[0]
        assert "--recompute" in ended.errors[0]
        for number in above:
            assert str(weeks[number - 1].patch.folder) in ended.errors[0]
    assert contents(model) == contents(checkpoints[on])
    assert not (tmp_path / "out").exists()


def test_a_patch_that_stands_beside_the_line_is_refused(tiny_recipe, weeks, checkpoints, tmp_path):
    recipe = week_recipe(tiny_recipe, tmp_path, 2, after=[str(weeks[0].folder)], evaluation={"enabled": False})
    beside = unlearn({**recipe, "selection": {"layers": [0]}})  # tensors that no other week touches
    with pytest.raises(UserError, match=r"does not stand: run its request again with --after .*week2"):
        apply_patch(checkpoints[2], beside.patch.folder, tmp_path / "out")
    with pytest.raises(UserError, match="does not stand on"):
        earlier_requests([str(beside.folder), str(weeks[2].folder)])


def test_info_lists_the_ancestry(weeks, call):
    told = call("patch", "info", weeks[2].patch.folder).out
    ids = [read_patch(run.patch.folder).id for run in weeks]
    assert told.index(f"stands on    {ids[0][:12]}") < told.index(f"and then   {ids[1][:12]}")
    as_json = json.loads(call("patch", "info", weeks[2].patch.folder, "--json").out)
    assert as_json["id"] == ids[2]
    assert [ancestor["id"] for ancestor in as_json["ancestry"]] == ids[:2]


# ancestors that are not what or where they were


@pytest.fixture
def moved(weeks, tmp_path):
    """Copies of the three runs; their patches record the places of the originals, which are hidden meanwhile."""
    folder = weeks[0].folder.parent
    copies = shutil.copytree(folder, tmp_path / "moved")
    hidden = folder.rename(folder.with_name("hidden"))
    yield copies
    hidden.rename(folder)


def test_runs_that_moved_together_are_found(moved):
    requests = earlier_requests([str(moved / "week3")])
    assert [request.folder for request in requests] == [moved / "week1", moved / "week2", moved / "week3"]


def test_a_missing_ancestor_is_named_and_may_be_shown(moved, tmp_path):
    elsewhere = (moved / "week1").rename(tmp_path / "archive")
    with pytest.raises(UserError, match=r"stands on the patch \w{12} \(.*week1/patch\), which is not there"):
        earlier_requests([str(moved / "week3")])
    requests = earlier_requests([str(elsewhere), str(moved / "week3")])
    assert [request.folder for request in requests] == [elsewhere, moved / "week2", moved / "week3"]


@pytest.mark.parametrize("what", ["weights", "hashes", "ancestry"])
def test_a_tampered_ancestor_is_refused(moved, what):
    patch = moved / "week2" / "patch"
    if what == "weights":
        data = bytearray((patch / PATCH_FILE).read_bytes())
        data[-1] ^= 1
        (patch / PATCH_FILE).write_bytes(data)
    else:
        document = json.loads((patch / "patch.json").read_text())
        if what == "hashes":
            next(iter(document["tensors"].values()))["sha256_after"] = "0" * 64
        else:
            document["ancestry"] = []
        (patch / "patch.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="was altered" if what == "weights" else "is another one"):
        earlier_requests([str(moved / "week3")])


@pytest.mark.parametrize(("name", "message"), [("no-such", "neither a patch nor"), ("unfinished", "has no patch yet")])
def test_what_is_no_patch_is_refused(tiny_recipe, tmp_path, call, name, message):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "recipe.yaml").write_text("model: x\n")
    recipe = write_lines(tmp_path / "recipe.yaml", [week_recipe(tiny_recipe, tmp_path, 1)])
    ended = call("run", recipe, "--after", tmp_path / name)
    assert ended.code == 2
    assert message in ended.errors[0]
    assert not (tmp_path / "week1").exists()


def test_another_base_is_refused_before_anything_is_written(tiny_recipe, oracle, weeks, tmp_path):
    with pytest.raises(UserError, match="is not the one the patch was made for"):
        unlearn(week_recipe(tiny_recipe, tmp_path, 2, model=str(oracle), after=[str(weeks[0].folder)]))
    assert not (tmp_path / "week2").exists()


def test_a_resumed_run_must_stand_on_what_it_began_on(tiny_recipe, weeks, tmp_path):
    recipe = week_recipe(tiny_recipe, tmp_path, 3, after=[str(weeks[0].folder)], evaluation={"enabled": False})
    unlearn(recipe)
    assert unlearn(recipe, resume=True).patch.ancestry[0].folder == str(weeks[0].patch.folder)
    with pytest.raises(UserError, match="another recipe"):
        unlearn({**recipe, "after": [str(weeks[1].folder)]}, resume=True)


# earlier forget sets do not come back


def corpus_of(tmp_path, rule, forget, retain):
    config = {
        "forget": str(write_lines(tmp_path / "f.jsonl", forget)),
        "retain": str(write_lines(tmp_path / "r.jsonl", retain)),
        "on_overlap": rule,
    }
    return load_corpus(CorpusConfig.model_validate(config), tmp_path)


def test_what_was_forgotten_earlier_is_not_retained(weeks, tmp_path):
    requests = earlier_requests([str(weeks[1].folder)])
    corpus = corpus_of(tmp_path, "drop", WEEKS[2], [*WEEKS[0], *RETAIN_ROWS, WEEKS[1][2]])
    kept, lines = without_forgotten(corpus, requests)
    assert [record.prompt for record in kept.retain["retain"]] == [row["question"] for row in RETAIN_ROWS]
    assert kept.report.records == {"forget": 4, "retain": len(RETAIN_ROWS)}
    assert kept.forget == corpus.forget
    assert kept.hashes["retain"] == corpus_of(tmp_path, "drop", WEEKS[2], RETAIN_ROWS).hashes["retain"]
    assert len(lines) == 1
    assert lines[0].startswith("5 retain records were forgotten earlier")


def test_the_rule_for_overlaps_decides(weeks, tmp_path):
    requests = earlier_requests([str(weeks[0].folder)])
    with pytest.raises(UserError, match=r"1 retain records were forgotten earlier \(first: .*r.jsonl:2, by .*week1\)"):
        without_forgotten(corpus_of(tmp_path, "error", WEEKS[2], [RETAIN_ROWS[0], WEEKS[0][0]]), requests)
    corpus = corpus_of(tmp_path, "allow", WEEKS[2], [RETAIN_ROWS[0], WEEKS[0][0]])
    same, lines = without_forgotten(corpus, requests)
    assert same is corpus
    assert "kept in training" in lines[0]
    with pytest.raises(UserError, match="every record of 'retain'"):
        without_forgotten(corpus_of(tmp_path, "drop", WEEKS[2], WEEKS[0]), requests)
    untouched = corpus_of(tmp_path, "error", WEEKS[2], RETAIN_ROWS)
    assert without_forgotten(untouched, requests) == (untouched, [])


def test_the_runs_left_earlier_people_out(weeks):
    kept = [json.loads((run.folder / "corpus.json").read_text())["report"]["records"]["retain"] for run in weeks]
    assert kept == [36, 32, 28]


def test_the_run_folder_knows_forgotten_records_without_their_text(weeks):
    text = (weeks[0].folder / "corpus.json").read_text()
    expected = [key_digest(record_from_row(row, "")) for row in WEEKS[0]]
    assert json.loads(text)["forgotten"] == expected
    assert not any(row["answer"] in text for row in WEEKS[0])


def test_records_that_are_gone_are_still_kept_out_and_said_to_be_unscored(tiny_recipe, moved, call, tmp_path):
    """``moved`` leaves the forget files behind."""
    recipe = week_recipe(tiny_recipe, tmp_path, 2, after=[str(moved / "week1")])
    ended = call("run", write_lines(tmp_path / "recipe.yaml", [recipe]))
    assert ended.code == 0
    assert "4 retain records were forgotten earlier" in ended.err
    assert "is not scored again" in ended.err
    metrics = json.loads((tmp_path / "week2" / "metrics.json").read_text())
    assert metrics["after"]["suites"] == {}
    (moved / "week1" / "corpus.json").unlink()
    recipe = write_lines(tmp_path / "recipe.yaml", [{**recipe, "output": str(tmp_path / "again")}])
    ended = call("run", recipe)
    assert ended.code == 2
    assert "cannot tell whether retain holds records" in ended.errors[0]


def test_forget_files_that_are_used_again_for_others_are_noticed(tiny_recipe, tmp_path):
    first = unlearn(week_recipe(tiny_recipe, tmp_path, 1, evaluation={"enabled": False}))
    write_lines(tmp_path / "asking1.jsonl", WEEKS[1])
    request = earlier_requests([str(first.folder)])[0]
    with pytest.raises(UserError, match="holds other records now"):
        request.scored_records()
    assert request.digests() == {key_digest(record_from_row(row, "")) for row in WEEKS[0]}


def test_earlier_forget_sets_are_scored_again_as_by_hand(weeks, checkpoints):
    model = load_causal_lm(source(checkpoints[3]))
    encoder = Encoder(load_tokenizer(source(checkpoints[3])))
    found = weeks[2].metrics["after"].suites["earlier"].metrics
    for number in (1, 2):
        records = [record_from_row(row, "") for row in WEEKS[number - 1]]
        scores = score_set(model, encoder, records, "x", batch_size=32, max_new_tokens=8, device="cpu")
        for measure in ("accuracy", "probability"):
            values = [getattr(score, measure) for score in scores]
            assert found[f"request_{number}_{measure}"].value == pytest.approx(sum(values) / len(values), abs=1e-6)
            assert found[f"request_{number}_{measure}"].n == 4
    # and before a request they are as the one before left them
    before = weeks[2].metrics["before"].suites["earlier"].metrics["request_2_probability"].value
    assert before == pytest.approx(weeks[1].metrics["after"].forget_probability, abs=1e-6)


def test_the_command_prints_them(weeks, capfd):
    cli._print_run(weeks[2], as_json=False)
    told = capfd.readouterr().out
    assert [word in told for word in ("earlier forget sets", "request 1 accuracy", "request 2 probability")] == [
        True
    ] * 3
    cli._print_run(weeks[0], as_json=False)
    assert "earlier" not in capfd.readouterr().out


def test_they_need_not_be_scored(tiny_recipe, weeks, tmp_path):
    recipe = week_recipe(tiny_recipe, tmp_path, 2, after=[str(weeks[0].folder)])
    recipe["evaluation"] = {**recipe["evaluation"], "earlier": False}
    assert unlearn(recipe).metrics["after"].suites == {}


def test_the_report_shows_what_the_patch_stands_on_and_the_earlier_sets(weeks):
    page = (weeks[2].folder / "report.html").read_text()
    assert "It stands on 2 earlier patches" in page
    assert read_patch(weeks[0].patch.folder).id[:12] in page
    assert "request 1 probability" in page
    assert " --stack --out" in page
    ids = [read_patch(run.patch.folder).id for run in weeks]
    assert f"`{ids[0][:16]}`, `{ids[1][:16]}`" in (weeks[2].folder / "model_card.md").read_text()
    assert json.loads((weeks[2].folder / "provenance.json").read_text())["after"] == ids[:2]
    assert "It stands on" not in (weeks[0].folder / "report.html").read_text()


def test_the_recipe_keeps_what_the_run_stands_on(weeks):
    assert load_recipe(weeks[2].folder / "recipe.yaml").after == (str(weeks[1].folder),)


# taking a request out of the middle


def test_recomputing_is_running_the_later_requests_after_the_remaining_ones(tiny_recipe, weeks, call, tmp_path):
    before = {run.folder: contents(run.folder) for run in weeks}
    ended = call(
        "patch", "revert", weeks[1].patch.folder, "--model", weeks[2].folder, "--recompute", "--out", tmp_path / "new"
    )
    assert ended.code == 0
    assert f"patch apply {tmp_path / 'new' / 'week3' / 'patch'} --stack" in ended.out
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["week3"]
    made = read_patch(tmp_path / "new" / "week3" / "patch")
    assert [ancestor.folder for ancestor in made.ancestry] == [str(weeks[0].patch.folder)]
    direct = unlearn(week_recipe(tiny_recipe, tmp_path, 3, after=[str(weeks[0].folder)]))
    assert (made.folder / PATCH_FILE).read_bytes() == (direct.patch.folder / PATCH_FILE).read_bytes()
    assert made.id == read_patch(direct.patch.folder).id
    assert {run.folder: contents(run.folder) for run in weeks} == before


def test_recomputing_goes_on_after_an_interruption_and_without_the_first(weeks, checkpoints, tmp_path, monkeypatch):
    from falcon_unlearn import recompute

    whole, calls = recompute.run_recipe, []

    def stopped(recipe, **options):
        calls.append(recipe)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(recipe, **options)

    patch, stack = read_patch(weeks[0].patch.folder), stack_on(str(checkpoints[3]))  # its list says what lies on it
    assert [below.folder for below in stack] == [run.patch.folder for run in weeks]
    monkeypatch.setattr(recompute, "run_recipe", stopped)
    with pytest.raises(KeyboardInterrupt):
        recompute_without(patch, stack, tmp_path, Console(quiet=True))
    first = contents(tmp_path / "week2")
    runs = recompute_without(patch, stack, tmp_path, Console(quiet=True))
    assert contents(tmp_path / "week2") == first
    made = [read_patch(run.patch.folder) for run in runs]
    assert [len(below.ancestry) for below in made] == [0, 1]
    assert made[1].ancestry[0].id == made[0].id


def test_recomputing_tells_runs_of_one_name_apart(weeks, tmp_path):
    same_name = [shutil.copytree(run.folder, tmp_path / run.folder.name / "run") for run in weeks]
    stack = read_stack([folder / "patch" for folder in same_name])
    runs = recompute_without(stack[0], stack, tmp_path / "new", Console(quiet=True))
    assert [run.folder for run in runs] == [tmp_path / "new" / "run", tmp_path / "new" / "run-2"]
    made = [read_patch(run.patch.folder) for run in runs]
    assert [[below.id for below in patch.ancestry] for patch in made] == [[], [made[0].id]]
    for run, old in zip(runs, same_name[1:], strict=True):
        assert load_recipe(run.folder / "recipe.yaml").corpus == load_recipe(old / "recipe.yaml").corpus
    with pytest.raises(UserError, match=r"--out .*week2: would replace the run .*week2/run; name another"):
        recompute_without(stack[0], stack, tmp_path / "week2", Console(quiet=True))


@pytest.mark.parametrize(
    ("patch", "model", "message"),
    [
        (3, "weeks/3", "nothing stands on it"),
        (3, "weeks/2", "is not below"),
        (1, "checkpoints/1", "does not say which patches"),
        (2, "nowhere", "neither a patch nor"),
        (2, "same folder", "would replace the run"),
        (2, "no out", "--out is needed"),
    ],
)
def test_what_cannot_be_recomputed(weeks, checkpoints, call, tmp_path, patch, model, message):
    kind, _, number = model.partition("/")
    places = {"weeks": [tmp_path, *(run.folder for run in weeks)], "checkpoints": checkpoints}
    place = places[kind][int(number)] if number else weeks[2].folder if model != "nowhere" else tmp_path / "nowhere"
    out = weeks[0].folder.parent if model == "same folder" else tmp_path / "out"
    ended = call(
        "patch", "revert", weeks[patch - 1].patch.folder, "--model", place, "--recompute",
        *(() if model == "no out" else ("--out", out)),
    )  # fmt: skip
    assert ended.code == 2
    assert len(ended.errors) == 1
    assert message in ended.errors[0]
    assert not (tmp_path / "out").exists()


# a grid of runs on them


def test_runs_share_scores_only_on_the_same_patches(tiny_recipe, weeks, tmp_path):
    recipe = recipe_from(week_recipe(tiny_recipe, tmp_path, 3))
    copied = shutil.copytree(weeks[0].folder, tmp_path / "copied")
    bare, first, second, copy = (
        _score_folder(Plan(tmp_path, (), (0,)), recipe.model_copy(update={"after": tuple(map(str, after))}))
        for after in ([], [weeks[0].folder], [weeks[1].folder], [copied])
    )
    assert first == copy
    assert len({bare, first, second}) == 3


def test_a_grid_scores_the_model_that_lies_below_and_no_other(tiny_recipe, weeks, tmp_path):
    recipe = week_recipe(tiny_recipe, tmp_path, 1)
    (tmp_path / "base.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    path = tmp_path / "grid.yaml"

    def table(after):
        shared = {"training.steps": 2, **({"after": after} if after else {})}
        grid = {"base": "base.yaml", "output": str(tmp_path / "out"), "seeds": [0], "shared": shared}
        path.write_text(json.dumps({**grid, "cells": {"a": {}}}), encoding="utf-8")
        return run_plan(plan_grid(load_grid(path), path, Console(quiet=True)), Console(quiet=True)).rows

    other = unlearn({**recipe, "seed": 1, "training": {"steps": 3, "modules": "mlp"}})
    shutil.copytree(other.folder, tmp_path / "below")
    expected = {
        "": weeks[0].metrics["before"],
        str(weeks[0].folder): weeks[0].metrics["after"],
        "below": other.metrics["after"],  # beside the base recipe
    }
    for after, metrics in expected.items():  # all in one output folder
        before = next(row for row in table(after) if row.name == "before")
        for measure in ("forget_probability", "model_utility"):
            assert before.values[measure] == pytest.approx([getattr(metrics, measure)])
    shutil.rmtree(tmp_path / "below")
    shutil.copytree(weeks[0].folder, tmp_path / "below")  # another patch where the other one was
    (row,) = table("below")
    assert row.failed[0].startswith("after: not what the run in")


# the curve


def test_the_curve_is_what_the_checkpoints_score_by_hand(weeks, checkpoints):
    curve = sustainability([str(weeks[2].folder)])
    encoder = Encoder(load_tokenizer(source(checkpoints[0])))
    assert [request.run for request in curve.requests] == [str(run.folder) for run in weeks]
    for point, folder in zip(curve.points, checkpoints, strict=True):
        model = load_causal_lm(source(folder))
        assert set(point.forget) == {*range(1, point.requests + 1), min(point.requests + 1, 3)}
        accuracies = []
        for number, values in point.forget.items():
            records = [record_from_row(row, "") for row in WEEKS[number - 1]]
            scores = score_set(model, encoder, records, "x", batch_size=32, max_new_tokens=8, device="cpu")
            for measure in ("accuracy", "probability"):
                by_hand = sum(getattr(score, measure) for score in scores) / len(scores)
                assert values[measure].value == pytest.approx(by_hand, abs=1e-6)
            if number <= point.requests:
                accuracies.append(sum(score.accuracy for score in scores) / len(scores))
        assert point.worst() == max(accuracies, default=None)
    utilities = [weeks[0].metrics["before"], *(run.metrics["after"] for run in weeks)]
    for point, metrics in zip(curve.points, utilities, strict=True):
        assert point.utility.value == metrics.model_utility
        assert (point.utility.low, point.utility.high) == metrics.intervals["model_utility"]
    assert curve.notes == ()


def test_the_command_writes_numbers_and_a_page(weeks, call, tmp_path):
    ended = call("sustainability", weeks[2].folder, "--out", tmp_path / "curve", "--json")
    stored = json.loads((tmp_path / "curve" / "sustainability.json").read_text())
    assert json.loads(ended.out)["sustainability"] == stored
    assert [point["requests"] for point in stored["points"]] == [0, 1, 2, 3]
    page = (tmp_path / "curve" / "sustainability.html").read_text()
    assert "<svg" in page
    assert "<script" not in page
    assert all(str(run.folder) in page for run in weeks)
    table = call("sustainability", weeks[2].folder, "--out", tmp_path / "curve").out
    utility = weeks[2].metrics["after"].model_utility
    assert any(line.startswith("3 ") and f"{utility:.3f}" in line for line in table.splitlines())


def test_one_request_is_a_curve_too(weeks):
    curve = sustainability([str(weeks[0].folder)])
    assert [point.requests for point in curve.points] == [0, 1]
    assert sustainability_figure(curve).startswith("<svg")


def test_what_the_curve_lacks_is_said(moved):
    for number in (2, 3):
        path = moved / f"week{number}" / "metrics.json"
        metrics = json.loads(path.read_text())
        del metrics["after"]["suites"]["earlier"]
        path.write_text(json.dumps(metrics))
    path = moved / "week3" / "corpus.json"
    facts = json.loads(path.read_text())
    facts["hashes"]["evaluation.retain"] = "0"
    path.write_text(json.dumps(facts))
    table = sustainability_table(sustainability([str(moved / "week3")]))
    assert "Utility is measured on other records from request 3 on" in table
    assert "the forget set of request 1 after request 2" in table
    (moved / "week2" / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"week2/metrics.json cannot be read"):
        sustainability([str(moved / "week3")])
