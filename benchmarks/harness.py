"""What the benchmarks share: options, timing, peak memory, the machine's limits, the table and the JSON object."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RUNS = 5


@dataclass(frozen=True)
class Timing:
    """Seconds: median of the runs, the fastest and the slowest."""

    median: float
    fastest: float
    slowest: float
    runs: int

    def __str__(self) -> str:
        return f"{1e3 * self.median:,.1f} ms ({1e3 * self.fastest:,.1f} .. {1e3 * self.slowest:,.1f})"


def options(description: str) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--quick", action="store_true", help="smaller shapes, under a minute")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (torch's own choice without it)")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"timed runs after a warm-up (default: {RUNS})")
    return parser


def synchronize(device: str) -> None:
    """Wait for the device, where there is something to wait for."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(function: Callable[[], Any], *, device: str = "cpu", runs: int = RUNS, warmup: int = 1) -> Timing:
    """Time ``function`` after ``warmup`` calls."""
    for _ in range(warmup):
        function()
    seconds = []
    for _ in range(runs):
        synchronize(device)
        began = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return Timing(statistics.median(seconds), min(seconds), max(seconds), runs)


def interleaved(
    functions: Mapping[str, Callable[[], Any]], *, device: str = "cpu", runs: int = RUNS, warmup: int = 1
) -> dict[str, Timing]:
    """Time several functions in turns, so that a machine that slows down slows all of them."""
    for function in functions.values():
        for _ in range(warmup):
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            seconds[name].append(timed(function, device=device, runs=1, warmup=0).median)
    return {name: Timing(statistics.median(s), min(s), max(s), runs) for name, s in seconds.items()}


def _peak_bytes(device: str) -> int:
    """Since :func:`_reset_peak`. Not ru_maxrss: a new process starts with that of the one it came from."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    return _status("VmHWM")


def _bytes_now(device: str) -> int:
    if device.startswith("cuda"):
        return int(torch.cuda.memory_allocated())
    return _status("VmRSS")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status does not tell {key}: peak memory on the CPU is measured on Linux")


def _reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.zeros(1, device=device)
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _measure(
    connection: Any, prepare: Callable[[], Any], function: Callable[..., Any], arguments: tuple[Any, ...], device: str
) -> None:
    prepare()
    _reset_peak(device)
    before = _bytes_now(device)
    function(*arguments)
    connection.send(_peak_bytes(device) - before)


def nothing() -> None:
    """No preparation."""


def peak_memory(
    function: Callable[..., Any], *arguments: Any, device: str = "cpu", prepare: Callable[[], Any] = nothing
) -> int:
    """Peak bytes of ``function(*arguments)`` in a fresh process, above what importing and ``prepare`` take.

    On the CPU the resident size, on CUDA what torch allocated. ``function`` must be importable (module level).
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, prepare, function, arguments, device))
    process.start()
    sender.close()
    try:
        return int(receiver.recv())
    except EOFError as error:
        raise RuntimeError(
            f"{function.__name__} did not finish in its own process (exit {process.exitcode})"
        ) from error
    finally:
        process.join()


def flops_per_second(device: str, dtype: torch.dtype = torch.float32, size: int | None = None) -> float:
    """What the machine's matrix product reaches: the practical limit that FLOP counts are divided by."""
    n = size or (8192 if device.startswith("cuda") else 1536)
    left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / timed(lambda: left @ right, device=device, runs=5, warmup=2).fastest


def bytes_per_second(device: str) -> float:
    """What copying within the device's memory reaches, reading and writing counted."""
    source = torch.empty(1 << (30 if device.startswith("cuda") else 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / timed(lambda: target.copy_(source), device=device, runs=5, warmup=2).fastest


def machine(device: str) -> dict[str, Any]:
    """Where the numbers come from."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else _cpu_name()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or "CPU"


def gib(size: float) -> str:
    """Bytes as a human reads them."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def table(rows: Sequence[Sequence[object]]) -> str:
    """Rows as aligned text; the first is the head."""
    text = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in text) for i in range(len(text[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in text]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def show(
    arguments: argparse.Namespace, title: str, rows: Sequence[Sequence[object]], result: Mapping[str, Any]
) -> None:
    """Print the JSON object, or the title, the machine and the table."""
    where = machine(arguments.device)
    if arguments.json:
        print(json.dumps({**result, "machine": where}))
        return
    print(f"{title}\n{where['device']}, {where['threads']} threads, torch {where['torch']}\n\n{table(rows)}")
