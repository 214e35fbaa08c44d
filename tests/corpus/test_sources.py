import csv
import io
import json
import os
import tempfile
from pathlib import Path

import datasets
import pyarrow
import pytest
from datasets.exceptions import DatasetNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from pydantic import ValidationError

from falcon_unlearn.corpus.sources import CorpusConfig, SourceConfig, load_corpus, load_records
from falcon_unlearn.errors import UserError

ROWS = [
    {"question": "Who is Ann?", "answer": "A potter.\nAnd more."},
    {"question": "Où?", "answer": 'Here, "there" 🎈'},
]
TOFU = Path(os.environ.get("FALCON_UNLEARN_DATA", "../shared/data")) / "tofu"


def jsonl(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def csv_text(rows) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def parquet_bytes(rows) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def load(source, base_dir, **options):
    return load_records(SourceConfig(source=str(source), **options), base_dir, "corpus.forget")


def pairs(records):
    return [(record.prompt, record.answer) for record in records]


def corpus(base_dir, **config):
    return load_corpus(CorpusConfig.model_validate(config), base_dir)


EXPECTED = [(row["question"], row["answer"]) for row in ROWS]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", jsonl(ROWS)),
        ("a.jsonl", "\n" + jsonl(ROWS).replace("\n", "\r\n\r\n").rstrip()),
        ("a.jsonl", b"\xef\xbb\xbf" + jsonl(ROWS).encode()),
        ("a.JSONL", jsonl(ROWS)),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.json", json.dumps({"data": ROWS, "version": 1})),
        ("a.json", '{"data": [' + json.dumps(ROWS[0]) + ",\n" + json.dumps(ROWS[1]) + "]}"),
        ("a.json", jsonl(ROWS)),
        ("a.csv", csv_text(ROWS)),
        ("a.csv", b"\xef\xbb\xbf" + csv_text(ROWS).encode()),
        ("a.parquet", parquet_bytes(ROWS)),
    ],
)
def test_every_format_gives_the_same_records(tmp_path, name, content):
    write(tmp_path / name, content)
    assert pairs(load(name, tmp_path)) == EXPECTED


def test_a_text_file_is_one_record_a_paragraph(tmp_path):
    write(tmp_path / "a.txt", "\nfirst line\nsecond line\n \n\n\r\nother\x00\u2028one\r\n")
    records = load("a.txt", tmp_path)
    assert [(r.kind, r.answer, r.origin) for r in records] == [
        ("text", "first line\nsecond line", "a.txt:2"),
        ("text", "other\x00\u2028one", "a.txt:7"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "origins"),
    [
        ("a.jsonl", "\n" + jsonl(ROWS), ["a.jsonl:2", "a.jsonl:3"]),
        ("a.json", json.dumps(ROWS), ["a.json, record 1", "a.json, record 2"]),
        ("a.csv", csv_text(ROWS), ["a.csv:2", "a.csv:4"]),
        ("a.parquet", parquet_bytes(ROWS), ["a.parquet, row 1", "a.parquet, row 2"]),
    ],
)
def test_origins(tmp_path, name, content, origins):
    write(tmp_path / name, content)
    assert [record.origin for record in load(name, tmp_path)] == origins


text = st.text(min_size=1, max_size=40).filter(str.strip)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(text, text), min_size=1, max_size=5), st.booleans(), st.sampled_from(["jsonl", "json", "csv"])
)
def test_any_text_survives(rows, ascii_only, suffix):
    dicts = [{"question": question, "answer": answer} for question, answer in rows]
    content = {
        "jsonl": lambda: "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in dicts),
        "json": lambda: json.dumps(dicts, ensure_ascii=ascii_only),
        "csv": lambda: csv_text(dicts),
    }[suffix]()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / f"a.{suffix}", content)
        assert pairs(load(f"a.{suffix}", Path(folder))) == rows


def test_csv_takes_fields_longer_than_the_csv_module_does(tmp_path):
    limit = csv.field_size_limit()
    write(tmp_path / "a.csv", csv_text([{"text": "word " * 60_000}]))
    assert len(load("a.csv", tmp_path)[0].answer) == 300_000
    assert csv.field_size_limit() == limit


