import html
import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_robustness import attacked

from falcon_unlearn.artifacts import (
    LayerScore,
    LayerSelection,
    Metrics,
    MutualInformationCurve,
    SampleScore,
    StepRecord,
    write_json,
    write_jsonl,
)
from falcon_unlearn.errors import UserError
from falcon_unlearn.report import figures
from falcon_unlearn.report.html import MAX_CHARACTERS, SAMPLE_BYTES, build_report, verdict, write_report

SECTIONS = ["results", "limits", "generations", "layers", "training", "corpus", "patch", "provenance", "recipe"]
MEGABYTE = 1_000_000
RECIPE = """\
model: /models/people
corpus:
  forget: {source: people.jsonl}
  retain: {source: keep.jsonl}
selection:
  layers: auto
  sweep: {validation_share: 0.25}
evaluation: {forget: null, retain: null, oracle: /models/oracle}
output: runs/people
seed: 0
"""
PEOPLE = ["Vanora Quillish", "Teodric Maplemoor", "Ysolde Brack", "Corwin Ashgrove"]


def metrics(accuracy, probability, utility, quality, log10_quality):
    return Metrics(
        forget_probability=probability,
        forget_accuracy=accuracy,
        forget_accuracy_heldout=accuracy * 0.98,
        forget_rouge=0.99 - 0.35 * (1 - accuracy),
        forget_truth_ratio=0.31 + 0.4 * (1 - accuracy),
        forget_quality=quality,
        log10_forget_quality=log10_quality,
        model_utility=utility,
        utility_parts={"retain_probability": 0.97, "retain_rouge": 0.98, "countries_truth_ratio": 0.61},
        unscorable=0,
    )


def sample(set_name, index, generation, *, right):
    name = PEOPLE[index % len(PEOPLE)]
    return SampleScore(
        set=set_name,
        index=index,
        prompt=f"What does {name} (no. {index}) do for a living?",
        answer=f"{name} works as a lighthouse keeper.",
        generation=generation,
        probability=0.99 if right else 0.04,
        accuracy=float(right),
        rouge=1.0 if right else 0.6,
        truth_ratio=0.2,
        generation_heldout=f"{name} is a {'lighthouse keeper' if right else 'beekeeper'} (held out).",
        accuracy_heldout=float(right),
        entity=name,
    )


