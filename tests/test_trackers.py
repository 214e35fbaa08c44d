"""Trackers are shown what training.jsonl and metrics.json say, nothing else, and never stop a run."""

import json
import sys
import threading
import time
import typing
from types import SimpleNamespace

import pytest
from conftest import merged

from falcon_unlearn import trackers
from falcon_unlearn.artifacts import read_jsonl
from falcon_unlearn.cli import main
from falcon_unlearn.console import Console
from falcon_unlearn.engine.trainer import TrainingConfig
from falcon_unlearn.errors import UserError
from falcon_unlearn.methods import METHODS
from falcon_unlearn.pipeline import run_recipe
from falcon_unlearn.recipe import SelectionConfig, _sections_in, recipe_from
from falcon_unlearn.trackers import TrackersConfig, settings_of, tracking

SHORT = {"training": {"steps": 3}, "evaluation": {"max_new_tokens": 2, "max_records": 4}}


class Fakes:
    """All four libraries, keeping what they are told."""

    def __init__(self, monkeypatch, logged_in=True):
        self.rows, self.settings, self.opened, self.closed = {}, {}, {}, []
        run = {name: self._run(name) for name in ("wandb", "trackio", "tensorboard")}

        def init(name):
            def opened(project, config, **options):
                self.opened[name] = (project, options["name"])
                self.settings[name] = config
                return run[name]

            return opened

        wandb = SimpleNamespace(init=init("wandb"), login=lambda prompt: logged_in, Settings=SimpleNamespace)
        client = SimpleNamespace(
            get_experiment_by_name=lambda project: None,
            create_experiment=lambda project: f"id of {project}",
            create_run=self._begin,
            log_batch=self._batch,
            set_terminated=lambda run: self.closed.append("mlflow"),
        )
        entities = SimpleNamespace(Metric=lambda *given: given, Param=lambda *given: given)
        monkeypatch.setenv("WANDB_MODE", "online")
        for name, module in (
            ("wandb", wandb),
            ("trackio", SimpleNamespace(init=init("trackio"))),
            ("mlflow", SimpleNamespace(MlflowClient=lambda: client, entities=entities)),
            ("mlflow.entities", entities),
        ):
            monkeypatch.setitem(sys.modules, name, module)

    def _run(self, name):
        return SimpleNamespace(
            log=lambda numbers, step: self.rows.setdefault(name, []).append((step, numbers)),
            finish=lambda: self.closed.append(name),
        )

    def _begin(self, found, run_name):
        self.opened["mlflow"] = (found, run_name)
        return SimpleNamespace(info=SimpleNamespace(run_id="run"))

    def _batch(self, run, metrics=(), params=()):
        if params:
            self.settings["mlflow"] = dict(params)
        if metrics:
            self.rows.setdefault("mlflow", []).append((metrics[0][3], {key: value for key, value, _, _ in metrics}))


def expected_rows(folder):
    """Written independently: what a tracker should be told of a finished run."""
    steps = read_jsonl(folder / "training.jsonl")
    rows = [(row.pop("step"), {f"train/{k}": v for k, v in row.items() if v is not None}) for row in steps]
    for model, values in json.loads((folder / "metrics.json").read_text()).items():
        plain = {f"{model}/{k}": v for k, v in (values or {}).items() if isinstance(v, (int, float))}
        if plain:
            rows.append((rows[-1][0], plain))
    return rows


@pytest.fixture
def heard(monkeypatch):
    """What a run says."""
    lines = []
    monkeypatch.setattr(Console, "say", lambda self, message: lines.append(message))
    return lines


def test_tensorboard_holds_what_the_log_says_and_the_run_is_the_same(recipe_for, tmp_path, call):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain = run_recipe(recipe_from(recipe_for({**SHORT, "output": str(tmp_path / "plain")})))
    run = run_recipe(recipe_from(recipe_for({**SHORT, "trackers": ["tensorboard"]})))
    for name in ("patch/patch.safetensors", "metrics.json"):
        assert (run.folder / name).read_bytes() == (plain.folder / name).read_bytes()
    files = EventAccumulator(str(run.folder / "trackers" / "tensorboard")).Reload()
    found = {(e.step, tag): e.value for tag in files.Tags()["scalars"] for e in files.Scalars(tag)}
    expected = {(step, key): value for step, row in expected_rows(run.folder) for key, value in row.items()}
    assert found == pytest.approx(expected, rel=1e-6)

    sent = call("track", plain.folder, "--to", "tensorboard")
    assert (sent.code, sent.out) == (0, "sent to tensorboard\n")
    again = EventAccumulator(str(plain.folder / "trackers" / "tensorboard")).Reload()
    assert set(again.Tags()["scalars"]) == set(files.Tags()["scalars"])
    assert run_recipe(recipe_from(recipe_for(SHORT)), overwrite=True)  # the tracker's files are ours
    assert not (run.folder / "trackers").exists()


def test_every_tracker_is_told_the_same_and_the_settings(recipe_for, monkeypatch):
    fakes = Fakes(monkeypatch)
    names = ["wandb", "mlflow", "trackio"]
    changes = {
        **SHORT,
        "trackers": {"use": names, "project": "ours"},
        "training": {"steps": 3, "optimizer": {"lr": 0.005}},
    }
    run = run_recipe(recipe_from(recipe_for(changes)))
    for name in names:
        assert fakes.rows[name] == expected_rows(run.folder)
        assert str(fakes.settings[name]["training.optimizer.lr"]) == "0.005"
        assert fakes.settings[name]["method.name"] == "falcon"
    assert fakes.opened["wandb"] == fakes.opened["trackio"] == ("ours", "falcon-layer-seed0")
    assert fakes.opened["mlflow"] == ("id of ours", "falcon-layer-seed0")
    assert sorted(fakes.closed) == sorted(names)


