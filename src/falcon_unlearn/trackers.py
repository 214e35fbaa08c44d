"""Show the numbers of a run in experiment trackers; ``training.jsonl`` is written anyhow, and is what they are shown.

Only numbers leave the run, and settings that are numbers or one of a few fixed words: no record, no generated text, no
path, no name of a set. A tracker works in a thread of its own: whatever becomes of it, the run goes on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import queue
import shutil
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, model_validator

from falcon_unlearn.artifacts import read_jsonl
from falcon_unlearn.config import Section
from falcon_unlearn.errors import UserError, did_you_mean

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
Setting = float | int | bool | str
FOLDER = "trackers"
"""In the run folder: what trackers keep in files."""
_CLOSING_SECONDS = 30.0
_STOPPING_SECONDS = 5.0
_SETTINGS_OF = ("method", "selection", "training", "seed", "threads", "dtype")
_FREE_WORDS = ("training.modules",)


class TrackersConfig(Section):
    """Trackers that show the run while it goes on; a list of names is short for ``use``."""

    use: tuple[TrackerName, ...] = ()
    """tensorboard, wandb, mlflow, trackio: each needs the extra of its name."""
    project: str = Field("falcon-unlearn", min_length=1)
    """Project there; mlflow: experiment."""
    name: str | None = Field(None, min_length=1)
    """Name of the run there; empty: method, preset and seed."""

    @model_validator(mode="before")
    @classmethod
    def _names(cls, raw: Any) -> Any:
        if not isinstance(raw, str | list | tuple):
            return raw
        names, known = [raw] if isinstance(raw, str) else list(raw), typing.get_args(TrackerName)
        for name in names:
            if name not in known:
                raise ValueError(f"unknown tracker '{name}'{did_you_mean(str(name), known)}; known: {', '.join(known)}")
        return {"use": names}


class _Tracker(Protocol):
    def log(self, numbers: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class _Opening:
    """What a tracker needs to begin a run."""

    project: str
    name: str
    settings: Mapping[str, Setting]
    folder: Path


class _TensorBoard:
    def __init__(self, opening: _Opening) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = opening.folder / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)  # an earlier session's: all of its rows come again
        writer: Any = SummaryWriter  # no types
        self._writer = writer(str(folder))
        lines = [f"    {key}: {value}" for key, value in opening.settings.items()]
        self._writer.add_text("settings", "\n".join(lines))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, opening: _Opening) -> None:
        import wandb

        # It would ask at the terminal otherwise.
        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False):
            raise RuntimeError("not logged in: run 'wandb login', or set WANDB_MODE=offline")
        opening.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=opening.project,
            name=opening.name,
            config=dict(opening.settings),
            dir=str(opening.folder),
            reinit="create_new",
            settings=wandb.Settings(  # none of what it gathers by itself: output, code, command line, host
                console="off",
                disable_code=True,
                disable_git=True,
                save_code=False,
                silent=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """Through the client, which unlike ``mlflow.start_run`` sends no user, script or commit."""

    def __init__(self, opening: _Opening) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        experiment = self._client.get_experiment_by_name(opening.project)
        found = experiment.experiment_id if experiment else self._client.create_experiment(opening.project)
        self._run = self._client.create_run(found, run_name=opening.name).info.run_id
        self._client.log_batch(self._run, params=[Param(key, str(value)) for key, value in opening.settings.items()])

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[Metric(key, value, now, step) for key, value in numbers.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run)


class _Trackio:
    def __init__(self, opening: _Opening) -> None:
        import trackio

        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            self._run = trackio.init(
                project=opening.project,
                name=opening.name,
                config=dict(opening.settings),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


_OPEN: Mapping[str, Callable[[_Opening], _Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}


class _Line:
    """One tracker in its thread, and the rows on their way to it."""

    def __init__(self, name: str, opening: _Opening) -> None:
        self.name, self.problem = name, ""
        self._opening = opening
        self._rows: queue.SimpleQueue[tuple[dict[str, float], int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._forward, daemon=True, name=f"tracker {name}")
        self._thread.start()

    def put(self, numbers: dict[str, float], step: int) -> None:
        self._rows.put((numbers, step))

    def close(self, seconds: float) -> None:
        """Wait until everything has arrived, but no longer than so."""
        self._rows.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.problem = f"no answer for {seconds:.0f} seconds, so rows may be missing"

    def _forward(self) -> None:
        try:
            tracker = _OPEN[self.name](self._opening)
            while (row := self._rows.get()) is not None:
                tracker.log(*row)
            tracker.close()
        except BaseException as error:  # also KeyboardInterrupt and SystemExit, as some raise them
            text = next((line for line in str(error).splitlines() if line.strip()), "")
            self.problem = f"{type(error).__name__}: {text}".removesuffix(": ")


class Tracking:
    """The trackers of a run. They begin with the first row, so that a finished run that is read back shows nothing."""

    def __init__(
        self, config: TrackersConfig, recipe: Mapping[str, Any], folder: Path, say: Callable[[str], None]
    ) -> None:
        """Check that they are there; nothing is begun.

        Args:
            config: which, and under what name.
            recipe: as plain JSON; its numbers become the settings shown.
            folder: of the run.
            say: called once for each tracker that fails.

        Raises:
            UserError: the extra of a tracker is not installed.
        """
        for name in config.use:
            if not _is_installed(name):
                raise UserError(f"trackers: {name} is not installed: pip install 'falcon-unlearn[{name}]'")
        method = recipe["method"]
        named = config.name or f"{method['name']}-{method['preset']}-seed{recipe['seed']}"
        self._opening = _Opening(config.project, named, settings_of(recipe), folder / FOLDER)
        self._names, self._say = tuple(dict.fromkeys(config.use)), say
        self._lines: list[_Line] = []
        self._told: set[str] = set()
        self._last_step = 0
        self._stdout = sys.stdout

    def log(self, row: Mapping[str, Any]) -> None:
        """Forward the numbers of a row of ``training.jsonl``."""
        self._last_step = max(self._last_step, int(row["step"]))
        self._put({f"train/{key}": value for key, value in numbers_of(row).items() if key != "step"})

    def finish(self, log: Path, metrics: Mapping[str, Any]) -> None:
        """Forward the metrics at the last step, and the whole log first where none of it was forwarded yet.

        Args:
            log: ``training.jsonl``.
            metrics: by model, as plain JSON.
        """
        if not self._names:
            return
        if not self._lines and log.exists():
            for row in read_jsonl(log):
                self.log(row)
        for model, values in metrics.items():
            found = numbers_of(values or {})
            attacks = (values or {}).get("attacks", {})
            found |= {f"attacks/{name}/{key}": v for name, of in attacks.items() for key, v in numbers_of(of).items()}
            self._put({f"{model}/{key}": value for key, value in found.items()})

    def close(self, seconds: float) -> None:
        """Wait for the trackers, no longer than so many seconds for each."""
        for line in self._lines:
            line.close(seconds)
        self._tell()
        sys.stdout = self._stdout if any(line.problem for line in self._lines) else sys.stdout

    @property
    def problems(self) -> dict[str, str]:
        """What went wrong, by tracker."""
        return {line.name: line.problem for line in self._lines if line.problem}

    def _put(self, numbers: dict[str, float]) -> None:
        if self._names and not self._lines:
            self._lines = [_Line(name, self._opening) for name in self._names]
        for line in self._lines:
            if numbers and not line.problem:
                line.put(numbers, self._last_step)
        self._tell()

    def _tell(self) -> None:
        for name, problem in self.problems.items():
            if name not in self._told:
                self._told.add(name)
                self._say(f"tracker {name}: {problem}; the run goes on without it")


@contextlib.contextmanager
def tracking(
    config: TrackersConfig, recipe: Mapping[str, Any], folder: Path, say: Callable[[str], None]
) -> Iterator[Tracking]:
    """A :class:`Tracking` that is closed at the end, more quickly where that is an error.

    Raises:
        UserError: the extra of a tracker is not installed.
    """
    trackers = Tracking(config, recipe, folder, say)
    seconds = _STOPPING_SECONDS
    try:
        yield trackers
        seconds = _CLOSING_SECONDS
    finally:
        trackers.close(seconds)


def _is_installed(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among the values, nothing nested."""
    return {
        key: value
        for key, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def settings_of(recipe: Mapping[str, Any]) -> dict[str, Setting]:
    """What trackers may see of a recipe, by dotted key: numbers, switches and fixed words of method and training.

    Neither paths nor names that the user gave: sections with such are left out whole.
    """
    found: dict[str, Setting] = {}

    def visit(value: Any, key: str) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                visit(inner, f"{key}.{name}")
        elif isinstance(value, int | float | str) and key not in _FREE_WORDS:
            found[key] = value
        elif isinstance(value, list | tuple) and all(isinstance(item, int | float) for item in value):
            found[key] = " ".join(map(str, value))

    for section in _SETTINGS_OF:
        visit(recipe.get(section), section)
    return found