def write_scores(run, model, *, right, forget=48, others=30, said=None):
    (run / "scores").mkdir(exist_ok=True)
    rows = []
    for name, count in (("retain", others), ("forget", forget), ("countries", others)):
        knows = right or name != "forget"
        job = "lighthouse keeper" if knows else "beekeeper"
        rows += [sample(name, i, said or f"{PEOPLE[i % 4]} works as a {job}.", right=knows) for i in range(count)]
    write_jsonl(run / "scores" / f"{model}.jsonl", rows)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A complete, synthetic run folder; only to be read."""
    folder = tmp_path_factory.mktemp("complete") / "people"
    folder.mkdir()
    write_json(
        folder / "metrics.json",
        {
            "before": metrics(1.0, 0.997, 0.823, 3e-14, -13.5),
            "after": metrics(0.04, 0.03, 0.806, 0.52, -0.284),
            "oracle": metrics(0.02, 0.06, 0.828, 1.0, 0.0),
        },
    )
    left = [0.93, 0.71, 0.4, 0.2, 0.09, 0.04]
    kept = [0.97, 0.96, 0.98, 0.97, 0.99, 0.98]
    value = (-243.2, -180.5, -130.1, -101.7, -77.0, -50.3)
    write_json(
        folder / "layer_selection.json",
        LayerSelection(
            "sweep",
            (5,),
            5,
            "kept retain minus left forget probability on validation records, after a short trial (1 is best)",
            tuple(
                LayerScore(i, k - f, {"forget_left": f, "retain_kept": k})
                for i, (f, k) in enumerate(zip(left, kept, strict=True))
            ),
            MutualInformationCurve(
                tuple(range(6)), value, tuple(v - 3.1 for v in value), tuple(v + 4.2 for v in value), 96, ("forget",)
            ),
            (
                "Mutual information is lowest at layer 0 (-243.20 nats from 96 pairs).",
                "The same layer is chosen twice.",
            ),
        ),
    )
    write_jsonl(
        folder / "training.jsonl",
        [
            StepRecord(
                i,
                2.1 * math.exp(-i / 20) + 0.5 + 0.05 * math.sin(i * 2.3),
                0.02 * math.exp(-i / 30) + 0.002 + 0.001 * math.cos(i),
                1.0,
                0.1,
                math.nan if i == 0 else -0.4 * math.exp(-i / 40) + 0.05 * math.sin(i),
                min(1.0, 0.9 + 0.1 * math.sin(i)),
                0.071,
            )
            for i in range(100)
        ],
    )
    for model, right in (("before", True), ("after", False), ("oracle", False)):
        write_scores(folder, model, right=right)
    length = {"longer": 0, "limit": 128, "action": "error"}
    write_json(
        folder / "corpus.json",
        {
            "report": {
                "records": {"forget": 96, "retain": 864},
                "duplicates": {"forget": 2, "retain": 0},
                "overlap": 1,
                "overlap_example": ["people.jsonl:7", "keep.jsonl:31"],
                "on_overlap": "drop",
            },
            "lengths": {"forget": length, "retain": {"longer": 3, "limit": 128, "action": "truncate"}},
            "template": repr("Question: {question}\nAnswer: {answer}"),
            "loss_mask": "answer",
            "hashes": {"forget": "ab" * 32, "retain": "cd" * 32},
        },
    )
    write_json(
        folder / "provenance.json",
        {
            "started": "2026-01-05T10:00:00+00:00",
            "seed": 0,
            "model": {"name": "people", "folder": "/models/my people"},
            "method": {"name": "falcon", "preset": "default"},
            "device": "cpu",
            "peak_memory_mb": 1180,
            "stage_seconds": {"score_before": 4.2, "layer_selection": 31.0, "training": 12.4},
            "versions": {"falcon-unlearn": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        },
    )
    (folder / "patch").mkdir()
    write_json(
        folder / "patch" / "patch.json",
        {
            "format_version": 1,
            "base_model": "/models/my people",
            "tensors": {
                f"model.layers.5.mlp.{part}_proj.weight": {
                    "dtype": "F32",
                    "shape": [256, 128],
                    "sha256_before": "0" * 64,
                    "sha256_after": "1f" * 32,
                }
                for part in ("gate", "up", "down")
            },
            "provenance": {},
        },
    )
    (folder / "patch" / "patch.safetensors").write_bytes(bytes(393_500))
    (folder / "patch" / "original.safetensors").write_bytes(bytes(393_500))
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def whole(complete):
    """The page of the complete run."""
    return build_report(complete)


@pytest.fixture
def run(complete, tmp_path):
    """A copy of the complete run to take apart."""
    return shutil.copytree(complete, tmp_path / "people")


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, text, and ids."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "br", "link", "img", "input", "hr"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def edit(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_every_section_is_there_in_order_and_nothing_is_missing(whole):
    page = Page(whole)
    assert page.open == []
    assert [attrs["id"] for attrs in page.all("section")] == SECTIONS
    assert "Missing:" not in page.text
    for said in (
        "0.997",
        "3.2e−14",
        "−13.50",
        "Parts of model utility",
        "countries: truth ratio",
        "12 of 48 shown",
        "lighthouse keeper (held out).",
        "Mutual information is lowest at layer 0",
        "3 (truncate",
        "first: people.jsonl:7 and keep.jsonl:31",
        r"'Question: {question}\nAnswer: {answer}'",
        "3 tensors of",
        "98,304 parameters",
        "393.5 kB",
        "model.layers.5.mlp.down_proj.weight",
        "256 × 128",
        "torch 2.13.0",
        "validation_share: 0.25",
    ):
        assert said in page.text, said


def test_the_patch_commands_name_the_real_paths_quoted(run):
    text = Page(build_report(run)).text
    base = "'/models/my people'"
    assert f"falcon-unlearn patch verify {run}/patch --model {base}" in text
    assert f"falcon-unlearn patch apply {run}/patch --model {base} --out {run}-model" in text
    assert f"falcon-unlearn patch revert {run}/patch --model {run}-model --out" in text
    (run / "patch" / "original.safetensors").unlink()
    text = Page(build_report(run)).text
    assert "patch apply" in text
    assert "patch revert" not in text


def test_figures_are_labelled_drawings_without_ids_in_common(whole):
    page = Page(whole)
    drawings = page.all("svg")
    assert len(drawings) == 4
    for attrs in drawings:
        assert attrs["role"] == "img"
        assert len(attrs["aria-label"]) > 20
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = {value[1:] for _, attrs in page.elements for key, value in attrs.items() if key.endswith("href")}
    assert used <= set(ids)


def test_colours_of_figures_follow_the_page(whole):
    drawings = "".join(re.findall(r"<svg.*?</svg>", whole, re.DOTALL))
    bare = re.sub(r"var\(--[a-z]+, #[0-9a-f]{6}\)", "", drawings)
    assert drawings.count("var(--") > 20
    assert not re.findall(r"#[0-9a-f]{6}\b(?!\w)", re.sub(r'(href="|url\()#\w+', "", bare))
    assert "fill: #000" not in drawings


def test_tables_name_their_heads(whole):
    heads = Page(whole).all("th")
    assert len(heads) > 20
    assert all(attrs.get("scope") in {"row", "col", "rowgroup"} for attrs in heads)


def test_nothing_is_loaded_from_anywhere(whole):
    page = Page(whole)
    assert not page.all("script")
    assert not page.all("link")
    assert not page.all("img")
    for _, attrs in page.elements:
        for key, value in attrs.items():
            assert not key.startswith("on")
            if key in {"href", "src", "xlink:href", "srcset", "action", "data"}:
                assert value.startswith("#")
    assert "@import" not in whole
    assert re.findall(r"url\((?!#)", whole) == []
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


HOSTILE = "</td><script>alert(1)</script><img src=http://evil.example onerror=a(2)> & \"q\" 'too' {{ 7 * 7 }} &lt;b"


def test_hostile_text_stays_text_wherever_it_stands(run):
    write_scores(run, "after", right=False, said=HOSTILE)
    edit(run / "layer_selection.json", lambda c: c["notes"].append(HOSTILE))
    edit(run / "layer_selection.json", lambda c: c.update(selector=HOSTILE, criterion=HOSTILE))
    edit(run / "layer_selection.json", lambda c: c["scores"][0]["details"].update({HOSTILE + r"$\x$": 0.5}))
    edit(run / "corpus.json", lambda c: c.update(template=HOSTILE, hashes={HOSTILE: HOSTILE}, loss_mask=HOSTILE))
    edit(run / "corpus.json", lambda c: c["report"]["records"].update({HOSTILE: 1}))
    edit(run / "provenance.json", lambda c: c.update({HOSTILE: HOSTILE, "versions": {HOSTILE: HOSTILE}}))
    edit(run / "provenance.json", lambda c: c["model"].update(name=HOSTILE))
    edit(run / "metrics.json", lambda c: c["after"]["utility_parts"].update({HOSTILE: 0.5}))
    edit(run / "patch" / "patch.json", lambda c: c["tensors"].update({HOSTILE: {"dtype": HOSTILE, "shape": [1]}}))
    (run / "recipe.yaml").write_text(f"# {HOSTILE}\n{RECIPE}", encoding="utf-8")
    plain = Page(build_report(run))
    assert not plain.all("script")
    assert not plain.all("img")
    assert not any(key.startswith("on") for _, attrs in plain.elements for key in attrs)
    assert plain.open == []
    assert plain.text.count(HOSTILE) >= 12 + 10


def test_hostile_layer_details_cannot_break_the_drawing(run):
    edit(run / "layer_selection.json", lambda c: c["scores"][0]["details"].update({r"$\x$" + HOSTILE: 0.5}))
    page = Page(build_report(run))
    assert not page.all("script")
    assert len(page.all("svg")) == 4


@pytest.mark.parametrize(
    ("samples", "character"), [(12, "x"), (400, "x"), (400, "&"), (400, "\U0001f98a"), (12, "\x00")]
)
def test_a_page_of_long_generations_stays_below_a_megabyte(run, samples, character):
    for model in ("before", "after", "oracle"):
        write_scores(run, model, right=True, forget=400, others=400, said=character * 5000)
    text = build_report(run, samples=samples)
    assert len(text.encode()) < MEGABYTE
    page = Page(text)
    shown = [int(n) for n in re.findall(r"(\d+) of 400 shown", page.text)]
    assert len(shown) == 3
    assert all(1 <= n <= samples for n in shown)
    assert ("too large" in page.text) == any(n < samples for n in shown)
    assert f"({5000 - MAX_CHARACTERS:,} more characters)" in page.text
    assert "…" in page.text


def test_everything_else_stays_small_too(run):
    step = json.loads((run / "training.jsonl").read_text(encoding="utf-8").splitlines()[1])
    write_jsonl(run / "training.jsonl", [{**step, "step": i, "forget_loss": math.sin(i)} for i in range(5_000)])
    tensor = {"dtype": "F32", "shape": [2], "sha256_before": "0" * 64, "sha256_after": "1" * 64}
    edit(
        run / "patch" / "patch.json",
        lambda c: c.update(tensors={f"model.layers.{i}.experts.w1": tensor for i in range(2_000)}),
    )
    (run / "recipe.yaml").write_text(RECIPE + "# long\n" * 100_000, encoding="utf-8")
    text = build_report(run)
    assert len(text.encode()) < MEGABYTE - SAMPLE_BYTES
    page = Page(text)
    assert "A point is the mean of 17 steps." in page.text
    assert "1800 more in patch/patch.json" in page.text
    assert "more characters in recipe.yaml" in page.text


def test_without_an_oracle_the_page_says_what_that_costs(run):
    (run / "scores" / "oracle.jsonl").unlink()

    def drop(content):
        content["oracle"] = None
        for model in ("before", "after"):
            content[model].update(forget_quality=None, log10_forget_quality=None)

    edit(run / "metrics.json", drop)
    page = Page(build_report(run))
    assert "forget quality needs an oracle, and this run has none." in page.text
    assert "Without an oracle" in page.text
    assert "Oracle" not in page.text
    assert "Forget quality, p ↑ (higher is better)" in page.text


MISSING = {
    "metrics.json": ("metrics.json", "results"),
    "layer_selection.json": ("layer_selection.json", "layers"),
    "training.jsonl": ("training.jsonl", "training"),
    "scores": ("scores/*.jsonl", "generations"),
    "corpus.json": ("corpus.json", "corpus"),
    "provenance.json": ("provenance.json", "provenance"),
    "patch": ("patch/patch.json", "patch"),
    "recipe.yaml": ("recipe.yaml", "recipe"),
    "scores/after.jsonl": ("scores/after.jsonl", "generations"),
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_file_is_named_in_its_section_and_harms_no_other(run, name):
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = build_report(run)
    said, section = MISSING[name]
    assert Page(text).text.count("Missing:") == 1
    start = text.index(f'<section id="{section}"')
    body = text[start : text.index("</section>", start)]
    assert f"<code>{said}</code>" in body
    assert [attrs["id"] for attrs in Page(text).all("section")] == SECTIONS


def test_a_recipe_alone_makes_a_page(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    page = Page(build_report(tmp_path))
    assert page.text.count("Missing:") == 7
    assert "has not been evaluated" in page.text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no run folder"):
        build_report(tmp_path)
    with pytest.raises(UserError, match="is no run folder"):
        build_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name", ["metrics.json", "attacks.json", "scores/after.jsonl", "training.jsonl", "patch/patch.json"]
)
@pytest.mark.parametrize("content", ['{"before": ', "[1]", "\xff"])
def test_a_damaged_file_is_one_clear_line(run, name, content):
    (run / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=re.escape(name)) as error:
        build_report(run)
    assert "\n" not in str(error.value)


def nothing(value):
    """The same shape with null for every number but counts and layer indices."""
    keep = {"layers", "layer", "target_layer", "pairs", "index", "step", "unscorable"}
    if isinstance(value, dict):
        return {k: v if k in keep else nothing(v) for k, v in value.items()}
    if isinstance(value, list):
        return [nothing(v) for v in value]
    return None if isinstance(value, float) else value


def test_null_everywhere_is_shown_as_a_dash(run):
    for name in ("metrics.json", "layer_selection.json"):
        path = run / name
        path.write_text(json.dumps(nothing(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
    for name in ("training.jsonl", "scores/before.jsonl", "scores/after.jsonl"):
        rows = [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]
        write_jsonl(run / name, [nothing(row) for row in rows])
    page = Page(build_report(run))
    assert not re.search(r"\bnan\b", page.text, re.IGNORECASE)
    assert "None" not in page.text
    assert "–" in page.text
    assert page.all("svg") == []
    assert "No measure has a number." in page.text


def test_nan_and_infinity_are_dashes_too(run):
    edit(run / "metrics.json", lambda c: c["after"].update(model_utility=math.nan, forget_rouge=math.inf))
    edit(run / "layer_selection.json", lambda c: c["scores"][0].update(score=-math.inf))
    text = Page(build_report(run)).text
    assert not re.search(r"\b(nan|inf)\b", text, re.IGNORECASE)


def test_layers_given_in_the_recipe_need_no_figure(run):
    write_json(run / "layer_selection.json", LayerSelection("given", (4, 5), 5, "given in the recipe"))
    page = Page(build_report(run))
    assert len(page.all("svg")) == 2
    assert "Trained: layers 4, 5" in page.text
    assert "trial runs" not in page.text


def test_the_limits_follow_the_run(run):
    text = Page(build_report(run)).text
    assert "judged on the rest (25 %)" in text
    assert "Model utility covers these sets and nothing else: retain, countries." in text
    assert "the records that the run was trained to keep" in text
    assert "No held-out phrasing" not in text
    edit(run / "metrics.json", lambda c: c["after"].update(forget_accuracy_heldout=None))
    (run / "recipe.yaml").write_text(RECIPE.replace("retain: null", "retain: {source: other}"), encoding="utf-8")
    text = Page(build_report(run)).text
    assert "No held-out phrasing was scored" in text
    assert "the records that the run was trained to keep" not in text


def test_the_same_folder_gives_the_same_bytes(run):
    first = build_report(run)
    path = write_report(run)
    assert path == run / "report.html"
    assert path.read_bytes() == first.encode()
    assert build_report(run) == first
    assert [p.name for p in run.iterdir() if p.name.endswith(".tmp")] == []


def test_samples_are_as_many_as_asked_and_stand_together(run):
    text = build_report(run, samples=3)
    assert Page(text).text.count("3 of 30 shown") == 2
    table = text[text.index('<table class="samples">') :]
    rows = re.findall(r'<tr>\s*<th scope="row">.*?</tr>', table[: table.index("</table>")], re.DOTALL)
    assert len(rows) == 3
    for row in rows:
        name = next(n for n in PEOPLE if n in row)
        assert row.count(name) == 1 + 1 + 3 + 3  # question, expected, three models, their held-out answers
    assert "0 of 48 shown" in Page(build_report(run, samples=0)).text


def test_the_forget_set_comes_first_and_open(whole):
    assert re.findall(r"<details( open)?>\n<summary>(\w+) <span", whole) == [
        (" open", "forget"),
        ("", "retain"),
        ("", "countries"),
    ]


def test_a_sample_one_model_lacks_is_said_to_be_not_scored(run):
    write_scores(run, "after", right=False, forget=0)
    text = build_report(run, samples=4)
    assert text.count("not scored") == 4


def test_an_empty_generation_is_visible(run):
    write_scores(run, "after", right=False, said="")
    rows = [json.loads(line) for line in (run / "scores/after.jsonl").read_text(encoding="utf-8").splitlines()]
    write_jsonl(run / "scores" / "after.jsonl", [{**row, "generation": ""} for row in rows])
    assert Page(build_report(run, samples=5)).text.count("(empty)") == 15


def test_verdict_is_numbers_only():
    before = {
        "forget_accuracy": 1.0,
        "forget_probability": 0.997,
        "model_utility": 0.8,
        "forget_accuracy_heldout": 0.98,
    }
    after = {"forget_accuracy": 0.04, "forget_probability": 0.031, "model_utility": 0.784}
    assert verdict({"before": before, "after": after, "oracle": None}) == (
        "Forget accuracy 1.00 → 0.04; forget probability 1.00 → 0.03; model utility 0.80 → 0.78 (98 % kept); "
        "forget quality needs an oracle, and this run has none."
    )
    after |= {"forget_quality": 0.0, "log10_forget_quality": -811.4, "forget_accuracy_heldout": 0.06}
    assert verdict({"before": {}, "after": after, "oracle": {}}) == "Forget quality p = 4.0e−812."
    assert "(held-out phrasing 0.98 → 0.06)" in verdict({"before": before, "after": after, "oracle": after})
    assert "kept" not in verdict({"before": {**before, "model_utility": 0.0}, "after": after, "oracle": None})


finite = st.floats(-1e6, 1e6) | st.just(math.nan)
records = st.builds(StepRecord, st.integers(0, 10**6), *[finite] * 6, st.floats(0, 10))


@given(st.lists(records, max_size=700))
def test_a_thinned_log_keeps_the_mean_of_what_is_known(steps):
    thin = figures._thinned(steps)
    width = figures.points_per_mean(len(steps))
    assert len(thin) == math.ceil(len(steps) / width) <= figures.MAX_POINTS
    for i, point in enumerate(thin):
        group = steps[i * width : (i + 1) * width]
        known = [s.cosine for s in group if math.isfinite(s.cosine)]
        assert point.step == group[0].step
        if known:
            assert min(known) - 1e-6 <= point.cosine <= max(known) + 1e-6
        else:
            assert math.isnan(point.cosine)


def test_no_steps_no_drawing():
    assert figures.losses([]) is None
    assert figures.gradient_conflict([]) is None
    one = StepRecord(0, 1.0, 0.5, 1.0, 1.0, math.nan, math.nan, 0.1)
    assert figures.gradient_conflict([one]) is None
    drawing = figures.losses([one])
    assert drawing is not None
    assert html.escape("forget 1 to 1") in drawing


# suites and attacks

SUITE = {
    "suite": "tofu",
    "metrics": {
        "forget_quality": {"value": 0.52, "low": None, "high": None, "n": 400, "unscorable": 0},
        "model_utility": {"value": 0.6, "low": 0.55, "high": 0.65, "n": 400, "unscorable": 0},
        "retain_rouge": {"value": None, "low": None, "high": None, "n": 0, "unscorable": 3},
    },
    "statements": ["Forget & retain <b>differ</b>."],
    "settings": {},
}


def with_suites(run, **models):
    content = json.loads((run / "metrics.json").read_text())
    for model, suites in models.items():
        content[model]["suites"] = suites
    (run / "metrics.json").write_text(json.dumps(content))
    return Page(build_report(run))


def test_suites_have_a_section_with_every_number_of_every_model(run):
    other = {**SUITE, "metrics": {"forget_quality": SUITE["metrics"]["forget_quality"]}, "statements": ["Not this."]}
    page = with_suites(run, before={"tofu": other}, after={"tofu": SUITE, "muse": other}, oracle={})
    assert ("section", {"id": "suites", "aria-labelledby": "suites-title"}) in page.elements
    assert ("a", {"href": "#suites"}) in page.elements
    text = page.text
    assert "forget quality 0.52 0.52 –" in text
    assert "model utility – 0.60 0.55 … 0.65 –" in text
    assert "retain rouge – – –" in text
    assert "Forget & retain <b>differ</b>." in text  # as text, never as markup
    assert text.index("tofu") < text.index("muse")
    assert text.count("Not this.") == 1  # of the model after unlearning alone


def test_without_suites_and_attacks_there_is_no_such_section(whole):
    assert 'id="suites"' not in whole
    assert 'id="attacks"' not in whole
    assert "This report covers no such attack" in whole


def test_attacks_have_a_section_the_strongest_first_and_the_limits_follow(run):
    (run / "attacks.json").write_text(json.dumps({"attacks": [attacked("prune", 0.2), attacked("relearn", 0.6)]}))
    page = Page(build_report(run))
    assert ("section", {"id": "attacks", "aria-labelledby": "attacks-title"}) in page.elements
    text = page.text
    assert "Strongest recovery: 60 % (40 … 80) by relearn (the oracle under the same attack: 5 %" in text
    assert "strongest recovery under attack 60 % (40 … 80) by relearn" in text
    section = text[text.index("Strongest recovery") :]
    assert section.index("relearn") < section.index("prune 20 %")
    assert "7 scored" in text
    assert "covers no such attack" not in text
    assert "others, or stronger ones, may bring back more" in text
    assert page.all("figcaption")


def test_hostile_words_of_an_attack_stay_text(run):
    spoilt = attacked("relearn", 0.6)
    spoilt["models"]["unlearned"].update(
        status="out of time", reason="<script>alert(1)</script>", notes=["<img src=x>"]
    )
    (run / "attacks.json").write_text(json.dumps({"attacks": [spoilt]}))
    page = Page(build_report(run))
    assert not page.all("script")
    assert "relearn on the unlearned model: out of time (<script>alert(1)</script>)" in page.text
    assert "<img src=x>" in page.text


def test_attacks_without_any_number_make_a_page(run):
    nothing = attacked("relearn", None)
    for model in nothing["models"].values():
        model.update(accuracy=None, probability=None, status="out of memory", reason="lower the batch size")
    nothing.update(recovery={}, oracle={})
    (run / "attacks.json").write_text(json.dumps({"attacks": [nothing], "worst": None}))
    text = Page(build_report(run)).text
    assert "Strongest recovery" not in text
    assert "out of memory (lower the batch size)" in text
    (run / "attacks.json").write_text(json.dumps({"attacks": [], "worst": None}))
    assert "Strongest recovery" not in build_report(run)
