"""Speed of the kernels: each result is checked against the reference first, then timed.

For every kernel set, bit width and number of tokens it prints the median time of one linear layer, the bytes of weights
read a second, their share of a measured stream read of this machine, and the ratio to torch's fp32 linear of the same
shape and threads. Kernel and torch are timed in turns, so that a change of the machine's speed meets both.

Weights are cycled through enough copies to leave every cache ("memory"); `--warm` uses one copy instead ("cache").
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llmq import _core, kernels
from llmq.config import QuantScheme
from llmq.kernels import reference
from llmq.qtensor import QTensor

SHAPES = ("1152x6912", "6912x1152")
BITS = ("4", "8")
TOKENS = (1, 4, 16, 128, 512)
# Larger than any level 3 cache share a process is likely to have.
COLD_BYTES = 256 << 20
MIN_ROUNDS, MAX_ROUNDS, SECONDS = 5, 100, 1.0


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved_medians(*works: Callable[[], object]) -> list[float]:
    """Median seconds of each, timed in turns A B A B ..., for about SECONDS."""
    for work in works:
        work()
    times: list[list[float]] = [[] for _ in works]
    start = time.perf_counter()
    while len(times[0]) < MIN_ROUNDS or (len(times[0]) < MAX_ROUNDS and time.perf_counter() - start < SECONDS):
        for work, column in zip(works, times, strict=True):
            column.append(seconds(work))
    return [statistics.median(column) for column in times]


def stream_read_speed() -> float:
    """Bytes a second that all threads together read from memory."""
    data = torch.ones(COLD_BYTES // 8, dtype=torch.int64)
    [median] = interleaved_medians(lambda: _core.stream_read(data.data_ptr(), COLD_BYTES))
    return COLD_BYTES / median


def random_qtensor(n: int, k: int, scheme: QuantScheme) -> QTensor:
    """Any codes, scales near 0.01."""
    groups = scheme.n_groups(k)
    q = torch.randint(0, scheme.levels, (n, k), dtype=torch.uint8)
    scale = ((0.5 + torch.rand(n, groups)) / 100).half()
    zero = None if scheme.sym else torch.randint(0, scheme.levels, (n, groups), dtype=torch.uint8)
    return QTensor(q, scale, zero, scheme)


def check(x: Tensor, t: QTensor, w: kernels.PackedWeight) -> None:
    """The kernels promise the reference's bits; a benchmark of wrong results is worth nothing."""
    actual, expected = kernels.qgemm(x, w), reference.qgemm(x, t)
    if not torch.equal(actual, expected):
        largest = (actual - expected).abs().max().item()
        raise SystemExit(
            f"{kernels.current_isa()} {t.scheme} {w.n}x{w.k} M={len(x)}: differs from the reference by {largest}"
        )


def cycled(items: list[Callable[[], object]]) -> Callable[[], object]:
    """A call that does the next item at each call, over and over."""
    turn = itertools.cycle(items)
    return lambda: next(turn)()


def copies(nbytes: int, warm: bool) -> int:
    """How many matrices of ``nbytes`` to cycle through."""
    return 1 if warm else max(2, COLD_BYTES // nbytes)


def qgemm_of(x: Tensor, w: kernels.PackedWeight) -> Callable[[], object]:
    """Our linear, ready to be timed."""
    return lambda: kernels.qgemm(x, w)


def linear_of(x: Tensor, weight: Tensor) -> Callable[[], object]:
    """Torch's linear, ready to be timed."""
    return lambda: torch.nn.functional.linear(x, weight)


def bench_shape(
    n: int, k: int, scheme: QuantScheme, isas: list[str], tokens: list[int], warm: bool
) -> list[dict[str, object]]:
    """One row of results for every kernel set and number of tokens."""
    t = random_qtensor(n, k, scheme)
    w = kernels.pack(t)
    assert isinstance(w.data, Tensor)
    twins = [kernels.PackedWeight(n, k, scheme, w.data.clone()) for _ in range(copies(w.nbytes, warm))]
    dense = [torch.randn(n, k) for _ in range(copies(n * k * 4, warm))]
    rows: list[dict[str, object]] = []
    for isa, m in itertools.product(isas, tokens):
        x = torch.randn(m, k)
        with kernels.use_isa(isa):
            check(x, t, w)
            ours, torchs = interleaved_medians(
                cycled([qgemm_of(x, p) for p in twins]), cycled([linear_of(x, d) for d in dense])
            )
        row = {
            "isa": isa,
            "shape": f"{n}x{k}",
            "scheme": str(scheme),
            "tokens": m,
            "seconds": ours,
            "torch_seconds": torchs,
        }
        rows.append({**row, "weight_bytes": w.nbytes, "macs": m * n * k})
    return rows


def print_row(row: dict[str, object], stream: float) -> None:
    """One line of the table; ``stream`` in bytes a second."""
    ours, torchs, nbytes, macs = (float(row[key]) for key in ("seconds", "torch_seconds", "weight_bytes", "macs"))  # type: ignore[arg-type]
    speed = nbytes / ours
    print(
        f"{row['isa']:<11} {row['shape']:>11} {row['scheme']:>8} {row['tokens']:>4}  {ours * 1e6:>10.0f} us "
        f"{speed / 1e9:>6.1f} GB/s {speed / stream:>5.0%} {macs / ours / 1e9:>7.0f} GMAC/s "
        f"{torchs * 1e6:>10.0f} us {torchs / ours:>6.2f}x",
        flush=True,
    )


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line; its help is the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    compiled = kernels.available_isas()[:-1]
    parser.add_argument(
        "--isa", nargs="+", choices=compiled, default=compiled[:1], help="kernel sets (default: the best)"
    )
    parser.add_argument("--shape", nargs="+", default=SHAPES, metavar="NxK", help="out_features x in_features")
    parser.add_argument("--bits", nargs="+", choices=("2", "3", "4", "8"), default=BITS)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--sym", action="store_true", help="symmetric grid (default: asymmetric)")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, metavar="M")
    parser.add_argument("--threads", type=int, default=kernels.num_threads())
    parser.add_argument("--warm", action="store_true", help="one copy of the weights, which may stay in a cache")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the rows to this file")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Run the benchmark with these command line arguments."""
    args = parse_arguments(argv)
    kernels.set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    stream = stream_read_speed()
    print(
        f"{args.threads} threads; stream read {stream / 1e9:.1f} GB/s; weights in {'cache' if args.warm else 'memory'}"
    )
    print("isa               shape   scheme    M            ours   weights  share        work     torch fp32   ratio")
    rows = []
    for shape, bits in itertools.product(args.shape, args.bits):
        n, k = (int(part) for part in shape.split("x"))
        scheme = QuantScheme(int(bits), args.group_size, args.sym)
        with torch.inference_mode():
            done = bench_shape(n, k, scheme, args.isa, args.tokens, args.warm)
        for row in done:
            print_row(row, stream)
        rows += done
    if args.json:
        args.json.write_text(
            json.dumps({"threads": args.threads, "stream_bytes_per_second": stream, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main(sys.argv[1:])
