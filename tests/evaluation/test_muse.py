"""MUSE on files in the hub's format: numbers equal plain loops over single rows; recipes run on the tiny model."""

import dataclasses
import json
import math
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from conftest import FORGET_ROWS, RETAIN_ROWS
from datasets.exceptions import DatasetNotFoundError
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import roc_auc_score
from test_privacy import HOLDOUT_ROWS
from transformers import AutoModelForCausalLM, AutoTokenizer

from falcon_unlearn.api import apply_patch, load_recipe, unlearn
from falcon_unlearn.artifacts import to_plain
from falcon_unlearn.corpus.batching import Encoder
from falcon_unlearn.errors import UserError
from falcon_unlearn.evaluation.muse import MuseConfig, rouge_l
from falcon_unlearn.evaluation.suite import Subject

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = ("muse_news", "muse_books", "muse_scalability", "muse_sustainability")
PAGE = "https://huggingface.co/datasets/muse-bench/MUSE-News"
needs_recipes = pytest.mark.skipif(not RECIPES.is_dir(), reason="the recipes are not beside the tests")


def question(row):
    return {"question": row["question"], "answer": row["value"]}


def sentence(row):
    return f"Question: {row['question']}\nAnswer: {row['answer']}"


TABLES = {
    ("verbmem", "forget"): [
        {"prompt": sentence(row)[:-12], "gt": sentence(row)[-12:] + " And so it is told again."}
        for row in FORGET_ROWS[:5]
    ],
    ("knowmem", "forget_qa"): [question(row) for row in FORGET_ROWS[:6]],
    ("knowmem", "forget_qa_icl"): [question(row) for row in FORGET_ROWS[6:8]],
    ("knowmem", "retain_qa"): [question(row) for row in RETAIN_ROWS[:4]],
    ("knowmem", "retain_qa_icl"): [question(row) for row in RETAIN_ROWS[6:9]],
    ("privleak", "forget"): [{"text": sentence(row)} for row in FORGET_ROWS],
    ("privleak", "retain"): [{"text": sentence(row)} for row in RETAIN_ROWS],
    ("privleak", "holdout"): [{"text": sentence(row)} for row in HOLDOUT_ROWS],
    ("raw", "retain1"): [{"text": sentence(row)} for row in RETAIN_ROWS],
    ("scal", "forget_1"): [{"text": sentence(row)} for row in FORGET_ROWS[:6]],
    ("scal", "forget_2"): [{"text": sentence(row)} for row in FORGET_ROWS],
    ("sust", "forget_1"): [{"text": sentence(row)} for row in FORGET_ROWS[:6]],
    ("sust", "forget_2"): [{"text": sentence(row)} for row in FORGET_ROWS[6:]],
}


def write_hub_folder(folder, tables):
    """Parquet files and a card that declares them, as on the hub."""
    configs = {}
    for (config, split), rows in tables.items():
        path = folder / config / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        configs.setdefault(config, []).append(split)
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        lines += [line for s in splits for line in (f"  - split: {s}", f"    path: {config}/{s}-*")]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return write_hub_folder(tmp_path_factory.mktemp("MUSE-News"), TABLES)


