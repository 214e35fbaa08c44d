"""Run the stages in order, each reading and writing the run folder; with ``resume`` finished stages are read back."""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from falcon_unlearn.artifacts import (
    LayerSelection,
    Metrics,
    SampleScore,
    StepRecord,
    to_plain,
    versions,
    write_bytes,
    write_json,
)
from falcon_unlearn.attack_runs import Attackable, BatteryLimits, check_battery, drawn, recovered, run_battery
from falcon_unlearn.attack_runs import is_finished as attacks_finished
from falcon_unlearn.attacks.base import ORACLE, ORIGINAL, UNLEARNED, AttackData, AttackResult
from falcon_unlearn.console import Console
from falcon_unlearn.corpus.batching import Encoded, Encoder
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.corpus.sources import Corpus, content_hash, load_corpus, load_records
from falcon_unlearn.earlier import (
    FORGOTTEN,
    EarlierRequest,
    earlier_requests,
    forgotten_before,
    forgotten_digests,
    key_digest,
    open_earlier,
    without_forgotten,
)
from falcon_unlearn.engine.trainer import CheckpointPlan, InterruptedTrainingError
from falcon_unlearn.errors import UserError
from falcon_unlearn.evaluation.metrics import FORGET_SET, compute_metrics
from falcon_unlearn.evaluation.suite import Rows, Subject, Suite
from falcon_unlearn.evaluation.suites import open_suites
from falcon_unlearn.methods import entry_of
from falcon_unlearn.model.disk_names import to_disk
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
from falcon_unlearn.model.patch import DOCUMENT_FILE, Patch, read_patch, write_patch
from falcon_unlearn.model.patched import fitting, load_patched
from falcon_unlearn.model.shards import fingerprint, tensor_files, tensor_spans
from falcon_unlearn.model.skeleton import fetch_first_layers, load_first_layers
from falcon_unlearn.ranks import ALONE, Ranks
from falcon_unlearn.recipe import Recipe
from falcon_unlearn.report.card import write_card
from falcon_unlearn.report.html import write_report
from falcon_unlearn.run_folder import CHECKPOINT, SELF_SAMPLES, RunFolder, open_run_folder, start_run
from falcon_unlearn.selection.selectors import WHOLE_MODEL_SELECTORS
from falcon_unlearn.stages import (
    CachePlan,
    EncodedCorpus,
    Means,
    Unlearned,
    Watch,
    alternatives_of,
    check_layers,
    describe_training,
    encode_corpus,
    evaluation_sets,
    free_memory,
    given_layers,
    resident_means,
    score_model,
    select_layers,
    shared_means,
    stream_prefix,
    streamed_means,
    unlearn_layers,
    unlearn_whole,
    with_self_samples,
)
from falcon_unlearn.subjects import computing_with
from falcon_unlearn.suite_scores import read_suite, score_suite
from falcon_unlearn.trackers import TrackersConfig, Tracking, tracking

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
        attacks: what was tried to bring the knowledge back.
    """

    folder: Path
    selection: LayerSelection
    metrics: Mapping[str, Metrics | None]
    patch: Patch
    attacks: tuple[AttackResult, ...] = ()


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
    suites: Mapping[str, Suite]
    attacked: AttackData | None
    oracle: ModelSource | None
    on_disk: Mapping[str, Any]  # tensors in use, or all: name on disk -> span
    console: Console
    trackers: Tracking
    earlier: Sequence[EarlierRequest]
    ranks: Ranks = ALONE
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def hashes(self) -> dict[str, str]:
        """What a resumed run must still find as it was."""
        return {
            "model": fingerprint(self.source.folder, self.on_disk),
            **({"after": self.source.patches[-1].id} if self.source.patches else {}),
            **({} if self.oracle is None else {"evaluation.oracle": fingerprint(self.oracle.folder)}),
            **{f"corpus.{name}": digest for name, digest in self.corpus.hashes.items()},
            **{f"evaluation.{name}": content_hash(records) for name, records in self.sets.items()},
            **{
                f"evaluation.suites.{name}.{part}": digest
                for name, suite in self.suites.items()
                for part, digest in suite.content.items()
            },
            **(
                {"attacks.neighbours": content_hash(self.attacked.neighbours)}
                if self.attacked is not None and self.attacked.neighbours
                else {}
            ),
        }

    def scratch(self, folder: RunFolder, name: str) -> Path:
        """A working file of this rank's own."""
        return folder / (name if self.ranks.first else f"{name}.rank{self.ranks.rank}")

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Remember how long a stage took."""
        began = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - began, 3)


def _read_inputs(recipe: Recipe, console: Console, trackers: Tracking) -> _Inputs:
    base_dir = Path.cwd()
    earlier = earlier_requests(recipe.after)
    corpus, lines = without_forgotten(load_corpus(recipe.corpus, base_dir), earlier)
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
    source = replace(source, patches=fitting(source, [request.patch for request in earlier]))
    check_layers(recipe, config, {name: span.shape for name, span in on_disk.items()})
    encoder = Encoder(
        load_tokenizer(source), template=recipe.corpus.template, plain_template=recipe.corpus.plain_template
    )
    with quiet_transformers():  # long records are our message to give
        encoded = encode_corpus(recipe, corpus, encoder, config)
    alternatives = alternatives_of(recipe, encoded, encoder)
    scored = recipe.evaluation.enabled
    sets = evaluation_sets(recipe, corpus, base_dir) if scored else {}
    suites = open_suites(recipe.evaluation.suites, base_dir, recipe.seed) if scored else {}
    if scored and recipe.evaluation.earlier:
        again, unread = open_earlier(earlier, recipe.evaluation.max_new_tokens)
        suites |= again
        lines += unread
    for line in lines:
        console.say(line)
    attacked = _attacked(recipe, corpus, sets, base_dir)
    return _Inputs(
        recipe,
        source,
        config,
        encoder,
        corpus,
        encoded,
        alternatives,
        sets,
        suites,
        attacked,
        oracle,
        on_disk,
        console,
        trackers,
        earlier,
    )


def _begin(
    recipe: Recipe,
    console: Console,
    trackers: Tracking,
    ranks: Ranks,
    *,
    resume: bool,
    overwrite: bool,
    allowed: Sequence[str] = (),
) -> tuple[_Inputs, RunFolder, bool]:
    """Read everything and open the folder; tell whether the run in it is finished."""
    inputs = ranks.after_first(lambda: _read_inputs(recipe, console, trackers))
    inputs.ranks = ranks
    ranks.agree("corpus", json.dumps(dict(inputs.corpus.hashes), sort_keys=True))

    def start() -> tuple[RunFolder, bool]:
        folder = open_run_folder(recipe, resume=resume, overwrite=overwrite, allowed=allowed)
        finished = folder.is_finished(recipe)
        start_run(folder, recipe, _corpus_facts(inputs))
        return folder, finished

    folder, finished = ranks.on_first(start)
    if not (folder / "corpus.json").exists():
        raise UserError(f"output: {folder.path} is not what rank 0 sees: name a folder that all machines share")
    _say_corpus(inputs)
    return inputs, folder, finished


def _attacked(
    recipe: Recipe, corpus: Corpus, sets: Mapping[str, Sequence[Record]], base_dir: Path
) -> AttackData | None:
    """The records of the attacks, or None where there are none to run."""
    config = recipe.attacks
    if not config.chosen():
        return None
    utility = [record for name, records in sets.items() if name != FORGET_SET for record in records]
    data = AttackData(
        tuple(record for records in corpus.forget.values() for record in records),
        drawn(sets[FORGET_SET], config.max_records, recipe.seed),
        tuple(record for records in corpus.retain.values() for record in records),
        drawn(utility, config.max_records, recipe.seed),
        () if config.neighbours is None else tuple(load_records(config.neighbours, base_dir, "attacks.neighbours")),
    )
    check_battery(config, data, recipe.seed)
    return data


def _tensors_in_use(recipe: Recipe, source: ModelSource) -> set[str] | None:
    """Names of the tensors that this recipe needs of the checkpoint, None for all; of a hub id they are fetched."""
    layers = recipe.selection.layers
    whole = entry_of(recipe.method).kind != "representation"
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
        FORGOTTEN: forgotten_digests(inputs.corpus),
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


def _fingerprint(
    inputs: _Inputs, encoded: EncodedCorpus, selection: LayerSelection, masters: Mapping[str, Tensor]
) -> str:
    """Hash of all that decides a training run: equal fingerprints may share a checkpoint."""
    recipe = inputs.recipe.model_dump(mode="json", include={"corpus", "method", "training", "seed", "dtype"})
    # The tokens too: a chat template may depend on more than the records, such as the date.
    tokens = [[item.ids for item in items] for side in (encoded.forget, encoded.retain) for items in side.values()]
    parts = [recipe, dict(inputs.corpus.hashes), tokens, selection.layers, _hash_of(masters)]
    return hashlib.sha256(json.dumps(to_plain(parts), sort_keys=True).encode()).hexdigest()


class _TrainingLog:
    """``training.jsonl``, one line a step; on resume, lines of steps that are done again are dropped.

    Trackers are shown each line, also those of earlier sessions. Of several ranks the first writes.
    """

    def __init__(self, path: Path, trackers: Tracking, ranks: Ranks) -> None:
        self._path, self._trackers, self._writes = path, trackers, ranks.first

    def start(self, done: int) -> None:
        if not self._writes:
            return
        # The last line may be cut off where the run was killed; it belongs to a step that is done again.
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        write_bytes(self._path, b"".join(lines[:done]))
        for line in lines[:done]:
            self._trackers.log(json.loads(line))

    def add(self, record: StepRecord) -> None:
        if not self._writes:
            return
        row = to_plain(record)
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")
        self._trackers.log(row)


def _train(inputs: _Inputs, folder: RunFolder, selection: LayerSelection, *, resume: bool) -> Patch:
    recipe, ranks = inputs.recipe, inputs.ranks
    whole = entry_of(recipe.method).kind != "representation"
    cache = CachePlan(inputs.scratch(folder, "activations"), resume, inputs.console.say, processes=ranks.local_world)
    # What is to lie on several devices may be too large for one.
    source = inputs.source if ranks.world == 1 else replace(inputs.source, device=torch.device("cpu"))
    loaded = load_causal_lm(source) if whole else None
    writer = loaded if source.device == inputs.source.device else None
    encoded = ranks.after_first(lambda: _with_self_samples(inputs, folder, writer))
    gc.collect()
    if kept := sum(map(len, encoded.retain.values())) - sum(map(len, inputs.encoded.retain.values())):
        inputs.console.say(f"retain: {kept} more records, written by the model itself")
    if loaded is not None:
        model = loaded
    elif _is_streamed(inputs, selection):
        model, cache = stream_prefix(recipe, inputs.source, encoded, selection, cache)
    else:
        model = load_first_layers(inputs.source, selection.target_layer + 1)
    log = _TrainingLog(folder / "training.jsonl", inputs.trackers, ranks)
    inputs.console.say("training: " + describe_training(recipe, text_config(inputs.config).hidden_size))

    with inputs.console.bar(recipe.training.steps, "unlearning") as bar:

        def plan(masters: Mapping[str, Tensor], changing: Mapping[str, Tensor]) -> CheckpointPlan:
            to_disk(model, changing, inputs.on_disk)  # what cannot be patched should fail now, not after training
            equal = _fingerprint(inputs, encoded, selection, masters)
            return CheckpointPlan(folder / CHECKPOINT, equal, resume=resume, say=inputs.console.say)

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
            trained = unlearn_whole(
                recipe, model, encoded, inputs.alternatives, watch, selection=selection, ranks=ranks
            )
        else:
            trained = unlearn_layers(recipe, model, encoded, selection, cache=cache, watch=watch, ranks=ranks)
    return ranks.on_first(lambda: _write_trained(inputs, folder, selection, model, trained))


def _write_trained(
    inputs: _Inputs, folder: RunFolder, selection: LayerSelection, model: PreTrainedModel, trained: Unlearned
) -> Patch:
    recipe = inputs.recipe
    if trained.save_adapter is not None and recipe.training.lora is not None and recipe.training.lora.keep_adapter:
        trained.save_adapter(folder / "adapter", recipe.model)
    return write_patch(
        folder / "patch",
        inputs.source.folder,
        to_disk(model, trained.tensors, inputs.on_disk),
        recipe.model,
        {
            "recipe": recipe.model_dump(mode="json"),
            "data": {**inputs.corpus.hashes, **_hash_of_samples(folder)},
            "model_fingerprint": fingerprint(inputs.source.folder, inputs.on_disk),
            "layers": list(selection.layers),
            "seed": recipe.seed,
            "versions": versions(),
            "method_diagnostics": trained.diagnostics,
        },
        below=inputs.source.patches,
    )


def _with_self_samples(inputs: _Inputs, folder: RunFolder, loaded: PreTrainedModel | None) -> EncodedCorpus:
    earlier, digests = forgotten_before(inputs.earlier)
    return with_self_samples(
        inputs.recipe,
        lambda: load_causal_lm(inputs.source) if loaded is None else loaded,
        inputs.encoded,
        inputs.encoder,
        folder / SELF_SAMPLES,
        earlier=earlier,
        forgotten=lambda record: key_digest(record) in digests,
    )


def _hash_of_samples(folder: RunFolder) -> dict[str, str]:
    path = folder / SELF_SAMPLES
    return {"self_samples": hashlib.sha256(path.read_bytes()).hexdigest()} if path.exists() else {}


def _is_streamed(inputs: _Inputs, selection: LayerSelection) -> bool:
    """Whether the frozen layers run one at a time: as the recipe says, or because they do not fit into free memory."""
    training = inputs.recipe.training
    if training.streaming != "auto" or training.cache == "never" or not selection.layers[0]:
        return training.streaming == "always"
    return _size_in_memory(inputs) > _room(inputs)


@dataclass(frozen=True)
class _Scored:
    """What a model was scored with: the run's own sets, and suites."""

    sets: Mapping[str, Sequence[SampleScore]]
    suites: Mapping[str, Rows]


