"""Other targets for FALCON's forget side, beside the default preset, on the seeds that settings are chosen on.

    python benchmarks/ways_targets.py                            # everything: hours on one core
    python benchmarks/ways_targets.py --ways default "mean of four"   # some rows

Results are kept in --out, one file a way and seed; what is there already is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from ways_harness import Result, Tensors, Way, World, default, measure, open_world, oracle_of, table

from falcon_unlearn.corpus.alternatives import dont_know
from falcon_unlearn.corpus.batching import Batch, Encoded, collate
from falcon_unlearn.corpus.stand_ins import renamed
from falcon_unlearn.engine.trainer import train
from falcon_unlearn.methods import Falcon, FalconConfig
from falcon_unlearn.methods.base import Setup, WholeSetup, counted_activations, generator_for, masked_activations
from falcon_unlearn.methods.falcon_whole import WholeFalcon, _Pairs, aligned, passed_together
from falcon_unlearn.methods.whole_model import Pass
from falcon_unlearn.model.activation_cache import ActivationCache, record_key
from falcon_unlearn.model.activation_store import ActivationStore
from falcon_unlearn.model.decoder import SplitDecoder, find_layers, first_tensor
from falcon_unlearn.model.loading import load_causal_lm
from falcon_unlearn.objectives.offset_vectors import paper_vector
from falcon_unlearn.objectives.representation import contrast, info_nce

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Alternatives = Mapping[str, tuple[Encoded, ...]]
_EDITED = "mlp.down_proj"
_CONSONANTS = "bcdfghjklmnprstvwz"


class SeveralStandIns(WholeFalcon):
    """Positives, predictions and hinge of all of a record's stand-ins together; ``level`` joins the hinge's."""

    def __init__(self, config: FalconConfig, setup: WholeSetup, level: Literal["mean", "max"]) -> None:
        super().__init__(config, setup)
        self._joined = level

    def forget_loss(self, step: int, domain: str, batch: Batch, masters: Tensors) -> Tensor:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        config, model = self.config, self.setup.model
        now, before = model.run(batch, self.layers, masters), model.run(batch, self.layers, None)
        others = [self.setup.alternative(step + i, batch) for i in range(config.count)]
        rows, columns, theirs, weights = _aligned_with_all(batch, others)
        passes = [model.run(other, self.layers, None) for other in others]
        positive = torch.stack(
            [each.layers[:, rows, places] for each, places in zip(passes, theirs, strict=True)]
        ).mean(0)
        of_token = contrast(now.layers[:, rows, columns], positive, before.layers[:, rows, columns], self._temperature)
        loss = config.representation_weight * (of_token.mean(0) @ weights)
        ours = now.head.logits(now.final[rows, columns - 1]).log_softmax(-1)
        shift = 0 if self._shift is None else self._shift
        reference = torch.stack(
            [
                (each.head.logits(each.final[rows, places - 1]) + shift).log_softmax(-1)
                for each, places in zip(passes, theirs, strict=True)
            ]
        )
        mean = reference.logsumexp(0) - math.log(len(others))
        loss = loss + config.distillation_weight * ((mean.exp() * (mean - ours)).sum(-1) @ weights)
        targets = batch.input_ids[rows, columns][:, None]
        level = (mean if self._joined == "mean" else reference.amax(0)).gather(1, targets)
        excess = torch.relu(ours.gather(1, targets) - level)[:, 0]
        return self.common.forget_weight * (loss + config.hinge_weight * (excess @ weights))


def _aligned_with_all(batch: Batch, others: Sequence[Batch]) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """:func:`aligned` of the places that every stand-in has: rows, columns, each stand-in's columns, weights."""
    lengths = torch.tensor([len(record) for record in batch.records])
    found = [aligned(batch, other) for other in others]
    common = torch.ones(batch.input_ids.shape, dtype=torch.bool)
    for pairs in found:
        present = torch.zeros_like(common)
        present[pairs.rows, pairs.columns] = True
        common &= present
    rows, columns = common.nonzero(as_tuple=True)
    from_end = lengths[rows] - columns
    theirs = [torch.tensor([len(record) for record in other.records])[rows] - from_end for other in others]
    weights = 1 / (common.sum(1)[rows] * len(batch))
    return rows, columns, theirs, weights


