"""Several processes (gloo on the CPU) against one: the same weights, losses, selections, scores and attacks.

And what goes wrong with a launch ends in one line on stderr, not in a wait.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import FORGET_ROWS, merged, write_lines
from rank_worker import do
from safetensors.torch import load_file

from falcon_unlearn import cli, pipeline, suite_scores
from falcon_unlearn.artifacts import read_jsonl
from falcon_unlearn.errors import UserError
from falcon_unlearn.ranks import Ranks, launch_from

WORKER = Path(__file__).with_name("rank_worker.py")
LAYERS = {"selection": {"layers": [1]}, "training": {"modules": "mlp"}}
ADAMW, SGD = {"name": "adamw", "lr": 1e-3}, {"name": "sgd", "lr": 1e-2}
CUT_ALIKE = {
    "falcon": {"method": {"preset": "default"}},
    "falcon_layer": {"method": {"preset": "layer"}, **LAYERS},
    "rmu": {"method": {"name": "rmu"}, **LAYERS},
    "npo": {"method": {"name": "npo"}},
    "scrub": {"method": {"name": "scrub"}},
}
"""AdamW on batches of 8, against one process that cuts its batches as the ranks do.

AdamW makes steps of gradients that are mere rounding, and FALCON in one layer begins with a retain gradient that is
nothing else, so that one process that cuts its batches otherwise differs from itself.
"""
UNEVEN = {
    "falcon_sgd": {"method": {"preset": "default"}},
    "falcon_all_terms_sgd": {
        "method": {
            "preset": "default",
            "stand_in": {
                "retain": "kl", "hinge_weight": 1.0, "npo_weight": 1.0, "representation_weight": 1.0,
                "retain_representation_weight": 1.0,  # of one minus a cosine near one: at 9 its rounding is above 1e-6
            },
        },
        "training": {"batch_size": 3},
    },
    "falcon_layer_sgd": {
        "method": {"preset": "layer"}, **merged(LAYERS, {"training": {"gradients": {"combination": "sum"}}}),
    },
    "npo_replicas_sgd": {"method": {"name": "npo"}, "training": {"shard": False, "interpolation": 0.5}},
    "scrub_sgd": {"method": {"name": "scrub"}},
}  # fmt: skip
"""SGD on batches of 7 or 3, against one process that cuts nothing."""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(rank, world, port, arguments, **environment):
    """One rank, by hand, as torchrun would start it."""
    variables = {
        "RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1,
        "FALCON_UNLEARN_JOIN_SECONDS": 100, **environment,  # machines that run tests are busy
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **{key: str(value) for key, value in variables.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(processes, seconds=240):
    """(exit code, stdout, stderr) of each; none is left behind."""
    until = time.monotonic() + seconds
    try:
        outputs = [process.communicate(timeout=max(until - time.monotonic(), 0.1)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def together(world, jobs, folder):
    """Do ``jobs`` on ``world`` ranks; rank 0 alone may say something, and on stdout nothing."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs), encoding="utf-8")
    port = free_port()
    for code, out, err in end([start(rank, world, port, [WORKER, path]) for rank in range(world)], 300):
        assert code == 0, err
        assert out == ""
        assert "error" not in err.lower()


def alike(one, many, name):
    """Weights (relative to each tensor's norm) and losses within 1e-6."""
    ours, theirs = (load_file(folder / name / "patch" / "patch.safetensors") for folder in (one, many))
    assert ours.keys() == theirs.keys()
    assert ours
    for key, value in ours.items():
        assert float((value - theirs[key]).norm()) <= 1e-6 * float(value.norm()), (name, key)
    steps = [read_jsonl(folder / name / "training.jsonl") for folder in (one, many)]
    assert len(steps[0]) == len(steps[1]) > 1
    for ours, theirs in zip(*steps, strict=True):
        keys = ["forget_loss", "retain_loss", "forget_grad_norm", "retain_grad_norm"]
        if ours["retain_grad_norm"] > 1e-6:  # of rounding, signs are rounding
            keys.append("conflicts")
        for key in keys:
            # A norm is no mean: what cancels in the gradient does not in its rounding.
            near = 1e-5 if key.endswith("norm") else 1e-6
            assert theirs[key] == pytest.approx(ours[key], rel=near, abs=near), (name, ours["step"], key)


