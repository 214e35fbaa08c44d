"""What a run is: a recipe in YAML, with ``a.b=c`` overrides, validated as a whole before anything starts."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from falcon_unlearn.artifacts import write_bytes
from falcon_unlearn.attacks.battery import BatteryConfig
from falcon_unlearn.config import Section
from falcon_unlearn.corpus.sources import CorpusConfig, SourceConfig
from falcon_unlearn.engine.trainer import TrainingConfig
from falcon_unlearn.errors import UserError, did_you_mean
from falcon_unlearn.evaluation.suites import SuitesConfig
from falcon_unlearn.methods import METHODS, FalconConfig, MethodConfig, entry_of
from falcon_unlearn.model.loading import DTypeChoice
from falcon_unlearn.presets import PRESETS, deep_merge
from falcon_unlearn.selection.mutual_information import MutualInformationConfig
from falcon_unlearn.selection.selectors import WHOLE_MODEL_SELECTORS, Selector
from falcon_unlearn.selection.sweep import SweepConfig
from falcon_unlearn.trackers import TrackersConfig

AnySection = TypeVar("AnySection", bound=Section)


class SelectionConfig(Section):
    """Which layers are trained."""

    layers: Literal["auto", "all"] | tuple[int, ...] = "auto"
    """auto (chosen in the run; all for a method on the whole model), all, or layer indices from 0.

    The largest is a representation method's target layer.
    """
    selector: Selector = "sweep"
    """How auto chooses the target layer.

    sweep: short trials; mutual_information: the published estimate; middle: half-way up, whatever the data;
    domain_information, probe_error, mmd: where forget and retain activations are furthest apart; gradient_conflict:
    where the gradients of their likelihoods agree least.
    """
    span: int = Field(1, ge=1)
    """auto: train the target layer and the span - 1 layers below it."""
    candidates: tuple[int, ...] | None = None
    """Layers to choose from; empty: at most max_candidates, evenly spaced."""
    max_candidates: int = Field(8, ge=1)
    """Where candidates is empty."""
    streaming: Literal["auto", "always", "never"] = "auto"
    """Selectors that look at activations: hold one layer in memory at a time; auto: where the model does not fit."""
    streaming_gb: float | None = Field(None, ge=0)
    """streaming: memory for hidden states, beyond which they lie on disk; empty: a quarter of the free memory."""
    show_mutual_information: bool = True
    """Estimate mutual information and its nulls too where another selector chooses."""
    sample: int = Field(96, ge=4)
    """At most so many records of each side for domain_information, probe_error, mmd and gradient_conflict."""
    sweep: SweepConfig = SweepConfig()
    """Trial runs of the sweep selector."""
    mutual_information: MutualInformationConfig = MutualInformationConfig()
    """The published estimator."""

    @field_validator("layers", "candidates")
    @classmethod
    def _usable(cls, layers: str | tuple[int, ...] | None) -> str | tuple[int, ...] | None:
        if isinstance(layers, tuple) and (not layers or min(layers) < 0 or len(set(layers)) < len(layers)):
            raise ValueError("expected at least one layer index, from 0, none twice")
        return layers


class EvaluationConfig(Section):
    """What the models before and after (and the oracle) are scored on."""

    enabled: bool = True
    """false: nothing is scored, so that the whole model is never loaded; given layers then need only those below."""
    forget: SourceConfig | None = None
    """Forget questions; empty: the forget corpus itself."""
    retain: SourceConfig | None = None
    """Retain questions; empty: the retain corpus itself."""
    utility: dict[str, SourceConfig] = Field(default_factory=dict)
    """Further sets that should stay as they are; all of them and retain make up model_utility."""
    oracle: str | None = None
    """A model that never saw the forget data (folder or hub id); needed for forget_quality."""
    batch_size: int = Field(32, ge=1)
    """Records per forward pass."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest generated answer."""
    max_records: int | None = Field(400, ge=1)
    """Score at most so many records of a set, drawn with the seed; empty: all."""
    suites: SuitesConfig = SuitesConfig()
    """Benchmarks that every model is scored with too."""
    earlier: bool = True
    """after: score the forget sets of earlier requests again."""