def _score(inputs: _Inputs, folder: RunFolder, name: str, model: PreTrainedModel) -> dict[str, list[SampleScore]]:
    with inputs.timed(f"score_{name}"):
        scores = score_model(model, inputs.encoder, inputs.sets, inputs.recipe, inputs.console, ranks=inputs.ranks)
    inputs.ranks.on_first(lambda: folder.write_scores(name, scores))
    return scores


def _scored(inputs: _Inputs, folder: RunFolder, name: str, load: Callable[[], PreTrainedModel]) -> _Scored:
    """Read back what there is, and score the rest; the model is loaded only for that."""
    loaded: list[PreTrainedModel] = []

    def model() -> PreTrainedModel:
        if not loaded:
            loaded.append(load())
            inputs.console.say(f"scoring: {name}")
        return loaded[0]

    sets = inputs.ranks.on_first(lambda: folder.read_scores(name))
    if sets is None:
        sets = _score(inputs, folder, name, model())
    suites: dict[str, Rows] = {}
    for suite_name, suite in inputs.suites.items():
        stem = folder / "scores" / f"{name}.{suite_name}"
        rows = inputs.ranks.on_first(functools.partial(read_suite, suite, stem))
        if rows is None:
            with inputs.timed(f"{suite_name}_{name}"):
                subject = Subject(model(), inputs.encoder, inputs.recipe.evaluation.batch_size, name)
                rows = score_suite(suite, subject, stem, inputs.console, inputs.ranks)
        suites[suite_name] = rows
    return _Scored(sets, suites)


