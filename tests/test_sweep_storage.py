"""Claims and results in a shared storage: one worker a job, whoever dies, whatever the storage."""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from falcon_unlearn import sweep_storage
from falcon_unlearn.errors import UserError
from falcon_unlearn.sweep_storage import Board, LostClaimError, SharedStorage, open_storage

LEASE = 60.0


@pytest.fixture(params=["journal", "sqlite"])
def shared(request, tmp_path):
    """SQLite stands in for the databases that need a server: the same Optuna class opens all of them."""
    url = str(tmp_path / "jobs.journal") if request.param == "journal" else f"sqlite:///{tmp_path / 'jobs.db'}"
    return SharedStorage(url, LEASE)


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(value=100.0)
    monkeypatch.setattr(sweep_storage, "time", SimpleNamespace(monotonic=lambda: now.value))
    return now


def die_with(board, key):
    """Claim a job and never show a sign of life again."""
    assert board._take(key) is not None


def test_a_claimed_job_is_nobody_elses_and_its_result_everybodys(shared):
    ours, theirs = Board(shared), Board(shared)
    with ours.claim("job") as claim, theirs.claim("job") as refused, theirs.claim("other job") as other:
        assert refused is None
        assert other is not None
        assert claim.deaths == 0
        claim.finish({"score": 0.5, "failed": None})
    theirs.refresh()
    assert theirs.result("job") == {"score": 0.5, "failed": None}
    assert theirs.result("other job") is None
    with theirs.claim("job") as refused:
        assert refused is None
    assert Board(shared).result("job") == {"score": 0.5, "failed": None}


def test_of_many_that_claim_at_once_one_wins(tmp_path):
    shared = SharedStorage(str(tmp_path / "jobs.journal"), LEASE)
    boards = [Board(shared) for _ in range(4)]
    for n in range(5):
        start, won = threading.Barrier(len(boards)), []

        def race(board, key=f"job {n}", start=start, won=won):
            start.wait()
            if board._take(key) is not None:
                won.append(board)

        racing = [threading.Thread(target=race, args=(board,)) for board in boards]
        for thread in racing:
            thread.start()
        for thread in racing:
            thread.join()
        assert len(won) == 1


def test_a_released_job_is_free_at_once_and_no_death(shared):
    ours, theirs = Board(shared), Board(shared)
    with contextlib.suppress(KeyboardInterrupt), ours.claim("job"):
        raise KeyboardInterrupt
    with theirs.claim("job") as claim:
        assert claim.deaths == 0


def test_a_dead_workers_job_is_free_after_the_lease_and_deaths_are_counted(shared, clock):
    dead, alive = Board(shared), Board(shared)
    for deaths in (1, 2):
        die_with(dead, "job")
        alive.refresh()
        clock.value += LEASE - 1
        with alive.claim("job") as claim:
            assert claim is None
        clock.value += 1
        with alive.claim("job") as claim:
            assert claim.deaths == deaths


def test_a_worker_that_shows_signs_of_life_keeps_its_job(shared, clock):
    ours, theirs = Board(shared), Board(shared)
    claim = ours._take("job")
    for beat in range(1, 4):
        theirs.refresh()
        clock.value += LEASE - 1
        ours.storage.set_trial_user_attr(claim._trial_id, "beat", beat)
        with theirs.claim("job") as refused:
            assert refused is None


def test_signs_of_life_are_given_by_themselves(tmp_path):
    shared = SharedStorage(str(tmp_path / "jobs.journal"), 0.3)
    ours, theirs = Board(shared), Board(shared)
    with ours.claim("job") as claim:
        until = time.monotonic() + 30
        seen = set()
        while len(seen) < 3 and time.monotonic() < until:
            theirs.refresh()
            seen |= {trial.user_attrs["beat"] for trial in theirs._trials["job"]}
        assert len(seen) == 3
        assert not claim.lost
    ends = len(ours.storage.get_all_trials(ours._study._study_id))
    assert ends == 1


def test_whoever_lost_a_job_cannot_finish_it(shared, clock):
    slow, quick = Board(shared), Board(shared)
    lost = slow._take("job")
    quick.refresh()
    clock.value += LEASE
    with quick.claim("job") as claim:
        assert lost.lost
        with pytest.raises(LostClaimError):
            lost.finish({"score": 0.0})
        claim.finish({"score": 1.0})
    slow.refresh()
    assert slow.result("job") == {"score": 1.0}


def test_only_failures_are_forgotten(shared):
    board = Board(shared)
    for key, failed in (("bad", "why"), ("good", None)):
        with board.claim(key) as claim:
            claim.finish({"failed": failed})
    board.refresh()
    board.forget_failure("bad")
    board.forget_failure("good")
    board.forget_failure("unknown")
    other = Board(shared)
    assert other.result("bad") is None
    assert other.result("good") == {"failed": None}
    with other.claim("bad") as claim:
        assert claim.deaths == 0
        claim.finish({"failed": None})
    board.refresh()
    assert board.result("bad") == {"failed": None}


def test_a_killed_process_is_taken_over(tmp_path):
    shared = SharedStorage(f"sqlite:///{tmp_path / 'jobs.db'}", 3.0)
    code = (
        "import sys, time; from falcon_unlearn.sweep_storage import Board, SharedStorage\n"
        "with Board(SharedStorage(sys.argv[1], 3.0)).claim('job') as claim:\n"
        "    print(claim.deaths, flush=True); time.sleep(60)"
    )
    board = Board(shared)
    with subprocess.Popen([sys.executable, "-c", code, shared.url], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "0\n"
        with board.claim("job") as claim:
            assert claim is None
        other.send_signal(signal.SIGKILL)
    began = time.monotonic()
    while time.monotonic() < began + 60:
        with board.claim("job") as claim:
            if claim is not None:
                assert claim.deaths == 1
                return
        time.sleep(0.2)
    pytest.fail("nobody took the job over")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("nonsense://host/db", r"storage nonsense://host/db: not a storage; write a file name, postgresql://"),
        (
            "postgresql+pg8000://me:secret@host/db",
            r"driver of postgresql\+pg8000 is missing.*\[postgresql\]",
        ),
        ("mysql+mysqldb://me:secret@host/db", r"the driver of mysql\+mysqldb is missing: pip install '.*\[mysql\]'"),
        ("sqlite:////no/such/folder/jobs.db", r"storage sqlite:.*unable to open database file"),
        ("/no/such/folder/jobs.journal", r"name a file in a folder that exists"),
    ],
)
def test_what_cannot_be_opened_is_one_line_without_the_password(url, expected):
    with pytest.raises(UserError, match=expected) as caught:
        open_storage(SharedStorage(url))
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("kind", "module"), [("postgresql", "psycopg"), ("mysql", "pymysql")])
def test_a_plain_url_uses_the_driver_of_the_extra(kind, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"storage {kind}://host/db: .*pip install 'falcon-unlearn\[{kind}\]'"):
        open_storage(SharedStorage(f"{kind}://me:secret@host/db"))


def test_without_optuna_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'falcon-unlearn\[sweep\]'"):
        open_storage(SharedStorage("jobs.journal"))
