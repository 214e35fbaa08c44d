"""Published logs give the published figures in either format; our own log gives our own numbers."""

import json
import math
import os
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hmean, ks_2samp

from falcon_unlearn.artifacts import SampleScore
from falcon_unlearn.errors import UserError
from falcon_unlearn.evaluation.logs import open_unlearning_log, open_unlearning_summary, read_oracle, score_log
from falcon_unlearn.evaluation.metrics import (
    compute_metrics,
    forget_quality_of,
    normalised_probability,
    truth_ratio,
)

LOGS = Path(os.environ.get("FALCON_UNLEARN_DATA", "../shared/data")) / "tofu_eval_logs"
SECTIONS = {
    "forget": "eval_log_forget.json",
    "retain": "eval_log.json",
    "ra": "eval_real_author_wo_options.json",
    "wf": "eval_real_world_wo_options.json",
}
NINE = (
    "retain_Q_A_Prob",
    "retain_Q_A_ROUGE",
    "retain_Truth_Ratio",
    "ra_Q_A_Prob_normalised",
    "ra_Q_A_ROUGE",
    "ra_Truth_Ratio",
    "wf_Q_A_Prob_normalised",
    "wf_Q_A_ROUGE",
    "wf_Truth_Ratio",
)

needs_logs = pytest.mark.skipif(not LOGS.is_dir(), reason="no shared data")


def published(name):
    return LOGS / f"llama2-7b_{name}.json"


def as_open_unlearning(log):
    """The TOFU authors' log as OpenUnlearning would have written it: its formulas, its 1e-10."""
    result = {}
    for prefix, section in SECTIONS.items():
        part = log[section]
        answer = {i: math.exp(-x) for i, x in part["avg_gt_loss"].items()}
        wrong = {i: [math.exp(-x) for x in xs] for i, xs in part["average_perturb_loss"].items()}
        ratio = {
            i: math.exp(-statistics.fmean(part["average_perturb_loss"][i]))
            / (math.exp(-part["avg_paraphrased_loss"][i]) + 1e-10)
            for i in answer
        }
        rouge = part["rougeL_recall"]
        forget = prefix == "forget"
        result[f"{prefix}_Q_A_Prob"] = {
            "agg_value": statistics.fmean(answer.values()),
            "value_by_index": {i: {"prob": p, "avg_loss": part["avg_gt_loss"][i]} for i, p in answer.items()},
        }
        if prefix in {"ra", "wf"}:
            share = {i: p / (p + sum(wrong[i]) + 1e-10) for i, p in answer.items()}
            result[f"{prefix}_Q_A_Prob_normalised"] = {
                "agg_value": statistics.fmean(share.values()),
                "value_by_index": {i: {"prob": p} for i, p in share.items()},
            }
        else:
            result[f"{prefix}_Q_A_PARA_Prob"] = {
                "agg_value": 0.0,
                "value_by_index": {
                    i: {"prob": math.exp(-x), "avg_loss": x} for i, x in part["avg_paraphrased_loss"].items()
                },
            }
        result[f"{prefix}_Q_A_PERT_Prob"] = {
            "agg_value": 0.0,
            "value_by_index": {i: {"prob": wrong[i], "avg_loss": xs} for i, xs in part["average_perturb_loss"].items()},
        }
        result[f"{prefix}_Q_A_ROUGE"] = {
            "agg_value": statistics.fmean(rouge.values()),
            "value_by_index": {
                i: {"rougeL_recall": x, "rouge1_recall": 0.0, "rougeL_f1": 0.0} for i, x in rouge.items()
            },
        }
        result["forget_truth_ratio" if forget else f"{prefix}_Truth_Ratio"] = {
            "agg_value": statistics.fmean(min(r, 1 / r) if forget else max(0, 1 - r) for r in ratio.values()),
            "value_by_index": {i: {"score": r} for i, r in ratio.items()},
        }
    result["model_utility"] = {"agg_value": hmean([result[name]["agg_value"] for name in NINE])}
    result["forget_quality"] = {"agg_value": 0.25}
    result["extraction_strength"] = {"agg_value": 0.06, "value_by_index": {"0": {"score": 0.06}}}
    return result


