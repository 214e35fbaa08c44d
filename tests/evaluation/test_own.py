"""Suite ``own``: memory is told from guessing by never-seen records, and what cannot be concluded is said."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import invented_rows, train_tiny_model, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import binomtest, ks_2samp, mannwhitneyu
from transformers import AutoModelForCausalLM, AutoTokenizer

from falcon_unlearn.artifacts import to_plain
from falcon_unlearn.corpus.batching import Encoder
from falcon_unlearn.corpus.probes import Probe
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.errors import UserError
from falcon_unlearn.evaluation.own import (
    OwnConfig,
    OwnSuite,
    ProbeScore,
    smallest_visible_auc,
)
from falcon_unlearn.evaluation.suite import Subject

QUESTIONS = {"kinds": ["question"]}
ROWS = invented_rows()
# Alike in everything but what was trained on: three people to forget, five that no model sees, two to keep.
FORGET, HOLDOUT, RETAIN = ROWS[:12], ROWS[12:32], ROWS[32:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three record files and two models; nobody writes into them."""
    folder = tmp_path_factory.mktemp("own")
    for name, rows in (("forget", FORGET), ("holdout", HOLDOUT), ("retain", RETAIN)):
        write_lines(folder / f"{name}.jsonl", rows)
    train_tiny_model(folder / "memorised", FORGET + RETAIN)
    train_tiny_model(folder / "oracle", RETAIN)
    return folder


def subject(path, batch_size=16):
    model = AutoModelForCausalLM.from_pretrained(path)
    return Subject(model, Encoder(AutoTokenizer.from_pretrained(path)), batch_size, path.name)


def opened(folder, seed=0, **settings):
    sources = {"forget": "forget.jsonl", "holdout": "holdout.jsonl", **settings}
    return OwnConfig.model_validate({k: v for k, v in sources.items() if v is not None}).open(folder, seed)


def scored(suite, of):
    return {part: suite.score(part, range(units), of) for part, units in suite.parts.items()}


@pytest.fixture(scope="module")
def rows(folder):
    """Rows of both models under the same probes."""
    suite = opened(folder, retain="retain.jsonl", probes=QUESTIONS)
    return {which: scored(suite, subject(folder / which)) for which in ("memorised", "oracle")}


def made_up(values, part="forget", *, accuracy=0.0, kind="cloze", entity=None, per_record=1):
    return [
        ProbeScore(
            set=part,
            index=i,
            prompt="",
            answer="",
            generation="",
            probability=math.exp(value),
            accuracy=accuracy,
            rouge=0.0,
            log_probability=float(value),
            entity=None if entity is None else f"{part} {i % entity}",
            kind=kind,
            form="",
            origin=f"{part}:{i // per_record}",
        )
        for i, value in enumerate(values)
    ]


def suite_of(parts=("forget", "holdout"), **settings):
    """A suite whose rows are made up."""
    probes = {part: (Probe("cloze", "", Record("completion", "a", "b", "")),) * 2 for part in parts}
    return OwnSuite(OwnConfig(forget="a", **settings), probes, (), seed=0)


def summary(forget, holdout=None, oracle=None, **settings):
    rows = {"forget": forget, **({} if holdout is None else {"holdout": holdout})}
    return suite_of(tuple(rows), **settings).summarise(rows, oracle, {})


def said(result, words):
    return any(words in statement for statement in result.statements)


def test_a_memorising_model_is_found_out(folder, rows):
    result = opened(folder, retain="retain.jsonl", probes=QUESTIONS).summarise(rows["memorised"], None, {})
    assert result.metrics["auc"].value > 0.99
    assert result.metrics["log10_ks_p"].value < -4
    assert result.metrics["forget_recovered"].value > 0.9
    assert result.metrics["forget_leaking_records"].value > 0.9
    assert result.metrics["retain_recovered"].value > 0.9
    assert result.metrics["holdout_recovered"].value < 0.5
    assert result.metrics["recovered_difference"].low > 0
    assert said(result, "still finds the forget records likelier")