def test_a_resumed_run_shows_the_steps_of_earlier_sessions_too(recipe_for, monkeypatch):
    fakes = Fakes(monkeypatch)
    recipe = recipe_from(
        recipe_for(merged(SHORT, {"training": {"checkpoint_every": 1}, "trackers": {"use": ["wandb"]}}))
    )

    def stopped(self, row):
        if row["step"] == 1:
            raise KeyboardInterrupt
        return log(self, row)

    log = trackers.Tracking.log
    with monkeypatch.context() as patch:
        patch.setattr(trackers.Tracking, "log", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe)
    fakes.rows.clear()
    run = run_recipe(recipe, resume=True)
    assert fakes.rows["wandb"] == expected_rows(run.folder)


@pytest.mark.parametrize("where", ["login", "init", "log", "finish"])
def test_a_tracker_that_fails_is_one_line_and_the_run_goes_on(recipe_for, monkeypatch, heard, where):
    fakes = Fakes(monkeypatch, logged_in=where != "login")

    def fail(*_, **__):
        raise KeyboardInterrupt if where == "init" else OSError("no network\nat all")

    wandb = sys.modules["wandb"]
    if where == "init":
        wandb.init = fail
    elif where != "login":
        run = SimpleNamespace(log=lambda numbers, step: None, finish=lambda: None)
        setattr(run, where, fail)
        wandb.init = lambda **_: run
    run = run_recipe(recipe_from(recipe_for({**SHORT, "trackers": ["wandb", "trackio"]})), console=Console())
    warnings = [line for line in heard if line.startswith("tracker ")]
    reason = {"login": "RuntimeError: not logged in.*", "init": "KeyboardInterrupt"}.get(where, "OSError: no network")
    assert len(warnings) == 1
    assert warnings[0].startswith("tracker wandb: " + reason.removesuffix(".*"))
    assert warnings[0].endswith("the run goes on without it")
    assert fakes.rows["trackio"] == expected_rows(run.folder)
    assert (run.folder / "report.html").exists()


def test_a_tracker_that_hangs_holds_nothing_up(recipe_for, monkeypatch, heard, tmp_path):
    Fakes(monkeypatch)
    let_go = threading.Event()
    sys.modules["wandb"].init = lambda **_: let_go.wait(60)
    monkeypatch.setattr(trackers, "_CLOSING_SECONDS", 0.2)
    began = time.monotonic()
    with tracking(
        TrackersConfig(use=("wandb",)), recipe_for() | {"method": {"name": "m", "preset": "p"}}, tmp_path, heard.append
    ) as shown:
        shown.log({"step": 1, "forget_loss": 1.0})
    assert time.monotonic() - began < 30
    let_go.set()
    assert heard == ["tracker wandb: no answer for 0 seconds, so rows may be missing; the run goes on without it"]


def test_no_text_of_the_user_is_shown():
    secret = "Ada Marsh"
    recipe = recipe_from(
        {
            "model": secret,
            "output": secret,
            "corpus": {
                "forget": {"Ada_Marsh": {"source": secret}},
                "retain": secret,
            },
            "evaluation": {"utility": {secret: secret}, "oracle": secret},
            "training": {"modules": [secret]},
        }
    )
    settings = settings_of(recipe.model_dump(mode="json"))
    assert "Marsh" not in json.dumps(settings)
    assert settings["training.steps"] == recipe.training.steps
    assert settings["selection.selector"] == "sweep"


def test_the_only_free_word_among_the_settings_is_known():
    def is_free(annotation):
        inner = () if typing.get_origin(annotation) is typing.Literal else typing.get_args(annotation)
        return annotation is str or any(map(is_free, inner))

    def free(section, key):
        for name, field in section.model_fields.items():
            if is_free(field.annotation):
                yield f"{key}.{name}"
            for below in _sections_in(field.annotation):
                yield from free(below, f"{key}.{name}")

    sections = [*((entry.config, "method") for entry in METHODS.values()), (TrainingConfig, "training")]
    found = {key for section, name in (*sections, (SelectionConfig, "selection")) for key in free(section, name)}
    assert found == set(trackers._FREE_WORDS)


def test_mistakes_are_named_before_anything_is_written(recipe_for, tmp_path, monkeypatch, call):
    with pytest.raises(UserError, match=r"trackers.*unknown tracker 'tensorbord'.*tensorboard"):
        recipe_from(recipe_for({"trackers": ["tensorbord"]}))
    monkeypatch.setattr(trackers, "_is_installed", lambda name: name != "mlflow")
    with pytest.raises(UserError, match=r"mlflow is not installed: pip install 'falcon-unlearn\[mlflow\]'"):
        run_recipe(recipe_from(recipe_for({"trackers": "mlflow"})))
    assert not (tmp_path / "run").exists()
    assert call("track", tmp_path, "--to", "wandb").errors == [
        f"error: track: {tmp_path} is no finished run (it has no recipe.yaml and metrics.json)"
    ]


def test_the_command_says_what_failed(recipe_for, monkeypatch, call):
    run = run_recipe(recipe_from(recipe_for(SHORT)))
    Fakes(monkeypatch, logged_in=False)
    ended = call("track", run.folder, "--to", "wandb")
    assert ended.code == 2
    assert ended.errors == [
        "error: track: wandb: RuntimeError: not logged in: run 'wandb login', or set WANDB_MODE=offline"
    ]
    assert main(["track", str(run.folder), "--to", "trackio", "--project", "p", "--name", "n", "--json"]) == 0