def _select(
    inputs: _Inputs, folder: RunFolder, model: Callable[[], PreTrainedModel], loaded: Sequence[PreTrainedModel] = ()
) -> LayerSelection:
    selection = inputs.ranks.on_first(folder.read_selection)
    if selection is None:
        inputs.console.say("selecting layers")
        with inputs.timed("layer_selection"):
            selection = given_layers(inputs.recipe, number_of_layers(inputs.config))
            if selection is None:
                selection = select_layers(
                    inputs.recipe,
                    inputs.encoded,
                    inputs.console,
                    ranks=inputs.ranks,
                    total=number_of_layers(inputs.config),
                    model=model,
                    means=lambda: shared_means(
                        _means(inputs, folder, model, resident=bool(loaded)),
                        inputs.recipe.evaluation.batch_size,
                        inputs.ranks,
                    ),
                )
        selection = inputs.ranks.on_first(functools.partial(_written, folder, selection))
    inputs.console.say(f"layers {', '.join(map(str, selection.layers))} ({selection.selector})")
    return selection


def _written(folder: RunFolder, selection: LayerSelection) -> LayerSelection:
    folder.write_selection(selection)
    return selection


def _means(inputs: _Inputs, folder: RunFolder, model: Callable[[], PreTrainedModel], *, resident: bool) -> Means:
    """The way to mean activations: streamed where the recipe says so or the model does not fit into free memory."""
    settings, batch_size = inputs.recipe.selection, inputs.recipe.evaluation.batch_size
    streaming = settings.streaming == "always"
    if settings.streaming == "auto" and settings.selector not in WHOLE_MODEL_SELECTORS and not resident:
        streaming = _size_in_memory(inputs) > _room(inputs)
    if not streaming:
        return resident_means(model(), inputs.encoded, batch_size)
    fair = free_memory() / 4 / inputs.ranks.local_world
    budget = fair if settings.streaming_gb is None else settings.streaming_gb * 2**30
    inputs.console.say("activations: one layer of the model in memory at a time")
    spill = inputs.scratch(folder, "activations")
    return streamed_means(inputs.source, inputs.encoded, batch_size, spill, budget)


