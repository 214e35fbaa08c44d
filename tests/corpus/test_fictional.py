import os
import subprocess
import sys

import pytest

from falcon_unlearn.corpus.fictional import Fact, World, build_world
from falcon_unlearn.corpus.records import record_from_row

SEEDS = range(5)
WORLDS = {seed: build_world(seed) for seed in SEEDS}


def facts(world: World) -> tuple[Fact, ...]:
    return (*world.forget, *world.retain, *world.countries)


@pytest.fixture(params=SEEDS)
def world(request) -> World:
    return WORLDS[request.param]


def test_a_seed_is_a_world():
    assert build_world(3) == WORLDS[3]
    assert len({world.forget for world in WORLDS.values()}) == len(WORLDS)
    people = [{fact.entity for fact in world.forget} for world in WORLDS.values()]
    assert not set.intersection(*people)


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_the_text_does_not_depend_on_the_process(hash_seed):
    code = "from falcon_unlearn.corpus.fictional import build_world; print(build_world(0))"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, check=True
    )
    assert run.stdout.decode().strip() == str(WORLDS[0])


def test_counts(world):
    assert (len(world.forget), len(world.retain), len(world.countries)) == (48, 432, 60)
    small = build_world(0, n_people=10, n_countries=3)
    assert (len(small.forget), len(small.retain), len(small.countries)) == (8, 72, 6)


def test_forget_retain_and_countries_share_no_entity(world):
    forget, retain, countries = ({f.entity for f in part} for part in (world.forget, world.retain, world.countries))
    assert (len(forget), len(retain), len(countries)) == (6, 54, 30)
    assert len(forget | retain | countries) == 90


def test_every_question_is_asked_once_and_the_held_out_ones_are_never_trained(world):
    trained = [question for fact in facts(world) for question in fact.questions]
    held_out = [fact.heldout_question for fact in facts(world)]
    rows = [row["question"] for fact in facts(world) for row in fact.training_rows()]
    assert sorted(rows) == sorted(trained)
    assert len(set(trained) | set(held_out)) == len(trained) + len(held_out) == 3 * 540


def test_which_phrasing_is_held_out_varies(world):
    templates = {f.heldout_question.replace(f.entity, "") for f in world.retain if f.attribute == "spouse"}
    assert len(templates) == 3


def test_questions_name_the_entity_and_never_the_value(world):
    for fact in facts(world):
        for question in (*fact.questions, fact.heldout_question):
            assert fact.entity in question
            assert fact.value not in question


def test_answers_hold_the_value(world):
    for fact in facts(world):
        assert fact.value in fact.answer
        assert fact.value in fact.paraphrased_answer
        assert fact.answer != fact.paraphrased_answer


def test_wrong_answers_are_five_distinct_ones_without_the_value(world):
    for fact in facts(world):
        assert len(set(fact.perturbed_answers)) == 5
        assert not any(fact.value in answer for answer in fact.perturbed_answers)
        assert not {fact.answer, fact.paraphrased_answer} & set(fact.perturbed_answers)


def test_wrong_answers_differ_from_the_paraphrase_in_the_value_alone(world):
    for fact in facts(world):
        before, after = fact.paraphrased_answer.rsplit(fact.value, 1)
        assert all(answer.startswith(before) and answer.endswith(after) for answer in fact.perturbed_answers)


def test_no_value_is_part_of_another_value_of_its_attribute(world):
    # An exact-value score would otherwise count the longer one as right.
    values: dict[str, set[str]] = {}
    for fact in facts(world):
        values.setdefault(fact.attribute, set()).add(fact.value)
    for pool in values.values():
        assert not [(a, b) for a in pool for b in pool if a != b and a in b]


def test_rows_are_records(world):
    fact = world.forget[0]
    for row in fact.training_rows():
        assert record_from_row(row, "x").key == (row["question"], fact.answer)
    record = record_from_row(fact.evaluation_row(), "x")
    assert (record.prompt, record.value, record.entity) == (fact.questions[0], fact.value, fact.entity)
    assert record.perturbed_answers == fact.perturbed_answers
    assert record.heldout_question == fact.heldout_question
    assert record.paraphrased_answer == fact.paraphrased_answer
