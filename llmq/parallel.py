"""Threads around torch: whole jobs side by side instead of every small operation split.

torch splits each operation over its threads and waits for the slowest at the end of each. For thousands of operations
on small tensors the waiting is most of the time, and all of it when another program uses one of the cores.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

# Rows below which a thread more does not pay.
LEAST_ROWS = 64
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


def rows_side_by_side(job: Callable[[slice], Tensor], n_rows: int) -> Tensor:
    """The results of ``job`` for slices of the rows 0 .. n_rows, one a thread of torch, joined along dimension 0.

    For work that does not look across rows.
    """
    parts = max(1, min(torch.get_num_threads(), n_rows // LEAST_ROWS))
    ends = [n_rows * i // parts for i in range(parts + 1)]
    return torch.cat(side_by_side(job, [slice(a, b) for a, b in itertools.pairwise(ends)]))


def side_by_side(job: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """``[job(i) for i in items]``, as many at a time as torch has threads, each on one thread."""
    with one_thread() as threads:
        if threads == 1 or len(items) == 1:
            return [job(item) for item in items]
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(job, items))
