"""How much each matrix matters: its share of the divergence of a model that is rounded as it will be.

With all linears rounded, ``<dKL/dW, W_rounded - W>`` is a matrix's share of KL(original || rounded), to first order
(mlx-lm's dynamic quantization asks the same of round-to-nearest). They are rounded by GPTQ, in a pass over a few
windows: what round-to-nearest breaks is not what is left after error feedback, and its shares say little about that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmq.blockwise import BlockRunner, block_inputs, verified_tails
from llmq.config import GPTQConfig, QuantScheme, RecipeConfig
from llmq.models.load import SourceModel, materialize
from llmq.plan import Matrix, table_scheme
from llmq.qtensor import QTensor, dequantize
from llmq.report import Log, release_memory
from llmq.solvers import SOLVERS, Problem, SolverOptions, rtn

# The rounding at which the divergence is measured: large enough to see, small enough for first order.
PROBE_BITS = 3
TABLE_PROBE_BITS = 4
# Tokens that GPTQ is given, and those of the backward pass: other ones where the text has them, as what was fitted
# looks better than it is. A window's logits are held in full, a few times over.
SOLVED_TOKENS, PROBE_TOKENS, PROBE_WINDOW = 16384, 4096, 256
# Most likely tokens whose probabilities are compared one by one; the rest of the vocabulary is one more outcome.
TOP = 256
# Rows of a matrix that are in memory in fp32 at once.
CHUNK_ROWS = 8192


def table_probe(table: Matrix) -> QuantScheme:
    """The rounding at which an embedding or head is measured."""
    return table_scheme(table.scheme, TABLE_PROBE_BITS)


def measured(
    source: SourceModel,
    linears: Sequence[Matrix],
    tables: Sequence[Matrix],
    probe: QuantScheme,
    tokens: Tensor,
    gptq: GPTQConfig,
    log: Log,
) -> dict[str, float]:
    """Share of every matrix in the divergence, nats a token, of the model rounded to ``probe``.

    Args:
        source: the model.
        linears: of its blocks, rounded by GPTQ.
        tables: embedding and head where they are asked about, rounded to nearest as :func:`table_probe` says.
        probe: scheme of the linears.
        tokens: i64[n, seqlen] windows.
        gptq: the solver's options.
        log: gets lines of progress.
    """
    n, seqlen = tokens.shape
    solved = tokens[: max(1, SOLVED_TOKENS // seqlen)]
    width = min(PROBE_WINDOW, seqlen)
    rest = tokens[len(solved) :] if n > len(solved) else tokens
    windows = rest[:, : seqlen // width * width].reshape(-1, width)
    windows = windows[:: max(1, len(windows) * width // PROBE_TOKENS)][: max(1, PROBE_TOKENS // width)]
    log(f"bits by module: {solved.numel()} tokens to round to {probe}, {windows.numel()} through the model and back")
    rounded = _rounded(source, {m.name for m in linears}, probe, solved, gptq)
    for table in tables:
        rounded[table.name] = _rounded_table(source, table)
    return divergences(source, rounded, windows)


@torch.no_grad()
def _rounded(
    source: SourceModel, names: set[str], probe: QuantScheme, tokens: Tensor, gptq: GPTQConfig
) -> dict[str, QTensor]:
    """The linears ``names`` after plain GPTQ to ``probe``, each on the inputs that the former leave."""
    options, found = SolverOptions(gptq=gptq, recipe=RecipeConfig(preset="fast")), {}
    hidden, calls = block_inputs(source, tokens)
    tails = None
    for i, block_name in enumerate(source.block_names):
        with materialize(source.block(i), block_name, source.reader) as block:
            runner = BlockRunner(block, calls[i], hidden, {}, sink_share=gptq.sink_share)
            tails = verified_tails(runner, source.family) if tails is None else tails
            runner.tails = tails
            for group in source.groups:
                stats = runner.observe(group).train
                for local in group:
                    name, linear = f"{block_name}.{local}", block.get_submodule(local)
                    assert isinstance(linear, nn.Linear)
                    if name in names:
                        may_clip = local not in source.family.no_clip
                        problem = Problem(name, linear.weight.detach().clone(), stats, probe, may_clip)
                        found[name] = SOLVERS["gptq"](problem, options).qtensor
                        linear.weight.copy_(found[name].dequantize())
                runner.settle(group)
            runner.advance()
    return found


def _rounded_table(source: SourceModel, table: Matrix) -> QTensor:
    scheme = table_probe(table)
    chunks = source.reader.row_chunks(f"{table.name}.weight", CHUNK_ROWS)
    parts = [rtn.solve(rows.float(), scheme) for _, rows in chunks]
    zero = None if scheme.sym else torch.cat([p.zero for p in parts if p.zero is not None])
    return QTensor(torch.cat([p.q for p in parts]), torch.cat([p.scale for p in parts]), zero, scheme)


def divergences(source: SourceModel, rounded: Mapping[str, QTensor], windows: Tensor) -> dict[str, float]:
    """``<dKL/dW, W_rounded - W>`` of each matrix, nats a token, at the model with all of them rounded.

    Args:
        source: the model; it is loaded whole, in fp32, with gradients of these matrices.
        rounded: matrices by module.
        windows: i64[n, t].

    Raises:
        ValueError: a gradient is not finite; names the module.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32, local_files_only=True).eval()
    model.requires_grad_(False)
    with torch.no_grad():
        teacher = [_most_likely(_log_probabilities(model, w)) for w in windows]
    weights: dict[str, nn.Parameter] = {name: model.get_submodule(name).weight for name in rounded}
    changes = {}
    for name, weight in weights.items():
        changes[name] = torch.empty(weight.shape, dtype=torch.float16)
        parts = zip(weight.data.split(CHUNK_ROWS), changes[name].split(CHUNK_ROWS), strict=True)
        for at, (rows, change) in enumerate(parts):
            new = _rows(rounded[name], slice(at * CHUNK_ROWS, (at + 1) * CHUNK_ROWS))
            change.copy_(new - rows)
            rows.copy_(new)
        weight.requires_grad_(True)
    for window, (log_p, ids) in zip(windows, teacher, strict=True):
        kl = divergence(log_p, _log_probabilities(model, window).gather(1, ids))
        kl.div(len(windows)).backward()  # type: ignore[no-untyped-call]
    shares = {}
    for name, weight in weights.items():
        assert weight.grad is not None
        shares[name] = float(torch.sum(weight.grad * changes[name].float(), dtype=torch.float64))
        if not math.isfinite(shares[name]):
            raise ValueError(f"{name}: the divergence's gradient is not finite; the model overflows on this text")
    del model, weights, changes
    release_memory()
    return shares


def _rows(matrix: QTensor, rows: slice) -> Tensor:
    """Those rows of a matrix, f32."""
    zero = None if matrix.zero is None else matrix.zero[rows]
    return dequantize(matrix.q[rows], matrix.scale[rows], zero, matrix.scheme)


def _log_probabilities(model: Any, window: Tensor) -> Tensor:
    """f32[t, vocabulary] for a window i64[t]."""
    return torch.log_softmax(model(input_ids=window[None], use_cache=False).logits[0].float(), -1)


def _most_likely(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """(log probabilities f32[t, TOP], ids i64[t, TOP])."""
    values, ids = log_p.topk(min(TOP, log_p.shape[1] - 1), dim=1)
    return values, ids


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Mean KL(p || q), nats a token, over the outcomes given and "any other token"; never above the whole KL.

    Args:
        log_p, log_q: f32[t, k], log probabilities of the same k tokens.
    """
    rest_p, rest_q = ((1 - x.exp().sum(1)).clamp(min=1e-7) for x in (log_p, log_q))
    return ((log_p.exp() * (log_p - log_q)).sum(1) + rest_p * (rest_p.log() - rest_q.log())).mean()
