"""One training step on one and on several processes: the same batch, shared out.

Each process has one thread on the CPU (gloo), or a GPU of its own (NCCL). Efficiency is the time of one process divided
by that of N times N. Processes cannot be faster than the cores they have to themselves: on a machine with two cores,
two processes is all there is to measure, and whatever else runs there takes from it. *Work* is the CPU time of one
process divided by that of all N together, which does not depend on what else runs: what is below 1 is spent on
sharing out and on what every rank does for itself (the optimiser of replicas, which hold all of the trained tensors).

Rounds of one process and of several take turns; medians.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
import torch

from falcon_unlearn.artifacts import StepRecord
from falcon_unlearn.corpus.batching import Encoded
from falcon_unlearn.engine.parallel import Replicas, Shards
from falcon_unlearn.engine.trainer import TrainingConfig, TrainingData, train
from falcon_unlearn.methods import Falcon, FalconConfig, Setup, WholeModel, WholeSetup
from falcon_unlearn.methods.npo import Npo, NpoConfig
from falcon_unlearn.methods.sharded_model import ShardedWholeModel
from falcon_unlearn.model.decoder import SplitDecoder
from falcon_unlearn.ranks import Ranks, started_together

WARMUP = 2
CASES: Mapping[str, str] = {
    "layer": "FALCON, mlp of one layer: replicas",
    "replicas": "NPO, whole model: replicas",
    "shards": "NPO, whole model: FSDP2",
}


def _model(shape: Mapping[str, int]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["mlp"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=8,
        max_position_embeddings=shape["length"],
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def _steps(case: str, shape: Mapping[str, int], runs: int, device: torch.device, ranks: Ranks) -> list[float]:
    """Seconds of each step behind the warm-up; the process's CPU seconds of all of them come last."""
    model = _model(shape)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, shape["vocabulary"], (2, shape["batch"], shape["length"]), generator=generator).tolist()
    forget, retain = ([Encoded(tuple(row), shape["length"] // 2, 1) for row in side] for side in tokens)
    data = TrainingData({"": forget}, {"": retain}, 0, device)
    config = TrainingConfig(steps=WARMUP + runs, batch_size=shape["batch"], cache="never")
    layout: Replicas = Replicas(ranks)
    method: Any
    if case == "layer":
        decoder = SplitDecoder(model.to(device), (shape["layers"] // 2,), "mlp")
        masters = decoder.masters()
        method = Falcon(FalconConfig(), Setup(decoder, data.first_batches(shape["batch"]), "answer", 0))
    else:
        sharded = ShardedWholeModel(model, device) if case == "shards" and ranks.world > 1 else None
        whole = sharded or WholeModel(model.to(device))
        masters = whole.masters()
        method = Npo(NpoConfig(), WholeSetup(whole, data.first_batches(shape["batch"]), {}, "answer", 0, 0))
        whole.release()
        if sharded is not None:
            layout = Shards(ranks, sharded.sharded)
    seconds: list[float] = []
    busy = 0.0

    def on_step(record: StepRecord) -> None:
        nonlocal busy
        if record.step == WARMUP - 1:
            busy = time.process_time()
        if record.step >= WARMUP:
            seconds.append(record.seconds)

    train(method, masters, data, config, seed=0, hidden_size=shape["hidden"], layout=layout, on_step=on_step)
    return [*seconds, time.process_time() - busy]


def _rank(case: str, shape: Mapping[str, int], runs: int, device: str) -> None:
    """What each process does; rank 0 prints the seconds of a step and the CPU seconds of a step of all ranks."""
    torch.set_num_threads(1)
    with started_together({"case": case}, device) as ranks:
        *seconds, busy = _steps(case, shape, runs, torch.device(device), ranks)
        together = ranks.sum(torch.tensor(busy))
        if ranks.first:
            print(json.dumps([statistics.median(seconds), float(together) / runs]))


def _round(case: str, shape: Mapping[str, int], runs: int, device: str, world: int) -> tuple[float, float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(Path(__file__).resolve()), "--rank-of", json.dumps([case, shape, runs, device])]
    processes = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(world),
                "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(world)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{case}: a rank failed")
    seconds, busy = json.loads(outputs[0])
    return seconds, busy


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="processes to compare with one (default: 2)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank-of", help="for the script's own use")
    arguments = parser.parse_args()
    if arguments.rank_of:
        _rank(*json.loads(arguments.rank_of))
        return
    shape = {"hidden": 256, "mlp": 688, "layers": 8, "vocabulary": 8192, "batch": 16, "length": 64}
    if arguments.quick:
        shape |= {"layers": 4, "vocabulary": 2048, "length": 32}
    rounds, world = (1 if arguments.quick else arguments.rounds), arguments.ranks
    rows: list[tuple[object, ...]] = [
        ("what", "1 process", f"{world} processes", "speed-up", "efficiency", "CPU, 1", f"CPU, {world}", "work")
    ]
    results = []
    for case, what in CASES.items():
        measured: dict[int, list[tuple[float, float]]] = {1: [], world: []}
        for _ in range(rounds):
            for count, found in measured.items():
                found.append(_round(case, shape, arguments.runs, arguments.device, count))
        (one, busy_one), (many, busy_many) = (
            tuple(statistics.median(column) for column in zip(*found, strict=True)) for found in measured.values()
        )
        result = {
            "case": what, "seconds_1": one, f"seconds_{world}": many, "speedup": one / many,
            "efficiency": one / many / world, "cpu_1": busy_one, f"cpu_{world}": busy_many,
            "work": busy_one / busy_many,
        }  # fmt: skip
        results.append(result)
        rows.append((
            what, f"{1e3 * one:,.0f} ms", f"{1e3 * many:,.0f} ms", f"{one / many:.2f}x", f"{one / many / world:.2f}",
            f"{1e3 * busy_one:,.0f} ms", f"{1e3 * busy_many:,.0f} ms", f"{busy_one / busy_many:.2f}",
        ))  # fmt: skip
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    title = (
        f"One step of {shape['batch']} x {shape['length']} tokens a side, hidden {shape['hidden']}, {shape['layers']} "
        f"layers, vocabulary {shape['vocabulary']}; {rounds} rounds of {arguments.runs} steps; {cores} cores, load "
        f"average {load:.1f}"
    )
    harness.show(arguments, title, rows, {"rows": results, "shape": shape, "cores": cores, "load": load})


if __name__ == "__main__":
    main()
