import re

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from falcon_unlearn.api import load_recipe as load_any
from falcon_unlearn.attacks.battery import ATTACKS
from falcon_unlearn.corpus.sources import SourceConfig
from falcon_unlearn.errors import UserError
from falcon_unlearn.methods import METHODS
from falcon_unlearn.presets import PRESETS, deep_merge
from falcon_unlearn.recipe import Recipe, apply_overrides, dump_recipe, load_recipe, parse_override, recipe_from
from falcon_unlearn.selection.selectors import CRITERIA

SMALLEST = """\
model: tiny-llama
corpus:
  forget: {source: people.jsonl}
  retain: {source: keep.jsonl}
selection: {layers: auto}
method: {name: falcon, preset: default}
output: runs/people
seed: 0
"""
PRESET_NAMES = [(method, preset) for method, presets in PRESETS.items() for preset in presets]


@pytest.fixture
def write(tmp_path):
    def writer(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return writer


def mistakes(path, *overrides):
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).splitlines()


def raw(text=SMALLEST):
    return yaml.safe_load(text)


def test_the_smallest_recipe_of_the_design_is_valid(write):
    recipe = load_recipe(write(SMALLEST))
    assert (recipe.selection.layers, recipe.selection.selector) == ("auto", "sweep")
    assert (recipe.method.name, recipe.method.preset, recipe.seed) == ("falcon", "default", 0)


def test_only_model_corpus_and_output_are_required(write):
    recipe = load_recipe(write("model: m\ncorpus: {forget: a.txt, retain: b.txt}\noutput: o\n"))
    assert recipe.method.name == "falcon"
    assert mistakes(write("seed: 1\n")) == [
        f"{write('seed: 1')}: {key}: required, but missing"
        for key in ("model", "corpus.forget", "corpus.retain", "output")
    ]


def test_a_bare_string_is_short_for_a_source_and_for_a_method():
    short = recipe_from(
        {"model": "m", "corpus": {"forget": "a.txt", "retain": "b.txt"}, "method": "rmu", "output": "o"}
    )
    long = recipe_from(
        {
            "model": "m",
            "corpus": {"forget": {"source": "a.txt"}, "retain": {"source": "b.txt"}},
            "method": {"name": "rmu"},
            "output": "o",
        }
    )
    assert short == long


def test_several_forget_domains():
    corpus = {"forget": {"bio": {"source": "b"}, "cyber": {"source": "c", "config": "x", "split": "train[:5]"}}}
    recipe = recipe_from({**raw(), "corpus": {**corpus, "retain": "r"}})
    assert recipe.corpus.forget == {
        "bio": SourceConfig(source="b"),
        "cyber": SourceConfig(source="c", config="x", split="train[:5]"),
    }


# presets


def test_every_method_has_presets_and_every_preset_belongs_to_a_method():
    assert set(PRESETS) == set(METHODS)


@pytest.mark.parametrize(("method", "preset"), PRESET_NAMES)
def test_every_preset_is_valid_and_says_what_is_in_force(method, preset):
    recipe = recipe_from({**raw(), "selection": {}, "method": {"name": method, "preset": preset}})
    plain = recipe.model_dump(mode="json")

    def leaves(value, path=()):
        if not isinstance(value, dict):
            return {path: value}
        return {key: leaf for name, below in value.items() for key, leaf in leaves(below, (*path, name)).items()}

    in_force = leaves(plain)
    for path, value in leaves(PRESETS[method][preset]).items():
        assert in_force[path] == value


def test_every_preset_a_method_knows_is_in_the_table():
    for method, entry in METHODS.items():
        for preset in entry.config.model_fields["preset"].annotation.__args__:
            assert preset in PRESETS[method]


def test_what_a_recipe_says_wins_over_its_preset_key_by_key():
    preset = PRESETS["falcon"]["paper"]["training"]
    changes = {"training": {"steps": 7, "optimizer": {"lr": 1e-3}}}
    recipe = recipe_from({**raw(), **changes, "method": {"preset": "paper"}})
    assert recipe.training.steps == 7
    assert recipe.training.optimizer.lr == 1e-3
    assert recipe.training.batch_size == preset["batch_size"]
    assert recipe.training.optimizer.name == preset["optimizer"]["name"]


plain_mappings = st.recursive(
    st.integers(), lambda below: st.dictionaries(st.sampled_from("abc"), below, max_size=3), max_leaves=8
).filter(lambda value: isinstance(value, dict))


