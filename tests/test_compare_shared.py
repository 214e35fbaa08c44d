"""A grid divided by several calls that share a storage, and what becomes of runs that crash or end their worker."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_compare import SILENT, row_of, without_costs

from falcon_unlearn import compare
from falcon_unlearn.cli import main
from falcon_unlearn.compare import run_plan
from falcon_unlearn.errors import UserError
from falcon_unlearn.grid import load_grid, plan_grid
from falcon_unlearn.sweep_storage import Board, SharedStorage

PLAIN = {"method": "rmu", "selection.layers": [1]}
GRID = {
    "base": "base.yaml",
    "seeds": [0],
    "shared": {"training": {"steps": 2}, "evaluation": {"max_new_tokens": 2, "max_records": 4}, "threads": 1},
    "tuning": {"trials": 2, "validation_share": 0.3},
    "cells": {
        "a": PLAIN,
        "b": {**PLAIN, "training.optimizer.lr": 2e-3},
        "crashing": {**PLAIN, "training.optimizer.lr": 3e-3},
        "searched": {**PLAIN, "search": {"training.optimizer.lr": {"low": 1e-4, "high": 1e-3}}},
    },
}
WORKER = """
import os, signal, sys
from pathlib import Path
from falcon_unlearn import compare
from falcon_unlearn.compare import run_plan
from falcon_unlearn.console import Console
from falcon_unlearn.grid import load_grid, plan_grid
from falcon_unlearn.sweep_storage import SharedStorage

grid, url, lease, log, killed = sys.argv[1:]
run_recipe = compare.run_recipe

def watched(recipe, **options):
    with open(log, "a") as lines:
        lines.write("/".join(Path(recipe.output).parts[-3:]) + "\\n")
    if recipe.output.endswith(killed):
        os.kill(os.getpid(), signal.SIGKILL)
    if "crashing" in recipe.output:
        raise RuntimeError("the card fell off")
    return run_recipe(recipe, **options)