def training_jobs(tiny_recipe, folder, world):
    """Recipes by name, without scoring."""
    jobs = {}
    for methods, optimizer, batch in ((CUT_ALIKE, ADAMW, 8), (UNEVEN, SGD, 7)):
        training = {"steps": 3, "batch_size": batch, "modules": "all", "optimizer": optimizer}
        if methods is CUT_ALIKE:
            training["micro_batch_size"] = batch // world
        base = {"selection": {"layers": "all"}, "evaluation": {"enabled": False}, "training": training}
        for name, changes in methods.items():
            jobs[name] = merged(base, changes)
    if world > 2:  # a sum of four has no order of its own
        jobs["falcon_layer"]["training"]["gradients"] = {"combination": "sum"}
    return {name: tiny_recipe(changes, folder / name) for name, changes in jobs.items()}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_training_on_several_ranks_is_training_on_one(world, tiny_recipe, tmp_path, monkeypatch):
    one, many = tmp_path / "one", tmp_path / "many"
    alone = training_jobs(tiny_recipe, one, world)
    shared = training_jobs(tiny_recipe, many, world)
    together(world, [["train", recipe] for recipe in shared.values()], tmp_path)
    monkeypatch.setattr(pipeline, "write_report", pipeline.write_report)  # as it was, when the test is over
    monkeypatch.setattr(pipeline, "write_card", pipeline.write_card)
    for name, recipe in alone.items():
        do("train", recipe)
        alike(one, many, name)
    assert not list(many.rglob("*.rank*"))


