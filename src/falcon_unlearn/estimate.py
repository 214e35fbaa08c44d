"""What a recipe will take: peak memory and FLOPs of each stage, from the model's config and the shapes of the data.

No weight is read or fetched. Lengths are those of the encoded records where corpus and tokenizer are at hand, else
one length is assumed for all and said so. Matrix products are counted as in :mod:`falcon_unlearn.model.cost`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from falcon_unlearn.corpus.batching import Batch, Encoded, Encoder, LossMask, collate, length_sorted_batches
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.corpus.sources import SourceConfig, load_corpus
from falcon_unlearn.engine.optimizers import build_optimizer
from falcon_unlearn.engine.trainer import TrainingConfig, TrainingData
from falcon_unlearn.errors import UserError
from falcon_unlearn.evaluation.log_probabilities import PrefixTree, planned_passes
from falcon_unlearn.evaluation.scoring import text_halves
from falcon_unlearn.methods import FalconConfig, RmuConfig, ScrubConfig, WholeModel, WholeSetup, entry_of
from falcon_unlearn.methods.falcon_whole import aligned, passed_together
from falcon_unlearn.methods.whole_model import Pass
from falcon_unlearn.model.activation_cache import record_key
from falcon_unlearn.model.cost import (
    BatchShape,
    Objective,
    PerRecord,
    StepMemory,
    attention_mask,
    blueprint,
    extraction_peak,
    generation_peak,
    gradients_of,
    head_flops,
    layers_flops,
    metered,
    scoring_peak,
    shape_of,
    step_flops,
    step_memory,
    tensor_bytes,
    training_memory,
)
from falcon_unlearn.model.decoder import SplitDecoder
from falcon_unlearn.model.loading import (
    ModelSource,
    context_length,
    load_config,
    load_tokenizer,
    number_of_layers,
    quiet_transformers,
    resolve_device,
    resolve_model,
    text_config,
)
from falcon_unlearn.model.lora import ADAPTER_TENSORS, add_adapters
from falcon_unlearn.objectives.representation import cosine_retention, info_nce, squared_distance
from falcon_unlearn.recipe import Recipe
from falcon_unlearn.selection.selectors import SEPARATIONS, WHOLE_MODEL_SELECTORS, middle
from falcon_unlearn.selection.sweep import spaced_candidates
from falcon_unlearn.stages import (
    EncodedCorpus,
    activation_samples,
    alternatives_of,
    compared_records,
    encode_corpus,
    evaluation_sets,
    validation_parts,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_ASSUMED_LENGTH = 512
_ASSUMED_RECORDS = 400
_SETUP_TOKENS = 8192  # as methods.rmu
_META = torch.device("meta")


@dataclass(frozen=True)
class StageEstimate:
    """One stage: bytes at its peak on the device, FLOPs, bytes it leaves on disk, and what these follow from."""

    stage: str
    peak_bytes: int
    flops: int
    disk_bytes: int
    depends_on: str


@dataclass(frozen=True)
class Estimate:
    """The prediction for a recipe.

    Attributes:
        model: its name.
        device: type of device the memory is predicted for.
        dtype: of the frozen weights.
        stages: in the order they run.
        training: the parts of the training peak, by name, largest first; empty where nothing is trained.
        assumptions: what was not known, one sentence each.
        process_bytes: what this process takes now, Python and libraries, which no stage's peak includes.
        host_bytes: kept activations, where they lie in host memory and the stages' peaks are those of another device.
    """

    model: str
    device: str
    dtype: str
    stages: tuple[StageEstimate, ...]
    training: Mapping[str, int]
    assumptions: tuple[str, ...]
    process_bytes: int | None
    host_bytes: int = 0


@dataclass(frozen=True)
class _Scored:
    """What scoring runs for one set: answers to give probabilities to, by question, and prompts to continue."""

    groups: tuple[tuple[Encoded, ...], ...]
    prompts: tuple[Encoded, ...]


@dataclass(frozen=True)
class _Inputs:
    recipe: Recipe
    config: PreTrainedConfig
    device: str
    dtype: torch.dtype
    encoded: EncodedCorpus
    alternatives: Mapping[str, tuple[Encoded, ...]]
    sets: Mapping[str, _Scored]
    layers: tuple[int, ...]
    candidates: tuple[int, ...]
    assumptions: tuple[str, ...]


def estimate_run(recipe: Recipe, *, work: bool = True) -> Estimate:
    """Predict every stage of ``falcon-unlearn run``.

    Args:
        recipe: validated.
        work: count the FLOPs of training the whole model, which takes several times as long as its memory; else 0.

    Raises:
        UserError: the recipe's model or data cannot be read, or the architecture is not known.
    """
    _predictable(recipe)
    inputs = _read(recipe)
    whole = blueprint(inputs.config, inputs.dtype, trust_remote_code=recipe.trust_remote_code)
    selection = _selection(inputs, whole)
    sampling, inputs = _self_sampling(inputs, whole), _with_assumed_samples(inputs)
    host = 0
    if _is_whole(recipe):
        with _scope(inputs, whole, inputs.layers) as scope:
            training, parts, patch = _whole_training(inputs, whole, scope, work=work)
    else:
        training, parts, patch, host = _layer_training(inputs)
    stages = [*selection, *sampling, training, patch]
    if recipe.evaluation.enabled:
        scoring = _scoring(inputs, whole)
        after = _named(scoring, "score after", extra=patch.disk_bytes // 2)
        stages = [_named(scoring, "score before"), *stages, after]
        if recipe.evaluation.oracle is not None:
            stages.append(_named(scoring, "score oracle"))
    return dataclasses.replace(_estimate(inputs, stages, parts), host_bytes=host)


def estimate_layers(recipe: Recipe) -> Estimate:
    """Predict ``falcon-unlearn layers``; raises as :func:`estimate_run`."""
    _predictable(recipe)
    inputs = _read(recipe)
    whole = blueprint(inputs.config, inputs.dtype, trust_remote_code=recipe.trust_remote_code)
    return _estimate(inputs, _selection(inputs, whole), {})


def _estimate(inputs: _Inputs, stages: Sequence[StageEstimate], parts: Mapping[str, int]) -> Estimate:
    ordered = dict(sorted(parts.items(), key=lambda item: -item[1]))
    name = str(inputs.dtype).removeprefix("torch.")
    return Estimate(
        inputs.recipe.model, inputs.device, name, tuple(stages), ordered, inputs.assumptions, _resident_bytes()
    )


def _named(stage: StageEstimate, name: str, extra: int = 0) -> StageEstimate:
    return StageEstimate(name, stage.peak_bytes + extra, stage.flops, stage.disk_bytes, stage.depends_on)


def _resident_bytes() -> int | None:
    """Largest resident size of this process so far; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- what the recipe names ---------------------------------------------------------------------------------------


