"""Grids and recipes side by side on the tiny model: one table, whatever fails, is stopped or is shared."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import merged
from scipy.stats import ttest_rel

from falcon_unlearn import compare, pipeline
from falcon_unlearn.compare import _claim, oracle_score_of, run_plan, score_of
from falcon_unlearn.console import Console
from falcon_unlearn.errors import UserError
from falcon_unlearn.grid import load_grid, plan_grid, plan_recipes
from falcon_unlearn.report.comparison import (
    Comparison,
    Row,
    beats,
    comparison_table,
    ranked,
    write_comparison,
)

SILENT = Console(quiet=True)
COSTS = ("training_seconds", "peak_memory_mb")
GRID = {
    "base": "base.yaml",
    "seeds": [0, 1],
    "shared": {"training": {"steps": 4, "checkpoint_every": 2}, "evaluation.max_new_tokens": 6, "threads": 1},
    "tuning": {"trials": 2, "seeds": [0, 2], "validation_share": 0.3},
    "cells": {
        "searched": {
            "method": {"name": "falcon", "preset": "layer"},
            "search": {
                "training.optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True},
                "training.modules": {"choices": ["mlp", ["down_proj"]]},
            },
        },
        "plain": {"method": "rmu", "training.optimizer.lr": 1e-3},
        "no-such-layer": {"selection.layers": [99]},
    },
}


def write_grid(folder, tiny_recipe, oracle, changes=None):
    """A grid file whose output lies beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    base = tiny_recipe({"evaluation": {"oracle": str(oracle)}}, folder / "unused")
    (folder / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    grid = merged({**GRID, "output": str(folder / "out")}, changes or {})
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid), encoding="utf-8")
    return folder / "grid.yaml"


def run_grid(path, workers=1):
    return run_plan(plan_grid(load_grid(path), path, SILENT), SILENT, workers=workers)


class Watch:
    """Counts what is run and what is scored."""

    def __init__(self, monkeypatch):
        self.runs, self.scored = [], []
        run_recipe, score = compare.run_recipe, pipeline._score

        def watched_run(recipe, **options):
            run = run_recipe(recipe, **options)
            self.runs.append((recipe, run))
            return run

        def watched_score(inputs, folder, name, model):
            self.scored.append((name, inputs.recipe.seed, inputs.recipe.evaluation.forget.source))
            return score(inputs, folder, name, model)

        monkeypatch.setattr(compare, "run_recipe", watched_run)
        monkeypatch.setattr(pipeline, "_score", watched_score)


@pytest.fixture(scope="module")
def done(tiny_recipe, oracle, tmp_path_factory):
    """The grid run once in one process; tests only look at it."""
    path = write_grid(tmp_path_factory.mktemp("grid"), tiny_recipe, oracle)
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        comparison = run_grid(path)
    return SimpleNamespace(path=path, out=path.parent / "out", table=comparison, runs=watch.runs, scored=watch.scored)


def row_of(comparison, name):
    return next(row for row in comparison.rows if row.name == name)


def without_costs(comparison):
    return [
        dataclasses.replace(row, values={key: value for key, value in row.values.items() if key not in COSTS})
        for row in comparison.rows
    ]


def naive_score(run):
    before, after = run.metrics["before"], run.metrics["after"]
    leak = 0.5 * after.forget_probability + 0.5 * after.forget_accuracy
    return after.model_utility / before.model_utility - leak


def is_trial(recipe):
    return "/trials/" in recipe.output


# what a grid gives


def test_a_row_is_the_mean_over_seeds_of_its_runs(done):
    finals = {(Path(r.output).parent.name, r.seed): run for r, run in done.runs if not is_trial(r)}
    assert set(finals) == {(cell, seed) for cell in ("searched", "plain") for seed in (0, 1)}
    for cell in ("searched", "plain"):
        row = row_of(done.table, cell)
        scores = [naive_score(finals[cell, seed]) for seed in (0, 1)]
        assert row.values["score"] == pytest.approx(scores)
        assert row.mean("score") == pytest.approx(sum(scores) / 2)
        assert row.sd("score") == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
        after = [finals[cell, seed].metrics["after"] for seed in (0, 1)]
        assert row.values["forget_quality"] == tuple(m.forget_quality for m in after)
        assert row.values["leak"] == pytest.approx([k - s for k, s in zip(row.values["kept"], scores, strict=True)])
        assert all(seconds > 0 for seconds in row.values["training_seconds"])


