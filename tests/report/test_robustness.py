"""The robustness table: recoveries in order, one number, nothing lost where a number is missing."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_unlearn.artifacts import Estimate, SampleScore, to_plain
from falcon_unlearn.attacks import base
from falcon_unlearn.attacks.battery import BatteryConfig
from falcon_unlearn.report.robustness import (
    attack_figures,
    attack_notes,
    attack_rows,
    incomplete,
    shown,
    worst_recovery,
)


def estimate(value, spread=0.2):
    return {"value": value, "low": None if value is None else value - spread,
            "high": None if value is None else value + spread, "n": 7, "unscorable": 0}  # fmt: skip


def under_attack(before, accuracy, **changes):
    return {
        "status": "done", "reason": "", "seconds": 1.6, "steps": 3,
        "accuracy_before": estimate(before), "probability_before": estimate(before),
        "accuracy": estimate(accuracy), "probability": estimate(accuracy),
        "numbers": {}, "points": [], "artefacts": {}, "notes": [], **changes,
    }  # fmt: skip


def attacked(name, recovery, *, uses_original=False):
    """An entry of ``attacks.json``."""
    return {
        "attack": name,
        "settings": {},
        "known": 5,
        "scored": 7,
        "uses_original": uses_original,
        "models": {
            "original": under_attack(1.0, 1.0),
            "unlearned": under_attack(0.0, recovery),
            "oracle": under_attack(0.0, 0.05),
        },
        "recovery": {"accuracy": estimate(recovery), "probability": estimate(recovery)},
        "oracle": {"accuracy": estimate(0.05), "probability": estimate(0.05)},
    }


def test_numbers_are_shown_with_their_intervals_and_a_real_minus():
    assert str(shown(estimate(0.5))) == "0.50 (0.30 … 0.70)"
    assert str(shown(estimate(0.1), percent=True)) == "10 % (−10 … 30)"
    assert str(shown({"value": -0.0, "low": None, "high": None})) == "0.00"
    for nothing in (None, {}, {"value": None}, {"value": math.nan}, {"value": "NaN"}, estimate(None)):
        assert str(shown(nothing)) == "–"


values = st.one_of(st.none(), st.floats(-2, 2))


@given(st.lists(values, max_size=6))
def test_rows_stand_in_order_of_recovery_and_none_is_lost(recoveries):
    results = [attacked(f"attack {i}", value) for i, value in enumerate(recoveries)]
    rows = attack_rows(results)
    assert sorted(row.attack for row in rows) == sorted(result["attack"] for result in results)
    found = [recoveries[int(row.attack.split()[1])] for row in rows]
    ranked = [value for value in found if value is not None]
    assert ranked == sorted(ranked, reverse=True)
    assert found[: len(ranked)] == ranked  # attacks without a recovery last


def test_a_row_says_what_every_column_means():
    (row,) = attack_rows([attacked("relearn", 0.6)])
    assert str(row.recovery) == "60 % (40 … 80)"
    assert str(row.oracle_recovery) == "5 % (−15 … 25)"
    assert [cell.value for cell in (row.before, row.attacked, row.oracle, row.original)] == [
        "0.00",
        "0.60",
        "0.05",
        "1.00",
    ]
    assert (row.seconds, row.status) == ("5 s", "done")


def test_a_model_that_is_not_there_is_a_dash():
    result = attacked("relearn", 0.6)
    del result["models"]["oracle"], result["models"]["original"]
    result.update(recovery={}, oracle={})
    (row,) = attack_rows([result])
    assert [str(cell) for cell in (row.recovery, row.oracle_recovery, row.oracle, row.original)] == ["–"] * 4
    assert row.attacked.value == "0.60"
    assert worst_recovery([result]) is None


@given(st.lists(st.tuples(values, st.booleans()), max_size=5))
def test_the_one_number_is_that_of_attacks_json(entries):
    raw = [attacked(f"attack {i}", value, uses_original=uses) for i, (value, uses) in enumerate(entries)]
    results = [
        base.AttackResult(
            result["attack"], {}, 5, 7, result["uses_original"], {},
            {"accuracy": Estimate(**result["recovery"]["accuracy"])}, {},
        )
        for result in raw
    ]  # fmt: skip
    ours, theirs = worst_recovery(raw), base.worst(results)
    if theirs is None:
        assert ours is None
    else:
        assert f"by {theirs[0]}" in ours
        assert ours.startswith(str(shown(to_plain(theirs[1]), percent=True)))


def test_attacks_with_the_original_weights_do_not_count_and_it_is_said():
    results = [attacked("interpolate", 1.0, uses_original=True), attacked("relearn", 0.2)]
    assert worst_recovery(results).startswith("20 % (0 … 40) by relearn (the oracle under the same attack: 5 %")
    assert [row.attack for row in attack_rows(results)] == ["interpolate", "relearn"]
    (note,) = attack_notes(results)
    assert note.startswith("interpolate: ")
    assert "original" in note


def test_what_did_not_end_is_named_with_its_model_and_reason():
    result = attacked("gcg", 0.1)
    result["models"]["oracle"].update(status="out of time", reason="nothing was finished within the time budget")
    assert incomplete([result, attacked("prune", 0.1)]) == [
        "gcg on the oracle model: out of time (nothing was finished within the time budget)"
    ]
    assert attack_rows([result])[0].status == "out of time"


def test_notes_stand_once():
    result = attacked("prune", 0.1)
    for model in result["models"].values():
        model["notes"] = ["by magnitude", "matrix by matrix"]
    assert attack_notes([result, attacked("gcg", 0.2)]) == ["prune: by magnitude; matrix by matrix."]


# figures of what the attacks really write


def sample(index, accuracy):
    return SampleScore("forget", index, "q", "a", "g", accuracy, accuracy, 1.0, entity=f"person {index}")


def written(name, settings, accuracy=0.5):
    """What a battery writes of one attack with these points."""
    attacks = BatteryConfig.model_validate([name]).chosen()
    runs = []
    for model, knows in (("original", 1.0), ("unlearned", 0.0), ("oracle", 0.1)):
        before = tuple(sample(i, knows) for i in range(4))
        under = tuple(sample(i, accuracy) for i in range(4))
        points = tuple(base.Point(setting, accuracy, accuracy) for setting in settings)
        runs.append(base.AttackRun(name, model, "done", 1.0, before, base.Outcome(under, points)))
    return to_plain(base.summarise(attacks, runs))


LENS = [{"layer": layer, "component": part} for part in ("attention", "mlp", "residual") for layer in range(3)]
RELEARN = [{"source": "forget", "weights": "full", "lr_at_width_128": 1e-3, "step": step} for step in (0, 4)]


@pytest.mark.parametrize("accuracy", [0.5, math.nan])
def test_there_is_a_figure_for_all_and_one_for_each_curve(accuracy):
    results = written("relearn", RELEARN, accuracy) + written("logit-lens", LENS, accuracy) + written("prune", [])
    drawn = attack_figures(results)
    captions = [caption for _, caption in drawn]
    assert captions[0].startswith("Knowledge recovered by each attack")
    assert all(figure.startswith("<svg") for figure, _ in drawn)
    assert len(drawn) == (3 if accuracy == 0.5 else 1)


def test_no_attack_no_figure():
    assert attack_figures([]) == []
