"""The embedded benchmark's models: shipped for seed 0, trained from the seed for any other, kept in a cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from falcon_unlearn.artifacts import replacing, write_jsonl
from falcon_unlearn.corpus.fictional import Fact, World, build_world
from falcon_unlearn.errors import UserError

if TYPE_CHECKING:
    from falcon_unlearn.engine.pretraining import LlamaShape

SHIPPED_SEED = 0
VOCABULARY = 1500
EPOCHS = 20
RETAIN_SHARE_SCORED = 4
"""Every fourth retained fact is scored: enough for the means, and the demo stays short."""

Part = Literal["model", "oracle"]
PARTS: tuple[Part, ...] = ("model", "oracle")
_RECIPE_VERSION = 1
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def _training_rows(facts: Sequence[Fact]) -> list[dict[str, object]]:
    return [row for fact in facts for row in fact.training_rows()]


def write_corpora(world: World, folder: Path) -> None:
    """Write the corpora a demo recipe names: forget and retain to train on, three sets to score."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "forget.jsonl", _training_rows(world.forget))
    write_jsonl(folder / "retain.jsonl", _training_rows(world.retain))
    for name, facts in (
        ("score_forget", world.forget),
        ("score_retain", world.retain[::RETAIN_SHARE_SCORED]),
        ("score_countries", world.countries),
    ):
        write_jsonl(folder / f"{name}.jsonl", [fact.evaluation_row() for fact in facts])


def train_part(seed: int, part: Part, folder: Path, shape: LlamaShape | None = None) -> None:
    """Train the model, or the oracle that never sees the forget people, and save it in half precision.

    Of the demo's shape, where no other is given. One thread, so that both can be trained side by side and the result
    does not depend on the number of cores.
    """
    import torch

    from falcon_unlearn.corpus.batching import PLAIN_TEMPLATE, Encoder
    from falcon_unlearn.corpus.records import record_from_row
    from falcon_unlearn.engine.pretraining import (
        LlamaShape,
        PretrainingConfig,
        build_llama,
        train_causal_lm,
        train_tokenizer,
    )
    from falcon_unlearn.model.loading import quiet_transformers

    torch.set_num_threads(1)
    world, shape = build_world(seed), shape or LlamaShape()
    everything = [record_from_row(row, "") for row in _training_rows((*world.forget, *world.retain, *world.countries))]
    texts = [PLAIN_TEMPLATE.format(question=record.prompt, answer=record.answer) for record in everything]
    tokenizer = train_tokenizer(texts, VOCABULARY, shape.context)
    encoder = Encoder(tokenizer)
    unseen = len(_training_rows(world.forget)) if part == "oracle" else 0
    encoded = [encoder.encode(record) for record in everything[unseen:]]
    model = build_llama(shape, tokenizer, seed)

    def progress(epoch: int, loss: float) -> bool:
        print(f"{part}: epoch {epoch + 1} of {EPOCHS}, loss {loss:.3f}", file=sys.stderr, flush=True)
        return False

    train_causal_lm(model, encoded, encoder.pad_id, PretrainingConfig(epochs=EPOCHS, seed=seed), progress)
    with quiet_transformers():
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def cache_folder() -> Path:
    """Where trained demo models are kept (``XDG_CACHE_HOME`` or ``~/.cache``)."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "falcon-unlearn" / f"demo-v{_RECIPE_VERSION}"


def _train_both(seed: int, folder: Path) -> None:
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    staging.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        workers = [
            subprocess.Popen(  # noqa: S603 (our own module, our own arguments)
                [sys.executable, "-m", "falcon_unlearn.embedded", str(seed), part, str(staging / part)],
                env=environment,
                start_new_session=True,  # Ctrl-C is for us; we end them
            )
            for part in PARTS
        ]
        try:
            codes = [worker.wait() for worker in workers]
        except BaseException:
            for worker in workers:
                worker.terminate()
                worker.wait()
            raise
        if any(codes):
            raise UserError(f"demo: training the models of seed {seed} failed; see the lines above")
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_models(seed: int, folder: Path, *, retrain: bool, say: Callable[[str], None]) -> None:
    """Put ``model`` and ``oracle`` of a seed into ``folder``: from the package, the cache, or by training them.

    Args:
        seed: of the world and of both models.
        folder: gets two checkpoint folders.
        retrain: train even where a finished pair is at hand.
        say: called with one line before a training of minutes begins.

    Raises:
        UserError: the training failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if seed == SHIPPED_SEED and not retrain:
        with as_file(files("falcon_unlearn") / "data" / "demo") as shipped:
            _copy_pair(Path(shipped), folder)
        return
    cached = cache_folder() / f"seed-{seed}"
    if retrain or not all((cached / part / "model.safetensors").exists() for part in PARTS):
        say(f"training the model and the oracle of seed {seed} (about two minutes on two cores)")
        cached.parent.mkdir(parents=True, exist_ok=True)
        _train_both(seed, cached)
    _copy_pair(cached, folder)


def _copy_pair(pair: Path, folder: Path) -> None:
    for part in PARTS:
        (folder / part).mkdir(parents=True, exist_ok=True)
        for path in sorted((pair / part).iterdir()):
            with replacing(folder / part / path.name) as copy:  # another machine may read it already
                shutil.copyfile(path, copy)
        for name in TOKENIZER_FILES:  # shipped once, for both
            if not (folder / part / name).exists():
                shutil.copy2(pair / "model" / name, folder / part / name)


def demo_recipe(folder: Path, inputs: Path, seed: int) -> dict[str, object]:
    """The demo as an ordinary recipe over the files in ``inputs``."""
    return {
        "model": str(inputs / "model"),
        "corpus": {"forget": str(inputs / "forget.jsonl"), "retain": str(inputs / "retain.jsonl")},
        "selection": {"layers": "auto"},
        "method": {"name": "falcon", "preset": "default"},
        "evaluation": {
            "forget": str(inputs / "score_forget.jsonl"),
            "retain": str(inputs / "score_retain.jsonl"),
            "utility": {"countries": str(inputs / "score_countries.jsonl")},
            "oracle": str(inputs / "oracle"),
        },
        "attacks": {"relearn": {"points": 2}, "logit-lens": {"options": False}, "quantize": {"formats": ["int8"]}},
        "device": "cpu",
        "threads": 1,  # so small a model is slower on two, and its result should not depend on the machine's cores
        "output": str(folder),
        "seed": seed,
    }


if __name__ == "__main__":
    train_part(int(sys.argv[1]), "model" if sys.argv[2] == "model" else "oracle", Path(sys.argv[3]))
