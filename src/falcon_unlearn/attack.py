"""Attack a model that is there already, beside the original it was made from and an oracle."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from falcon_unlearn.attack_runs import (
    RESULTS_FILE,
    SAMPLES_FOLDER,
    Attackable,
    BatteryLimits,
    check_battery,
    drawn,
    run_battery,
)
from falcon_unlearn.attacks.base import ORACLE, ORIGINAL, UNLEARNED, AttackData, AttackResult, worst
from falcon_unlearn.attacks.battery import ATTACKS, AUDIT, BatteryConfig, named
from falcon_unlearn.console import Console, in_columns, number
from falcon_unlearn.corpus.records import Record
from falcon_unlearn.corpus.sources import SourceConfig, content_hash, load_records
from falcon_unlearn.errors import UserError
from falcon_unlearn.output_folder import begin_output
from falcon_unlearn.ranks import ALONE, Ranks
from falcon_unlearn.recipe import apply_overrides, validated
from falcon_unlearn.subjects import KnownModel, ModelRequest, computing_with, known_model, raw_request

SETTINGS_FILE = "attack.yaml"
_NOT_COMPARED = ("output", "device", "threads", "attacks.seconds")
_OF_ALL_ATTACKS = ("seconds", "neighbours", "max_records")
_MODELS = (ORIGINAL, UNLEARNED, ORACLE)


class AttackRequest(ModelRequest):
    """What ``falcon-unlearn attack`` is asked for."""

    original: str | None = None
    """The model before unlearning; empty: the model without its patches, where it has some."""
    forget: SourceConfig
    """What was to be forgotten, as it was trained on; the attacker gets a few facts of it."""
    scored: SourceConfig | None = None
    """Questions about it that recovered knowledge is measured with; empty: the forget records."""
    retain: SourceConfig
    """Records the attacker may finetune on or show as examples."""
    utility: SourceConfig | None = None
    """Records that show what an attack breaks; empty: the retain records."""
    attacks: BatteryConfig
    """The attacks and their settings."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest generated answer."""
    max_length: int | None = Field(None, ge=2)
    """Longest record to finetune on, in tokens; empty: the model's context."""


@dataclass(frozen=True)
class Attack:
    """A finished battery: where it is, and its results."""

    folder: Path
    results: tuple[AttackResult, ...]


def attack_request(
    model: str,
    attacks: Sequence[str],
    output: str,
    *,
    patches: Sequence[str] = (),
    original: str | None = None,
    oracle: str | None = None,
    overrides: Sequence[str] = (),
) -> AttackRequest:
    """Make a request of what stands on the command line.

    Args:
        model: folder or hub id; or the folder of a run, which brings its patch, oracle, data and template.
        attacks: names of attacks, or ``audit``.
        output: folder.
        patches: patch folders, the earliest first; of a run they stand on its own patch.
        original: folder or hub id of the model before unlearning.
        oracle: folder or hub id.
        overrides: ``key=value`` of the request, or ``attack.key=value``.

    Raises:
        UserError: one line per mistake, all at once.
    """
    if not attacks:
        raise UserError(f"--attack: name at least one of {', '.join(ATTACKS)}, {AUDIT}")
    try:
        battery = named(attacks)
    except ValueError as error:
        raise UserError(f"--attack: {error}") from error
    raw, data = raw_request(model, output, patches, oracle)
    raw |= {key: value for key, value in data.items() if value is not None}
    raw |= {"original": original, "attacks": battery}
    raw = apply_overrides(raw, [_placed(text, battery) for text in overrides])
    for key in ("forget", "retain"):
        if key not in raw:
            several = f"of the several domains of this run, name one for {key}: {key}=FILE"
            missing = f"{key} records are needed: {key}=FILE, or give the folder of a run in place of the model"
            raise UserError(f"attack: {several if data else missing}")
    return validated(AttackRequest, raw, "attack")


def _placed(override: str, battery: Collection[str]) -> str:
    """``relearn.known=3`` and ``seconds=60`` belong to the battery."""
    first = override.replace("=", ".").split(".", 1)[0].strip()
    if first in ATTACKS and first not in battery:
        raise UserError(f"'{override}': attack {first} is not among --attack {' '.join(battery)}")
    return f"attacks.{override}" if first in ATTACKS or first in _OF_ALL_ATTACKS else override