def write(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def in_format(name, log_format, folder):
    """A published log, or the same in OpenUnlearning's format."""
    if log_format == "tofu":
        return published(name)
    return write(folder / f"{name}_TOFU_EVAL.json", as_open_unlearning(json.loads(published(name).read_text())))


FORMATS = ("tofu", "open-unlearning")


@needs_logs
@pytest.mark.parametrize("log_format", FORMATS)
@pytest.mark.parametrize(
    ("name", "utility"), [("full", 0.6227), ("retain90", 0.6137), ("retain95", 0.6006), ("retain99", 0.6207)]
)
def test_model_utility_of_the_published_logs(tmp_path, name, utility, log_format):
    scores = score_log(in_format(name, log_format, tmp_path), None)
    assert round(scores.model_utility, 4) == utility
    assert scores.format == log_format
    assert tuple(scores.parts) == NINE
    assert scores.model_utility == pytest.approx(hmean(list(scores.parts.values())))
    assert {*NINE, "model_utility", "forget_truth_ratio"} <= set(scores.intervals)


@needs_logs
@pytest.mark.parametrize("retain_format", FORMATS)
@pytest.mark.parametrize("log_format", FORMATS)
@pytest.mark.parametrize(
    ("retain", "quality"), [("retain90", "1.834e-21"), ("retain95", "6.504e-16"), ("retain99", "2.345e-06")]
)
def test_forget_quality_of_the_published_logs_in_any_mix_of_formats(
    tmp_path, retain, quality, log_format, retain_format
):
    scores = score_log(in_format("full", log_format, tmp_path), in_format(retain, retain_format, tmp_path))
    assert f"{scores.forget_quality:.3e}" == quality
    assert scores.log10_forget_quality == pytest.approx(math.log10(scores.forget_quality))


@needs_logs
@pytest.mark.parametrize("log_format", FORMATS)
def test_the_papers_definition_from_either_format(tmp_path, log_format):
    full, retain = (json.loads(published(name).read_text()) for name in ("full", "retain90"))

    def ratios(log, prefix):
        part = log[SECTIONS[prefix]]
        wrong = np.exp(-np.array(list(part["average_perturb_loss"].values()))).mean(axis=1)
        return wrong / np.exp(-np.array(list(part["avg_paraphrased_loss"].values())))

    scores = score_log(in_format("full", log_format, tmp_path), published("retain90"), definition="paper")
    expected = ks_2samp(ratios(full, "forget"), ratios(retain, "forget")).pvalue
    assert scores.forget_quality == pytest.approx(expected, rel=1e-9)
    # The authors scored answer and "paraphrase" of real authors, one text, in different batches.
    assert scores.parts["ra_Truth_Ratio"] == pytest.approx(np.maximum(0, 1 - ratios(full, "ra")).mean(), rel=1e-3)
    assert scores.parts["retain_Truth_Ratio"] == pytest.approx(np.maximum(0, 1 - ratios(full, "retain")).mean())
    code = score_log(in_format("full", log_format, tmp_path), published("retain90"))
    assert scores.model_utility < code.model_utility


@needs_logs
def test_notes_say_when_the_logs_do_not_ask_the_same():
    assert score_log(published("full"), published("retain90")).notes == ()
    notes = score_log(published("full"), published("retain99")).notes
    assert "300 forget samples with 40" in notes[0]
    assert "other forget questions" in notes[1]


@needs_logs
def test_nothing_but_the_forget_section_of_the_retain_log_is_read(tmp_path):
    retain = json.loads(published("retain90").read_text())
    section = retain["eval_log_forget.json"]
    bare = {key: section[key] for key in ("avg_paraphrased_loss", "average_perturb_loss")}
    alone = score_log(published("full"), write(tmp_path / "r.json", {"eval_log_forget.json": bare}))
    assert alone.forget_quality == score_log(published("full"), published("retain90")).forget_quality


# --- our own logs -------------------------------------------------------------------------------------------------

log_probabilities = st.floats(-12, -0.01)


@st.composite
def sample_scores(draw, set_name, index):
    answer, paraphrase = draw(log_probabilities), draw(log_probabilities)
    wrong = tuple(draw(st.lists(log_probabilities, min_size=3, max_size=3)))
    has_paraphrase = set_name in {"forget", "retain"}
    unscorable = draw(st.integers(0, 9)) == 0 and index
    if unscorable:
        answer = paraphrase = math.nan
    return SampleScore(
        set=set_name,
        index=index,
        prompt=f"{set_name} {index}?",
        answer=f"answer {index}",
        generation="so it is",
        probability=math.exp(answer),
        accuracy=1.0,
        rouge=math.nan if unscorable else draw(st.floats(0.05, 1)),
        truth_ratio=truth_ratio(paraphrase if has_paraphrase else answer, wrong),
        entity=draw(st.sampled_from([None, "a", "b", "c"])),
        normalised_probability=None if has_paraphrase else normalised_probability(answer, wrong),
        log_probability=answer,
        paraphrased_log_probability=paraphrase if has_paraphrase else None,
        perturbed_log_probabilities=wrong,
    )


@st.composite
def all_scores(draw):
    return {
        name: [draw(sample_scores(name, i)) for i in range(draw(st.integers(1, 6)))]
        for name in ("forget", "retain", "real_authors", "world_facts")
    }


@settings(max_examples=25)
@given(all_scores(), st.data())
def test_our_own_log_gives_exactly_our_own_metrics(tmp_path_factory, scores, data):
    oracle = [data.draw(sample_scores("forget", i)) for i in range(4)]
    folder = tmp_path_factory.mktemp("log")
    theirs = {**scores, "forget": oracle}
    log = write(folder / "TOFU_EVAL.json", open_unlearning_log(scores, oracle))
    retain = write(folder / "RETAIN_EVAL.json", open_unlearning_log(theirs))
    for definition in ("code", "paper"):
        metrics = compute_metrics(scores, oracle, definition=definition)
        read = score_log(log, retain, definition=definition)
        assert read.forget_quality == metrics.forget_quality
        assert read.log10_forget_quality == metrics.log10_forget_quality
        assert read.model_utility == metrics.model_utility
        assert sorted(read.parts.values()) == sorted(metrics.utility_parts.values())
        assert read.forget_truth_ratio == metrics.forget_truth_ratio
        assert read.forget_probability == metrics.forget_probability
        assert read.forget_rouge == metrics.forget_rouge
        assert read.intervals.get("model_utility") == metrics.intervals.get("model_utility")
        assert read.intervals.get("ra_Q_A_ROUGE") == metrics.intervals.get("real_authors_rouge")


def scores_by_hand(n=4):
    scores = {}
    for name in ("forget", "retain", "real_authors", "world_facts"):
        scores[name] = [
            SampleScore(
                name,
                i,
                "q",
                "a",
                "g",
                math.exp(-1 - i / 8),
                1.0,
                0.5,
                truth_ratio=0.5 + i / 7,
                normalised_probability=0.6 if name in {"real_authors", "world_facts"} else None,
                log_probability=-1 - i / 8,
            )
            for i in range(n)
        ]
    return scores


def test_the_log_has_open_unlearnings_names_and_aggregates():
    scores = scores_by_hand()
    log = open_unlearning_log(scores, scores["forget"])
    own = {"forget_Q_A_Prob", "forget_Q_A_ROUGE", "forget_truth_ratio", "model_utility", "forget_quality"}
    assert set(NINE) | own | {"ra_Q_A_Prob", "wf_Q_A_Prob"} == set(log)
    assert log["forget_quality"] == {"agg_value": 1.0}
    assert log["forget_Q_A_Prob"]["value_by_index"]["2"] == {"prob": math.exp(-1.25), "avg_loss": 1.25}
    ratios = [0.5 + i / 7 for i in range(4)]
    assert log["forget_truth_ratio"]["value_by_index"]["3"] == {"score": ratios[3]}
    assert log["forget_truth_ratio"]["agg_value"] == pytest.approx(statistics.fmean(min(r, 1 / r) for r in ratios))
    assert log["wf_Truth_Ratio"]["agg_value"] == pytest.approx(statistics.fmean(1 - r for r in ratios))
    assert log["model_utility"]["agg_value"] == pytest.approx(hmean([log[name]["agg_value"] for name in NINE]))
    assert open_unlearning_summary(log) == {name: entry["agg_value"] for name, entry in log.items()}
    assert "forget_quality" not in open_unlearning_log(scores)


def test_an_unscorable_sample_is_null_and_its_truth_ratio_left_out(tmp_path):
    scores = scores_by_hand()
    nan = {"probability": math.nan, "rouge": math.nan, "truth_ratio": math.nan, "log_probability": math.nan}
    scores["forget"][1] = SampleScore("forget", 1, "q", "a", "g", accuracy=1.0, **nan)
    log = open_unlearning_log(scores)
    json.dumps(log, allow_nan=False)
    assert log["forget_Q_A_Prob"]["value_by_index"]["1"] == {"prob": None, "avg_loss": None}
    assert set(log["forget_truth_ratio"]["value_by_index"]) == {"0", "2", "3"}
    notes = score_log(write(tmp_path / "log.json", log), None).notes
    assert any("unscorable" in note and "1 samples of forget_truth_ratio" in note for note in notes)


@needs_logs
def test_a_published_retain_log_is_an_oracle_of_our_own_scores():
    scores = scores_by_hand(60)
    oracle = read_oracle(published("retain90"))
    p, log10_p = forget_quality_of(scores["forget"], oracle)
    ratios = [s.truth_ratio for s in oracle]
    assert len(ratios) == 300
    assert p == pytest.approx(ks_2samp([s.truth_ratio for s in scores["forget"]], ratios).pvalue)
    assert log10_p == pytest.approx(math.log10(p))


# --- what is missing ----------------------------------------------------------------------------------------------


@pytest.fixture
def own_log(tmp_path):
    scores = scores_by_hand()

    def build(change=lambda log: None, name="log.json"):
        log = open_unlearning_log(scores, scores["forget"])
        change(log)
        return write(tmp_path / name, log)

    return build


def without_samples(*metrics):
    def change(log):
        for metric in metrics:
            del log[metric]["value_by_index"]

    return change


def test_aggregates_stand_in_for_samples_and_are_named(own_log):
    whole = score_log(own_log(), None)
    partly = score_log(own_log(without_samples("ra_Q_A_ROUGE")), None)
    assert partly.parts["ra_Q_A_ROUGE"] == whole.parts["ra_Q_A_ROUGE"]
    assert partly.model_utility == pytest.approx(whole.model_utility)
    assert any(note.startswith("ra_Q_A_ROUGE: the log's own aggregate") for note in partly.notes)
    assert "model_utility" in whole.intervals
    assert not {"model_utility", "ra_Q_A_ROUGE"} & set(partly.intervals)


def test_a_summary_alone_gives_its_aggregates(tmp_path):
    scores = scores_by_hand()
    log = open_unlearning_log(scores, scores["forget"])
    read = score_log(write(tmp_path / "TOFU_SUMMARY.json", open_unlearning_summary(log)), None)
    assert read.model_utility == pytest.approx(log["model_utility"]["agg_value"])
    assert (read.forget_quality, read.log10_forget_quality) == (1.0, 0.0)
    assert read.forget_truth_ratio == log["forget_truth_ratio"]["agg_value"]
    assert read.intervals == {}
    assert any(note.startswith("forget_quality: the log's own aggregate") for note in read.notes)


def test_utility_without_its_parts_is_the_logs_own(own_log):
    def change(log):
        for part in NINE[3:]:
            del log[part]

    read = score_log(own_log(change), None)
    assert read.model_utility == score_log(own_log(), None).model_utility
    assert set(read.parts) == set(NINE[:3])
    assert any(note.startswith("model_utility: the log's own aggregate") for note in read.notes)


def test_a_log_that_contradicts_its_samples_is_noted(own_log):
    def change(log):
        log["forget_truth_ratio"]["agg_value"] = 0.123

    notes = score_log(own_log(change), None).notes
    assert any("0.123" in note and note.startswith("forget_truth_ratio") for note in notes)


def test_without_a_retain_log_there_is_no_forget_quality(own_log):
    read = score_log(own_log(lambda log: log.pop("forget_quality")), None)
    assert read.forget_quality is None
    assert read.log10_forget_quality is None
    assert any("give a retain log" in note for note in read.notes)


def test_a_p_value_too_small_for_the_log_has_no_logarithm(own_log):
    read = score_log(own_log(lambda log: log["forget_quality"].update(agg_value=0.0)), None)
    assert (read.forget_quality, read.log10_forget_quality) == (0, None)


def small_tofu_log():
    def section(n_wrong):
        return {
            "avg_gt_loss": {"0": 1.0, "1": 2.0},
            "rougeL_recall": {"0": 0.5, "1": 1.0},
            "avg_paraphrased_loss": {"0": 1.5, "1": 2.5},
            "average_perturb_loss": {"0": [3.0] * n_wrong, "1": [2.0] * n_wrong},
        }

    return {"eval_log.json": section(5), "eval_log_forget.json": section(5)} | {
        name: section(3) for name in ("eval_real_author_wo_options.json", "eval_real_world_wo_options.json")
    }


def edited(path, change):
    log = small_tofu_log()
    change(log)
    return write(path, log)


@pytest.mark.parametrize("section", SECTIONS.values())
def test_a_missing_section_is_named(tmp_path, section):
    path = edited(tmp_path / "log.json", lambda log: log.pop(section))
    with pytest.raises(UserError, match=rf"log.json: section '{section}' is missing"):
        score_log(path, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("avg_paraphrased_loss"), "eval_log_forget.json: has no 'avg_paraphrased_loss'"),
        (lambda s: s.update(avg_gt_loss={}), "eval_log_forget.json: 'avg_gt_loss' is empty"),
        (lambda s: s["avg_gt_loss"].pop("1"), "sample 1 is not in both 'avg_gt_loss'"),
        (lambda s: s["avg_gt_loss"].update({"1": "x"}), "avg_gt_loss, 1: expected a number, found str"),
        (lambda s: s["average_perturb_loss"].update({"1": 2.0}), "average_perturb_loss, 1: expected a list"),
        (lambda s: s["average_perturb_loss"].update({"1": []}), "average_perturb_loss, 1: expected a list"),
    ],
)
def test_a_damaged_section_is_named(tmp_path, change, message):
    path = edited(tmp_path / "log.json", lambda log: change(log["eval_log_forget.json"]))
    with pytest.raises(UserError, match=message) as error:
        score_log(path, None)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_null_losses_are_unscorable_not_dropped(tmp_path):
    path = edited(tmp_path / "log.json", lambda log: log["eval_log.json"]["avg_gt_loss"].update({"0": None}))
    read = score_log(path, None)
    assert read.parts["retain_Q_A_Prob"] == pytest.approx(math.exp(-2))
    assert any("1 samples of retain_Q_A_Prob" in note for note in read.notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[1, 2]", "neither a TOFU log"),
        (b"{}", "neither a TOFU log"),
        (b'{"loss": 3}', "neither a TOFU log"),
        (json.dumps(small_tofu_log()["eval_log.json"]).encode(), "a single section of a TOFU log"),
        (b'{"forget_truth_ratio": {"value_by_index": {}}}', "'value_by_index' is empty"),
        (b'{"forget_truth_ratio": {"value_by_index": {"a": {"score": 1}}}}', "keys must be sample indices"),
        (b'{"forget_truth_ratio": {"value_by_index": {"0": 1}}}', "expected an object"),
        (b'{"forget_truth_ratio": {"value_by_index": {"0": {"score": "x"}}}}', "expected a number, found str"),
        (b'{"forget_truth_ratio": {"agg_value": 0.5}}', "retain_Q_A_Prob, .* missing"),
    ],
)
def test_what_is_no_log_is_said_in_one_line(tmp_path, content, message):
    path = tmp_path / "log.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        score_log(path, None)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_a_folder_is_no_log(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        score_log(tmp_path, None)


def test_forget_quality_needs_single_samples_on_both_sides(own_log):
    whole, aggregated = own_log(), own_log(without_samples("forget_truth_ratio"), "aggregated.json")
    with pytest.raises(UserError, match=r"aggregated.json: has no forget_truth_ratio by sample but as an aggregate"):
        score_log(whole, aggregated)
    read = score_log(aggregated, whole)
    assert read.forget_quality == 1
    assert any(note.startswith("forget_quality: the log's own aggregate") for note in read.notes)
    with pytest.raises(UserError, match="PERT_Prob"):
        score_log(whole, whole, definition="paper")
