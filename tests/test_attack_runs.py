"""Batteries of attacks on several models: what is loaded when, what is kept, and what a resumed one does again."""

import gc
import json
import math
import weakref

import pytest
from conftest import FORGET_ROWS, RETAIN_ROWS
from hypothesis import given
from hypothesis import strategies as st

from falcon_unlearn import attack_runs
from falcon_unlearn.artifacts import Estimate, SampleScore
from falcon_unlearn.attack_runs import (
    Attackable,
    BatteryLimits,
    check_battery,
    drawn,
    is_finished,
    recovered,
    run_battery,
)
from falcon_unlearn.attacks.base import AttackData, AttackRun, Outcome, Point
from falcon_unlearn.attacks.battery import ATTACKS, BatteryConfig
from falcon_unlearn.console import Console
from falcon_unlearn.corpus.records import record_from_row
from falcon_unlearn.errors import UserError

QUIET = Console(quiet=True)
LIMITS = BatteryLimits(4, 8, None, 0)
FORGET, RETAIN = (tuple(record_from_row(row, "") for row in rows) for rows in (FORGET_ROWS, RETAIN_ROWS))
DATA = AttackData(FORGET, FORGET, RETAIN, RETAIN)
KNOWS = {"original": 1.0, "unlearned": 0.0, "oracle": 0.25}
MODELS = tuple(KNOWS)


class Model:
    """Stands for a model in memory."""


class Machine:
    """Models that remember who was in memory with them, and attacks that are told how to end."""

    def __init__(self):
        self.loaded = []
        self.alive = {}
        self.calls = []
        self.status = {}
        self.seconds = []
        self.stop_at = None
        self.clock = 0.0
        self.cost = 1.0

    def models(self, names=MODELS):
        return {name: Attackable(lambda name=name: self.load(name), None) for name in names}

    def load(self, name):
        gc.collect()
        beside = sorted(other for other, reference in self.alive.items() if reference() is not None)
        self.loaded.append((name, beside))
        model = Model()
        self.alive[name] = weakref.ref(model)
        return model

    def attack(self, attacks, model, name, encoder, data, *, original, seconds, **settings):
        (attack,) = attacks
        if self.stop_at == len(self.calls):
            raise KeyboardInterrupt
        assert model is not None
        assert model is self.alive[name]()
        known = next(
            (n for n, reference in self.alive.items() if original is not None and reference() is original), None
        )
        self.calls.append((name, attack, known))
        self.seconds.append(seconds)
        self.clock += self.cost
        status = self.status.get((name, attack), "done")
        before = tuple(sample(i, KNOWS[name]) for i in range(4))
        won = 0.5 if attack == "quantize" else 0.9
        under = tuple(sample(i, math.nan if i == 3 else won if name == "unlearned" else KNOWS[name]) for i in range(4))
        points = (Point({"step": 1, "lr": 1.0, "way": "NaN"}, math.nan, 0.1 + 0.2, {"loss": math.inf}),)
        outcome = Outcome(
            under, points, {"area": Estimate(0.1, None, None, 4)}, 3, {"strongest": {"step": 1}}, ("note",)
        )
        reason = "" if status == "done" else "because"
        return [AttackRun(attack, name, status, 2.5, before, outcome if status == "done" else None, reason)]


def sample(index, accuracy):
    return SampleScore("forget", index, "q", "a", "g", accuracy, accuracy, 1.0, entity=f"person {index}")


