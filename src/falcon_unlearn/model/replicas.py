"""Batches side by side on a CPU: one thread a batch uses the cores better than all threads on one small product."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BatchRun = Callable[[int], None]


def run_batches(model: PreTrainedModel, count: int, prepare: Callable[[PreTrainedModel], BatchRun]) -> None:
    """Run batches ``0..count - 1`` in no set order, on a CPU as many at a time as torch has threads.

    Every thread has modules and buffers of its own, for hooks and for what a forward pass may keep in a module, and
    the parameters in common. Elsewhere, or with one thread, the batches run in turn on ``model`` itself.

    Args:
        model: on one device; it is not modified.
        count: number of batches.
        prepare: called once with each copy; what it returns runs one batch without gradients. It must be safe to call
            from another thread.
    """
    threads = min(torch.get_num_threads(), count) if model.device.type == "cpu" else 1
    if threads <= 1:
        run = prepare(model)
        for number in range(count):
            run(number)
        return
    idle: SimpleQueue[BatchRun] = SimpleQueue()
    for _ in range(threads):
        idle.put(prepare(copy.deepcopy(model, {id(p): p for p in model.parameters()})))

    def work(number: int) -> None:
        run = idle.get()
        try:
            run(number)
        finally:
            idle.put(run)

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for done in [pool.submit(work, number) for number in range(count)]:
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
