"""One FALCON step: ours against the loop of two whole models, as the published code does it.

    python benchmarks/step.py                                      # CPU: a small language model's shapes
    python benchmarks/step.py --shapes eighth                      # CPU: Zephyr at an eighth of width and vocabulary
    python benchmarks/step.py --device cuda --shapes zephyr-7b     # batch 4 x 512, layers 5-7, bf16
    python benchmarks/step.py --device cuda --shapes llama-70b-24  # the first 24 layers; no room for the reference

The reference holds two causal LMs, runs both through all layers and the head, and lets gradients of everything below
the target pile up. Both ways compute the same losses on the same batch and update the same matrices with AdamW.
``memory_ratio`` is ours / reference; the totals are the worst of the rows. The head counts for the reference alone,
so the speed-up grows with the vocabulary: hence the two shapes on the CPU.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Timing, flops_per_second, gib, interleaved, options, peak_memory, show, synchronize, timed
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from falcon_unlearn.corpus.batching import Encoded
from falcon_unlearn.engine.gradient_conflict import GradientConfig
from falcon_unlearn.engine.optimizers import OptimizerConfig
from falcon_unlearn.engine.trainer import TrainingConfig, TrainingData, train
from falcon_unlearn.methods import Falcon, FalconConfig, Setup
from falcon_unlearn.model.activation_cache import ActivationCache
from falcon_unlearn.model.activation_store import ActivationStore
from falcon_unlearn.model.decoder import SplitDecoder
from falcon_unlearn.objectives.representation import cosine_retention, info_nce

H100_BF16 = 989e12
RATE = 1e-4


@dataclass(frozen=True)
class Shape:
    """A model, a batch and which layers are trained."""

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    vocabulary: int
    layers: int
    target: int
    batch: int
    length: int
    modules: str
    dtype: str = "float32"
    with_reference: bool = True

    @property
    def trained(self) -> tuple[int, ...]:
        """Three layers, the target last."""
        return tuple(range(self.target - 2, self.target + 1))

    def config(self, layers: int) -> LlamaConfig:
        """With so many layers."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
        )


# SmolLM-135M's width, MLP and vocabulary (it has 30 layers).
SMALL = Shape(576, 1536, 9, 3, 49152, 24, 6, 4, 512, "down_proj")
QUICK = Shape(192, 512, 3, 1, 16384, 24, 6, 4, 256, "down_proj")
EIGHTH = Shape(512, 1792, 8, 2, 4000, 24, 6, 4, 512, "down_proj")
ZEPHYR = Shape(4096, 14336, 32, 8, 32000, 32, 7, 4, 512, "down_proj", "bfloat16")


