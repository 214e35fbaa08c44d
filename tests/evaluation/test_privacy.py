"""The suite on the tiny model: rows equal plain loops, what is said follows from the numbers, mistakes are one line."""

import dataclasses
import json
import math
import zlib

import numpy as np
import pytest
import torch
from conftest import FORGET_ROWS, RETAIN_ROWS, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from falcon_unlearn.artifacts import Estimate, to_plain
from falcon_unlearn.corpus.batching import Encoder
from falcon_unlearn.corpus.records import record_from_row
from falcon_unlearn.errors import UserError
from falcon_unlearn.evaluation import privacy
from falcon_unlearn.evaluation.membership import auc, privleak
from falcon_unlearn.evaluation.privacy import PrivacyConfig, privacy_score_from, privleak_statement
from falcon_unlearn.evaluation.suite import Subject


def with_another_value(i):
    """Record ``i`` with the next other person's value in its sentence: nobody ever saw it."""
    row, others = FORGET_ROWS[i], [*FORGET_ROWS, *RETAIN_ROWS][i + 4 :: 4]
    value = next(other["value"] for other in others if other["value"] != row["value"])
    return {**row, "answer": row["answer"].replace(row["value"], value)}


HOLDOUT_ROWS = [with_another_value(i) for i in range(len(FORGET_ROWS))]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("privacy")
    write_lines(folder / "forget.jsonl", FORGET_ROWS)
    write_lines(folder / "holdout.jsonl", HOLDOUT_ROWS)
    return folder


@pytest.fixture(scope="module")
def subjects(tiny, oracle):
    def subject(folder):
        encoder = Encoder(AutoTokenizer.from_pretrained(folder))
        return Subject(AutoModelForCausalLM.from_pretrained(folder).eval(), encoder, batch_size=5, name=str(folder))

    return subject(tiny.model), subject(oracle)


def config(**changes):
    return PrivacyConfig(**{"forget": {"source": "forget.jsonl"}, "holdout": {"source": "holdout.jsonl"}, **changes})


def scored(suite, subject, chunk=100):
    rows = {}
    for part, units in suite.parts.items():
        found = []
        for start in range(0, units, chunk):
            found += suite.score(part, range(start, min(start + chunk, units)), subject)
        rows[part] = [suite.row(part, json.loads(json.dumps(to_plain(row)))) for row in found]
        assert all(same(a, b) for a, b in zip(rows[part], found, strict=True))
    return rows


def same(a, b):
    pairs = zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True)
    return all(x == y or (x != x and y != y) for x, y in pairs)


def naive_row(model, encoder, row, share):
    """One record at a time, from the logits."""
    text = f"Question: {row['question']}\nAnswer: {row['answer']}"
    encoded = encoder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, answer_at = encoded["input_ids"], text.index(row["answer"]) - 1
    first = next(i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > answer_at)
    bos = encoder.tokenizer("a")["input_ids"][:1] == [encoder.tokenizer.bos_token_id]
    if bos:
        ids, first = [encoder.tokenizer.bos_token_id, *ids], first + 1
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1).numpy()
    tokens, z, right = [], [], []
    for t in range(first, len(ids)):
        row_p = log_p[t - 1]
        p = np.exp(row_p)
        mean = (p * row_p).sum()
        tokens.append(row_p[ids[t]])
        z.append((row_p[ids[t]] - mean) / max(np.sqrt((p * row_p**2).sum() - mean**2), 1e-3))
        right.append(row_p.argmax() == ids[t])
    k = int(len(tokens) * share)
    strength = next((1 - n / len(right) for n in range(len(right)) if all(right[n:])), 0)
    return {
        "tokens": len(tokens),
        "loss": -np.mean(tokens),
        "zlib": -np.mean(tokens) / len(zlib.compress(encoder.tokenizer.decode(ids[first:]).encode())),
        "min_k": -np.mean(sorted(tokens)[:k]),
        "min_k_plus_plus": -np.mean(sorted(z)[:k]),
        "extraction_strength": strength,
        "exact_memorization": np.mean(right),
    }