def subject_of(folder, context=512):
    """The tiny model, its rotary positions reaching far enough for examples before the question."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.config.max_position_embeddings = context
    return Subject(model, Encoder(AutoTokenizer.from_pretrained(folder)), batch_size=3, name=str(folder))


@pytest.fixture(scope="module")
def subjects(tiny, oracle):
    return subject_of(tiny.model), subject_of(oracle)


def opened(hub, **changes):
    return MuseConfig(data=str(hub), **changes).open(Path(), 0)


def same(a, b):
    pairs = zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True)
    return all(x == y or (x != x and y != y) for x, y in pairs)


def scored(suite, subject):
    rows = {}
    for part, units in suite.parts.items():
        half = units // 2
        found = [*suite.score(part, range(half), subject), *suite.score(part, range(half, units), subject)]
        rows[part] = [suite.row(part, json.loads(json.dumps(to_plain(row)))) for row in found]
        assert all(same(a, b) for a, b in zip(rows[part], found, strict=True))
    return rows


def naive_generate(subject, prompt, tokens):
    """One prompt, token by token, without a cache."""
    tokenizer = subject.encoder.tokenizer
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(tokens):
            best = subject.model(ids).logits[0, -1].argmax()
            if best == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, best[None, None]], 1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def f1(truth, generation):
    return RougeScorer(["rougeL"]).score(truth, generation)["rougeL"].fmeasure


def test_verbmem_is_the_f1_of_the_first_tokens(hub, subjects):
    suite = opened(hub, verbmem_tokens=9)
    rows = suite.score("verbmem", range(5), subjects[0])
    tokenizer = subjects[0].encoder.tokenizer
    for i, (row, entry) in enumerate(zip(rows, TABLES["verbmem", "forget"], strict=True)):
        truth = tokenizer.decode(tokenizer(entry["gt"]).input_ids[:9], skip_special_tokens=True)
        generation = naive_generate(subjects[0], entry["prompt"], 9)
        assert (row.set, row.index, row.prompt, row.truth) == ("verbmem", i, entry["prompt"], truth)
        assert row.generation == generation
        assert row.rouge_l_f1 == f1(truth, generation)
        assert truth in entry["gt"]
    assert np.mean([row.rouge_l_f1 for row in rows]) > 0.2


@pytest.mark.parametrize(("part", "name"), [("knowmem_forget", "forget_qa"), ("knowmem_retain", "retain_qa")])
def test_knowmem_is_asked_with_examples_and_cut_at_the_next_question(hub, subjects, part, name):
    rows = opened(hub).score(part, range(3), subjects[0])
    shots = "".join(f"Question: {e['question']}\nAnswer: {e['answer']}\n\n" for e in TABLES["knowmem", f"{name}_icl"])
    for row, entry in zip(rows, TABLES["knowmem", name], strict=False):
        generation = naive_generate(subjects[0], f"{shots}Question: {entry['question']}\nAnswer: ", 32)
        for end in ("\n\n", "\nQuestion", "Question:"):
            generation = generation.split(end)[0]
        assert (row.prompt, row.truth, row.generation) == (entry["question"], entry["answer"], generation)
        assert row.rouge_l_f1 == f1(entry["answer"], generation)


def test_privleak_is_what_muses_code_makes_of_the_losses(hub, subjects):
    suite = opened(hub)
    rows, theirs = scored(suite, subjects[0]), scored(suite, subjects[1])

    def published_auc(subject):
        """AUC with the forget texts as non-members, from one forward pass a text."""
        signals = []
        for split in ("forget", "holdout"):
            for row in TABLES["privleak", split]:
                ids = subject.encoder.tokenizer(row["text"], return_tensors="pt").input_ids
                with torch.no_grad():
                    log_p = subject.model(ids).logits[0, :-1].double().log_softmax(-1)
                tokens = sorted(log_p.gather(1, ids[0, 1:, None])[:, 0].tolist())
                signals.append(-np.mean(tokens[: int(len(tokens) * 0.4)]))
        n = len(TABLES["privleak", "forget"])
        return roc_auc_score([0] * n + [1] * n, -np.array(signals))

    model, retrained = published_auc(subjects[0]), published_auc(subjects[1])
    result = suite.summarise(rows, theirs, {})
    assert result.metrics["auc_min_k"].value == pytest.approx(1 - model, abs=0.01)
    assert result.metrics["privleak"].value == pytest.approx((model - retrained) / retrained * 100, abs=3)
    assert result.metrics["privleak"].value < -50
    assert result.metrics["privleak"].low <= result.metrics["privleak"].value <= result.metrics["privleak"].high


def test_the_summary_is_means_of_the_rows(hub, subjects):
    suite = opened(hub)
    rows = scored(suite, subjects[0])
    result = suite.summarise(rows, None, {"seed": 0})
    for part in ("verbmem", "knowmem_forget", "knowmem_retain"):
        estimate = result.metrics[part]
        assert estimate.value == pytest.approx(np.mean([row.rouge_l_f1 for row in rows[part]]))
        assert estimate.low <= estimate.value <= estimate.high
    assert "privleak" not in result.metrics
    assert any("No PrivLeak" in statement for statement in result.statements)
    assert result.settings["template"].startswith("none")
    known = opened(hub, retrain_auc=0.5228).summarise(rows, None, {})
    auc = known.metrics["auc_min_k"].value
    assert known.metrics["privleak"].value == pytest.approx((0.5228 - auc) / 0.4772 * 100)


def test_prompts_that_fill_the_context_and_empty_truths_are_counted_not_dropped(tmp_path, tiny):
    tables = {**TABLES, ("verbmem", "forget"): [{"prompt": "Question: Where", "gt": " "}]}
    tables["privleak", "holdout"] = [{"text": "Ada"}, {"text": "Where does Bo Quill live?"}, {"text": ""}]
    suite = opened(write_hub_folder(tmp_path, tables))
    rows = scored(suite, subject_of(tiny.model, context=64))
    assert math.isnan(rows["verbmem"][0].rouge_l_f1)
    assert all(math.isnan(row.rouge_l_f1) and row.generation == "" for row in rows["knowmem_retain"])
    result = suite.summarise(rows, None, {})
    assert result.metrics["knowmem_retain"].value is None
    assert result.metrics["knowmem_retain"].unscorable == 4
    assert result.metrics["auc_min_k"].unscorable == sum(math.isnan(r.min_k) for r in rows["privleak_holdout"]) >= 1
    assert any(statement.startswith("Not scored: ") for statement in result.statements)


@given(st.text(alphabet="ab é1.'", max_size=30), st.text(alphabet="ab é1.'", max_size=30))
def test_rouge_is_the_published_one_in_latin_letters(reference, candidate):
    score = RougeScorer(["rougeL"], use_stemmer=False).score(reference, candidate)["rougeL"]
    assert rouge_l(reference, candidate) == (score.fmeasure, score.recall)


def test_rouge_sees_other_scripts():
    assert rouge_l("北京在中国", "北京在哪里") == pytest.approx((0.6, 0.6))
    assert rouge_l("في بيت جدي", "في بيت") == pytest.approx((0.8, 2 / 3))


# data


def test_the_download_of_muses_own_script_is_read_too(hub, tmp_path):
    for (config, split), rows in TABLES.items():
        path = tmp_path / config / f"{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps([row["text"] for row in rows] if "text" in rows[0] else rows))
    assert opened(tmp_path).content == opened(hub).content
    (tmp_path / "verbmem" / "forget.json").rename(tmp_path / "verbmem" / "forget.jsonl")
    rows = TABLES["verbmem", "forget"]
    (tmp_path / "verbmem" / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert opened(tmp_path).content == opened(hub).content


def test_settings_and_draws_are_part_of_the_content(hub):
    assert opened(hub).content == opened(hub).content
    assert opened(hub, knowmem_tokens=8).content != opened(hub).content
    few = opened(hub, max_records=3)
    assert set(few.parts.values()) == {3}
    assert few.content["verbmem"] != opened(hub).content["verbmem"]


def test_the_hub_is_asked_for_the_published_tables(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(TABLES[config, split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    suite = MuseConfig(corpus="Books").open(Path(), 0)
    assert suite.parts == {
        "verbmem": 5,
        "knowmem_forget": 6,
        "knowmem_retain": 4,
        "privleak_forget": 12,
        "privleak_holdout": 12,
    }
    assert {name for name, _, _ in asked} == {"muse-bench/MUSE-Books"}
    assert {(config, split) for _, config, split in asked} == {
        ("verbmem", "forget"),
        *(("knowmem", f"{side}_qa{kind}") for side in ("forget", "retain") for kind in ("", "_icl")),
        ("privleak", "forget"),
        ("privleak", "holdout"),
    }


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            DatasetNotFoundError("Dataset 'x' is a gated dataset on the Hub.\nVisit"),
            f"is gated: ask for access at {PAGE}",
        ),
        (ValueError("BuilderConfig 'verbmem' not found.\nAvailable: [a]"), f"Available: [a]): see {PAGE}"),
        (ConnectionError(), "could not be read from the hub (ConnectionError)"),
    ],
)
def test_hub_errors_are_one_line_that_names_the_page(monkeypatch, error, message):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        MuseConfig().open(Path(), 0)
    assert message in str(caught.value)
    assert PAGE in str(caught.value)
    assert str(caught.value).startswith("muse.data: 'muse-bench/MUSE-News'")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "rows", "message"),
    [
        (
            ("verbmem", "forget"),
            [{"prompt": "a", "text": "b"}],
            "row 1: columns not recognised (prompt, text); MUSE's are",
        ),
        (("knowmem", "retain_qa_icl"), [{"question": "a", "answer": 3}], "row 1: column 'answer' is not text"),
        (("privleak", "holdout"), None, "has no rows of holdout (.parquet, .json or .jsonl): get them from"),
    ],
)
def test_a_folder_that_is_not_muses_is_one_line_that_names_the_page(tmp_path, table, rows, message):
    tables = {key: value for key, value in {**TABLES, table: rows}.items() if value is not None}
    with pytest.raises(UserError) as caught:
        opened(write_hub_folder(tmp_path, tables))
    assert message in str(caught.value)
    assert PAGE in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_files_and_missing_folders(tmp_path):
    folder = write_hub_folder(tmp_path, TABLES)
    with pytest.raises(UserError, match=r"^muse\.data: folder \./gone does not exist: get the data from https://"):
        MuseConfig(data="./gone").open(tmp_path, 0)
    (folder / "verbmem" / "forget-00000-of-00001.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"^muse\.data: .*forget-00000-of-00001\.parquet: [^\n]*get it anew from"):
        opened(folder)
    (folder / "verbmem" / "forget-00000-of-00001.parquet").unlink()
    (folder / "verbmem" / "forget.json").write_text("[{")
    with pytest.raises(UserError, match=r"^muse\.data: .*forget\.json: Expecting"):
        opened(folder)


# recipes


@needs_recipes
@pytest.mark.parametrize("name", NAMES)
def test_recipes_are_valid(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert recipe.selection.layers == (5, 6, 7)
    assert recipe.evaluation.forget.split == "forget_qa"


def tiny_request(name, hub, model, out, k):
    """One request of a recipe's loop, on the tiny model and a folder in the hub's format."""
    overrides = [
        f"model={model}",
        f"corpus.forget.source={hub}",
        f"corpus.retain.source={hub}",
        f"corpus.forget.split=forget_{k}",
        "corpus.max_length=64",
        f"evaluation.forget.source={hub}",
        f"evaluation.retain.source={hub}",
        f"output={out}",
        "selection.layers=[1]",
        "training.steps=1",
        "training.optimizer.lr=0.01",
        "device=cpu",
    ]
    return unlearn(load_recipe(RECIPES / f"{name}.yaml", overrides))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@needs_recipes
@pytest.mark.usefixtures("cache")
def test_scalability_starts_each_size_from_the_target_model(hub, tiny, tmp_path):
    runs = [tiny_request("muse_scalability", hub, tiny.model, tmp_path / f"{k}", k) for k in (1, 2)]
    sizes = [json.loads((run.folder / "corpus.json").read_text()) for run in runs]
    assert [size["report"]["records"]["forget"] for size in sizes] == [6, 12]
    assert all(Path(run.patch.base_model).samefile(tiny.model) for run in runs)


@needs_recipes
@pytest.mark.usefixtures("cache")
def test_sustainability_starts_each_request_from_the_result_of_the_last(hub, tiny, tmp_path):
    first = tiny_request("muse_sustainability", hub, tiny.model, tmp_path / "1", 1)
    apply_patch(tiny.model, first.folder / "patch", tmp_path / "1" / "model")
    second = tiny_request("muse_sustainability", hub, tmp_path / "1" / "model", tmp_path / "2", 2)
    before = {name: change.sha256_after for name, change in first.patch.tensors.items()}
    after = {name: change.sha256_before for name, change in second.patch.tensors.items()}
    assert before == after
    apply_patch(tmp_path / "1" / "model", second.folder / "patch", tmp_path / "2" / "model")
    suite = opened(hub)
    rows = suite.score("knowmem_forget", range(2), subject_of(tmp_path / "2" / "model"))
    assert all(0 <= row.rouge_l_f1 <= 1 for row in rows)