def both_depths(shape: Shape, modules: str = "down_proj") -> tuple[Shape, ...]:
    """24 and 32 layers, the target at a quarter."""
    return tuple(dataclasses.replace(shape, layers=n, target=n // 4, modules=modules) for n in (24, 32))


SHAPES = {
    "small": both_depths(SMALL),
    "small-mlp": both_depths(SMALL, "mlp"),
    "eighth": both_depths(EIGHTH),
    "quick": (QUICK,),
    "zephyr-7b": (ZEPHYR,),
    "zephyr-7b-mlp": (dataclasses.replace(ZEPHYR, modules="mlp"),),
    "llama-70b-24": (Shape(8192, 28672, 64, 8, 128256, 24, 23, 4, 512, "down_proj", "bfloat16", False),),
}


def build(shape: Shape, device: str, *, whole: bool) -> Any:
    """Random weights, made where they are used."""
    torch.manual_seed(0)
    with torch.device(device):
        made = LlamaForCausalLM if whole else LlamaModel
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, shape.dtype))
        try:
            model = made(shape.config(shape.layers if whole else shape.target + 1))
        finally:
            torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def records(shape: Shape, seed: int) -> list[Encoded]:
    """One batch of full length: no padding flatters anybody."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, shape.vocabulary, (shape.batch, shape.length), generator=generator).tolist()
    return [Encoded(tuple(row), 0) for row in ids]


def data_of(shape: Shape, device: str) -> TrainingData:
    """One forget and one retain batch, over and over."""
    return TrainingData({"forget": records(shape, 1)}, {"retain": records(shape, 2)}, 0, torch.device(device))


def direction(shape: Shape, device: str) -> Tensor:
    """A fixed unit vector to pull forget activations to."""
    return torch.nn.functional.normalize(
        torch.randn(shape.hidden, generator=torch.Generator().manual_seed(3)), dim=0
    ).to(device)


class Reference:
    """Two whole models, every step through all of both."""

    def __init__(self, shape: Shape, device: str, model: Any = None) -> None:
        self.updated = model if model is not None else build(shape, device, whole=True)
        self.frozen = copy.deepcopy(self.updated)
        self.updated.requires_grad_(True)
        layers = self.updated.model.layers
        names = ("gate_proj", "up_proj", "down_proj") if shape.modules == "mlp" else (shape.modules,)
        self.parameters = {
            f"model.layers.{i}.mlp.{name}.weight": getattr(layers[i].mlp, name).weight
            for i in shape.trained
            for name in names
        }
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=RATE, weight_decay=0.0)
        self.target = shape.target
        self.batches = data_of(shape, device).at(0, shape.batch, 0)[1:]
        self.positive = direction(shape, device)

    def _activations(self, model: Any, batch: Any) -> Tensor:
        kept: list[Tensor] = []

        def keep(module: Any, args: Any, output: Any) -> None:
            kept.append(output[0] if isinstance(output, tuple) else output)

        handle: Any = model.model.layers[self.target].register_forward_hook(keep)
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        handle.remove()
        return kept[0][batch.content_mask]

    def gradients(self) -> list[dict[str, Tensor]]:
        """Forget and retain gradients of the trained matrices."""
        result = []
        for side, batch in enumerate(self.batches):
            updated = self._activations(self.updated, batch)
            with torch.no_grad():
                frozen = self._activations(self.frozen, batch)
            loss = cosine_retention(updated, frozen) if side else info_nce(updated, self.positive, frozen[:, None], 0.7)
            for p in self.parameters.values():  # only these; the others' gradients pile up
                p.grad = None
            torch.autograd.backward(loss)
            result.append({name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None})
        return result

    def step(self) -> None:
        """Gradients, conflict resolution tensor by tensor, update."""
        forget, retain = self.gradients()
        for name, p in self.parameters.items():
            f, r = forget[name], retain[name]
            if torch.nn.functional.cosine_similarity(f.flatten(), r.flatten(), dim=0) < 0:
                p.grad = 0.8 * (f - (f * r).sum() / (r * r).sum() * r) + 1.2 * r
            else:
                p.grad = 0.1 * f + 1.9 * r
        self.optimizer.step()


class Ours:
    """The product's own parts and loop."""

    def __init__(self, shape: Shape, device: str, folder: str, *, cached: bool, model: Any = None) -> None:
        self.shape, self.data = shape, data_of(shape, device)
        own = model is None
        self.decoder = SplitDecoder(
            model if model is not None else build(shape, device, whole=False), shape.trained, shape.modules
        )
        self.masters = self.decoder.masters()
        if cached:
            cache = ActivationCache(ActivationStore(Path(folder) / "activations"))
            for side in (self.data.forget["forget"], self.data.retain["retain"]):
                self.decoder.keep(cache, side, 0, shape.batch)
            if own:
                self.decoder.release()
        setup = Setup(self.decoder, self.data.first_batches(shape.batch), "all", 0)
        self.method = Falcon(FalconConfig(offset="random", retain_weight=1.0), setup)
        self.method._fixed = {"forget": direction(shape, device)}

    def gradients(self) -> list[dict[str, Tensor]]:
        """Forget and retain gradients of the trained matrices."""
        domain, forget, retain = self.data.at(0, self.shape.batch, 0)
        losses = (
            self.method.forget_loss(0, domain, forget, self.masters),
            self.method.retain_loss(0, retain, self.masters),
        )
        return [
            dict(zip(self.masters, torch.autograd.grad(loss, list(self.masters.values())), strict=True))
            for loss in losses
        ]

    def steps(self, count: int) -> list[float]:
        """Seconds of each step of a run."""
        config = TrainingConfig(
            steps=count,
            batch_size=self.shape.batch,
            optimizer=OptimizerConfig(lr=RATE),
            gradients=GradientConfig(combination="falcon"),
        )
        seconds: list[float] = []
        train(
            self.method,
            self.masters,
            self.data,
            config,
            seed=0,
            hidden_size=self.shape.hidden,
            on_step=lambda record: seconds.append(record.seconds),
        )
        return seconds


def reference_steps(shape: Shape, device: str) -> None:
    """For the memory of the reference: two steps, so that optimiser states are there."""
    reference = Reference(shape, device)
    reference.step()
    reference.step()


def our_steps(shape: Shape, device: str, cached: bool) -> None:
    """For the memory of ours: two steps."""
    with tempfile.TemporaryDirectory() as folder:
        Ours(shape, device, folder, cached=cached).steps(2)


def gradients_equal(shape: Shape, device: str, folder: str) -> dict[str, bool | float]:
    """On the same weights: at the original ones and after a step, where the retain loss has something to say."""
    model = build(shape, device, whole=True)
    ours = {cached: Ours(shape, device, folder, cached=cached, model=model) for cached in (False, True)}
    reference = Reference(shape, device, copy.deepcopy(model))
    equal, worst = {False: True, True: True}, 0.0
    for _ in range(2):
        expected = reference.gradients()
        for cached, way in ours.items():
            got = way.gradients()
            for g, e in zip(got, expected, strict=True):
                equal[cached] &= g.keys() == e.keys() and all(torch.equal(g[name], e[name].to(g[name])) for name in e)
                worst = max(worst, *((g[n] - e[n]).abs().max().item() / max(e[n].abs().max().item(), 1e-30) for n in e))
        reference.step()
        with torch.no_grad():
            for way in ours.values():
                for name, value in way.masters.items():
                    value.copy_(reference.parameters[name])
    return {
        "gradients_equal": equal[False],
        "gradients_equal_cached": equal[True],
        "largest_relative_difference": worst,
    }


