"""What a grid file may say, and that the facts trials are judged on are never in the table."""

import random
from pathlib import Path

import pytest
import yaml
from conftest import merged

from falcon_unlearn.console import Console
from falcon_unlearn.corpus.records import Record, record_from_row
from falcon_unlearn.errors import UserError
from falcon_unlearn.grid import Search, _row_of, lay_over, load_grid, plan_grid, split_facts


def grid_file(folder, text):
    path = folder / "grid.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("seed", range(20))
def test_no_fact_is_on_both_sides_of_the_split_in_any_set(seed):
    rng = random.Random(seed)
    sets = {
        name: [Record("qa", f"{name} {i}", f"answer {rng.randrange(30)}", "") for i in range(rng.randint(8, 60))]
        for name in ("forget", "retain", "countries")
    }
    # Enough facts of its own for each set.
    sets = {
        name: [*records, *(Record("qa", "q", f"{name} {i}", "") for i in range(5))] for name, records in sets.items()
    }
    share = rng.choice((0.1, 0.25, 0.5))
    scored, validation = split_facts(sets, share)
    facts = [{record.answer for records in part.values() for record in records} for part in (scored, validation)]
    assert facts[0].isdisjoint(facts[1])
    for name, records in sets.items():
        assert scored[name]
        assert validation[name]
        assert [r for r in records if r in scored[name] or r in validation[name]] == records
        assert len(scored[name]) + len(validation[name]) == len(records)


def test_white_space_does_not_make_another_fact():
    sets = {"forget": [Record("qa", str(i), f"a {i // 2}" if i % 2 else f"a  {i // 2} ", "") for i in range(12)]}
    scored, validation = split_facts(sets, 0.3)
    assert {int(r.prompt) // 2 for r in scored["forget"]}.isdisjoint(int(r.prompt) // 2 for r in validation["forget"])


def test_a_set_of_one_fact_cannot_be_split():
    many = [Record("qa", str(i), f"a {i}", "") for i in range(9)]
    with pytest.raises(UserError, match="'retain' has too few facts"):
        split_facts({"forget": many, "retain": [Record("qa", "q", "b", "")] * 3}, 0.25)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "words"},
        {"question": "q", "answer": "a", "value": "v", "heldout_question": "h", "entity": "e"},
        {"question": "q", "answer": "a", "paraphrased_answer": "p", "perturbed_answer": ["x", "y"]},
        {"prompt": "p", "completion": "c"},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
    ],
)
def test_a_record_is_written_as_it_was_read(row):
    assert _row_of(record_from_row(row, "")) == row