def plain_of(path):
    """A result without what differs from run to run: times, versions, folders."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r'"seconds": ?[0-9.e-]+', "", text)


@pytest.mark.slow
def test_selection_scores_and_attacks_of_several_ranks_are_those_of_one(tiny, tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(suite_scores, "_UNITS_PER_CHUNK", 2)
    holdout = write_lines(
        tmp_path / "holdout.jsonl", [{**row, "question": row["question"] + "?"} for row in FORGET_ROWS]
    )

    def jobs(folder):
        streaming = {"selection": {"streaming": "always", "selector": "mutual_information"}}
        selection = {
            "selection": {"layers": "auto", "show_mutual_information": True, "sweep": {"steps": 2}},
            "evaluation": {"batch_size": 4},
        }
        return [
            ["layers", tiny_recipe(selection, folder / "layers")],
            [
                "layers",
                tiny_recipe(merged(selection, streaming), folder / "mi"),
            ],
            [
                "run",  # a step so small that nothing changes: scores before and after are comparable to the bit
                tiny_recipe(
                    {
                        "training": {"steps": 1, "optimizer": {"name": "sgd", "lr": 1e-30}},
                        "evaluation": {"batch_size": 4},
                    },
                    folder / "run",
                ),
            ],
            [
                "evaluate",
                {
                    "model": str(tiny.model), "suites": ["privacy"], "output": str(folder / "evaluate"),
                    "overrides": [f"privacy.forget={tiny.forget}", f"privacy.holdout={holdout}", "device=cpu"],
                },
            ],
            [
                "attack",
                {
                    "model": str(tiny.model), "attacks": ["quantize", "interpolate", "relearn"],
                    "original": str(tiny.model), "output": str(folder / "attack"),
                    "overrides": [
                        f"forget={tiny.forget}", f"retain={tiny.retain}", "device=cpu", "max_new_tokens=8",
                        "relearn.known=3", "relearn.epochs=1", "relearn.points=1",
                        "quantize.formats=[int8]", "interpolate.alphas=[1.0]",
                    ],
                },
            ],
        ]  # fmt: skip

    one, many = tmp_path / "one", tmp_path / "many"
    together(2, jobs(many), tmp_path)
    for job in jobs(one):
        do(*job)
    compared = 0
    for path in sorted(one.rglob("*.json*")):
        other = many / path.relative_to(one)
        if path.name in {"provenance.json", "patch.json", "training.jsonl"}:
            assert other.exists()
            continue
        assert plain_of(path).replace(str(one), "") == plain_of(other).replace(str(many), ""), path
        compared += 1
    assert compared >= 12
    assert {path.relative_to(one) for path in one.rglob("*")} == {path.relative_to(many) for path in many.rglob("*")}


def one_line(results, pattern):
    """All ranks ended with 2, and together said this one line."""
    assert [code for code, _, _ in results] == [2] * len(results), results
    lines = [line for _, _, err in results for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, results
    assert re.search(pattern, lines[0]), lines
    assert not any("Traceback" in err for _, _, err in results)


@pytest.fixture
def recipe_file(tiny_recipe, tmp_path):
    def build(changes=None):
        training = {"steps": 4000, "batch_size": 4}
        recipe = tiny_recipe(
            merged({"training": training, "evaluation": {"enabled": False}}, changes or {}), tmp_path / "run"
        )
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(recipe), encoding="utf-8")
        return path

    return build


COMMAND = ("-m", "falcon_unlearn", "run")


def test_a_missing_rank_is_named(recipe_file):
    began = time.monotonic()
    lonely = start(0, 2, free_port(), [*COMMAND, recipe_file()], FALCON_UNLEARN_JOIN_SECONDS=2)
    one_line(end([lonely]), r"rank 1 of 2 did not start within 2 s")
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_without_rank_0_the_others_say_where_they_looked(recipe_file):
    lonely = start(1, 2, free_port(), [*COMMAND, recipe_file()], FALCON_UNLEARN_JOIN_SECONDS=2)
    one_line(end([lonely]), r"rank 1 of 2 did not find rank 0 at 127\.0\.0\.1")


def test_ranks_with_different_recipes_are_refused(recipe_file, tmp_path):
    port, path = free_port(), recipe_file()
    ranks = [start(rank, 2, port, [*COMMAND, path, f"seed={rank}"]) for rank in range(2)]
    one_line(end(ranks), r"another recipe \(seed\) than rank")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ranks_with_different_world_sizes_are_refused(recipe_file):
    port, path = free_port(), recipe_file()
    ranks = [start(rank, 2 + rank, port, [*COMMAND, path], FALCON_UNLEARN_JOIN_SECONDS=20) for rank in range(2)]
    one_line(end(ranks), r"another WORLD_SIZE")


@pytest.mark.slow
def test_a_mistake_in_the_recipe_is_said_once(recipe_file):
    port, path = free_port(), recipe_file({"selection": {"layers": [77]}})
    ranks = [start(rank, 2, port, [*COMMAND, path]) for rank in range(2)]
    one_line(end(ranks), r"layer 77 is out of range")


@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_others(killed, recipe_file, tmp_path):
    port, path = free_port(), recipe_file()
    ranks = [start(rank, 2, port, [*COMMAND, path], FALCON_UNLEARN_SILENT_SECONDS=3) for rank in range(2)]
    log = tmp_path / "run" / "training.jsonl"
    until = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < until:
        time.sleep(0.1)
    ranks[killed].send_signal(signal.SIGKILL)
    began = time.monotonic()
    results = end(ranks)
    assert time.monotonic() - began < 60
    assert results[killed][0] == -signal.SIGKILL
    one_line(results[1 - killed :][:1], rf"rank {killed} has (died|ended)")


@pytest.mark.slow
def test_torchrun_starts_a_run(recipe_file, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    done = subprocess.run(
        [*command, *COMMAND, str(recipe_file({"training": {"steps": 3}}))],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report.html") == 1  # printed once, by rank 0
    assert done.stderr.count("training: ") == 1
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["ranks"] == 2


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}


def test_what_torchrun_sets_is_understood():
    assert launch_from({}) is None
    assert launch_from({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}) is None
    assert launch_from({"RANK": "0", "WORLD_SIZE": "1"}) is None
    launch = launch_from({**TORCHRUN, "LOCAL_WORLD_SIZE": "2"})
    assert (launch.rank, launch.world, launch.local_rank, launch.local_world) == (1, 2, 1, 2)
    assert not launch.hosts_store
    assert launch_from({**TORCHRUN, "RANK": "0"}).hosts_store
    assert not launch_from({**TORCHRUN, "RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}).hosts_store


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "2"}, "RANK=2 with WORLD_SIZE=2: ranks are 0..1"),
        ({"RANK": "one"}, "RANK='one' is no number"),
        ({"MASTER_ADDR": None}, "RANK is set but MASTER_ADDR is not"),
        ({"RANK": None}, "WORLD_SIZE is set but RANK is not"),
    ],
)
def test_half_a_launch_is_refused(changes, message):
    environment = {key: value for key, value in {**TORCHRUN, **changes}.items() if value is not None}
    with pytest.raises(UserError, match=re.escape(message)):
        launch_from(environment)


def test_commands_for_one_process_say_so(monkeypatch, capsys):
    for key, value in TORCHRUN.items():
        monkeypatch.setenv(key, value)
    assert cli.main(["methods"]) == 2
    assert "methods is for one process" in capsys.readouterr().err


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 16])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_rows_are_dealt_once_and_evenly(count, world):
    shares = [list(range(count))[Ranks(rank, world).rows(count)] for rank in range(world)]
    assert [row for share in shares for row in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_is_the_identity():
    alone = Ranks()
    values = torch.tensor([1.0, 2.0])
    assert alone.first
    assert alone.on_first(lambda: 3) == alone.after_first(lambda: 3) == 3
    assert alone.spread([1, 2, 3], lambda x: x * x) == [1, 4, 9]
    assert alone.sum(values) is values
    assert alone.any(True) is True
    alone.agree("corpus", "x")