def attack(
    request: AttackRequest,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    ranks: Ranks = ALONE,
) -> Attack:
    """Run every attack on every model and write what it gave.

    Args:
        request: from :func:`attack_request`.
        resume: go on in the output folder behind the attacks that ended.
        overwrite: remove an earlier battery from it first.
        console: where progress goes; None is silent.
        ranks: from :func:`falcon_unlearn.ranks.started_together`; rank 0 writes.

    Raises:
        UserError: anything wrong with models, patches, data or output folder; nothing was written then.
    """
    console = console if console is not None and ranks.first else Console(quiet=True)
    with computing_with(request.threads):
        return _attack(request, console, ranks, resume=resume, overwrite=overwrite)


def _models(request: AttackRequest) -> dict[str, KnownModel]:
    original = request.original or (request.model if request.patches else None)
    models = {} if original is None else {ORIGINAL: known_model(request, original, "--original")}
    models[UNLEARNED] = known_model(request, request.model, "MODEL", request.patches)
    if request.oracle is not None:
        models[ORACLE] = known_model(request, request.oracle, "--oracle")
    return models


def _data(request: AttackRequest) -> AttackData:
    def read(source: SourceConfig | None, key: str) -> tuple[Record, ...]:
        return () if source is None else tuple(load_records(source, Path.cwd(), key))

    forget, retain = read(request.forget, "forget"), read(request.retain, "retain")
    return AttackData(
        forget,
        drawn(read(request.scored, "scored") or forget, request.attacks.max_records, request.seed),
        retain,
        drawn(read(request.utility, "utility") or retain, request.attacks.max_records, request.seed),
        read(request.attacks.neighbours, "attacks.neighbours"),
    )


def _attack(request: AttackRequest, console: Console, ranks: Ranks, *, resume: bool, overwrite: bool) -> Attack:
    data = _data(request)
    check_battery(request.attacks, data, request.seed)
    known = _models(request)
    folder = Path(request.output).expanduser().resolve()
    settings = _settings(request, data, known)
    ranks.on_first(
        lambda: begin_output(
            folder,
            SETTINGS_FILE,
            what="attack",
            is_ours=_is_ours,
            settings=settings,
            not_compared=_NOT_COMPARED,
            resume=resume,
            overwrite=overwrite,
        )
    )
    if ORIGINAL not in known:
        console.say("without the original model (--original) there is no scale to say how much came back")
    results = run_battery(
        request.attacks,
        {name: Attackable(model.load, model.encoder) for name, model in known.items()},
        data,
        folder,
        BatteryLimits(request.batch_size, request.max_new_tokens, request.max_length, request.seed),
        console=console,
        ranks=ranks,
    )
    return Attack(folder, tuple(results))


def _settings(request: AttackRequest, data: AttackData, known: Mapping[str, KnownModel]) -> dict[str, Any]:
    return {
        **request.model_dump(mode="json"),
        "content": {
            **{f"weights.{name}": model.fingerprint for name, model in known.items()},
            **{
                name: content_hash(records)
                for name in ("forget", "scored", "retain", "utility", "neighbours")
                if (records := getattr(data, name))
            },
        },
    }


def _is_ours(name: Path) -> bool:
    if name.parent == Path(SAMPLES_FOLDER):
        return name.name.split(".")[0] in _MODELS and name.suffix == ".json"
    return name.as_posix() in {SETTINGS_FILE, RESULTS_FILE, SAMPLES_FOLDER}


def attacks_table(results: Sequence[AttackResult]) -> str:
    """One row an attack: accuracy before and under it, recovery with its interval, the oracle's; and the worst."""
    rows = [
        ["attack", "before", "attacked", "original", "oracle", "recovered", "95 % interval", "oracle's", "seconds", ""]
    ]
    for result in results:
        models = result.models
        unlearned, original, oracle = (models.get(name) for name in (UNLEARNED, ORIGINAL, ORACLE))
        found, beside = result.recovery.get("accuracy"), result.oracle.get("accuracy")
        statuses = sorted({run.status for run in models.values()} - {"done"})
        rows.append(
            [
                result.attack,
                number(unlearned.accuracy_before.value if unlearned else None),
                number(unlearned.accuracy.value if unlearned and unlearned.accuracy else None),
                number(original.accuracy_before.value if original else None),
                number(oracle.accuracy.value if oracle and oracle.accuracy else None),
                number(found.value if found else None),
                "" if found is None or found.low is None else f"{number(found.low)} .. {number(found.high)}",
                number(beside.value if beside else None),
                f"{sum(run.seconds for run in models.values()):.0f}",
                ", ".join(statuses),
            ]
        )
    lines = [in_columns(rows), "recovered: 0 is the unlearned model, 1 the original, both without attack"]
    strongest = worst(results)
    if strongest is not None:
        lines.append(f"worst recovery: {number(strongest[1].value)} by {strongest[0]}")
    return "\n".join(lines)