class OtherPositives(WholeFalcon):
    """The contrast's positives are the original model's on other records; distillation and hinge keep the stand-ins."""

    def __init__(self, config: FalconConfig, setup: WholeSetup, others: Alternatives) -> None:
        def with_weights(**weights: float) -> FalconConfig:
            return config.model_copy(update={"stand_in": config.stand_in.model_copy(update=weights)})

        super().__init__(with_weights(representation_weight=0.0), setup)
        contrast_only = with_weights(distillation_weight=0.0, hinge_weight=0.0)
        self._contrast_only = WholeFalcon(contrast_only, replace(setup, alternatives=others))

    def forget_loss(self, step: int, domain: str, batch: Batch, masters: Tensors) -> Tensor:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        contrasted = self._contrast_only.forget_loss(step, domain, batch, masters)
        return super().forget_loss(step, domain, batch, masters) + contrasted


class RetainNegatives(WholeFalcon):
    """Further negatives of the contrast: the original model's activations of ``count`` retain answer tokens."""

    def __init__(self, config: FalconConfig, setup: WholeSetup, count: int) -> None:
        super().__init__(config, setup)
        rng = random.Random(f"retain negatives {setup.seed}")
        batch = collate(rng.sample(list(setup.retain), min(count, 64)), setup.pad_id)
        with torch.no_grad():
            activations = setup.model.run(batch, self.layers, None).layers[:, batch.answer_mask]
        chosen = rng.sample(range(activations.shape[1]), count)
        self._bank = F.normalize(activations[:, chosen].float(), dim=-1)

    def _contrast(self, now: Pass, theirs: Pass, before: Pass, pairs: _Pairs) -> Tensor:
        anchor, positive, negative = (
            F.normalize(values.float(), dim=-1)
            for values in (
                now.layers[:, pairs.rows, pairs.columns],
                theirs.layers[:, pairs.rows, pairs.stand_in_columns],
                before.layers[:, pairs.rows, pairs.columns],
            )
        )
        own = torch.stack([(anchor * positive).sum(-1), (anchor * negative).sum(-1)], dim=-1)
        scores = torch.cat([own, anchor @ self._bank.mT], dim=-1) / self._temperature
        return -scores.log_softmax(-1)[..., 0].mean(0) @ pairs.weights


def built(build: Callable[..., WholeFalcon], **arguments: Any) -> Way:
    """Train a subclass of FALCON."""

    def way(world: World) -> Tensors:
        method = world.method(partial(build, **arguments))
        masters = method.setup.model.masters()
        world.train(method, masters)
        return masters

    return way


def _falcon(world: World) -> FalconConfig:
    assert isinstance(world.recipe.method, FalconConfig)
    return world.recipe.method


def _renamed(world: World, names: Callable[[str, int], Sequence[str]]) -> Alternatives:
    """Stand-ins under names of the caller's choice: a function of the entity and how many are wanted."""
    settings = _falcon(world).stand_in
    result: dict[str, tuple[Encoded, ...]] = {}
    for domain, items in world.encoded.forget.items():
        for item, record in zip(items, world.encoded.records[f"forget.{domain}"], strict=True):
            assert record.entity is not None
            given = names(record.entity, settings.count + settings.spare)
            result[record_key(item)] = tuple(world.encoder.encode(renamed(record, record.entity, n)) for n in given)
    return result


def another_person(world: World) -> Tensors:
    """Stand-ins have the names of retain people."""
    known = sorted({r.entity for records in world.corpus.retain.values() for r in records if r.entity})

    def names(entity: str, count: int) -> Sequence[str]:
        return random.Random(f"another {world.seed} {entity}").sample(known, count)

    return default(replace(world, alternatives=_renamed(world, names)))


def syllables(world: World) -> Tensors:
    """Stand-ins have names of two invented words of two syllables each."""

    def names(entity: str, count: int) -> Sequence[str]:
        rng = random.Random(f"syllables {world.seed} {entity}")

        def word() -> str:
            return "".join(rng.choice(_CONSONANTS) + rng.choice("aeiou") for _ in range(2)).capitalize()

        return [f"{word()} {word()}" for _ in range(count)]

    return default(replace(world, alternatives=_renamed(world, names)))