def test_rows_equal_a_loop_over_single_records(files, subjects):
    model, encoder = subjects[1].model, subjects[1].encoder  # the oracle: its numbers are not all extreme
    rows = scored(config().open(files, 0), subjects[1])
    for part, records in (("forget", FORGET_ROWS), ("holdout", HOLDOUT_ROWS)):
        for i, (row, record) in enumerate(zip(rows[part], records, strict=True)):
            assert (row.set, row.index, row.entity) == (part, i, record["entity"])
            for name, value in naive_row(model, encoder, record, 0.4).items():
                assert getattr(row, name) == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_what_was_learnt_by_heart_is_recognised_and_the_oracle_recognises_nothing(files, subjects):
    suite = config().open(files, 0)
    rows, oracle_rows = scored(suite, subjects[0]), scored(suite, subjects[1])
    result = suite.summarise(rows, oracle_rows, {"seed": 0})
    metrics = result.metrics
    assert metrics["auc_loss"].value == auc([r.loss for r in rows["forget"]], [r.loss for r in rows["holdout"]]) > 0.95
    assert metrics["extraction_strength"].value > 0.9
    assert metrics["extraction_strength_holdout"].value < 0.7
    aucs = [auc([r.min_k for r in one["forget"]], [r.min_k for r in one["holdout"]]) for one in (rows, oracle_rows)]
    assert metrics["privleak"].value == pytest.approx(privleak(*aucs))
    assert metrics["privleak"].value < -80
    assert "AUC above .5" in result.statements[0]
    theirs = suite.summarise(oracle_rows, None, {})
    assert theirs.metrics["auc_loss"].low < 0.5 < theirs.metrics["auc_loss"].high
    assert "privleak" not in theirs.metrics
    assert result.settings == {
        "seed": 0,
        "min_k": 0.4,
        "reference": None,
        "zlib": "mean loss per token / bytes of the compressed text",
    }


def test_chunks_and_batches_change_nothing(files, subjects, oracle):
    one = scored(config(reference=str(oracle)).open(files, 0), subjects[0])
    other = scored(
        config(reference=str(oracle)).open(files, 0), dataclasses.replace(subjects[0], batch_size=1), chunk=5
    )
    for part, rows in one.items():
        for a, b in zip(rows, other[part], strict=True):
            assert (a.text, a.tokens) == (b.text, b.tokens)
            assert a.loss == pytest.approx(b.loss, rel=1e-4, abs=1e-6)
            assert a.reference == pytest.approx(b.reference, rel=1e-4, abs=1e-6)


def test_the_reference_model_is_loaded_once_a_model_and_subtracted(files, subjects, oracle, monkeypatch):
    loads = []
    load = privacy.load_causal_lm
    monkeypatch.setattr(privacy, "load_causal_lm", lambda source: loads.append(source.name) or load(source))
    suite = config(reference=str(oracle)).open(files, 0)
    rows = scored(suite, subjects[0], chunk=4)
    assert loads == [str(oracle)]
    alone = scored(config().open(files, 0), subjects[1])
    for part, found in rows.items():
        for row, reference in zip(found, alone[part], strict=True):
            assert row.reference_loss == pytest.approx(reference.loss, rel=1e-4)
            assert row.reference == row.loss - row.reference_loss
    result = suite.summarise(rows, None, {})
    assert result.metrics["auc_reference"].value == auc(*([r.reference for r in side] for side in rows.values()))
    assert result.metrics["auc_of_reference_model"].value == pytest.approx(
        auc([r.loss for r in alone["forget"]], [r.loss for r in alone["holdout"]]), abs=0.02
    )
    assert result.settings["reference"] == str(oracle)