def test_the_oracle_cannot_tell_forget_from_holdout(folder, rows):
    suite = opened(folder, retain="retain.jsonl", probes=QUESTIONS)
    auc = suite.summarise(rows["oracle"], None, {}).metrics["auc"]
    assert auc.low < 0.5 < auc.high
    assert 0.2 < auc.value < 0.8
    beside = suite.summarise(rows["memorised"], rows["oracle"], {})
    assert beside.metrics["log_probability_minus_oracle"].low > 0
    assert beside.metrics["recovered_minus_oracle"].value > 0.5
    assert beside.metrics["log10_ks_p_against_oracle"].value < -4
    assert said(beside, "Against the oracle")
    alike = suite.summarise(rows["oracle"], rows["oracle"], {})
    assert alike.metrics["log_probability_minus_oracle"].value == 0
    assert not said(alike, "not matched")


@pytest.mark.parametrize("kinds", [["continuation", "cloze"], ["question", "paraphrase"]])
def test_rows_are_kept_with_their_probe_and_come_back_from_json(folder, tmp_path, kinds):
    texts = [{"text": " ".join(row["answer"] for row in FORGET[i : i + 4])} for i in (0, 4, 8)]
    write_lines(tmp_path / "texts.jsonl", texts)
    forget = str(tmp_path / "texts.jsonl") if "cloze" in kinds else "forget.jsonl"
    suite = opened(folder, forget=forget, holdout=None, probes={"kinds": kinds, "per_record": 2})
    found = suite.score("forget", range(suite.parts["forget"]), subject(folder / "memorised"))
    assert {row.kind for row in found} == set(kinds)
    assert [row.index for row in found] == list(range(len(found)))
    for row, probe in zip(found, suite.probes["forget"], strict=True):
        assert (row.kind, row.form, row.origin) == (probe.kind, probe.form, probe.record.origin)
        assert row.prompt == probe.record.prompt
        back = suite.row("forget", json.loads(json.dumps(to_plain(row))))
        assert to_plain(back) == to_plain(row)
    some = suite.score("forget", range(2, 5), subject(folder / "memorised", batch_size=2))
    assert [row.index for row in some] == [2, 3, 4]
    expected = [row.log_probability for row in found[2:5]]
    assert [row.log_probability for row in some] == pytest.approx(expected, abs=1e-5)


def test_a_cut_text_is_scored_without_an_end_of_sequence(folder, tmp_path):
    write_lines(tmp_path / "texts.jsonl", [{"text": "Ada Marsh lives in Delft. Ada Marsh eats rice."}])
    suite = opened(folder, forget=str(tmp_path / "texts.jsonl"), holdout=None, probes={"kinds": ["cloze"]})
    of = subject(folder / "memorised")
    for row, probe in zip(suite.score("forget", range(suite.parts["forget"]), of), suite.probes["forget"], strict=True):
        tokenizer = of.encoder.tokenizer
        ids = tokenizer(row.prompt + probe.record.answer)["input_ids"]
        prompt = tokenizer(row.prompt)["input_ids"]
        assert ids[: len(prompt)] == prompt  # what makes the naive count below right
        with torch.no_grad():
            log_p = of.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        naive = [float(log_p[i - 1, ids[i]]) for i in range(len(prompt), len(ids))]
        assert row.log_probability == pytest.approx(np.mean(naive), abs=1e-4)


numbers = st.lists(st.integers(-8, 0).map(float), min_size=2, max_size=20)


@settings(max_examples=25)
@given(numbers, numbers)
def test_auc_ks_and_difference_are_the_textbook_ones(forget, holdout):
    metrics = summary(made_up(forget), made_up(holdout, "holdout")).metrics
    naive = mannwhitneyu(forget, holdout).statistic / (len(forget) * len(holdout))
    assert metrics["auc"].value == pytest.approx(naive)
    assert metrics["log_probability_difference"].value == pytest.approx(np.mean(forget) - np.mean(holdout))
    assert 10 ** metrics["log10_ks_p"].value == pytest.approx(ks_2samp(forget, holdout).pvalue, rel=1e-6)
    turned = summary(made_up(holdout), made_up(forget, "holdout")).metrics["auc"].value
    assert metrics["auc"].value + turned == pytest.approx(1)


