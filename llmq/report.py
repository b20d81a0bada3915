"""What a run says: the table before it, a line a block, the summary after it, the files that stay with the model."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from llmq.checkpoint import REPORT_NAME
from llmq.memory import current_rss, peak_rss
from llmq.plan import Matrix, Plan

Log = Callable[[str], None]


def silent(_line: str) -> None:
    """A log that says nothing."""


def size(n_bytes: float) -> str:
    """``12.3 MiB`` or ``1.2 GiB``."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 05 s`` or ``2 h 10 min``."""
    s = round(seconds)
    if s < 90:
        return f"{s} s"
    return f"{s // 60} min {s % 60:02d} s" if s < 5400 else f"{s // 3600} h {s % 3600 // 60:02d} min"


def plan_table(plan: Plan, *, model: str, family: str, method: str, calibration: str, output: Path) -> str:
    """The table that a run begins with."""
    groups: dict[tuple[str, str], list[Matrix]] = {}
    for m in plan.linears:
        key = (m.name.split(".", 3)[-1] if m.name.count(".") > 2 else m.name, f"{m.n} x {m.k}")
        groups.setdefault(key, []).append(m)
    lines = [
        f"model        {model} (family {family}, {plan.weights / 1e6:.1f} M weights)",
        f"method       {method}, {_schemes(plan.linears)}",
        f"calibration  {calibration}",
        f"output       {output}",
        "",
        f"  {'quantized':34} {'shape':>16} {'count':>6} {'scheme':>11} {'size':>11}",
    ]
    for (name, shape), same in groups.items():
        total = size(sum(m.nbytes for m in same))
        lines.append(f"  {name:34} {shape:>16} {len(same):6d} {_schemes(same):>11} {total:>11}")
    for m in plan.tables:
        name = m.name if m.shared_with is None else f"{m.name} = {m.shared_with}"
        lines.append(f"  {name:34} {f'{m.n} x {m.k}':>16} {1:6d} {str(m.scheme):>11} {size(m.nbytes):>11}")
    reasons: dict[tuple[str, str], list[int]] = {}
    for kept in plan.kept:
        entry = reasons.setdefault((kept.reason, str(kept.dtype).removeprefix("torch.")), [0, 0])
        entry[0] += 1
        entry[1] += kept.nbytes
    for (reason, dtype), (count, nbytes) in reasons.items():
        lines.append(f"  {'left as it is: ' + reason:51} {count:6d} {dtype:>11} {size(nbytes):>11}")
    if len({m.scheme for m in plan.linears}) > 1:
        lines += ["", "  bits by block, first to last"]
        lines += [f"  {name:34} {' '.join(str(m.scheme.bits) for m in same)}" for (name, _), same in groups.items()]
    ratio = plan.bytes_before / plan.bytes_after
    learning = f" and at most {duration(plan.learning_seconds)} of learning" if plan.learning_seconds else ""
    lines += [
        "",
        f"  {size(plan.bytes_before)} in 16 bit -> {size(plan.bytes_after)} ({ratio:.1f} x smaller); "
        f"{plan.bits_per_weight:.3f} bits a weight, {plan.bits_per_weight_all:.3f} with embedding and head",
        f"  predicted: {duration(plan.seconds)}{learning}, peak memory {size(plan.peak_bytes)}",
        *(f"  warning: {w}" for w in plan.warnings),
    ]
    return "\n".join(lines)


def _schemes(linears: Sequence[Matrix]) -> str:
    """Their scheme, or which bits they have."""
    if len({m.scheme for m in linears}) == 1:
        return str(linears[0].scheme)
    return ", ".join(map(str, sorted({m.scheme.bits for m in linears}))) + " bits"


def block_line(i: int, n: int, errors: list[float], tokens: int, seconds: float, elapsed: float) -> str:
    """The progress line after block ``i`` of ``n`` (from 0)."""
    left = elapsed / (i + 1) * (n - i - 1)
    loss = f"output error {100 * sum(errors) / len(errors):.3f} %" if errors else "no calibration"
    speed = f"{tokens / seconds:.0f} tokens/s" if tokens else f"{seconds:.1f} s"
    width = len(str(n))
    return f"  block {i + 1:{width}d}/{n}  {loss}  {speed}  left {duration(left)}  memory {size(current_rss())}"