def test_another_method_begins_without_the_knobs_of_the_one_below():
    under = {"method": {"name": "falcon", "offset": "random"}, "training": {"steps": 3, "batch_size": 2}}
    assert lay_over(under, {"method": "rmu", "training.steps": 5}) == {
        "method": {"name": "rmu"},
        "training": {"steps": 5, "batch_size": 2},
    }
    same = lay_over(under, {"method.retain_weight": 2.0})
    assert same["method"] == {"name": "falcon", "offset": "random", "retain_weight": 2.0}
    assert lay_over(under, {"method": "falcon"}) == under
    assert under["training"] == {"steps": 3, "batch_size": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cells: {a: {}}\nsedes: [1]\n", r"grid.yaml:2: sedes: unknown key \(did you mean 'seeds'"),
        ("cells:\n  a:\n    search:\n      x: {lo: 1}\n", r"grid.yaml:4: cells.a.search.x.lo: unknown key"),
        (
            "cells:\n  a:\n    search:\n      x: {low: 2, high: 1}\n",
            r"grid.yaml:4: cells.a.search.x: low must be below",
        ),
        ("cells:\n  a:\n    search: {x: {}}\n", r"give low and high, or choices"),
        ("cells: {a: {search: {x: {low: 0, high: 1, log: true}}}}\n", r"with log, low must be above 0"),
        ("tuning: {trails: 3}\ncells: {a: {}}\n", r"grid.yaml:1: tuning.trails: unknown key \(did you mean 'trials'"),
        ("cells: {../a: {}}\n", r"a name is made of letters"),
        ("cells: {a: {}\n", r"grid.yaml:2: not valid YAML"),
        ("- a\n", r"a grid is a mapping"),
        ("seeds: [0]\n", r"cells: field required"),
    ],
)
def test_mistakes_in_a_grid_are_named_where_they_stand(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load_grid(grid_file(tmp_path, text))


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("method: {name: flacon}", r"grid.yaml:2: cells.a: method: .*did you mean 'falcon'"),
        ("training.stpes: 3", r"cells.a: training.stpes.*did you mean 'steps'"),
        ("seed: 3", r"grid.yaml:2: cells.a: seed is the same for all cells"),
        ("after: runs/week1", r"cells.a: after is the same for all cells"),
        ("evaluation.oracle: x", r"cells.a: evaluation is the same for all cells"),
        ("corpus: {forget: x}", r"cells.a: corpus.forget is the same for all cells"),
        ("search: {training.stpes: {choices: [3]}}", r"cells.a: training.stpes.*did you mean 'steps'"),
    ],
)
def test_a_cell_that_is_no_recipe_is_refused_before_anything_is_made(tmp_path, cell, message):
    path = grid_file(tmp_path, f"cells:\n  a: {{{cell}}}\noutput: {tmp_path / 'out'}\n")
    with pytest.raises(UserError, match=message):
        plan_grid(load_grid(path), path, Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_a_missing_base_is_named(tmp_path):
    path = grid_file(tmp_path, "base: nowhere.yaml\ncells: {a: {}}\n")
    with pytest.raises(UserError, match=r"base: no recipe at nowhere\.yaml"):
        plan_grid(load_grid(path), path, Console(quiet=True))


class Chooser:
    """Stands for an Optuna trial: takes the end of each range."""

    def suggest_int(self, key, low, high, *, log):
        return ("int", low, high, log)

    def suggest_float(self, key, low, high, *, log):
        return ("float", low, high, log)

    def suggest_categorical(self, key, choices):
        return choices[-1]


def test_whole_numbers_stay_whole_and_choices_may_be_anything():
    assert Search(low=1, high=4).suggest(Chooser(), "x") == ("int", 1, 4, False)
    assert Search(low=1.0, high=4, log=True).suggest(Chooser(), "x") == ("float", 1.0, 4, True)
    assert Search.model_validate({"low": "1e-4", "high": "1e-2"}).suggest(Chooser(), "x")[:2] == ("float", 1e-4)
    assert Search(choices=("auto", [4, 5])).suggest(Chooser(), "x") == [4, 5]


def test_every_cell_scores_the_same_facts_and_differs_in_its_own_keys_only(tmp_path, tiny_recipe):
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(tiny_recipe({}, tmp_path / "unused")), encoding="utf-8")
    path = grid_file(
        tmp_path,
        f"base: base.yaml\noutput: {tmp_path / 'out'}\nseeds: [0, 7]\nshared: {{training: {{steps: 2}}}}\n"
        "tuning: {trials: 2, seeds: [3]}\n"
        "cells:\n  a: {search: {method.retain_weight: {low: 1.0, high: 2.0}}}\n  b: {method: rmu, training.steps: 3}\n",
    )
    plan = plan_grid(load_grid(path), path, Console(quiet=True))
    a, b = plan.cells
    assert list(a.final) == list(b.final) == [0, 7]
    assert list(a.trial) == [3]
    assert not b.trial
    for seed in (0, 7):
        assert merged(a.final[seed], {"method": 0, "training": 0}) == merged(
            b.final[seed], {"method": 0, "training": 0}
        )
    recipe = b.recipe(b.final[7], {}, tmp_path / "run")
    assert (recipe.seed, recipe.method.name, recipe.training.steps) == (7, "rmu", 3)
    assert a.recipe(a.final[0], {"method.retain_weight": 1.5}, tmp_path / "run").method.retain_weight == 1.5
    assert [a.recipe(raw, {}, tmp_path).evaluation.earlier for raw in (a.trial[3], a.final[0])] == [False, True]
    # What is trained on is the same for trials and runs; what is scored has no record in common.
    assert a.trial[3]["corpus"] == a.final[0]["corpus"]
    for name in ("forget", "retain"):
        files = [Path(raw["evaluation"][name]["source"]) for raw in (a.trial[3], a.final[0])]
        lines = [set(file.read_text(encoding="utf-8").splitlines()) for file in files]
        assert lines[0]
        assert lines[1]
        assert lines[0].isdisjoint(lines[1])


def test_without_a_search_every_fact_is_scored(tmp_path, tiny_recipe, tiny):
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(tiny_recipe({}, tmp_path / "unused")), encoding="utf-8")
    path = grid_file(tmp_path, f"base: base.yaml\noutput: {tmp_path / 'out'}\nseeds: [0]\ncells: {{a: }}\n")
    plan = plan_grid(load_grid(path), path, Console(quiet=True))
    scored = Path(plan.cells[0].final[0]["evaluation"]["forget"]["source"])
    assert len(scored.read_text().splitlines()) == len(tiny.forget.read_text().splitlines())