def test_kinds_are_compared_with_their_own_kind():
    # Questions are likelier than clozes on both sides, and forget has more of them: no sign of memory.
    rng = np.random.default_rng(0)
    easy, hard = rng.normal(-1, 0.1, 400), rng.normal(-9, 0.1, 400)
    forget = made_up(easy[:90], kind="question") + made_up(hard[:10])
    holdout = made_up(easy[200:210], "holdout", kind="question") + made_up(hard[200:290], "holdout")
    metrics = summary(forget, holdout).metrics
    assert metrics["auc"].value == pytest.approx(0.9 * metrics["auc_question"].value + 0.1 * metrics["auc_cloze"].value)
    assert 0.3 < metrics["auc"].value < 0.7
    assert abs(metrics["log_probability_difference"].value) < 0.2


def test_equal_distributions_are_called_different_as_rarely_as_promised():
    apart = excluded = judged = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        # Probes of one record belong together: the record's own level matters more than the probe.
        forget, holdout = (np.repeat(rng.normal(-3, 1, 20), 4) + rng.normal(0, 0.3, 80) for _ in range(2))
        result = summary(made_up(forget, per_record=4), made_up(holdout, "holdout", per_record=4))
        auc = result.metrics["auc"]
        apart += result.metrics["log10_ks_p"].value < math.log10(0.05)
        excluded += not auc.low <= 0.5 <= auc.high
        judged += result.metrics["auc_p"].value <= 0.05
    assert max(apart, judged) <= 6  # at 5 %, 40 draws give more once in 300 times
    assert excluded <= 7  # the percentile bootstrap of 20 clusters promises a little too much


def test_entities_are_drawn_together_where_both_sides_name_several():
    values = np.random.default_rng(0).normal(-3, 1, 60)
    result = summary(made_up(values, entity=3), made_up(values, "holdout", entity=12))
    assert result.settings["resampled"] == "entities"
    assert said(result, "rest on 3 entities")
    one = summary(made_up(values, entity=1), made_up(values, "holdout", entity=12))
    assert one.settings["resampled"] == "records"
    assert said(one, "as if independent")


def test_statements_say_which_of_four_things_was_found():
    many, few = np.linspace(-5, -1, 250), np.arange(8.0)
    holdout = made_up(many, "holdout")
    assert said(summary(made_up(many + 2), holdout), "likelier than records it never saw")
    over = summary(made_up(many - 9), holdout)
    assert said(over, "Over-forgetting")
    assert over.metrics["auc"].high < 0.5
    assert said(summary(made_up(many), holdout), "alike within the margin")
    unsure = summary(made_up(few - 9), made_up(few - 9.5, "holdout"))
    assert said(unsure, "not proof that there is none")
    assert said(unsure, "rest on 8 records")


def test_too_few_records_are_called_too_few():
    result = summary(made_up([-1.0, -1.1]), made_up([-5.0, -5.1], "holdout"))
    assert said(result, "could not have fallen below 0.33")
    assert said(result, "cannot be relied on")
    assert said(result, "concludes nothing")
    single = summary(made_up([-1.0, -1.1], per_record=2), made_up([-5.0, -5.1], "holdout"))
    assert single.metrics["auc"].low is None
    assert said(single, "concludes nothing")


def test_three_people_against_three_prove_nothing_however_many_their_records():
    forget, holdout = made_up([-1.0] * 60, entity=3), made_up([-5.0] * 60, "holdout", entity=3)
    assert said(summary(forget, holdout), "It takes a holdout of 5 entities")
    enough = summary(forget, made_up([-5.0] * 60, "holdout", entity=5))
    assert said(enough, "likelier than records it never saw")
    assert not said(enough, "concludes nothing")


