"""The suite on the tiny model, on files in every layout of the hub's dataset."""

import dataclasses
import json
import math
import os
from pathlib import Path

import pyarrow
import pytest
from conftest import FORGET_ROWS, RETAIN_ROWS, write_lines
from pyarrow import parquet
from transformers import AutoModelForCausalLM, AutoTokenizer

from falcon_unlearn.artifacts import to_plain
from falcon_unlearn.corpus.batching import Encoder
from falcon_unlearn.errors import UserError
from falcon_unlearn.evaluation.logs import score_log
from falcon_unlearn.evaluation.metrics import compute_metrics
from falcon_unlearn.evaluation.suite import Subject
from falcon_unlearn.evaluation.tofu import PAGE, TofuConfig

DATA = Path(os.environ.get("FALCON_UNLEARN_DATA", "../shared/data"))
PARTS = ("forget", "retain", "real_authors", "world_facts")
COLUMNS = ("question", "answer", "paraphrased_answer", "perturbed_answer")

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no shared data")


def tofu_rows(rows, *, paraphrase=True):
    """TOFU's columns, and none of the tiny benchmark's own."""
    return [{c: row[c] for c in COLUMNS if paraphrase or c != "paraphrased_answer"} for row in rows]


def configurations(split="forget10"):
    return {
        f"{split}_perturbed": tofu_rows(FORGET_ROWS),
        "retain_perturbed": tofu_rows(RETAIN_ROWS[:8]),
        "real_authors_perturbed": tofu_rows(RETAIN_ROWS[8:16], paraphrase=False),
        "world_facts_perturbed": tofu_rows(RETAIN_ROWS[16:22], paraphrase=False),
    }


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def jsonl_folder(folder):
    for name, rows in configurations().items():
        write_lines(folder / f"{name}.jsonl", rows)


def json_snapshot(folder):
    """As the hub's repository is laid out: JSON lines in .json files, declared in the README."""
    for name, rows in configurations().items():
        write_lines(folder / f"{name}.json", rows)
    declared = "".join(f"- config_name: {name}\n  data_files: {name}.json\n" for name in configurations())
    (folder / "README.md").write_text(f"---\nconfigs:\n{declared}---\n", encoding="utf-8")


def parquet_folders(folder):
    for name, rows in configurations().items():
        write_parquet(folder / name / "train-00000-of-00001.parquet", rows)


def parquet_declared(folder):
    """Parquet under names that only the README knows."""
    for name, rows in configurations().items():
        write_parquet(folder / "data" / f"{name[:5]}-train.parquet", rows)
    declared = "".join(f"- config_name: {n}\n  data_files: data/{n[:5]}-train.parquet\n" for n in configurations())
    (folder / "README.md").write_text(f"---\nconfigs:\n{declared}---\n", encoding="utf-8")


LAYOUTS = (jsonl_folder, json_snapshot, parquet_folders, parquet_declared)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path):
    jsonl_folder(tmp_path / "tofu")
    return tmp_path


def subject(path):
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    return Subject(model, Encoder(AutoTokenizer.from_pretrained(path)), batch_size=16, name=path.name)


@pytest.fixture(scope="module")
def scored(tiny, oracle, tmp_path_factory):
    """The suite, and the rows of the model and of its oracle."""
    place = tmp_path_factory.mktemp("scored")
    jsonl_folder(place / "tofu")
    suite = TofuConfig(data="tofu", max_new_tokens=16).open(place, 0)
    rows = [
        {part: suite.score(part, range(n), of) for part, n in suite.parts.items()}
        for of in (subject(tiny.model), subject(oracle))
    ]
    return suite, *rows


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_gives_the_same_suite(tmp_path, offline, layout):
    layout(tmp_path / "tofu")
    suite = TofuConfig(data="tofu").open(tmp_path, 0)
    assert suite.parts == {"forget": 12, "retain": 8, "real_authors": 8, "world_facts": 6}
    jsonl_folder(tmp_path / "plain")
    assert suite.content == TofuConfig(data=str(tmp_path / "plain")).open(Path("/"), 0).content
    assert all(record.paraphrased_answer is None for record in suite.records["world_facts"].values())


def test_the_model_that_knows_is_told_from_the_oracle(scored):
    suite, rows, oracle = scored
    result = suite.summarise(rows, oracle, {"template": "plain"})
    metrics = result.metrics
    assert result.suite == "tofu"
    same = suite.summarise(oracle, oracle, {})
    assert metrics["forget_quality"].value < same.metrics["forget_quality"].value == 1
    assert metrics["log10_forget_quality"].value == pytest.approx(math.log10(metrics["forget_quality"].value))
    assert metrics["forget_quality"].low is None
    assert metrics["forget_probability"].value > 0.8
    assert 0 < metrics["model_utility"].value <= 1
    for name in ("model_utility", "forget_truth_ratio", "real_authors_probability", "retain_rouge"):
        assert metrics[name].low <= metrics[name].value <= metrics[name].high
    parts = [f"{part}_{measure}" for part in PARTS[1:] for measure in ("probability", "rouge", "truth_ratio")]
    assert set(parts) < set(metrics)
    assert metrics["forget_rouge"].n == 12
    assert "cannot be told from the oracle" in result.statements[0]
    assert "no proof" in result.statements[0]
    assert result.settings["template"] == "plain"
    assert result.settings["split"] == "forget10"
    # Twelve questions cannot tell; four times as many of the same can.
    more, more_oracle = ({**of, "forget": 4 * list(of["forget"])} for of in (rows, oracle))
    said = suite.summarise(more, more_oracle, {}).statements[0]
    assert said.startswith("On the forget set the truth ratios differ from those of the oracle")


