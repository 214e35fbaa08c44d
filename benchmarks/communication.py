"""What several ranks send each other in a training step, from the cost model: computed, not measured.

Bytes are those that a rank sends (and receives) in ring algorithms: (W - 1) / W of a tensor to gather or to scatter it
over W ranks, twice that to sum it. Sizes are those of the model on the meta device; how often a method runs the model
is counted by running one step of it on a tiny model.

    replicas (split decoder)   every objective's gradient of the trained tensors is summed, in fp32
    shards (whole model)       every pass gathers the layers, a backward pass once more; every objective's gradient is
                               scattered in fp32; embedding and head are gathered once a trained forward pass

Seconds are bytes divided by the speed of the links, and FLOPs by that of the device, as given: nothing overlaps and
nothing waits. Memory of shards is weights in fp32, AdamW's moments and two gradients, and the reference in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import harness
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from falcon_unlearn.corpus.batching import Batch, Encoded, collate
from falcon_unlearn.methods import METHODS, WholeModel, WholeSetup, entry_of
from falcon_unlearn.model.activation_cache import record_key
from falcon_unlearn.model.cost import blueprint, head_flops, layers_flops
from falcon_unlearn.model.decoder import find_layers, scope_parameters
from falcon_unlearn.objectives.vocabulary import Head
from falcon_unlearn.presets import PRESETS

MODELS: Mapping[str, Mapping[str, Any]] = {
    "Llama-2-7B": {"vocab_size": 32_000},
    "Llama-2-13B": {
        "vocab_size": 32_000, "hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "Llama-3.1-70B": {
        "vocab_size": 128_256, "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8,
    },
}  # fmt: skip
WHOLE = ("falcon", "npo", "scrub")
SPLIT = {"1 layer, mlp": (1, "mlp"), "3 layers, down_proj": (3, "down_proj")}
COMPUTE, MASTER = torch.bfloat16.itemsize, torch.float32.itemsize
STEPS = 2
"""SCRUB's steps are of two kinds, in turns: figures are means over this many."""


@dataclass(frozen=True)
class Passes:
    """Of one step: passes of the trained model, of the reference, and objectives with a backward pass."""

    trained: float
    reference: float
    objectives: float


@dataclass(frozen=True)
class Size:
    """Parameters of a model: of its layers, and of all else (embedding, head, norm); and FLOPs of a forward pass."""

    layers: int
    rest: int
    flops: int


class _Counting(WholeModel):
    trained = 0
    reference = 0

    def _forward(self, batch: Batch, masters: Mapping[str, Tensor] | None) -> tuple[Tensor, Head]:
        self.trained += masters is not None
        self.reference += masters is None
        return super()._forward(batch, masters)


def passes_of(method: str) -> Passes:
    """Run steps of a method with its default preset on a tiny model, and count."""
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=1, pad_token_id=0
    )
    model = _Counting(LlamaForCausalLM(config).eval().requires_grad_(False))
    records = [Encoded((1, 2, 3, 4), 2, 1), Encoded((1, 3, 2, 5), 2, 1)]
    batch = collate(records, 0)
    alternatives = {record_key(record): (Encoded((1, 6, 7, 8), 2, 1),) for record in records}
    settings = METHODS[method].config(name=method, **PRESETS[method]["default"]["method"])
    setup = WholeSetup(model, {"": [batch]}, alternatives, "answer", 0, 0, 1, records)
    built = entry_of(settings).build(settings, setup)
    masters = model.masters()
    model.trained = model.reference = 0
    objectives = 0
    for step in range(STEPS):
        losses = (built.forget_loss(step, "", batch, masters), built.retain_loss(step, batch, masters))
        objectives += sum(loss is not None for loss in losses)
    return Passes(model.trained / STEPS, model.reference / STEPS, objectives / STEPS)