def test_a_reference_model_with_another_tokenizer_is_refused(files, subjects, oracle, tmp_path):
    from falcon_unlearn.engine.pretraining import LlamaShape, build_llama, train_tokenizer

    tokenizer = train_tokenizer(["quite another text " * 3], 300, 64)
    build_llama(LlamaShape(layers=1, hidden=8, heads=2, mlp=8, context=64), tokenizer, seed=0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    suite = config(reference=str(tmp_path)).open(files, 0)
    with pytest.raises(UserError, match=r"^privacy\.reference: .* has another tokenizer than [^\n]*$"):
        suite.score("forget", range(2), subjects[0])


def test_texts_are_cut_to_the_context_and_long_answers_are_unscorable(tmp_path, subjects):
    long = "Ada Marsh lives in Arlo. " * 40
    write_lines(tmp_path / "forget.jsonl", [{"text": long}, {"question": "Who?", "answer": long}])
    write_lines(
        tmp_path / "holdout.jsonl", [{"text": "Bo Quill works as a baker."}, {"question": "Where?", "answer": "a"}]
    )
    suite = config().open(tmp_path, 0)
    rows = scored(suite, subjects[0])
    text, answer = rows["forget"]
    assert 0 < text.tokens <= 64
    assert (answer.tokens, answer.text) == (0, "")
    assert all(math.isnan(getattr(answer, name)) for name in ("loss", "zlib", "min_k", "extraction_strength"))
    result = suite.summarise(rows, None, {})
    assert (result.metrics["auc_loss"].n, result.metrics["auc_loss"].unscorable) == (3, 1)
    assert any(s.startswith("Not scored: 1 of 4 records") for s in result.statements)
    assert result.statements[0].startswith("Too few records")
    short = rows["holdout"][1]
    assert short.tokens > 0
    assert math.isnan(short.min_k) == (int(short.tokens * 0.4) == 0)


def test_the_draw_is_a_subset_in_order_and_part_of_the_content(files):
    few = config(max_records=5).open(files, 3)
    assert few.parts == {"forget": 5, "holdout": 5}
    assert few.content == config(max_records=5).open(files, 3).content
    assert few.content != config(max_records=5).open(files, 4).content
    assert few.content["settings"] != config(min_k=0.2).open(files, 3).content["settings"]


def test_a_record_in_both_sets_is_refused(tmp_path):
    write_lines(tmp_path / "forget.jsonl", FORGET_ROWS)
    write_lines(tmp_path / "holdout.jsonl", [*RETAIN_ROWS, FORGET_ROWS[2]])
    with pytest.raises(UserError, match=r"^privacy\.holdout: holdout\.jsonl:29 also stands in the forget set \(forget"):
        config().open(tmp_path, 0)


def test_missing_inputs_are_one_line(files):
    with pytest.raises(UserError, match=r"^privacy\.forget: missing file 'gone\.jsonl'"):
        config(forget={"source": "gone.jsonl"}).open(files, 0)
    with pytest.raises(UserError, match=r"^privacy\.reference: folder \./gone does not exist"):
        config(reference="./gone").open(files, 0)


def with_losses(suite, forget, holdout):
    """Rows whose every signal is the given loss."""
    record = record_from_row(FORGET_ROWS[0], "")

    def row(part, i, loss):
        return privacy_score_from(
            {"set": part, "index": i, "text": record.answer, "tokens": 9, "entity": None, "reference": None}
            | dict.fromkeys(("loss", "zlib", "min_k", "min_k_plus_plus"), loss)
            | {"extraction_strength": 0.0, "exact_memorization": 0.5, "reference_loss": None}
        )

    return {
        part: [row(part, i, loss) for i, loss in enumerate(losses)]
        for part, losses in (("forget", forget), ("holdout", holdout))
    }


@settings(max_examples=9)
@given(st.sampled_from([-1.0, 0.0, 1.0]), st.integers(0, 99))
def test_what_is_said_follows_from_the_intervals(shift, seed):
    rng = np.random.default_rng(seed)
    suite = privacy.PrivacySuite({"forget": (), "holdout": ()}, 0.4, None, 0)
    rows = with_losses(suite, rng.normal(-shift, 1, 120), rng.normal(0, 1, 120))
    result = suite.summarise(rows, None, {})
    estimate = result.metrics["auc_loss"]
    said = " ".join(result.statements)
    assert ("AUC above .5" in said) == (estimate.low > 0.5)
    assert ("AUC below .5" in said and "over-forgetting" in said) == (estimate.high < 0.5)
    assert ("No signal tells" in said) == (estimate.low <= 0.5 <= estimate.high)
    assert "rests on holdout records of the same kind" in said


def test_an_oracle_that_tells_the_sets_apart_is_a_warning():
    rng = np.random.default_rng(0)
    suite = privacy.PrivacySuite({"forget": (), "holdout": ()}, 0.4, None, 0)
    near = with_losses(suite, rng.normal(0, 1, 120), rng.normal(0, 1, 120))
    apart = with_losses(suite, rng.normal(-2, 1, 120), rng.normal(0, 1, 120))
    said = " ".join(suite.summarise(near, apart, {}).statements)
    assert "Careful: the oracle" in said
    assert "which should be near .5" in said
    assert "Careful" not in " ".join(suite.summarise(apart, near, {}).statements)


def test_privleak_without_a_value_says_why():
    suite = privacy.PrivacySuite({"forget": (), "holdout": ()}, 0.4, None, 0)
    near = with_losses(suite, [1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
    perfect = with_losses(suite, [1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    result = suite.summarise(near, perfect, {})
    assert result.metrics["privleak"].value is None
    assert any("PrivLeak has no value" in s for s in result.statements)
    assert "no value" in privleak_statement(Estimate(3.0), None)