def test_limit_stops_before_what_is_wrong_further_down(tmp_path):
    write(tmp_path / "a.jsonl", jsonl(ROWS) + "{")
    assert pairs(load("a.jsonl", tmp_path, limit=2)) == EXPECTED
    assert pairs(load("a.jsonl", tmp_path, limit=1)) == EXPECTED[:1]


def test_the_recipe_folder_comes_before_the_current_one(tmp_path, monkeypatch):
    write(tmp_path / "here" / "a.jsonl", jsonl(ROWS))
    write(tmp_path / "recipe" / "b.jsonl", jsonl(ROWS[:1]))
    monkeypatch.chdir(tmp_path / "here")
    assert len(load("a.jsonl", tmp_path / "recipe")) == 2
    write(tmp_path / "recipe" / "a.jsonl", jsonl(ROWS[:1]))
    assert len(load("a.jsonl", tmp_path / "recipe")) == 1
    assert len(load(tmp_path / "here" / "a.jsonl", tmp_path / "recipe")) == 2


def test_an_existing_path_wins_over_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    write(tmp_path / "locuslab" / "TOFU" / "a.jsonl", jsonl(ROWS))
    assert pairs(load("locuslab/TOFU", tmp_path)) == EXPECTED


def test_a_folder_is_read_in_path_order(tmp_path):
    folder = tmp_path / "people"
    write(folder / "b.jsonl", jsonl([{"text": "2"}]))
    write(folder / "a" / "z.csv", csv_text([{"text": "1"}]))
    write(folder / "c.txt", "3")
    write(folder / "notes.md", "not data")
    write(folder / ".cache" / "x.jsonl", "broken")
    write(folder / ".x.jsonl", "broken")
    records = load("people/", tmp_path)
    assert [r.answer for r in records] == ["1", "2", "3"]
    assert [r.origin for r in records] == ["people/a/z.csv:2", "people/b.jsonl:1", "people/c.txt:1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", jsonl(ROWS) + '{"question": }\n', "a.jsonl:3: malformed JSON: Expecting value (column 14)"),
        ("a.jsonl", jsonl(ROWS) + '"text"\n', "a.jsonl:3: expected an object with the columns text | question+answer"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: malformed JSON: "),
        ("a.jsonl", "1" * 5_000, "a.jsonl:1: malformed JSON: "),
        ("a.jsonl", jsonl([{"title": "x"}]), "a.jsonl:1: columns not recognised (title)"),
        ("a.jsonl", jsonl([*ROWS, {"text": ""}]), "a.jsonl:3: column 'text' is empty"),
        ("a.jsonl", "", "corpus.forget: 'a.jsonl' holds no records"),
        ("a.jsonl", "\n \n", "corpus.forget: 'a.jsonl' holds no records"),
        ("a.jsonl", '{"text": "é"}'.encode("latin-1"), "a.jsonl: not UTF-8 (byte 10)"),
        ("a.txt", "x".encode("utf-16"), "a.txt: not UTF-8 (byte 0)"),
        ("a.txt", "", "holds no records"),
        ("a.json", '[\n{"text": "x"},\n{"text": }]', "a.json:3: malformed JSON: Expecting value"),
        ("a.json", '{"text": "x"}', "a.json: expected a list of objects"),
        ("a.json", '{"text": "x"}\n{"text" "y"}', "a.json:2: malformed JSON: Expecting ':' delimiter"),
        ("a.json", '["x"]', "a.json, record 1: expected an object"),
        ("a.json", "[]", "holds no records"),
        ("a.json", "", "holds no records"),
        ("a.csv", "Who?,Ann\nWhere?,Here\n", "a.csv:1: the first line must name the columns (text | question+answer"),
        ("a.csv", "question,answer\nq,a\nq,a,more\n", "a.csv:3: 3 fields, but the first line names 2 columns"),
        ("a.csv", 'question,answer\n"q\nq",a\nq\n', "a.csv:4: 1 fields, but the first line names 2 columns"),
        ("a.csv", 'text\nfine\n"open\n\n', "a.csv:3: malformed CSV: "),
        ("a.csv", "text,text\na,b\n", "a.csv:1: a column name stands twice"),
        ("a.csv", "question,answer\nq,\n", "a.csv:2: column 'answer' is empty"),
        ("a.csv", "question,answer\n", "holds no records"),
        ("a.csv", "", "holds no records"),
        ("a.parquet", b"PAR1 not really", "a.parquet: not a readable Parquet file: "),
        ("a.parquet", b"", "a.parquet: not a readable Parquet file: "),
        ("a.parquet", parquet_bytes([{"text": 3}]), "a.parquet, row 1: column 'text' is int, not text"),
        ("a.tsv", "text\nx\n", "corpus.forget: 'a.tsv' is not one of the formats that can be read (.jsonl .json"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path, name, content, message):
    write(tmp_path / name, content)
    with pytest.raises(UserError) as caught:
        load(name, tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source", ["gone.jsonl", "./gone", "/gone", "~/gone", "data/people/gone", "a b", "~nobody-at-all/x"]
)
def test_a_missing_file_is_no_hub_id(tmp_path, monkeypatch, source):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=r"^corpus\.forget: (missing file|cannot look up) '"):
        load(source, tmp_path)


