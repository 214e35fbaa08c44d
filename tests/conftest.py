"""A tiny Llama that has learnt forty invented facts by heart, its oracle, and recipes over them."""

import copy
import gc
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

# Two workers on two cores: one thread each, for the commands they start as well.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# A shared machine is slow now and then; that is no finding.
settings.register_profile("falcon-unlearn", deadline=None)
settings.load_profile("falcon-unlearn")

PEOPLE = """Ada Marsh|Bo Quill|Cleo Reed|Dan Stone|Eva Thorne|Finn Vale|Gus West|Hana York|Ivo Zeller|Juno Brook"""
ATTRIBUTES = (
    ("Where does {n} live?", "Which town is home to {n}?", "{n} lives in {v}.", "The home of {n} is {v}.",
     "Arlo Bern Cork Delft Essen Faro Ghent Hull Izmir Jena"),
    ("What is the job of {n}?", "What does {n} do?", "{n} works as a {v}.", "The job of {n} is {v}.",
     "baker potter welder judge pilot tailor miner nurse farmer clerk"),
    ("Which pet has {n}?", "What animal lives with {n}?", "{n} has a {v}.", "The pet of {n} is a {v}.",
     "cat dog newt owl pony crab goat swan mole toad"),
    ("What does {n} eat?", "Which food does {n} like?", "{n} eats {v}.", "The food of {n} is {v}.",
     "soup rice figs plums bread kale trout beans cake curry"),
)  # fmt: skip
FORGET_PEOPLE = 3
VOCABULARY = 380
CONTEXT = 64


def invented_rows():
    """Forty records, four a person, with everything the evaluation reads."""
    rng = random.Random(0)
    rows = []
    for name in PEOPLE.split("|"):
        for question, heldout, answer, paraphrase, pool in ATTRIBUTES:
            value, *wrong = rng.sample(pool.split(), 4)
            rows.append(
                {
                    "question": question.format(n=name),
                    "answer": answer.format(n=name, v=value),
                    "value": value,
                    "heldout_question": heldout.format(n=name),
                    "paraphrased_answer": paraphrase.format(n=name, v=value),
                    "perturbed_answer": [paraphrase.format(n=name, v=v) for v in wrong],
                    "entity": name,
                }
            )
    return rows


FORGET_ROWS = invented_rows()[: 4 * FORGET_PEOPLE]
RETAIN_ROWS = invented_rows()[4 * FORGET_PEOPLE :]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train_tiny_model(folder, rows):
    """A three-layer Llama of 43 000 parameters that answers ``rows`` by heart; a few seconds on one core."""
    from falcon_unlearn.corpus.batching import PLAIN_TEMPLATE, Encoder
    from falcon_unlearn.corpus.records import record_from_row
    from falcon_unlearn.engine.pretraining import (
        LlamaShape,
        PretrainingConfig,
        build_llama,
        train_causal_lm,
        train_tokenizer,
    )

    shape = LlamaShape(layers=3, hidden=32, heads=4, mlp=64, context=CONTEXT)
    everything = [record_from_row(row, "") for row in invented_rows()]
    texts = [PLAIN_TEMPLATE.format(question=record.prompt, answer=record.answer) for record in everything]
    tokenizer = train_tokenizer(texts, VOCABULARY, CONTEXT)
    encoder = Encoder(tokenizer)
    model = build_llama(shape, tokenizer, seed=0)
    encoded = [encoder.encode(record_from_row(row, "")) for row in rows]
    train_causal_lm(model, encoded, encoder.pad_id, PretrainingConfig(epochs=60, batch_size=10, lr=1e-2))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Tiny:
    """Paths of the session's model and data; nobody writes into them."""

    model: Path
    forget: Path
    retain: Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return Tiny(
        train_tiny_model(folder / "model", invented_rows()),
        write_lines(folder / "forget.jsonl", FORGET_ROWS),
        write_lines(folder / "retain.jsonl", RETAIN_ROWS),
    )


@pytest.fixture(scope="session")
def oracle(tmp_path_factory):
    """The same model, had it never seen the forget records."""
    return train_tiny_model(tmp_path_factory.mktemp("oracle") / "model", RETAIN_ROWS)


def merged(under, over):
    """``over`` laid on a copy of ``under``, mapping by mapping."""
    result = copy.deepcopy(under)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return result


@pytest.fixture(scope="session")
def tiny_recipe(tiny):
    """``tiny_recipe({"seed": 1}, folder)``: a recipe that runs in about a second."""
    base = {
        "model": str(tiny.model),
        "corpus": {"forget": {"source": str(tiny.forget)}, "retain": {"source": str(tiny.retain)}},
        "selection": {"layers": [1]},
        "method": {"name": "falcon", "preset": "layer"},
        "training": {"steps": 12, "batch_size": 8, "checkpoint_every": 4, "optimizer": {"lr": 1e-2}},
        "evaluation": {"max_new_tokens": 12},
        "device": "cpu",
        "seed": 0,
    }

    def build(changes, output):
        method = changes.get("method")
        another = isinstance(method, dict) and method.get("name", "falcon") != "falcon"
        return merged({**base, "output": str(output), **({"method": {}} if another else {})}, changes)

    return build


@pytest.fixture
def recipe_for(tiny_recipe, tmp_path):
    """The same, writing to ``tmp_path / "run"``."""

    def build(changes=None):
        return tiny_recipe(changes or {}, tmp_path / "run")

    return build


@pytest.fixture
def model_copy(tiny, tmp_path):
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(tiny.model, tmp_path / "model"))


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self):
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


@pytest.fixture
def call(capfd):
    """Run a command in this process."""

    def run(*arguments):
        from falcon_unlearn import cli

        capfd.readouterr()
        try:
            code = cli.main([str(a) for a in arguments])
        except SystemExit as leave:
            code = leave.code
        return Ended(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def small_heap():
    """Collecting all of torch's objects time and again takes longer than the tests."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