def test_the_original_model_and_the_oracle_are_rows_too(done):
    before, oracle = row_of(done.table, "before"), row_of(done.table, "oracle")
    assert before.reference
    assert before.values["kept"] == (1.0, 1.0)
    assert oracle.values["forget_quality"] == pytest.approx((1.0, 1.0))
    assert done.table.rows[:2] == (before, oracle)


def test_a_failing_cell_is_a_row_that_says_why(done):
    row = done.table.rows[-1]
    assert row.name == "no-such-layer"
    assert not row.values
    assert set(row.failed) == {0, 1}
    assert "layer 99 is out of range" in row.failed[0]
    assert not done.table.defects
    assert "no-such-layer failed (seed 0, 1): selection.layers: layer 99" in (done.out / "table.md").read_text()


def test_the_original_model_and_the_oracle_are_scored_once_for_all_runs(done):
    for name in ("before", "oracle"):
        once = [entry for entry in done.scored if entry[0] == name]
        assert len(once) == len(set(once))
    assert len([entry for entry in done.scored if entry[0] == "before"]) == 4  # seeds 0, 1 and tuning seeds 0, 2
    assert len([entry for entry in done.scored if entry[0] == "oracle"]) == 2


def test_what_trials_are_judged_on_is_never_in_the_table(done):
    seen = {True: set(), False: set()}
    for recipe, _ in done.runs:
        for name in ("forget", "retain"):
            source = Path(getattr(recipe.evaluation, name).source)
            seen[is_trial(recipe)] |= {json.loads(line)["answer"] for line in source.read_text().splitlines()}
    assert seen[True]
    assert seen[True].isdisjoint(seen[False])
    assert len({recipe.corpus.model_dump_json() for recipe, _ in done.runs if recipe.method.name == "falcon"}) == 1


def test_parameters_are_the_best_on_validation_facts(done):
    trials = [(r, run) for r, run in done.runs if is_trial(r)]
    assert len(trials) == 2 * 2  # trials times tuning seeds; cells without a search get none
    means = {}
    for recipe, run in trials:
        means.setdefault((recipe.training.optimizer.lr, recipe.training.modules), []).append(naive_score(run))
    rate, modules = max(means, key=lambda chosen: sum(means[chosen]) / 2)
    row = row_of(done.table, "searched")
    assert row.parameters["training.optimizer.lr"] == rate
    assert row.validation_score == pytest.approx(sum(means[rate, modules]) / 2)
    for recipe, _ in done.runs:
        if not is_trial(recipe) and recipe.method.name == "falcon":
            assert (recipe.training.optimizer.lr, recipe.training.modules) == (rate, modules)
    assert not (done.out / "trials" / "searched" / "0").exists()


def test_files_of_a_comparison(done):
    table = json.loads((done.out / "table.json").read_text())
    assert [row["name"] for row in table["rows"]] == [row.name for row in done.table.rows]
    assert (done.out / "pareto.svg").read_text().startswith("<svg xmlns=")
    page = (done.out / "compare.html").read_text()
    assert "<svg" in page
    assert "no-such-layer" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")


# going on


def test_a_second_call_runs_nothing_but_what_failed(done, monkeypatch):
    watch = Watch(monkeypatch)
    again = run_grid(done.path)
    assert (watch.runs, watch.scored) == ([], [])
    assert again == done.table


def test_a_lost_result_is_read_back_from_its_run_folder(done, monkeypatch):
    (done.out / "results" / "plain" / "seed-1.json").unlink()
    watch = Watch(monkeypatch)
    again = run_grid(done.path)
    assert len(watch.runs) == 1
    assert watch.scored == []
    assert without_costs(again) == without_costs(done.table)