def _size_in_memory(inputs: _Inputs) -> int:
    spans = inputs.on_disk.values()
    width = inputs.source.dtype.itemsize if inputs.source.dtype is not None else None
    return sum(math.prod(span.shape) * width if width else span.size for span in spans)


def _room(inputs: _Inputs) -> int:
    device = inputs.source.device
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory() // inputs.ranks.local_world


def _before_and_selection(inputs: _Inputs, folder: RunFolder) -> tuple[_Scored | None, LayerSelection]:
    """Both look at the original model, which is loaded at most once and let go afterwards."""
    loaded: list[PreTrainedModel] = []

    def model() -> PreTrainedModel:
        if not loaded:
            loaded.append(load_causal_lm(inputs.source))
        return loaded[0]

    before = _scored(inputs, folder, "before", model) if inputs.recipe.evaluation.enabled else None
    return before, _select(inputs, folder, model, loaded)


def _patch(inputs: _Inputs, folder: RunFolder, selection: LayerSelection, *, resume: bool) -> Patch:
    patch = inputs.ranks.on_first(lambda: _kept_patch(inputs, folder))
    if patch is not None:
        return patch
    with inputs.timed("training"):
        patch = _train(inputs, folder, selection, resume=resume)
    gc.collect()
    return patch


def _kept_patch(inputs: _Inputs, folder: RunFolder) -> Patch | None:
    if (folder / "patch" / DOCUMENT_FILE).exists():
        try:
            return read_patch(folder / "patch")
        except UserError as error:
            inputs.console.say(f"{error}; training again")
    return None


