"""Scoring candidate triggers of a greedy coordinate gradient: ours against a plain loop.

``plain`` runs one prompt at a time, all candidates in batches of the same size, every token and logits at every
position every time (nanogcg without its prefix cache, over several prompts). ``head`` is the same with logits at target
positions only. ``one by one`` is the loop nobody waits for: one candidate, one prompt; timed on a few candidates.

Prompts have the shape of WMDP's questions: ``before`` tokens, trigger, a short end, an answer. As a suffix the trigger
stands behind the question, which is then kept; as a prefix it stands before it, and what is kept is the trigger itself.
"""

from __future__ import annotations

import argparse
import functools
import random
from dataclasses import dataclass
from typing import Any

import torch
from harness import interleaved, options, show, timed
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from falcon_unlearn.attacks.gcg import Trigger, TriggerScorer
from falcon_unlearn.attacks.gcg_prompts import Prompt

ONE_BY_ONE = 4


@dataclass(frozen=True)
class Shape:
    """A Llama, its questions, and candidates a step."""

    hidden: int = 256
    layers: int = 6
    vocabulary: int = 16_000
    prompts: int = 6
    question: int = 128
    trigger: int = 20
    end: int = 6
    target: int = 6
    candidates: int = 32


FULL = Shape()
QUICK = Shape(hidden=128, layers=3, vocabulary=4_000, prompts=3, question=64, candidates=24)
CUDA = Shape(hidden=2048, layers=16, vocabulary=128_000, prompts=8, question=160, candidates=512)


@functools.cache
def subject(shape: Shape, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """Random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=4 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(shape.hidden // 64, 1),
        num_key_value_heads=max(shape.hidden // 64, 1),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    return LlamaForCausalLM(config).to(device, dtype).eval().requires_grad_(False)


def questions(shape: Shape, placement: str) -> list[Prompt]:
    """Lengths differ by up to a quarter."""
    rng = random.Random(0)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, shape.vocabulary) for _ in range(n))

    head = tokens(4)
    result = []
    for _ in range(shape.prompts):
        question = tokens(rng.randrange(3 * shape.question // 4, shape.question + 1))
        if placement == "suffix":
            result.append(Prompt((*head, *question), tokens(shape.end), tokens(shape.target)))
        else:
            result.append(Prompt(head, (*question, *tokens(shape.end)), tokens(shape.target)))
    return result


def triggers(shape: Shape) -> list[Trigger]:
    """One trigger with one token replaced, as a step draws them."""
    rng = random.Random(1)
    base = [rng.randrange(3, shape.vocabulary) for _ in range(shape.trigger)]
    result = []
    for _ in range(shape.candidates):
        other = list(base)
        other[rng.randrange(shape.trigger)] = rng.randrange(3, shape.vocabulary)
        result.append(tuple(other))
    return result


@torch.no_grad()
def plain(
    model: PreTrainedModel, prompts: list[Prompt], candidates: list[Trigger], rows: int, *, head: bool = False
) -> Tensor:
    """The mean loss of each candidate, the obvious way."""
    total = torch.zeros(len(candidates), device=model.device)
    for prompt in prompts:
        target = torch.tensor(prompt.target, device=model.device)
        for start in range(0, len(candidates), rows):
            part = candidates[start : start + rows]
            ids = torch.tensor(
                [[*prompt.before, *trigger, *prompt.after, *prompt.target] for trigger in part], device=model.device
            )
            keep = {"logits_to_keep": len(target) + 1} if head else {}
            logits = model(ids, use_cache=False, **keep).logits[:, -len(target) - 1 : -1].float()
            losses = F.cross_entropy(logits.flatten(0, 1), target.repeat(len(part)), reduction="none")
            total[start : start + len(part)] += losses.view(len(part), -1).mean(1)
    return (total / len(prompts)).double().cpu()


def measure(
    shape: Shape, placement: str, rows: int, dtype: torch.dtype, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Candidates per second of every way, and the largest difference of a loss."""
    device = arguments.device
    model, prompts, candidates = subject(shape, device, dtype), questions(shape, placement), triggers(shape)
    scorer = TriggerScorer(model, prompts, candidates[0])
    assert scorer.cached
    scorer.rows = rows
    ways = {
        "plain": lambda: plain(model, prompts, candidates, rows),
        "head": lambda: plain(model, prompts, candidates, rows, head=True),
        "ours": lambda: scorer.score(candidates),
    }
    timings = interleaved(ways, device=device, runs=arguments.runs)
    few = candidates[:ONE_BY_ONE]
    single = timed(lambda: plain(model, prompts, few, 1), device=device, runs=2).median / len(few)
    difference = float((plain(model, prompts, candidates, rows) - scorer.score(candidates).loss).abs().max())
    rate = {way: len(candidates) / timing.median for way, timing in timings.items()}
    return {
        "candidates_per_second": {**rate, "one_by_one": 1 / single},
        "speedup": rate["ours"] / rate["plain"],
        "speedup_over_head": rate["ours"] / rate["head"],
        "speedup_over_one_by_one": rate["ours"] * single,
        "max_abs_diff": difference,
        "timings": {way: str(timing) for way, timing in timings.items()},
    }


def main() -> None:
    """Run and print."""
    parser = options(__doc__)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rows", type=int, default=None, help="candidates in a forward pass (default: 32; CUDA: 256)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    cuda = arguments.device.startswith("cuda")
    shape = QUICK if arguments.quick else CUDA if cuda else FULL
    rows = arguments.rows or (256 if cuda else 32)
    results = {
        placement: measure(shape, placement, rows, getattr(torch, arguments.dtype), arguments)
        for placement in ("suffix", "prefix")
    }
    timings = {placement: result.pop("timings") for placement, result in results.items()}
    lines = [
        (
            placement,
            way,
            f"{rate:,.1f}",
            f"{rate / result['candidates_per_second']['plain']:.2f}",
            timings[placement].get(way, ""),
        )
        for placement, result in results.items()
        for way, rate in result["candidates_per_second"].items()
    ]
    result = {
        "speedup": results["suffix"]["speedup"],
        "max_abs_diff": max(entry["max_abs_diff"] for entry in results.values()),
        "rows": rows,
        "dtype": arguments.dtype,
        "shape": vars(shape),
        "placements": results,
    }
    title = (
        f"{shape.candidates} candidates of {shape.trigger} tokens on {shape.prompts} questions of about "
        f"{shape.question}, {rows} in a pass; {shape.layers} layers of {shape.hidden}, "
        f"vocabulary {shape.vocabulary}, {arguments.dtype}\n"
        f"speedup {results['suffix']['speedup']:.2f} as a suffix, {results['prefix']['speedup']:.2f} as a prefix; "
        f"largest difference of a loss {result['max_abs_diff']:.1e}"
    )
    show(arguments, title, [("trigger", "way", "candidates/s", "of plain", "a step"), *lines], result)


if __name__ == "__main__":
    main()