@settings(max_examples=25)
@given(numbers, st.integers(2, 3), st.integers(2, 4))
def test_the_p_of_the_auc_is_that_of_all_deals(values, n, m):
    values = (values * 14)[:14]
    people = [i % (n + m) for i in range(14)]

    def far(chosen):
        ours, theirs = ([v for v, who in zip(values, people, strict=True) if (who in chosen) == is_in]
                        for is_in in (True, False))  # fmt: skip
        return abs(mannwhitneyu(ours, theirs).statistic / (len(ours) * len(theirs)) - 0.5)

    deals = [far(set(chosen)) for chosen in itertools.combinations(range(n + m), n)]
    naive = np.mean([distance >= far(set(range(n))) - 1e-12 for distance in deals])
    rows = made_up(values)
    rows = [dataclasses.replace(row, entity=f"{who}") for row, who in zip(rows, people, strict=True)]
    sides = [[row for row, who in zip(rows, people, strict=True) if (who < n) == is_in] for is_in in (True, False)]
    assert summary(*sides).metrics["auc_p"].value == pytest.approx(naive, abs=0.06)  # of 2000 deals drawn


@pytest.mark.parametrize(("n", "m"), [(20, 30), (60, 60)])
def test_the_smallest_visible_auc_is_seen_four_times_in_five(n, m):
    rng = np.random.default_rng(0)
    shift = 2**0.5 * torch.special.ndtri(torch.tensor(smallest_visible_auc(n, m), dtype=torch.float64)).item()
    seen = [mannwhitneyu(rng.normal(shift, 1, n), rng.normal(0, 1, m)).pvalue < 0.05 for _ in range(400)]
    assert 0.72 < np.mean(seen) < 0.88


def test_more_records_see_more_and_one_record_sees_nothing():
    assert smallest_visible_auc(1, 1) == 1
    assert 0.5 < smallest_visible_auc(1000, 1000) < smallest_visible_auc(100, 100) < smallest_visible_auc(10, 10) <= 1


@settings(max_examples=25)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=4), min_size=1, max_size=30))
def test_a_record_leaks_if_one_of_its_probes_does(leaks):
    rows = [
        dataclasses.replace(made_up([-1.0])[0], accuracy=float(leak), origin=f"r:{i}", index=j)
        for i, probes in enumerate(leaks)
        for j, leak in enumerate(probes)
    ]
    found = summary(rows).metrics["forget_leaking_records"]
    k, n = sum(map(any, leaks)), len(leaks)
    exact = binomtest(k, n).proportion_ci(0.95, method="exact")
    assert found.value == pytest.approx(k / n)
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
    assert found.n == n


def test_nothing_recovered_still_leaves_room():
    result = summary(made_up([-5.0] * 30), made_up([-5.0] * 30, "holdout", accuracy=1.0))
    assert said(result, "0 of 30 forget records")
    assert said(result, "30 of 30 holdout records")
    assert said(result, "none of 30 leaves room for 10%")


def test_without_a_holdout_nothing_is_claimed():
    result = summary(made_up([-1.0, -2.0, -3.0]))
    assert not {"auc", "log10_ks_p", "recovered_difference"} & set(result.metrics)
    assert said(result, "no holdout")
    assert said(result, "falcon-unlearn attack")


def test_unscorable_probes_are_counted_never_dropped():
    forget = made_up([-1.0, -2.0, -3.0, math.nan])
    forget[3] = dataclasses.replace(forget[3], accuracy=math.nan, rouge=math.nan, probability=math.nan)
    result = summary(forget, made_up([-1.0, -2.0, -3.0], "holdout"))
    assert result.metrics["auc"].value == pytest.approx(0.5)
    assert (result.metrics["auc"].n, result.metrics["auc"].unscorable) == (6, 1)
    assert result.metrics["forget_leaking_records"].unscorable == 1
    assert said(result, "1 of 4 forget probes could not be scored")
    lost = {"forget": [forget[3]] * 2, "holdout": made_up([-1.0, -2.0], "holdout")}
    nothing = summary(*lost.values(), oracle=lost)
    assert not said(nothing, "nan")
    assert said(nothing, "cannot be compared")
    assert said(nothing, "nothing can be said")


