import threading

import pytest
import torch

from llmq.parallel import LEAST_ROWS, one_thread, rows_side_by_side, side_by_side


def test_one_thread_puts_the_number_back():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="inside"), one_thread() as threads:  # noqa: PT012
        assert (threads, torch.get_num_threads()) == (before, 1)
        raise RuntimeError("inside")
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_side_by_side_keeps_the_order_and_raises(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        used = set()

        def job(i):
            used.add(threading.get_ident())
            assert torch.get_num_threads() == 1
            return i * i

        assert side_by_side(job, range(20)) == [i * i for i in range(20)]
        with pytest.raises(ZeroDivisionError):
            side_by_side(lambda i: 1 // i, [1, 0])
        assert (threads == 1) == (used == {threading.get_ident()})
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("threads", "rows", "parts"), [(1, 1000, 1), (3, 1000, 3), (3, LEAST_ROWS, 1), (3, 5, 1)])
def test_rows_are_cut_for_the_threads_and_joined(threads, rows, parts):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seen = []

        def job(n):
            seen.append(n)
            return torch.arange(rows)[n] * 2

        assert torch.equal(rows_side_by_side(job, rows), torch.arange(rows) * 2)
        assert len(seen) == parts
    finally:
        torch.set_num_threads(before)