@given(plain_mappings, plain_mappings)
def test_deep_merge_lets_over_win_and_keeps_the_rest(under, over):
    result = deep_merge(under, over)
    assert set(result) == set(under) | set(over)
    for key, value in result.items():
        if key not in over:
            assert value == under[key]
        elif key in under and isinstance(over[key], dict) and isinstance(under[key], dict):
            assert value == deep_merge(under[key], over[key])
        else:
            assert value == over[key]


@given(plain_mappings)
def test_deep_merge_is_idempotent_and_has_a_neutral_element(mapping):
    assert deep_merge(mapping, mapping) == deep_merge({}, mapping) == deep_merge(mapping, {}) == mapping


# overrides


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("1.5", 1.5),
        ("[4, 5]", [4, 5]),
        ("a b", "a b"),
        ("true", True),
        ("", None),
        ("x=y", "x=y"),
        ("{", "{"),
    ],
)
def test_override_values_are_yaml_or_text(text, value):
    assert parse_override(f"a.b={text}") == (("a", "b"), value)


@pytest.mark.parametrize("text", ["seed", "=1", ".a=1", "a..b=1", "a.=1", ""])
def test_an_override_without_key_or_sign_is_refused(text):
    with pytest.raises(UserError, match="key=value") as caught:
        parse_override(text)
    assert "\n" not in str(caught.value)


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4), st.integers())
def test_an_override_sets_its_key_and_nothing_else(path, value):
    assume(len(path) < 4 or path[:3] != ["a", "b", "c"])  # a number has no keys
    before = {"a": {"b": {"c": 1}}, "kept": {"x": 2}}
    node = after = apply_overrides(before, [f"{'.'.join(path)}={value}"])
    for part in path:
        node = node[part]
    assert node == value
    assert after["kept"] == {"x": 2}
    assert before == {"a": {"b": {"c": 1}}, "kept": {"x": 2}}


def test_overrides_reach_everywhere(write):
    recipe = load_recipe(
        write(SMALLEST),
        [
            "training.optimizer.lr=1e-5",
            "selection.layers=[4, 5]",
            "method.preset=paper",
            "corpus.forget=other.jsonl",
            "corpus.retain.limit=3",
            "evaluation.utility.facts=facts.jsonl",
        ],
    )
    assert recipe.training.optimizer.lr == 1e-5
    assert recipe.selection.layers == (4, 5)
    assert recipe.method.preset == "paper"
    assert recipe.corpus.forget.source == "other.jsonl"
    assert (recipe.corpus.retain.source, recipe.corpus.retain.limit) == ("keep.jsonl", 3)
    assert recipe.evaluation.utility["facts"].source == "facts.jsonl"


def test_overrides_reach_into_what_was_given_short(write):
    text = "model: m\ncorpus: {forget: a.txt, retain: b.txt}\nmethod: falcon\noutput: o\n"
    recipe = load_recipe(write(text), ["corpus.forget.limit=3", "method.temperature=0.5"])
    assert (recipe.corpus.forget.source, recipe.corpus.forget.limit) == ("a.txt", 3)
    assert (recipe.method.name, recipe.method.temperature) == ("falcon", 0.5)


def test_overriding_the_method_name_keeps_the_knobs_beside_it(write):
    assert load_recipe(write(SMALLEST), ["method=rmu"]).method.name == "rmu"
    assert mistakes(write(SMALLEST.replace("preset: default", "temperature: 0.5")), "method=rmu")[0].endswith(
        "method.temperature is 0.5: unknown key"
    )


def test_an_override_below_a_number_is_refused(write):
    assert mistakes(write("seed: 3\n" + SMALLEST.replace("seed: 0\n", "")), "seed.x=1") == [
        "override 'seed.x=1': seed is 3, which has no keys"
    ]


# mistakes

CHOICE = "input should be"
INTEGER = "input should be a valid integer, unable to parse string as an integer"
NUMBER = "input should be a valid number, unable to parse string as a number"
MAPPING = "expected a mapping of keys"
LAYERS = "expected at least one layer index, from 0, none twice"
SPLIT = "unknown key (did you mean 'split'?)"
DOMAINS = "expected a path or hub id, {source: ...}, or several domains {name: {source: ...}, ...}"
SELECTORS = CHOICE + " " + ", ".join(map(repr, [*CRITERIA][:-1])) + f" or {[*CRITERIA][-1]!r}"
PRESETS_OF_FALCON = "'default', 'layer', 'paper' or 'published_code'"