def test_stopped_anywhere_it_ends_with_the_same_table(done, tiny_recipe, oracle, tmp_path, monkeypatch):
    path = write_grid(tmp_path, tiny_recipe, oracle)
    run_recipe = compare.run_recipe
    for stop_at in (2, 4):  # in the first trial, in the second
        calls = []

        def stopped(recipe, calls=calls, stop_at=stop_at, **options):
            calls.append(recipe)
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            return run_recipe(recipe, **options)

        monkeypatch.setattr(compare, "run_recipe", stopped)
        with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
            run_grid(path)
    monkeypatch.setattr(compare, "run_recipe", run_recipe)
    assert without_costs(run_grid(path)) == without_costs(done.table)


def test_two_workers_make_the_same_table_as_one(done, tiny_recipe, oracle, tmp_path):
    assert without_costs(run_grid(write_grid(tmp_path, tiny_recipe, oracle), workers=2)) == without_costs(done.table)


def test_a_killed_worker_leaves_no_claim(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from falcon_unlearn.compare import _claim\n"
        "with _claim(Path(sys.argv[1])) as deaths:\n    print(deaths, flush=True); time.sleep(60)"
    )
    path = tmp_path / "claims" / "job"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "0\n"
        with _claim(path) as deaths:
            assert deaths is None
        other.send_signal(signal.SIGKILL)
        other.wait()
    time.sleep(0.05)
    with _claim(path) as deaths:
        assert deaths == 1
    with _claim(path) as deaths:
        assert deaths == 0


def test_a_changed_cell_is_run_anew_and_the_others_are_not(done, tiny_recipe, oracle, tmp_path, monkeypatch):
    small = {"seeds": [0], "cells": {"searched": {"search": {}}, "no-such-layer": {"selection.layers": [0]}}}
    grid = write_grid(tmp_path, tiny_recipe, oracle, small)
    raw = yaml.safe_load(grid.read_text())
    raw["cells"]["searched"].pop("search")
    grid.write_text(yaml.safe_dump(raw))
    first = run_grid(grid)
    raw["cells"]["plain"]["training.optimizer.lr"] = 2e-3
    grid.write_text(yaml.safe_dump(raw))
    watch = Watch(monkeypatch)
    second = run_grid(grid)
    assert [recipe.method.name for recipe, _ in watch.runs] == ["rmu"]
    assert [entry[0] for entry in watch.scored] == ["after"]
    assert row_of(second, "searched") == row_of(first, "searched")
    assert row_of(second, "plain").values["score"] != row_of(first, "plain").values["score"]


def test_a_defect_is_a_row_too_and_called_one(tiny_recipe, oracle, tmp_path, monkeypatch):
    def broken(recipe, **options):
        if recipe.method.name == "rmu":
            raise KeyError("oops")
        raise MemoryError

    monkeypatch.setattr(compare, "run_recipe", broken)
    table = run_grid(write_grid(tmp_path, tiny_recipe, oracle, {"seeds": [0]}))
    assert row_of(table, "plain").failed == {0: "defect: KeyError: 'oops'"}
    assert row_of(table, "searched").failed == {0: "all 2 trials failed, the last with: out of memory"}
    assert table.defects


# recipes


def test_recipes_become_rows_of_their_own_names(tiny_recipe, tmp_path):
    paths = []
    for name, changes in (
        ("a", {}),
        ("b", {"method": {"name": "rmu", "preset": "default"}, "seed": 3}),
        ("c", {"selection": {"layers": [9]}}),
    ):
        recipe = tiny_recipe(merged({"training": {"steps": 4}}, changes), tmp_path / f"run-{name}")
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(recipe))
    table = run_plan(plan_recipes(paths, tmp_path / "out"), SILENT)
    assert {row.name for row in table.rows} == {"a", "b", "c"}
    assert row_of(table, "a").values["score"][1] is None
    assert row_of(table, "b").values["score"][0] is None
    assert "out of range" in row_of(table, "c").failed[0]
    assert (tmp_path / "run-a" / "metrics.json").exists()
    again = run_plan(plan_recipes(paths, tmp_path / "out"), SILENT)
    assert again == table