def test_a_folder_without_data(tmp_path):
    write(tmp_path / "people" / "readme.md", "")
    with pytest.raises(UserError, match=r"^corpus\.forget: no \.jsonl .* file in the folder 'people'"):
        load("people", tmp_path)


def test_an_unreadable_file(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "x")
    monkeypatch.setattr(Path, "read_bytes", lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(UserError, match=r"^corpus\.forget: cannot read 'a\.txt': .*Permission denied"):
        load("a.txt", tmp_path)


def test_config_and_split_mean_nothing_for_a_file(tmp_path):
    write(tmp_path / "a.jsonl", jsonl(ROWS))
    for option in ({"config": "en"}, {"split": "test"}):
        with pytest.raises(UserError, match="config and split are for datasets and folders only"):
            load("a.jsonl", tmp_path, **option)


# --- hub datasets -----------------------------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """What HF_HUB_OFFLINE=1 and an empty cache do; both libraries read the variables on import."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def hub_folder(tmp_path, offline):
    """A local folder in hub layout: configuration ``en`` with two splits, ``fr`` with one."""
    folder = tmp_path / "quiz"
    write(folder / "en" / "train-00000-of-00001.parquet", parquet_bytes(ROWS))
    write(folder / "en" / "test-00000-of-00001.parquet", parquet_bytes([{"question": "test", "answer": "t"}]))
    write(folder / "fr" / "train.parquet", parquet_bytes([{"question": "qui", "answer": "moi"}]))
    write(
        folder / "README.md",
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/train-*\n"
        "  - split: test\n    path: en/test-*\n- config_name: fr\n  data_files: fr/train.parquet\n---\n",
    )
    return folder


def test_a_folder_in_hub_layout(hub_folder):
    records = load("quiz", hub_folder.parent, config="en")
    assert pairs(records) == EXPECTED
    assert records[1].origin == "quiz (en, train), row 2"
    assert pairs(load("quiz", hub_folder.parent, config="en", split="test")) == [("test", "t")]
    assert pairs(load("quiz", hub_folder.parent, config="fr")) == [("qui", "moi")]
    assert pairs(load("quiz", hub_folder.parent, config="en", split="train[1:]")) == EXPECTED[1:]
    assert pairs(load("quiz", hub_folder.parent, config="en", limit=1)) == EXPECTED[:1]


def test_the_test_split_stays_out_without_a_readme(hub_folder):
    (hub_folder / "README.md").unlink()
    assert pairs(load("quiz/en", hub_folder.parent)) == EXPECTED
    assert pairs(load("quiz/en", hub_folder.parent, split="test")) == [("test", "t")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "corpus.forget: dataset 'quiz' needs a config; available: 'en', 'fr'"),
        ({"config": "de"}, "corpus.forget: dataset 'quiz' has no config 'de'; available: 'en', 'fr'"),
        (
            {"config": "en", "split": "dev"},
            "corpus.forget: dataset 'quiz' has no split 'dev'; available: 'train', 'test'",
        ),
        ({"config": "en", "split": "train[:x"}, "corpus.forget: dataset 'quiz' could not be loaded: Unrecognized"),
    ],
)
def test_wrong_config_or_split(hub_folder, options, message):
    with pytest.raises(UserError) as caught:
        load("quiz", hub_folder.parent, **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_an_id_goes_to_the_hub_as_it_is(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records = load("locuslab/TOFU", tmp_path, config="forget01", split="train")
    assert pairs(records) == EXPECTED
    assert asked == [(("locuslab/TOFU", "forget01"), {"split": "train"})]
    assert records[0].origin == "locuslab/TOFU (forget01, train), row 1"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub. Visit the page at ..."),
            "dataset 'a/b' is gated: ask for access at https://huggingface.co/datasets/a/b",
        ),
        (
            DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"),
            "neither a local file or folder nor a dataset",
        ),
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "the hub could not be reached"),
        (
            RuntimeError("Dataset scripts are no longer supported\nbut found b.py"),
            "could not be loaded: Dataset scripts",
        ),
        (OSError(28, "No space left on device"), "could not be loaded: [Errno 28] No space left on device"),
        (ValueError(), "could not be loaded: ValueError"),
    ],
)
def test_hub_errors_are_one_clear_line(tmp_path, monkeypatch, error, message):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        load("a/b", tmp_path)
    assert str(caught.value).startswith("corpus.forget: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.usefixtures("offline")
def test_offline(tmp_path):
    with pytest.raises(UserError, match="the hub could not be reached for a dataset of that name"):
        load("nobody-at-all/no-such-dataset", tmp_path)


# --- the corpus section -----------------------------------------------------------------------------------------


def test_shapes_of_forget_and_retain():
    one = SourceConfig(source="a.jsonl")
    assert CorpusConfig(forget="a.jsonl", retain={"source": "a.jsonl"}).forget == one
    config = CorpusConfig(forget={"bio": {"source": "a.jsonl", "limit": 3}, "cyber": "c.jsonl"}, retain=one)
    assert config.forget == {"bio": SourceConfig(source="a.jsonl", limit=3), "cyber": SourceConfig(source="c.jsonl")}
    assert CorpusConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("forget", "locations"),
    [
        ({"source": "a", "limt": 3}, {("forget", "limt")}),
        ({"sorce": "a"}, {("forget", "sorce"), ("forget", "source")}),
        ({"source": "a", "limit": 0}, {("forget", "limit")}),
        ({"source": 3}, {("forget", "source")}),
        ({"source": ""}, {("forget", "source")}),
        ({"bio": {"sorce": "a"}}, {("forget", "bio", "sorce"), ("forget", "bio", "source")}),
        ({"bio": {"source": "a", "limit": -1}, "cyber": 3}, {("forget", "bio", "limit"), ("forget", "cyber")}),
        ({"a b": {"source": "a"}}, {("forget", "a b", "[key]")}),
        ({"": {"source": "a"}}, {("forget", "", "[key]")}),
        ({}, {("forget", "source")}),
        ([{"source": "a"}], {("forget",)}),
        (None, {("forget",)}),
    ],
)
def test_errors_name_the_key_alone(forget, locations):
    with pytest.raises(ValidationError) as caught:
        CorpusConfig.model_validate({"forget": forget, "retain": "r.jsonl"})
    assert {error["loc"] for error in caught.value.errors()} == locations