def test_all_mistakes_are_told_at_once_each_with_line_key_value_and_hint(write):
    path = write(
        SMALLEST.replace("layers: auto", "selector: swep")
        + "sead: 3\ntraining:\n  step: 9\n  batch_size: 0\n  optimizer:\n    lr: fast\n    nam: sgd\n"
    )
    assert sorted(mistakes(path)) == sorted(
        [
            f"{path}:5: selection.selector is 'swep': {SELECTORS} (did you mean 'sweep'?)",
            f"{path}:9: sead is 3: unknown key (did you mean 'seed'?)",
            f"{path}:11: training.step is 9: unknown key (did you mean 'steps'?)",
            f"{path}:12: training.batch_size is 0: input should be greater than or equal to 1",
            f"{path}:14: training.optimizer.lr is 'fast': {NUMBER} / {CHOICE} 'auto'",
            f"{path}:15: training.optimizer.nam is 'sgd': unknown key (did you mean 'name'?)",
        ]
    )


@pytest.mark.parametrize(
    ("change", "key_and_value", "expected"),
    [
        ("method: falcn", "method", f"unknown method 'falcn' (did you mean 'falcon'?); known: {', '.join(METHODS)}"),
        ("method: 5", "method is 5", MAPPING),
        ("method:", "method is empty", MAPPING),
        ("method: {preset: papr}", "method.preset is 'papr'", f"{CHOICE} {PRESETS_OF_FALCON} (did you mean 'paper'?)"),
        ("method: {temprature: 1}", "method.temprature is 1", "unknown key (did you mean 'temperature'?)"),
        ("selection: auto", "selection is 'auto'", MAPPING),
        ("selection: {layers: [-1]}", "selection.layers is [-1]", LAYERS),
        ("selection: {layers: [1, 1]}", "selection.layers is [1, 1]", LAYERS),
        ("selection: {layers: []}", "selection.layers is []", LAYERS),
        ("selection: {candidates: []}", "selection.candidates is []", LAYERS),
        ("selection: {layers: 3}", "selection.layers is 3", f"{CHOICE} 'auto' or 'all' / expected a list"),
        ("selection: {layers: [a, 2]}", "selection.layers.0 is 'a'", INTEGER),
        ("seed: abc", "seed is 'abc'", INTEGER),
        ("evaluation: {utility: {a: {splt: y, source: x}}}", "evaluation.utility.a.splt is 'y'", SPLIT),
        ("corpus: {forget: {bio: {source: x, splt: y}}, retain: z}", "corpus.forget.bio.splt is 'y'", SPLIT),
        ("corpus: {forget: {splt: x, source: y}, retain: z}", "corpus.forget.splt is 'x'", SPLIT),
        ("corpus: {forget: 3, retain: z}", "corpus.forget is 3", DOMAINS),
    ],
)
def test_one_mistake_is_one_line(write, change, key_and_value, expected):
    key = change.partition(":")[0]
    kept = "".join(line + "\n" for line in SMALLEST.splitlines() if not line.startswith(key))
    if key == "corpus":
        kept = "".join(line + "\n" for line in kept.splitlines() if not line.startswith(" "))
    path = write(kept + change + "\n")
    line = (kept + change).count("\n") + 1
    assert mistakes(path) == [f"{path}:{line}: {key_and_value}: {expected}"]


def test_a_mistake_in_an_override_names_the_override_not_the_file(write):
    path = write(SMALLEST)
    assert mistakes(path, "seed=abc")[0].startswith("override 'seed=abc': seed is 'abc': ")
    assert mistakes(path, "training.optimiser.lr=1") == [
        "override 'training.optimiser.lr=1': training.optimiser: unknown key (did you mean 'optimizer'?)"
    ]
    assert mistakes(path, "method={name: falcon, taw: 1}") == [
        "override 'method={name: falcon, taw: 1}': method.taw is 1: unknown key"
    ]


def test_a_key_that_stands_twice_is_refused(write):
    path = write(SMALLEST + "seed: 1\n")
    assert mistakes(path) == [f"{path}:9: seed stands twice, first at {path}:8: remove one"]


values = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2)
)
keys = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp")), max_size=6)
anything = st.recursive(values, lambda below: st.dictionaries(keys, below, max_size=3))
SECTIONS = list(Recipe.model_fields)


@given(st.dictionaries(st.sampled_from(SECTIONS), anything, min_size=1, max_size=3))
def test_whatever_stands_in_a_recipe_gives_a_recipe_or_clear_lines(changes):
    try:
        recipe_from({**raw(), **changes})
    except UserError as error:
        for line in str(error).split("\n"):
            assert line.startswith("recipe: "), line
            # Neither the tags of unions nor the names of our classes: they are no words of a recipe.
            assert not re.search(r"literal\[|tuple\[|function-|Config\b|model_type|pydantic", line), line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "a recipe is a mapping of keys"),
        ("- a\n", "a recipe is a mapping of keys"),
        ("model: {a\n", ":2: not valid YAML"),
        ("a:\n\t- b\n", ":2: not valid YAML"),
        ("seed: &a {x: *a}\n", "not valid YAML"),
    ],
)
def test_what_is_no_mapping_is_refused(write, text, expected):
    (line,) = mistakes(write(text))
    assert expected in line
    assert str(write(text)) in line


