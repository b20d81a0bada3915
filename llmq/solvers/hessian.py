"""Statistics of a linear's inputs, and the Hessian of its squared output error, made fit to factor.

For a linear with weights W [N, K] and inputs X [T, K] (one token a row) the squared output error of a change D of the
weights is ``tr(D H D^T)`` with ``H = X^T X / T`` [K, K]. Normalising by tokens makes layers and runs comparable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmq.products import matmul

# A channel whose mean square is below this share of the average one has not been seen by the calibration text.
DEAD_SHARE = 1e-10
# Columns of a tile of H. Half of the products of a large layer are saved, and the tiles stay large enough to be fast.
TILE = 512
# Damping tries: percdamp, then ten times more, up to this share of the mean diagonal; then eigenvalues are clipped.
MAX_DAMP = 10.0


class InputStats:
    """Accumulates H and mean |x| of the inputs of one linear (or of several that share their input).

    Tokens are summed in fp32 blocks which are folded into fp64. Rows with a NaN or an infinity are left out, counted.

    Args:
        in_features: K.
        paired: also take what the original model feeds the linear, see :meth:`add`.
        sink_share: the first token of a window counts as this share of the window's tokens; 0: as any other. All later
            tokens attend to it, most of them heavily (an "attention sink", arXiv 2309.17453), so an error there is one
            everywhere: the squared gradient of the loss at its keys and values is that of hundreds of other tokens.

    Attributes:
        H: f64[K, K], the sum of x x^T, first tokens as often as they count (see :meth:`hessian` for the mean).
        cross: f64[K, K], so weighed, the sum of (x_original - x) x^T; None unless ``paired``.
        abs_sum, abs_max: f64[K], the sum and the largest of |x|.
        n_tokens: tokens taken.
        n_dropped: tokens left out because they were not finite.
        memo: what solvers derive from H once for all linears that share it (a factor, say), by their own keys.
    """

    def __init__(self, in_features: int, *, paired: bool = False, sink_share: float = 0.0) -> None:
        self.sink_share = sink_share
        self.H = torch.zeros(in_features, in_features, dtype=torch.float64)
        self.cross = torch.zeros_like(self.H) if paired else None
        self.abs_sum = torch.zeros(in_features, dtype=torch.float64)
        self.abs_max = torch.zeros_like(self.abs_sum)
        self.n_tokens = 0
        self.n_dropped = 0
        self.memo: dict[Any, Any] = {}

    def add(self, x: Tensor, original: Tensor | None = None, *, counts: Tensor | None = None) -> None:
        """Take inputs x f32[..., T, K] of windows of T tokens.

        Args:
            x: the inputs.
            original: what the unquantized model feeds the same linear for the same tokens; needed when ``paired``.
            counts: f32[..., T], how often each token counts; None: as ``sink_share`` says.
        """
        assert (original is None) == (self.cross is None), "paired statistics need both inputs"
        roots = (self._counts(x) if counts is None else counts.reshape(-1)).sqrt()[:, None]
        x = x.detach().reshape(-1, x.shape[-1]).float()
        rest = None if original is None else original.detach().reshape(x.shape).float() - x
        magnitudes = x.abs()
        sums = magnitudes.sum(0)
        # The sums find a bad block; the search of its rows runs only then.
        if not (torch.isfinite(sums).all() and (rest is None or torch.isfinite(rest.sum()))):
            good = torch.isfinite(x if rest is None else x + rest).all(dim=1)
            self.n_dropped += int((~good).sum())
            x, rest, roots = x[good], rest if rest is None else rest[good], roots[good]
            magnitudes = x.abs()
            sums = magnitudes.sum(0)
        for at in range(0, x.shape[0], 4096):
            some = slice(at, at + 4096)
            block = x[some] * roots[some]
            self._add_products(block)
            if self.cross is not None and rest is not None:
                self.cross += matmul((rest[some] * roots[some]).T, block).double()
        self.n_tokens += x.shape[0]
        if x.shape[0]:
            self.abs_sum += sums.double()
            torch.maximum(self.abs_max, magnitudes.amax(0).double(), out=self.abs_max)

    def _counts(self, x: Tensor) -> Tensor:
        """f32[tokens]: how often each token of x f32[..., T, K] counts."""
        counts = torch.ones(x.shape[:-1])
        counts[..., 0] = max(1.0, self.sink_share * x.shape[-2])
        return counts.reshape(-1)

    def include(self, other: InputStats) -> None:
        """Count the tokens of ``other`` too; neither is paired."""
        assert self.cross is None, "paired statistics belong to one run"
        assert other.cross is None, "paired statistics belong to one run"
        self.H += other.H
        self.abs_sum += other.abs_sum
        torch.maximum(self.abs_max, other.abs_max, out=self.abs_max)
        self.n_tokens += other.n_tokens
        self.n_dropped += other.n_dropped

    def _add_products(self, x: Tensor) -> None:
        """H += x^T x for finite x f32[t, K]. Tiles on and above the diagonal are multiplied; the rest is mirrored."""
        k = x.shape[1]
        tiles = [slice(a, min(a + TILE, k)) for a in range(0, k, TILE)]
        xt = x.T.contiguous()  # whole rows of it are multiplied: no tile is copied
        for i, rows in enumerate(tiles):
            strip = matmul(xt[rows], xt[rows.start :].T)
            self.H[rows, rows.start :] += strip.double()
            for columns in tiles[i + 1 :]:
                self.H[columns, rows] = self.H[rows, columns].T

    def hessian(self, name: str) -> Tensor:
        """Mean of x x^T, f64[K, K].

        Raises:
            ValueError: no finite token has been seen, or H overflowed; names the module.
        """
        if self.n_tokens == 0:
            raise ValueError(
                f"{name}: none of its {self.n_dropped} calibration tokens is finite; "
                "the model overflows on this text: check the weights or calibrate in another dtype"
            )
        H = self.H / self.n_tokens
        if not torch.isfinite(H).all():
            raise ValueError(f"{name}: the Hessian of its inputs is not finite over {self.n_tokens} tokens")
        return H

    def mean_cross(self) -> Tensor:
        """Mean of (x_original - x) x^T, f64[K, K]; only for paired statistics."""
        assert self.cross is not None
        return self.cross / max(1, self.n_tokens)

    def mean_abs(self) -> Tensor:
        """Mean |x| a channel, f32[K]."""
        return (self.abs_sum / max(1, self.n_tokens)).float()


@dataclass
class Factor:
    """Upper Cholesky factor of the inverse Hessian, and what had to be done to get it.

    Attributes:
        U: f32[K, K], ``H^-1 = U^T U`` for the damped H.
        percdamp: damping used, as a share of the mean diagonal (0 when eigenvalues were clipped instead).
        tries: damping values tried.
        clipped: True when every damping failed and negative eigenvalues were raised.
    """

    U: Tensor
    percdamp: float
    tries: int
    clipped: bool


def shrink_to_diagonal(H: Tensor, n_tokens: int) -> tuple[Tensor, float]:
    """Pull H towards its diagonal when it was estimated from fewer tokens than it has rows.

    In the spirit of Ledoit and Wolf (2004): correlations estimated from few samples are mostly noise. Returns the new H
    and the share ``K / (K + T)`` that its off-diagonal part lost (0.0 when T >= K).
    """
    k = H.shape[0]
    if n_tokens >= k:
        return H, 0.0
    rho = k / (k + n_tokens)
    return H * (1 - rho) + torch.diag(H.diagonal() * rho), rho


def dead_columns(H: Tensor) -> Tensor:
    """bool[K]: channels that the calibration text never drove."""
    d = H.diagonal()
    return d <= DEAD_SHARE * d.mean()


def inverse_factor(H: Tensor, percdamp: float) -> Factor:
    """Factor H^-1 = U^T U in fp64, raising the damping until H is positive definite.

    H is scaled to unit diagonal before it is factored (the factor is scaled back), which is what keeps layers with
    outlier channels factorable. Damping is ``percdamp * mean(diag H)``, tried with ten times more up to ``MAX_DAMP``.
    When all fail (H is not even nearly positive semi-definite) its eigenvalues are clipped from below.

    Args:
        H: f64[K, K], symmetric, positive diagonal.
        percdamp: first damping tried.
    """
    mean = H.diagonal().mean()
    tries, damp = 0, percdamp
    while damp <= MAX_DAMP:
        tries += 1
        U = upper_factor(H, float(damp * mean))
        if U is not None:
            return Factor(U, damp, tries, clipped=False)
        damp *= 10
    values, vectors = torch.linalg.eigh(H)
    values = values.clamp(min=float(percdamp * values.abs().max()))
    U = upper_factor((vectors * values) @ vectors.T, 0.0)
    assert U is not None, "a matrix with clipped eigenvalues is positive definite"
    return Factor(U, 0.0, tries, clipped=True)


def upper_factor(H: Tensor, damp: float) -> Tensor | None:
    """f32 upper factor of (H + damp I)^-1, or None when that is not positive definite in fp64.

    With J the reversal of rows and columns and J A J = L L^T, A^-1 = U^T U for U = J L^-1 J: one Cholesky factor and
    one triangular inverse instead of an inverse and a second factor, a tenth of the time.
    """
    A = H.flip(0, 1)
    A.diagonal().add_(damp)
    d = A.diagonal().rsqrt()
    A *= d[:, None] * d[None, :]
    L, info = torch.linalg.cholesky_ex(A)
    if int(info) != 0 or not torch.isfinite(L).all():
        return None
    inverse = torch.linalg.solve_triangular(L, torch.eye(len(L), dtype=L.dtype), upper=False)
    U = (inverse * d[None, :]).flip(0, 1).float()  # (D A D)^-1 = D^-1 A^-1 D^-1, so the factor of A^-1 is U D
    return U if torch.isfinite(U).all() else None


def relative_error(W: Tensor, W_hat: Tensor, H: Tensor) -> float:
    """tr(D H D^T) / tr(W H W^T) with D = W_hat - W: the share of the output's energy that is lost.

    Args:
        W, W_hat: f32[N, K].
        H: f64 or f32 [K, K].
    """
    H = H.float()
    D = W_hat - W
    power = torch.sum((W @ H) * W, dtype=torch.float64)
    return float(torch.sum((D @ H) * D, dtype=torch.float64) / power) if power > 0 else 0.0
