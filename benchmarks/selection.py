"""Layer selection on TOFU: batched extraction and blockwise entropies against one record at a time and scipy.

The reference runs the whole causal model on one record at a time with hooks registered for each, moves the means to
numpy, and takes H(F) + H(R) - H(F,R) from scikit-learn's PCA and scipy's gaussian_kde. Both ways see all layers of a
16-layer Llama with random weights and 400 forget and 3600 retain records (forget10 and retain90 of TOFU, from
$FALCON_UNLEARN_DATA or /work/shared/data/tofu; invented records where there are none).

Of the reference only a share is run, evenly spread, and scaled up: about 400 records (by tokens), and PCA and KDE at
the first, the middle and the last layer, once, as they take minutes. With `--whole` or `--quick` all of it is run.
Ours is always run as a whole. Values are compared in fp64 at every layer, on fewer records.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import flops_per_second, options, show, synchronize
from scipy.stats import gaussian_kde
from sklearn.decomposition import PCA
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from falcon_unlearn.corpus.batching import PLAIN_TEMPLATE, Encoded
from falcon_unlearn.corpus.fictional import build_world
from falcon_unlearn.engine.pretraining import train_tokenizer
from falcon_unlearn.selection.activations import layer_means
from falcon_unlearn.selection.mutual_information import MutualInformationConfig, curve, published_mutual_information

LAYERS = 16
FORGET, RETAIN = 400, 3600
VARIANCE = 0.95
BPE_VOCABULARY = 8192


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama of 16 layers."""

    hidden: int
    mlp: int
    heads: int
    key_value_heads: int
    vocabulary: int = BPE_VOCABULARY


SHAPES = {
    "demo": Shape(128, 256, 4, 4),  # width of the embedded demo's model
    "tofu": Shape(256, 768, 4, 4),  # width of benchmarks/train_tofu_model.py
    "wide": Shape(512, 1536, 8, 8),
    "1b": Shape(2048, 8192, 32, 8, vocabulary=128256),  # Llama-3.2-1B
}


