"""Run a battery of attacks on several models, one in memory at a time, and keep each attack as it ends."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from falcon_unlearn.artifacts import SampleScore, write_bytes, write_json
from falcon_unlearn.attacks.base import (
    ORIGINAL,
    UNLEARNED,
    AttackConfig,
    AttackData,
    AttackResult,
    AttackRun,
    run_attacks,
    score_forget,
    split_facts,
    summarise,
    worst,
)
from falcon_unlearn.attacks.battery import BatteryConfig
from falcon_unlearn.console import Console
from falcon_unlearn.corpus.batching import Encoder
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.errors import UserError
from falcon_unlearn.model.loading import quiet_transformers
from falcon_unlearn.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESULTS_FILE = "attacks.json"
SAMPLES_FOLDER = "attacks"
"""``<model>.<attack>.json``: status, samples, artefacts of one attack on one model."""


@dataclass(frozen=True)
class Attackable:
    """A model to attack: how to load it, and how to talk to it."""

    load: Callable[[], PreTrainedModel]
    encoder: Encoder


@dataclass(frozen=True)
class BatteryLimits:
    """How attacks are run, beside their own settings."""

    batch_size: int
    max_new_tokens: int
    max_length: int | None
    seed: int


def drawn(records: Sequence[Record], most: int | None, seed: int) -> tuple[Record, ...]:
    """At most ``most`` records, drawn with the seed, in their order."""
    if most is None or len(records) <= most:
        return tuple(records)
    return tuple(records[i] for i in sorted(random.Random(f"attacked {seed}").sample(range(len(records)), most)))


def check_battery(config: BatteryConfig, data: AttackData, seed: int) -> None:
    """Refuse a battery that wants more facts than there are, before anything is run.

    Raises:
        UserError: naming the attack.
    """
    relearn = config.relearn
    if relearn is not None and "neighbours" in relearn.sources and not data.neighbours:
        raise UserError(
            "attacks.relearn.sources: neighbours need records of their own: name them in attacks.neighbours"
        )
    for name, attack in config.chosen().items():
        try:
            split_facts(data, attack.known, seed)
        except UserError as error:
            raise UserError(f"attacks.{name}: {error}") from error


def is_finished(config: BatteryConfig, models: Collection[str], folder: Path) -> bool:
    """Whether every attack on every model has ended, so that there is nothing left to run."""
    return (folder / RESULTS_FILE).exists() and all(
        _read(folder / SAMPLES_FOLDER / f"{name}.{attack}.json") is not None
        for name in models
        for attack in config.chosen()
    )


def run_battery(
    config: BatteryConfig,
    models: Mapping[str, Attackable],
    data: AttackData,
    folder: Path,
    limits: BatteryLimits,
    *,
    console: Console,
    ranks: Ranks = ALONE,
) -> list[AttackResult]:
    """Attack every model in every way, write what each attack gave, and put the models side by side.

    An attack that has its file is not run again. No model is changed. Several ranks take turns at the attacks, each on
    models of its own; rank 0 writes.

    Args:
        config: the attacks and their common time budget.
        models: by ``original``, ``unlearned``, ``oracle``, in the order they are loaded.
        data: records, the same for all models.
        folder: for ``attacks/`` and ``attacks.json``.
        limits: batch size and the like.
        console: progress.
        ranks: which take part; all of them get the results.

    Raises:
        UserError: an attack wants more facts than there are.
    """
    attacks = config.chosen()
    check_battery(config, data, limits.seed)
    ranks.on_first(lambda: (folder / SAMPLES_FOLDER).mkdir(parents=True, exist_ok=True))
    began = time.monotonic()
    loaded = _Loaded(models, config.needs_original)
    jobs = [(name, attack, folder / SAMPLES_FOLDER / f"{name}.{attack}.json") for name in models for attack in attacks]
    kept = ranks.on_first(lambda: {path: run for _, _, path in jobs if (run := _read(path)) is not None})
    runs: list[AttackRun] = []
    before: dict[str, Sequence[SampleScore]] = {}

    def run_one(job: tuple[str, str, Path]) -> AttackRun:
        name, attack, path = job
        for other in models:
            if other != name:
                loaded.drop(other)
        if path in kept:
            return kept[path]
        seconds = None
        if config.seconds is not None:
            turns_left = -(-(len(jobs) - len(runs)) // ranks.world)
            seconds = (config.seconds - (time.monotonic() - began)) / turns_left
        if seconds is not None and seconds <= 0:
            return AttackRun(attack, name, "out of time", 0.0, (), None, "the time for all attacks is spent")
        console.say(f"attack: {attack} on the {name} model")
        if name not in before:
            before[name] = loaded.unattacked(name, data, limits)
        return loaded.attack(name, attack, attacks[attack], data, limits, seconds=seconds, before=before[name])

    def keep(run: AttackRun, path: Path) -> None:
        if run.status != "done":
            console.say(f"{run.attack} on the {run.model} model: {run.status} ({run.reason})")
        write_bytes(path, to_json(run, indent=1, inf_nan_mode="strings"))

    for first in range(0, len(jobs), ranks.world):
        turn = jobs[first : first + ranks.world]
        found = ranks.spread(turn, run_one)
        for run, (_, _, path) in zip(found, turn, strict=True):
            if path not in kept:
                ranks.on_first(partial(keep, run, path))
        runs += found
    for name in models:
        loaded.drop(name)
    results = summarise(attacks, runs)
    ranks.on_first(lambda: write_json(folder / RESULTS_FILE, battery_results(results)))
    return results


def battery_results(results: Sequence[AttackResult]) -> dict[str, Any]:
    """What ``attacks.json`` holds: every attack, and the strongest recovery."""
    strongest = worst(results)
    found = None if strongest is None else {"attack": strongest[0], "recovery": strongest[1]}
    return {"attacks": results, "worst": found}


class _Loaded:
    """The model under attack and, where attacks need it beside that, the original one; no more are in memory.

    Args:
        models: how to load them.
        keep_original: whether a later attack will need the original again.
    """

    def __init__(self, models: Mapping[str, Attackable], keep_original: bool) -> None:
        self._models = models
        self._keep_original = keep_original
        self._here: dict[str, PreTrainedModel] = {}

    def get(self, name: str, *, with_original: bool) -> tuple[PreTrainedModel, PreTrainedModel | None]:
        """A model, and the original one where it is the same or asked for (and known at all)."""
        for wanted in (name, *((ORIGINAL,) if with_original and ORIGINAL in self._models else ())):
            if wanted not in self._here:
                self._here[wanted] = self._models[wanted].load()
        return self._here[name], self._here.get(ORIGINAL)

    def unattacked(self, name: str, data: AttackData, limits: BatteryLimits) -> Sequence[SampleScore]:
        """What a model says without an attack."""
        return score_forget(
            self.get(name, with_original=False)[0],
            self._models[name].encoder,
            data.scored,
            batch_size=limits.batch_size,
            max_new_tokens=limits.max_new_tokens,
        )

    def attack(
        self,
        name: str,
        attack: str,
        settings: AttackConfig,
        data: AttackData,
        limits: BatteryLimits,
        *,
        seconds: float | None,
        before: Sequence[SampleScore],
    ) -> AttackRun:
        """One attack on one model."""
        model, original = self.get(name, with_original=settings.uses_original)
        with quiet_transformers():
            (run,) = run_attacks(
                {attack: settings},
                model,
                name,
                self._models[name].encoder,
                data,
                original=original,
                batch_size=limits.batch_size,
                max_new_tokens=limits.max_new_tokens,
                max_length=limits.max_length,
                seed=limits.seed,
                seconds=seconds,
                before=before,
            )
        return run

    def drop(self, name: str) -> None:
        """Let go of a model whose attacks are over."""
        if name in self._here and (name != ORIGINAL or not self._keep_original):
            del self._here[name]
            gc.collect()


_FORMAT = TypeAdapter(AttackRun)


def _read(path: Path) -> AttackRun | None:
    """An attack that has ended, or None; one that ran out of time or memory is tried again."""
    if not path.exists():
        return None
    try:
        run = _FORMAT.validate_json(path.read_bytes())
    except ValidationError:
        return None
    return run if run.status == "done" else None


def recovered(results: Sequence[AttackResult], model: str) -> dict[str, dict[str, float | None]]:
    """``{"relearn": {"recovered_accuracy": .08}}``: accuracy under each attack of one model, for ``metrics.json``."""
    found: dict[str, dict[str, float | None]] = {}
    for result in results:
        numbers = result.models.get(model)
        if numbers is not None:
            found[result.attack] = {
                "recovered_accuracy": None if numbers.accuracy is None else numbers.accuracy.value,
                "recovered_probability": None if numbers.probability is None else numbers.probability.value,
                **(
                    {"recovery": accuracy.value}
                    if model == UNLEARNED and (accuracy := result.recovery.get("accuracy")) is not None
                    else {}
                ),
            }
    return found
