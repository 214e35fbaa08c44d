"""Run the stages in order, each reading and writing the run folder; with ``resume`` finished stages are read back."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from falcon_unlearn.artifacts import LayerSelection, Metrics, SampleScore, StepRecord, to_plain, write_bytes, write_json
from falcon_unlearn.console import Console
from falcon_unlearn.corpus.batching import Encoded, Encoder
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.corpus.sources import Corpus, content_hash, load_corpus
from falcon_unlearn.engine.trainer import CheckpointPlan, InterruptedTrainingError
from falcon_unlearn.evaluation.metrics import FORGET_SET, compute_metrics
from falcon_unlearn.methods import METHODS
from falcon_unlearn.model.decoder import renamed_to, replaced
from falcon_unlearn.model.disk_names import TORCH_DTYPES, to_disk
from falcon_unlearn.model.loading import (
    ModelSource,
    fetch_weights,
    load_causal_lm,
    load_config,
    load_tokenizer,
    number_of_layers,
    quiet_transformers,
    resolve_model,
    text_config,
)
from falcon_unlearn.model.patch import Patch, read_patch, write_patch
from falcon_unlearn.model.shards import fingerprint, tensor_files, tensor_spans
from falcon_unlearn.model.skeleton import fetch_first_layers, load_first_layers
from falcon_unlearn.recipe import Recipe
from falcon_unlearn.report.html import write_report
from falcon_unlearn.run_folder import WORKING_FILES, RunFolder, open_run_folder, start_run
from falcon_unlearn.stages import (
    CachePlan,
    EncodedCorpus,
    Means,
    Watch,
    alternatives_of,
    as_stored,
    check_layers,
    describe_training,
    encode_corpus,
    evaluation_sets,
    free_memory,
    given_layers,
    resident_means,
    score_model,
    select_layers,
    streamed_means,
    unlearn_layers,
    unlearn_whole,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: where everything is.
        selection: the layers that were trained.
        metrics: ``before``, ``after`` and ``oracle`` (None without one).
        patch: the patch in ``folder/patch``.
    """

    folder: Path
    selection: LayerSelection
    metrics: Mapping[str, Metrics | None]
    patch: Patch


class Interrupted(KeyboardInterrupt):
    """Stopped by the user; the message says how to go on."""


