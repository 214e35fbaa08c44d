"""What a recipe will take: peak memory and FLOPs of each stage, from the model's config and the shapes of the data.

No weight is read or fetched. Lengths are those of the encoded records where corpus and tokenizer are at hand, else
one length is assumed for all and said so. Matrix products are counted as in :mod:`falcon_unlearn.model.cost`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from falcon_unlearn.corpus.batching import Batch, Encoded, Encoder, length_sorted_batches
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.corpus.sources import SourceConfig, load_corpus
from falcon_unlearn.engine.optimizers import build_optimizer
from falcon_unlearn.engine.trainer import TrainingConfig, TrainingData
from falcon_unlearn.errors import UserError
from falcon_unlearn.evaluation.scoring import MAX_TEXT_ANSWER_TOKENS
from falcon_unlearn.methods import FalconConfig, RmuConfig
from falcon_unlearn.model.cost import (
    BatchShape,
    Objective,
    PerRecord,
    StepMemory,
    blueprint,
    extraction_peak,
    generation_peak,
    head_flops,
    layers_flops,
    scoring_peak,
    shape_of,
    step_flops,
    step_memory,
    tensor_bytes,
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
from falcon_unlearn.objectives.representation import cosine_retention, info_nce, squared_distance
from falcon_unlearn.recipe import Recipe
from falcon_unlearn.selection.sweep import spaced_candidates
from falcon_unlearn.stages import (
    EncodedCorpus,
    activation_samples,
    encode_corpus,
    evaluation_sets,
    validation_parts,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_ASSUMED_LENGTH = 512
_ASSUMED_RECORDS = 400
_GENERATION_SLACK = 8  # as evaluation.scoring
_SETUP_TOKENS = 8192  # as methods.rmu


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
    """

    model: str
    device: str
    dtype: str
    stages: tuple[StageEstimate, ...]
    training: Mapping[str, int]
    assumptions: tuple[str, ...]
    process_bytes: int | None


@dataclass(frozen=True)
class _Scored:
    """What scoring runs for one set: answers to give probabilities to, and prompts to continue."""

    sequences: tuple[Encoded, ...]
    prompts: tuple[Encoded, ...]
    new_tokens: int


@dataclass(frozen=True)
class _Inputs:
    recipe: Recipe
    config: PreTrainedConfig
    device: str
    dtype: torch.dtype
    encoded: EncodedCorpus
    sets: Mapping[str, _Scored]
    layers: tuple[int, ...]
    candidates: tuple[int, ...]
    assumptions: tuple[str, ...]


