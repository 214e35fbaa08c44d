import itertools
import json
import math
import time
from typing import Literal

import numpy as np
import pytest
import torch
from attacks.attacked_models import attacked, fingerprint
from hypothesis import given
from hypothesis import strategies as st

from falcon_unlearn.artifacts import SampleScore, to_plain
from falcon_unlearn.attacks.base import (
    ORACLE,
    ORIGINAL,
    UNLEARNED,
    AttackConfig,
    AttackData,
    AttackRun,
    Deadline,
    Outcome,
    OutOfTimeError,
    frozen,
    mean,
    point,
    recovery,
    run_attacks,
    split_facts,
    strongest,
    summarise,
    worst,
)
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.errors import UserError
from falcon_unlearn.evaluation.scoring import score_set


@pytest.fixture
def models(tiny, oracle):
    return attacked(tiny.model, oracle)


class Nothing(AttackConfig):
    """Does nothing, or fails."""

    name: Literal["nothing"] = "nothing"
    fails: str = ""
    for_insiders: bool = False

    @property
    def uses_original(self):
        return self.for_insiders

    def run(self, target):
        match self.fails:
            case "memory":
                raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes")
            case "cuda memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            case "python memory":
                raise MemoryError
            case "time":
                raise OutOfTimeError
            case "half time":
                return Outcome(target.score(), complete=False)
            case "extra":
                raise UserError("attack nothing: needs an extra")
            case "defect":
                raise RuntimeError("shapes do not match")
        return Outcome(target.score(), (point({"a": 1}, target.score()),), steps=3)


def record(question, answer, entity=None):
    return Record("qa", question, answer, "", entity=entity)


facts = st.lists(
    st.tuples(st.sampled_from(["red", "blue", "green", "red  "]), st.sampled_from([None, "Ada", "Bo"])), min_size=1
)


@given(facts, facts, st.integers(1, 4), st.integers(0, 3))
def test_phrasings_of_one_answer_are_never_on_both_sides(forget, scored, known, seed):
    data = AttackData(
        tuple(record(f"f{i}", *fact) for i, fact in enumerate(forget)),
        tuple(record(f"s{i}", *fact) for i, fact in enumerate(scored)),
        (),
    )
    try:
        mine, rest = split_facts(data, known, seed)
    except UserError:
        return

    def same_fact(a, b):
        if " ".join(a.answer.split()) != " ".join(b.answer.split()):
            return False
        everyone = [r for r in (*data.forget, *data.scored) if r.key[1] == a.key[1]]
        return a.entity == b.entity or any(r.entity is None for r in everyone)

    assert mine
    assert rest
    for a in mine:
        assert not any(same_fact(a, b) for b in rest)
        assert all(b in mine for b in data.forget if same_fact(a, b))
    assert set(rest) == {b for b in data.scored if not any(same_fact(a, b) for a in mine)}


def test_the_draw_depends_on_the_seed_alone_and_more_facts_are_more_of_the_same(models):
    draws = [{r.prompt for r in split_facts(models.data, known, 7)[0]} for known in range(1, 8)]
    assert all(a < b for a, b in itertools.pairwise(draws))
    assert draws[3] == {r.prompt for r in split_facts(models.data, 4, 7)[0]}
    assert len({frozenset(r.prompt for r in split_facts(models.data, 4, seed)[0]) for seed in range(5)}) > 1


@pytest.mark.parametrize("known", [12, 13])
def test_an_attacker_who_knows_everything_is_refused(models, known):
    with pytest.raises(UserError, match=rf"{known} forget facts .* the forget set has 12"):
        split_facts(models.data, known, 0)


def test_a_deadline():
    never, now = Deadline(None), Deadline(0)
    never.check()
    assert not never.passed
    with pytest.raises(OutOfTimeError):
        now.check()
    soon = Deadline(0.05)
    assert not soon.passed
    time.sleep(0.06)
    assert soon.passed


def test_frozen_gives_back_modes_and_gradients(models):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    model[0].weight.requires_grad_(False)
    model[0].eval()
    with frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False, True]
    assert [m.training for m in model.modules()] == [True, False, True]


def test_one_attack_that_fails_says_so_and_the_rest_go_on(models):
    wanted = {
        "memory": "out of memory",
        "cuda memory": "out of memory",
        "python memory": "out of memory",
        "time": "out of time",
        "half time": "out of time",
        "extra": "not possible",
        "": "done",
    }
    seen = []
    before = fingerprint(models.unlearned)
    runs = run_attacks(
        {f"x{how}": Nothing(fails=how) for how in wanted},
        models.unlearned,
        UNLEARNED,
        models.encoder,
        models.data,
        max_new_tokens=12,
        on_attack=seen.append,
    )
    assert seen == [f"x{how}" for how in wanted]
    assert [run.status for run in runs] == list(wanted.values())
    assert [run.outcome is None for run in runs] == [True, True, True, True, False, True, False]
    assert runs[5].reason == "attack nothing: needs an extra"
    assert all(run.reason for run in runs[:-1])
    assert fingerprint(models.unlearned) == before
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_attacks({"x": Nothing(fails="defect")}, models.oracle, ORACLE, models.encoder, models.data)


