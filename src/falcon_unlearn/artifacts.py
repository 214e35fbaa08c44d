"""Frozen records that cross the stages of a run, and how they are written to disk."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LayerScore:
    """What a selector measured at one layer. ``details`` are named parts of ``score`` (shown, never used)."""

    layer: int
    score: float
    details: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MutualInformationCurve:
    """The published estimate per layer in nats, beside what it says where there is nothing to find.

    ``null_retain`` puts held-back retain samples in the place of the forget samples; ``null_permutation`` breaks
    the pairing of forget and retain rows. A layer whose ``value`` is not below its nulls carries no information
    about what to forget.
    """

    layers: tuple[int, ...]
    value: tuple[float, ...]
    null_retain: tuple[float, ...]
    null_permutation: tuple[float, ...]
    pairs: int
    domains: tuple[str, ...] = ()

    @property
    def argmin(self) -> int:
        """The layer the paper would choose."""
        return self.layers[min(range(len(self.layers)), key=lambda i: self.value[i])]


@dataclass(frozen=True)
class LayerSelection:
    """Which layers are trained (``layers``) and where the loss stands (``target_layer`` = the last of them)."""

    selector: str
    layers: tuple[int, ...]
    target_layer: int
    criterion: str
    scores: tuple[LayerScore, ...] = ()
    mutual_information: MutualInformationCurve | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step as logged in ``training.jsonl``.

    ``cosine`` is the mean over trained tensors of the cosine between forget and retain gradient (NaN where one of
    them is zero everywhere), ``conflicts`` the share of tensors with a negative one,
    ``micro_batches`` into how many parts each of the two batches was cut. With ``training.interpolation`` the forget
    side of all this is that at the weights drawn for the step, on the way back to the original ones.
    """

    step: int
    forget_loss: float
    retain_loss: float
    forget_grad_norm: float
    retain_grad_norm: float
    cosine: float
    conflicts: float
    seconds: float
    micro_batches: int = field(default=1, kw_only=True)


@dataclass(frozen=True)
class SampleScore:
    """Scores of one evaluation record; None where the record has no such field, NaN where it cannot be scored.

    Attributes:
        set: name of the evaluation set (``forget``, ``retain``, or a utility set's name).
        probability: exp of the mean log-probability per answer token.
        accuracy: 1.0 if the greedy answer contains the record's value (its whole answer where it has none).
        accuracy_heldout: the same for the phrasing that was not trained on.
        rouge: ROUGE-L recall of the greedy answer.
        truth_ratio: wrong / right, from mean log-probabilities per token of the perturbed and paraphrased answers.
        normalised_probability: right / (right + sum of wrong), of geometric-mean probabilities per token, where the
            record has perturbed answers but no paraphrase; model utility then uses it in place of ``probability``.
        log_probability: mean log-probability per answer token (nats); what the other numbers are made of.
        paraphrased_log_probability: the same of the paraphrased answer.
        perturbed_log_probabilities: the same of each wrong answer.
    """

    set: str
    index: int
    prompt: str
    answer: str
    generation: str
    probability: float
    accuracy: float
    rouge: float
    truth_ratio: float | None = None
    generation_heldout: str | None = None
    accuracy_heldout: float | None = None
    entity: str | None = None
    normalised_probability: float | None = None
    log_probability: float | None = None
    paraphrased_log_probability: float | None = None
    perturbed_log_probabilities: tuple[float, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """An aggregate over ``n`` samples with its 95 % bootstrap interval.

    ``low`` and ``high`` are None where no interval can be given (a p-value, a single sample). ``unscorable`` samples
    are NaN and left out of ``value``. ``value`` is None where the data does not allow the number.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    unscorable: int = 0


@dataclass(frozen=True)
class SuiteResult:
    """The numbers of one evaluation suite on one model.

    Attributes:
        suite: its name.
        metrics: named estimates, in the order they are shown.
        statements: what can and what cannot be concluded, in plain words.
        settings: what the numbers were made with (template, tasks, versions), JSON types.
    """

    suite: str
    metrics: Mapping[str, Estimate]
    statements: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Metrics:
    """Numbers of one model, from its sample scores. None where the data does not allow the number.

    ``intervals`` holds the 95 % bootstrap interval of each mean, of each of ``utility_parts`` and of
    ``model_utility`` by that name, where one can be given; a p-value has none. ``attacks`` says what each
    attack brought back (``recovered_accuracy`` and so on).
    """

    forget_probability: float
    forget_accuracy: float
    forget_accuracy_heldout: float | None
    forget_rouge: float
    forget_truth_ratio: float | None
    forget_quality: float | None
    log10_forget_quality: float | None
    model_utility: float | None
    utility_parts: Mapping[str, float] = field(default_factory=dict)
    unscorable: int = 0
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    suites: Mapping[str, SuiteResult] = field(default_factory=dict)
    attacks: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)


def to_plain(value: Any) -> Any:
    """Turn records into JSON types; non-finite floats become None, since JSON has no word for them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [to_plain(v) for v in value]
    return value


def _number(value: float | None) -> float:
    """JSON has no word for NaN: :func:`to_plain` writes null."""
    return math.nan if value is None else value


def layer_selection_from(row: Mapping[str, Any]) -> LayerSelection:
    """Read ``layer_selection.json`` back; a trial that diverged has score minus infinity, other nulls are NaN."""
    curve = row["mutual_information"]
    return LayerSelection(
        selector=row["selector"],
        layers=tuple(row["layers"]),
        target_layer=row["target_layer"],
        criterion=row["criterion"],
        scores=tuple(
            LayerScore(
                entry["layer"],
                -math.inf if entry["score"] is None else entry["score"],
                {name: _number(value) for name, value in entry["details"].items()},
            )
            for entry in row["scores"]
        ),
        mutual_information=None
        if curve is None
        else MutualInformationCurve(
            layers=tuple(curve["layers"]),
            value=tuple(map(_number, curve["value"])),
            null_retain=tuple(map(_number, curve["null_retain"])),
            null_permutation=tuple(map(_number, curve["null_permutation"])),
            pairs=curve["pairs"],
            domains=tuple(curve["domains"]),
        ),
        notes=tuple(row["notes"]),
    )


def sample_score_from(row: Mapping[str, Any]) -> SampleScore:
    """Read a line of ``scores/*.jsonl`` back; a null in a number that is always there is NaN."""
    always = {"probability", "accuracy", "rouge"}
    if row.get("probability") is None and "log_probability" in row:
        always.add("log_probability")
    values = {
        f.name: math.nan if f.name in always and row.get(f.name) is None else row.get(f.name)
        for f in dataclasses.fields(SampleScore)
    }
    values["perturbed_log_probabilities"] = tuple(map(_number, row.get("perturbed_log_probabilities") or ()))
    return SampleScore(**values)  # type: ignore[arg-type]


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    packages = ("falcon-unlearn", "torch", "transformers", "tokenizers", "safetensors", "datasets", "scipy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; after the block it is flushed to the disk and renamed."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")  # machines may share the folder
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to a temporary name beside ``path``, flush it to the disk and rename."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    text = json.dumps(to_plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def write_jsonl(path: Path, rows: Sequence[Any]) -> None:
    """Write one JSON object a line, atomically."""
    lines = [json.dumps(to_plain(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    write_bytes(path, "".join(lines).encode())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a file written by :func:`write_jsonl`."""
    # Not str.splitlines: it also breaks at U+2028, which JSON leaves as it is.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