def _dont_know(world: World) -> Alternatives:
    return {
        record_key(item): dont_know(record, world.encoder, world.seed)
        for domain, items in world.encoded.forget.items()
        for item, record in zip(items, world.encoded.records[f"forget.{domain}"], strict=True)
    }


def dont_know_for_all(world: World) -> Tensors:
    """Contrast, distillation and hinge take "I don't know" to the same question for the stand-in."""
    return default(replace(world, alternatives=_dont_know(world)))


def dont_know_for_contrast(world: World) -> Tensors:
    """Only the contrast does."""
    return built(OtherPositives, others=_dont_know(world))(world)


class OffsetByGroup(Falcon):
    """FALCON in one layer with an offset vector for each group of forget tokens.

    Args:
        config: of FALCON.
        setup: of FALCON.
        entities: number of each forget record's entity by :func:`record_key`; without them groups are clusters.
        clusters: of frozen activations, by k-means.
    """

    def __init__(
        self, config: FalconConfig, setup: Setup, entities: Mapping[str, int] | None = None, clusters: int = 8
    ) -> None:
        super().__init__(config, setup)
        self._entities = entities
        self._groups = clusters if entities is None else max(entities.values()) + 1
        self._centres: dict[str, Tensor] = {}
        if entities is None:
            for domain in setup.forget_batches:
                activations = masked_activations(setup, domain, config.offset_tokens)
                self._centres[domain] = _k_means(activations, clusters, setup.seed)

    def forget_loss(self, step: int, domain: str, batch: Batch, masters: Tensors) -> Tensor:
        """See :class:`falcon_unlearn.methods.base.Method`."""
        config, setup = self.config, self._setup
        moment: object = "run" if config.offset_refresh == "run" else step
        vectors = torch.stack(
            [
                paper_vector(self._subspaces[domain], generator_for(setup.seed, "offset", domain, group, moment))
                for group in range(self._groups)
            ]
        )
        updated, frozen = counted_activations(setup, batch, masters)
        if self._entities is None:
            of_token = torch.cdist(frozen.float(), self._centres[domain]).argmin(1)
        else:
            of_record = torch.tensor([self._entities[record_key(record)] for record in batch.records])
            of_token = of_record[batch.loss_mask(setup.loss_mask).nonzero()[:, 0]]
        loss = info_nce(updated, vectors[of_token], frozen[:, None], config.temperature)
        return config.forget_weight * loss


def _k_means(points: Tensor, count: int, seed: int) -> Tensor:
    """Lloyd's algorithm from random points, ``(count, D)``."""
    centres = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:count]]
    for _ in range(50):
        nearest = torch.cdist(points, centres).argmin(1)
        centres = torch.stack(
            [points[nearest == i].mean(0) if (nearest == i).any() else centres[i] for i in range(count)]
        )
    return centres


def in_one_layer(groups: Literal["one", "entity", "cluster"]) -> Way:
    """``preset: layer`` with one offset vector for all, or one for each entity or cluster of activations."""

    def way(world: World) -> Tensors:
        recipe, data = world.recipe, world.data
        layers = recipe.selection.layers
        assert not isinstance(layers, str)
        decoder = SplitDecoder(load_causal_lm(world.source), layers, recipe.training.modules)
        masters = decoder.masters()
        decoder.keep(ActivationCache(ActivationStore(Path("never"))), data.records(), data.pad_id, 32)
        setup = Setup(decoder, data.first_batches(recipe.training.batch_size), world.encoded.loss_mask, world.seed)
        method: Falcon
        if groups == "one":
            method = Falcon(_falcon(world), setup)
        else:
            method = OffsetByGroup(_falcon(world), setup, _entities(world) if groups == "entity" else None)
        train(method, masters, data, recipe.training, seed=world.seed, hidden_size=decoder.hidden_size)
        return masters

    return way


def _entities(world: World) -> dict[str, int]:
    records = [r for domain in world.encoded.forget for r in world.encoded.records[f"forget.{domain}"]]
    items = [item for encoded in world.encoded.forget.values() for item in encoded]
    numbers = {name: i for i, name in enumerate(dict.fromkeys(record.entity for record in records))}
    return {record_key(item): numbers[record.entity] for item, record in zip(items, records, strict=True)}