def _attack(inputs: _Inputs, folder: RunFolder, patch: Patch) -> list[AttackResult]:
    recipe = inputs.recipe
    if inputs.attacked is None:
        return []
    models = {
        ORIGINAL: Attackable(lambda: load_causal_lm(inputs.source), inputs.encoder),
        UNLEARNED: Attackable(lambda: load_patched(inputs.source, (patch,)), inputs.encoder),
    }
    if inputs.oracle is not None:
        oracle = inputs.oracle
        models[ORACLE] = Attackable(lambda: load_causal_lm(oracle), inputs.encoder)
    limits = BatteryLimits(
        recipe.evaluation.batch_size, recipe.evaluation.max_new_tokens, recipe.corpus.max_length, recipe.seed
    )
    finished = inputs.ranks.on_first(lambda: attacks_finished(recipe.attacks, models, folder.path))
    if not finished:
        inputs.ranks.on_first(folder.begin_again)
    with nullcontext() if finished else inputs.timed("attacks"):
        return run_battery(
            recipe.attacks,
            models,
            inputs.attacked,
            folder.path,
            limits,
            console=inputs.console,
            ranks=inputs.ranks,
        )


def _metrics(
    inputs: _Inputs, scored: Mapping[str, _Scored | None], attacks: Sequence[AttackResult]
) -> dict[str, Metrics | None]:
    oracle = scored["oracle"]
    settings = {"template": inputs.encoder.describe(), "seed": inputs.recipe.seed}
    metrics: dict[str, Metrics | None] = {}
    for name, found in scored.items():
        if found is None:
            metrics[name] = None
            continue
        beside = None if name == "oracle" else oracle
        metrics[name] = replace(
            compute_metrics(found.sets, None if oracle is None else oracle.sets[FORGET_SET]),
            suites={
                suite: inputs.suites[suite].summarise(rows, None if beside is None else beside.suites[suite], settings)
                for suite, rows in found.suites.items()
            },
            attacks=recovered(attacks, _ATTACKED[name]),
        )
    return metrics


_ATTACKED = {"before": ORIGINAL, "after": UNLEARNED, "oracle": ORACLE}


def run_recipe(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allowed: Sequence[str] = (),
    console: Console | None = None,
    ranks: Ranks = ALONE,
) -> Run:
    """Do the whole job: score, select layers, unlearn, write the patch, score again, report.

    Args:
        recipe: from :func:`falcon_unlearn.recipe.load_recipe` or :func:`~falcon_unlearn.recipe.recipe_from`.
        resume: go on in the recipe's output folder; finished stages are read back.
        overwrite: remove an earlier run from it first.
        allowed: names that may already stand in the output folder.
        console: where progress goes; None is silent.
        ranks: from :func:`falcon_unlearn.ranks.started_together`; all of them get the run, rank 0 writes it.

    Raises:
        UserError: anything wrong with recipe, data, model or output folder; nothing was written then.
        Interrupted: Ctrl-C; finished stages and the training state are kept.
    """
    console = _console(console, ranks)
    with computing_with(recipe.threads), _trackers(recipe, console, ranks) as trackers:
        return _run_stages(recipe, console, trackers, ranks, resume=resume, overwrite=overwrite, allowed=allowed)