@dataclass
class _Inputs:
    """Everything a recipe names, found, read and checked before anything is written."""

    recipe: Recipe
    source: ModelSource
    config: PreTrainedConfig
    encoder: Encoder
    corpus: Corpus
    encoded: EncodedCorpus
    alternatives: Mapping[str, tuple[Encoded, ...]]
    sets: Mapping[str, Sequence[Record]]
    oracle: ModelSource | None
    on_disk: Mapping[str, Any]  # tensors in use, or all: name on disk -> span
    console: Console
    seconds: dict[str, float] = field(default_factory=dict)
    diagnostics: dict[str, Any] = field(default_factory=dict)

    @property
    def hashes(self) -> dict[str, str]:
        """What a resumed run must still find as it was."""
        return {
            "model": fingerprint(self.source.folder, self.on_disk),
            **({} if self.oracle is None else {"evaluation.oracle": fingerprint(self.oracle.folder)}),
            **{f"corpus.{name}": digest for name, digest in self.corpus.hashes.items()},
            **{f"evaluation.{name}": content_hash(records) for name, records in self.sets.items()},
        }

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Remember how long a stage took."""
        began = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - began, 3)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute with ``count`` threads, and with the caller's number again afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read_inputs(recipe: Recipe, console: Console) -> _Inputs:
    base_dir = Path.cwd()
    corpus = load_corpus(recipe.corpus, base_dir)
    source = resolve_model(
        recipe.model,
        base_dir,
        device=recipe.device,
        dtype=recipe.dtype,
        trust_remote_code=recipe.trust_remote_code,
        weights=False,
    )
    oracle = None
    if recipe.evaluation.enabled and recipe.evaluation.oracle is not None:
        oracle = resolve_model(
            recipe.evaluation.oracle,
            base_dir,
            device=recipe.device,
            dtype=recipe.dtype,
            trust_remote_code=recipe.trust_remote_code,
            key="evaluation.oracle",
        )
    config = load_config(source)
    on_disk = tensor_spans(source.folder, _tensors_in_use(recipe, source))
    check_layers(recipe, config, {name: span.shape for name, span in on_disk.items()})
    encoder = Encoder(
        load_tokenizer(source), template=recipe.corpus.template, plain_template=recipe.corpus.plain_template
    )
    with quiet_transformers():  # long records are our message to give
        encoded = encode_corpus(recipe, corpus, encoder, config)
    alternatives = alternatives_of(recipe, encoded, encoder)
    sets = evaluation_sets(recipe, corpus, base_dir) if recipe.evaluation.enabled else {}
    return _Inputs(recipe, source, config, encoder, corpus, encoded, alternatives, sets, oracle, on_disk, console)


def _tensors_in_use(recipe: Recipe, source: ModelSource) -> set[str] | None:
    """Names of the tensors that this recipe needs of the checkpoint, None for all; of a hub id they are fetched."""
    layers = recipe.selection.layers
    whole = METHODS[recipe.method.name].kind != "representation"
    if recipe.evaluation.enabled or whole or isinstance(layers, str):
        fetch_weights(source)
        return None
    count = min(max(layers) + 1, number_of_layers(load_config(source)))  # too high is a mistake named later
    files = fetch_first_layers(source, count)
    return {name for name, file in tensor_files(source.folder).items() if file in files}


def _corpus_facts(inputs: _Inputs) -> dict[str, Any]:
    return {
        "report": inputs.corpus.report,
        "lengths": inputs.encoded.lengths,
        "template": inputs.encoder.describe(),
        "loss_mask": inputs.encoded.loss_mask,
        "hashes": inputs.hashes,
        "scored_records": {name: len(records) for name, records in inputs.sets.items()},
    }


def _say_corpus(inputs: _Inputs) -> None:
    report, say = inputs.corpus.report, inputs.console.say
    say("corpus: " + ", ".join(f"{count} {name}" for name, count in report.records.items()))
    duplicates = {name: n for name, n in report.duplicates.items() if n}
    if duplicates:
        say("exact duplicates, kept once: " + ", ".join(f"{n} in {name}" for name, n in duplicates.items()))
    if report.overlap:
        say(f"{report.overlap} records stand in both forget and retain: {report.on_overlap}")
    for name, length in inputs.encoded.lengths.items():
        if length.longer:
            out = f", {length.left_out} left out" if length.left_out else ""
            say(f"{name}: {length.longer} records longer than {length.limit} tokens: {length.action}{out}")


def _hash_of(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in tensors.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _fingerprint(inputs: _Inputs, selection: LayerSelection, masters: Mapping[str, Tensor]) -> str:
    """Hash of all that decides a training run: equal fingerprints may share a checkpoint."""
    recipe = inputs.recipe.model_dump(mode="json", include={"corpus", "method", "training", "seed", "dtype"})
    encoded = inputs.encoded  # a chat template may depend on more than the records, such as the date
    tokens = [[item.ids for item in items] for side in (encoded.forget, encoded.retain) for items in side.values()]
    parts = [recipe, dict(inputs.corpus.hashes), tokens, selection.layers, _hash_of(masters)]
    return hashlib.sha256(json.dumps(to_plain(parts), sort_keys=True).encode()).hexdigest()


class _TrainingLog:
    """``training.jsonl``, one line a step; on resume, lines of steps that are done again are dropped."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def start(self, done: int) -> None:
        # The last line may be cut off where the run was killed; it belongs to a step that is done again.
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        write_bytes(self._path, b"".join(lines[:done]))

    def add(self, record: StepRecord) -> None:
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(to_plain(record)) + "\n")


