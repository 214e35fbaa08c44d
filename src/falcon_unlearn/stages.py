"""The stages of a run: plain functions from artifacts to artifacts. They write nothing to disk, but self-samples."""

from __future__ import annotations

import dataclasses
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from falcon_unlearn.artifacts import (
    LayerScore,
    LayerSelection,
    MutualInformationCurve,
    SampleScore,
    StepRecord,
    read_jsonl,
    write_jsonl,
)
from falcon_unlearn.console import Console
from falcon_unlearn.corpus.alternatives import dont_know, random_answers
from falcon_unlearn.corpus.batching import (
    Encoded,
    Encoder,
    LengthReport,
    LossMask,
    collate,
    fit_to_context,
    length_sorted_batches,
)
from falcon_unlearn.corpus.records import Record, record_from_row
from falcon_unlearn.corpus.sources import Corpus, load_records
from falcon_unlearn.corpus.stand_ins import stand_ins
from falcon_unlearn.engine.optimizers import learning_rate
from falcon_unlearn.engine.parallel import Replicas, Shards
from falcon_unlearn.engine.trainer import (
    CheckpointPlan,
    DivergedError,
    InterruptedTrainingError,
    TrainingConfig,
    TrainingData,
    train,
)
from falcon_unlearn.errors import UserError, is_out_of_memory
from falcon_unlearn.evaluation.log_probabilities import answer_log_probabilities
from falcon_unlearn.evaluation.metrics import FORGET_SET
from falcon_unlearn.evaluation.scoring import score_set
from falcon_unlearn.methods import FalconConfig, Method, Setup, WholeModel, WholeSetup, entry_of
from falcon_unlearn.model.activation_cache import ActivationCache, record_key
from falcon_unlearn.model.activation_store import ActivationStore, Slabs
from falcon_unlearn.model.decoder import SplitDecoder, find_layers, replaced, scope_parameters
from falcon_unlearn.model.loading import (
    ModelSource,
    context_length,
    number_of_layers,
    quiet_transformers,
    resolve_device,
)
from falcon_unlearn.model.lora import ADAPTER_TENSORS, Adapters, add_adapters, linear_modules
from falcon_unlearn.model.skeleton import open_skeleton
from falcon_unlearn.model.streaming import stream_activations
from falcon_unlearn.ranks import ALONE, Ranks
from falcon_unlearn.selection.activations import layer_means, streamed_layer_means
from falcon_unlearn.selection.gradients import gradient_relations
from falcon_unlearn.selection.mutual_information import EstimationError, curve, statements
from falcon_unlearn.selection.selectors import CRITERIA, SEPARATIONS, SMALLEST, middle
from falcon_unlearn.selection.sweep import TrialOutcome, spaced_candidates, split_validation, sweep
from falcon_unlearn.self_samples import self_samples

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from falcon_unlearn.recipe import Recipe

RETAIN_SET = "retain"
_DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class EncodedCorpus:
    """The corpus as tokens, by domain, in the order of the records.

    Attributes:
        forget: encoded forget records.
        retain: encoded retain records.
        groups: for each domain, one key per record; phrasings of the same answer share a key.
        records: the records themselves, by ``forget.<domain>`` and ``retain.<domain>``.
        lengths: what happened to records longer than the limit, keyed like
            :class:`~falcon_unlearn.corpus.sources.CorpusReport`.
        loss_mask: which tokens take part in losses and statistics.
        pad_id: token to pad with.
        begins_word: see :meth:`~falcon_unlearn.corpus.batching.Encoder.begins_word`.
    """

    forget: Mapping[str, list[Encoded]]
    retain: Mapping[str, list[Encoded]]
    groups: Mapping[str, list[str]]
    records: Mapping[str, list[Record]]
    lengths: Mapping[str, LengthReport]
    loss_mask: LossMask
    pad_id: int
    begins_word: Sequence[bool] | None = None


def encode_corpus(recipe: Recipe, corpus: Corpus, encoder: Encoder, config: PreTrainedConfig) -> EncodedCorpus:
    """Tokenise every domain and apply the rule for long records.

    Raises:
        UserError: records longer than the limit and ``corpus.on_long`` is ``error``.
    """
    settings = recipe.corpus
    limit = min(settings.max_length or math.inf, context_length(config) or _DEFAULT_CONTEXT)
    sides: dict[str, dict[str, list[Encoded]]] = {"forget": {}, "retain": {}}
    groups: dict[str, list[str]] = {}
    kept_records: dict[str, list[Record]] = {}
    lengths: dict[str, LengthReport] = {}
    for side, domains in (("forget", corpus.forget), ("retain", corpus.retain)):
        for domain, records in domains.items():
            key = side if domain == side else f"{side}.{domain}"
            encoded, kept, report = fit_to_context(
                [encoder.encode(record) for record in records], records, int(limit), settings.on_long, f"corpus.{key}"
            )
            sides[side][domain] = encoded
            groups[f"{side}.{domain}"] = [record.key[1] for record in kept]
            kept_records[f"{side}.{domain}"] = kept
            lengths[key] = report
    return EncodedCorpus(
        sides["forget"],
        sides["retain"],
        groups,
        kept_records,
        lengths,
        settings.loss_mask or "answer",
        encoder.pad_id,
        encoder.begins_word(),
    )


