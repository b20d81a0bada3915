import threading

import pytest
import torch

from llmq.parallel import one_thread, side_by_side


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