@dataclass(frozen=True)
class _Trained:
    """The trained tensors, rounded as they are on disk, under the names of the model they were trained in."""

    stack: str
    tensors: Mapping[str, Tensor]
    patch: Patch


def _train(inputs: _Inputs, folder: RunFolder, selection: LayerSelection, *, resume: bool) -> _Trained:
    recipe = inputs.recipe
    whole = METHODS[recipe.method.name].kind != "representation"
    model = load_causal_lm(inputs.source) if whole else load_first_layers(inputs.source, selection.target_layer + 1)
    log = _TrainingLog(folder / "training.jsonl")
    inputs.console.say("training: " + describe_training(recipe, text_config(inputs.config).hidden_size))

    with inputs.console.bar(recipe.training.steps, "unlearning") as bar:

        def plan(masters: Mapping[str, Tensor], changing: Mapping[str, Tensor]) -> CheckpointPlan:
            to_disk(model, changing, inputs.on_disk)  # what cannot be patched should fail now, not after training
            equal = _fingerprint(inputs, selection, masters)
            return CheckpointPlan(folder / "checkpoint.safetensors", equal, resume=resume)

        def on_step(record: StepRecord) -> None:
            log.add(record)
            bar.update()
            bar.set_postfix_str(f"forget {record.forget_loss:.3f}, retain {record.retain_loss:.4f}")

        def on_resume(done: int) -> None:
            log.start(done)
            bar.update(done)

        def on_halved(size: int) -> None:
            records = "1 record" if size == 1 else f"{size} records"
            inputs.console.say(f"out of memory: going on from the same step with {records} per forward pass")

        watch = Watch(plan, on_step, on_resume, on_halved)
        if whole:
            trained = unlearn_whole(recipe, model, inputs.encoded, inputs.alternatives, watch)
        else:
            cache = CachePlan(folder / "activations", resume, inputs.console.say)
            trained = unlearn_layers(recipe, model, inputs.encoded, selection, cache=cache, watch=watch)
    inputs.diagnostics.update(trained.diagnostics)
    if trained.save_adapter is not None and recipe.training.lora is not None and recipe.training.lora.keep_adapter:
        trained.save_adapter(folder / "adapter", recipe.model)
    dtypes = {
        name: TORCH_DTYPES.get(inputs.on_disk[stored].dtype, torch.float32)
        for name, value in trained.tensors.items()
        for stored in to_disk(model, {name: value}, inputs.on_disk)
    }
    patch = write_patch(
        folder / "patch",
        inputs.source.folder,
        to_disk(model, trained.tensors, inputs.on_disk),
        recipe.model,
        {
            "recipe": recipe.model_dump(mode="json"),
            "data": dict(inputs.corpus.hashes),
            "layers": list(selection.layers),
            "seed": recipe.seed,
            "versions": versions(),
        },
    )
    return _Trained(trained.stack_name, as_stored(trained.tensors, dtypes), patch)


def _score(
    inputs: _Inputs, folder: RunFolder, name: str, model: PreTrainedModel
) -> Mapping[str, Sequence[SampleScore]]:
    inputs.console.say(f"scoring: {name}")
    with inputs.timed(f"score_{name}"):
        scores = score_model(model, inputs.encoder, inputs.sets, inputs.recipe, inputs.console)
    folder.write_scores(name, scores)
    return scores


def _select(
    inputs: _Inputs, folder: RunFolder, model: Callable[[], PreTrainedModel], loaded: Sequence[PreTrainedModel] = ()
) -> LayerSelection:
    selection = folder.read_selection()
    if selection is None:
        inputs.console.say("selecting layers")
        with inputs.timed("layer_selection"):
            selection = given_layers(inputs.recipe, number_of_layers(inputs.config))
            if selection is None:
                selection = select_layers(
                    inputs.recipe,
                    inputs.encoded,
                    inputs.console,
                    total=number_of_layers(inputs.config),
                    model=model,
                    means=lambda: _means(inputs, folder, model, resident=bool(loaded)),
                )
        folder.write_selection(selection)
    inputs.console.say(f"layers {', '.join(map(str, selection.layers))} ({selection.selector})")
    return selection