def versions() -> dict[str, str]:
    """Versions of what made the checkpoint."""
    names = ("llmq", "torch", "transformers", "safetensors")
    return {"python": platform.python_version(), **{n: _version(n) for n in names}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "source tree"


def build_report(
    plan: Plan,
    rows: list[dict[str, Any]],
    *,
    model: str,
    origin: str,
    family: str,
    method: str,
    options: dict[str, Any],
    calibration: dict[str, Any] | None,
    folds: list[dict[str, Any]],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The contents of llmq_report.json."""
    return {
        "model": {"spec": model, "origin": origin, "family": family, "weights": plan.weights},
        "method": method,
        "options": options,
        "sizes": {
            "bytes_16bit": plan.bytes_before,
            "bytes": plan.bytes_after,
            "bits_per_weight_linears": plan.bits_per_weight,
            "bits_per_weight_all": plan.bits_per_weight_all,
        },
        "predicted": {
            "seconds": plan.seconds,
            "learning_seconds_at_most": plan.learning_seconds,
            "peak_bytes": plan.peak_bytes,
        },
        "linears": rows,
        "tables": [{"name": m.name, "scheme": str(m.scheme), "tied": m.shared_with} for m in plan.tables],
        "kept": [{"name": k.name, "dtype": str(k.dtype), "reason": k.reason} for k in plan.kept],
        "folds": folds,
        "warnings": plan.warnings,
        "calibration": calibration,
        "seconds": seconds,
        "peak_rss_bytes": peak_rss(),
        "machine": {"processor": platform.processor() or platform.machine(), "system": platform.platform()},
        "versions": versions(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def mean_errors(rows: list[dict[str, Any]]) -> tuple[float, float] | None:
    """Mean relative output error of the linears under round-to-nearest and as solved; None without calibration."""
    measured = [r for r in rows if r["error"] is not None]
    if not measured:
        return None
    return (
        sum(r["error_rtn"] for r in measured) / len(measured),
        sum(r["error"] for r in measured) / len(measured),
    )


def kv_default(report: dict[str, Any]) -> str | None:
    """The bits of cached keys and values that a folder asks for, in words; None: 16, the usual."""
    chosen = report.get("kv_cache")
    bits = chosen["bits"] if chosen else report["options"].get("kv_bits", "16")
    if bits == "16":
        return None
    text = f"{bits} bits" if bits.isdigit() else f"{bits} (bits of keys and values)"
    protected = ", ".join(chosen["protected"]) if chosen else ""
    return f"{text}, protected: {protected}" if protected else text


def load_lines(folder: Path | str) -> list[str]:
    """The Python lines that load and run a folder."""
    return [
        "import llmq  # registers the format with transformers; without it the weights would be random",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("{folder}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")',
        'inputs = tokenizer("The sky is", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
    ]


def summary(folder: Path, plan: Plan, report: dict[str, Any]) -> str:
    """What a run ends with."""
    errors = mean_errors(report["linears"])
    lines = [
        f"done in {duration(report['seconds']['total'])}, peak memory {size(report['peak_rss_bytes'])}",
        f"{folder}: {size(plan.bytes_after)} ({plan.bytes_before / plan.bytes_after:.1f} x smaller than 16 bit), "
        f"{plan.bits_per_weight:.3f} bits a weight, {plan.bits_per_weight_all:.3f} over all",
    ]
    if errors:
        lines.append(
            f"mean output error of a linear: {100 * errors[1]:.3f} % (round to nearest: {100 * errors[0]:.3f} %)"
        )
    if default := kv_default(report):
        lines.append(f"keys and values are cached in {default} by default (llmq.set_kv_cache changes it)")
    for tuned in report.get("learned", {}).get("tune", []):
        if "kl_after" in tuned:
            lines.append(
                f"scales tuned: divergence from the original on held-out text {tuned['kl_before']:.4f} -> "
                f"{tuned['kl_after']:.4f} nats a token"
            )
    lines += [f"details in {folder / REPORT_NAME}", "", "load it:", *(f"    {line}" for line in load_lines(folder))]
    return "\n".join(lines)


def model_card(plan: Plan, report: dict[str, Any], folder_name: str) -> str:
    """README.md of the folder."""
    errors = mean_errors(report["linears"])
    calibration = report["calibration"]
    text = [
        "---",
        "library_name: transformers",
        "tags: [llmq, quantized, cpu]",
        "---",
        f"# {folder_name}",
        "",
        f"`{report['model']['spec']}` quantized by llmq {report['versions']['llmq']}: "
        f"{report['method']}, {_schemes(plan.linears)}, {plan.bits_per_weight:.3f} bits a weight over the linears, "
        f"{plan.bits_per_weight_all:.3f} over the whole model ({size(plan.bytes_after)}).",
        "",
        "**`import llmq` before loading.** Without it transformers does not know the format: it warns and returns a",
        "model with random weights.",
        "",
        "```python",
        *load_lines(folder_name),
        "```",
        "",
    ]
    if errors:
        text.append(
            f"Mean relative output error of a linear on the calibration text: {100 * errors[1]:.3f} % "
            f"(round to nearest: {100 * errors[0]:.3f} %)."
        )
    if calibration:
        text.append(f"Calibrated on {calibration['source']} ({calibration['tokens_kept']} tokens).")
    if default := kv_default(report):
        text.append(
            f"The native decoder caches keys and values in {default} unless told otherwise "
            '(`generate(..., kv_cache="16")`).'
        )
    text.append(f"Every layer's figures are in `{REPORT_NAME}`.")
    return "\n".join(text) + "\n"
