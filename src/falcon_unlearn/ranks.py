"""Several processes that do one run together (torchrun), and the single process that is all of it otherwise.

Every rank runs the same program on the same inputs. What is costly is shared out (:meth:`Ranks.spread`) and put
together again in order, so that all ranks go on with the same values; files are written by rank 0 alone
(:meth:`Ranks.on_first`). Of one process every operation here is the identity.

A rank that dies, stops or never starts ends the others within a minute with one line: all ranks beat in the store that
they met in, each in a thread of its own, and watch the others' beats. A collective operation alone would not tell: with
NCCL it waits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from falcon_unlearn.errors import UserError, is_out_of_memory

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_JOIN = ("FALCON_UNLEARN_JOIN_SECONDS", 45.0)
"""How long ranks wait for each other at the start."""
_SILENT = ("FALCON_UNLEARN_SILENT_SECONDS", 15.0)
"""After how long without a beat a rank counts as dead; below the 30 s that torchrun gives the others to end."""
_COLLECTIVE = timedelta(hours=2)
"""Rank 0 may be busy for long (reports); the dead are found by their beats."""
_DONE, _FAILED = b"done", b"failed"


class OtherRankError(SystemExit):
    """Another rank has said, or will say, why all of them end: nothing more is printed."""

    def __init__(self) -> None:
        super().__init__(2)


@dataclass(frozen=True)
class Ranks:
    """One of the processes that share a run.

    Attributes:
        rank: 0 is the one that writes and talks.
        world: how many there are.
        local_world: how many of them are on this machine.
    """

    rank: int = 0
    world: int = 1
    local_world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def rows(self, count: int) -> slice:
        """This rank's part of ``count`` rows: in order, of sizes that differ by one at most, perhaps empty."""
        return slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def on_first(self, work: Callable[[], T]) -> T:
        """What rank 0 gets from ``work``, on all ranks; the others do nothing.

        Raises:
            Exception: what ``work`` raised on rank 0; the others end without a word.
        """
        if self.world == 1:
            return work()
        return self._exchanged([work] if self.first else [])[0][0]

    def after_first(self, work: Callable[[], T]) -> T:
        """``work`` on every rank, on rank 0 before all others: what it downloads, they find.

        Raises:
            Exception: what ``work`` raised here; where it was on rank 0, the others end without a word.
        """
        done: list[T] = []
        self.on_first(lambda: done.append(work()))
        return done[0] if done else work()

    def spread(self, items: Sequence[Any], work: Callable[[Any], T]) -> list[T]:
        """``[work(item) for item in items]``, each item on one rank, the results on all.

        Items are dealt in turns, so that such as grow or shrink along the sequence are shared fairly.

        Raises:
            torch.OutOfMemoryError: on all ranks, where memory did not suffice on one.
            Exception: what ``work`` raised here; the others end without a word.
        """
        if self.world == 1:
            return [work(item) for item in items]
        found = self._exchanged([partial(work, item) for item in items[self.rank :: self.world]])
        return [found[i % self.world][i // self.world] for i in range(len(items))]

    def _exchanged(self, tasks: Sequence[Callable[[], T]]) -> list[list[T]]:
        import torch
        import torch.distributed as dist

        results: list[T] = []
        failure: Exception | None = None
        try:
            results = [task() for task in tasks]
        except Exception as error:
            failure = error
        exchanged: list[Any] = [None] * self.world
        dist.all_gather_object(exchanged, (results, None if failure is None else _kind(failure)))
        if failure is not None:
            raise failure
        kinds = {kind for _, kind in exchanged} - {None}
        if "memory" in kinds:
            raise torch.OutOfMemoryError("out of memory on another rank")
        if kinds:
            raise OtherRankError
        return [results for results, _ in exchanged]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.world > 1:
            import torch.distributed as dist

            dist.all_reduce(values)
        return values

    def sum_all(self, values: Sequence[Tensor]) -> None:
        """Sum each of ``values`` over the ranks, in place, all of them at once."""
        if self.world > 1:
            import torch.distributed as dist

            for work in [dist.all_reduce(value, async_op=True) for value in values]:
                assert work is not None
                work.wait()

    def any(self, here: bool) -> bool:
        """Whether it is so on some rank."""
        if self.world == 1:
            return here
        import torch

        return bool(self.sum(torch.tensor(int(here))))

    def agree(self, what: str, value: str) -> None:
        """Refuse ranks that differ in ``value``.

        Raises:
            UserError: on rank 0, naming ``what`` and the first rank that has another.
        """
        if self.world == 1:
            return
        values = self._exchanged([lambda: value])
        other = next((rank for rank, (found,) in enumerate(values) if found != values[0][0]), None)
        if other is not None:
            if not self.first:
                raise OtherRankError
            raise UserError(f"rank {other} has another {what} than rank 0: start all ranks on the same files")


ALONE = Ranks()
"""One process."""


def _kind(error: Exception) -> str:
    return "memory" if is_out_of_memory(error) else type(error).__name__


@dataclass(frozen=True)
class Launch:
    """What the launcher says through the environment."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    port: int
    hosts_store: bool


def launch_from(environment: Mapping[str, str]) -> Launch | None:
    """What torchrun has set, or None for one process.

    Raises:
        UserError: only a part of it is set, or it makes no sense.
    """
    if not {"RANK", "WORLD_SIZE"} & set(environment):
        return None
    missing = [name for name in _VARIABLES if name not in environment]
    if missing == list(_VARIABLES[2:]) and environment["WORLD_SIZE"] == "1":
        return None
    if missing:
        there = next(name for name in _VARIABLES if name in environment)
        raise UserError(f"{there} is set but {missing[0]} is not: start with torchrun, or unset {there}")
    numbers: dict[str, int] = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if not environment[name].isdecimal():
            raise UserError(f"{name}={environment[name]!r} is no number: start with torchrun")
        numbers[name] = int(environment[name])
    rank, world = numbers["RANK"], numbers["WORLD_SIZE"]
    if rank >= world:
        raise UserError(f"RANK={rank} with WORLD_SIZE={world}: ranks are 0..{world - 1}; start with torchrun")
    if world == 1:
        return None
    return Launch(
        rank,
        world,
        numbers["LOCAL_RANK"],
        int(environment.get("LOCAL_WORLD_SIZE", "1")),
        environment["MASTER_ADDR"],
        numbers["MASTER_PORT"],
        rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
    )


@contextlib.contextmanager
def started_together(settings: Mapping[str, Any], device: str) -> Iterator[Ranks]:
    """Meet the other ranks, see that they are asked for the same, and end with them; alone without a launcher.

    Args:
        settings: what is to be done, JSON; it must be equal on all ranks.
        device: the recipe's; every rank takes the GPU of its local rank.

    Raises:
        UserError: ranks are missing, asked for different things or without a device of their own; or one has died.
    """
    launch = launch_from(os.environ)
    if launch is None:
        yield ALONE
        return
    _take_device(launch, device)
    meeting = _meet(launch, settings, device)
    watch = _Watch(launch, meeting.beats)
    with _terminated_is_an_error(), contextlib.ExitStack() as group:
        try:
            group.enter_context(_process_group(launch, meeting))
            yield Ranks(launch.rank, launch.world, launch.local_world)
        except OtherRankError:
            watch.end(_FAILED)
            raise
        except KeyboardInterrupt:
            tells = watch.tells()
            watch.end(_FAILED)
            if not tells:
                raise OtherRankError from None
            raise
        except UserError as error:
            tells = watch.tells()
            watch.end(_FAILED)
            if not tells:
                raise OtherRankError from None
            if launch.rank:
                raise UserError(f"rank {launch.rank}: {error}") from error
            raise
        except (RuntimeError, _TerminatedError) as error:  # what a collective raises when its other end is gone
            found = watch.verdict()
            if found is None and isinstance(error, RuntimeError):
                watch.end(_FAILED)
                raise
            if not watch.tells():
                raise OtherRankError from None
            raise UserError(found or "stopped by a signal (SIGTERM); go on with --resume") from error
        except BaseException:
            watch.tells()
            watch.end(_FAILED)
            raise
        else:
            watch.end(_DONE)
            watch.wait_for_the_others()


@contextlib.contextmanager
def _process_group(launch: Launch, meeting: _Meeting) -> Iterator[None]:
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    store = PrefixStore("group", meeting.store)
    dist.init_process_group(
        meeting.backend, store=store, rank=launch.rank, world_size=launch.world, timeout=_COLLECTIVE
    )
    try:
        yield
    except BaseException:
        if meeting.backend == "gloo":  # its threads must not outlive the interpreter; NCCL would wait for the others
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
        raise
    dist.destroy_process_group()


class _TerminatedError(SystemExit):
    """SIGTERM: torchrun sends it to the ranks that are left when one has ended."""


@contextlib.contextmanager
def _terminated_is_an_error() -> Iterator[None]:
    def handle(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _TerminatedError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _take_device(launch: Launch, device: str) -> None:
    import torch

    if device == "cpu":
        return
    if not torch.cuda.is_available():
        if torch.backends.mps.is_available():
            raise UserError("several ranks need CUDA, or the CPU with device: cpu")
        return
    if device not in {"auto", "cuda"}:
        raise UserError(f"device: {device} is one device for {launch.world} ranks: say cuda, and each takes its own")
    count = torch.cuda.device_count()
    if launch.local_rank >= count:
        raise UserError(
            f"rank {launch.rank} would need GPU {launch.local_rank}, this machine has {count}: "
            f"start with --nproc-per-node {count}"
        )
    torch.cuda.set_device(launch.local_rank)


@dataclass(frozen=True)
class _Meeting:
    store: Store
    beats: Store
    backend: str


def _seconds(setting: tuple[str, float]) -> float:
    text = os.environ.get(setting[0])
    try:
        return setting[1] if text is None else float(text)
    except ValueError:
        raise UserError(f"{setting[0]}={text!r} is no number of seconds") from None


def _meet(launch: Launch, settings: Mapping[str, Any], device: str) -> _Meeting:
    """Find the other ranks in a store and compare what each was asked for, before anything can wait for ever."""
    import torch
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.distributed.distributed_c10d import PrefixStore

    patience = timedelta(seconds=_seconds(_JOIN))
    try:
        stores = [
            TCPStore(
                launch.address,
                launch.port,
                is_master=launch.hosts_store and not second,
                timeout=patience,
                wait_for_workers=False,
            )
            for second in (False, True)  # a connection of its own for the beats: a store answers one call at a time
        ]
    except (RuntimeError, ValueError) as error:  # DistStoreError, DistNetworkError
        if launch.hosts_store:
            raise UserError(f"rank 0 cannot listen on {launch.address}:{launch.port} ({_line(error)})") from error
        raise UserError(
            f"rank {launch.rank} of {launch.world} did not find rank 0 at {launch.address}:{launch.port} within "
            f"{patience.total_seconds():.0f} s: was it started?"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store, beats = (PrefixStore(f"falcon-unlearn/{attempt}", each) for each in stores)
    if store.add(f"claimed/{launch.rank}", 1) > 1:
        raise UserError(f"two processes were started as rank {launch.rank}: give each its own RANK")
    on_cuda = device != "cpu" and torch.cuda.is_available()
    facts = {
        "WORLD_SIZE": launch.world,
        "version of torch": torch.__version__,
        "device": "cuda" if on_cuda else "cpu",
        **{f"recipe ({key})": _digest(value) for key, value in settings.items()},
    }
    store.set(f"facts/{launch.rank}", json.dumps(facts))
    store.set(f"beat/{launch.rank}", "0")
    _compare(launch, store, facts, patience)
    return _Meeting(store, beats, "cpu:gloo,cuda:nccl" if on_cuda else "gloo")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _compare(launch: Launch, store: Store, facts: Mapping[str, Any], patience: timedelta) -> None:
    """Every rank reads what all were asked for; rank 0, or the first that sees it, says what is wrong."""
    end = time.monotonic() + patience.total_seconds()
    for other in range(launch.world):
        try:
            store.wait([f"facts/{other}"], timedelta(seconds=max(end - time.monotonic(), 0.01)))
        except RuntimeError as error:
            if not _tells(store):
                raise OtherRankError from None
            raise UserError(
                f"rank {other} of {launch.world} did not start within {patience.total_seconds():.0f} s: "
                f"start all of them, or with another WORLD_SIZE ({_JOIN[0]} waits longer)"
            ) from error
        theirs = json.loads(store.get(f"facts/{other}"))
        different = next((name for name in (*facts, *theirs) if theirs.get(name) != facts.get(name)), None)
        if different is not None:
            if not _tells(store):
                _linger(launch)
                raise OtherRankError
            shown = {"WORLD_SIZE", "version of torch", "device"} & {different}
            values = f" ({theirs.get(different)}, not {facts.get(different)})" if shown else ""
            if launch.hosts_store:
                _linger(launch)
            raise UserError(
                f"rank {other} was started with another {different} than rank {launch.rank}{values}: "
                "start all ranks with the same command"
            )


def _linger(launch: Launch) -> None:
    """Who hosts the store stays until the others have read it."""
    if launch.hosts_store:
        time.sleep(2)


def _tells(store: Store) -> bool:
    """Whether this is the first rank that has an error to print."""
    try:
        return int(store.add("told", 1)) == 1
    except RuntimeError:  # the store went down with rank 0
        return True


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass
class _Watch:
    """Beats, and listens for the beats of the others, in a thread."""

    launch: Launch
    store: Store
    _stop: threading.Event = field(default_factory=threading.Event)
    _found: threading.Event = field(default_factory=threading.Event)
    _message: str | None = None
    _being_said: bool = False
    _state: bytes = b""

    def __post_init__(self) -> None:
        self._silent = _seconds(_SILENT)
        self._thread = threading.Thread(target=self._run, name="falcon-unlearn beats", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        seen: dict[int, tuple[bytes, float]] = {}
        keys = [f"beat/{rank}" for rank in range(self.launch.world)]
        beat = 0
        while not self._stop.wait(min(1.0, self._silent / 5)):
            beat += 1
            try:
                self.store.set(keys[self.launch.rank], str(beat))
                values = self.store.multi_get(keys)
            except RuntimeError:
                self._end_soon("rank 0 has ended or cannot be reached any more")
                return
            now = time.monotonic()
            for rank, value in enumerate(values):
                if value == _FAILED:
                    self._end_soon(f"rank {rank} has ended with an error")
                    return
                if seen.get(rank, (b"", 0.0))[0] != value:
                    seen[rank] = (value, now)
                elif value != _DONE and now - seen[rank][1] > self._silent:
                    self._end_soon(f"rank {rank} has died: nothing was heard of it for {self._silent:.0f} s")
                    return

    def _end_soon(self, message: str) -> None:
        """Let the main thread end by itself; if it hangs in a collective operation, end the process."""
        self._message = f"{message}; go on with the same command and --resume"
        self._found.set()
        if not self._stop.wait(5) and not self._being_said:
            if self.tells():
                print(f"error: {self._message}", file=sys.stderr, flush=True)
            os._exit(2)

    def verdict(self) -> str | None:
        """Which rank has gone, once that is known; None where all of them are well."""
        self._being_said = True
        self._found.wait(self._silent + 3)
        self._stop.set()
        return self._message

    def tells(self) -> bool:
        """Whether this rank prints what is wrong; one does."""
        return _tells(self.store)

    def end(self, state: bytes) -> None:
        """Stop beating, with the others told why."""
        self._being_said = True
        self._stop.set()
        self._thread.join(timeout=5)
        with contextlib.suppress(RuntimeError):
            self.store.set(f"beat/{self.launch.rank}", state.decode())
        if state == _FAILED:
            _linger(self.launch)

    def wait_for_the_others(self) -> None:
        """Who hosts the store leaves last."""
        if self.launch.hosts_store:
            end = time.monotonic() + self._silent
            keys = [f"beat/{rank}" for rank in range(self.launch.world)]
            with contextlib.suppress(RuntimeError):
                while time.monotonic() < end and set(self.store.multi_get(keys)) - {_DONE, _FAILED}:
                    time.sleep(0.05)