def test_an_oracle_that_tells_the_sets_apart_says_they_are_not_matched():
    rng = np.random.default_rng(0)
    rows = {"forget": made_up(rng.normal(-1, 1, 50)), "holdout": made_up(rng.normal(-5, 1, 50), "holdout")}
    assert said(summary(*rows.values(), oracle=rows), "they are not matched")


def test_what_speaks_against_the_holdout_is_said(tmp_path):
    line = "The quick brown fox jumps over the lazy dog near Delft."
    short = [{"text": f"Ada{i} Marsh lives in Bern{i}. She eats rice.", "entity": "Ada"} for i in range(3)]
    long = [{"text": f"Bo{i} Quill lives in Cork{i}. " * 9 + line, "entity": "Ada"} for i in range(3)]
    write_lines(tmp_path / "forget.jsonl", [*short, {"text": line}])
    write_lines(tmp_path / "holdout.jsonl", [*long, {"question": "Who lives in Ghent?", "answer": "Gus"}])
    notes = " ".join(opened(tmp_path).notes)
    assert "1 sentences stand in forget and in holdout" in notes
    assert "entities stand in forget and in holdout" in notes
    assert "not matched in length" in notes
    assert "paraphrase probes could be made of only one" in notes


def test_matched_records_raise_no_warning(folder):
    assert opened(folder).notes == ()


def test_the_same_input_gives_the_same_suite(folder):
    again, other = opened(folder, seed=0), opened(folder, seed=1)
    assert opened(folder).probes == again.probes
    assert opened(folder).content == again.content != other.content
    assert opened(folder, max_new_tokens=3).content != again.content


def test_probes_of_forget_and_holdout_avoid_each_others_documents(tmp_path):
    write_lines(tmp_path / "forget.jsonl", [{"text": f"In the town of Bern lives Ada{i} Marsh."} for i in range(4)])
    write_lines(tmp_path / "holdout.jsonl", [{"text": f"In the town of Bern lives Bo{i} Quill."} for i in range(4)])
    for probes in opened(tmp_path, probes={"kinds": ["cloze"]}).probes.values():
        assert "Bern" not in {probe.record.value for probe in probes}


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        ({"forget": ["Hi."]}, {}, "own.forget: 0 probes of kinds"),
        ({"forget": ["Ada Marsh lives in the town of Bern."]}, {"kinds": ["question"]}, "own.probes.kinds"),
        ({"holdout": ["No."]}, {}, "own.holdout: 0 probes"),
        ({"holdout": ["Ada Marsh lives in Bern. She eats rice."]}, {}, "the holdout must be records the model never"),
        ({"retain": ["Ada Marsh lives in Bern. She eats rice."]}, {}, "a record stands in forget and in retain"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path, files, settings, message):
    texts = {
        "forget": ["Ada Marsh lives in Bern. She eats rice."],
        "holdout": ["Bo Quill lives in Cork. He eats figs every day."],
        **files,
    }
    for name, lines in texts.items():
        write_lines(tmp_path / f"{name}.jsonl", [{"text": line} for line in lines])
    sources = {name: f"{name}.jsonl" for name in texts}
    with pytest.raises(UserError, match=message) as caught:
        opened(tmp_path, **sources, probes=settings)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_its_key(tmp_path):
    with pytest.raises(UserError, match=r"own\.forget: missing file 'nowhere\.jsonl'"):
        opened(tmp_path, forget="nowhere.jsonl")
    with pytest.raises(ValidationError, match="holdot"):
        OwnConfig(forget="a", holdot="b")
