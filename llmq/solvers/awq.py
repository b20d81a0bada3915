"""AWQ: activation-aware scaling (Lin et al. 2023, arXiv 2306.00978), as a transform of a block.

The input channels of some linears are multiplied by s and the layer that feeds them is divided by s. Nothing changes in
exact arithmetic, but weights that meet large activations are rounded more finely. What rounds afterwards is a solver of
its own: AWQ + GPTQ is AWQ, then GPTQ.

The scale search minimises the error of the linears' outputs, ``tr(D H D^T)``, over all calibration tokens; "no scaling"
is always a candidate. Every fold is checked: the block's output must not change, or the fold is taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from llmq.config import AWQConfig, QuantScheme
from llmq.models.families import ModelFamily, SmoothPair
from llmq.qtensor import minmax_grid, quantize
from llmq.solvers.hessian import InputStats

# A fold that moves the block's output by more than this, relative to the output's norm, is wrong. fp32 rounding of the
# folded weights moves it by about 2**-24 * sqrt(number of roundings), some 1e-6; a wrong fold by 1e-1 and more.
FOLD_TOLERANCE = 1e-4


@dataclass
class FoldReport:
    """One smooth pair: was it applied, at which exponent, and why not.

    ``loss_before`` and ``loss_after`` are the summed output errors of the pair's linears under round-to-nearest.
    """

    source: str
    linears: list[str]
    applied: bool
    exponent: float
    loss_before: float
    loss_after: float
    reason: str = ""

    def to_dict(self) -> dict[str, object]:
        """As JSON-able values."""
        return asdict(self)


def transform_block(
    block: nn.Module,
    family: ModelFamily,
    stats: Mapping[str, InputStats],
    scheme: QuantScheme,
    cfg: AWQConfig,
    run_block: Callable[[], Tensor],
) -> list[FoldReport]:
    """Fold the best scales into ``block``, in place.

    Args:
        block: a decoder block with its weights in memory.
        family: its row: smooth pairs and the norms' offset.
        stats: input statistics by linear name (``self_attn.q_proj``), gathered on the unscaled block.
        scheme: the grid the solver will use.
        cfg: search options.
        run_block: runs the block on a calibration window and returns its output f32[...], for the fold check.
    """
    return [_transform_pair(block, family, pair, stats, scheme, cfg, run_block) for pair in family.smooth_pairs]


@dataclass(frozen=True)
class _Channels:
    """How a source's channels feed the linears: heads of ``head_dim`` channels, each read by ``repeat`` query heads."""

    n_source: int
    head_dim: int
    repeat: int

    def spread(self, s: Tensor) -> Tensor:
        """[n_source] -> [n_source * repeat]: each head's values once for every query head that reads it."""
        return s.reshape(-1, 1, self.head_dim).expand(-1, self.repeat, -1).reshape(-1)

    def gather(self, x: Tensor) -> Tensor:
        """[n_source * repeat] -> [n_source]: mean over the query heads that share a key/value head."""
        return x.reshape(-1, self.repeat, self.head_dim).mean(1).reshape(-1)


def _channels(block: nn.Module, pair: SmoothPair) -> _Channels | None:
    """The channel map of a pair, or None when source and linears do not line up."""
    n_source = _weight(block.get_submodule(pair.source)).shape[0]
    n_in = _weight(block.get_submodule(pair.linears[0])).shape[1]
    if n_in == n_source:
        return _Channels(n_source, n_source, 1)
    head_dim = getattr(block.get_submodule(pair.source.rpartition(".")[0]), "head_dim", None)
    if not pair.repeat_heads or not isinstance(head_dim, int) or n_in % n_source or n_source % head_dim:
        return None
    return _Channels(n_source, head_dim, n_in // n_source)


def _transform_pair(
    block: nn.Module,
    family: ModelFamily,
    pair: SmoothPair,
    stats: Mapping[str, InputStats],
    scheme: QuantScheme,
    cfg: AWQConfig,
    run_block: Callable[[], Tensor],
) -> FoldReport:
    report = FoldReport(pair.source, list(pair.linears), applied=False, exponent=0.0, loss_before=0.0, loss_after=0.0)
    channels = _channels(block, pair)
    if channels is None:
        report.reason = "channel counts of source and linears do not match"
        return report
    modules = [block.get_submodule(n) for n in (pair.source, *pair.linears)]
    st = stats[pair.linears[0]]
    W = torch.cat([_weight(m) for m in modules[1:]])  # [sum N, K]
    H = st.hessian(pair.linears[0]).float()
    s, report.exponent, report.loss_before, report.loss_after = _search_scale(
        W, H, st.mean_abs(), scheme, cfg.n_grid, channels
    )
    if report.exponent == 0.0:
        report.reason = "no scaling lowered the loss"
        return report
    saved = [p.detach().clone() for m in modules for p in m.parameters()]
    before = run_block()
    _fold(modules[0], modules[1:], s, channels, family.norm_offset if pair.source_is_norm else None)
    moved = float((run_block() - before).norm() / before.norm().clamp(min=1e-30))
    report.applied = moved <= FOLD_TOLERANCE  # a NaN is not <=
    if not report.applied:
        report.reason = f"taken back: the fold moved the block's output by {moved:.2g} (limit {FOLD_TOLERANCE:g})"
        with torch.no_grad():
            for p, old in zip((p for m in modules for p in m.parameters()), saved, strict=True):
                p.copy_(old)
    return report


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().float()


def _search_scale(
    W: Tensor, H: Tensor, mean_abs: Tensor, scheme: QuantScheme, n_grid: int, channels: _Channels
) -> tuple[Tensor, float, float, float]:
    """Best scale: (s f32[n_source], exponent, loss without scaling, loss with s).

    Candidates are ``x^r / w^(1-r)``, x being the mean |activation| and w the mean |weight| of a channel relative to the
    average one (section 3.2 of the paper, with the weights' term of its code), scaled to a geometric centre of 1.
    """
    x = channels.gather(mean_abs)
    w = channels.gather(W.abs().mean(0))
    x, w = x / x.mean().clamp(min=1e-12), w / w.mean().clamp(min=1e-12)

    def loss(s: Tensor) -> float:
        t = channels.spread(s)
        scaled = W * t
        D = quantize(scaled, *minmax_grid(scaled, scheme), scheme).dequantize() / t - W
        return float(torch.sum((D @ H) * D, dtype=torch.float64))

    best, best_r = torch.ones(channels.n_source), 0.0
    base = best_loss = loss(best)
    for i in range(1, n_grid + 1):
        r = i / n_grid
        s = (x.clamp(min=1e-4) ** r / (w ** (1 - r) + 1e-4)).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        this = loss(s)
        if this < best_loss:
            best, best_r, best_loss = s, r, this
    return best, best_r, base, best_loss


@torch.no_grad()
def _fold(
    source: nn.Module, linears: list[nn.Module], s: Tensor, channels: _Channels, norm_offset: float | None
) -> None:
    """Divide the source's channels by s and multiply the linears' input columns by it, in place.

    ``norm_offset`` is None when the source is a linear; a norm multiplies by ``norm_offset + weight``.
    """
    weight = source.weight
    assert isinstance(weight, Tensor)
    if norm_offset is None:
        weight.div_(s[:, None])
    else:
        weight.copy_((norm_offset + weight) / s - norm_offset)
    bias = getattr(source, "bias", None)
    if isinstance(bias, Tensor):
        bias.div_(s)
    for m in linears:
        column_weights = m.weight
        assert isinstance(column_weights, Tensor)
        column_weights.mul_(channels.spread(s))