def test_a_recipe_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"model: \xff\n")
    assert mistakes(tmp_path / "latin.yaml") == [f"recipe {tmp_path / 'latin.yaml'}: not UTF-8 text"]
    assert mistakes(tmp_path / "none.yaml") == [f"recipe {tmp_path / 'none.yaml'}: No such file or directory"]
    assert mistakes(tmp_path) == [f"recipe {tmp_path}: Is a directory"]


# the resolved recipe


@pytest.mark.parametrize(("method", "preset"), PRESET_NAMES)
def test_a_resolved_recipe_validates_to_itself(write, method, preset):
    first = load_recipe(write(SMALLEST), [f"method.name={method}", f"method.preset={preset}"])
    again = load_recipe(write(dump_recipe(first)))
    assert again == first
    assert dump_recipe(again) == dump_recipe(first)


def test_a_resolved_recipe_says_every_value():
    def fields(section):
        return {
            name: fields(value) if hasattr(value, "model_fields_set") else None
            for name, value in ((name, getattr(section, name)) for name in type(section).model_fields)
        }

    def keys(value, shape):
        return {name: keys(value[name], below) if below else None for name, below in shape.items()}

    recipe = recipe_from(raw())
    shape = fields(recipe)
    assert keys(yaml.safe_load(dump_recipe(recipe)), shape) == shape


