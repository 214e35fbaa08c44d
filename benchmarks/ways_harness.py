"""Other ways to train, beside FALCON's default preset: one world at a time, without run folders.

    python benchmarks/ways_harness.py                    # the default of then alone: a row of benchmarks/ideas.yaml

A way is a function that gets an opened world and returns the changed tensors. Everything else is as
``falcon-unlearn compare --grid benchmarks/ideas.yaml`` does it for the row ``then``: data, self-samples, stand-ins,
batches, the dtype on the disk, scoring, relearning. That attack is also made with other known facts, as one fact of 43
is .023: the recipe's own draw of them first, then others by further seeds. The scores of the original model and of the
oracle, and the self-samples, are kept in --out; trained tensors are not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from falcon_unlearn import embedded
from falcon_unlearn.artifacts import SampleScore, StepRecord
from falcon_unlearn.attacks.base import UNLEARNED, AttackData, run_attacks
from falcon_unlearn.attacks.relearning import RelearnConfig
from falcon_unlearn.compare import score_of
from falcon_unlearn.console import Console
from falcon_unlearn.corpus.batching import Encoded, Encoder
from falcon_unlearn.corpus.fictional import build_world
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.corpus.sources import Corpus, load_corpus
from falcon_unlearn.engine.trainer import TrainingData, train
from falcon_unlearn.evaluation.metrics import FORGET_SET, compute_metrics
from falcon_unlearn.methods import WholeFalcon
from falcon_unlearn.methods.base import WholeSetup
from falcon_unlearn.methods.whole_model import WholeModel
from falcon_unlearn.model.decoder import replaced
from falcon_unlearn.model.loading import ModelSource, load_causal_lm, load_config, load_tokenizer, resolve_model
from falcon_unlearn.recipe import Recipe, apply_overrides, recipe_from
from falcon_unlearn.stages import (
    EncodedCorpus,
    alternatives_of,
    encode_corpus,
    evaluation_sets,
    score_model,
    with_self_samples,
)

QUIET = Console(quiet=True)
ATTACK = RelearnConfig(epochs=10, points=1)
AS_IT_WAS = (
    "method.stand_in.representation_weight=1",
    "method.stand_in.floor_weight=0",
    "method.stand_in.least_level=null",
    "method.stand_in.whole_words=false",
    "method.stand_in.retain_weight=1",
    "method.stand_in.retain_representation_weight=3",
    "training.interpolation=0",
)
"""The default preset when these ways were tried: contrast, distillation and hinge."""
ANOTHER_DRAW = 100
"""Known facts are drawn by the recipe's seed, and by it plus multiples of this."""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class World:
    """A seed of the embedded benchmark, ready to be unlearned.

    Attributes:
        recipe: the default preset, or what was laid on it.
        source: the original model.
        encoder: its tokenizer and template.
        corpus: forget and retain records.
        encoded: the same in tokens, with the self-samples.
        alternatives: the stand-ins.
        sets: records to score.
    """

    recipe: Recipe
    source: ModelSource
    encoder: Encoder
    corpus: Corpus
    encoded: EncodedCorpus
    alternatives: Mapping[str, tuple[Encoded, ...]]
    sets: Mapping[str, list[Record]]

    @property
    def seed(self) -> int:
        """Of the world, the models and the run."""
        return self.recipe.seed

    @property
    def folder(self) -> Path:
        """Where its models, corpora and self-samples are."""
        return Path(self.recipe.model).parent

    @property
    def data(self) -> TrainingData:
        """The streams of batches."""
        encoded = self.encoded
        return TrainingData(encoded.forget, encoded.retain, encoded.pad_id, self.source.device)

    def method(self, build: Callable[..., WholeFalcon] = WholeFalcon) -> WholeFalcon:
        """FALCON, or a subclass of it, set up on a fresh copy of the original model (``method.setup.model``)."""
        data, training = self.data, self.recipe.training
        setup = WholeSetup(
            WholeModel(load_causal_lm(self.source)),
            data.first_batches(min(training.micro_batch_size or training.batch_size, training.batch_size)),
            self.alternatives,
            self.encoded.loss_mask,
            self.encoded.pad_id,
            self.seed,
            len(self.encoded.retain),
            [item for items in self.encoded.retain.values() for item in items],
        )
        return build(self.recipe.method, setup)

    def train(
        self,
        method: WholeFalcon,
        masters: Tensors,
        *,
        steps: int | None = None,
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> None:
        """Train ``masters`` in place, as the recipe says but for the number of steps."""
        training = self.recipe.training
        config = training if steps is None else training.model_copy(update={"steps": steps})
        width = method.setup.model.hidden_size
        train(method, masters, self.data, config, seed=self.seed, hidden_size=width, on_step=on_step)


Way = Callable[[World], Tensors]


def default(world: World) -> Tensors:
    """The default preset."""
    method = world.method()
    masters = method.setup.model.masters()
    world.train(method, masters)
    return masters


def open_world(seed: int, out: Path, overrides: Sequence[str] = ()) -> World:
    """Everything a way needs.

    Args:
        seed: of the world and its models.
        out: for corpora and self-samples.
        overrides: ``key=value`` laid on the demo's recipe with the default preset.
    """
    inputs = out / f"seed-{seed}"
    if not (inputs / "oracle" / "model.safetensors").exists():
        embedded.write_corpora(build_world(seed), inputs)
        embedded.write_models(seed, inputs, retrain=False, say=lambda line: print(line, file=sys.stderr))
    raw = embedded.demo_recipe(out / "none", inputs, seed)
    recipe = recipe_from(apply_overrides({**raw, "attacks": {}}, [*AS_IT_WAS, *overrides]))
    source = resolve_model(recipe.model, Path.cwd(), device="cpu", dtype=recipe.dtype)
    encoder = Encoder(load_tokenizer(source))
    corpus = load_corpus(recipe.corpus, Path.cwd())
    encoded = encode_corpus(recipe, corpus, encoder, load_config(source))
    alternatives = alternatives_of(recipe, encoded, encoder)
    written = inputs / f"self-samples-{recipe.corpus.self_samples.count}.jsonl"
    encoded = with_self_samples(recipe, lambda: load_causal_lm(source), encoded, encoder, written)
    return World(recipe, source, encoder, corpus, encoded, alternatives, evaluation_sets(recipe, corpus, Path.cwd()))


@dataclass(frozen=True)
class Result:
    """A way on one seed; relearned accuracy and probability by draw of the known facts, the recipe's own first."""

    way: str
    seed: int
    score: float
    kept: float
    forget_quality: float
    forget_probability: float
    relearned: tuple[float, ...]
    relearned_probability: tuple[float, ...]
    training_seconds: float


def _scores(world: World, part: str) -> dict[str, list[SampleScore]]:
    """Scores of the original model or of the oracle, kept beside them."""
    path = world.folder / f"scores-{part}.json"
    if not path.exists():
        source = resolve_model(str(world.folder / part), Path.cwd(), device="cpu")
        found = score_model(load_causal_lm(source), world.encoder, world.sets, world.recipe, QUIET)
        rows = {name: [asdict(score) for score in scores] for name, scores in found.items()}
        path.write_text(json.dumps(rows), encoding="utf-8")
    raw = json.loads(path.read_text(encoding="utf-8"))
    return {name: [SampleScore(**row) for row in rows] for name, rows in raw.items()}


def measure(name: str, way: Way, world: World, draws: int = 3, known: int = 5) -> Result:
    """Unlearn, score, and attack by relearning with ``draws`` sets of ``known`` facts."""
    began = time.process_time()
    changed = way(world)
    seconds = time.process_time() - began
    return judged(name, changed, world, draws, seconds, known)


def judged(name: str, changed: Tensors, world: World, draws: int, seconds: float = 0.0, known: int = 5) -> Result:
    """Score and attack a model of which these tensors were changed."""
    model = load_causal_lm(world.source)
    on_disk = {key: value.detach().half() for key, value in changed.items()}  # the dtype of the demo's checkpoints
    oracle = _scores(world, "oracle")[FORGET_SET]
    before = compute_metrics(_scores(world, "model"), oracle)
    forget, retain = (
        tuple(record for records in side.values() for record in records)
        for side in (world.corpus.forget, world.corpus.retain)
    )
    data = AttackData(forget, tuple(world.sets[FORGET_SET]), retain, ())
    points = []
    with replaced(model, on_disk):
        scores = score_model(model, world.encoder, world.sets, world.recipe, QUIET)
        for draw in range(draws):
            (run,) = run_attacks(
                {"relearn": ATTACK.model_copy(update={"known": known})},
                model,
                UNLEARNED,
                world.encoder,
                data,
                batch_size=world.recipe.evaluation.batch_size,
                max_new_tokens=world.recipe.evaluation.max_new_tokens,
                seed=world.seed + ANOTHER_DRAW * draw,
                before=scores[FORGET_SET],
            )
            assert run.outcome is not None, run
            points.append(run.outcome.points[-1])
    metrics = compute_metrics(scores, oracle)
    score, kept, _ = score_of(metrics, before)
    assert metrics.forget_quality is not None
    return Result(
        name,
        world.seed,
        score,
        kept,
        metrics.forget_quality,
        metrics.forget_probability,
        tuple(point.accuracy for point in points),
        tuple(point.probability for point in points),
        seconds,
    )


def oracle_of(world: World, draws: int, known: int = 5) -> Result:
    """The oracle, judged in the same way."""
    assert world.recipe.evaluation.oracle is not None
    source = resolve_model(world.recipe.evaluation.oracle, Path.cwd(), device="cpu")
    return judged("oracle", dict(load_causal_lm(source).named_parameters()), world, draws, known=known)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.3f}"


