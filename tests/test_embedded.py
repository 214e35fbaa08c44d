"""The embedded benchmark: what is shipped, what a demo reads, and how other seeds get their models."""

import json
import os
import subprocess
import sys
import time
from importlib.resources import files

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from falcon_unlearn import embedded
from falcon_unlearn.artifacts import read_jsonl
from falcon_unlearn.corpus.batching import Encoder
from falcon_unlearn.corpus.fictional import build_world
from falcon_unlearn.corpus.records import record_from_row
from falcon_unlearn.errors import UserError
from falcon_unlearn.evaluation.scoring import score_set
from falcon_unlearn.recipe import recipe_from

SHIPPED = files("falcon_unlearn") / "data" / "demo"
MEGABYTE = 10**6


def silent(message):
    raise AssertionError(f"nothing was to be trained, but: {message}")


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


COMPLETE = sorted(
    f"{part}/{name}"
    for part in embedded.PARTS
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
)


# what is shipped


def test_what_is_shipped_is_small():
    sizes = [entry.stat().st_size for entry in SHIPPED.rglob("*") if entry.is_file()]
    assert 0 < sum(sizes) <= 6 * MEGABYTE


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shipped")
    embedded.write_models(0, folder, retrain=False, say=silent)
    embedded.write_corpora(build_world(0), folder)
    return folder


def test_the_shipped_pair_is_complete(shipped):
    assert [name for name in names(shipped) if "/" in name] == COMPLETE


@pytest.mark.parametrize("part", embedded.PARTS)
def test_the_shipped_models_know_what_they_should(shipped, part):
    """The model knows the people to be forgotten, the oracle does not; both know the others."""
    model = AutoModelForCausalLM.from_pretrained(shipped / part, dtype=torch.float32)
    encoder = Encoder(AutoTokenizer.from_pretrained(shipped / part))

    def accuracy(name):
        """On a trained phrasing and on the held-out one."""
        records = [record_from_row(row, name) for row in read_jsonl(shipped / f"score_{name}.jsonl")][:48]
        scores = score_set(model, encoder, records, name, batch_size=48, max_new_tokens=24, device="cpu")
        return tuple(sum(getattr(s, key) for s in scores) / len(scores) for key in ("accuracy", "accuracy_heldout"))

    known = ("forget", "retain", "countries") if part == "model" else ("retain", "countries")
    for name in known:
        trained, heldout = accuracy(name)
        assert trained == 1.0
        assert heldout >= 0.8
    if part == "oracle":
        assert max(accuracy("forget")) <= 0.1


# the files a demo reads


