"""Threads around torch: whole jobs side by side instead of every small operation split.

torch splits each operation over its threads and waits for the slowest at the end of each. For thousands of operations
on small tensors the waiting is most of the time, and all of it when another program uses one of the cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def one_thread() -> Iterator[int]:
    """Within the context torch runs each operation on one thread; yields the number it used before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def side_by_side(job: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """``[job(i) for i in items]``, as many at a time as torch has threads, each on one thread."""
    with one_thread() as threads:
        if threads == 1 or len(items) == 1:
            return [job(item) for item in items]
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(job, items))