def _means(inputs: _Inputs, folder: RunFolder, model: Callable[[], PreTrainedModel], *, resident: bool) -> Means:
    """The way to mean activations: streamed where the recipe says so or the model does not fit into free memory."""
    settings, batch_size = inputs.recipe.selection, inputs.recipe.evaluation.batch_size
    streaming = settings.streaming == "always"
    if settings.streaming == "auto" and settings.selector != "sweep" and not resident:  # the sweep needs all of it
        streaming = _size_in_memory(inputs) > _room(inputs.source.device)
    if not streaming:
        return resident_means(model(), inputs.encoded, batch_size)
    budget = free_memory() / 4 if settings.streaming_gb is None else settings.streaming_gb * 2**30
    inputs.console.say("activations: one layer of the model in memory at a time")
    return streamed_means(inputs.source, inputs.encoded, batch_size, folder / "activations", budget)


def _size_in_memory(inputs: _Inputs) -> int:
    spans = inputs.on_disk.values()
    width = inputs.source.dtype.itemsize if inputs.source.dtype is not None else None
    return sum(math.prod(span.shape) * width if width else span.size for span in spans)


def _room(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory()


def _before_and_selection(
    inputs: _Inputs, folder: RunFolder
) -> tuple[Mapping[str, Sequence[SampleScore]] | None, LayerSelection]:
    """Both look at the original model, which is loaded at most once and let go afterwards."""
    loaded: list[PreTrainedModel] = []

    def model() -> PreTrainedModel:
        if not loaded:
            loaded.append(load_causal_lm(inputs.source))
        return loaded[0]

    before = None
    if inputs.recipe.evaluation.enabled:
        before = folder.read_scores("before") or _score(inputs, folder, "before", model())
    return before, _select(inputs, folder, model, loaded)


def _after(
    inputs: _Inputs, folder: RunFolder, selection: LayerSelection, *, resume: bool
) -> tuple[Mapping[str, Sequence[SampleScore]] | None, Patch]:
    scored = inputs.recipe.evaluation.enabled
    after = folder.read_scores("after")
    if (after is not None or not scored) and (folder / "patch").exists():
        return after, read_patch(folder / "patch")
    with inputs.timed("training"):
        trained = _train(inputs, folder, selection, resume=resume)
    gc.collect()
    if not scored:
        return None, trained.patch
    model = load_causal_lm(inputs.source)
    with replaced(model, renamed_to(model, trained.stack, trained.tensors)):
        return _score(inputs, folder, "after", model), trained.patch


def run_recipe(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allowed: Sequence[str] = (),
    console: Console | None = None,
) -> Run:
    """Do the whole job: score, select layers, unlearn, write the patch, score again, report.

    Args:
        recipe: from :func:`falcon_unlearn.recipe.load_recipe` or :func:`~falcon_unlearn.recipe.recipe_from`.
        resume: go on in the recipe's output folder; finished stages are read back.
        overwrite: remove an earlier run from it first.
        allowed: names that may already stand in the output folder.
        console: where progress goes; None is silent.

    Raises:
        UserError: anything wrong with recipe, data, model or output folder; nothing was written then.
        Interrupted: Ctrl-C; finished stages and the training state are kept.
    """
    with _threads(recipe.threads):
        return _run_stages(recipe, console or Console(quiet=True), resume=resume, overwrite=overwrite, allowed=allowed)


def _run_stages(recipe: Recipe, console: Console, *, resume: bool, overwrite: bool, allowed: Sequence[str]) -> Run:
    started = datetime.now(UTC)
    inputs = _read_inputs(recipe, console)
    folder = open_run_folder(recipe, resume=resume, overwrite=overwrite, allowed=allowed)
    finished = folder.is_finished(recipe)
    start_run(folder, recipe, _corpus_facts(inputs))
    _say_corpus(inputs)
    try:
        before, selection = _before_and_selection(inputs, folder)
        after, patch = _after(inputs, folder, selection, resume=resume)
        oracle: Mapping[str, Sequence[SampleScore]] | None = None
        if inputs.oracle is not None:
            oracle = folder.read_scores("oracle") or _score(inputs, folder, "oracle", load_causal_lm(inputs.oracle))
    except InterruptedTrainingError as stop:
        raise Interrupted(f"stopped after training step {stop.step}; everything so far is in {folder.path}") from stop
    except KeyboardInterrupt as stop:
        raise Interrupted(f"stopped; finished stages are in {folder.path}") from stop
    oracle_forget = oracle[FORGET_SET] if oracle is not None else None
    metrics = {
        name: compute_metrics(scores, oracle_forget) if scores is not None else None
        for name, scores in (("before", before), ("after", after), ("oracle", oracle))
    }
    if inputs.seconds or not finished:
        folder.write_metrics(metrics)
        _write_provenance(inputs, folder, started)
        write_report(folder.path, samples=recipe.report.samples)
        for name in WORKING_FILES:
            (folder / name).unlink(missing_ok=True)
    return Run(folder.path, selection, metrics, patch)


def select_layers_of(
    recipe: Recipe, *, overwrite: bool = False, resume: bool = False, console: Console | None = None
) -> tuple[LayerSelection, Path]:
    """Layer selection alone; a later ``run --resume`` of the same recipe goes on from it.

    Returns:
        The selection and the run folder it was written to.

    Raises:
        UserError: as :func:`run_recipe`.
        Interrupted: Ctrl-C.
    """
    started = datetime.now(UTC)
    with _threads(recipe.threads):
        inputs = _read_inputs(recipe, console or Console(quiet=True))
        folder = open_run_folder(recipe, resume=resume, overwrite=overwrite)
        start_run(folder, recipe, _corpus_facts(inputs))
        _say_corpus(inputs)
        try:
            selection = _select(inputs, folder, lambda: load_causal_lm(inputs.source))
        except KeyboardInterrupt as stop:
            raise Interrupted(f"stopped; nothing was selected yet, {folder.path} can be resumed") from stop
        _write_provenance(inputs, folder, started)
    return selection, folder.path


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    from importlib.metadata import version

    packages = ("falcon-unlearn", "torch", "transformers", "tokenizers", "safetensors", "datasets", "scipy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _peak_memory_mb() -> int | None:
    """Largest resident size of this process so far; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def _write_provenance(inputs: _Inputs, folder: RunFolder, started: datetime) -> None:
    path = folder / "provenance.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(
        path,
        {
            "started": earlier.get("started", started.isoformat(timespec="seconds")),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": inputs.recipe.seed,
            "model": {
                "name": inputs.source.name,
                "folder": str(inputs.source.folder),
                "type": inputs.config.model_type,
                "parameters_in_files_read": sum(math.prod(span.shape) for span in inputs.on_disk.values()),
            },
            "method": {"name": inputs.recipe.method.name, "preset": inputs.recipe.method.preset},
            "method_diagnostics": inputs.diagnostics or earlier.get("method_diagnostics", {}),
            "data": dict(inputs.corpus.hashes),
            "device": str(inputs.source.device),
            "dtype": str(inputs.source.dtype or "checkpoint's"),
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
            "peak_memory_mb": _peak_memory_mb(),
            "stage_seconds": {**earlier.get("stage_seconds", {}), **inputs.seconds},
            "versions": versions(),
        },
    )
