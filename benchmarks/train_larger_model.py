"""Train a larger edition of the embedded benchmark: more people, 8 layers of width 256, model and oracle.

    python benchmarks/train_larger_model.py --out runs/larger
    falcon-unlearn compare --grid benchmarks/larger.yaml

The first command writes corpora, both checkpoints and OUT/recipe.yaml, as the demo does for its own size; how well the
two models know their world is in the `original` and `oracle` rows of the table.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import yaml

from falcon_unlearn.corpus.batching import PLAIN_TEMPLATE, Encoder
from falcon_unlearn.corpus.fictional import build_world
from falcon_unlearn.corpus.records import record_from_row
from falcon_unlearn.embedded import PARTS, demo_recipe, write_corpora
from falcon_unlearn.engine.pretraining import (
    LlamaShape,
    PretrainingConfig,
    build_llama,
    train_causal_lm,
    train_tokenizer,
)

SHAPE = LlamaShape(layers=8, hidden=256, heads=8, mlp=512, context=128)
VOCABULARY = 2000


def main() -> None:
    """Build the world, train, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/larger"))
    parser.add_argument("--people", type=int, default=120)
    parser.add_argument("--countries", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", choices=PARTS, help="train this one alone (default: both)")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    world = build_world(arguments.seed, arguments.people, arguments.countries)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_corpora(world, arguments.out)
    recipe = demo_recipe(Path("runs/larger-run"), arguments.out.resolve(), arguments.seed)
    (arguments.out / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), "utf-8")

    groups = (world.forget, world.retain, world.countries)
    rows = [[row for fact in group for row in fact.training_rows()] for group in groups]
    records = [record_from_row(row, "") for group in rows for row in group]
    texts = [PLAIN_TEMPLATE.format(question=record.prompt, answer=record.answer) for record in records]
    tokenizer = train_tokenizer(texts, VOCABULARY, SHAPE.context)
    encoder = Encoder(tokenizer)
    for part in (arguments.part,) if arguments.part else PARTS:
        model = build_llama(SHAPE, tokenizer, arguments.seed)
        trained = records[len(rows[0]) :] if part == "oracle" else records
        encoded = [encoder.encode(record) for record in trained]
        began = time.perf_counter()

        def on_epoch(epoch: int, loss: float, part: str = part, began: float = began) -> bool:
            minutes = (time.perf_counter() - began) / 60
            print(f"{part}: epoch {epoch + 1}, loss {loss:.3f}, {minutes:.1f} min", file=sys.stderr, flush=True)
            return False

        config = PretrainingConfig(epochs=arguments.epochs, lr=arguments.lr, seed=arguments.seed)
        train_causal_lm(model, encoded, encoder.pad_id, config, on_epoch)
        model.half().save_pretrained(arguments.out / part)
        tokenizer.save_pretrained(arguments.out / part)


if __name__ == "__main__":
    main()