def _read(recipe: Recipe) -> _Inputs:
    source = resolve_model(
        recipe.model,
        Path.cwd(),
        device="cpu",
        dtype=recipe.dtype,
        trust_remote_code=recipe.trust_remote_code,
        weights=False,
    )
    config = load_config(source)
    device = resolve_device("auto").type if recipe.device == "auto" else recipe.device.split(":")[0]
    dtype = source.dtype
    if recipe.dtype == "auto":
        dtype = torch.float32 if device == "cpu" else _checkpoint_dtype(config)
    assert dtype is not None
    assumptions: list[str] = []
    encoded, alternatives, sets = _data(recipe, source, config, assumptions)
    settings, total = recipe.selection, number_of_layers(config)
    candidates = settings.candidates or spaced_candidates(total, settings.max_candidates)
    whole = _is_whole(recipe)
    if settings.layers == "all" or (settings.layers == "auto" and whole and settings.selector == "sweep"):
        layers = tuple(range(total))
    elif settings.layers == "auto" and settings.selector == "middle":
        target = middle(candidates, total)
        layers = tuple(range(max(0, target - settings.span + 1), target + 1))
    elif settings.layers == "auto":
        # The first layers of a model end at the target; in a whole one gradients pass all that is above.
        which, target = ("lowest", min(candidates)) if whole else ("highest", max(candidates))
        layers = tuple(range(max(0, target - settings.span + 1), target + 1))
        assumptions.append(
            f"layers are chosen in the run; training is predicted for the {which} candidate, {target}, which takes most"
        )
    else:
        layers = tuple(sorted(settings.layers))
    highest = max((*layers, *candidates))
    if highest >= total:
        raise UserError(f"selection: layer {highest} is out of range, {recipe.model} has layers 0..{total - 1}")
    if settings.layers == "auto" and settings.selector == "gradient_conflict":
        assumptions.append("the selector's gradients, one pass over a sample of both sides, are not predicted")
    if settings.streaming == "always" and settings.selector not in WHOLE_MODEL_SELECTORS:
        assumptions.append("extraction is predicted with the model in memory; streamed, it takes one layer at a time")
    return _Inputs(recipe, config, device, dtype, encoded, alternatives, sets, layers, candidates, tuple(assumptions))


def _checkpoint_dtype(config: PreTrainedConfig) -> torch.dtype:
    found = getattr(config, "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _data(
    recipe: Recipe, source: ModelSource, config: PreTrainedConfig, assumptions: list[str]
) -> tuple[EncodedCorpus, dict[str, tuple[Encoded, ...]], dict[str, _Scored]]:
    """The corpus, the alternatives that the method needs and the sets, as tokens or as many as are assumed."""
    absent = [name for name in _sources(recipe) if not Path(name).exists()]
    try:
        tokenizer = load_tokenizer(source)
    except UserError:
        absent.append("the tokenizer")
    if absent:
        encoded, sets = _assumed_data(recipe, config, absent[0], assumptions)
        forget = (record for records in encoded.forget.values() for record in records)
        return encoded, {record_key(record): (record,) for record in forget}, sets
    encoder = Encoder(tokenizer, template=recipe.corpus.template, plain_template=recipe.corpus.plain_template)
    corpus = load_corpus(recipe.corpus, Path.cwd())
    with quiet_transformers():
        encoded = encode_corpus(recipe, corpus, encoder, config)
        alternatives = alternatives_of(recipe, encoded, encoder)
        limit = context_length(config)
        sets = {
            name: _scored(recipe, encoder, records, limit)
            for name, records in evaluation_sets(recipe, corpus, Path.cwd()).items()
        }
    return encoded, alternatives, sets


def _sources(recipe: Recipe) -> list[str]:
    def listed(domains: SourceConfig | dict[str, SourceConfig] | None) -> Iterable[SourceConfig]:
        if domains is None:
            return []
        return [domains] if isinstance(domains, SourceConfig) else domains.values()

    evaluation = recipe.evaluation
    groups = (recipe.corpus.forget, recipe.corpus.retain, evaluation.forget, evaluation.retain, evaluation.utility)
    return [source.source for group in groups for source in listed(group)]


