"""What fits on which card: the cost model's peak memory for 7B, 13B and 70B shapes. Computed, not measured.

From configs alone, which stand here: nothing is downloaded, no weight exists. Each row is a recipe as ``--estimate``
reads it, on CUDA, in bf16, with batches of 4 x 512 tokens (forget and retain each) and 400 records on each side. The
target layer of methods on layers is at a quarter of the depth: 7 of 32. How far the cost model is off is measured by
``benchmarks/estimate.py``.

A row fits a card if it takes at most nine tenths of it: the rest is for the CUDA context, workspaces inside kernels,
what the allocator keeps, and the cost model's error. The host's memory is that for kept activations; what is above
``training.cache_gb`` goes to the disk.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig

from falcon_unlearn.estimate import Estimate, estimate_run
from falcon_unlearn.recipe import recipe_from

CARDS = (8, 24, 80)
USABLE = 0.9
BATCH, LENGTH, RECORDS = 4, 512, 400


def _llama(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, words: int) -> PreTrainedConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=words,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


MODELS: Mapping[str, PreTrainedConfig] = {
    "Zephyr-7B": MistralConfig(vocab_size=32_000, sliding_window=4096, dtype="bfloat16"),
    "Llama-2-13B": _llama(5120, 13_824, 40, 40, 40, 32_000),
    "Llama-3.1-70B": _llama(8192, 28_672, 80, 64, 8, 128_256),
    "Llama-2-7B": _llama(4096, 11_008, 32, 32, 32, 32_000),
}


def rows_for(layers: int) -> dict[str, dict[str, Any]]:
    """Recipes by name, without what all share; the target layer is at a quarter of ``layers``."""
    target = layers // 4 - 1
    one, three = {"layers": [target]}, {"layers": [target - 2, target - 1, target]}
    layer, paper = {"name": "falcon", "preset": "layer"}, {"name": "falcon", "preset": "paper"}
    whole, every = {"name": "falcon", "preset": "default"}, {"layers": "all"}
    lora = {"rank": 8}
    return {
        "paper, 3 layers": {"method": paper, "selection": three, "training": {"cache": "never"}},
        "paper, 3 layers, streamed": {"method": paper, "selection": three, "training": {"streaming": "always"}},
        "layer, 1 layer": {"method": layer, "selection": one, "training": {"cache": "never"}},
        "layer, 1 layer, streamed": {"method": layer, "selection": one, "training": {"streaming": "always"}},
        "scoring": {"method": layer, "selection": one, "evaluation": {"enabled": True, "batch_size": BATCH}},
        "default, LoRA r=8": {"method": whole, "selection": every, "training": {"lora": lora}},
        "default, LoRA r=8, by 1": {
            "method": whole,
            "selection": every,
            "training": {"lora": lora, "micro_batch_size": 1},
        },
        "default, 3 layers": {"method": whole, "selection": three},
        "default, all": {"method": whole, "selection": every},
    }


def predicted(config: PreTrainedConfig, changes: Mapping[str, Any]) -> Estimate:
    """As ``falcon-unlearn run --estimate`` with records that are assumed."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(config.to_json_string(use_diff=False), encoding="utf-8")
        recipe = {
            "model": folder,
            "corpus": {"forget": {"source": "none"}, "retain": {"source": "none"}, "max_length": LENGTH},
            "device": "cuda",
            "dtype": "bfloat16",
            "output": f"{folder}/run",
            **changes,
            "training": {"steps": 20, "batch_size": BATCH, **changes.get("training", {})},
            "evaluation": {"enabled": False, "max_records": RECORDS, **changes.get("evaluation", {})},
        }
        return estimate_run(recipe_from(recipe), work=False)


def main() -> int:
    """Print the table."""
    arguments = harness.options(__doc__ or "").parse_args()
    table: list[list[object]] = [["model", "recipe", "peak", *(f"{card} GB" for card in CARDS), "host"]]
    rows: list[dict[str, Any]] = []
    for name, config in MODELS.items():
        for what, changes in rows_for(config.num_hidden_layers).items():
            began = time.perf_counter()
            estimate = predicted(config, changes)
            scored = what == "scoring"
            peak = max(s.peak_bytes for s in estimate.stages if s.stage.startswith("score") == scored)
            fits = {f"{card} GB": peak <= USABLE * card * 2**30 for card in CARDS}
            host = 0 if scored else estimate.host_bytes
            parts = {} if scored else dict(estimate.training)
            rows.append(
                {"model": name, "recipe": what, "peak_bytes": peak, "host_bytes": host, "fits": fits, "parts": parts}
            )
            yes = ["yes" if fit else "-" for fit in fits.values()]
            table.append([name, what, harness.gib(peak), *yes, harness.gib(host) if host else "-"])
            done = f"{harness.gib(peak)}, host {harness.gib(host)}, {time.perf_counter() - began:.1f} s"
            print(f"{name}, {what}: {done}", file=sys.stderr)
        if arguments.quick:
            break
    title = "Peak memory on the device, computed by the cost model, not measured"
    harness.show(arguments, title, table, {"rows": rows, "usable": USABLE})
    return 0


if __name__ == "__main__":
    sys.exit(main())