def test_without_an_attack_nothing_is_recovered_and_the_original_is_at_one(models):
    attacks = {"nothing": Nothing(known=3)}
    runs = [
        run
        for name in (ORIGINAL, UNLEARNED, ORACLE)
        for run in run_attacks(attacks, getattr(models, name), name, models.encoder, models.data, max_new_tokens=12)
    ]
    (result,) = summarise(attacks, runs)
    assert result.known == 3
    assert result.scored == 9
    assert {name: e.value for name, e in result.recovery.items()} == {"accuracy": 0, "probability": 0}
    unlearned, original, oracle = (result.models[name] for name in (UNLEARNED, ORIGINAL, ORACLE))
    assert original.accuracy == original.accuracy_before
    assert all(run.outcome.samples == run.before for run in runs)
    span = original.probability.value - unlearned.probability.value
    expected = (oracle.probability.value - unlearned.probability.value) / span
    assert result.oracle["probability"].value == pytest.approx(expected)
    assert original.steps == 3
    assert json.loads(json.dumps(to_plain(result)))["models"]["unlearned"]["points"][0]["setting"] == {"a": 1}


def test_a_target_is_scored_as_the_evaluation_scores_it(models):
    target = models.target("original")
    whole = score_set(
        models.original, models.encoder, target.rest, "forget", batch_size=4, max_new_tokens=12, device="cpu"
    )
    for ours, theirs in zip(target.score(), whole, strict=True):
        assert (ours.generation, ours.accuracy, ours.rouge) == (theirs.generation, theirs.accuracy, theirs.rouge)
        assert ours.probability == pytest.approx(theirs.probability, rel=1e-5)
    assert target.utility_probability() > 0.9
    assert math.isnan(models.target(utility=()).utility_probability())


def samples(values, entities=None):
    entities = entities or [None] * len(values)
    return [
        SampleScore("forget", i, "", "", "", value, value, math.nan, entity=entity)
        for i, (value, entity) in enumerate(zip(values, entities, strict=True))
    ]


shares = st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=1, max_size=12)


@given(shares)
def test_recovery_is_the_share_of_the_gap(rows):
    after, unlearned, original = np.array(rows).T
    found = recovery(samples(after), samples(unlearned), samples(original), "accuracy")
    gap = original.mean() - unlearned.mean()
    if gap <= 1e-9:
        assert gap > 0 or found.value is None
        return
    assert found.value == pytest.approx((after.mean() - unlearned.mean()) / gap, rel=1e-6, abs=1e-9)
    if len(rows) > 1 and found.low is not None:
        assert found.low <= found.high


def test_recovery_at_its_ends_and_where_nothing_was_forgotten():
    low, high = samples([0.0, 0.2, 0.1]), samples([1.0, 0.9, 0.8])
    assert recovery(low, low, high, "probability").value == 0
    assert recovery(high, low, high, "probability").value == 1
    assert recovery(high, high, high, "probability").value is None
    assert recovery(low, high, low, "probability").value is None
    one_missing = recovery(samples([math.nan, 0.9, 0.8]), low, high, "accuracy")
    assert one_missing.value == 1
    assert (one_missing.n, one_missing.unscorable) == (2, 1)


def test_entities_are_drawn_together():
    after, low, high = [1.0, 1.0, 0.0, 0.0], [0.0] * 4, [1.0] * 4
    who = ["Ada", "Ada", "Bo", "Bo"]
    found = recovery(samples(after), samples(low, who), samples(high), "accuracy")
    assert (found.low, found.high) == (0.0, 1.0)


def test_the_strongest_setting_is_the_most_accurate_then_the_most_probable():
    def entry(accuracy, probability):
        rows = tuple(SampleScore("f", 0, "", "", "", probability, accuracy, 0.0) for _ in range(2))
        return point({"p": probability}, rows), rows

    tried = [entry(0.5, 0.9), entry(1.0, 0.2), entry(math.nan, math.nan), entry(1.0, 0.3), entry(1.0, 0.3)]
    assert strongest(tried) is tried[3]
    assert math.isnan(mean([]))
    assert mean([1.0, math.nan, 3.0]) == 2.0


def run_of(attack, model, after, status="done"):
    outcome = None if after is None else Outcome(tuple(samples(after)))
    before = {UNLEARNED: [0.0, 0.0], ORIGINAL: [1.0, 1.0]}[model]
    return AttackRun(attack, model, status, 1.0, tuple(samples(before)), outcome)


def test_the_one_number_is_the_worst_recovery_that_needs_no_original_weights():
    attacks = {
        "weak": Nothing(),
        "strong": Nothing(),
        "insider": Nothing(for_insiders=True),
        "broken": Nothing(),
        "not run": Nothing(),
    }
    after = {"weak": [0.0, 0.0], "strong": [1.0, 0.0], "insider": [1.0, 1.0], "broken": None}
    runs = [run_of(attack, UNLEARNED, values) for attack, values in after.items()]
    runs += [run_of(attack, ORIGINAL, [1.0, 1.0]) for attack in after]
    results = summarise(attacks, runs)
    assert [result.attack for result in results] == ["weak", "strong", "insider", "broken"]
    assert results[3].recovery == {}
    assert results[3].models[UNLEARNED].accuracy is None
    attack, found = worst(results)
    assert (attack, found.value) == ("strong", 0.5)
    assert worst(summarise(attacks, [run for run in runs if run.model == UNLEARNED])) is None
