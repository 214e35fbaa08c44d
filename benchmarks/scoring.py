"""Scoring a question set: ours against a plain loop, one answer a forward pass and one question a generation.

    python benchmarks/scoring.py --threads 1       # CPU: a small model, and a narrower stack of SmolLM-135M's width
    python benchmarks/scoring.py --device cuda     # SmolLM-135M's and Llama-3.2-1B's shapes in bf16

Records are shaped like TOFU's perturbed ones: an answer, its paraphrase, five wrong answers that differ from the
paraphrase in a few words, and a greedy answer of up to 64 tokens. Weights are random, so no answer ends early: the
longest generation for both ways. ``max_abs_diff`` is between mean log-probabilities per token; ``speedup`` is the
smallest of the rows, ``flop_limit`` the share of the time that our FLOPs would take at the speed of a matrix product.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from harness import flops_per_second, interleaved, options, show
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from falcon_unlearn.artifacts import SampleScore
from falcon_unlearn.corpus.batching import Encoder
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.engine.pretraining import train_tokenizer
from falcon_unlearn.evaluation.scoring import score_set
from falcon_unlearn.model.cost import EXTRA_FLOPS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEW_TOKENS = 64
WRONG = 5
# As TOFU's forget10_perturbed has them: 27 tokens a prompt, 38 an answer, 244 distinct beginnings a question.
QUESTION_WORDS, ANSWER_WORDS, CHANGED = (8, 18), (22, 50), 4


@dataclass(frozen=True)
class Case:
    """A model's shape and how many questions it is asked."""

    name: str
    shape: Mapping[str, Any]
    questions: int
    batch: int
    dtype: torch.dtype = torch.float32


def _shape(hidden: int, layers: int, mlp: int, words: int, kv: int | None = None) -> dict[str, Any]:
    heads = hidden // 64
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv or heads,
        "vocab_size": words,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
    }


SMALL = _shape(256, 8, 1024, 8000)
QUICK = [Case("llama 256 x 8", SMALL, 16, 32)]
CPU = [Case("llama 256 x 8", SMALL, 64, 32), Case("SmolLM width, 576 x 8", _shape(576, 8, 1536, 49_152, 3), 16, 16)]
CUDA = [
    Case("SmolLM-135M", _shape(576, 30, 1536, 49_152, 3), 256, 256, torch.bfloat16),
    Case("Llama-3.2-1B", _shape(2048, 16, 8192, 128_256, 8), 256, 128, torch.bfloat16),
]