def _inside(model: PreTrainedModel, layer: int, batch: Batch, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs of a layer's ``down_proj``, ``(N, inner)``, and the layer's outputs, ``(N, hidden)``, at N tokens."""
    kept: dict[str, Tensor] = {}

    def keep_inputs(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        kept["inputs"] = arguments[0]

    def keep_outputs(_: nn.Module, __: Any, output: Any) -> None:
        kept["outputs"] = first_tensor(output)

    block = find_layers(model)[1][layer]
    handles = [
        block.get_submodule(_EDITED).register_forward_pre_hook(keep_inputs),
        block.register_forward_hook(keep_outputs),
    ]
    try:
        with torch.no_grad():
            model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return kept["inputs"][rows, columns].double(), kept["outputs"][rows, columns].double()


def _same_places(record: Encoded, other: Encoded, *, answer_only: bool) -> list[tuple[int, int]]:
    """Places of a record and its stand-in: equal runs of tokens, and what is between them paired from its end.

    ``answer_only``: from the place that predicts the answer's first token on.
    """
    pairs: list[tuple[int, int]] = []
    for tag, i1, i2, j1, j2 in SequenceMatcher(None, record.ids, other.ids, autojunk=False).get_opcodes():
        if tag in {"equal", "replace"}:
            count = min(i2 - i1, j2 - j1)
            pairs += zip(range(i2 - count, i2), range(j2 - count, j2), strict=True)
    first = record.answer_start - 1 if answer_only else 1
    return [(i, j) for i, j in pairs if i >= first]


def closed_form(layers: Sequence[int], penalty: float, *, answer_only: bool = True) -> Way:
    """Ridge edit of ``down_proj``, no training: the MLP writes what makes the layer's output the stand-in's.

        W' = W + (T - A) X' (X X' + penalty Y Y' + ridge I)^-1

    X and Y are the MLP's inputs at the forget and at all retain tokens, A and T the layer's outputs at the forget
    tokens and the original model's at the same places of the stand-ins. Layers one after the other, from the lowest,
    each on the model as edited so far (as ROME and MEMIT, Meng et al. 2022 and 2023, without their optimised targets).
    """

    def way(world: World) -> Tensors:
        method = world.method()
        original, edited = method.setup.model.model, load_causal_lm(world.source)
        stack = find_layers(edited)[1]
        forget = [item for items in world.encoded.forget.values() for item in items]
        retain = [item for items in world.encoded.retain.values() for item in items]
        changed: dict[str, Tensor] = {}
        for layer in layers:
            matrix = stack[layer].get_submodule(_EDITED).get_parameter("weight")
            size = matrix.shape[1]
            gram, cross = torch.zeros(size, size, dtype=torch.double), torch.zeros_like(matrix, dtype=torch.double)
            for group in passed_together(forget):
                others = [method.setup.alternatives[record_key(record)][0] for record in group]
                places = [
                    (row, i, j)
                    for row, (record, other) in enumerate(zip(group, others, strict=True))
                    for i, j in _same_places(record, other, answer_only=answer_only)
                ]
                rows, own, theirs = (torch.tensor(column) for column in zip(*places, strict=True))
                inputs, outputs = _inside(edited, layer, collate(group, method.setup.pad_id), rows, own)
                _, aim = _inside(original, layer, collate(others, method.setup.pad_id), rows, theirs)
                gram += inputs.T @ inputs
                cross += (aim - outputs).T @ inputs
            kept = torch.zeros_like(gram)
            for group in passed_together(retain):
                batch = collate(group, method.setup.pad_id)
                rows, columns = batch.content_mask.nonzero(as_tuple=True)
                inputs, _ = _inside(edited, layer, batch, rows, columns)
                kept += inputs.T @ inputs
            ridge = 1e-4 * float(kept.trace()) / size
            metric = gram + penalty * kept + ridge * torch.eye(size, dtype=torch.double)
            with torch.no_grad():
                matrix.add_(torch.linalg.solve(metric, cross.T).T.to(matrix.dtype))
            changed[f"model.layers.{layer}.mlp.down_proj.weight"] = matrix.detach()
        return changed

    return way


@dataclass(frozen=True)
class Row:
    """A row of the table: settings laid on the default preset, and what is done with them."""

    overrides: tuple[str, ...] = ()
    way: Way = default


_LAYER = ("method.preset=layer", "selection.layers=[4]")
_SINGLE: Mapping[tuple[int, ...], tuple[float, ...]] = {(layer,): (0.01, 0.1) for layer in (2, 3, 4, 5)}
_EDITS: Mapping[tuple[int, ...], tuple[float, ...]] = {**_SINGLE, (2, 3, 4, 5): (0.01, 0.1, 1.0)}
_GROUPS: tuple[Literal["one", "entity", "cluster"], ...] = ("one", "entity", "cluster")

ROWS: Mapping[str, Row] = {
    "default": Row(),
    # what configuration can express
    "distillation alone": Row(("method.stand_in.representation_weight=0", "method.stand_in.hinge_weight=0")),
    "distillation alone, weight 1": Row(
        (
            "method.stand_in.representation_weight=0",
            "method.stand_in.hinge_weight=0",
            "method.stand_in.distillation_weight=1",
        )
    ),
    "hinge alone": Row(("method.stand_in.representation_weight=0", "method.stand_in.distillation_weight=0")),
    "contrast and hinge": Row(("method.stand_in.distillation_weight=0",)),
    "four in turns": Row(("method.stand_in.count=4",)),
    "all layers": Row(("method.stand_in.layers=[0,1,2,3,4,5]",)),
    "question tokens too": Row(("corpus.loss_mask=all",)),
    "npo added": Row(("method.stand_in.npo_weight=1",)),
    # more, or others, in the place of the stand-in
    "mean of four": Row(("method.stand_in.count=4",), built(SeveralStandIns, level="mean")),
    "mean of four, hinge at the largest": Row(("method.stand_in.count=4",), built(SeveralStandIns, level="max")),
    "another person": Row(way=another_person),
    "syllables": Row(way=syllables),
    "don't know": Row(way=dont_know_for_all),
    "don't know, contrast only": Row(way=dont_know_for_contrast),
    "16 retain negatives": Row(way=built(RetainNegatives, count=16)),
    "256 retain negatives": Row(way=built(RetainNegatives, count=256)),
    # one layer
    **{
        f"layer 4, {groups} offset {refresh}": Row(
            (*_LAYER, f"method.offset_refresh={'run' if refresh == 'fixed' else 'step'}"), in_one_layer(groups)
        )
        for groups in _GROUPS
        for refresh in ("fixed", "resampled")
    },
    # no training
    **{
        f"ridge {''.join(map(str, layers))} {penalty:g}": Row(way=closed_form(layers, penalty))
        for layers, penalties in _EDITS.items()
        for penalty in penalties
    },
    "ridge 2345 0.1, question tokens too": Row(way=closed_form((2, 3, 4, 5), 0.1, answer_only=False)),
}


def read_or_measure(name: str, seed: int, out: Path, draws: int) -> Result:
    """The result that is kept, or a new one."""
    path = out / "targets" / f"{name.replace(' ', '-').replace(',', '')}-{seed}.json"
    if not path.exists():
        if name == "oracle":
            result = oracle_of(open_world(seed, out), draws)
        else:
            row = ROWS[name]
            result = measure(name, row.way, open_world(seed, out, row.overrides), draws)
        print(result, file=sys.stderr, flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(result)), encoding="utf-8")
    raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    lists = {key: tuple(value) for key, value in raw.items() if isinstance(value, list)}
    return Result(**{**raw, **lists})


def main() -> None:
    """Measure what is not there yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ways"))
    parser.add_argument("--ways", nargs="+", default=[*ROWS, "oracle"], choices=[*ROWS, "oracle"], metavar="WAY")
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 6])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = [
        read_or_measure(name, seed, arguments.out, arguments.draws)
        for name in arguments.ways
        for seed in arguments.seeds
    ]
    print(json.dumps([asdict(result) for result in results], indent=2) if arguments.json else table(results))


if __name__ == "__main__":
    main()
