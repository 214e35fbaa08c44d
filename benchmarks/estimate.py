"""The cost model against the real thing: predicted and measured memory and FLOPs of training and scoring.

Each row runs the real trainer (method set-up, forget and retain passes, combination, optimiser) or a real scoring
pass on random weights in a fresh process. Memory is the peak above what importing takes: resident size on the CPU,
what torch allocated on CUDA. On the CPU the shapes are chosen to need hundreds of megabytes, because the allocator's
own keep and the libraries' first-use buffers are tens of them. FLOPs are torch's FlopCounterMode around the same
steps, with the fused attention of the CPU and the experts' grouped product added, which it lacks.

glibc's allocator moves its threshold for mapping memory up to 32 MiB as it goes; what lies below stays in its heap, and
holes between tensors count as resident: a fifth more than there are tensors. The cost model predicts tensors, so the
measured processes run with MALLOC_MMAP_THRESHOLD_=65536; ``--heap`` measures with glibc's own ways instead.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import harness
import torch
from torch import Tensor

from falcon_unlearn.corpus.batching import Encoded, collate
from falcon_unlearn.engine.optimizers import build_optimizer
from falcon_unlearn.engine.trainer import TrainingConfig, TrainingData, train
from falcon_unlearn.estimate import estimate_run
from falcon_unlearn.evaluation.log_probabilities import answer_log_probabilities
from falcon_unlearn.methods import Falcon, FalconConfig, Setup, WholeModel, WholeSetup, entry_of
from falcon_unlearn.model.activation_cache import record_key
from falcon_unlearn.model.cost import (
    EXTRA_FLOPS,
    BatchShape,
    blueprint,
    head_flops,
    layers_flops,
    scoring_peak,
    step_flops,
    step_memory,
)
from falcon_unlearn.model.decoder import SplitDecoder
from falcon_unlearn.objectives.representation import cosine_retention, info_nce
from falcon_unlearn.recipe import recipe_from

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from falcon_unlearn.recipe import Recipe

STEPS = 3
TRAINING = TrainingConfig(steps=STEPS)
STAND_INS = {"name": "falcon", "preset": "default"}
ALL_TERMS = {**STAND_INS, "stand_in": {"retain": "kl", "npo_weight": 1.0, "distillation_weight": 1.0}}


@dataclass(frozen=True)
class Case:
    """A model's shape, and a batch; ``layers`` are trained, none for scoring.

    ``whole`` is a recipe's method on the whole model, with the parameters that its preset trains, on records that
    ``--estimate`` assumes where there are none.
    """

    name: str
    architecture: str
    shape: Mapping[str, Any]
    batch: int
    length: int
    layers: tuple[int, ...] = ()
    modules: str = "mlp"
    ragged: bool = True
    optimizer: str = "adamw"
    whole: Mapping[str, Any] | None = None


def _llama(hidden: int, layers: int, mlp: int, words: int, kv: int = 0) -> dict[str, Any]:
    heads = hidden // 64
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv or heads,
        "head_dim": 64,
        "vocab_size": words,
        "max_position_embeddings": 2048,
    }


def _gpt2(hidden: int, layers: int, words: int) -> dict[str, Any]:
    return {"n_embd": hidden, "n_layer": layers, "n_head": hidden // 64, "n_positions": 1024, "vocab_size": words}


QUICK = [
    Case("llama 512 x 12, layer 5", "llama", _llama(512, 12, 2048, 8000), 4, 256, (5,)),
    Case("gemma3 512, large vocabulary", "gemma3_text", _llama(512, 8, 2048, 128_000, 2), 4, 128, (3,)),
    Case("score: llama 512 x 8", "llama", _llama(512, 8, 2048, 32_000), 8, 128),
    Case("whole: llama 512 x 8, stand-ins", "llama", _llama(512, 8, 2048, 16_000), 8, 128, whole=STAND_INS),
]
SMALL = [
    *QUICK,
    Case("llama 512 x 16, layers 5-7", "llama", _llama(512, 16, 2048, 8000, 2), 4, 256, (5, 6, 7)),
    Case("llama 512 x 16, all, unpadded", "llama", _llama(512, 16, 2048, 8000, 2), 4, 256, (5, 6), "all", ragged=False),
    Case("llama 256 x 8, 16 x 256, down_proj", "llama", _llama(256, 8, 1024, 8000), 16, 256, (3,), "down_proj"),
    Case("qwen3 768 x 8, sophia", "qwen3", _llama(768, 8, 3072, 16_000), 8, 128, (2, 3), optimizer="sophia"),
    Case("gpt2 768 x 12, layer 4", "gpt2", _gpt2(768, 12, 50_257), 8, 128, (4,)),
    Case("gemma2 512, eager attention", "gemma2", _llama(512, 8, 2048, 64_000, 2), 8, 128, (3,)),
    Case("mixtral 512, 4 experts", "mixtral", {**_llama(512, 6, 1024, 8000), "num_local_experts": 4}, 8, 128, (3,)),
    Case("score: gpt2 768 x 12", "gpt2", _gpt2(768, 12, 50_257), 8, 128),
    Case("score: gemma3, large vocabulary", "gemma3_text", _llama(512, 8, 2048, 128_000, 2), 4, 128),
    Case("whole: gpt2 512 x 8, stand-ins, all terms", "gpt2", _gpt2(512, 8, 50_257), 8, 128, whole=ALL_TERMS),
    Case("whole: llama 512 x 8, NPO", "llama", _llama(512, 8, 2048, 16_000), 8, 128, whole={"name": "npo"}),
]
LARGE = [
    Case("7B, layers 5-7, 4 x 512", "mistral", {"vocab_size": 32_000}, 4, 512, (5, 6, 7), "down_proj"),
    Case("7B, layers 5-7 mlp, unpadded", "mistral", {"vocab_size": 32_000}, 4, 512, (5, 6, 7), ragged=False),
    Case("1B, layer 7, 16 x 256", "llama", _llama(2048, 16, 8192, 128_000, 8), 16, 256, (7,)),
    Case("score: 1B", "llama", _llama(2048, 16, 8192, 128_000, 8), 32, 128),
    Case("whole: 1B, stand-ins", "llama", _llama(2048, 16, 8192, 128_000, 8), 16, 256, whole=STAND_INS),
]


def _config(case: Case) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING

    config: PreTrainedConfig = CONFIG_MAPPING[case.architecture](**case.shape)
    return config


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def _model(case: Case, device: str) -> PreTrainedModel:
    """Random weights; for training the layers up to the target only, without a head."""
    from transformers import AutoModel, AutoModelForCausalLM

    config = _config(case)
    if case.layers:
        config.num_hidden_layers = case.layers[-1] + 1
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[: case.layers[-1] + 1]
    auto = AutoModel if case.layers else AutoModelForCausalLM
    with torch.device(device):
        model: PreTrainedModel = auto.from_config(config, dtype=_dtype(device))
    return model.eval().requires_grad_(False)


def _records(case: Case, seed: int) -> list[Encoded]:
    """``STEPS`` batches; each holds the longest record when ragged records are drawn by epoch order."""
    generator = torch.Generator().manual_seed(seed)
    count = STEPS * case.batch
    lengths = [case.length - (i % 4) * case.length // 8 if case.ragged else case.length for i in range(count)]
    ids = torch.randint(3, 1000, (count, case.length), generator=generator).tolist()
    return [Encoded(tuple(row[:length]), length // 2) for row, length in zip(ids, lengths, strict=True)]


def _data(case: Case, device: str) -> TrainingData:
    return TrainingData({"forget": _records(case, 0)}, {"retain": _records(case, 1)}, 0, torch.device(device))


def _training(case: Case) -> TrainingConfig:
    optimizer = TRAINING.optimizer.model_copy(update={"name": case.optimizer, "lr": 1e-4})
    return TRAINING.model_copy(update={"batch_size": case.batch, "modules": case.modules, "optimizer": optimizer})


def run(case: Case, device: str) -> None:
    """The real work."""
    torch.manual_seed(0)
    model = _model(case, device)
    if case.whole is not None:
        _run_whole(case, model, device)
        return
    if not case.layers:
        answer_log_probabilities(model, _records(case, 0), 0, case.batch, device)
        return
    decoder = SplitDecoder(model, case.layers, case.modules)
    masters = decoder.masters()
    data = _data(case, device)
    method = Falcon(FalconConfig(offset="random"), Setup(decoder, data.first_batches(case.batch), "all", 0))
    train(method, masters, data, _training(case), seed=0, hidden_size=decoder.hidden_size)


def _recipe(case: Case, folder: str, device: str) -> Recipe:
    training = {"steps": STEPS, "batch_size": case.batch, "optimizer": {"lr": 1e-4}}
    return recipe_from(
        {
            "model": folder,
            "corpus": {"forget": {"source": "none"}, "retain": {"source": "none"}, "max_length": case.length},
            "method": dict(case.whole or {}),
            "training": training,
            "evaluation": {"enabled": False, "max_records": STEPS * case.batch},
            "device": device,
            "dtype": str(_dtype(device)).removeprefix("torch."),
            "output": f"{folder}/run",
        }
    )


def _run_whole(case: Case, model: PreTrainedModel, device: str) -> None:
    recipe = _recipe(case, "none", device)
    length, count = case.length, STEPS * case.batch
    records = [Encoded((*range(length - 1), i), length // 2) for i in range(count)]
    data = TrainingData({"forget": records}, {"retain": records}, 0, torch.device(device))
    whole = WholeModel(model)
    alternatives = {record_key(record): (record,) for record in records}
    batches = data.first_batches(case.batch)
    setup = WholeSetup(whole, batches, alternatives, recipe.corpus.loss_mask or "answer", 0, recipe.seed)
    masters = whole.masters()
    method = entry_of(recipe.method).build(recipe.method, setup)
    if not method.keeps_reference:
        whole.release()
    train(method, masters, data, recipe.training, seed=recipe.seed, hidden_size=whole.hidden_size)


def prepare(device: str) -> None:
    """Imports and the first use of every kernel, which are no part of the prediction."""
    case = Case("tiny", "llama", _llama(64, 2, 64, 1000), 2, 16, (1,))
    run(case, device)
    run(Case("tiny", "llama", _llama(64, 2, 64, 1000), 2, 16), device)
    run(Case("tiny", "llama", _llama(64, 2, 64, 1000), 2, 16, whole=ALL_TERMS), device)


def measured_flops(case: Case, device: str) -> int:
    """FlopCounterMode around the same work."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False, custom_mapping=dict(EXTRA_FLOPS)) as counter:
        run(case, device)
    return int(counter.get_total_flops())


