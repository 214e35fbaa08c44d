"""Train a small Llama from scratch on real TOFU text, so that the real recipe can be run without a download.

    python benchmarks/train_tofu_model.py --out runs/tofu-model

reads ../shared/data/tofu (or $FALCON_UNLEARN_DATA/tofu), trains on forget01 and the first --retain records of
retain99 for at most --minutes, measures ROUGE-L of greedy answers on both, and writes

    OUT/model/                 the checkpoint
    OUT/retain_trained.jsonl   the retain records it was trained on
    OUT/retain_scored.jsonl    every tenth of them, to score
    OUT/recipe.yaml            unlearning forget01 on all that, judged with --oracle's model

With --oracle the forget records are left out and the checkpoint goes to OUT/oracle.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
import yaml

from falcon_unlearn.artifacts import read_jsonl, write_jsonl
from falcon_unlearn.corpus.batching import PLAIN_TEMPLATE, Encoder
from falcon_unlearn.corpus.records import record_from_row
from falcon_unlearn.engine.pretraining import (
    LlamaShape,
    PretrainingConfig,
    build_llama,
    train_causal_lm,
    train_tokenizer,
)
from falcon_unlearn.evaluation.scoring import score_set

SHAPE = LlamaShape(layers=6, hidden=256, heads=4, mlp=768, context=512)
VOCABULARY = 4000
MAX_NEW_TOKENS = 160


def data_folder() -> Path:
    """The TOFU files of the shared data."""
    folder = Path(os.environ.get("FALCON_UNLEARN_DATA", "../shared/data")) / "tofu"
    if not folder.is_dir():
        sys.exit(f"error: no TOFU data in {folder}; set FALCON_UNLEARN_DATA")
    return folder


def main() -> None:
    """Train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/tofu-model"))
    parser.add_argument("--retain", type=int, default=800, help="retain records to train on")
    parser.add_argument("--minutes", type=float, default=20.0, help="time limit of the training")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--oracle", action="store_true", help="leave the forget records out")
    arguments = parser.parse_args()

    folder = data_folder()
    forget_rows = read_jsonl(folder / "forget01.jsonl")
    retain_rows = read_jsonl(folder / "retain99.jsonl")[: arguments.retain]
    forget = [record_from_row(row, "forget01") for row in forget_rows]
    retain = [record_from_row(row, "retain99") for row in retain_rows]
    texts = [PLAIN_TEMPLATE.format(question=r.prompt, answer=r.answer) for r in (*forget, *retain)]
    tokenizer = train_tokenizer(texts, VOCABULARY, SHAPE.context)
    encoder = Encoder(tokenizer)
    model = build_llama(SHAPE, tokenizer, arguments.seed)
    trained = retain if arguments.oracle else [*forget, *retain]
    encoded = [encoder.encode(record) for record in trained]
    parameters = sum(p.numel() for p in model.parameters())
    tokens = sum(len(item) for item in encoded)
    print(f"{len(trained)} records, {tokens} tokens, {parameters / 1e6:.1f} M parameters", file=sys.stderr)

    began = time.perf_counter()

    def on_epoch(epoch: int, loss: float) -> bool:
        minutes = (time.perf_counter() - began) / 60
        print(f"epoch {epoch + 1}: loss {loss:.3f}, {minutes:.1f} min", file=sys.stderr, flush=True)
        return bool(minutes > arguments.minutes)

    config = PretrainingConfig(epochs=arguments.epochs, batch_size=16, lr=arguments.lr, seed=arguments.seed)
    train_causal_lm(model, encoded, encoder.pad_id, config, on_epoch)
    seconds = time.perf_counter() - began

    scored = retain[::10]
    rouge = {}
    for name, records in (("forget01", forget), ("retain", scored)):
        scores = score_set(
            model, encoder, records, name, batch_size=32, max_new_tokens=MAX_NEW_TOKENS, device=torch.device("cpu")
        )
        rouge[name] = sum(score.rouge for score in scores) / len(scores)
    target = arguments.out / ("oracle" if arguments.oracle else "model")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    write_jsonl(arguments.out / "retain_trained.jsonl", retain_rows)
    write_jsonl(arguments.out / "retain_scored.jsonl", retain_rows[::10])
    recipe = {
        "model": "model",
        "corpus": {
            "forget": str((folder / "forget01.jsonl").resolve()),
            "retain": "retain_trained.jsonl",
            "self_samples": {"max_new_tokens": MAX_NEW_TOKENS},
        },
        "evaluation": {
            "forget": str((folder / "forget01_perturbed.jsonl").resolve()),
            "retain": "retain_scored.jsonl",
            "oracle": "oracle",
            "max_new_tokens": MAX_NEW_TOKENS,
        },
        "threads": 1,
        "output": "runs/tofu",
    }
    (arguments.out / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), "utf-8")
    print(json.dumps({"records": len(trained), "parameters": parameters, "seconds": round(seconds), "rouge": rouge}))


if __name__ == "__main__":
    main()