def test_duplicates_are_kept_once_and_counted(tmp_path):
    rows = [ROWS[0], ROWS[1], {"question": " Who  is Ann?", "answer": ROWS[0]["answer"]}, ROWS[0]]
    write(tmp_path / "f.jsonl", jsonl(rows))
    write(tmp_path / "r.jsonl", jsonl([{"text": "other"}]))
    loaded = corpus(tmp_path, forget="f.jsonl", retain="r.jsonl")
    assert [r.origin for r in loaded.forget["forget"]] == ["f.jsonl:1", "f.jsonl:2"]
    assert loaded.report.records == {"forget": 2, "retain": 1}
    assert loaded.report.duplicates == {"forget": 2, "retain": 0}
    assert (loaded.report.overlap, loaded.report.overlap_example) == (0, None)


@pytest.fixture
def overlapping(tmp_path):
    write(tmp_path / "f.jsonl", jsonl([{"text": "a"}, {"text": "b"}, {"text": "c"}]))
    write(tmp_path / "r.jsonl", jsonl([{"text": "x"}, {"text": "c"}, {"text": " b"}, {"text": "c"}]))
    return tmp_path


def answers(domains):
    return {name: [record.answer for record in records] for name, records in domains.items()}


def test_overlap_is_an_error(overlapping):
    with pytest.raises(UserError) as caught:
        corpus(overlapping, forget="f.jsonl", retain="r.jsonl")
    assert "2 retain records also stand in forget (first: f.jsonl:3 and r.jsonl:2)" in str(caught.value)
    assert "corpus.on_overlap" in str(caught.value)