def _shapes(case: Case) -> list[tuple[BatchShape, BatchShape]]:
    data = _data(case, "cpu")
    found = []
    for step in range(STEPS):
        _, *sides = data.at(step, case.batch, 0)
        forget, retain = (
            BatchShape(len(b), b.input_ids.shape[1], int(b.content_mask.sum()), not bool(b.attention_mask.all()))
            for b in sides
        )
        found.append((forget, retain))
    return found


def predicted(case: Case, device: str) -> tuple[int, int]:
    """Peak bytes and FLOPs, from the config and the shapes."""
    if case.whole is not None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(_config(case).to_json_string(), encoding="utf-8")
            stages = estimate_run(_recipe(case, folder, device)).stages
        return next((s.peak_bytes, s.flops) for s in stages if s.stage == "training")
    if not case.layers:
        return _predicted_scoring(case, device)
    model = blueprint(_config(case), _dtype(device), layers=case.layers[-1] + 1)
    vector = torch.empty(model.config.hidden_size, device="meta")

    def contrast(updated: Tensor, frozen: Tensor) -> Tensor:
        return info_nce(updated, vector, frozen[:, None], 0.7)

    def optimizer(masters: Any) -> torch.optim.Optimizer:
        made = build_optimizer(_training(case).optimizer, masters, hidden_size=1, batch_size=case.batch)
        for group in made.param_groups:
            if "foreach" in group:
                group["foreach"] = device.startswith("cuda")
        return made

    shapes = _shapes(case)
    forget, retain = (max((pair[side] for pair in shapes), key=lambda s: (s.length, s.tokens)) for side in (0, 1))
    memory = step_memory(
        model, case.layers, case.modules, forget, retain,
        objectives=(contrast, cosine_retention), optimizer=optimizer,
    )  # fmt: skip
    flops = step_flops(model, case.layers, case.modules, contrast)
    total = sum(s.records * (flops.frozen(s.length) + flops.trained(s.length)) for pair in shapes for s in pair)
    return memory.peak, total