@pytest.fixture(scope="module", autouse=True)
def _small_heap():
    """Collecting all of torch's objects time and again takes longer than the tests."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def machine(monkeypatch):
    made = Machine()
    monkeypatch.setattr(attack_runs, "run_attacks", made.attack)
    monkeypatch.setattr(attack_runs, "score_forget", lambda *_, **__: ())
    monkeypatch.setattr(attack_runs.time, "monotonic", lambda: made.clock)
    return made


def battery(*names, **settings):
    return BatteryConfig.model_validate({**{name: {} for name in names}, **settings})


def run(machine, folder, config, names=MODELS, console=QUIET):
    return run_battery(config, machine.models(names), DATA, folder, LIMITS, console=console)


PLAIN = battery("quantize", "prune")
COMPARING = battery("quantize", "interpolate")


# memory


def test_one_model_is_in_memory_at_a_time(machine, tmp_path):
    run(machine, tmp_path, PLAIN)
    assert machine.loaded == [("original", []), ("unlearned", []), ("oracle", [])]
    gc.collect()
    assert all(reference() is None for reference in machine.alive.values())


def test_the_original_stays_where_an_attack_compares_with_it(machine, tmp_path):
    run(machine, tmp_path, COMPARING)
    assert machine.loaded == [("original", []), ("unlearned", ["original"]), ("oracle", ["original"])]
    assert {(name, known) for name, _, known in machine.calls} == {(name, "original") for name in MODELS}
    gc.collect()
    assert all(reference() is None for reference in machine.alive.values())


def test_a_resumed_battery_has_the_original_at_hand_again(machine, tmp_path):
    machine.stop_at = 3  # the original's attacks have ended
    with pytest.raises(KeyboardInterrupt):
        run(machine, tmp_path, COMPARING)
    machine.stop_at, machine.calls, machine.loaded = None, [], []
    run(machine, tmp_path, COMPARING)
    assert machine.calls == [
        ("unlearned", "interpolate", "original"),
        ("oracle", "quantize", "original"),
        ("oracle", "interpolate", "original"),
    ]
    assert sorted(name for name, _ in machine.loaded) == ["oracle", "original", "unlearned"]


def test_a_resumed_battery_loads_no_original_that_nobody_asks_for(machine, tmp_path):
    run(machine, tmp_path, COMPARING)
    (tmp_path / "attacks/oracle.quantize.json").unlink()
    machine.loaded = []
    run(machine, tmp_path, COMPARING)
    assert [name for name, _ in machine.loaded] == ["oracle"]


# what is kept


def without_seconds(value):
    if isinstance(value, dict):
        return {key: without_seconds(below) for key, below in value.items() if key != "seconds"}
    return [without_seconds(below) for below in value] if isinstance(value, list) else value


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_stopped_anywhere_and_resumed_it_gives_the_same(machine, tmp_path, stop):
    whole = run(machine, tmp_path / "whole", COMPARING)
    machine.calls, machine.stop_at = [], stop
    with pytest.raises(KeyboardInterrupt):
        run(machine, tmp_path / "out", COMPARING)
    assert not (tmp_path / "out/attacks.json").exists()
    assert not is_finished(COMPARING, MODELS, tmp_path / "out")
    machine.stop_at = None
    resumed = run(machine, tmp_path / "out", COMPARING)
    assert len(machine.calls) == 6
    assert repr(resumed) == repr(whole)
    for path in (tmp_path / "whole").rglob("*.json"):
        assert (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()
    assert is_finished(COMPARING, MODELS, tmp_path / "out")


def test_a_finished_battery_loads_nothing(machine, tmp_path):
    first = run(machine, tmp_path, PLAIN)
    content = (tmp_path / "attacks.json").read_bytes()
    machine.loaded, machine.calls = [], []
    assert repr(run(machine, tmp_path, PLAIN)) == repr(first)
    assert machine.loaded == machine.calls == []
    assert (tmp_path / "attacks.json").read_bytes() == content


@pytest.mark.parametrize("status", ["out of time", "out of memory", "not possible"])
def test_an_attack_that_did_not_end_is_said_and_tried_again_and_the_rest_go_on(machine, tmp_path, capsys, status):
    machine.status = {("unlearned", "quantize"): status}
    first = run(machine, tmp_path, PLAIN, console=Console())
    assert f"quantize on the unlearned model: {status} (because)" in capsys.readouterr().err
    assert len(machine.calls) == 6
    assert first[0].models["unlearned"].status == status
    assert first[0].recovery == {}
    assert first[1].recovery["accuracy"].value == pytest.approx(0.9)
    assert not is_finished(PLAIN, MODELS, tmp_path)
    machine.status, machine.calls = {}, []
    again = run(machine, tmp_path, PLAIN)
    assert [call[:2] for call in machine.calls] == [("unlearned", "quantize")]
    assert again[0].recovery["accuracy"].value == pytest.approx(0.5)
    assert is_finished(PLAIN, MODELS, tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"attack": "quantize"}', b"\xff"])
def test_a_damaged_result_is_made_again(machine, tmp_path, content):
    run(machine, tmp_path, PLAIN)
    whole = (tmp_path / "attacks.json").read_bytes()
    (tmp_path / "attacks/original.prune.json").write_bytes(content)
    machine.calls = []
    run(machine, tmp_path, PLAIN)
    assert [call[:2] for call in machine.calls] == [("original", "prune")]
    assert (tmp_path / "attacks.json").read_bytes() == whole


def test_the_one_number_leaves_out_attacks_that_need_the_original_weights(machine, tmp_path):
    results = run(machine, tmp_path, COMPARING)
    stored = json.loads((tmp_path / "attacks.json").read_text())
    assert stored["worst"]["attack"] == "quantize"
    assert stored["worst"]["recovery"]["value"] == pytest.approx(0.5)
    assert results[1].recovery["accuracy"].value == pytest.approx(0.9)
    # The sample without a score counts nowhere; the oracle under attack knows what it knew.
    assert stored["attacks"][0]["recovery"]["accuracy"]["n"] == 3
    assert stored["attacks"][0]["oracle"]["accuracy"]["value"] == pytest.approx(0.25)
    assert stored["attacks"][0]["models"]["unlearned"]["points"][0]["accuracy"] is None


def test_without_the_original_nothing_is_called_recovered(machine, tmp_path):
    results = run(machine, tmp_path, PLAIN, ("unlearned", "oracle"))
    assert [result.recovery for result in results] == [{}, {}]
    assert json.loads((tmp_path / "attacks.json").read_text())["worst"] is None
    found = recovered(results, "unlearned")
    assert found["prune"] == {"recovered_accuracy": pytest.approx(0.9), "recovered_probability": pytest.approx(0.9)}
    assert recovered(results, "original") == {}


def test_the_numbers_for_metrics_json(machine, tmp_path):
    machine.status = {("oracle", "quantize"): "out of time"}
    results = run(machine, tmp_path, PLAIN)
    assert recovered(results, "original")["quantize"]["recovered_accuracy"] == 1
    assert recovered(results, "unlearned")["quantize"] == {
        "recovered_accuracy": 0.5,
        "recovered_probability": 0.5,
        "recovery": pytest.approx(0.5),
    }
    assert recovered(results, "oracle")["quantize"] == {"recovered_accuracy": None, "recovered_probability": None}


# the time budget


@pytest.mark.parametrize(("budget", "cost"), [(12, 0), (12, 1), (3, 2)])
def test_a_budget_is_shared_equally_by_what_is_left(machine, tmp_path, budget, cost):
    machine.cost = cost
    results = run(machine, tmp_path, battery("quantize", "prune", seconds=budget))
    assert machine.seconds == [pytest.approx((budget - cost * i) / (6 - i)) for i in range(6) if budget > cost * i]
    statuses = [run.status for result in results for run in result.models.values()]
    assert statuses.count("out of time") == 6 - len(machine.seconds)
    assert len(statuses) == 6


def test_a_resumed_battery_shares_its_budget_among_what_is_to_be_done(machine, tmp_path):
    config = battery("quantize", "prune", seconds=12)
    run(machine, tmp_path, config)
    for name in ("unlearned.prune", "oracle.prune"):
        (tmp_path / f"attacks/{name}.json").unlink()
    machine.seconds, machine.cost = [], 0.0
    run(machine, tmp_path, config)
    assert machine.seconds[-1] == pytest.approx(12)
    assert all(seconds >= 12 / 3 for seconds in machine.seconds)


def test_without_a_budget_there_is_no_limit(machine, tmp_path):
    run(machine, tmp_path, PLAIN)
    assert machine.seconds == [None] * 6


# records


@given(st.integers(0, 20), st.one_of(st.none(), st.integers(1, 25)), st.integers(0, 3))
def test_drawn_records_keep_their_order_and_follow_the_seed(count, most, seed):
    chosen = drawn(RETAIN[:count], most, seed)
    assert len(chosen) == min(count, count if most is None else most)
    assert [r for r in RETAIN[:count] if any(r is c for c in chosen)] == list(chosen)
    assert chosen == drawn(RETAIN[:count], most, seed)


def test_a_battery_that_wants_more_facts_than_there_are_names_the_attack():
    check_battery(battery("quantize", prune={"known": 11}), DATA, 0)
    with pytest.raises(UserError, match=r"^attacks\.prune: .*12 forget facts.*lower known"):
        check_battery(battery("quantize", prune={"known": 12}), DATA, 0)


def test_every_attack_of_the_table_has_its_section_and_the_audit_all_but_transfer():
    audit = BatteryConfig.model_validate(["audit"])
    assert list(audit.chosen()) == [name for name in ATTACKS if name != "transfer"]
    assert {name: config.model_dump()["name"] for name, config in audit.chosen().items()} == {
        name: name for name in audit.chosen()
    }
    assert BatteryConfig().chosen() == {}