compare.run_recipe = watched
plan = plan_grid(load_grid(Path(grid)), Path(grid), Console(quiet=True))
print("ready", flush=True)
sys.stdin.readline()
run_plan(plan, Console(quiet=True), shared=SharedStorage(url, float(lease)))
"""


@pytest.fixture
def make_grid(tiny_recipe, tmp_path):
    """Writes a grid of some of the cells, with an output folder of its own."""

    def make(cells, output="out"):
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(tiny_recipe({}, tmp_path / "unused")))
        chosen = {name: GRID["cells"][name] for name in cells}
        path = tmp_path / f"{output}.yaml"
        path.write_text(yaml.safe_dump({**GRID, "cells": chosen, "output": str(tmp_path / output)}))
        return path

    return make


def run_grid(path, shared=None, console=SILENT):
    return run_plan(plan_grid(load_grid(path), path, console), console, shared=shared)


def start(path, shared, log, killed="nobody"):
    command = [sys.executable, "-c", WORKER, str(path), shared.url, str(shared.lease_seconds), str(log), killed]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def runs_of(log):
    return sorted(log.read_text().splitlines())


class Crashing:
    """``run_recipe`` that fails where told, so many times, and counts."""

    def __init__(self, monkeypatch, where, error, times):
        self.calls, self.left, run_recipe = [], times, compare.run_recipe

        def run(recipe, **options):
            self.calls.append("/".join(Path(recipe.output).parts[-3:]))
            if where in recipe.output and self.left:
                self.left -= 1
                raise error
            return run_recipe(recipe, **options)

        monkeypatch.setattr(compare, "run_recipe", run)


@pytest.mark.slow
def test_two_machines_do_each_run_once_and_make_the_table_of_one(make_grid, tmp_path, monkeypatch):
    cells = ["a", "crashing", "searched"]
    crash = Crashing(monkeypatch, "crashing", RuntimeError("the card fell off"), 2)
    alone = run_grid(make_grid(cells, "alone"))
    grid, shared, log = make_grid(cells), SharedStorage(str(tmp_path / "jobs.journal")), tmp_path / "log"
    with start(grid, shared, log) as one, start(grid, shared, log) as two:
        for worker in (one, two):
            assert worker.stdout.readline() == "ready\n"
        for worker in (one, two):
            worker.stdin.write("go\n")
            worker.stdin.flush()
    assert (one.returncode, two.returncode) == (0, 0)
    assert runs_of(log) == sorted(crash.calls)  # one call each, two of what crashed
    assert runs_of(log).count("runs/crashing/seed-0") == 2
    tables = [json.loads((tmp_path / name / "table.json").read_text()) for name in ("alone", "out")]
    assert [row["name"] for row in tables[0]["rows"]] == [row["name"] for row in tables[1]["rows"]]

    crash.calls.clear()
    elsewhere = run_grid(make_grid(cells, "elsewhere"), shared)  # another folder: everything comes from the storage
    assert crash.calls == []
    assert without_costs(elsewhere) == without_costs(alone)
    assert row_of(elsewhere, "crashing").failed == {0: "defect: RuntimeError: the card fell off"}


@pytest.mark.slow
def test_a_killed_machines_run_is_taken_over(make_grid, tmp_path):
    grid, log = make_grid(["a", "b"]), tmp_path / "log"
    shared = SharedStorage(f"sqlite:///{tmp_path / 'jobs.db'}", 5.0)
    with start(grid, shared, log, killed="runs/b/seed-0") as worker:
        worker.communicate("go\n")
    assert worker.returncode == -signal.SIGKILL
    assert runs_of(log) == ["runs/a/seed-0", "runs/b/seed-0"]
    began = time.monotonic()
    table = run_grid(grid, shared)
    assert time.monotonic() - began > 5.0
    assert not any(row.failed for row in table.rows)
    assert row_of(table, "b").values["score"][0] is not None


def test_a_run_that_ends_two_workers_is_a_row_that_says_so(make_grid, tmp_path):
    grid, shared = make_grid(["a"]), SharedStorage(str(tmp_path / "jobs.journal"), 0.5)
    plan = plan_grid(load_grid(grid), grid, SILENT)
    (job,) = compare._jobs(plan, plan.cells[0], SILENT, None)
    for _ in range(2):
        board = Board(shared)
        while board._take(job.key) is None:  # it shows no sign of life
            time.sleep(0.1)
    table = run_grid(grid, shared)
    assert row_of(table, "a").failed[0].startswith("2 workers died while they did it")
    assert row_of(run_grid(grid, shared), "a").failed  # stays: other machines may be at work
    again = run_grid(grid, dataclasses.replace(shared, retry_failed=True))
    assert not row_of(again, "a").failed


def test_without_a_storage_deaths_are_counted_within_one_call(make_grid):
    grid = make_grid(["a"])
    plan = plan_grid(load_grid(grid), grid, SILENT)
    mark = plan.path("claims", "a", "seed-0")
    mark.parent.mkdir(parents=True)
    mark.write_text("..")
    compare._work(plan, SILENT, None)
    assert row_of(compare.gather(plan), "a").failed[0].startswith("2 workers died")
    mark.write_text("..")
    assert not row_of(run_grid(grid), "a").failed


@pytest.mark.parametrize(
    ("error", "times", "calls", "failed"),
    [
        (RuntimeError("cuBLAS sneezed"), 1, 2, {}),
        (RuntimeError("cuBLAS sneezed"), 3, 2, {0: "defect: RuntimeError: cuBLAS sneezed"}),
        (UserError("no such thing"), 3, 1, {0: "no such thing"}),
    ],
)
def test_what_crashes_is_tried_once_more_and_mistakes_are_not(make_grid, monkeypatch, error, times, calls, failed):
    crash = Crashing(monkeypatch, "/a/", error, times)
    table = run_grid(make_grid(["a"]))
    assert len(crash.calls) == calls
    assert row_of(table, "a").failed == failed


def test_a_trial_is_tried_once_more_too_and_one_that_ends_two_workers_has_failed(make_grid, monkeypatch):
    class Killed(BaseException):
        """As good as SIGKILL: nothing is told to the study."""

    grid = make_grid(["searched"])
    with pytest.MonkeyPatch.context() as patch:
        crash = Crashing(patch, "trials/searched/1", RuntimeError("once"), 1)
        assert row_of(run_grid(grid), "searched").values["score"]
        assert crash.calls.count("searched/1/seed-0") == 2
    grid = make_grid(["searched"], "killed")
    killing = Crashing(monkeypatch, "trials/searched/0", Killed(), 2)
    for _ in range(2):
        with pytest.raises(Killed):
            run_grid(grid)
    table = run_grid(grid)
    assert killing.calls == ["searched/0/seed-0"] * 2 + ["searched/1/seed-0", "runs/searched/seed-0"]
    tuned = json.loads((grid.parent / "killed" / "tuning" / "searched.json").read_text())
    assert tuned["trials"][0]["failed"].startswith("2 workers died")
    assert tuned["trials"][1]["failed"] is None
    assert row_of(table, "searched").values["score"]


def test_sigterm_stops_like_ctrl_c_and_is_no_death(make_grid, tmp_path, monkeypatch):
    grid, shared = make_grid(["a"]), SharedStorage(str(tmp_path / "jobs.journal"))
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(compare, "run_recipe", lambda recipe, **options: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
            run_grid(grid, shared)
    assert signal.getsignal(signal.SIGTERM) == handler
    (released,) = [t for trials in Board(shared)._trials.values() for t in trials]
    assert released.user_attrs["released"]
    assert not row_of(run_grid(grid, shared), "a").failed


def test_the_command_line_refuses_a_storage_before_anything_is_done(make_grid, tmp_path, capsys):
    grid = make_grid(["a"])
    assert main(["compare", "--grid", str(grid), "--storage", "nonsense://me:secret@host/db"]) == 2
    assert main(["compare", "--grid", str(grid), "--retry-failed"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: storage nonsense://host/db: not a storage")
    assert "--retry-failed goes with --storage" in second
    assert not (tmp_path / "out").exists()
