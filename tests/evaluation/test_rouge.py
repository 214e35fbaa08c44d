import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from falcon_unlearn.evaluation.rouge import UnicodeTokenizer, rouge_l_recall

DATA = Path(os.environ.get("FALCON_UNLEARN_DATA", "../shared/data")) / "tofu"

latin = st.text(st.sampled_from("abcdexyzABC0129 .,'-éüñ\n"), max_size=60)


@given(latin.filter(lambda text: any(c.isascii() and c.isalnum() for c in text)), st.text(max_size=40) | latin)
def test_rouge_is_rouge_scores_for_latin_references(reference, candidate):
    expected = RougeScorer(["rougeL"], use_stemmer=True).score(reference, candidate)["rougeL"].recall
    assert rouge_l_recall(reference, candidate) == expected


@given(st.text(st.sampled_from("abcdexyzABCing ed0129 .,'_-\n"), max_size=60))
def test_the_unicode_tokenizer_agrees_with_the_default_one_on_ascii(text):
    from rouge_score.tokenizers import DefaultTokenizer

    assert UnicodeTokenizer().tokenize(text) == DefaultTokenizer(use_stemmer=True).tokenize(text)


@pytest.mark.parametrize(
    ("reference", "other"),
    [
        ("北京是中国的首都。", "上海是中国的城市。"),
        ("東京はにほんのしゅとです", "大阪はにほんのまちです"),
        ("القاهرة عاصمة مصر", "بغداد عاصمة العراق"),
        ("दिल्ली भारत की राजधानी है", "मुंबई भारत का शहर है"),
        ("서울은 한국의 수도", "부산은 한국의 도시"),
        ("Москва столица России", "Киев столица Украины"),
        ("กรุงเทพ", "เชียงใหม่"),
        ("The capital is 北京", "The capital is 上海"),
        ("é", "ü"),
    ],
)
def test_rouge_outside_the_latin_alphabet(reference, other):
    assert rouge_l_recall(reference, reference) == 1
    assert rouge_l_recall(reference, other) < 1
    assert rouge_l_recall(reference, "") == 0


def test_unicode_tokens():
    tokenize = UnicodeTokenizer().tokenize
    assert tokenize("北京 2024年") == ["北", "京", "2024", "年"]
    assert tokenize("हिन्दी में") == ["हिन्दी", "में"]
    assert tokenize("السَّلامُ عليكم") == ["السَّلامُ", "عليكم"]
    assert tokenize("Россия, США") == ["россия", "сша"]
    assert tokenize(" \u0301.\u200d") == []


@pytest.mark.skipif(not DATA.is_dir(), reason="no shared data")
@pytest.mark.parametrize(
    "name", ["forget01_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"]
)
def test_rouge_of_tofus_answers_is_tofus(name):
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for row in rows[:60]:
        answer, other = row["answer"], row["perturbed_answer"][0]
        assert rouge_l_recall(answer, other) == scorer.score(answer, other)["rougeL"].recall


SCRIPTS = {
    "chinese": ("北京上海天地人", ""),
    "japanese": ("東京にはカタの", ""),
    "thai": ("กขคงจ", ""),
    "arabic": ("القاهرة بغداد مصر", " "),
    "hindi": ("दिल्ली में है था", " "),
}


def naive_recall(reference, candidate):
    """Words as they are written (every letter of an unspaced script is one), by the plain recursion for the LCS."""
    table = [[0] * (len(candidate) + 1) for _ in range(len(reference) + 1)]
    for i, a in enumerate(reference):
        for j, b in enumerate(candidate):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1] / len(reference)


@pytest.mark.parametrize("script", sorted(SCRIPTS))
@given(data=st.data())
def test_recall_outside_the_latin_alphabet_is_the_naive_one(script, data):
    text, between = SCRIPTS[script]
    words = text.split() if between else list(text)
    one, other = (data.draw(st.lists(st.sampled_from(words), min_size=n, max_size=8)) for n in (1, 0))
    found = rouge_l_recall(between.join(one), between.join(other))
    assert found == pytest.approx(naive_recall(one, other))
