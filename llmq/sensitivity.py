"""How much each matrix matters: what its rounding adds to the divergence of a model that is rounded as it will be.

That is ``1/2 D^T F D`` with F the Fisher information of the rounded model and D the change of the matrix's weights: the
part of the divergence that is its own, to second order (as Optimal Brain Damage, LeCun et al. 1990, with all of F
instead of its diagonal). The model is rounded in a pass over a few windows, by GPTQ, towards the target that repairs
earlier layers' errors where the run will do so: what round-to-nearest breaks is not what error feedback leaves, and
layers that make up for earlier ones feel less of what these lose.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmq.blockwise import BlockRunner, block_inputs, verified_tails
from llmq.calibration import CalibrationSet
from llmq.calibration.windows import pieces_of
from llmq.config import QuantScheme, RecipeConfig
from llmq.memory import release_memory
from llmq.models.load import SourceModel, materialize
from llmq.plan import Matrix, table_scheme
from llmq.products import learning_linears
from llmq.qtensor import QTensor, dequantize
from llmq.report import Log
from llmq.solvers import SOLVERS, Problem, SolverOptions, rtn

# The rounding at which the divergence is measured: large enough to see, small enough for second order.
PROBE_BITS = 3
TABLE_PROBE_BITS = 4
# Tokens that GPTQ is given, and windows of the backward passes: of other text where there is any, as what was fitted
# looks better than it is. Each window is one draw of every share, hence many short ones.
SOLVED_TOKENS, PROBES, PROBE_WINDOW = 16384, 48, 256
# Windows of those that GPTQ is given which judge the target's strength instead.
HELD_WINDOWS = 1
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
    texts: CalibrationSet,
    options: SolverOptions,
    log: Log,
) -> dict[str, float]:
    """Each matrix's own part of the divergence, nats a token, of the model rounded to ``probe``.

    Args:
        source: the model.
        linears: of its blocks, rounded by GPTQ.
        tables: embedding and head where they are asked about, rounded to nearest as :func:`table_probe` says.
        probe: scheme of the linears.
        texts: calibration windows.
        options: of the solver; of the recipe's steps only the target is taken.
        log: gets lines of progress.
    """
    n, seqlen = texts.tokens.shape
    solved = texts.tokens[: max(1, SOLVED_TOKENS // seqlen)]
    windows = pieces_of(texts.tokens[len(solved) :] if n > len(solved) else solved, PROBE_WINDOW, bos=texts.bos)
    # Little text is drawn on several times: a draw of each share alone is worth next to nothing.
    windows = windows[:: max(1, len(windows) // PROBES)].repeat(-(-PROBES // len(windows)), 1)[:PROBES]
    log(f"bits by module: {solved.numel()} tokens to round to {probe}, {windows.numel()} through the model and back")
    rounded = _rounded(source, {m.name for m in linears}, probe, solved, options)
    for table in tables:
        rounded[table.name] = _rounded_table(source, table)
    return divergences(source, rounded, windows)


def memory_needed(source: SourceModel, matrices: Sequence[Matrix], weights: int) -> int:
    """Bytes that this takes: the model of ``weights`` in fp32; matrices' codes, change, gradient; a window's logits."""
    vocabulary = int(source.config.get_text_config().vocab_size)
    return 4 * weights + 7 * sum(m.weights for m in matrices) + 7 * 4 * PROBE_WINDOW * vocabulary


@torch.no_grad()
def _rounded(
    source: SourceModel, names: set[str], probe: QuantScheme, tokens: Tensor, options: SolverOptions
) -> dict[str, QTensor]:
    """The linears ``names`` after GPTQ to ``probe``, each on the inputs that the former leave."""
    repairs = "target" in options.recipe.steps and len(tokens) > 1
    recipe = RecipeConfig(only="target") if repairs else RecipeConfig(preset="fast")
    options, found = replace(options, recipe=recipe), {}
    hidden, calls = block_inputs(source, tokens)
    originals, tails, share = list(hidden), None, options.gptq.sink_share
    for i, block_name in enumerate(source.block_names):
        with materialize(source.block(i), block_name, source.reader) as block:
            runner = BlockRunner(block, calls[i], hidden, {}, sink_share=share)
            tails = verified_tails(runner, source.family) if tails is None else tails
            runner.tails = tails
            teacher = BlockRunner(copy.deepcopy(block), calls[i], originals, tails) if repairs else None
            for group in source.groups:
                last = group is source.groups[-1]
                seen = runner.observe(group, teacher, HELD_WINDOWS if repairs else 0, last=last)
                for local in group:
                    name, linear = f"{block_name}.{local}", block.get_submodule(local)
                    assert isinstance(linear, nn.Linear)
                    if name in names:
                        may_clip = local not in source.family.no_clip
                        problem = Problem(name, linear.weight.detach().clone(), seen.train, probe, may_clip, seen.held)
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


def divergences(
    source: SourceModel, rounded: Mapping[str, QTensor], windows: Tensor, *, seed: int = 0
) -> dict[str, float]:
    """``1/2 D^T F D`` of each matrix, nats a token: what its change D alone does to the predictions, to second order.

    F is the Fisher information of the model with all of them rounded. Where tokens y are drawn of its own predictions,
    the scores ``<d log p(y)/dW, D>`` of the positions are independent with mean 0, so the square of a window's sum has
    the sum of their variances as its mean: one backward pass a window serves all matrices.

    Args:
        source: the model; it is loaded whole, in fp32, with gradients of these matrices.
        rounded: matrices by module.
        windows: i64[n, t]; the standard error is ``sqrt(2 / n)`` of a result.
        seed: of what is drawn.

    Raises:
        ValueError: a gradient is not finite; names the module.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32, local_files_only=True).eval()
    model.requires_grad_(False)
    weights: dict[str, nn.Parameter] = {name: model.get_submodule(name).weight for name in rounded}
    changes = {name: _change(weight.data, rounded[name]) for name, weight in weights.items()}
    for name, weight in weights.items():
        _place(weight.data, rounded[name])
        weight.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    shares = dict.fromkeys(rounded, 0.0)
    for window in windows:
        with learning_linears():
            logits = model(input_ids=window[None], use_cache=False).logits[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            functional.cross_entropy(logits, drawn, reduction="sum").backward()  # type: ignore[no-untyped-call]
        for name, weight in weights.items():
            assert weight.grad is not None
            parts = zip(weight.grad.split(CHUNK_ROWS), changes[name].split(CHUNK_ROWS), strict=True)
            score = sum(float(torch.sum(g * d, dtype=torch.float64)) for g, d in parts)
            shares[name] += score**2 / (2 * windows.numel())
            weight.grad = None
            if not math.isfinite(shares[name]):
                raise ValueError(f"{name}: the gradient of its predictions is not finite; the model overflows here")
    del model, weights, changes
    release_memory()
    return shares


def _place(weight: Tensor, rounded: QTensor) -> None:
    """Overwrite ``weight`` f32[N, K]."""
    for at in range(0, len(weight), CHUNK_ROWS):
        weight[at : at + CHUNK_ROWS] = _rows(rounded, slice(at, at + CHUNK_ROWS))


def _change(weight: Tensor, rounded: QTensor) -> Tensor:
    """f16[N, K]: W_rounded - W."""
    change = torch.empty(weight.shape, dtype=torch.float16)
    for at in range(0, len(weight), CHUNK_ROWS):
        rows = slice(at, at + CHUNK_ROWS)
        change[rows] = _rows(rounded, rows) - weight[rows]
    return change


def _rows(matrix: QTensor, rows: slice) -> Tensor:
    """Those rows of a matrix, f32."""
    zero = None if matrix.zero is None else matrix.zero[rows]
    return dequantize(matrix.q[rows], matrix.scale[rows], zero, matrix.scheme)