def records(count: int) -> list[Record]:
    """Invented questions of TOFU's lengths; wrong answers are the paraphrase with a few words changed."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    lexicon = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(1500)]

    def some(low: int, high: int) -> list[str]:
        return draw.choices(lexicon, k=draw.randint(low, high))

    def changed(words: Sequence[str]) -> str:
        result = list(words)
        for place in draw.sample(range(len(result)), CHANGED):
            result[place] = draw.choice(lexicon)
        return " ".join(result)

    found = []
    for i in range(count):
        paraphrase = some(*ANSWER_WORDS)
        found.append(
            Record(
                "qa",
                " ".join(some(*QUESTION_WORDS)) + "?",
                " ".join(some(*ANSWER_WORDS)),
                f"invented:{i}",
                paraphrased_answer=" ".join(paraphrase),
                perturbed_answers=tuple(changed(paraphrase) for _ in range(WRONG)),
            )
        )
    return found


@dataclass(frozen=True)
class Reference:
    """What the plain loop finds out about one question."""

    log_probabilities: tuple[float, ...]
    generation: str


def plain_loop(model: PreTrainedModel, encoder: Encoder, questions: Sequence[Record], device: str) -> list[Reference]:
    """Batch 1: a forward pass for each answer, ``generate`` for each question."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=encoder.pad_id, eos_token_id=encoder.eos_id
    )
    found = []
    with torch.no_grad():
        for record in questions:
            values = []
            assert record.paraphrased_answer is not None
            for answer in (record.answer, record.paraphrased_answer, *record.perturbed_answers):
                encoded = encoder.encode(record, answer=answer)
                ids = torch.tensor([encoded.ids], device=device)
                logits = model(input_ids=ids, use_cache=False).logits[0, encoded.answer_start - 1 : -1]
                targets = ids[0, encoded.answer_start :]
                values.append(-float(torch.nn.functional.cross_entropy(logits.float(), targets)))
            prompt = torch.tensor([encoder.encode_prompt(record).ids], device=device)
            output = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
            text = encoder.tokenizer.decode(
                output[0, prompt.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            found.append(Reference(tuple(values), text.strip()))
    return found


def _compare(ours: Sequence[SampleScore], reference: Sequence[Reference]) -> tuple[float, float]:
    """Largest difference of a log-probability, and the share of generations that are the same text."""
    differences = []
    for score, plain in zip(ours, reference, strict=True):
        found = (score.log_probability, score.paraphrased_log_probability, *score.perturbed_log_probabilities)
        differences += [
            math.inf if a is None else abs(a - b) for a, b in zip(found, plain.log_probabilities, strict=True)
        ]
    equal = [score.generation == plain.generation for score, plain in zip(ours, reference, strict=True)]
    return max(differences), sum(equal) / len(equal)


def measure(case: Case, device: str, runs: int) -> dict[str, Any]:
    """One row."""
    questions = records(case.questions)
    texts = [t for r in questions for t in (r.prompt, r.answer, r.paraphrased_answer or "")]
    encoder = Encoder(train_tokenizer(texts, 6000, 2048))
    torch.manual_seed(0)
    config = LlamaConfig(**case.shape, eos_token_id=encoder.eos_id, bos_token_id=None, initializer_range=0.05)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(case.dtype).eval().requires_grad_(False)

    def ours() -> list[SampleScore]:
        return score_set(
            model, encoder, questions, "forget", batch_size=case.batch, max_new_tokens=NEW_TOKENS, device=device
        )

    def plain() -> list[Reference]:
        return plain_loop(model, encoder, questions, device)

    difference, equal = _compare(ours(), plain())
    times = interleaved({"ours": ours, "plain": plain}, device=device, runs=runs, warmup=0)
    with FlopCounterMode(display=False, custom_mapping=dict(EXTRA_FLOPS)) as counter:
        ours()
    answers = [
        encoder.encode(r, answer=a)
        for r in questions
        for a in (r.answer, r.paraphrased_answer or "", *r.perturbed_answers)
    ]
    tokens = sum(map(len, answers)) + NEW_TOKENS * len(questions)
    row: dict[str, Any] = {"case": case.name, "questions": len(questions), "batch": case.batch}
    for name, timing in times.items():
        row[f"{name}_questions_per_s"] = len(questions) / timing.median
        row[f"{name}_tokens_per_s"] = tokens / timing.median
    limit = counter.get_total_flops() / flops_per_second(device, case.dtype)
    return {
        **row,
        "speedup": times["plain"].median / times["ours"].median,
        "max_abs_diff": difference,
        "generations_equal": equal,
        "flop_limit": limit / times["ours"].median,
    }


def main() -> int:
    parser = options(__doc__ or "")
    parser.set_defaults(runs=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    cases = QUICK if arguments.quick else CUDA if arguments.device.startswith("cuda") else CPU
    rows = []
    for case in cases:
        rows.append(measure(case, arguments.device, 1 if arguments.quick else arguments.runs))
        print(f"{case.name}: {rows[-1]['speedup']:.1f}x", file=sys.stderr)
    result = {
        "rows": rows,
        "speedup": min(row["speedup"] for row in rows),
        "max_abs_diff": max(row["max_abs_diff"] for row in rows),
        "generations_equal": min(row["generations_equal"] for row in rows),
    }
    table: list[list[object]] = [
        ["case", "questions/s", "plain loop", "tokens/s", "speed-up", "max |diff|", "same text", "of FLOP limit"]
    ]
    table += [
        [
            row["case"], f"{row['ours_questions_per_s']:.1f}", f"{row['plain_questions_per_s']:.2f}",
            f"{row['ours_tokens_per_s']:,.0f}", f"{row['speedup']:.1f}", f"{row['max_abs_diff']:.1e}",
            f"{row['generations_equal']:.0%}", f"{row['flop_limit']:.0%}",
        ]
        for row in rows
    ]  # fmt: skip
    show(arguments, "Scoring: seven answers and one generation a question", table, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
