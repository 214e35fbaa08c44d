"""The model card: what the files say, in the hub's format, whatever is missing."""

import json

import pytest
import yaml
from test_robustness import attacked

from falcon_unlearn.report.card import CARD_FILE, build_card, write_card

PROVENANCE = {
    "seed": 3,
    "model": {"name": "meta-llama/Llama-3.2-1B", "folder": "/cache/llama"},
    "method": {"name": "falcon", "preset": "paper"},
    "data": {"forget": "ab" * 32, "retain": "cd" * 32},
}
MODEL = {
    "forget_probability": 0.03,
    "forget_accuracy": 0.04,
    "forget_accuracy_heldout": None,
    "forget_rouge": 0.6,
    "forget_quality": 1.5e-9,
    "model_utility": 0.8,
    "intervals": {"forget_accuracy": [0.0, 0.1]},
}
METRICS = {"before": MODEL, "after": MODEL, "oracle": MODEL}


def front_of(card):
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def tables(card):
    """Rows of cells of every table, heads first."""
    found, rows = [], []
    for line in [*card.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")])
        elif rows:
            found.append(rows)
            rows = []
    return found


def test_the_card_says_what_was_done_to_which_model():
    card = build_card(METRICS, PROVENANCE, [])
    assert front_of(card) == {"base_model": "meta-llama/Llama-3.2-1B", "tags": ["unlearning", "falcon-unlearn"]}
    for words in ("`meta-llama/Llama-3.2-1B`", "method `falcon`", "preset `paper`", "seed 3", f"forget `{'ab' * 8}`"):
        assert words in card
    assert "ab" * 9 not in card


def test_a_local_folder_is_no_base_model_of_the_hub():
    card = build_card(METRICS, {**PROVENANCE, "model": {"name": "/home/me/model"}}, [])
    assert front_of(card) == {"tags": ["unlearning", "falcon-unlearn"]}


def test_the_table_of_results_has_every_measure_with_its_interval():
    (table,) = tables(build_card(METRICS, PROVENANCE, []))
    assert table[0] == ["", "before", "after", "oracle"]
    rows = {row[0]: row[1:] for row in table[2:]}
    assert rows["forget accuracy"] == ["0.04 (0.00 … 0.10)"] * 3
    assert rows["forget accuracy, held-out phrasing"] == ["-"] * 3
    assert rows["forget quality (p)"] == ["1.5e-09"] * 3
    assert all(len(row) == len(table[0]) for row in table)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({**METRICS, "oracle": None}, "There was no oracle, so there is no forget quality."),
        (METRICS, "The oracle is a model that never saw the forget data."),
        ({"before": None, "after": None, "oracle": None}, "Nothing was scored."),
        ({}, "Nothing was scored."),
    ],
)
def test_what_is_missing_is_said(metrics, words):
    card = build_card(metrics, PROVENANCE, [])
    assert words in card
    assert "None were run: whether the knowledge comes back" in card
    assert "## Limits" in card


def test_attacks_stand_with_the_one_number_first():
    results = [attacked("prune", 0.2), attacked("relearn", 0.6), attacked("interpolate", 1.0, uses_original=True)]
    results[0]["models"]["oracle"].update(status="out of memory", reason="lower | the batch size")
    results[1]["models"]["unlearned"]["notes"] = ["AdamW"]
    card = build_card(METRICS, PROVENANCE, results)
    section = card.split("## Attacks")[1].split("## Limits")[0]
    assert section.strip().startswith("**Strongest recovery: 60 % (40 … 80) by relearn")
    _, table = tables(card)
    assert [row[0] for row in table[2:]] == ["interpolate", "relearn", "prune"]
    assert all(len(row) == len(table[0]) for row in table)
    assert table[-1][-1] == "out of memory"
    assert "- relearn: AdamW." in section
    assert "- prune on the oracle model: out of memory" in section


def test_attacks_without_a_recovery_have_no_one_number():
    result = attacked("prune", None)
    result.update(recovery={}, oracle={})
    card = build_card(METRICS, PROVENANCE, [result])
    assert "Strongest" not in card
    assert "| prune | – | – |" in card


def test_it_is_written_from_the_files_of_a_run_as_far_as_there_are_any(tmp_path):
    assert write_card(tmp_path) == tmp_path / CARD_FILE
    assert "Nothing was scored." in (tmp_path / CARD_FILE).read_text()
    for name, content in (
        ("metrics.json", METRICS),
        ("provenance.json", PROVENANCE),
        ("attacks.json", {"attacks": [attacked("gcg", 0.3)], "worst": None}),
    ):
        (tmp_path / name).write_text(json.dumps(content))
    write_card(tmp_path)
    assert (tmp_path / CARD_FILE).read_text() == build_card(METRICS, PROVENANCE, [attacked("gcg", 0.3)])
    assert not list(tmp_path.glob(".*"))