def table(results: Sequence[Result], baseline: str = "default") -> str:
    """One line a way, over its seeds.

    relearned: with the recipe's own known facts, as elsewhere; all draws: mean over draws first, then mean and standard
    deviation over seeds; prob: the same of the answers' probability; time: training as a multiple of the default's.
    """
    ways = list(dict.fromkeys(result.way for result in results))
    seconds = {way: statistics.mean(r.training_seconds for r in results if r.way == way) for way in ways}
    lines = [
        "| | S | forget quality | kept | forget prob | relearned | relearned, all draws | its prob | time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for way in ways:
        rows = sorted((r for r in results if r.way == way), key=lambda r: r.seed)
        cells = [
            way,
            spread([r.score for r in rows]),
            " ".join(f"{r.forget_quality:.2g}" for r in rows),
            spread([r.kept for r in rows]),
            spread([r.forget_probability for r in rows]),
            spread([r.relearned[0] for r in rows]),
            spread([statistics.mean(r.relearned) for r in rows]),
            spread([statistics.mean(r.relearned_probability) for r in rows]),
            f"{seconds[way] / seconds[baseline]:.1f}" if seconds.get(baseline) else f"{seconds[way]:.0f} s",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """The default preset and the oracle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ways"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 6])
    parser.add_argument("--draws", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for seed in arguments.seeds:
        world = open_world(seed, arguments.out)
        results += [measure("default", default, world, arguments.draws), oracle_of(world, arguments.draws)]
        print(results[-2:], file=sys.stderr)
    print(table(results))


if __name__ == "__main__":
    main()
