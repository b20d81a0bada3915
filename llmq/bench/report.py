"""From the record of a benchmark (its JSON) to tables and a plot. Arithmetic only: nothing is measured here."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from llmq.bench.drivers import BATCH_PROMPT
from llmq.bench.roofline import Work
from llmq.config import KVCacheConfig
from llmq.records import Record

# A run during which others took more than this share of the machine's CPU time is pointed out.
DISTURBED = 0.05


def speeds(record: Record, engine: str, key: str, threads: int) -> list[float]:
    """Tokens/s of a measurement, one a round (the median of a round's repeats), in the order of rounds."""
    runs = (r for r in record["runs"] if r["engine"] == engine and r["threads"] == threads)
    return [statistics.median(r["speeds"][key]) for r in sorted(runs, key=lambda r: r["round"]) if key in r["speeds"]]


def ratio(record: Record, engine: str, key: str, threads: int) -> float | None:
    """Median over the rounds of this engine's speed over the baseline's in the same round; None without both."""
    ours, base = (
        {r["round"]: statistics.median(r["speeds"][key]) for r in record["runs"]
         if r["engine"] == name and r["threads"] == threads and key in r["speeds"]}
        for name in (engine, record["baseline"])
    )  # fmt: skip
    common = ours.keys() & base.keys()
    return statistics.median(ours[i] / base[i] for i in common) if common else None


def share_of_roof(record: Record, engine: str, key: str, threads: int) -> float | None:
    """Median speed over the one the memory bus (decode, batch) or the int8 peak (prefill) allows; None if unknown."""
    found = speeds(record, engine, key, threads)
    allowed = roof(record, engine, key, threads)
    return statistics.median(found) / allowed if found and allowed else None


def roof(record: Record, engine: str, key: str, threads: int) -> float | None:
    """Tokens/s that physics allows: the lower of the memory bus and the int8 peak. None where neither is known.

    A decode of n tokens after d is taken at the middle, d + n / 2. Weights are read once for a prompt or a batch.
    """
    work = Work.from_json(record["model"]["work"])
    machine = record["roofs"].get(str(threads), {})
    weights = record["engines"][engine]["footprint"]["nbytes"]
    kind, n = key.split()
    tokens, position = 1, float(n) + record["plan"]["new_tokens"] / 2
    if kind == "batch":
        tokens, position = int(n), BATCH_PROMPT + record["plan"]["new_tokens"] / 2
    if kind == "prefill":
        tokens = int(n)
        seconds = [weights / _known(machine, "stream"), work.prefill_operations(tokens) / _known(machine, "int8")]
    else:
        nbytes = work.decode_bytes(weights, position, batch=tokens, kv_bits=_kv_bits(record["engines"][engine]))
        operations = tokens * work.decode_operations(position)
        seconds = [nbytes / _known(machine, "stream"), operations / _known(machine, "int8")]
    known = [s for s in seconds if s > 0]
    return tokens / max(known) if known else None


def _kv_bits(engine: Record) -> float:
    """Mean bits of a cached number; without the scales, so that the roof is a little too high."""
    kv = KVCacheConfig.parse(engine.get("kv") or "16")
    return (kv.k_bits + kv.v_bits) / 2


def _known(machine: Record, name: str) -> float:
    """A roof of the machine; infinite, so that it limits nothing, where it was not measured."""
    value = machine.get(name)
    return value if value else math.inf


def table(record: Record) -> str:
    """The whole record for a person, as Markdown."""
    parts = [_head(record)]
    for threads in record["threads"]:
        parts += [f"Threads: {threads}", _speed_table(record, threads), _ratio_table(record, threads)]
        parts += [_roof_table(record, threads)]
    parts += [_cost_table(record), _cache_table(record), _notes(record)]
    return "\n\n".join(part for part in parts if part)


def _grid(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns."""
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [[cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
             for row in [header, *rows]]  # fmt: skip
    lines.insert(1, ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _head(record: Record) -> str:
    machine, model = record["machine"], record["model"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"model    {model['spec']}: {model['type']}, {model['work']['block_weights'] / 1e6:.0f} M weights in blocks, "
        f"{model['work']['head_weights'] / 1e6:.0f} M in the head",
        f"machine  {machine['cpu']} ({machine['cpus']} CPUs; {' '.join(machine['flags'])}); {machine['system']}",
        f"versions {versions}",
        f"rounds   {record['rounds']}, engines in turns, every other round in reverse order",
    ]
    for threads, roofs in record["roofs"].items():
        peak = f"{roofs['int8'] / 1e12:.2f} TOPS" if roofs["int8"] else "unknown"
        stream = f"{roofs['stream'] / 1e9:.1f} GB/s" if roofs["stream"] else "unknown"
        lines.append(f"roofs    {threads} threads: stream read {stream}, int8 {peak} ({roofs['instruction']})")
    return "\n".join(lines)


def _keys(record: Record) -> list[str]:
    return list(record["keys"])


def _speed_table(record: Record, threads: int) -> str:
    def cell(engine: str, key: str) -> str:
        found = speeds(record, engine, key, threads)
        if not found:
            return "–"
        median = statistics.median(found)
        return f"{median:.4g} ± {50 * (max(found) - min(found)) / median:.0f} %"

    rows = [[name, *(cell(name, key) for key in _keys(record))] for name in record["engines"]]
    return _grid(["tokens/s (median ± half the range)", *_keys(record)], rows)


def _ratio_table(record: Record, threads: int) -> str:
    def cell(engine: str, key: str) -> str:
        value = ratio(record, engine, key, threads)
        return "–" if value is None else f"{value:.2f}"

    rows = [[name, *(cell(name, key) for key in _keys(record))] for name in record["engines"]]
    return _grid([f"times {record['baseline']}", *_keys(record)], rows) if len(rows) > 1 else ""


def _roof_table(record: Record, threads: int) -> str:
    def cell(engine: str, key: str) -> str:
        value = share_of_roof(record, engine, key, threads)
        return "–" if value is None else f"{100 * value:.0f} %"

    rows = [[name, *(cell(name, key) for key in _keys(record))] for name in record["engines"]]
    return _grid(["share of what bus or int8 peak allow", *_keys(record)], rows)


def _cost_table(record: Record) -> str:
    rows = []
    for name, engine in record["engines"].items():
        runs = [r for r in record["runs"] if r["engine"] == name]
        if not runs:  # the record of a benchmark that was stopped
            continue
        foot = engine["footprint"]
        peak, start = (statistics.median(r[key] for r in runs) / 1e6 for key in ("peak_bytes", "start_bytes"))
        load = statistics.median(r["load_seconds"] for r in runs)
        bits = f"{foot['block_bits']:.3g} / {foot['head_bits']:.3g}"
        rows.append([name, bits, f"{foot['nbytes'] / 1e6:.0f}", f"{load:.2f}", f"{peak:.0f}", f"{start:.0f}"])
    header = ["", "bits a weight, blocks / head", "MB of weights a token", "load, s", "peak memory, MB"]
    return _grid([*header, "of it before loading"], rows)


def _cache_table(record: Record) -> str:
    """Keys and values after each decoding, for the engines that tell."""
    rows = []
    keys = [key for key in _keys(record) if key.startswith("decode")]
    for name in record["engines"]:
        told: Record = {}
        for r in record["runs"]:
            told |= r.get("cache_bytes", {}) if r["engine"] == name else {}
        if told:
            rows.append([name, *(f"{told[key] / 1e6:.2f}" if key in told else "–" for key in keys)])
    return _grid(["keys and values, MB", *keys], rows)


def _notes(record: Record) -> str:
    lines = [f"absent: {name}: {why}" for name, why in record["missing"].items()]
    lines += [f"failed: {name}: {why}" for name, why in record["failed"].items()]
    shares = {
        kind: [r["disturbance"][kind] for r in record["runs"] if r["disturbance"]] for kind in ("steal", "others")
    }
    for kind, text in (("steal", "stolen by other guests"), ("others", "used by other processes")):
        if shares[kind] and max(shares[kind]) > DISTURBED:
            worst, median = max(shares[kind]), statistics.median(shares[kind])
            lines.append(
                f"not quiet: CPU time {text}: {100 * median:.0f} % in the median run, {100 * worst:.0f} % in the worst"
            )
    for name, engine in record["engines"].items():
        lines.append(f"{name}: {engine['about']}; {'; '.join([engine['version'], *engine['notes']])}")
    return "\n".join(lines)


def plot(record: Record, path: Path) -> None:
    """Draw the record as PNG: bars for a comparison, curves for a sweep; a black or dashed line is the roof."""
    from matplotlib.figure import Figure

    kinds = [kind for kind in ("prefill", "decode", "batch") if any(key.startswith(kind) for key in _keys(record))]
    figure = Figure(figsize=(6.5 * len(kinds), 5), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        keys = [key for key in _keys(record) if key.startswith(kind)]
        (_curves if record["sweep"] else _bars)(axes, record, keys)
        axes.set(ylabel="tokens/s", title=f"{Path(record['model']['spec']).name}, {kind}", ylim=(0, None))
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


AXIS = {"prefill": "tokens of the prompt", "decode": "tokens of context", "batch": "sequences at once"}


def _bars(axes: Any, record: Record, keys: list[str]) -> None:
    engines, threads = list(record["engines"]), record["threads"][0]
    width = 0.8 / len(engines)
    for i, engine in enumerate(engines):
        for j, key in enumerate(keys):
            found, allowed = speeds(record, engine, key, threads), roof(record, engine, key, threads)
            if found:
                at, median = j + (i - (len(engines) - 1) / 2) * width, statistics.median(found)
                around = [[median - min(found)], [max(found) - median]]
                label = engine if j == 0 else None
                axes.bar(at, median, width, color=f"C{i}", label=label, yerr=around, error_kw={"linewidth": 0.8})
                if allowed:
                    axes.hlines(allowed, at - width / 2, at + width / 2, color="black", linewidth=1)
    axes.set_xticks(range(len(keys)), [key.split()[1] for key in keys])
    axes.set_xlabel(f"{AXIS[keys[0].split()[0]]}; black: what bus or int8 peak allow")


def _curves(axes: Any, record: Record, keys: list[str]) -> None:
    over_threads = record["sweep"] == "threads"
    for i, engine in enumerate(record["engines"]):
        if over_threads:
            points = [(threads, keys[0], threads) for threads in record["threads"]]
        else:
            points = [(int(key.split()[1]), key, record["threads"][0]) for key in keys]
        got = [(x, speeds(record, engine, key, threads)) for x, key, threads in points]
        got = [(x, found) for x, found in got if found]
        if not got:
            continue
        axes.plot([x for x, _ in got], [statistics.median(f) for _, f in got], "o-", color=f"C{i}", label=engine)
        axes.fill_between(
            [x for x, _ in got], [min(f) for _, f in got], [max(f) for _, f in got], color=f"C{i}", alpha=0.2
        )
        lines = [(x, roof(record, engine, key, threads)) for x, key, threads in points]
        known = [(x, y) for x, y in lines if y]
        axes.plot([x for x, _ in known], [y for _, y in known], "--", color=f"C{i}", linewidth=0.8)
    if over_threads:
        axes.set_xticks(record["threads"])
    what = f"threads ({keys[0]})" if over_threads else AXIS[keys[0].split()[0]]
    axes.set_xlabel(f"{what}; dashed: what bus or int8 peak allow")
