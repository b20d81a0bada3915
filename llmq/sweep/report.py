"""From the record of a sweep (its JSON) to a table and a Pareto plot. Arithmetic only: nothing is measured here."""

from __future__ import annotations

import math
from pathlib import Path

from llmq.records import Record

# Title of each figure that is drawn against bits a weight.
FIGURES = {"perplexity": "perplexity", "kl": "KL to the unquantized model, nats a token"}


def finished(record: Record) -> dict[str, Record]:
    """The rows that have been scored, by name."""
    return {name: row for name, row in record["rows"].items() if row.get("score")}


def table(record: Record) -> str:
    """The whole record for a person, as Markdown."""
    return "\n\n".join(part for part in (_head(record), _rows(record), _notes(record)) if part)


def _head(record: Record) -> str:
    text = record["calibration"]
    lines = [
        f"Model {record['model']}; text {record['dataset']}: {record['protocol']}. Calibration of rows made here: "
        f"{text['calib']}, {text['nsamples']} × {text['seqlen']} tokens. Head {record['head_bits']} bits.",
        f"{record['machine']}; " + ", ".join(f"{name} {version}" for name, version in record["versions"].items()) + ".",
    ]
    return "\n".join(lines)


def _rows(record: Record) -> str:
    header = ["model", "bits a weight (linears)", "perplexity", "change", "KL, nats a token", "top-1"]
    lines = [[*header, "activations", "made in, s", "peak, GiB"]]
    base = record["reference"]
    if base:
        lines.append(["unquantized", "–", f"{base['perplexity']:.3f}", "–", "–", "–", "float", "–", "–"])
    for name, row in finished(record).items():
        score, made = row["score"], row.get("made") or {}
        change = f"{100 * math.expm1(score['delta_nll']):+.2f} % ± {100 * score['delta_nll_se']:.2f} %"
        cells = [name, f"{row['bits_per_weight']:.3f}", f"{score['perplexity']:.3f}", change]
        cells += [f"{score['kl']:.4f} ± {score['kl_se']:.4f}", f"{100 * score['top1']:.2f} %", row["activations"]]
        cells.append(f"{made['seconds']:.0f}" if made.get("seconds") else "–")
        cells.append(f"{made['peak_bytes'] / 2**30:.2f}" if made.get("peak_bytes") else "–")
        lines.append(cells)
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _notes(record: Record) -> str:
    lines = [f"absent: {name}: {why}" for name, why in record["missing"].items()]
    lines += [f"failed: {name}: {why}" for name, why in record["failed"].items()]
    waiting = [name for name in record["rows"] if name not in finished(record) and name not in record["failed"]]
    lines += [f"not done yet: {', '.join(waiting)}"] if waiting else []
    for name, row in finished(record).items():
        lines += [f"{name}: {note}" for note in (row["about"], *row["score"]["notes"]) if note]
    return "\n".join(f"- {line}" for line in lines)


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats at the same size or a smaller one, by size."""
    front: list[tuple[float, float]] = []
    for size, value in sorted(points):
        if not front or value < front[-1][1]:
            front.append((size, value))
    return front


def plot(record: Record, path: Path) -> None:
    """Draw perplexity and KL against bits a weight as PNG; a series a method, a line through the best at each size."""
    from matplotlib.figure import Figure

    rows = finished(record)
    series = list(dict.fromkeys(row["series"] for row in rows.values()))
    figure = Figure(figsize=(6.5 * len(FIGURES), 5), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(FIGURES)), FIGURES.items(), strict=True):
        points = [(row["bits_per_weight"], row["score"][key]) for row in rows.values()]
        front = pareto(points)
        axes.step([x for x, _ in front], [y for _, y in front], where="post", color="grey", linewidth=0.8)
        for i, label in enumerate(series):
            found = [p for p, row in zip(points, rows.values(), strict=True) if row["series"] == label]
            axes.plot(*zip(*found, strict=True), "os^vD"[i // 10 % 5], color=f"C{i % 10}", label=label)
        if key == "perplexity" and record["reference"]:
            axes.axhline(record["reference"]["perplexity"], color="black", linestyle="--", linewidth=0.8)
        axes.set(xlabel="bits a weight over the linears", ylabel=title, yscale="log", title=str(record["model"]))
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