def test_the_numbers_are_those_of_the_metrics_in_both_definitions(scored):
    suite, rows, oracle = scored
    summary = suite.summarise(rows, oracle, {}).metrics
    for definition, suffix in (("code", ""), ("paper", "_paper")):
        metrics = compute_metrics(rows, oracle["forget"], definition=definition)
        for name in ("forget_quality", "log10_forget_quality", "model_utility", "forget_truth_ratio"):
            assert summary[name + suffix].value == pytest.approx(getattr(metrics, name), nan_ok=True)
        for name in ("retain_truth_ratio", "world_facts_truth_ratio"):
            assert summary[name + suffix].value == pytest.approx(metrics.utility_parts[name], nan_ok=True)


def test_without_an_oracle_it_says_so(scored):
    suite, rows, _ = scored
    result = suite.summarise(rows, None, {})
    assert result.metrics["forget_quality"].value is None
    assert "there is no forget quality" in result.statements[0]
    broken = [dataclasses.replace(row, truth_ratio=math.nan) for row in rows["forget"]]
    result = suite.summarise({**rows, "forget": broken}, {"forget": rows["forget"]}, {})
    assert result.metrics["forget_quality"].value is None
    assert "no truth ratio could be scored" in result.statements[0]


def test_scoring_piece_by_piece_gives_the_same_rows(scored, tiny):
    suite, rows, _ = scored
    again = subject(tiny.model)
    pieces = [*suite.score("forget", range(5), again), *suite.score("forget", range(5, 12), again)]
    assert [row.index for row in pieces] == list(range(12))
    for piece, row in zip(pieces, rows["forget"], strict=True):
        assert (piece.generation, piece.rouge) == (row.generation, row.rouge)
        assert piece.truth_ratio == pytest.approx(row.truth_ratio, rel=1e-4)


def test_rows_survive_json(scored):
    suite, rows, _ = scored
    for part, of_part in rows.items():
        for row in of_part:
            assert suite.row(part, json.loads(json.dumps(to_plain(row)))) == row


def test_what_could_not_be_scored_still_counts_after_json(scored):
    suite, rows, _ = scored
    row = dataclasses.replace(rows["real_authors"][0], truth_ratio=math.nan, normalised_probability=math.nan)
    read = suite.row("real_authors", json.loads(json.dumps(to_plain(row))))
    assert math.isnan(read.truth_ratio)
    assert math.isnan(read.normalised_probability)
    changed = {**rows, "real_authors": [read, *rows["real_authors"][1:]]}
    result = suite.summarise(changed, None, {})
    assert result.metrics["real_authors_truth_ratio"].unscorable == 1
    assert any(statement.startswith("Unscorable questions were left out: 1 of") for statement in result.statements)


def test_the_exported_log_gives_the_same_numbers(scored, tmp_path):
    suite, rows, oracle = scored
    exports = suite.exports(rows, oracle)
    assert set(exports) == {"TOFU_EVAL.json", "TOFU_SUMMARY.json"}
    log = tmp_path / "TOFU_EVAL.json"
    log.write_text(json.dumps(exports["TOFU_EVAL.json"], allow_nan=False), encoding="utf-8")
    retain = tmp_path / "RETAIN.json"
    retain.write_text(json.dumps(suite.exports(oracle, None)["TOFU_EVAL.json"]), encoding="utf-8")
    metrics = suite.summarise(rows, oracle, {}).metrics
    read = score_log(log, retain)
    assert read.forget_quality == metrics["forget_quality"].value
    assert read.model_utility == metrics["model_utility"].value
    assert exports["TOFU_SUMMARY.json"]["model_utility"] == read.model_utility
    # A retain log of ours stands in for the oracle's rows.
    config = suite.config.model_copy(update={"retain_log": "RETAIN.json", "data": str(tmp_path / "tofu")})
    jsonl_folder(tmp_path / "tofu")
    with_log = config.open(tmp_path, 0).summarise(rows, None, {})
    assert with_log.metrics["forget_quality"].value == metrics["forget_quality"].value
    assert "the model of RETAIN.json" in with_log.statements[0]