def tofu_pairs() -> tuple[str, list[tuple[str, str]], list[tuple[str, str]]]:
    """Source, forget and retain (question, answer) pairs."""
    folder = Path(os.environ.get("FALCON_UNLEARN_DATA", "/work/shared/data/tofu"))
    found = [path for name in ("forget10", "retain90") for path in sorted(folder.glob(f"**/{name}.jsonl"))[:1]]
    if len(found) == 2:
        rows = [[json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in found]
        forget, retain = ([(row["question"], row["answer"]) for row in part] for part in rows)
        return "TOFU", forget[:FORGET], retain[:RETAIN]
    world = build_world(0, n_people=600)
    forget, retain = (
        [(question, fact.answer) for fact in facts for question in fact.questions]
        for facts in (world.forget, world.retain)
    )
    return "invented records", forget[:FORGET], retain[:RETAIN]


def encode(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
    """All tokens after beginning-of-sequence count."""
    texts = [PLAIN_TEMPLATE.format(question=question, answer=answer) for question, answer in pairs]
    return [Encoded(tuple(ids), 1, 1) for ids in tokenizer(texts)["input_ids"]]


def build_model(shape: Shape, device: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=LAYERS,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        model: PreTrainedModel = LlamaForCausalLM(config).to(dtype).eval()
    return model


# --- the reference


def reference_activations(model: Any, records: Sequence[Encoded]) -> list[np.ndarray]:
    """One ``(records, hidden)`` array a layer."""
    kept: list[list[np.ndarray]] = [[] for _ in model.model.layers]
    for record in records:

        def keep(layer: int) -> Callable[..., None]:
            def hook(module: Any, arguments: Any, output: torch.Tensor) -> None:
                mean = output[0, 1:].mean(dim=0)
                kept[layer].append((mean.float() if mean.dtype == torch.bfloat16 else mean).cpu().numpy())

            return hook

        handles = [layer.register_forward_hook(keep(i)) for i, layer in enumerate(model.model.layers)]
        with torch.no_grad():
            model(input_ids=torch.tensor([record.ids], device=model.device))
        for handle in handles:
            handle.remove()
    return [np.stack(rows) for rows in kept]


def reference_entropy(samples: np.ndarray) -> float:
    projected = PCA(n_components=VARIANCE).fit_transform(samples.astype(np.float64)).T
    return float(-gaussian_kde(projected).logpdf(projected).mean())


def reference_information(forget: np.ndarray, retain: np.ndarray) -> float:
    pairs = min(len(forget), len(retain))
    joint = np.concatenate([forget[:pairs], retain[:pairs]], axis=1)
    return reference_entropy(forget) + reference_entropy(retain) - reference_entropy(joint)


# --- ours


def our_activations(model: Any, records: Sequence[Encoded], batch_tokens: int) -> list[torch.Tensor]:
    return layer_means(model, records, range(LAYERS), mask="all", pad_id=0, batch_tokens=batch_tokens)


def our_information(forget: Sequence[torch.Tensor], retain: Sequence[torch.Tensor], device: str) -> list[float]:
    return [
        published_mutual_information(f.to(device), r.to(device), VARIANCE) for f, r in zip(forget, retain, strict=True)
    ]


# --- measuring


def seconds(device: str, function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    synchronize(device)
    began = time.perf_counter()
    result = function(*arguments)
    synchronize(device)
    return time.perf_counter() - began, result


def measure(
    shape: Shape, forget: list[Encoded], retain: list[Encoded], device: str, runs: int, batch_tokens: int, whole: bool
) -> dict[str, float]:
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = build_model(shape, device, dtype)
    records = forget + retain
    tokens = sum(map(len, records))
    step = 1 if whole else max(1, len(records) // 400)
    reference_activations(model, records[:3])
    our_activations(model, records[:40], batch_tokens)
    reference_extraction, extraction, estimate = [], [], []
    for run in range(runs):
        spent, activations = seconds(device, our_activations, model, records, batch_tokens)
        extraction.append(spent)
        of_forget, of_retain = (
            [x[part] for x in activations] for part in (slice(len(forget)), slice(len(forget), None))
        )
        estimate.append(seconds(device, our_information, of_forget, of_retain, device)[0])
        sample = records[run % step :: step]
        spent, _ = seconds(device, reference_activations, model, sample)
        reference_extraction.append(spent * tokens / sum(map(len, sample)))
    reference_estimate = [
        seconds(device, reference_information, of_forget[layer].numpy(), of_retain[layer].numpy())[0]
        for layer in (range(LAYERS) if whole else (0, LAYERS // 2, LAYERS - 1))
    ]
    users = functools.partial(curve, device=device if device.startswith("cuda") else None)
    curve_s, _ = seconds(device, users, range(LAYERS), {"forget": of_forget}, of_retain, MutualInformationConfig(), 0)
    flops = 2 * sum(p.numel() for p in model.model.layers.parameters()) * tokens
    result = {
        "reference_extraction_s": statistics.median(reference_extraction),
        "reference_estimate_s": statistics.mean(reference_estimate) * LAYERS,
        "extraction_s": statistics.median(extraction),
        "estimate_s": statistics.median(estimate),
        "curve_s": curve_s,
        "extraction_limit_s": flops / flops_per_second(device, dtype),
    }
    result["speedup"] = (result["reference_extraction_s"] + result["reference_estimate_s"]) / (
        result["extraction_s"] + result["estimate_s"]
    )
    return result


def largest_difference(shape: Shape, forget: list[Encoded], retain: list[Encoded], device: str) -> float:
    """Over all layers, in fp64 throughout, in nats."""
    model = build_model(shape, device, torch.float64)
    forget, retain = forget[:: max(1, len(forget) // 60)], retain[:: max(1, len(retain) // 240)]
    slow = zip(reference_activations(model, forget), reference_activations(model, retain), strict=True)
    ours = our_information(our_activations(model, forget, 1024), our_activations(model, retain, 1024), device)
    return max(abs(value - reference_information(*pair)) for value, pair in zip(ours, slow, strict=True))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: demo and tofu; on CUDA 1b")
    parser.add_argument("--batch-tokens", type=int, help="tokens per forward pass (default: 1024; on CUDA 16384)")
    parser.add_argument("--whole", action="store_true", help="run the reference on every record and layer")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = arguments.device
    cuda = device.startswith("cuda")
    names = arguments.shapes or (["1b"] if cuda else ["demo"] if arguments.quick else ["demo", "tofu"])
    source, *pairs = tofu_pairs()
    if arguments.quick:
        pairs = [part[::8] for part in pairs]
    texts = [PLAIN_TEMPLATE.format(question=question, answer=answer) for part in pairs for question, answer in part]
    tokenizer = train_tokenizer(texts, BPE_VOCABULARY, 512)
    forget, retain = (encode(tokenizer, part) for part in pairs)
    budget = arguments.batch_tokens or (16384 if cuda else 1024)
    measured = {
        name: {
            **measure(SHAPES[name], forget, retain, device, arguments.runs, budget, arguments.whole or arguments.quick),
            "max_abs_diff": largest_difference(SHAPES[name], forget, retain, device),
        }
        for name in names
    }
    rows: list[list[object]] = [
        ["shape", "hidden/MLP/vocabulary", "reference: extraction", "PCA + KDE", "ours: extraction", "PCA + KDE",
         "FLOP limit", "curve with nulls", "speedup", "max |diff|"]
    ]  # fmt: skip
    for name, found in measured.items():
        shape = SHAPES[name]
        keys = ("reference_extraction_s", "reference_estimate_s", "extraction_s", "estimate_s", "extraction_limit_s")
        rows.append([
            name, f"{shape.hidden}/{shape.mlp}/{shape.vocabulary}",
            *(f"{found[key]:,.1f} s" for key in (*keys, "curve_s")),
            f"{found['speedup']:.1f}x", f"{found['max_abs_diff']:.1e}",
        ])  # fmt: skip
    result = {
        "speedup": measured[names[-1]]["speedup"],
        "max_abs_diff": max(found["max_abs_diff"] for found in measured.values()),
        "shapes": measured,
        "source": source,
        "records": [len(forget), len(retain)],
    }
    title = f"Layer selection, {LAYERS} layers, {len(forget)} x {len(retain)} records ({source})"
    show(arguments, title, rows, result)


if __name__ == "__main__":
    main()