class ReportConfig(Section):
    """report.html."""

    samples: int = Field(12, ge=0)
    """Generations shown side by side, per set."""


class Recipe(Section):
    """A whole run, with everything its preset says filled in. See the sections for their keys."""

    model: str = Field(min_length=1)
    """Folder or hub id of a causal language model."""
    corpus: CorpusConfig
    """What to forget and what to keep."""
    method: MethodConfig = FalconConfig()
    """The unlearning method and its knobs."""
    output: str = Field(min_length=1)
    """Run folder, from the current directory."""
    after: tuple[str, ...] = ()
    """The request this one stands on: a run or patch folder, which brings all that is below it (docs/requests.md).

    Several: the last is stood on, the others say where something below it lies now.
    """
    selection: SelectionConfig = SelectionConfig()
    """Which layers are trained."""
    training: TrainingConfig = TrainingConfig()
    """How long and with which optimiser."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is scored."""
    attacks: BatteryConfig = BatteryConfig()
    """How forgotten knowledge is tried to be brought back."""
    report: ReportConfig = ReportConfig()
    """What the report shows."""
    trackers: TrackersConfig = TrackersConfig()
    """Where the run's numbers are shown too."""
    seed: int = 0
    """Everything random follows from it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: DTypeChoice = "auto"
    """Of the frozen weights; trained tensors have fp32 masters anyway."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of the computation; empty: torch's own choice. Results repeat exactly only at the same number."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    @field_validator("after", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _adapters_are_trained(self) -> Recipe:
        if entry_of(self.method).kind == "edit" and self.training.lora is not None:
            raise ValueError(f"training.lora: {self.method.name} edits the weights themselves: leave lora out")
        return self

    @model_validator(mode="after")
    def _prefix_is_streamed(self) -> Recipe:
        if self.training.streaming == "always" and entry_of(self.method).kind != "representation":
            raise ValueError(
                f"training.streaming is always, but {self.method.name} ({self.method.preset}) runs the whole model: "
                "take a method on one layer's activations, such as falcon with preset layer"
            )
        if self.training.streaming == "always" and self.corpus.self_samples.count:
            raise ValueError(
                "training.streaming is always, but corpus.self_samples need the whole model: set count to 0"
            )
        return self

    @model_validator(mode="after")
    def _attacks_are_scored(self) -> Recipe:
        if self.attacks.chosen() and not self.evaluation.enabled:
            raise ValueError("attacks: what they bring back is scored: set evaluation.enabled to true")
        return self

    @model_validator(mode="after")
    def _streaming_selector(self) -> Recipe:
        if (
            self.selection.streaming == "always"
            and self.selection.layers == "auto"
            and self.selection.selector in WHOLE_MODEL_SELECTORS
        ):
            what = "trains and scores" if self.selection.selector == "sweep" else "takes gradients of"
            raise ValueError(
                f"selection.streaming is always, but the {self.selection.selector} {what} the whole model: "
                "use a selector that looks at activations, such as mutual_information, or name the layers"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, raw: Any) -> Any:
        return with_presets(raw) if isinstance(raw, Mapping) else raw


def _override_value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """``a.b=c`` -> ``(("a", "b"), c)``; the value is read as YAML.

    Raises:
        UserError: no ``=``, or an empty key.
    """
    key, sign, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not sign or not all(path):
        raise UserError(f"override '{text}': write it as key=value or section.key=value")
    return path, _override_value(value)


def apply_overrides(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Lay overrides on a raw recipe; ``method=rmu`` is short for ``method.name=rmu``."""
    result = dict(raw)
    for text in overrides:
        path, value = parse_override(text)
        if path == ("method",) and isinstance(value, str):
            path = ("method", "name")
        node = result
        for part in path[:-1]:
            below = node.get(part)
            if isinstance(below, str) and part == "method":
                below = {"name": below}
            elif isinstance(below, str):
                below = {"source": below}
            elif below is not None and not isinstance(below, Mapping):
                raise UserError(f"override '{text}': {part} is {below!r}, which has no keys")
            node[part] = dict(below or {})
            node = node[part]
        node[path[-1]] = value
    return result


def with_presets(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in what the chosen method's preset says; unknown names are left to validation."""
    method = raw.get("method", {})
    method = {"name": method} if isinstance(method, str) else method
    if not isinstance(method, Mapping):
        return dict(raw)
    method = {"name": "falcon", **method}
    preset = PRESETS.get(str(method["name"]), {}).get(str(method.get("preset", "default")), {})
    return deep_merge(preset, {**raw, "method": method})


def _fields_at(location: Sequence[str | int], raw: Mapping[str, Any], root: type[Section]) -> Mapping[str, Any]:
    """Known keys of the section at ``location`` of ``raw``, a ``root``, for did-you-mean."""
    sections: list[type[Section]] = [root]
    method = _value_at(raw, ["method", "name"])
    if location and location[0] == "method" and isinstance(method, str) and method in METHODS:
        sections, location = [METHODS[method].config], location[1:]
    for part in location:
        inner = [
            field.annotation
            for section in sections
            for name, field in section.model_fields.items()
            if str(part) in (name, field.alias)
        ]
        sections = [found for annotation in inner for found in _sections_in(annotation)] or sections
    return {field.alias or name: None for section in sections for name, field in section.model_fields.items()}


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _sections_in(argument)


def _value_at(raw: Any, location: Sequence[str | int]) -> Any:
    for part in location:
        if isinstance(raw, Mapping):
            raw = raw.get(part)
        elif isinstance(raw, Sequence) and isinstance(part, int) and part < len(raw):
            raw = raw[part]
        else:
            return None
    return raw


def _location(error: Mapping[str, Any], raw: Mapping[str, Any], root: type[Section]) -> list[str | int]:
    """Where an error stands in the recipe, without the tags pydantic adds for the branches of a union."""
    location: list[str | int] = []
    for part in error["loc"]:
        here = _value_at(raw, location)
        given = isinstance(here, Mapping) and part in here
        if given or isinstance(part, int) or part in _fields_at(location, raw, root):
            location.append(part)
    return location


def _message(
    error: Mapping[str, Any], location: Sequence[str | int], raw: Mapping[str, Any], root: type[Section]
) -> str:
    kind = error["type"]
    if kind == "extra_forbidden":
        return "unknown key" + did_you_mean(str(location[-1]), _fields_at(location[:-1], raw, root))
    if kind == "missing":
        return "required, but missing"
    if kind in {"union_tag_invalid", "union_tag_not_found"}:
        name = str(_value_at(raw, ["method", "name"]))
        return f"unknown method '{name}'{did_you_mean(name, METHODS)}; known: {', '.join(METHODS)}"
    if kind in {"model_type", "model_attributes_type", "dict_type"}:
        return "expected a mapping of keys"
    if kind == "tuple_type":
        return "expected a list"
    value = _value_at(raw, location)
    message = str(error["msg"]).removeprefix("Value error, ")
    expected = error.get("ctx", {}).get("expected")
    hint = did_you_mean(value, expected.split("'")) if isinstance(value, str) and isinstance(expected, str) else ""
    return message[:1].lower() + message[1:] + hint


def _mistakes(
    error: ValidationError, raw: Mapping[str, Any], root: type[Section], where: str, places: Mapping[str, str]
) -> list[str]:
    """One line per key that is wrong: place (file and line, or override), key, value, what is wrong with it."""
    messages: dict[str, list[str]] = {}
    given: dict[str, str] = {}
    for item in error.errors():
        location = _location(item, raw, root)
        key, value = ".".join(str(part) for part in location), _value_at(raw, location)
        shown = "" if item["type"] == "missing" or isinstance(value, Mapping) else f" is {value!r}"
        given[key] = " is empty" if shown == " is None" else shown
        messages.setdefault(key, []).append(_message(item, location, raw, root))
    result = []
    for key, reasons in messages.items():
        if any(other.startswith(f"{key}.") for other in messages):
            continue  # another branch of a union: the deeper message is about the one that was meant
        place = next((places[k] for k in (key, key.rpartition(".")[0]) if k in places), where)
        subject = f"{key}{given[key]}: " if key else ""  # a mistake of the whole names its keys itself
        result.append(f"{place}: {subject}{' / '.join(dict.fromkeys(reasons))}")
    return result


def key_places(text: str, where: str) -> dict[str, str]:
    """``file:line`` of each dotted key of a YAML document.

    Raises:
        UserError: a key stands twice; YAML would let the last one win.
    """
    places: dict[str, str] = {}

    def walk(node: yaml.Node, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                name, place = f"{prefix}{key.value}", f"{where}:{key.start_mark.line + 1}"
                if name in places:
                    raise UserError(f"{place}: {name} stands twice, first at {places[name]}: remove one")
                places[name] = place
                walk(value, f"{name}.")

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None:
        walk(root, "")
    return places


def _with_override_places(places: Mapping[str, str], overrides: Sequence[str]) -> dict[str, str]:
    """``places`` with the keys that overrides set or made standing there instead."""
    result = dict(places)
    for text in overrides:
        path, _ = parse_override(text)
        key = ".".join(path)
        result = {name: place for name, place in result.items() if not name.startswith(f"{key}.")}
        result[key] = f"override '{text}'"
        for parent in (".".join(path[:n]) for n in range(1, len(path))):
            result.setdefault(parent, result[key])
    return result


def recipe_from(raw: Mapping[str, Any], where: str = "recipe", places: Mapping[str, str] | None = None) -> Recipe:
    """Validate a recipe given as a mapping, presets filled in.

    Args:
        raw: the recipe.
        where: what to call it in messages.
        places: where a dotted key stands, where that is known better.

    Raises:
        UserError: one line per mistake, all at once.
    """
    return validated(Recipe, with_presets(raw), where, places)


def validated(
    section: type[AnySection], raw: Mapping[str, Any], where: str, places: Mapping[str, str] | None = None
) -> AnySection:
    """Validate a mapping as a section.

    Args:
        section: what it should be.
        raw: the mapping.
        where: what to call it in messages.
        places: where a dotted key stands, where that is known better.

    Raises:
        UserError: one line per mistake, all at once.
    """
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        raise UserError("\n".join(_mistakes(error, raw, section, where, places or {}))) from error


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, lay ``overrides`` on it, validate it and make its local paths absolute.

    Raises:
        UserError: file missing, not YAML, or anything wrong with its content (all mistakes at once).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"recipe {path}: {reason}") from error
    try:
        raw = yaml.safe_load(text)
        places = key_places(text, str(path))
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise UserError(f"{place}: not valid YAML ({getattr(error, 'problem', None) or error})") from error
    if not isinstance(raw, Mapping):
        raise UserError(f"{path}: a recipe is a mapping of keys; see recipes/ for examples")
    recipe = recipe_from(apply_overrides(raw, overrides), str(path), _with_override_places(places, overrides))
    return with_absolute_paths(recipe, path.parent)


_PATHS_OF_SUITES = ("data", "retain_log", "reference", "include_path")


def with_absolute_paths(recipe: Recipe, base_dir: Path) -> Recipe:
    """Make every local path of ``recipe`` absolute: beside the recipe first, then from the current directory."""

    def absolute(name: str) -> str:
        path = Path(name).expanduser()
        found = next((p for p in (base_dir / path, path) if p.exists()), None)
        return str(found.resolve()) if found is not None else name

    def visit(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: absolute(v) if k == "source" and isinstance(v, str) else visit(v) for k, v in value.items()}
        return value

    plain = visit(recipe.model_dump(mode="json"))
    plain["model"] = absolute(recipe.model)
    plain["output"] = str(Path(recipe.output).expanduser().resolve())
    plain["after"] = [absolute(name) for name in recipe.after]
    if recipe.evaluation.oracle is not None:
        plain["evaluation"]["oracle"] = absolute(recipe.evaluation.oracle)
    for suite in plain["evaluation"]["suites"].values():
        named = {key: suite[key] for key in _PATHS_OF_SUITES if suite and isinstance(suite.get(key), str)}
        if named:
            suite.update({key: absolute(name) for key, name in named.items()})
    return Recipe.model_validate(plain)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every value that was in force."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write :func:`dump_recipe` atomically."""
    write_bytes(path, dump_recipe(recipe).encode())