def test_recipes_that_write_to_the_same_folder_are_refused(tiny_recipe, tmp_path):
    paths = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for path in paths:
        path.write_text(yaml.safe_dump(tiny_recipe({}, tmp_path / "run")))
    with pytest.raises(UserError, match=r"b\.yaml: output: .*run is also that of .*a\.yaml"):
        plan_recipes(paths, tmp_path / "out")


def test_without_optuna_the_extra_is_named(tiny_recipe, oracle, tmp_path, monkeypatch):
    path = write_grid(tmp_path, tiny_recipe, oracle)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'falcon-unlearn\[sweep\]'"):
        run_grid(path)


# judging


def metrics(probability, accuracy, utility):
    return pipeline.Metrics(probability, accuracy, None, 0.0, None, None, None, utility)


def test_doing_nothing_scores_what_the_model_does_not_know():
    model = metrics(1.0, 1.0, 0.8)
    assert score_of(model, model) == (0.0, 1.0, 1.0)
    assert score_of(metrics(0.0, 0.0, 0.8), model) == (1.0, 1.0, 0.0)
    with pytest.raises(UserError, match="no finite"):
        score_of(metrics(float("nan"), 0.0, 0.8), model)
    with pytest.raises(UserError, match="no model utility"):
        score_of(model, metrics(1.0, 1.0, None))


def test_the_leak_from_the_oracle_is_nought_at_its_level_and_below_and_all_at_the_original_one():
    model, oracle = metrics(1.0, 0.9, 0.8), metrics(0.2, 0.1, 0.8)
    assert oracle_score_of(oracle, model, oracle) == 1.0
    assert oracle_score_of(metrics(0.0, 0.0, 0.8), model, oracle) == 1.0
    assert oracle_score_of(model, model, oracle) == pytest.approx(0.0)
    assert oracle_score_of(metrics(0.6, 0.0, 0.4), model, oracle) == pytest.approx(0.5 - 0.25)
    assert oracle_score_of(model, model, model) is None


def test_a_row_beats_another_only_beyond_the_noise():
    ours, close, far = [0.9, 0.8, 0.95, 0.85], [0.88, 0.83, 0.93, 0.86], [0.7, 0.62, 0.77, 0.66]
    assert ttest_rel(ours, close).pvalue > 0.05 > ttest_rel(ours, far).pvalue
    assert beats(ours, far)
    assert not beats(far, ours)
    assert not beats(ours, close)
    assert not beats(ours, ours)
    assert not beats(ours[:2], far[:2])  # two seeds say nothing
    assert not beats([0.9, 0.8, 0.95, None], [0.7, None, 0.77, 0.66])
    assert beats([1.0, 2.0, 3.0], [0.5, 1.5, 2.5])


def test_only_a_clear_win_is_bold():
    def row(name, scores, failed=None):
        return Row(
            name, {"score": tuple(scores), "kept": tuple(scores), "forget_probability": (0.1,) * 4}, failed or {}
        )

    clear, close, low = row("clear", [0.9, 0.8, 0.95, 0.85]), row("x", [0.88, 0.83, 0.93, 0.86]), row("l", [0.1] * 4)
    failed = Row("failed", {}, {0: "a | reason"})
    assert [r.name for r in ranked([failed, low, clear])] == ["clear", "l", "failed"]
    assert [r.bold for r in ranked([failed, low, clear])] == [("score", "kept"), (), ()]
    assert [r.bold for r in ranked([low, clear, close])] == [(), (), ()]
    partly = dataclasses.replace(clear, failed={3: "diverged"})
    assert ranked([partly, low])[0].bold == ()


def test_the_page_escapes_what_it_is_given(tmp_path):
    rows = (Row("a<b>&", {"score": (0.5,), "leak": (0.1,), "kept": (0.6,)}, {1: "<script>"}),)
    comparison = Comparison(rows, (0, 1), 0, None)
    write_comparison(comparison, tmp_path)
    page = (tmp_path / "compare.html").read_text()
    assert "<script" not in page
    assert "a<b>" not in page
    assert len({line.count("|") for line in comparison_table(comparison).splitlines() if line.startswith("|")}) == 1