def with_self_samples(
    recipe: Recipe,
    model: Callable[[], PreTrainedModel],
    encoded: EncodedCorpus,
    encoder: Encoder,
    path: Path,
    *,
    earlier: Sequence[Record] = (),
    forgotten: Callable[[Record], bool] = lambda _: False,
) -> EncodedCorpus:
    """The corpus for training: each retain domain with its part of the records that the model writes itself.

    Args:
        recipe: says how many.
        model: gives the original one.
        encoded: the corpus; what it says about the samples' records and groups stays as it was.
        encoder: of this model.
        path: JSON lines; read where it is there, else written.
        earlier: forget records of earlier requests, which samples must not be about either.
        forgotten: whether a record was forgotten earlier.

    Raises:
        UserError: memory does not suffice.
    """
    config = recipe.corpus.self_samples
    if not config.wanted(sum(map(len, encoded.retain.values()))):
        return encoded
    if path.exists():
        records = [record_from_row(row, f"{path.name}:{n}") for n, row in enumerate(read_jsonl(path), start=1)]
    else:
        sides = [
            [record for name, found in encoded.records.items() if name.startswith(side) for record in found]
            for side in ("forget.", "retain.")
        ]
        original = model()
        with _memory_errors("for corpus.self_samples; lower its batch_size, or set its count to 0"):
            written = self_samples(original, encoder, config, [*sides[0], *earlier], sides[1], seed=recipe.seed)
        records = [record for record in written if not forgotten(record)]
        rows = [{"question": r.prompt, "answer": r.answer} if r.prompt else {"text": r.answer} for r in records]
        write_jsonl(path, rows)
    limit = min(report.limit for report in encoded.lengths.values())
    items = [item for item in map(encoder.encode, records) if len(item) <= limit]
    domains = len(encoded.retain)
    retain = {name: [*own, *items[i::domains]] for i, (name, own) in enumerate(encoded.retain.items())}
    return dataclasses.replace(encoded, retain=retain)


def evaluation_sets(recipe: Recipe, corpus: Corpus, base_dir: Path) -> dict[str, list[Record]]:
    """The records to score, by set: ``forget``, ``retain`` and the utility sets, each at most ``max_records``.

    Raises:
        UserError: a source cannot be read, or a utility set is named like one of the others.
    """
    config = recipe.evaluation
    taken = {FORGET_SET, RETAIN_SET} & set(config.utility)
    if taken:
        raise UserError(f"evaluation.utility: '{taken.pop()}' is already the name of a set; choose another")
    sets: dict[str, list[Record]] = {}
    for name, source, own in (
        (FORGET_SET, config.forget, corpus.forget),
        (RETAIN_SET, config.retain, corpus.retain),
    ):
        if source is not None:
            sets[name] = load_records(source, base_dir, f"evaluation.{name}")
        else:
            sets[name] = [record for records in own.values() for record in records]
    for name, source in config.utility.items():
        sets[name] = load_records(source, base_dir, f"evaluation.utility.{name}")
    return {name: at_most(records, name, config.max_records, recipe.seed) for name, records in sets.items()}


def at_most(records: list[Record], name: str, most: int | None, seed: int) -> list[Record]:
    """``most`` records of a set, drawn with the seed, in their order; all of them where there are no more."""
    if most is None or len(records) <= most:
        return records
    return [records[i] for i in sorted(random.Random(f"{name} {seed}").sample(range(len(records)), most))]


def score_model(
    model: PreTrainedModel,
    encoder: Encoder,
    sets: Mapping[str, Sequence[Record]],
    recipe: Recipe,
    console: Console,
    *,
    ranks: Ranks = ALONE,
) -> dict[str, list[SampleScore]]:
    """Score every set with one model."""
    config = recipe.evaluation
    scores = {}
    with console.bar(len(sets), "scoring") as bar:
        for name, records in sets.items():
            scores[name] = score_set(
                model,
                encoder,
                records,
                name,
                batch_size=config.batch_size,
                max_new_tokens=config.max_new_tokens,
                device=model.device,
                ranks=ranks,
            )
            bar.update()
    return scores