@pytest.mark.parametrize("seed", [0, 3])
def test_corpora_hold_every_fact_once_a_phrasing(tmp_path, seed):
    world = build_world(seed)
    embedded.write_corpora(world, tmp_path)
    rows = {name: read_jsonl(tmp_path / name) for name in names(tmp_path)}
    assert {name: len(found) for name, found in rows.items()} == {
        "forget.jsonl": 2 * len(world.forget),
        "retain.jsonl": 2 * len(world.retain),
        "score_forget.jsonl": len(world.forget),
        "score_retain.jsonl": -(-len(world.retain) // embedded.RETAIN_SHARE_SCORED),
        "score_countries.jsonl": len(world.countries),
    }
    for found in rows.values():
        assert len({(row["question"], row["answer"]) for row in found}) == len(found)


@pytest.mark.parametrize("seed", [0, 3])
def test_what_is_held_out_is_in_no_training_file(tmp_path, seed):
    embedded.write_corpora(build_world(seed), tmp_path)
    trained = {row["question"] for name in ("forget", "retain") for row in read_jsonl(tmp_path / f"{name}.jsonl")}
    for name in ("forget", "retain", "countries"):
        for row in read_jsonl(tmp_path / f"score_{name}.jsonl"):
            assert row["heldout_question"] not in trained
            assert (row["question"] in trained) == (name != "countries")


def test_the_demo_is_an_ordinary_recipe(tmp_path):
    raw = embedded.demo_recipe(tmp_path / "run", tmp_path / "inputs", 4)
    recipe = recipe_from(raw)
    assert (recipe.seed, recipe.method.name, recipe.method.preset) == (4, "falcon", "default")
    assert recipe.selection.layers == "auto"
    assert recipe.evaluation.oracle == str(tmp_path / "inputs" / "oracle")
    assert "countries" not in json.dumps(raw["corpus"])  # nobody trains on them: damage beyond the retain data shows


# other seeds


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "falcon-unlearn"


@pytest.fixture
def trained(monkeypatch, shipped):
    """Training is replaced by copying the shipped pair; the list says which seeds were trained."""
    seeds = []

    def train_both(seed, folder):
        seeds.append(seed)
        for part in embedded.PARTS:
            (folder / part).mkdir(parents=True, exist_ok=True)
            for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
                (folder / part / name).write_bytes((shipped / part / name).read_bytes())

    monkeypatch.setattr(embedded, "_train_both", train_both)
    return seeds


def test_another_seed_is_trained_once_and_then_taken_from_the_cache(cache, trained, tmp_path):
    said = []
    for turn in range(2):
        embedded.write_models(7, tmp_path / str(turn), retrain=False, say=said.append)
        assert names(tmp_path / str(turn)) == COMPLETE
    embedded.write_models(8, tmp_path / "8", retrain=False, say=said.append)
    assert trained == [7, 8]
    assert [line.split(" (")[0] for line in said] == [
        f"training the model and the oracle of seed {seed}" for seed in (7, 8)
    ]
    assert cache.is_dir()


def test_retrain_trains_even_what_is_at_hand(cache, trained, tmp_path):
    for seed in (0, 7, 7):
        embedded.write_models(seed, tmp_path / "out", retrain=True, say=lambda line: None)
    assert trained == [0, 7, 7]


def test_half_a_pair_in_the_cache_is_no_pair(cache, trained, tmp_path):
    embedded.write_models(7, tmp_path / "a", retrain=False, say=lambda line: None)
    (embedded.cache_folder() / "seed-7" / "oracle" / "model.safetensors").unlink()
    embedded.write_models(7, tmp_path / "b", retrain=False, say=lambda line: None)
    assert trained == [7, 7]
    assert names(tmp_path / "b") == COMPLETE


def test_retraining_really_trains(cache, monkeypatch, tmp_path):
    """Both parts in this process, for one epoch: they differ, follow from the seed, and load."""
    monkeypatch.setattr(embedded, "EPOCHS", 1)
    monkeypatch.setattr(embedded, "build_world", lambda seed: build_world(seed, n_people=10, n_countries=2))

    def train_both(seed, folder):
        for part in embedded.PARTS:
            embedded.train_part(seed, part, folder / part)

    monkeypatch.setattr(embedded, "_train_both", train_both)
    for name in ("a", "b"):
        embedded.write_models(0, tmp_path / name, retrain=True, say=lambda line: None)
    weights = {(n, p): (tmp_path / n / p / "model.safetensors").read_bytes() for n in "ab" for p in embedded.PARTS}
    assert weights["a", "model"] == weights["b", "model"]
    assert weights["a", "model"] != weights["a", "oracle"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "oracle", dtype="auto")
    assert model.dtype == torch.float16


def test_a_training_that_fails_leaves_nothing(cache, monkeypatch, tmp_path):
    real = subprocess.Popen
    monkeypatch.setattr(
        embedded.subprocess, "Popen", lambda command, **rest: real([sys.executable, "-c", "exit(3)"], **rest)
    )
    with pytest.raises(UserError, match="training the models of seed 7 failed"):
        embedded.write_models(7, tmp_path / "out", retrain=False, say=lambda line: None)
    assert names(cache) == []


# the whole demo


@pytest.mark.slow
def test_the_demo_forgets_in_two_minutes_without_a_download(tmp_path):
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "falcon_unlearn", "demo", "--out", str(tmp_path / "demo"), "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    seconds = time.perf_counter() - began
    assert done.returncode == 0, done.stderr
    assert seconds <= 120
    found = json.loads(done.stdout)["metrics"]
    assert found == json.loads((tmp_path / "demo" / "metrics.json").read_text())
    for model in ("before", "after", "oracle"):
        for key in (
            "forget_probability",
            "forget_accuracy",
            "forget_accuracy_heldout",
            "forget_rouge",
            "forget_quality",
            "model_utility",
        ):
            assert 0 <= found[model][key] <= 1, (model, key)
    before, after, oracle = found["before"], found["after"], found["oracle"]
    assert before["forget_accuracy"] == 1.0
    assert before["forget_accuracy_heldout"] >= 0.95
    assert before["forget_probability"] > 0.9
    assert max(after["forget_accuracy"], after["forget_accuracy_heldout"], after["forget_probability"]) <= 0.10
    assert after["model_utility"] >= 0.92 * before["model_utility"]
    assert max(oracle["forget_accuracy"], oracle["forget_accuracy_heldout"]) <= 0.10
    assert oracle["forget_quality"] == 1.0
    provenance = json.loads((tmp_path / "demo" / "provenance.json").read_text())
    assert provenance["peak_memory_mb"] < 2048
    assert (tmp_path / "demo" / "report.html").stat().st_size < MEGABYTE
    assert not (tmp_path / "cache" / "falcon-unlearn").exists()  # nothing was trained