def test_a_draw_is_seeded_and_said(folder, tiny):
    config = TofuConfig(data="tofu", max_records=5, max_new_tokens=4)
    suite = config.open(folder, 0)
    assert suite.parts == dict.fromkeys(PARTS, 5)
    assert suite.content == config.open(folder, 0).content
    assert suite.content != config.open(folder, 1).content
    rows = suite.score("forget", range(2, 5), subject(tiny.model))
    indices = list(suite.records["forget"])
    assert indices == sorted(indices)
    assert [row.index for row in rows] == indices[2:]
    assert [row.prompt for row in rows] == [FORGET_ROWS[i]["question"] for i in indices[2:]]
    everything = dict.fromkeys(PARTS, suite.score("forget", range(5), subject(tiny.model)))
    statements = suite.summarise(everything, None, {}).statements
    assert any("not comparable with published figures" in statement for statement in statements)


def test_the_content_depends_on_what_the_scores_depend_on(folder):
    content = TofuConfig(data="tofu").open(folder, 0).content
    assert TofuConfig(data="tofu").open(folder, 7).content == content
    assert TofuConfig(data="tofu", max_new_tokens=7).open(folder, 0).content != content
    rows = tofu_rows(RETAIN_ROWS[:8])
    rows[0]["answer"] = "Something else."
    write_lines(folder / "tofu" / "retain_perturbed.jsonl", rows)
    assert TofuConfig(data="tofu").open(folder, 0).content != content


@needs_data
@pytest.mark.parametrize(("split", "authors"), [("forget01", 2), ("forget05", 10), ("forget10", 20)])
def test_records_of_tofu_itself_know_their_author(split, authors):
    suite = TofuConfig(data=str((DATA / "tofu").resolve()), split=split).open(Path("/"), 0)
    assert suite.parts == {"forget": 20 * authors, "retain": 400, "real_authors": 100, "world_facts": 117}
    entities = [record.entity for record in suite.records["forget"].values()]
    assert len(set(entities)) == authors
    assert len({record.entity for record in suite.records["retain"].values()}) == 20
    assert {record.entity for record in suite.records["real_authors"].values()} == {None}


# --- what is wrong ------------------------------------------------------------------------------------------------


def refused(config, base_dir):
    with pytest.raises(UserError) as error:
        config.open(base_dir, 0)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_configuration_names_the_dataset_page(folder):
    (folder / "tofu" / "retain_perturbed.jsonl").unlink()
    message = refused(TofuConfig(data="tofu"), folder)
    assert "tofu.data: 'tofu' holds no configuration 'retain_perturbed'" in message
    assert PAGE in message


def test_another_splits_folder(folder):
    message = refused(TofuConfig(data="tofu", split="forget01"), folder)
    assert "no configuration 'forget01_perturbed'" in message


def test_a_configuration_that_the_readme_does_not_declare(tmp_path, offline):
    parquet_declared(tmp_path / "tofu")
    message = refused(TofuConfig(data="tofu", split="forget05"), tmp_path)
    assert "tofu.data: dataset 'tofu' has no config 'forget05_perturbed'; available: " in message


@pytest.mark.parametrize(
    ("configuration", "column"),
    [
        ("forget10_perturbed", "perturbed_answer"),
        ("forget10_perturbed", "paraphrased_answer"),
        ("retain_perturbed", "paraphrased_answer"),
        ("world_facts_perturbed", "perturbed_answer"),
    ],
)
def test_a_missing_column_is_named_with_its_place(folder, configuration, column):
    rows = [dict(row) for row in configurations()[configuration]]
    del rows[2][column]
    write_lines(folder / "tofu" / f"{configuration}.jsonl", rows)
    message = refused(TofuConfig(data="tofu"), folder)
    assert f"tofu/{configuration}.jsonl:3: has no {column}" in message
    assert PAGE in message


def test_unknown_columns(folder):
    write_lines(folder / "tofu" / "retain_perturbed.jsonl", [{"q": "?", "a": "!"}])
    assert "columns not recognised (a, q)" in refused(TofuConfig(data="tofu"), folder)


def test_text_is_no_question(folder):
    write_lines(folder / "tofu" / "retain_perturbed.jsonl", [{"text": "words"}])
    assert "has no question and answer" in refused(TofuConfig(data="tofu"), folder)


def test_gated_and_unreachable_data_name_the_dataset_page(tmp_path, monkeypatch):
    import datasets

    def gated(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'locuslab/TOFU' is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", gated)
    message = refused(TofuConfig(), tmp_path)
    assert "is gated" in message
    assert message.count(PAGE) == 1

    def unreachable(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = refused(TofuConfig(), tmp_path)
    assert "hub could not be reached" in message
    assert message.count(PAGE) == 1


def test_the_hub_is_asked_for_tofus_configurations(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load(path, name, split):
        asked.append((path, name, split))
        return configurations("forget05")[name]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert TofuConfig(split="forget05").open(tmp_path, 0).parts["forget"] == 12
    names = ("forget05_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
    assert asked == [("locuslab/TOFU", name, "train") for name in names]


def test_a_missing_retain_log_is_found_before_anything_is_scored(folder):
    message = refused(TofuConfig(data="tofu", retain_log="nowhere.json"), folder)
    assert message.startswith("tofu.retain_log: missing file 'nowhere.json'")
    (folder / "bad.json").write_text("{}")
    assert "neither a TOFU log" in refused(TofuConfig(data="tofu", retain_log="bad.json"), folder)
