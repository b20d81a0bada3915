"""convert: a quantized model in another format, the same integers; what cannot be exact is refused unless asked for.

Every matrix is read, packed for the target, written shard by shard, and read back: the folder is published only when
the numbers are those that were read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq.checkpoint import CARD_NAME, CheckpointWriter
from llmq.config import GROUP_SIZES, QuantScheme, one_of
from llmq.dialects import open_quantized
from llmq.dialects.source import Source, open_source
from llmq.dialects.stored import Stored
from llmq.dialects.targets import CONFIG_FILES, TARGETS, Places, Target
from llmq.formats import FORMATS, Inexact
from llmq.formats.row import full_zeros
from llmq.memory import peak_rss
from llmq.models.families import family_of
from llmq.models.load import embedding_names
from llmq.qtensor import QTensor, minmax_grid, quantize
from llmq.report import Log, load_lines, mean_errors, silent, size, versions

# Tensors of a shard are held together until it is written: small ones keep the peak near that of the largest matrix.
SHARD_BYTES = 1 << 28


@dataclass(frozen=True)
class Move:
    """What happens to one matrix.

    Attributes:
        stored: the matrix in the source.
        scheme: its scheme in the target; None: it becomes floating point there.
        why: why it does not stay as it is; empty: it does, integer by integer.
    """

    stored: Stored
    scheme: QuantScheme | None
    why: str = ""

    @property
    def exact(self) -> bool:
        """Whether the target's numbers are those of the source."""
        return not self.why or self.scheme is None

    def tensors(self, row: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors by local name."""
        if self.scheme is None:
            return {"weight": self.stored.dequantize().to(dtype)}
        return FORMATS[row].pack(self.qtensor())

    def qtensor(self) -> QTensor:
        """The matrix as the target has it."""
        assert self.scheme is not None
        if self.scheme == self.stored.scheme:  # as it is, or (Q4_1) rounded in its offsets only
            return self.stored.read()
        weight = self.stored.dequantize()
        return quantize(weight, *minmax_grid(weight, self.scheme), self.scheme)


@dataclass(frozen=True)
class Conversion:
    """A planned conversion: the source, the target's name and row of FORMATS, and a move for every matrix."""

    source: Source
    target: str
    row: str
    moves: dict[str, Move]
    places: Places

    def table(self) -> str:
        """What is exact and what is not, a line for each kind of matrix."""
        counts: dict[tuple[str, str, str], int] = {}
        for name, move in self.moves.items():
            kind = name.rsplit(".", 1)[-1]
            to = "floating point" if move.scheme is None else f"{FORMATS[self.row].title}, {move.scheme}"
            how = "exact" if not move.why else f"{'exact, larger' if move.scheme is None else 'ROUNDED'}: {move.why}"
            key = (f"{kind} {move.stored.scheme}", to, how)
            counts[key] = counts.get(key, 0) + 1
        lines = [f"  {'matrices':30} {'count':>5}  {'become':42} how"]
        lines += [f"  {kind:30} {count:5d}  {to:42} {how}" for (kind, to, how), count in counts.items()]
        lines += [f"  note: {note}" for note in self.source.notes]
        return "\n".join(lines)


def plan_conversion(source: Source, target: str, *, lossy: bool) -> Conversion:
    """What a conversion would do; nothing is written.

    Raises:
        ValueError: an unknown target.
        Inexact: a matrix that the target cannot hold as it is, unless ``lossy``; names matrices and reasons.
    """
    one_of("format", target, TARGETS)
    row_of = TARGETS[target]
    embed, head = embedding_names(source.model, source.files)
    kept = {n: m.scheme for n, m in source.matrices.items() if n != embed or row_of.embeddings}
    row = row_of.row(kept)
    moves = {name: _move(m, row_of, row, embed, kept) for name, m in source.matrices.items()}
    refused = [f"{name}: {m.why}" for name, m in moves.items() if not m.exact]
    if refused and not lossy:
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise Inexact(
            f"{source.spec} cannot be written as {target} exactly: {'; '.join(refused[:3])}{more}. --lossy rounds them"
            " to the nearest grid that the format has, and says how many"
        )
    schemes = {name: m.scheme for name, m in moves.items() if m.scheme is not None}
    if not schemes:
        raise Inexact(f"no matrix of {source.spec} can be quantized in {target}")
    row = row_of.row(schemes)
    places = Places(schemes, _dense_linears(source.model, schemes), embed, head, _ties(source, schemes))
    return Conversion(source, target, row, moves, places)


def _move(m: Stored, target: Target, row: str, embed: str, kept: dict[str, QuantScheme]) -> Move:
    reason = target.refusal(m.name, (m.n, m.k), m.scheme, row, embed)
    if reason is None and m.order is not None:
        reason = "its columns are in another order (desc_act)"
    if reason is None and target is TARGETS["awq"] and m.scheme.group_size != _usual_group(kept):
        reason = f"awq has one group size for all matrices, here {_usual_group(kept)}"
    if reason is None and row == "gguf" and not m.scheme.sym:
        try:
            FORMATS[row].pack(m.read())
        except Inexact as error:
            return Move(m, m.scheme, str(error))
    if reason is None:
        return Move(m, m.scheme)
    if m.name == embed and not target.embeddings:
        return Move(m, None, reason)
    return Move(m, _fallback(m, target, row, kept), reason)


def _usual_group(kept: dict[str, QuantScheme]) -> int:
    sizes = [s.group_size for s in kept.values()]
    return max(sizes, key=sizes.count)


def _fallback(m: Stored, target: Target, row: str, kept: dict[str, QuantScheme]) -> QuantScheme | None:
    """The scheme nearest to the matrix's own that the target holds: more bits, rather than fewer; None: none."""
    groups = [m.scheme.group_size, *(g for g in GROUP_SIZES if 0 < g <= 128)]
    if target is TARGETS["awq"]:
        groups = [_usual_group(kept)]
    bits = [b for b in dict.fromkeys((m.scheme.bits, *target.bits)) if b >= m.scheme.bits or b in target.bits]
    for b in bits:
        for g in groups:
            for sym in (m.scheme.sym, True) if row != "gguf" else (True,):
                scheme = QuantScheme(b, g, sym)
                if FORMATS[row].refusal(m.n, m.k, scheme) is None:
                    return scheme
    return None


def _dense_linears(model: nn.Module, schemes: dict[str, QuantScheme]) -> tuple[str, ...]:
    return tuple(name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in schemes)


def _ties(source: Source, schemes: dict[str, QuantScheme]) -> dict[str, str]:
    return {name: of for name, of in source.tied.items() if of in schemes}


def convert(
    spec: str | Path,
    output: str | Path,
    target: str,
    *,
    lossy: bool = False,
    overwrite: bool = False,
    vocabulary: str | Path | None = None,
    log: Log | None = None,
) -> Path:
    """Write the quantized model ``spec`` in another format; returns the folder (GGUF: the file).

    Args:
        spec: folder of any dialect, or a ``.gguf`` file.
        output: folder to write; for GGUF a file whose name ends in ``.gguf``.
        target: a key of ``TARGETS``.
        lossy: round matrices that the target cannot hold as they are, and those of the source that are no grid of ours.
        overwrite: replace ``output`` if it is a model folder.
        vocabulary: for GGUF: a file whose tokenizer is copied. Without one, and unless the source is a GGUF file, the
            file has no tokenizer: programs that feed token ids can run it.
        log: gets the table, each line of progress and what it cost; default: none.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: what is wrong with the request or the files.
        Inexact: something cannot be exact, and ``lossy`` is not set; a ValueError.
    """
    log, start = log or silent, time.monotonic()
    one_of("format", target, TARGETS)
    if vocabulary is not None and target != "gguf":
        raise ValueError(f"a vocabulary belongs into a GGUF file; {target} folders carry the source's tokenizer files")
    source = open_source(spec, inexact="requantize" if lossy else "refuse", log=log)
    if vocabulary is not None:
        source.vocabulary = Path(vocabulary)
    plan = plan_conversion(source, target, lossy=lossy)
    log(plan.table())
    if target == "gguf":
        from llmq.dialects.gguf_target import write_gguf

        path = write_gguf(source, plan.moves, Path(output), overwrite=overwrite, rounded=lossy)
        log(f"{path}: gguf, {size(path.stat().st_size)}{_cost(start)}")
        return path
    total = _write_folder(plan, Path(output), overwrite, torch.float16 if lossy else torch.float32, log)
    log(f"{output}: {target}, {size(total)}{_cost(start)}")
    return Path(output)


def _cost(start: float) -> str:
    return f", in {time.monotonic() - start:.1f} s, peak memory {size(peak_rss())}"


def _write_folder(plan: Conversion, output: Path, overwrite: bool, dtype: torch.dtype, log: Log) -> int:
    """Write, read back and publish; returns the bytes of the tensors."""
    source, target = plan.source, plan.target
    shards = list(_shards(plan))
    expected = sum(_nbytes(plan, name) for shard in shards for name in shard)
    with CheckpointWriter(output, len(shards), overwrite=overwrite, expected_bytes=expected) as writer:
        for shard in shards:
            tensors: dict[str, Tensor] = {}
            for name in shard:
                tensors.update(_tensors(plan, name, dtype))
            writer.write_shard(tensors)
        block = TARGETS[target].block(plan.places, plan.row)
        config = {**source.config, **block, "dtype": _dtype(source, target)}
        config.pop("torch_dtype", None)
        report = {**source.report, "converted": {"from": source.origin, "to": target, "notes": source.notes}}
        writer.finish(source.files, config, report, card(plan, output.name))
        _settle_files(writer.partial, plan, block)
        log("reading the folder back")
        _check(writer.partial, plan)
        writer.publish()
    return writer.total_bytes


def _shards(plan: Conversion) -> Iterator[list[str]]:
    """Names of matrices and other tensors, about SHARD_BYTES together."""
    shard: list[str] = []
    total = 0
    for name in [*plan.moves, *plan.source.others]:
        nbytes = _nbytes(plan, name)
        if shard and total + nbytes > SHARD_BYTES:
            yield shard
            shard, total = [], 0
        shard.append(name)
        total += nbytes
    yield shard


def _nbytes(plan: Conversion, name: str) -> int:
    move = plan.moves.get(name)
    if move is None:
        return plan.source.others[name].nbytes
    m = move.stored
    bits = 32.0 if move.scheme is None else move.scheme.bits + 32 / max(1, move.scheme.group_width(m.k))
    return int(m.n * m.k * bits / 8)


def _tensors(plan: Conversion, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    move = plan.moves.get(name)
    if move is None:
        return {name: plan.source.others[name].read()}
    return {f"{name}.{key}": value for key, value in move.tensors(plan.row, dtype).items()}


def _dtype(source: Source, target: str) -> str:
    """llmq computes in float32; others in 16 bits, Gemma in bfloat16 because its activations overflow float16."""
    if target == "llmq":
        return "float32"
    family = family_of(str(source.config.get("model_type")))
    return "bfloat16" if family is not None and family.norm_offset else "float16"


def _settle_files(folder: Path, plan: Conversion, block: dict[str, Any]) -> None:
    """The copy of the config block that loaders look for, and no such copy of the source's; one model card of ours."""
    import json

    for name in CONFIG_FILES:
        (folder / name).unlink(missing_ok=True)
    copy = TARGETS[plan.target].file
    if copy is not None:
        (folder / copy).write_text(json.dumps(block["quantization_config"], indent=2) + "\n", encoding="utf-8")
    other = folder / "README-llmq.md"
    if plan.source.own_card and other.is_file():
        other.replace(folder / CARD_NAME)


def _check(folder: Path, plan: Conversion) -> None:
    """Read every matrix back. Raises ValueError naming the first that differs from what was meant."""
    found = open_quantized(folder)
    wanted = {name: move for name, move in plan.moves.items() if move.scheme is not None}
    if found.matrices.keys() != wanted.keys():
        odd = sorted(found.matrices.keys() ^ wanted.keys())[:3]
        raise ValueError(
            f"the written folder has other matrices than were meant: {', '.join(odd)}; it is not published"
        )
    for name, move in wanted.items():
        if not same_numbers(found.matrices[name].read(), move.qtensor()):
            raise ValueError(f"{name}: what was read back differs from what was written; the folder is not published")


def same_numbers(a: QTensor, b: QTensor) -> bool:
    """Whether two matrices have the same codes, scales and zero points, whatever their schemes are called."""
    if a.shape != b.shape or a.scale.shape != b.scale.shape:
        return False
    return torch.equal(a.q, b.q) and torch.equal(a.scale, b.scale) and torch.equal(full_zeros(a), full_zeros(b))


def card(plan: Conversion, name: str) -> str:
    """README.md of a converted folder, with the loss that was measured when the model was quantized."""
    rounded = sum(not m.exact for m in plan.moves.values())
    errors = mean_errors(plan.source.report.get("linears", []))
    how = "integer by integer" if not rounded else f"{rounded} of {len(plan.moves)} matrices rounded again"
    text = [
        *("---", "library_name: transformers", f"tags: [{plan.target}, quantized]", "---", f"# {name}", ""),
        f"`{plan.source.spec}` ({plan.source.origin}) written as {FORMATS[plan.row].title} by llmq "
        f"{versions()['llmq']}, {how}; most matrices are {plan.places.usual}.",
        "",
    ]
    if errors:
        text += [
            f"Mean relative output error of a linear on the calibration text: {100 * errors[1]:.3f} % "
            f"(round to nearest: {100 * errors[0]:.3f} %).",
            "",
        ]
    lines = load_lines(name)
    if plan.target != "llmq":
        lines = ["import llmq", "from transformers import AutoTokenizer", *lines[2:]]
        lines = [line.replace("= AutoModel", "= llmq.AutoModel") for line in lines]
    text += ["On a CPU, through llmq's kernels:", "", "```python", *lines, "```"]
    return "\n".join(text) + "\n"