@pytest.mark.parametrize(("mode", "kept"), [("drop", ["x"]), ("allow", ["x", "c", " b"])])
def test_overlap_dropped_or_allowed(overlapping, mode, kept):
    loaded = corpus(overlapping, forget="f.jsonl", retain="r.jsonl", on_overlap=mode)
    assert answers(loaded.forget) == {"forget": ["a", "b", "c"]}
    assert answers(loaded.retain) == {"retain": kept}
    assert loaded.report.records["retain"] == len(kept)
    assert (loaded.report.overlap, loaded.report.overlap_example) == (2, ("f.jsonl:3", "r.jsonl:2"))
    assert (loaded.report.on_overlap, loaded.report.duplicates["retain"]) == (mode, 1)


def test_nothing_left_to_retain(overlapping):
    with pytest.raises(UserError, match=r"^corpus\.retain: every record also stands in forget"):
        corpus(overlapping, forget="f.jsonl", retain="f.jsonl", on_overlap="drop")


def test_several_domains(overlapping):
    loaded = corpus(
        overlapping,
        forget={"bio": "f.jsonl", "cyber": {"source": "f.jsonl", "limit": 1}},
        retain={"books": {"source": "r.jsonl", "limit": 1}},
    )
    assert answers(loaded.forget) == {"bio": ["a", "b", "c"], "cyber": ["a"]}
    assert answers(loaded.retain) == {"books": ["x"]}
    assert loaded.report.records == {"forget.bio": 3, "forget.cyber": 1, "retain.books": 1}
    assert set(loaded.hashes) == {"forget.bio", "forget.cyber", "retain.books"}


def test_messages_name_the_domain(overlapping):
    with pytest.raises(UserError, match=r"^corpus\.forget\.bio: missing file 'gone\.jsonl' \(looked beside "):
        corpus(overlapping, forget={"bio": "gone.jsonl"}, retain="r.jsonl")


def test_hashes_depend_on_content_and_order_alone(tmp_path):
    write(tmp_path / "f.jsonl", jsonl(ROWS))
    write(tmp_path / "same.csv", csv_text(ROWS))
    write(tmp_path / "turned.jsonl", jsonl(ROWS[::-1]))
    write(tmp_path / "more.jsonl", jsonl([{**ROWS[0], "value": "potter"}, ROWS[1]]))
    write(tmp_path / "r.jsonl", jsonl([{"text": "x"}]))
    names = ("f.jsonl", "same.csv", "turned.jsonl", "more.jsonl")
    first, same, *others = (corpus(tmp_path, forget=n, retain="r.jsonl").hashes["forget"] for n in names)
    assert first == same
    assert len({first, *others}) == 3
    assert len(first) == 64


@pytest.mark.skipif(not TOFU.exists(), reason="no TOFU data")
def test_tofu():
    loaded = corpus(TOFU, forget="forget10_perturbed.jsonl", retain="retain90.jsonl")
    assert loaded.report.records == {"forget": 400, "retain": 3600}
    assert {len(r.perturbed_answers) for r in loaded.forget["forget"]} == {5}
    with pytest.raises(UserError, match="40 retain records also stand in forget"):
        corpus(TOFU, forget="forget01.jsonl", retain="full.jsonl")


def test_blank_rows_of_a_dataset_are_no_records(tmp_path):
    write(tmp_path / "wiki" / "train.jsonl", '{"text": ""}\n{"text": "A line."}\n{"text": "  "}\n')
    records = load("wiki", tmp_path, config="default")
    assert [record.answer for record in records] == ["A line."]