def test_local_paths_become_absolute_beside_the_recipe_first(write, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name in ("people.jsonl", "keep.jsonl"):
        (here / name).write_text("")
    (tmp_path / "people.jsonl").write_text("")
    (tmp_path / "tiny-llama").mkdir()
    (tmp_path / "oracle").mkdir()
    recipe = load_recipe(write(SMALLEST), ["evaluation.oracle=oracle", "evaluation.utility.x=keep.jsonl"])
    assert recipe.model == str(tmp_path / "tiny-llama")
    assert recipe.corpus.forget.source == str(tmp_path / "people.jsonl")
    assert recipe.corpus.retain.source == str(here / "keep.jsonl")
    assert recipe.evaluation.oracle == str(tmp_path / "oracle")
    assert recipe.evaluation.utility["x"].source == str(here / "keep.jsonl")
    assert recipe.output == str(here / "runs" / "people")


def test_hub_ids_stay_as_they_are(write):
    recipe = load_recipe(write(SMALLEST.replace("people.jsonl", "locuslab/TOFU")))
    assert (recipe.model, recipe.corpus.forget.source) == ("tiny-llama", "locuslab/TOFU")


def test_a_mapping_is_read_like_a_file(write, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "people.jsonl").write_text("")
    assert load_any(raw(), ["seed=4"]) == load_recipe(write(SMALLEST), ["seed=4"])


def test_a_recipe_made_in_python_gets_its_preset():
    raw = {"model": "m", "corpus": {"forget": "f.jsonl", "retain": "k.jsonl"}, "output": "o"}
    assert Recipe(**raw) == recipe_from(raw)
    assert Recipe(**raw).training.batch_size == PRESETS["falcon"]["default"]["training"]["batch_size"]


# attacks and suites


def test_a_list_of_attacks_is_short_for_their_defaults():
    short = recipe_from({**raw(), "attacks": ["relearn", "logit-lens"]})
    assert short == recipe_from({**raw(), "attacks": {"relearn": {}, "logit-lens": {}}})
    assert list(short.attacks.chosen()) == ["relearn", "logit-lens"]
    assert recipe_from({**raw(), "attacks": "quantize"}) == recipe_from({**raw(), "attacks": ["quantize"]})
    assert recipe_from({**raw(), "attacks": []}).attacks.chosen() == {}


def test_audit_in_a_recipe_is_all_but_transfer():
    assert list(recipe_from({**raw(), "attacks": "audit"}).attacks.chosen()) == [n for n in ATTACKS if n != "transfer"]


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "transfer"])
def test_names_with_hyphens_round_trip_through_the_resolved_recipe(write, name):
    first = load_recipe(write(SMALLEST), [f"attacks.{name}.known=2", "attacks.seconds=60"])
    text = dump_recipe(first)
    assert name in yaml.safe_load(text)["attacks"]
    again = load_recipe(write(text))
    assert again == first
    assert {n: config.known for n, config in again.attacks.chosen().items()} == {name: 2}
    assert dump_recipe(again) == text
    # An underscore does for a hyphen.
    assert (
        recipe_from({**raw(), "attacks": {name.replace("-", "_"): {"known": 2}, "seconds": 60}}).attacks
        == first.attacks
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attacks": ["relern"]}, r"attacks is \['relern'\]: unknown attack 'relern' \(did you mean 'relearn'\?\)"),
        ({"attacks": "relern"}, r"unknown attack 'relern'"),
        ({"attacks": ["relearn", 3]}, r"attacks.*expected a mapping"),
        ({"attacks": {"relern": {}}}, r"attacks\.relern: unknown key \(did you mean 'relearn'\?\)"),
        ({"attacks": {"logitlens": {}}}, r"attacks\.logitlens: unknown key \(did you mean 'logit-lens'\?\)"),
        (
            {"attacks": {"relearn": {"knwon": 3}}},
            r"attacks\.relearn\.knwon is 3: unknown key \(did you mean 'known'\?\)",
        ),
        ({"attacks": {"logit-lens": {"optoins": 1}}}, r"attacks\.logit-lens\.optoins.*did you mean 'options'"),
        ({"attacks": {"logit_lens": {"optoins": 1}}}, r"optoins.*did you mean 'options'"),
        (
            {"attacks": {"quantize": {"formats": ["int9"]}}},
            r"attacks\.quantize\.formats\.0 is 'int9'.*did you mean 'int",
        ),
        ({"attacks": {"quantize": {"known": 0}}}, r"attacks\.quantize\.known is 0"),
        ({"attacks": {"relearn": {"lora": {"rnak": 3}}}}, r"attacks\.relearn\.lora\.rnak.*did you mean 'rank'"),
        ({"attacks": {"neighbours": {"source": "x", "splt": 1}}}, r"attacks\.neighbours\.splt.*did you mean 'split'"),
        ({"attacks": {"transfer": {}}}, r"attacks\.transfer\.triggers: required, but missing"),
        ({"attacks": {"prune": {}}, "evaluation": {"enabled": False}}, r"attacks: .*evaluation\.enabled to true"),
        (
            {"evaluation": {"suites": {"tofuu": {}}}},
            r"evaluation\.suites\.tofuu: unknown key \(did you mean 'tofu'\?\)",
        ),
        ({"evaluation": {"suites": {"tofu": {"splt": 1}}}}, r"evaluation\.suites\.tofu\.splt.*did you mean 'split'"),
        (
            {"evaluation": {"suites": {"tofu": {"split": "forget50"}}}},
            r"suites\.tofu\.split is 'forget50'.*did you mean",
        ),
        ({"evaluation": {"suites": {"own": {}}}}, r"evaluation\.suites\.own\.forget: required, but missing"),
        ({"evaluation": {"suites": ["tofu"]}}, r"evaluation\.suites is \['tofu'\]: expected a mapping"),
    ],
)
def test_mistakes_in_attacks_and_suites_are_one_line(changes, message):
    with pytest.raises(UserError) as caught:
        recipe_from({**raw(), **changes})
    assert len(str(caught.value).splitlines()) == 1
    assert re.search(message, str(caught.value)), str(caught.value)


def test_paths_of_suites_and_attacks_become_absolute_too(write, tmp_path):
    for name in ("tofu", "model"):
        (tmp_path / name).mkdir()
    for name in ("log.json", "near.jsonl", "mine.jsonl", "other.jsonl"):
        (tmp_path / name).write_text("")
    suites = (
        "evaluation.suites.tofu={data: tofu, retain_log: log.json}",
        "evaluation.suites.privacy={forget: mine.jsonl, holdout: other.jsonl, reference: model}",
    )
    recipe = load_recipe(write(SMALLEST), [*suites, "attacks.neighbours=near.jsonl"])
    found = recipe.evaluation.suites
    assert (found.tofu.data, found.tofu.retain_log) == (str(tmp_path / "tofu"), str(tmp_path / "log.json"))
    assert (found.privacy.forget.source, found.privacy.reference) == (
        str(tmp_path / "mine.jsonl"),
        str(tmp_path / "model"),
    )
    assert recipe.attacks.neighbours.source == str(tmp_path / "near.jsonl")
    assert load_recipe(write(SMALLEST), ["evaluation.suites.tofu={}"]).evaluation.suites.tofu.data == "locuslab/TOFU"