def _predicted_scoring(case: Case, device: str) -> tuple[int, int]:
    from falcon_unlearn.corpus.batching import length_sorted_batches

    model = blueprint(_config(case), _dtype(device))
    flops, head = layers_flops(model), head_flops(model)
    records = _records(case, 0)
    peak = total = 0
    for indices in length_sorted_batches(records, case.batch):
        batch = collate([records[i] for i in indices], 0)
        length = batch.input_ids.shape[1]
        answers = int(batch.answer_mask.sum())
        shape = BatchShape(len(indices), length, answers, not bool(batch.attention_mask.all()))
        peak = max(peak, scoring_peak(model, shape))
        total += len(indices) * flops(length) + head * answers
    return peak, total


def main() -> int:
    parser = harness.options(__doc__ or "")
    parser.add_argument("--heap", action="store_true", help="leave glibc's allocator as it is")
    arguments = parser.parse_args()
    if not arguments.heap:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # read by the processes that are started
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    cases = QUICK if arguments.quick else SMALL
    if arguments.device.startswith("cuda") and not arguments.quick:
        cases = [*SMALL, *LARGE]
    rows: list[dict[str, Any]] = []
    # Before anything else runs here: on Linux a process starts with the peak resident size of the one that made it.
    device, ready = arguments.device, partial(prepare, arguments.device)
    peaks = [harness.peak_memory(run, case, device, device=device, prepare=ready) for case in cases]
    for case, used in zip(cases, peaks, strict=True):
        memory, flops = predicted(case, device)
        counted = measured_flops(case, device)
        rows.append(
            {
                "case": case.name,
                "predicted_bytes": memory,
                "measured_bytes": used,
                "memory_ratio": memory / used,
                "predicted_flops": flops,
                "measured_flops": counted,
                "flops_ratio": flops / counted,
            }
        )
        print(f"{case.name}: {memory / used:.3f} {flops / counted:.4f}", file=sys.stderr)
    worst = {f"worst_{name}": max(abs(row[f"{name}_ratio"] - 1) for row in rows) for name in ("memory", "flops")}
    table: list[list[object]] = [["case", "predicted", "measured", "ratio", "GFLOP predicted", "counted", "ratio"]]
    table += [
        [
            row["case"], harness.gib(row["predicted_bytes"]), harness.gib(row["measured_bytes"]),
            f"{row['memory_ratio']:.3f}", f"{row['predicted_flops'] / 1e9:,.1f}",
            f"{row['measured_flops'] / 1e9:,.1f}", f"{row['flops_ratio']:.4f}",
        ]
        for row in rows
    ]  # fmt: skip
    harness.show(arguments, "Cost model: predicted / measured", table, {"rows": rows, **worst})
    if not arguments.json:
        print("\nworst deviation: memory {worst_memory:.1%}, FLOPs {worst_flops:.2%}".format(**worst))
    return 0


if __name__ == "__main__":
    sys.exit(main())
