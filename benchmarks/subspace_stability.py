"""How stable FALCON's principal subspace is under bootstrap, on the demo's models, and what knowing it costs.

    python benchmarks/subspace_stability.py --seeds 0 1 2 3 4
    python benchmarks/subspace_stability.py --seeds --shapes 2048,4096 8192,4096

One line a seed and layer: preset ``layer``'s own subspace (90 % of the squared norm of all content tokens), angles in
radians. Then invented activations ``rows,hidden``, eight rows a record: without structure (normal, K = 16), and with a
spectrum that falls as k^-0.6; and processor seconds of the factorisation and of 20 resamples (5 where both sides are
above 1024). A model that is not in the cache is trained first (minutes).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from falcon_unlearn.corpus.batching import Encoder
from falcon_unlearn.corpus.fictional import build_world
from falcon_unlearn.corpus.records import record_from_row
from falcon_unlearn.embedded import write_models
from falcon_unlearn.engine.trainer import TrainingData
from falcon_unlearn.methods import Falcon, FalconConfig, Setup
from falcon_unlearn.model.decoder import SplitDecoder
from falcon_unlearn.model.loading import load_causal_lm, load_tokenizer, number_of_layers, resolve_model
from falcon_unlearn.objectives.offset_vectors import principal_subspace
from falcon_unlearn.objectives.subspace_stability import SubspaceStability, subspace_stability

RESAMPLES = 20
COLUMNS = f"{'K':>5}{'records':>9}{'largest':>9}{'median':>9}{'shared':>9}{'random':>9}"


def line(rank: int, found: SubspaceStability) -> str:
    """The entries under ``COLUMNS``."""
    angles = f"{found.largest_angle:>9.3f}{found.median_angle:>9.3f}"
    return f"{rank:>5}{found.records:>9}{angles}{found.shared:>9.3f}{found.shared_at_random:>9.3f}"


def demo(seed: int, folder: Path) -> None:
    """A line for each layer of a demo model."""
    write_models(seed, folder, retrain=False, say=print)
    source = resolve_model(str(folder / "model"), folder, device="cpu")
    model, encoder = load_causal_lm(source), Encoder(load_tokenizer(source))
    forget = [
        encoder.encode(record_from_row(row, "")) for fact in build_world(seed).forget for row in fact.training_rows()
    ]
    data = TrainingData({"forget": forget}, {}, encoder.pad_id, torch.device("cpu"))
    for layer in range(number_of_layers(model.config)):
        setup = Setup(SplitDecoder(model, (layer,), "mlp"), data.first_batches(32), "all", seed)
        found = Falcon(FalconConfig(offset_bootstrap=RESAMPLES), setup).diagnostics()["forget"]
        print(
            f"seed {seed}, layer {layer:<14}{line(found['rank'], SubspaceStability(**found['stability']))}", flush=True
        )


def invented(rows: int, hidden: int, power: float) -> None:
    """A line of activations whose directions fall as k^-power."""
    values = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(0))
    values *= torch.arange(1, hidden + 1) ** -power
    records = torch.arange(rows) // 8
    began = time.process_time()
    subspace = principal_subspace(values, rank=16 if power == 0 else None, variance=0.9)
    factorised = time.process_time()
    found = subspace_stability(values, records, subspace, RESAMPLES, torch.Generator().manual_seed(1))
    ended = time.process_time()
    took = f"{factorised - began:>9.2f}{ended - factorised:>9.2f}"
    print(f"{rows} x {hidden}, k^-{power:<10g} {line(len(subspace.directions), found)}{took}", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--shapes", nargs="*", default=["2048,128"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'':23}{COLUMNS}{'once s':>9}{'angles s':>9}")
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            demo(seed, Path(folder))
    for shape in arguments.shapes:
        for power in (0, 0.6):
            rows, hidden = (int(number) for number in shape.split(","))
            invented(rows, hidden, power)


if __name__ == "__main__":
    main()