def _assumed_data(
    recipe: Recipe, config: PreTrainedConfig, absent: str, assumptions: list[str]
) -> tuple[EncodedCorpus, dict[str, _Scored]]:
    limit = context_length(config) or _ASSUMED_LENGTH
    length = min(recipe.corpus.max_length or _ASSUMED_LENGTH, limit)
    given = "corpus.max_length" if recipe.corpus.max_length else "set corpus.max_length for another"
    count = recipe.evaluation.max_records or _ASSUMED_RECORDS
    assumptions.append(
        f"{absent} is not here: {count} records of {length} tokens ({given}) are assumed on each side, half of each "
        "its answer"
    )

    numbers = itertools.count()  # all records differ, in whatever domain

    def records(side: str) -> list[Encoded]:
        return [Encoded((*range(length - 1), next(numbers)), length // 2) for _ in range(count)]

    def domains(side: str, value: SourceConfig | dict[str, SourceConfig]) -> dict[str, list[Encoded]]:
        return {name: records(side) for name in ([side] if isinstance(value, SourceConfig) else value)}

    sides = {"forget": domains("forget", recipe.corpus.forget), "retain": domains("retain", recipe.corpus.retain)}
    groups = {f"{side}.{name}": [str(i) for i in range(count)] for side, found in sides.items() for name in found}
    mask = recipe.corpus.loss_mask or "answer"
    encoded = EncodedCorpus(sides["forget"], sides["retain"], groups, {}, {}, mask, pad_id=0)
    one = tuple(records("evaluation"))
    prompts = tuple(Encoded(item.ids[: item.answer_start], item.answer_start) for item in one)
    names = ("forget", "retain", *recipe.evaluation.utility)
    return encoded, {name: _Scored(tuple((item,) for item in one), prompts) for name in names}


def _with_assumed_samples(inputs: _Inputs) -> _Inputs:
    """As training finds the corpus: with retain records over again for those that the model is going to write."""
    encoded = inputs.encoded
    count = inputs.recipe.corpus.self_samples.wanted(sum(map(len, encoded.retain.values())))
    if not count:
        return inputs
    retain = {}
    for position, (name, own) in enumerate(encoded.retain.items()):
        retain[name] = [*own, *(own[i % len(own)] for i in range(position, count, len(encoded.retain)))]
    said = f"the {count} self-samples are taken to be all of use, and as long as the retain records"
    encoded = dataclasses.replace(encoded, retain=retain)
    return dataclasses.replace(inputs, encoded=encoded, assumptions=(*inputs.assumptions, said))


def _scored(recipe: Recipe, encoder: Encoder, records: Sequence[Record], limit: int | None) -> _Scored:
    """The sequences that :func:`~falcon_unlearn.evaluation.scoring.score_set` makes of ``records``."""
    groups: list[tuple[Encoded, ...]] = []
    prompts: list[Encoded] = []
    for record in records:
        answer = encoder.encode(record)
        if record.kind == "text":
            answer = text_halves(answer, limit)
        prompts.append(Encoded(answer.ids[: answer.answer_start], answer.answer_start))
        paraphrase = [] if record.paraphrased_answer is None else [record.paraphrased_answer]
        others = [encoder.encode(record, answer=text) for text in (*paraphrase, *record.perturbed_answers)]
        groups.append(tuple(item for item in (answer, *others) if limit is None or len(item) <= limit))
        if record.heldout_question is not None and record.kind != "text":
            held = encoder.encode(record, question=record.heldout_question)
            prompts.append(Encoded(held.ids[: held.answer_start], held.answer_start))
    return _Scored(tuple(groups), tuple(prompts))


# --- stages ------------------------------------------------------------------------------------------------------


def _batches(records: Sequence[Encoded], size: int) -> list[list[Encoded]]:
    return [[records[i] for i in indices] for indices in length_sorted_batches(records, size)]


def _width(batch: Sequence[Encoded]) -> int:
    return max(len(item) for item in batch)


def _forward_flops(batches: Iterable[Sequence[Encoded]], flops: PerRecord) -> int:
    return sum(len(batch) * flops(_width(batch)) for batch in batches)


def _probability_flops(passes: Iterable[Sequence[PrefixTree]], flops: PerRecord, head: int) -> int:
    return sum(len(trees) * flops(max(map(len, trees))) + head * _predicting(trees) for trees in passes)


def _predicting(trees: Sequence[PrefixTree]) -> int:
    """Positions that logits are made for."""
    return sum(len(tree.predicting) for tree in trees)


def _probability_peak(model: PreTrainedModel, passes: Sequence[Sequence[PrefixTree]]) -> int:
    """Of the pass with most positions, and of that with most logits."""
    largest = {
        id(max(passes, key=measure)): max(passes, key=measure)
        for measure in (lambda trees: len(trees) * max(map(len, trees)), _predicting)
    }
    peaks = []
    for trees in largest.values():
        width, rows = max(map(len, trees)), _predicting(trees)
        shape = BatchShape(len(trees), width, rows, padded=min(map(len, trees)) < width)
        peaks.append(scoring_peak(model, shape))
    return max(peaks)


def _scoring(inputs: _Inputs, whole: PreTrainedModel) -> StageEstimate:
    size = inputs.recipe.evaluation.batch_size
    flops, head = layers_flops(whole), head_flops(whole)
    total, peak, new = 0, tensor_bytes(whole), inputs.recipe.evaluation.max_new_tokens
    for scored in inputs.sets.values():
        passes = planned_passes(whole, scored.groups, size)
        total += _probability_flops(passes, flops, head)
        if passes:
            peak = max(peak, _probability_peak(whole, passes))
        prompts = _batches([prompt for prompt in scored.prompts if len(prompt)], size)
        for batch in prompts:
            width = _width(batch)
            steps = sum(flops.next_token(length) for length in range(width + 1, width + new))
            total += len(batch) * (flops(width) + steps + head * new)
        if prompts:
            longest = max(prompts, key=lambda batch: len(batch) * _width(batch))
            peak = max(peak, generation_peak(whole, len(longest), _width(longest) + new))
    sequences = sum(len(group) for scored in inputs.sets.values() for group in scored.groups)
    prompts_count = sum(len(scored.prompts) for scored in inputs.sets.values())
    return StageEstimate(
        "score",
        peak,
        total,
        0,
        f"{sequences} answers, {prompts_count} prompts of up to {new} new tokens (FLOPs: all of them), "
        f"batches of {size}, logits of {text_config(inputs.config).vocab_size} words",
    )


def _self_sampling(inputs: _Inputs, whole: PreTrainedModel) -> list[StageEstimate]:
    config = inputs.recipe.corpus.self_samples
    count = config.wanted(sum(map(len, inputs.encoded.retain.values())))
    if not count:
        return []
    flops, head, new = layers_flops(whole), head_flops(whole), config.max_new_tokens
    # A question is asked again, as part of a prompt: the second half reads what the first one wrote.
    total = flops(new) + sum(flops.next_token(length) for length in range(1, 2 * new)) + 2 * new * head
    peak = generation_peak(whole, min(config.batch_size, count), 2 * new)
    what = f"{count} questions and answers of up to {new} tokens each (FLOPs: all of them)"
    return [StageEstimate("self-samples", peak, count * total, 0, what)]


def _is_whole(recipe: Recipe) -> bool:
    return entry_of(recipe.method).kind == "whole"


def _predictable(recipe: Recipe) -> None:
    # SCRUB's sides take turns: no step has both losses.
    if isinstance(recipe.method, ScrubConfig) or not (
        isinstance(recipe.method, FalconConfig | RmuConfig) or _is_whole(recipe)
    ):
        raise UserError(f"--estimate does not predict the method {recipe.method.name}")


def _objectives(inputs: _Inputs, *, whole_batch: bool) -> tuple[Objective, Objective]:
    """Forget and retain loss; ``whole_batch``: as memory is, else only what is linear in the tokens."""
    method = inputs.recipe.method
    assert isinstance(method, FalconConfig | RmuConfig)
    vector = torch.empty(text_config(inputs.config).hidden_size, device="meta")
    if isinstance(method, RmuConfig):
        return (lambda updated, _: squared_distance(updated, vector)), squared_distance
    shared = whole_batch and method.negatives == "batch"

    def contrast(updated: Tensor, frozen: Tensor) -> Tensor:
        return info_nce(updated, vector, frozen if shared else frozen[:, None], method.temperature)

    return contrast, cosine_retention


@dataclass(frozen=True)
class _Scope:
    """What is trained: the modules as :class:`SplitDecoder` takes them, and the weights adapters are merged into."""

    modules: str | tuple[str, ...]
    merged: Mapping[str, Tensor] | None


@contextlib.contextmanager
def _scope(inputs: _Inputs, model: PreTrainedModel, layers: Sequence[int]) -> Iterator[_Scope]:
    """Inside the block the model has the recipe's adapters, if any."""
    training = inputs.recipe.training
    if training.lora is None:
        yield _Scope(training.modules, None)
        return
    adapters = add_adapters(model, training.lora, layers, training.modules, inputs.recipe.seed)
    try:
        yield _Scope(ADAPTER_TENSORS, adapters.originals())
    finally:
        adapters.remove()


@dataclass(frozen=True)
class _Training:
    """A training run without the model: its cached records, FLOPs, and the shapes that take most.

    ``ahead_bytes`` are the activations of a step that lie on the device before it begins.
    """

    flops: int
    forget: BatchShape
    retain: BatchShape
    micro_batches: bool
    cache_bytes: int
    complete: bool
    setup_tokens: int
    ahead_bytes: int


def _walk(
    inputs: _Inputs,
    training: TrainingConfig,
    data: TrainingData,
    flops: Callable[[], tuple[PerRecord, PerRecord]],
) -> _Training:
    """Go through the batches of a run as the trainer does."""
    recipe, mask, method = inputs.recipe, inputs.encoded.loss_mask, inputs.recipe.method
    frozen, trained = flops()
    size = training.micro_batch_size or training.batch_size
    records: list[Encoded] = []
    if training.cache != "never":
        chosen = training.cache == "auto" and training.streaming != "always"
        records = data.repeated(training.steps, training.batch_size) if chosen else data.records()
    cached = {item.ids for item in records}
    total = _forward_flops(_batches(list({item.ids: item for item in records}.values()), size), frozen)

    def prefix(batch: Batch) -> int:
        in_cache = all(item.ids in cached for item in batch.records)
        return 0 if in_cache else len(batch) * frozen(batch.input_ids.shape[1])

    setup_tokens = 0
    most = method.offset_tokens if isinstance(method, FalconConfig) else _SETUP_TOKENS
    assert isinstance(method, FalconConfig | RmuConfig)
    if isinstance(method, RmuConfig) or method.offset == "paper":
        for batches in data.first_batches(training.batch_size).values():
            count = 0
            for batch in batches:
                total += prefix(batch)
                count += int(batch.loss_mask(mask).sum())
                if count >= most:
                    break
            setup_tokens = max(setup_tokens, min(count, most))

    largest: list[BatchShape | None] = [None, None]
    micro_batches, ahead = False, 0
    for step in range(training.steps):
        _, *sides = data.at(step, training.batch_size, recipe.seed)
        ahead = max(ahead, sum(len(item) for batch in sides for item in batch.records if item.ids in cached))
        for side, whole in enumerate(sides):
            parts = whole.parts(size)
            micro_batches |= len(parts) > 1
            for batch in parts:
                total += prefix(batch) + len(batch) * trained(batch.input_ids.shape[1])
                shape = shape_of(batch, batch.loss_mask(mask))
                known = largest[side]
                if known is None or _measure(shape) > _measure(known):
                    largest[side] = shape
    forget, retain = largest
    assert forget is not None
    assert retain is not None
    of_token = 2 * text_config(inputs.config).hidden_size * inputs.dtype.itemsize
    cache = sum(map(len, cached)) * of_token
    if training.cache_gb is not None:
        cache = min(cache, int(training.cache_gb * 2**30))
    complete = bool(records) and len(records) == len(data.records())
    ahead_bytes = ahead * of_token if inputs.device == "cuda" else 0
    return _Training(total, forget, retain, micro_batches, cache, complete, setup_tokens, ahead_bytes)


def _measure(shape: BatchShape) -> tuple[int, bool, int]:
    return shape.records * shape.length, shape.padded, shape.tokens


def _optimizer(inputs: _Inputs, masters: Sequence[Tensor]) -> torch.optim.Optimizer:
    training, hidden = inputs.recipe.training, text_config(inputs.config).hidden_size
    made = build_optimizer(training.optimizer, masters, hidden_size=hidden, batch_size=training.batch_size)
    for group in made.param_groups:
        if "foreach" in group:  # torch's own choice on CUDA, which it cannot make on meta
            group["foreach"] = inputs.device == "cuda"
    return made


def _step_memory(
    inputs: _Inputs, model: PreTrainedModel, layers: Sequence[int], scope: _Scope, run: _Training, *, cached: bool
) -> StepMemory:
    return step_memory(
        model,
        layers,
        scope.modules,
        run.forget,
        run.retain,
        objectives=_objectives(inputs, whole_batch=True),
        optimizer=partial(_optimizer, inputs),
        micro_batches=run.micro_batches,
        cached=cached,
        interpolation=inputs.recipe.training.interpolation > 0,
    )


def _setup_bytes(inputs: _Inputs, run: _Training) -> int:
    """The factorisation for the offset vector: activations in fp32 and fp64, and the exact way's square matrices."""
    method, hidden = inputs.recipe.method, text_config(inputs.config).hidden_size
    values = run.setup_tokens * int(hidden)
    if isinstance(method, RmuConfig):
        return 8 * values
    smaller = min(run.setup_tokens, int(hidden))
    return 12 * values + 8 * max(values, 4 * smaller**2)


def _flops_of(
    inputs: _Inputs, model: PreTrainedModel, layers: Sequence[int], scope: _Scope
) -> Callable[[], tuple[PerRecord, PerRecord]]:
    objective, _ = _objectives(inputs, whole_batch=False)
    found = step_flops(model, layers, scope.modules, objective)
    return lambda: (found.frozen, found.trained)


def _layer_training(inputs: _Inputs) -> tuple[StageEstimate, dict[str, int], StageEstimate, int]:
    """Training, the parts of its peak, making the patch, and what it keeps in another memory than the device's."""
    recipe, encoded, target = inputs.recipe, inputs.encoded, inputs.layers[-1]
    code = recipe.trust_remote_code
    model = blueprint(inputs.config, inputs.dtype, layers=target + 1, trust_remote_code=code)
    data = TrainingData(encoded.forget, encoded.retain, encoded.pad_id, torch.device("cpu"))
    with _scope(inputs, model, inputs.layers) as scope:
        run = _walk(inputs, recipe.training, data, _flops_of(inputs, model, inputs.layers, scope))
        memory = _step_memory(inputs, model, inputs.layers, scope, run, cached=run.complete)
        masters = SplitDecoder(model, inputs.layers, scope.modules).masters()
    in_memory = run.cache_bytes if inputs.device == "cpu" else 0
    largest = max(run.forget, run.retain, key=_measure)
    if recipe.training.streaming == "always":
        filling = extraction_peak(blueprint(inputs.config, inputs.dtype, layers=1, trust_remote_code=code), largest)
    else:
        filling = extraction_peak(model, largest) + memory.masters
    setup = memory.weights + memory.masters + _setup_bytes(inputs, run)
    peak = max(memory.peak + run.ahead_bytes, setup, filling if run.cache_bytes else 0) + in_memory
    what = f"{_trained(inputs)}, longest batch {run.forget.records} x {run.forget.length}, " + (
        "cached" if run.cache_bytes else "no cache"
    )
    training, parts, patch = _stages_of(inputs, memory, scope.merged or masters, peak=peak, flops=run.flops, what=what)
    if in_memory:
        parts["activation cache"] = in_memory
    if run.ahead_bytes:
        parts["activations fetched ahead"] = run.ahead_bytes
    return training, parts, patch, run.cache_bytes - in_memory


def _trained(inputs: _Inputs) -> str:
    layers, training = ", ".join(map(str, inputs.layers)), inputs.recipe.training
    lora = "" if training.lora is None else f", LoRA of rank {training.lora.rank}"
    return f"layers {layers} ({training.modules}{lora}), {training.steps} steps"


def _stages_of(
    inputs: _Inputs, memory: StepMemory, changed: Mapping[str, Tensor], *, peak: int, flops: int, what: str
) -> tuple[StageEstimate, dict[str, int], StageEstimate]:
    """Training, the parts of its peak, and making the patch of ``changed``, in fp32."""
    parts = {
        "frozen weights": memory.weights,
        "fp32 masters": memory.masters,
        "optimizer state": memory.optimizer,
        "waiting gradients": memory.gradients,
        "activations, casts, new gradients": memory.activations,
    }
    if memory.interpolation:
        parts["copies of the weights (training.interpolation)"] = memory.interpolation
    values = sum(value.numel() for value in changed.values())
    stored, lora = values * _checkpoint_dtype(inputs.config).itemsize, inputs.recipe.training.lora
    merging = 0 if lora is None else 2 * lora.rank * values
    on_device = values
    if lora is not None and inputs.device != "cpu":  # merged one at a time
        on_device = 2 * max(value.numel() for value in changed.values())
    patch = StageEstimate(
        "patch", memory.weights + 4 * on_device, 0, 2 * stored, f"{len(changed)} tensors, before and after"
    )
    training = StageEstimate("training", peak, flops + merging, memory.masters + memory.optimizer, what)
    return training, parts, patch


class _Whole(WholeModel):
    """On the meta device: the head is taken on trust, and padding is told from the records."""

    def run(self, batch: Batch, layers: Sequence[int], masters: Mapping[str, Tensor] | None) -> Pass:
        rows, width = batch.input_ids.shape
        shape = BatchShape(rows, width, 0, padded=min(map(len, batch.records)) < width)
        mask = cast("Tensor", attention_mask(shape, self.model))
        return super().run(dataclasses.replace(batch, attention_mask=mask), layers, masters)

    def _check_head(self) -> None:
        pass


def _whole_setup(
    inputs: _Inputs, whole: WholeModel, forget: Batch, alternatives: Mapping[str, tuple[Encoded, ...]]
) -> WholeSetup:
    encoded, seed = inputs.encoded, inputs.recipe.seed
    return WholeSetup(whole, {"": [forget]}, alternatives, encoded.loss_mask, encoded.pad_id, seed, len(encoded.retain))


def _quantities(batch: Batch, other: Batch | None, mask: LossMask) -> list[int]:
    """What the FLOPs of a loss are linear in: of a batch, and of the alternatives to its records."""
    found: list[int] = []
    for part in (batch,) if other is None else (batch, other):
        rows, width = part.input_ids.shape
        found += [rows * width, rows * width**2, int(part.loss_mask(mask)[:, 1:].sum())]
    return found if other is None else [*found, len(aligned(batch, other).rows)]


# Tokens of a record and of its answer, then of its alternative: as many as there are quantities, and independent.
_PROBES = ((32, 8, 32, 8), (64, 8, 32, 8), (32, 16, 32, 8))
_PROBES_OF_ALTERNATIVES = ((32, 8, 64, 8), (32, 8, 128, 8), (32, 8, 32, 16), (32, 16, 32, 16))


def _whole_flops(inputs: _Inputs, whole: WholeModel) -> dict[str, list[int]]:
    """FLOPs of the set-up, the forget loss and the retain loss, for one of each of :func:`_quantities`."""
    recipe, mask, pad_id = inputs.recipe, inputs.encoded.loss_mask, inputs.encoded.pad_id
    entry, masters = entry_of(recipe.method), whole.masters()
    seen: dict[str, list[tuple[list[int], int]]] = {"setup": [], "forget": [], "retain": []}
    for length, answer, other_length, other_answer in (
        *_PROBES,
        *(_PROBES_OF_ALTERNATIVES if entry.alternatives else ()),
    ):
        own, other = (
            Encoded(tuple(range(tokens)), tokens - counted, tokens - counted)
            for tokens, counted in ((length, answer), (other_length, other_answer))
        )
        batch = collate([own], pad_id)
        both = _quantities(batch, collate([other], pad_id) if entry.alternatives else None, mask)
        with metered(whole.model) as meter:
            moved = batch.to(_META)
            method = entry.build(recipe.method, _whole_setup(inputs, whole, moved, {record_key(own): (other,)}))
            seen["setup"].append((both, meter.flops))
            gradients_of(partial(method.forget_loss, 0, "", moved), masters)
            seen["forget"].append((both, meter.flops - seen["setup"][-1][1]))
            if len(seen["retain"]) < len(_PROBES):
                before = meter.flops
                gradients_of(partial(method.retain_loss, 0, moved), masters)
                seen["retain"].append((_quantities(batch, None, mask), meter.flops - before))
    result = {}
    for name, probes in seen.items():
        quantities, flops = (torch.tensor(values, dtype=torch.float64) for values in zip(*probes, strict=True))
        result[name] = [round(value) for value in torch.linalg.solve(quantities, flops).tolist()]
    return result


def _passed_together(inputs: _Inputs) -> list[Sequence[Encoded]]:
    """The alternatives, as a set-up that runs them cuts them into batches: DPO's those of each record."""
    options: list[Sequence[Encoded]] = list(inputs.alternatives.values())
    if not isinstance(inputs.recipe.method, FalconConfig):
        return options
    return passed_together([each for group in options for each in group])


def _whole_training(
    inputs: _Inputs, model: PreTrainedModel, scope: _Scope, *, work: bool
) -> tuple[StageEstimate, dict[str, int], StageEstimate]:
    """As :func:`_layer_training`, for a method on the whole model: its own losses on the largest batches."""
    recipe, encoded, training = inputs.recipe, inputs.encoded, inputs.recipe.training
    every_layer = isinstance(recipe.selection.layers, str) and len(inputs.layers) == number_of_layers(inputs.config)
    everything = every_layer and scope.modules == "all"
    whole = _Whole(model, None if everything else inputs.layers, scope.modules)
    flops: dict[str, list[int]] = _whole_flops(inputs, whole) if work else {"setup": [], "forget": [], "retain": []}
    entry = entry_of(recipe.method)
    data = TrainingData(encoded.forget, encoded.retain, encoded.pad_id, torch.device("cpu"))
    size = min(training.micro_batch_size or training.batch_size, training.batch_size)
    # Spare stand-ins are for those that the set-up passes over, which is not known here.
    taken = inputs.alternatives
    if isinstance(recipe.method, FalconConfig):
        taken = {key: options[: recipe.method.stand_in.count] for key, options in taken.items()}

    def quantities(side: str, step: int, batch: Batch) -> list[int]:
        other = None
        if entry.alternatives and side == "forget":
            other = _whole_setup(inputs, whole, batch, taken).alternative(step, batch)
        return _quantities(batch, other, encoded.loss_mask)

    def product(each: Sequence[int], counts: Sequence[int]) -> int:
        return sum(a * b for a, b in zip(each, counts, strict=False))

    own = [batch for domain in data.first_batches(size).values() for batch in domain]
    total = sum(product(flops["setup"], _quantities(batch, None, encoded.loss_mask)) for batch in own)
    if entry.alternatives:
        of_alternatives = flops["setup"][len(_PROBES) :]
        mask: LossMask = "answer" if isinstance(recipe.method, FalconConfig) else encoded.loss_mask
        groups = (collate(group, encoded.pad_id) for group in _passed_together(inputs))
        total += sum(product(of_alternatives, _quantities(group, None, mask)) for group in groups)
    largest: dict[str, tuple[list[int], int, Batch]] = {}
    micro_batches = False
    for step in range(training.steps):
        _, *batches = data.at(step, training.batch_size, recipe.seed)
        for side, batch in zip(("forget", "retain"), batches, strict=True):
            parts = batch.parts(size)
            micro_batches |= len(parts) > 1
            for part in parts:
                counts = quantities(side, step, part)
                total += product(flops[side], counts)
                largest[side] = max(largest.get(side, (counts, step, part)), (counts, step, part), key=lambda x: x[0])
    memory, before = _whole_memory(
        inputs, whole, largest["forget"][1:], largest["retain"][1:], micro_batches=micro_batches
    )
    longest = largest["forget"][2].input_ids.shape
    trained = f"all parameters, {training.steps} steps" if everything else _trained(inputs)
    what = f"{trained}, longest batch {longest[0]} x {longest[1]}"
    changed = scope.merged or whole.masters()
    return _stages_of(inputs, memory, changed, peak=max(memory.peak, before), flops=total, what=what)


def _whole_memory(
    inputs: _Inputs, whole: WholeModel, forget: tuple[int, Batch], retain: tuple[int, Batch], *, micro_batches: bool
) -> tuple[StepMemory, int]:
    """Memory of a step, given the number and the batch of both sides, and the peak of the set-up before."""
    entry = entry_of(inputs.recipe.method)
    parameters = dict(whole.model.named_parameters())
    trained = [parameters[name] for name in whole.parameter_names]
    masters = 4 * sum(parameter.numel() for parameter in trained)
    # Those of the batch, and as many more as a set-up takes at once.
    more = len(_passed_together(inputs)[0]) if isinstance(inputs.recipe.method, FalconConfig) else len(forget[1])
    keys = [*map(record_key, forget[1].records), *itertools.islice(inputs.alternatives, more)]
    alternatives = {key: inputs.alternatives[key] for key in keys if key in inputs.alternatives}
    with metered(whole.model) as meter:
        on_forget, on_retain = (batch.to(_META) for _, batch in (forget, retain))
        method = entry.build(inputs.recipe.method, _whole_setup(inputs, whole, on_forget, alternatives))
    memory = training_memory(
        whole.model,
        whole.masters,
        partial(method.forget_loss, forget[0], "", on_forget),
        partial(method.retain_loss, retain[0], on_retain),
        optimizer=partial(_optimizer, inputs),
        micro_batches=micro_batches,
        released=0 if method.keeps_reference else tensor_bytes(trained),
        interpolation=inputs.recipe.training.interpolation > 0,
    )
    return memory, meter.peak + masters


def _selection(inputs: _Inputs, whole: PreTrainedModel) -> list[StageEstimate]:
    recipe, settings = inputs.recipe, inputs.recipe.selection
    if settings.layers != "auto":
        return []
    stages: list[StageEstimate] = []
    if settings.selector == "mutual_information" or settings.show_mutual_information:
        sample = [record for part in activation_samples(recipe, inputs.encoded) for record in part]
        stages.append(_extraction(inputs, whole, sample, "the estimate of mutual information itself"))
    if settings.selector in SEPARATIONS:
        forget, retain, _ = compared_records(recipe, inputs.encoded)
        stages.append(_extraction(inputs, whole, [*forget, *retain], settings.selector))
    if settings.selector != "sweep" or _is_whole(recipe):
        return stages
    encoded, size = inputs.encoded, recipe.evaluation.batch_size
    parts, held = validation_parts(inputs.recipe, inputs.encoded)
    validation = [
        trees for records in held.values() for trees in planned_passes(whole, [[item] for item in records], size)
    ]
    probability = _probability_flops(validation, layers_flops(whole), head_flops(whole))
    peak = _probability_peak(whole, validation)
    total = probability * (1 + len(inputs.candidates))
    trials = recipe.training.model_copy(update={"steps": settings.sweep.steps, "streaming": "auto"})
    data = TrainingData(parts["forget"], parts["retain"], encoded.pad_id, torch.device("cpu"))
    for target in inputs.candidates:
        layers = range(max(0, target - settings.span + 1), target + 1)
        with _scope(inputs, whole, layers) as scope:
            run = _walk(inputs, trials, data, _flops_of(inputs, whole, layers, scope))
        total += run.flops
        if target == max(inputs.candidates):  # the weights are the same for all, the forward pass is the longest
            with _scope(inputs, whole, layers) as scope:
                memory = _step_memory(inputs, whole, layers, scope, run, cached=False)
            in_memory = run.cache_bytes if inputs.device == "cpu" else 0
            setup = memory.weights + memory.masters + _setup_bytes(inputs, run)
            peak = max(peak, max(memory.peak + run.ahead_bytes, setup) + in_memory)
    stages.append(
        StageEstimate(
            "layer selection: sweep",
            peak,
            total,
            0,
            f"{len(inputs.candidates)} candidates x {settings.sweep.steps} steps, "
            f"{sum(map(len, held.values()))} validation records",
        )
    )
    return stages


def _extraction(inputs: _Inputs, whole: PreTrainedModel, sample: Sequence[Encoded], uncounted: str) -> StageEstimate:
    """One pass over a sample, up to the highest candidate; the estimator itself, in fp64 on the CPU, is not counted."""
    recipe = inputs.recipe
    rows, batches = len(sample), _batches(sample, recipe.evaluation.batch_size)
    largest = max(batches, key=lambda batch: len(batch) * _width(batch))
    shape = BatchShape(len(largest), _width(largest), 0, padded=False)  # a causal decoder needs no mask for means
    used = blueprint(
        inputs.config,
        inputs.dtype,
        layers=max(inputs.candidates) + 1,
        trust_remote_code=recipe.trust_remote_code,
    )
    unused = tensor_bytes(whole) - tensor_bytes(used)
    at_once = min(recipe.threads or torch.get_num_threads(), len(batches)) if inputs.device == "cpu" else 1
    peak = tensor_bytes(used) + at_once * (extraction_peak(used, shape) - tensor_bytes(used))
    means = rows * len(inputs.candidates) * text_config(inputs.config).hidden_size * 4
    return StageEstimate(
        "layer selection: activations",
        unused + peak + (means if inputs.device == "cpu" else 0),
        _forward_flops(batches, layers_flops(used)),
        0,
        f"{rows} records once; {uncounted} is not counted",
    )


# --- the table ---------------------------------------------------------------------------------------------------


def _bytes(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _flops(count: int) -> str:
    if not count:
        return "-"
    power = min(max(int(math.log10(count)) // 3, 0), 6)
    return f"{count / 10 ** (3 * power):,.3g} {['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}FLOP"


def estimate_table(estimate: Estimate) -> str:
    """One row a stage, the parts of the training peak, and what was assumed and is not included."""
    rows = [("stage", "peak memory", "work", "on disk", "depends on")]
    for stage in estimate.stages:
        disk = _bytes(stage.disk_bytes) if stage.disk_bytes else "-"
        rows.append((stage.stage, _bytes(stage.peak_bytes), _flops(stage.flops), disk, stage.depends_on))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [f"{estimate.model}, {estimate.dtype} on {estimate.device}; nothing was loaded", ""]
    lines += [
        "  ".join((row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)), row[4])) for row in rows
    ]
    if estimate.training:
        total = sum(estimate.training.values())
        lines += ["", f"a training step at its peak, {_bytes(total)}:"]
        lines += [
            f"  {name:34} {_bytes(size):>12} {size / total:4.0%}" for name, size in estimate.training.items() if size
        ]
    if estimate.host_bytes:
        lines += ["", f"in host memory: {_bytes(estimate.host_bytes)} of kept activations (training.cache_gb)"]
    if not estimate.stages:
        lines.append("nothing to select: the recipe names its layers")
    lines += ["", *(f"assumed: {text}" for text in estimate.assumptions)]
    process = "" if estimate.process_bytes is None else f" (this process: {_bytes(estimate.process_bytes)})"
    lines.append(
        f"not included: Python and its libraries{process}, workspaces inside kernels, what an allocator keeps; "
        "a matrix product counts 2 m n k, element-wise work nothing"
    )
    return "\n".join(lines)
