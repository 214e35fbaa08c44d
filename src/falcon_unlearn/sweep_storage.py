"""Who does which job of a comparison, and what came of it, in an Optuna storage that several machines share.

A claim is a running trial of one study; its worker moves a counter in it. Whoever has seen the counter stand still for
the lease, by its own clock, ends the claim: the job is free again, and the dead worker is counted.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from falcon_unlearn.errors import UserError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

_STUDY = "falcon-unlearn compare: jobs"
_BEATS_A_LEASE = 6
_DRIVERS = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql"}
"""What our extras of the same names install, for URLs that name no driver."""


@dataclass(frozen=True)
class SharedStorage:
    """Where machines meet.

    Attributes:
        url: a file name (an Optuna journal), or an SQLAlchemy URL of a PostgreSQL, MySQL or SQLite database.
        lease_seconds: age of the last sign of life after which another worker takes a job over.
        retry_failed: forget what failed in earlier calls, so that it is done again.
    """

    url: str
    lease_seconds: float = 120.0
    retry_failed: bool = False

    @property
    def shown(self) -> str:
        """The URL without what may hold a password."""
        scheme, sign, rest = self.url.partition("://")
        return f"{scheme}{sign}{rest.rpartition('@')[2]}"


def load_optuna() -> ModuleType:
    """Optuna, silent below warnings.

    Raises:
        UserError: it is not installed.
    """
    try:
        import optuna
        import optuna.storages.journal
    except ImportError as error:
        raise UserError(
            "compare: searching, and sharing a storage, needs Optuna: pip install 'falcon-unlearn[sweep]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def journal(path: Path) -> BaseStorage:
    """The storage in a journal file, made where there is none."""
    storages = load_optuna().storages
    found: BaseStorage = storages.JournalStorage(storages.journal.JournalFileBackend(str(path)))
    return found


def open_storage(shared: SharedStorage) -> BaseStorage:
    """The Optuna storage of a file name or URL.

    Raises:
        UserError: Optuna or the database's driver is missing, or nothing can be opened there.
    """
    optuna = load_optuna()
    with naming_the_storage(shared):
        if "://" not in shared.url:
            path = Path(shared.url).expanduser().resolve()
            if path.is_dir() or not path.parent.is_dir():
                raise UserError(f"storage {path}: name a file in a folder that exists")
            return journal(path)
        scheme, _, rest = shared.url.partition("://")
        url = f"{_DRIVERS.get(scheme, scheme)}://{rest}"
        try:
            opened: BaseStorage = optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
        except ImportError as error:
            kind = scheme.partition("+")[0]
            extra = f": pip install 'falcon-unlearn[{kind}]'" if kind in _DRIVERS else ", install it"
            raise UserError(f"storage {shared.shown}: the driver of {scheme} is missing{extra}") from error
    return opened


@contextlib.contextmanager
def naming_the_storage(shared: SharedStorage) -> Iterator[None]:
    """Turn what a storage refuses into one line that names it.

    Raises:
        UserError: instead of errors of Optuna's storages, of SQLAlchemy, and of the journal file.
    """
    import sqlalchemy.exc
    from optuna.exceptions import StorageInternalError

    try:
        yield
    except (sqlalchemy.exc.NoSuchModuleError, sqlalchemy.exc.ArgumentError) as error:
        known = "a file name, postgresql://, mysql:// or sqlite:///"
        raise UserError(f"storage {shared.shown}: not a storage; write {known}") from error
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
        reason = str(getattr(error.__cause__ or error, "orig", None) or error.__cause__ or error)
        raise UserError(f"storage {shared.shown}: {reason.strip().splitlines()[0]}") from error


class LostClaimError(Exception):
    """Another worker has taken the job over: this one showed no sign of life for the lease."""


class Claim:
    """A job that is this worker's own for now.

    Attributes:
        deaths: workers that died while they did it.
    """

    def __init__(self, storage: BaseStorage, trial_id: int, deaths: int) -> None:
        self._storage, self._trial_id, self.deaths = storage, trial_id, deaths

    def finish(self, result: Mapping[str, Any]) -> None:
        """Leave the result for everybody.

        Args:
            result: JSON types.

        Raises:
            LostClaimError: the job is another worker's by now.
        """
        self._end("result", dict(result), complete=True)

    def release(self) -> None:
        """Leave the job undone; this is no death.

        Raises:
            LostClaimError: the job is another worker's by now.
        """
        self._end("released", True, complete=False)

    @property
    def lost(self) -> bool:
        """Whether another worker has ended this claim."""
        return self._storage.get_trial(self._trial_id).state.is_finished()

    def _end(self, key: str, value: Any, *, complete: bool) -> None:
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        try:
            self._storage.set_trial_user_attr(self._trial_id, key, value)
            state = TrialState.COMPLETE if complete else TrialState.FAIL
            self._storage.set_trial_state_values(self._trial_id, state, [0.0] if complete else None)
        except UpdateFinishedTrialError as error:
            raise LostClaimError from error

    def beat(self, seconds: float, stop: threading.Event) -> None:
        """Show that this worker lives, every so many seconds, until stopped or taken over."""
        count = 0
        while not stop.wait(seconds):
            count += 1
            with contextlib.suppress(Exception):  # a storage that is away for a moment is asked again
                if self.lost:
                    return
                self._storage.set_trial_user_attr(self._trial_id, "beat", count)


class Board:
    """The jobs of all comparisons in one storage, by key.

    A job's trials in the order they were made: of those that neither failed nor were released the first one counts,
    so that of two workers that claim at once one wins.
    """

    def __init__(self, shared: SharedStorage) -> None:
        """Open it.

        Raises:
            UserError: as :func:`open_storage`.
        """
        self.storage = open_storage(shared)
        self._lease = shared.lease_seconds
        with naming_the_storage(shared):
            self._study = load_optuna().create_study(study_name=_STUDY, storage=self.storage, load_if_exists=True)
            self._trials: dict[str, list[FrozenTrial]] = {}
            self._signs: dict[int, tuple[int, float]] = {}
            self.refresh()

    def refresh(self) -> None:
        """Read what there is, and note which claims show signs of life."""
        forgotten: Mapping[str, int] = self._study.user_attrs
        self._trials = {}
        for trial in self._study.get_trials(deepcopy=False):
            key = trial.user_attrs["job"]
            if trial.number > forgotten.get(key, -1):
                self._trials.setdefault(key, []).append(trial)
            if not trial.state.is_finished():
                beat = trial.user_attrs["beat"]
                if self._signs.get(trial.number, (None,))[0] != beat:
                    self._signs[trial.number] = (beat, time.monotonic())

    def result(self, key: str) -> Mapping[str, Any] | None:
        """What a job gave, as of the last :meth:`refresh`; None where it is not done."""
        done = [t for t in self._trials.get(key, ()) if "result" in t.user_attrs and t.state.name == "COMPLETE"]
        return done[0].user_attrs["result"] if done else None

    def forget_failure(self, key: str) -> None:
        """Let a job that is done with a failure be done again."""
        result = self.result(key)
        if result is not None and result.get("failed") is not None:
            self._study.set_user_attr(key, self._trials[key][-1].number)

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[Claim | None]:
        """The claim of a job, or None where it is done or another worker's; it shows signs of life meanwhile.

        A claim that is not finished within the block is released.
        """
        claim = self._take(key)
        if claim is None:
            yield None
            return
        stop = threading.Event()
        beating = threading.Thread(target=claim.beat, args=(self._lease / _BEATS_A_LEASE, stop), daemon=True)
        beating.start()
        try:
            yield claim
        finally:
            stop.set()
            beating.join()
            with contextlib.suppress(LostClaimError):
                claim.release()  # refused where it is finished

    def _is_taken(self, key: str) -> bool:
        """Whether the job is done, or its worker has shown a sign of life within the lease."""
        claims = [trial.number for trial in self._trials.get(key, ()) if not trial.state.is_finished()]
        now = time.monotonic()
        return self.result(key) is not None or any(now - self._signs[n][1] < self._lease for n in claims)

    def _take(self, key: str) -> Claim | None:
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState, create_trial

        if self._is_taken(key):
            return None  # as of the last look, which spares a look for each of many jobs
        self.refresh()
        if self._is_taken(key):
            return None
        for trial in self._trials.get(key, ()):
            if trial.state.is_finished():
                continue
            with contextlib.suppress(UpdateFinishedTrialError):  # another worker was quicker
                self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        template = create_trial(state=TrialState.RUNNING, user_attrs={"job": key, "beat": 0})
        mine = self.storage.create_new_trial(self._study._study_id, template)
        self.refresh()
        of_job = [t for t in self._trials[key] if t._trial_id != mine]
        deaths = sum(t.state == TrialState.FAIL and "released" not in t.user_attrs for t in of_job)
        claim = Claim(self.storage, mine, deaths)
        if any(t._trial_id < mine and t.state != TrialState.FAIL for t in of_job):
            with contextlib.suppress(LostClaimError):
                claim.release()
            return None
        return claim