def executed_flops(ours: Ours) -> int:
    """Of one step."""
    with FlopCounterMode(display=False) as counter:
        ours.gradients()
    return int(counter.get_total_flops())


def measure(shape: Shape, device: str, runs: int, folder: str, gemm: float) -> dict[str, Any]:
    """One row."""
    row: dict[str, Any] = {"layers": shape.layers, "target": shape.target, "modules": shape.modules}
    ways: dict[str, Ours] = {
        "ours": Ours(shape, device, folder, cached=False),
        "cached": Ours(shape, device, folder, cached=True),
    }
    for name, way in ways.items():
        row[f"flops_{name}"] = executed_flops(way)
    timing: Mapping[str, Timing]
    if shape.with_reference:
        reference = Reference(shape, device)
        timing = interleaved(
            {"reference": reference.step, **{name: partial(way.steps, 1) for name, way in ways.items()}},
            device=device,
            runs=runs,
        )
        del reference
    else:
        timing = {n: timed(partial(way.steps, 1), device=device, runs=runs) for n, way in ways.items()}
    del ways
    synchronize(device)
    row |= {f"seconds_{name}": value.median for name, value in timing.items()}
    row |= {f"range_{name}": [value.fastest, value.slowest] for name, value in timing.items()}
    row["limit_seconds"], row["limit_seconds_cached"] = row["flops_ours"] / gemm, row["flops_cached"] / gemm
    row["memory_ours"] = peak_memory(our_steps, shape, device, False, device=device)
    row["memory_cached"] = peak_memory(our_steps, shape, device, True, device=device)
    if device.startswith("cuda"):
        row["share_of_h100_bf16_peak"] = row["flops_ours"] / row["seconds_ours"] / H100_BF16
        row["share_of_h100_bf16_peak_cached"] = row["flops_cached"] / row["seconds_cached"] / H100_BF16
    if shape.with_reference:
        row["memory_reference"] = peak_memory(reference_steps, shape, device, device=device)
        row["speedup"] = row["seconds_reference"] / row["seconds_ours"]
        row["speedup_cached"] = row["seconds_reference"] / row["seconds_cached"]
        row["memory_ratio"] = row["memory_ours"] / row["memory_reference"]
        row["memory_ratio_cached"] = row["memory_cached"] / row["memory_reference"]
        row |= gradients_equal(shape, device, folder)
    return row


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--shapes", choices=[name for name in SHAPES if name != "quick"], default="small")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = arguments.device
    shapes = SHAPES["quick" if arguments.quick else arguments.shapes]
    gemm = flops_per_second(device, getattr(torch, shapes[0].dtype))
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(shape, device, arguments.runs, folder, gemm) for shape in shapes]
    result: dict[str, Any] = {"gemm_flops_per_second": gemm, "rows": rows}
    if all("speedup" in row for row in rows):
        result |= {
            "speedup": min(row["speedup"] for row in rows),
            "speedup_cached": min(row["speedup_cached"] for row in rows),
            "memory_ratio": max(row["memory_ratio"] for row in rows),
            "memory_ratio_cached": max(row["memory_ratio_cached"] for row in rows),
            "gradients_equal": all(row["gradients_equal"] for row in rows),
        }
    s = shapes[0]
    head = ("layers", "way", "step", "speed-up", "TFLOP", "limit", "peak memory", "of reference", "gradients")
    lines: list[tuple[object, ...]] = [head]
    for row in rows:
        for name in ("reference", "ours", "cached"):
            if f"seconds_{name}" not in row:
                continue
            suffix = "_cached" if name == "cached" else ""
            own = name != "reference"
            equal = {True: "equal", False: f"differ by {row.get('largest_relative_difference', 0):.0e}"}
            lines.append((
                row["layers"] if name == ("reference" if "speedup" in row else "ours") else "",
                {"ours": "ours", "cached": "ours, cached activations"}.get(name, name),
                f"{1e3 * row[f'seconds_{name}']:,.0f} ms",
                f"{row['speedup' + suffix]:.1f}x" if own and "speedup" in row else "",
                f"{row[f'flops_{name}'] / 1e12:.3g}" if own else "",
                f"{1e3 * row['limit_seconds' + suffix]:,.0f} ms" if own else "",
                gib(row[f"memory_{name}"]),
                f"{row['memory_ratio' + suffix]:.2f}" if own and "speedup" in row else "",
                equal[row["gradients_equal" + suffix]] if own and "speedup" in row else "",
            ))  # fmt: skip
    title = (
        f"One FALCON step: hidden {s.hidden}, MLP {s.mlp}, vocabulary {s.vocabulary}, batch {s.batch} x {s.length}, "
        f"{s.modules} of three layers, {s.dtype}; "
        f"median of {arguments.runs}"
    )
    show(arguments, title, lines, result)


if __name__ == "__main__":
    main()