def _console(console: Console | None, ranks: Ranks) -> Console:
    return console if console is not None and ranks.first else Console(quiet=True)


def _trackers(recipe: Recipe, console: Console, ranks: Ranks) -> AbstractContextManager[Tracking]:
    config = recipe.trackers if ranks.first else TrackersConfig()
    return tracking(config, recipe.model_dump(mode="json"), Path(recipe.output), console.say)


def _run_stages(
    recipe: Recipe,
    console: Console,
    trackers: Tracking,
    ranks: Ranks,
    *,
    resume: bool,
    overwrite: bool,
    allowed: Sequence[str],
) -> Run:
    started = datetime.now(UTC)
    inputs, folder, finished = _begin(
        recipe, console, trackers, ranks, resume=resume, overwrite=overwrite, allowed=allowed
    )
    try:
        before, selection = _before_and_selection(inputs, folder)
        patch = _patch(inputs, folder, selection, resume=resume)
        scored: dict[str, _Scored | None] = {"before": before, "after": None, "oracle": None}
        if recipe.evaluation.enabled:
            scored["after"] = _scored(inputs, folder, "after", lambda: load_patched(inputs.source, (patch,)))
        if inputs.oracle is not None:
            oracle = inputs.oracle
            scored["oracle"] = _scored(inputs, folder, "oracle", lambda: load_causal_lm(oracle))
        attacks = _attack(inputs, folder, patch)
    except InterruptedTrainingError as stop:
        raise Interrupted(f"stopped after training step {stop.step}; everything so far is in {folder.path}") from stop
    except KeyboardInterrupt as stop:
        raise Interrupted(f"stopped; finished stages are in {folder.path}") from stop
    metrics = _metrics(inputs, scored, attacks)

    def finish() -> None:
        folder.write_metrics(metrics)
        _write_provenance(inputs, folder, started, patch)
        write_report(folder.path, samples=recipe.report.samples)
        write_card(folder.path)
        trackers.finish(folder / "training.jsonl", to_plain(metrics))

    if inputs.seconds or not finished:
        ranks.on_first(finish)
    ranks.on_first(folder.remove_working_files)
    return Run(folder.path, selection, metrics, patch, tuple(attacks))


def select_layers_of(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    resume: bool = False,
    console: Console | None = None,
    ranks: Ranks = ALONE,
) -> tuple[LayerSelection, Path]:
    """Layer selection alone; a later ``run --resume`` of the same recipe goes on from it.

    Returns:
        The selection and the run folder it was written to.

    Raises:
        UserError: as :func:`run_recipe`.
        Interrupted: Ctrl-C.
    """
    started = datetime.now(UTC)
    console = _console(console, ranks)
    with computing_with(recipe.threads), _trackers(recipe, console, ranks) as trackers:
        inputs, folder, _ = _begin(recipe, console, trackers, ranks, resume=resume, overwrite=overwrite)
        try:
            selection = _select(inputs, folder, functools.cache(lambda: load_causal_lm(inputs.source)))
        except KeyboardInterrupt as stop:
            raise Interrupted(f"stopped; nothing was selected yet, {folder.path} can be resumed") from stop
        ranks.on_first(lambda: _write_provenance(inputs, folder, started))
    return selection, folder.path


def _peak_memory_mb() -> int | None:
    """Largest resident size of this process so far; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def _write_provenance(inputs: _Inputs, folder: RunFolder, started: datetime, patch: Patch | None = None) -> None:
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
            **({"after": [patch.id for patch in inputs.source.patches]} if inputs.source.patches else {}),
            "method": {"name": inputs.recipe.method.name, "preset": inputs.recipe.method.preset},
            "method_diagnostics": {} if patch is None else patch.provenance.get("method_diagnostics", {}),
            "data": dict(inputs.corpus.hashes),
            "device": str(inputs.source.device),
            "dtype": str(inputs.source.dtype or "checkpoint's"),
            "ranks": inputs.ranks.world,
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
            "peak_memory_mb": _peak_memory_mb(),
            "stage_seconds": {**earlier.get("stage_seconds", {}), **inputs.seconds},
            "versions": versions(),
        },
    )