def check_layers(recipe: Recipe, config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse layers and modules the model does not have, and weights of another model, without loading any weight.

    Args:
        recipe: the whole recipe.
        config: the model's.
        shapes: of the tensors in its checkpoint, by on-disk name.

    Raises:
        UserError: naming the key, the layer and the range, or what there is to train; or the architecture is no
            decoder with a layer stack.
    """
    total = number_of_layers(config)
    for key, layers in (("layers", recipe.selection.layers), ("candidates", recipe.selection.candidates)):
        bad = [layer for layer in layers or () if isinstance(layer, int) and layer >= total]
        if bad:
            raise UserError(
                f"selection.{key}: layer {bad[0]} is out of range, {recipe.model} has layers 0..{total - 1}"
            )
    model = _without_weights(recipe, config)
    for name, parameter in model.named_parameters():
        shape = shapes.get(name)
        if shape is not None and tuple(parameter.shape) != shape:
            raise UserError(
                f"model: {recipe.model}: config.json asks for shape {tuple(parameter.shape)} of {name}, the weights "
                f"have {shape}; they do not belong together"
            )
    _, stack = find_layers(model)
    layers = recipe.selection.layers
    chosen = _candidates(recipe, total) if isinstance(layers, str) else layers
    for layer in chosen:
        scope_parameters(stack[layer], recipe.training.modules)
        if recipe.training.lora is not None:
            linear_modules(model, (layer,), recipe.training.modules)


def _without_weights(recipe: Recipe, config: PreTrainedConfig) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"), quiet_transformers():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=recipe.trust_remote_code
            )
    except Exception as error:  # whatever it is, it is about this config.json
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"model: {recipe.model} is of an architecture ('{config.model_type}') that cannot be used ({reason})"
        ) from error
    return model


def _candidates(recipe: Recipe, total: int) -> tuple[int, ...]:
    return recipe.selection.candidates or spaced_candidates(total, recipe.selection.max_candidates)


def given_layers(recipe: Recipe, total: int) -> LayerSelection | None:
    """The layers the recipe names, or None where they are to be chosen."""
    named = recipe.selection.layers
    if named == "auto":
        return None
    if isinstance(named, str):
        return LayerSelection("given", tuple(range(total)), total - 1, "all layers")
    layers = tuple(sorted(named))
    return LayerSelection("given", layers, layers[-1], "given in the recipe")


def _at_once(training: TrainingConfig) -> int:
    """Records per forward pass outside of training steps."""
    return min(training.micro_batch_size or training.batch_size, training.batch_size)


_OF_TRAINING = (
    "before or between training steps; lower training.micro_batch_size or corpus.max_length, "
    "train fewer layers or modules, or use dtype bfloat16"
)


@contextmanager
def _memory_errors(advice: str = _OF_TRAINING) -> Iterator[None]:
    """Where no smaller batch can be tried, running out of memory is one line.

    Args:
        advice: where it was, and what to do.

    Raises:
        UserError: in place of the allocator's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory {advice}") from error


Means = Callable[[Sequence[Encoded], Sequence[int]], list[Tensor]]
"""Records and layers -> one tensor of mean activations ``(records, hidden)`` a layer."""


def resident_means(model: PreTrainedModel, encoded: EncodedCorpus, batch_size: int) -> Means:
    """Mean activations by a model that is in memory."""

    def means(records: Sequence[Encoded], layers: Sequence[int]) -> list[Tensor]:
        return layer_means(model, records, layers, mask=encoded.loss_mask, pad_id=encoded.pad_id, batch_size=batch_size)

    return means


def streamed_means(source: ModelSource, encoded: EncodedCorpus, batch_size: int, spill: Path, budget: float) -> Means:
    """Mean activations with one layer of the model in memory at a time.

    Args:
        source: the model.
        encoded: says which tokens count.
        batch_size: records per forward pass.
        spill: file for hidden states beyond the budget; it is removed.
        budget: bytes of memory for hidden states.
    """

    def means(records: Sequence[Encoded], layers: Sequence[int]) -> list[Tensor]:
        store = ActivationStore(spill, budget)
        try:
            return streamed_layer_means(
                open_skeleton(source),
                records,
                layers,
                mask=encoded.loss_mask,
                pad_id=encoded.pad_id,
                batch_size=batch_size,
                store=store,
            )
        finally:
            store.close()

    return means


def shared_means(means: Means, batch_size: int, ranks: Ranks) -> Means:
    """Mean activations to the same bits, by ``ranks`` that take turns at the batches of ``means``.

    Args:
        means: on its own.
        batch_size: its records per forward pass.
        ranks: which take part; all of them get all means.
    """
    if ranks.world == 1:
        return means

    def shared(records: Sequence[Encoded], layers: Sequence[int]) -> list[Tensor]:
        batches = length_sorted_batches(records, batch_size)
        dealt = [[i for batch in batches[rank :: ranks.world] for i in batch] for rank in range(ranks.world)]
        # Sorted by length and cut again, whole batches in their order come out as they were.
        found = ranks.spread(dealt, lambda own: means([records[i] for i in own], layers) if own else None)
        back = torch.tensor([i for own in dealt for i in own]).argsort()
        return [torch.cat([part[n] for part in found if part is not None])[back] for n in range(len(layers))]

    return shared


def select_layers(
    recipe: Recipe,
    encoded: EncodedCorpus,
    console: Console,
    *,
    ranks: Ranks = ALONE,
    total: int,
    model: Callable[[], PreTrainedModel],
    means: Callable[[], Means],
) -> LayerSelection:
    """Choose the layers to train, with the recipe's selector.

    A method on the whole model trains all of them, unless another selector than the sweep is to choose.

    Args:
        recipe: validated, its layers checked with :func:`check_layers`.
        encoded: the corpus.
        console: progress.
        ranks: they share the trials; all of them get the selection.
        total: number of the model's layers.
        model: gives the whole model (trials are scored with it), which is left as it was; the sweep and
            gradient_conflict alone ask for it.
        means: gives the way to mean activations; what looks at activations asks for it.

    Raises:
        EstimationError: mutual information was asked to choose and cannot be estimated.
    """
    settings = recipe.selection
    candidates = _candidates(recipe, total)
    notes: list[str] = []
    information: MutualInformationCurve | None = None
    if settings.selector == "mutual_information" or settings.show_mutual_information:
        try:
            information = _information(recipe, means(), encoded, candidates)
            notes += statements(information)
        except EstimationError as error:
            if settings.selector == "mutual_information":
                raise
            notes.append(f"Mutual information is not shown: {error}")
    scores: tuple[LayerScore, ...] = ()
    if settings.selector == "sweep" and entry_of(recipe.method).kind != "representation":
        criterion = "all layers: the knowledge may lie in any of them"
        return LayerSelection("all", tuple(range(total)), total - 1, criterion, (), information, tuple(notes))
    if settings.selector == "sweep":
        target, scores = _sweep(recipe, model(), encoded, candidates, console, ranks=ranks)
    elif settings.selector == "middle":
        target = middle(candidates, total)
    else:
        if settings.selector == "mutual_information":
            assert information is not None
            values = list(information.value)
        elif settings.selector == "gradient_conflict":
            values = _gradient_conflict(recipe, model(), encoded, candidates)
        else:
            values = _separation(recipe, means(), encoded, candidates)
        scores = tuple(LayerScore(n, v) for n, v in zip(candidates, values, strict=True))
        target = _best(scores, smallest=settings.selector in SMALLEST)
    layers = tuple(range(max(0, target - settings.span + 1), target + 1))
    criterion = CRITERIA[settings.selector]
    return LayerSelection(settings.selector, layers, target, criterion, scores, information, tuple(notes))


def _best(scores: Sequence[LayerScore], *, smallest: bool) -> int:
    finite = [score for score in scores if math.isfinite(score.score)]
    if not finite:
        raise UserError("selection: no layer got a score: add records, or give selection.layers")
    sign = 1 if smallest else -1
    return min(finite, key=lambda score: (sign * score.score, score.layer)).layer


def compared_records(recipe: Recipe, encoded: EncodedCorpus) -> tuple[list[Encoded], list[Encoded], list[str]]:
    """Equally many forget and retain records, of all domains, and the keys of both (phrasings of a fact share one)."""
    sides = []
    for side, domains in (("forget", encoded.forget), ("retain", encoded.retain)):
        items = [item for records in domains.values() for item in records]
        keys = [f"{side} {domain} {key}" for domain in domains for key in encoded.groups[f"{side}.{domain}"]]
        sides.append(list(zip(items, keys, strict=True)))
    count = min(recipe.selection.sample, *map(len, sides))
    rng = random.Random(f"compared {recipe.seed}")
    forget, retain = ([side[i] for i in sorted(rng.sample(range(len(side)), count))] for side in sides)
    return [item for item, _ in forget], [item for item, _ in retain], [key for _, key in (*forget, *retain)]


def _separation(recipe: Recipe, means: Means, encoded: EncodedCorpus, candidates: Sequence[int]) -> list[float]:
    score = SEPARATIONS[recipe.selection.selector]
    forget, retain, groups = compared_records(recipe, encoded)
    found = means([*forget, *retain], candidates)  # all in one go: streaming reads each layer once
    return [score(rows[: len(forget)], rows[len(forget) :], groups, recipe.seed) for rows in found]


@_memory_errors()
def _gradient_conflict(
    recipe: Recipe, model: PreTrainedModel, encoded: EncodedCorpus, candidates: Sequence[int]
) -> list[float]:
    forget, retain, _ = compared_records(recipe, encoded)
    size = _at_once(recipe.training)
    forget_batches, retain_batches = (
        [collate([items[i] for i in at], encoded.pad_id).to(model.device) for at in length_sorted_batches(items, size)]
        for items in (forget, retain)
    )
    found = gradient_relations(model, forget_batches, retain_batches, candidates, recipe.training.modules)
    return [relation.cosine for relation in found]


def activation_samples(recipe: Recipe, encoded: EncodedCorpus) -> list[list[Encoded]]:
    """The records whose activations mutual information is estimated from: one list a forget domain, then retain."""
    most = recipe.selection.mutual_information.max_samples

    def drawn(records: Sequence[Encoded], limit: int) -> list[Encoded]:
        chosen = random.Random(f"activations {recipe.seed}").sample(range(len(records)), min(limit, len(records)))
        return [records[i] for i in sorted(chosen)]

    # The nulls need as many retain rows again for every forget domain.
    retain = [item for records in encoded.retain.values() for item in records]
    forget = [drawn(records, most) for records in encoded.forget.values()]
    return [*forget, drawn(retain, most * (len(encoded.forget) + 1))]


def _information(
    recipe: Recipe, means: Means, encoded: EncodedCorpus, candidates: Sequence[int]
) -> MutualInformationCurve:
    config = recipe.selection.mutual_information
    parts = activation_samples(recipe, encoded)
    # All in one go: streaming reads each layer once.
    found = means([record for part in parts for record in part], candidates)
    split = [torch.split(layer, [len(part) for part in parts]) for layer in found]
    *forget, kept = ([layer[i] for layer in split] for i in range(len(parts)))
    return curve(
        candidates,
        dict(zip(encoded.forget, forget, strict=True)),
        kept,
        config,
        recipe.seed,
        device=resolve_device(recipe.device),
    )


def validation_parts(
    recipe: Recipe, encoded: EncodedCorpus
) -> tuple[dict[str, dict[str, list[Encoded]]], dict[str, list[Encoded]]]:
    """What trials of the sweep train on, by side and domain, and the records of each side that they are judged on."""
    config = recipe.selection.sweep
    parts: dict[str, dict[str, list[Encoded]]] = {"forget": {}, "retain": {}}
    held: dict[str, list[Encoded]] = {"forget": [], "retain": []}
    for side, domains in (("forget", encoded.forget), ("retain", encoded.retain)):
        for domain, records in domains.items():
            training, validation = split_validation(
                encoded.groups[f"{side}.{domain}"], config.validation_share, recipe.seed
            )
            parts[side][domain] = [records[i] for i in training]
            held[side] += [records[i] for i in validation]
        random.Random(f"validation {recipe.seed}").shuffle(held[side])
        held[side] = held[side][: config.max_validation]
    return parts, held


def _sweep(
    recipe: Recipe,
    model: PreTrainedModel,
    encoded: EncodedCorpus,
    candidates: Sequence[int],
    console: Console,
    *,
    ranks: Ranks,
) -> tuple[int, tuple[LayerScore, ...]]:
    parts, held = validation_parts(recipe, encoded)

    def probability(side: str) -> float:
        values = answer_log_probabilities(model, held[side], encoded.pad_id, recipe.evaluation.batch_size, model.device)
        found = [math.exp(value) for value in values if math.isfinite(value)]
        return sum(found) / len(found) if found else math.nan

    before = {side: probability(side) for side in held}
    if not all(value > 0 for value in before.values()):
        raise UserError("selection: the model gives the validation answers no probability at all; name layers instead")
    trial_training = recipe.training.model_copy(update={"steps": recipe.selection.sweep.steps})
    if isinstance(recipe.method, FalconConfig):  # nobody reads a trial's diagnostics
        recipe = recipe.model_copy(update={"method": recipe.method.model_copy(update={"offset_bootstrap": 0})})
    data = TrainingData(parts["forget"], parts["retain"], encoded.pad_id, model.device)

    spill = recipe.output if Path(recipe.output).is_dir() else None
    with console.bar(len(candidates), "trying layers") as bar:

        def trial(layer: int) -> TrialOutcome:
            layers = range(max(0, layer - recipe.selection.span + 1), layer + 1)
            adapters, scope = _scope(recipe, model, layers)
            decoder = SplitDecoder(model, tuple(layers), scope)
            masters = decoder.masters()
            try:
                with tempfile.TemporaryDirectory(prefix=".trial", suffix=".tmp", dir=spill) as folder:
                    spill_file = Path(folder) / "activations"
                    kept = CachePlan(spill_file, resume=False, say=lambda _: None, processes=ranks.local_world)
                    _train(recipe, trial_training, decoder, masters, data, loss_mask=encoded.loss_mask, cache=kept)
                with replaced(model, masters):
                    after = {side: probability(side) for side in held}
            except DivergedError:
                bar.update()
                return TrialOutcome(math.nan, math.nan)
            except InterruptedTrainingError as stop:
                raise KeyboardInterrupt from stop  # a trial keeps no state
            finally:
                if adapters is not None:
                    adapters.remove()
            bar.update()
            return TrialOutcome(after["forget"] / before["forget"], after["retain"] / before["retain"])

        outcomes = dict(zip(candidates, ranks.spread(candidates, trial), strict=True))
        return sweep(candidates, outcomes.__getitem__)


@dataclass(frozen=True)
class CachePlan:
    """Where kept activations lie beyond the budget, and whether the file may serve a later, resumed run.

    ``streamed`` holds them all already, and whether the model's layers return tuples. ``processes`` on this machine
    keep them, each its own.
    """

    path: Path
    resume: bool
    say: Callable[[str], None]
    streamed: tuple[ActivationCache, bool] | None = None
    processes: int = 1


def free_memory() -> int:
    """Bytes this process may still take, page cache included; 8 GiB where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        free = 8 << 30
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        return free if limit == "max" else max(0, min(free, int(limit) - int(used)))
    except (OSError, ValueError):
        return free


def _store(training: TrainingConfig, plan: CachePlan, device: torch.device) -> ActivationStore:
    budget = free_memory() / 4 / plan.processes if training.cache_gb is None else training.cache_gb * 2**30
    return ActivationStore(plan.path, budget, Slabs(pinned=True) if device.type == "cuda" else None)


def _say_where(store: ActivationStore, plan: CachePlan) -> None:
    if store.bytes_on_disk:
        plan.say(f"activations: {store.bytes_in_memory >> 20} MiB in memory, {store.bytes_on_disk >> 20} MiB on disk")


def stream_prefix(
    recipe: Recipe, source: ModelSource, encoded: EncodedCorpus, selection: LayerSelection, plan: CachePlan
) -> tuple[PreTrainedModel, CachePlan]:
    """The model with nothing but the layers to train, and the plan with what the layers below make of all records.

    The layers are read one after the other, so that memory is needed for one of them, or for those that are trained.

    Args:
        recipe: a representation method's.
        source: the model.
        encoded: the corpus.
        selection: which layers are trained.
        plan: where activations lie beyond the memory for them; a resumed run computes them again.

    Raises:
        UserError: a layer's weights are missing, truncated or altered, or the disk is full.
    """
    plan.say("training: the layers below run once, one in memory at a time")
    training, skeleton = recipe.training, open_skeleton(source)
    store = _store(training, plan, source.device)
    between = ActivationStore(plan.path.with_name(f"{plan.path.name}.between"), free_memory() / 4 / plan.processes)
    try:
        records = TrainingData(encoded.forget, encoded.retain, encoded.pad_id, source.device).records()
        cache, size = ActivationCache(store), _at_once(training)
        as_tuple = stream_activations(
            skeleton, selection.layers, records, cache, between, pad_id=encoded.pad_id, batch_size=size
        )
    finally:
        between.close()
    _say_where(store, plan)
    for layer in range(selection.layers[0], selection.target_layer + 1):
        skeleton.load(layer)
    return skeleton.model, dataclasses.replace(plan, streamed=(cache, as_tuple))


def _keep_activations(
    training: TrainingConfig, decoder: SplitDecoder, data: TrainingData, plan: CachePlan
) -> tuple[ActivationCache | None, bool]:
    """Keep the frozen activations of what training reads more than once; tell whether that is all it reads."""
    if plan.streamed is not None:
        cache, as_tuple = plan.streamed
        decoder.rely_on(cache, as_tuple=as_tuple)
        return cache, True
    everything = data.records()
    records = data.repeated(training.steps, training.batch_size) if training.cache == "auto" else everything
    if training.cache == "never" or not records:
        return None, False
    store = _store(training, plan, data.device)
    if plan.resume and plan.path.exists() and not store.reopen(decoder.identity()):
        plan.say(f"{plan.path} is damaged, unfinished or of other weights: activations are computed again")
    before = store.bytes_on_disk
    cache = ActivationCache(store)
    decoder.keep(cache, records, data.pad_id, _at_once(training))
    if store.bytes_on_disk > before:
        store.seal(decoder.identity())
    _say_where(store, plan)
    return cache, len(records) == len(everything)


@dataclass(frozen=True)
class Watch:
    """What is told of a training run while it goes on.

    Attributes:
        checkpoint: given the initial masters and the tensors that will change, says where the state is kept.
        on_step: called after each step.
        on_resume: called once with the number of steps that were already done.
        on_halved: called with the new micro-batch size when memory did not suffice.
    """

    checkpoint: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], CheckpointPlan]
    on_step: Callable[[StepRecord], None]
    on_resume: Callable[[int], None]
    on_halved: Callable[[int], None]


@_memory_errors()
def _train(
    recipe: Recipe,
    training: TrainingConfig,
    decoder: SplitDecoder,
    masters: Mapping[str, Tensor],
    data: TrainingData,
    *,
    loss_mask: LossMask,
    cache: CachePlan,
    own_model: bool = False,
    ranks: Ranks = ALONE,
    checkpoint: CheckpointPlan | None = None,
    watch: Watch | None = None,
) -> Method:
    kept, complete = _keep_activations(training, decoder, data, cache)
    if complete and own_model:
        decoder.release()
    if kept is not None:

        def own_rows(batches: Sequence[Sequence[Encoded]], device: torch.device) -> None:
            kept.fetch_ahead([batch[ranks.rows(len(batch))] for batch in batches], device)

        data = dataclasses.replace(data, ahead=own_rows)
    setup = Setup(decoder, data.first_batches(_at_once(training)), loss_mask, recipe.seed)
    method: Method = entry_of(recipe.method).build(recipe.method, setup)
    train(
        method,
        masters,
        data,
        training,
        seed=recipe.seed,
        hidden_size=decoder.hidden_size,
        layout=Replicas(ranks),
        checkpoint=checkpoint,
        on_step=None if watch is None else watch.on_step,
        on_resume=None if watch is None else watch.on_resume,
        on_halved=None if watch is None else watch.on_halved,
    )
    return method


def _scope(
    recipe: Recipe, model: PreTrainedModel, layers: Sequence[int]
) -> tuple[Adapters | None, str | tuple[str, ...]]:
    """The adapters, put into ``model``, or None; and which parameters of the layers are trained."""
    training = recipe.training
    if training.lora is None:
        return None, training.modules
    return add_adapters(model, training.lora, layers, training.modules, recipe.seed), ADAPTER_TENSORS


@dataclass(frozen=True)
class Unlearned:
    """What training left.

    Attributes:
        tensors: the changed fp32 tensors by name, adapters merged.
        diagnostics: the method's.
        save_adapter: writes the adapters into a folder, given the base model's name; None without adapters.
    """

    tensors: Mapping[str, Tensor]
    diagnostics: Mapping[str, Any]
    save_adapter: Callable[[Path, str], None] | None


def _unlearned(masters: Mapping[str, Tensor], adapters: Adapters | None, diagnostics: Mapping[str, Any]) -> Unlearned:
    if adapters is None:
        return Unlearned(masters, diagnostics, None)
    return Unlearned(
        adapters.merged(masters),
        diagnostics,
        lambda folder, base_model: adapters.save(folder, masters, base_model),
    )


def unlearn_layers(
    recipe: Recipe,
    model: PreTrainedModel,
    encoded: EncodedCorpus,
    selection: LayerSelection,
    *,
    cache: CachePlan,
    watch: Watch,
    ranks: Ranks = ALONE,
) -> Unlearned:
    """Train the selected layers of ``model``.

    Args:
        recipe: method and training settings.
        model: the first ``target + 1`` layers suffice; of no other use afterwards.
        encoded: the corpus.
        selection: which layers.
        cache: where frozen activations are kept beyond the memory for them.
        watch: told of the training.
        ranks: each takes its share of every batch; all hold the same weights.
    """
    adapters, scope = _scope(recipe, model, selection.layers)
    decoder = SplitDecoder(model, selection.layers, scope)
    masters = decoder.masters()
    data = TrainingData(encoded.forget, encoded.retain, encoded.pad_id, model.device)
    plan = watch.checkpoint(masters, masters if adapters is None else adapters.originals())
    method = _train(
        recipe,
        recipe.training,
        decoder,
        masters,
        data,
        loss_mask=encoded.loss_mask,
        cache=cache,
        own_model=True,
        ranks=ranks,
        checkpoint=plan,
        watch=watch,
    )
    return _unlearned(masters, adapters, method.diagnostics())


@_memory_errors()
def unlearn_whole(
    recipe: Recipe,
    model: PreTrainedModel,
    encoded: EncodedCorpus,
    alternatives: Mapping[str, tuple[Encoded, ...]],
    watch: Watch,
    *,
    selection: LayerSelection,
    ranks: Ranks = ALONE,
) -> Unlearned:
    """Train or edit the whole model, or of it the selected layers and the modules that the recipe names.

    Args:
        recipe: method and training settings.
        model: with its head, wherever it is; of no other use afterwards.
        encoded: the corpus.
        alternatives: from :func:`alternatives_of`.
        watch: told of the training.
        selection: which layers.
        ranks: each takes its share of every batch and, where :func:`shards` says so, holds a part of the model.
    """
    training = recipe.training
    adapters, scope = _scope(recipe, model, selection.layers)
    all_layers = isinstance(recipe.selection.layers, str) and len(selection.layers) == number_of_layers(model.config)
    trained_layers = None if all_layers and scope == "all" else selection.layers
    device, sharded = resolve_device(recipe.device), None
    if shards(recipe, model, ranks):
        from falcon_unlearn.methods.sharded_model import ShardedWholeModel

        sharded = ShardedWholeModel(model, device, trained_layers, scope)
    whole = sharded or WholeModel(model.to(device), trained_layers, scope)
    data = TrainingData(encoded.forget, encoded.retain, encoded.pad_id, model.device)
    setup = WholeSetup(
        whole,
        data.first_batches(_at_once(training)),
        alternatives,
        encoded.loss_mask,
        encoded.pad_id,
        recipe.seed,
        len(encoded.retain),
        [item for items in encoded.retain.values() for item in items],
        encoded.begins_word,
    )
    entry = entry_of(recipe.method)
    masters = whole.masters()
    changing = masters if sharded is None else sharded.placeholders()
    plan = watch.checkpoint(masters, changing if adapters is None else adapters.originals())
    method = entry.build(recipe.method, setup)
    if entry.kind == "edit":
        watch.on_resume(0)
        method.edit(data.retain_batches(_at_once(training)), masters)
    else:
        if not method.keeps_reference:
            whole.release()
        train(
            method,
            masters,
            data,
            training,
            seed=recipe.seed,
            hidden_size=whole.hidden_size,
            layout=Replicas(ranks) if sharded is None else Shards(ranks, sharded.sharded),
            checkpoint=plan if sharded is None else None,  # its state lies on all ranks
            on_step=watch.on_step,
            on_resume=watch.on_resume,
            on_halved=watch.on_halved,
        )
    if sharded is not None:
        masters = sharded.whole(keep=ranks.first)
    return _unlearned(masters, adapters, method.diagnostics())


def shards(recipe: Recipe, model: PreTrainedModel, ranks: Ranks) -> bool:
    """Whether each of ``ranks`` holds a part of a model that is trained as a whole.

    Adapters are small and edits rare: there every rank holds all of the model, as it does where the model's parameters
    are not all of one dtype, which FSDP2 wants.
    """
    return (
        ranks.world > 1
        and recipe.training.shard
        and recipe.training.lora is None
        and entry_of(recipe.method).kind == "whole"
        and len({parameter.dtype for parameter in model.parameters()}) == 1
    )


def alternatives_of(recipe: Recipe, encoded: EncodedCorpus, encoder: Encoder) -> dict[str, tuple[Encoded, ...]]:
    """Other answers to the forget questions, of the kind that the method needs, by record.

    Raises:
        UserError: a record is plain text, or there is no other answer to draw.
    """
    kind = entry_of(recipe.method).alternatives
    if kind is None:
        return {}
    retain = [record for name, records in encoded.records.items() if name.startswith("retain.") for record in records]
    limit = min(report.limit for report in encoded.lengths.values())
    if kind == "stand_in":
        assert isinstance(recipe.method, FalconConfig)
        settings = recipe.method.stand_in
        found: dict[str, tuple[Encoded, ...]] = {}
        for domain, items in encoded.forget.items():
            records = encoded.records[f"forget.{domain}"]
            options = stand_ins(
                records, retain, encoder, recipe.seed, count=settings.count, spare=settings.spare, limit=limit
            )
            found |= {record_key(item): option for item, option in zip(items, options, strict=True)}
        return found
    return {
        record_key(item): dont_know(record, encoder, recipe.seed, limit=limit)
        if kind == "dont_know"
        else random_answers(record, retain, encoder, recipe.seed, limit=limit)
        for domain, items in encoded.forget.items()
        for item, record in zip(items, encoded.records[f"forget.{domain}"], strict=True)
    }


def describe_training(recipe: Recipe, hidden_size: int) -> str:
    """One line: steps, batch, optimiser and the learning rate in force."""
    training = recipe.training
    what = f"{recipe.method.name} ({recipe.method.preset})"
    if entry_of(recipe.method).kind == "edit":
        return f"{what}, {training.modules}"
    rate = learning_rate(training.optimizer, hidden_size)
    lora = "" if training.lora is None else f", LoRA of rank {training.lora.rank}"
    return (
        f"{what}, {training.steps} steps of {training.batch_size}, {training.optimizer.name} at {rate:.2g}, "
        f"{training.modules}{lora}"
    )


def with_sets(scores: Sequence[SampleScore]) -> dict[str, list[SampleScore]]:
    """Group sample scores by their set, in order."""
    sets: dict[str, list[SampleScore]] = {}
    for score in scores:
        sets.setdefault(score.set, []).append(score)
    return sets