def estimate_run(recipe: Recipe) -> Estimate:
    """Predict every stage of ``falcon-unlearn run``.

    Raises:
        UserError: the recipe's model or data cannot be read, or the architecture is not known.
    """
    _predictable(recipe)
    inputs = _read(recipe)
    whole = blueprint(inputs.config, inputs.dtype, trust_remote_code=recipe.trust_remote_code)
    selection = _selection(inputs, whole)
    training, parts, patch = _training(inputs)
    stages = [*selection, training, patch]
    if recipe.evaluation.enabled:
        scoring = _scoring(inputs, whole)
        after = _named(scoring, "score after", extra=patch.disk_bytes // 2)
        stages = [_named(scoring, "score before"), *stages, after]
        if recipe.evaluation.oracle is not None:
            stages.append(_named(scoring, "score oracle"))
    return _estimate(inputs, stages, parts)


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
    encoded, sets = _data(recipe, source, config, assumptions)
    settings, total = recipe.selection, number_of_layers(config)
    candidates = settings.candidates or spaced_candidates(total, settings.max_candidates)
    if settings.layers == "auto":
        target = max(candidates)
        layers = tuple(range(max(0, target - settings.span + 1), target + 1))
        assumptions.append(
            f"layers are chosen in the run; training is predicted for the highest candidate, {target}, which takes most"
        )
    else:
        layers = tuple(range(total)) if settings.layers == "all" else tuple(sorted(settings.layers))
    highest = max((*layers, *candidates))
    if highest >= total:
        raise UserError(f"selection: layer {highest} is out of range, {recipe.model} has layers 0..{total - 1}")
    if settings.streaming == "always" and settings.selector == "mutual_information":
        assumptions.append("extraction is predicted with the model in memory; streamed, it takes one layer at a time")
    return _Inputs(recipe, config, device, dtype, encoded, sets, layers, candidates, tuple(assumptions))


def _checkpoint_dtype(config: PreTrainedConfig) -> torch.dtype:
    found = getattr(config, "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _data(
    recipe: Recipe, source: ModelSource, config: PreTrainedConfig, assumptions: list[str]
) -> tuple[EncodedCorpus, dict[str, _Scored]]:
    """The data as tokens, or as many tokens as are assumed."""
    absent = [name for name in _sources(recipe) if not Path(name).exists()]
    try:
        tokenizer = load_tokenizer(source)
    except UserError:
        absent.append("the tokenizer")
    if absent:
        return _assumed_data(recipe, config, absent[0], assumptions)
    encoder = Encoder(tokenizer, template=recipe.corpus.template, plain_template=recipe.corpus.plain_template)
    corpus = load_corpus(recipe.corpus, Path.cwd())
    with quiet_transformers():
        encoded = encode_corpus(recipe, corpus, encoder, config)
        limit = context_length(config)
        sets = {
            name: _scored(recipe, encoder, records, limit)
            for name, records in evaluation_sets(recipe, corpus, Path.cwd()).items()
        }
    return encoded, sets


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

    def records(side: str) -> list[Encoded]:
        return [Encoded((*range(length - 1), i), length // 2) for i in range(count)]

    def domains(side: str, value: SourceConfig | dict[str, SourceConfig]) -> dict[str, list[Encoded]]:
        return {name: records(side) for name in ([side] if isinstance(value, SourceConfig) else value)}

    sides = {"forget": domains("forget", recipe.corpus.forget), "retain": domains("retain", recipe.corpus.retain)}
    groups = {f"{side}.{name}": [str(i) for i in range(count)] for side, found in sides.items() for name in found}
    mask = recipe.corpus.loss_mask or "answer"
    encoded = EncodedCorpus(sides["forget"], sides["retain"], groups, {}, {}, mask, pad_id=0)
    one = tuple(records("evaluation"))
    prompts = tuple(Encoded(item.ids[: item.answer_start], item.answer_start) for item in one)
    new_tokens = min(recipe.evaluation.max_new_tokens, length - length // 2 + _GENERATION_SLACK)
    names = ("forget", "retain", *recipe.evaluation.utility)
    return encoded, {name: _Scored(one, prompts, new_tokens) for name in names}


def _scored(recipe: Recipe, encoder: Encoder, records: Sequence[Record], limit: int | None) -> _Scored:
    """The sequences that :func:`~falcon_unlearn.evaluation.scoring.score_set` makes of ``records``."""
    answers: list[Encoded] = []
    others: list[Encoded] = []
    prompts: list[Encoded] = []
    for record in records:
        answer = encoder.encode(record)
        if record.kind == "text":
            ids = answer.ids[:limit]
            start = (len(ids) + 1) // 2
            answer = Encoded(ids[: start + MAX_TEXT_ANSWER_TOKENS], start)
        answers.append(answer)
        prompts.append(Encoded(answer.ids[: answer.answer_start], answer.answer_start))
        wrong, paraphrase = record.perturbed_answers, record.paraphrased_answer
        others += [encoder.encode(record, answer=text) for text in wrong]
        if wrong and paraphrase is not None:
            others.append(encoder.encode(record, answer=paraphrase))
        if record.heldout_question is not None and record.kind != "text":
            held = encoder.encode(record, question=record.heldout_question)
            prompts.append(Encoded(held.ids[: held.answer_start], held.answer_start))
    longest = max((len(answer) - answer.answer_start for answer in answers), default=0)
    kept = tuple(item for item in (*answers, *others) if limit is None or len(item) <= limit)
    return _Scored(kept, tuple(prompts), min(recipe.evaluation.max_new_tokens, longest + _GENERATION_SLACK))


# --- stages ------------------------------------------------------------------------------------------------------


def _batches(records: Sequence[Encoded], size: int) -> list[list[Encoded]]:
    return [[records[i] for i in indices] for indices in length_sorted_batches(records, size)]


def _width(batch: Sequence[Encoded]) -> int:
    return max(len(item) for item in batch)


def _answer_positions(batch: Sequence[Encoded]) -> int:
    """Columns from the one before the first answer on, as scoring asks for logits."""
    return _width(batch) - max(min(item.answer_start for item in batch), 1) + 1


def _forward_flops(batches: Iterable[Sequence[Encoded]], flops: PerRecord) -> int:
    return sum(len(batch) * flops(_width(batch)) for batch in batches)


def _probability_flops(batches: Iterable[Sequence[Encoded]], flops: PerRecord, head: int) -> int:
    return sum(len(batch) * (flops(_width(batch)) + head * _answer_positions(batch)) for batch in batches)


def _probability_peak(model: PreTrainedModel, batches: Sequence[Sequence[Encoded]]) -> int:
    """Of the batch with most positions, and of that with most logits."""
    largest = {
        id(max(batches, key=measure)): max(batches, key=measure)
        for measure in (lambda b: len(b) * _width(b), lambda b: len(b) * _answer_positions(b))
    }
    peaks = []
    for batch in largest.values():
        tokens = sum(len(item) - max(item.answer_start, 1) for item in batch)
        shape = BatchShape(len(batch), _width(batch), tokens, min(map(len, batch)) < _width(batch))
        peaks.append(scoring_peak(model, shape, positions=_answer_positions(batch)))
    return max(peaks)


def _scoring(inputs: _Inputs, whole: PreTrainedModel) -> StageEstimate:
    size = inputs.recipe.evaluation.batch_size
    flops, head = layers_flops(whole), head_flops(whole)
    total, peak, generated = 0, tensor_bytes(whole), 0
    for scored in inputs.sets.values():
        batches = _batches(scored.sequences, size)
        total += _probability_flops(batches, flops, head)
        if batches:
            peak = max(peak, _probability_peak(whole, batches))
        new = scored.new_tokens
        prompts = _batches([prompt for prompt in scored.prompts if len(prompt)], size)
        for batch in prompts:
            width = _width(batch)
            steps = sum(flops.next_token(length) for length in range(width + 1, width + new))
            total += len(batch) * (flops(width) + steps + head * new)
        if prompts and new:
            longest = max(prompts, key=lambda batch: len(batch) * _width(batch))
            peak = max(peak, generation_peak(whole, len(longest), _width(longest) + new))
        generated = max(generated, new)
    sequences = sum(len(scored.sequences) for scored in inputs.sets.values())
    prompts_count = sum(len(scored.prompts) for scored in inputs.sets.values())
    return StageEstimate(
        "score",
        peak,
        total,
        0,
        f"{sequences} answers, {prompts_count} prompts of up to {generated} new tokens (FLOPs: all of them), "
        f"batches of {size}, logits of {text_config(inputs.config).vocab_size} words",
    )


def _predictable(recipe: Recipe) -> FalconConfig | RmuConfig:
    if recipe.training.lora is not None:
        raise UserError("--estimate does not predict adapters; leave training.lora out for an upper bound")
    if isinstance(recipe.method, FalconConfig | RmuConfig):
        return recipe.method
    raise UserError(f"--estimate predicts the methods falcon and rmu, not {recipe.method.name}")


def _objectives(inputs: _Inputs, *, whole_batch: bool) -> tuple[Objective, Objective]:
    """Forget and retain loss; ``whole_batch``: as memory is, else only what is linear in the tokens."""
    method = _predictable(inputs.recipe)
    vector = torch.empty(text_config(inputs.config).hidden_size, device="meta")
    if isinstance(method, RmuConfig):
        return (lambda updated, _: squared_distance(updated, vector)), squared_distance
    shared = whole_batch and method.negatives == "batch"

    def contrast(updated: Tensor, frozen: Tensor) -> Tensor:
        return info_nce(updated, vector, frozen if shared else frozen[:, None], method.temperature)

    return contrast, cosine_retention


@dataclass(frozen=True)
class _Training:
    """A training run without the model: its cached records, FLOPs, and the shapes that take most."""

    flops: int
    forget: BatchShape
    retain: BatchShape
    micro_batches: bool
    cache_bytes: int
    complete: bool
    setup_tokens: int


def _walk(
    inputs: _Inputs,
    training: TrainingConfig,
    data: TrainingData,
    flops: Callable[[], tuple[PerRecord, PerRecord]],
) -> _Training:
    """Go through the batches of a run as the trainer does."""
    recipe, mask, method = inputs.recipe, inputs.encoded.loss_mask, _predictable(inputs.recipe)
    frozen, trained = flops()
    size = training.micro_batch_size or training.batch_size
    records: list[Encoded] = []
    if training.cache != "never":
        records = data.repeated(training.steps, training.batch_size) if training.cache == "auto" else data.records()
    cached = {item.ids for item in records}
    total = _forward_flops(_batches(list({item.ids: item for item in records}.values()), size), frozen)

    def prefix(batch: Batch) -> int:
        in_cache = all(item.ids in cached for item in batch.records)
        return 0 if in_cache else len(batch) * frozen(batch.input_ids.shape[1])

    setup_tokens = 0
    most = method.offset_tokens if isinstance(method, FalconConfig) else _SETUP_TOKENS
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
    micro_batches = False
    for step in range(training.steps):
        _, *sides = data.at(step, training.batch_size, recipe.seed)
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
    tokens = sum(map(len, cached))
    cache = 2 * tokens * text_config(inputs.config).hidden_size * inputs.dtype.itemsize
    if training.cache_gb is not None:
        cache = min(cache, int(training.cache_gb * 2**30))
    complete = bool(records) and len(records) == len(data.records())
    return _Training(total, forget, retain, micro_batches, cache, complete, setup_tokens)


def _measure(shape: BatchShape) -> tuple[int, bool, int]:
    return shape.records * shape.length, shape.padded, shape.tokens


def _step_memory(
    inputs: _Inputs, model: PreTrainedModel, layers: Sequence[int], run: _Training, *, cached: bool
) -> StepMemory:
    training = inputs.recipe.training
    hidden = text_config(inputs.config).hidden_size

    def optimizer(masters: Sequence[Tensor]) -> torch.optim.Optimizer:
        made = build_optimizer(training.optimizer, masters, hidden_size=hidden, batch_size=training.batch_size)
        for group in made.param_groups:
            if "foreach" in group:  # torch's own choice on CUDA, which it cannot make on meta
                group["foreach"] = inputs.device == "cuda"
        return made

    return step_memory(
        model,
        layers,
        training.modules,
        run.forget,
        run.retain,
        objectives=_objectives(inputs, whole_batch=True),
        optimizer=optimizer,
        micro_batches=run.micro_batches,
        cached=cached,
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
    inputs: _Inputs, model: PreTrainedModel, layers: Sequence[int]
) -> Callable[[], tuple[PerRecord, PerRecord]]:
    objective, _ = _objectives(inputs, whole_batch=False)
    found = step_flops(model, layers, inputs.recipe.training.modules, objective)
    return lambda: (found.frozen, found.trained)


def _training(inputs: _Inputs) -> tuple[StageEstimate, dict[str, int], StageEstimate]:
    recipe, encoded, target = inputs.recipe, inputs.encoded, inputs.layers[-1]
    model = blueprint(inputs.config, inputs.dtype, layers=target + 1, trust_remote_code=recipe.trust_remote_code)
    data = TrainingData(encoded.forget, encoded.retain, encoded.pad_id, torch.device("cpu"))
    run = _walk(inputs, recipe.training, data, _flops_of(inputs, model, inputs.layers))
    memory = _step_memory(inputs, model, inputs.layers, run, cached=run.complete)
    in_memory = run.cache_bytes if inputs.device == "cpu" else 0
    decoder = SplitDecoder(model, inputs.layers, recipe.training.modules)
    masters = decoder.masters()
    filling = extraction_peak(model, max(run.forget, run.retain, key=_measure)) + memory.masters
    setup = memory.weights + memory.masters + _setup_bytes(inputs, run)
    peak = max(memory.peak, setup, filling if run.cache_bytes else 0) + in_memory
    parts = {
        "frozen weights": memory.weights,
        "fp32 masters": memory.masters,
        "optimizer state": memory.optimizer,
        "waiting gradients": memory.gradients,
        "activations, casts, new gradients": memory.activations,
    }
    if in_memory:
        parts["activation cache"] = in_memory
    stored = sum(value.numel() for value in masters.values()) * _checkpoint_dtype(inputs.config).itemsize
    layers = ", ".join(map(str, inputs.layers))
    shape = run.forget
    training = StageEstimate(
        "training",
        peak,
        run.flops,
        memory.masters + memory.optimizer,
        f"layers {layers} ({recipe.training.modules}), {recipe.training.steps} steps, longest batch "
        f"{shape.records} x {shape.length}, " + ("cached" if run.cache_bytes else "no cache"),
    )
    patch = StageEstimate(
        "patch", memory.weights + memory.masters, 0, 2 * stored, f"{len(masters)} tensors, before and after"
    )
    return training, parts, patch


def _selection(inputs: _Inputs, whole: PreTrainedModel) -> list[StageEstimate]:
    recipe, settings = inputs.recipe, inputs.recipe.selection
    if settings.layers != "auto":
        return []
    stages: list[StageEstimate] = []
    if settings.selector == "mutual_information" or settings.show_mutual_information:
        stages.append(_extraction(inputs, whole))
    if settings.selector != "sweep":
        return stages
    encoded, size = inputs.encoded, recipe.evaluation.batch_size
    parts, held = validation_parts(inputs.recipe, inputs.encoded)
    validation = [batch for records in held.values() for batch in _batches(records, size)]
    probability = _probability_flops(validation, layers_flops(whole), head_flops(whole))
    peak = _probability_peak(whole, validation)
    total = probability * (1 + len(inputs.candidates))
    trials = recipe.training.model_copy(update={"steps": settings.sweep.steps})
    data = TrainingData(parts["forget"], parts["retain"], encoded.pad_id, torch.device("cpu"))
    for target in inputs.candidates:
        layers = range(max(0, target - settings.span + 1), target + 1)
        run = _walk(inputs, trials, data, _flops_of(inputs, whole, layers))
        total += run.flops
        if target == max(inputs.candidates):  # the weights are the same for all, the forward pass is the longest
            memory = _step_memory(inputs, whole, layers, run, cached=False)
            in_memory = run.cache_bytes if inputs.device == "cpu" else 0
            setup = memory.weights + memory.masters + _setup_bytes(inputs, run)
            peak = max(peak, max(memory.peak, setup) + in_memory)
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


def _extraction(inputs: _Inputs, whole: PreTrainedModel) -> StageEstimate:
    """One pass over a sample, up to the highest candidate; the estimator itself, in fp64 on the CPU, is not counted."""
    recipe = inputs.recipe
    sample = [record for part in activation_samples(recipe, inputs.encoded) for record in part]
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
    means = rows * len(inputs.candidates) * text_config(inputs.config).hidden_size * 4
    return StageEstimate(
        "layer selection: activations",
        unused + extraction_peak(used, shape) + (means if inputs.device == "cpu" else 0),
        _forward_flops(batches, layers_flops(used)),
        0,
        f"{rows} records once; the estimate of mutual information itself is not counted",
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
    if not estimate.stages:
        lines.append("nothing to select: the recipe names its layers")
    lines += ["", *(f"assumed: {text}" for text in estimate.assumptions)]
    process = "" if estimate.process_bytes is None else f" (this process: {_bytes(estimate.process_bytes)})"
    lines.append(
        f"not included: Python and its libraries{process}, workspaces inside kernels, what an allocator keeps; "
        "a matrix product counts 2 m n k, element-wise work nothing"
    )
    return "\n".join(lines)