def size_of(shape: Mapping[str, Any], length: int) -> tuple[Size, dict[str, int]]:
    """Parameters and FLOPs a record of ``length`` tokens, and the parameters that each of ``SPLIT`` trains."""
    model = blueprint(LlamaConfig(**shape), torch.bfloat16)
    _, stack = find_layers(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    layers = sum(parameter.numel() for parameter in stack.parameters())
    of_layer = dict(stack[0].named_parameters())
    trained = {
        name: count * sum(of_layer[each].numel() for each in scope_parameters(stack[0], modules))
        for name, (count, modules) in SPLIT.items()
    }
    return Size(layers, total - layers, layers_flops(model)(length) + length * head_flops(model)), trained


def replicas_bytes(trained: int, ranks: int) -> float:
    """Sent by each rank in a step of two objectives."""
    return 2 * 2 * (ranks - 1) / ranks * trained * MASTER


def shards_bytes(size: Size, passes: Passes, ranks: int) -> float:
    """Sent by each rank in a step; the reference's embedding and head stay gathered after the first."""
    everything = size.layers + size.rest
    gathered = passes.trained * everything + passes.reference * size.layers + passes.trained * size.layers
    return (ranks - 1) / ranks * (gathered * COMPUTE + passes.objectives * everything * MASTER)


def shards_memory(size: Size, passes: Passes, ranks: int) -> float:
    """Bytes that lie on each rank between layers: its shards, and what is gathered throughout."""
    everything = size.layers + size.rest
    own = everything * (MASTER * 5 + (COMPUTE if passes.reference else 0)) / ranks
    return own + size.rest * COMPUTE * (2 if passes.reference else 1)


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--link", type=float, default=50.0, help="GB/s that a rank sends (default: 50, 400 Gb/s)")
    parser.add_argument("--tflops", type=float, default=400.0, help="TFLOP/s that a device reaches (default: 400)")
    parser.add_argument("--records", type=int, default=4, help="of each objective, for each rank (default: 4)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a record (default: 512)")
    arguments = parser.parse_args()
    rows: list[tuple[object, ...]] = [
        ("model", "layout", "method", "ranks", "sent a step", "seconds", "compute seconds", "memory of shards")
    ]
    results = []
    counted = {method: passes_of(method) for method in WHOLE}
    for name, shape in list(MODELS.items())[: 1 if arguments.quick else None]:
        size, trained = size_of(shape, arguments.length)
        for ranks in arguments.ranks:
            lines: list[tuple[str, str, float, float | None, float | None]] = [
                ("replicas", scope, replicas_bytes(count, ranks), None, None) for scope, count in trained.items()
            ]
            for method, passes in counted.items():
                flops = arguments.records * size.flops * (3 * passes.trained + passes.reference)
                memory = shards_memory(size, passes, ranks)
                lines.append(("shards", method, shards_bytes(size, passes, ranks), flops, memory))
            for layout, what, sent, flops_, memory_ in lines:
                seconds = sent / (arguments.link * 1e9)
                compute = None if flops_ is None else flops_ / (arguments.tflops * 1e12)
                results.append(
                    {"model": name, "layout": layout, "what": what, "ranks": ranks, "bytes": sent, "seconds": seconds,
                     "compute_seconds": compute, "memory": memory_}
                )  # fmt: skip
                rows.append((
                    name, layout, what, ranks, harness.gib(sent), f"{seconds:.3f}",
                    "" if compute is None else f"{compute:.3f}", "" if memory_ is None else harness.gib(memory_),
                ))  # fmt: skip
    title = (
        f"Computed, not measured: {arguments.records} records of {arguments.length} tokens per objective and rank, "
        f"links of {arguments.link:g} GB/s, devices of {arguments.tflops:g} TFLOP/s"
    )
    counts = {method: vars(each) for method, each in counted.items()}
    harness.show(arguments, title, rows, {"rows": results, "passes": counts})


if __name__ == "__main__":
    main()
