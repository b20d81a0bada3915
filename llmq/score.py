"""Score: from the cost of each token to perplexity, KL, agreement and their standard errors. Arithmetic only."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

MIN_WINDOWS_FOR_SE = 8  # with fewer, their spread says little; the spread over tokens is used instead


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    mean: float
    se: float


def estimate(values: Tensor) -> Estimate:
    """Mean of ``values`` f64[W, T] and its standard error.

    Tokens of one window depend on each other, so the error comes from the spread of the window means. With fewer than
    ``MIN_WINDOWS_FOR_SE`` windows it comes from the spread of the tokens, which is too small by their dependence.
    """
    sample = values.mean(dim=1) if values.shape[0] >= MIN_WINDOWS_FOR_SE else values.flatten()
    return Estimate(float(values.mean()), float(sample.std(correction=1)) / math.sqrt(sample.numel()))


@dataclass(frozen=True)
class CacheMemory:
    """Bytes of a cache, measured at its storages, and what ``tokens`` tokens take at 16 bits a number.

    Of the native cache both are pages that were made, whole ones.
    """

    tokens: int
    nbytes: int
    nbytes_16bit: int

    def __str__(self) -> str:
        share, full = self.nbytes / self.nbytes_16bit, self.nbytes_16bit / 1e6
        return f"{self.nbytes / 1e6:.2f} MB after {self.tokens} tokens, {share:.3f} of {full:.2f} MB at 16 bits"


@dataclass(frozen=True, eq=False)
class Score:
    """What each token cost, T = seqlen - 1 scored tokens in each of W windows, and the figures made of it.

    Attributes:
        nll: f64[W, T] negative log-likelihood, nats.
        reference_nll: f64[W, T] of the reference model; None (as the next two) without one.
        token_kl: f64[W, T] KL(reference || model) of the next-token distributions, nats.
        token_agree: f64[W, T] 1 where both models find the same token most likely, else 0.
        nbytes: UTF-8 bytes of the scored text, None if not known.
        protocol: how the windows were made, in words.
        kv_cache: memory of the quantized cache after the last window; None where none was used.
        notes: what else a reader of the figures should know.
    """

    nll: Tensor
    reference_nll: Tensor | None = None
    token_kl: Tensor | None = None
    token_agree: Tensor | None = None
    nbytes: int | None = None
    protocol: str = ""
    kv_cache: CacheMemory | None = None
    notes: tuple[str, ...] = ()

    @property
    def tokens_scored(self) -> int:
        """Number of tokens whose likelihood was taken."""
        return self.nll.numel()

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return math.exp(float(self.nll.mean()))

    @property
    def perplexity_se(self) -> float:
        """Standard error of the perplexity, ``perplexity * se(mean nll)`` (delta method)."""
        return self.perplexity * estimate(self.nll).se

    @property
    def bits_per_byte(self) -> float | None:
        """Bits the model needs for a byte of the scored text; comparable between tokenizers."""
        return float(self.nll.sum()) / math.log(2) / self.nbytes if self.nbytes else None

    @property
    def reference_perplexity(self) -> float | None:
        """Perplexity of the reference model on the same tokens."""
        return None if self.reference_nll is None else math.exp(float(self.reference_nll.mean()))

    @property
    def delta_nll(self) -> Estimate | None:
        """Paired difference of the mean negative log-likelihood (of log-perplexity), model minus reference."""
        return None if self.reference_nll is None else estimate(self.nll - self.reference_nll)

    @property
    def kl(self) -> Estimate | None:
        """Mean KL(reference || model), nats a token."""
        return None if self.token_kl is None else estimate(self.token_kl)

    @property
    def top1(self) -> Estimate | None:
        """Share of the positions where both models find the same token most likely."""
        return None if self.token_agree is None else estimate(self.token_agree)

    @property
    def se_over(self) -> str:
        """What the standard errors are taken over: ``windows`` or ``tokens``."""
        return "windows" if self.nll.shape[0] >= MIN_WINDOWS_FOR_SE else "tokens"

    def table(self) -> str:
        """The figures, one line each, for a person."""
        rows = {
            "protocol": self.protocol or "windows as given",
            "tokens scored": f"{self.tokens_scored:,}",
            "perplexity": f"{self.perplexity:.3f} +- {self.perplexity_se:.3f} (standard error, over {self.se_over})",
        }
        if self.bits_per_byte is not None:
            rows["bits per byte"] = f"{self.bits_per_byte:.4f}"
        if self.reference_perplexity is not None:
            rows["reference perplexity"] = f"{self.reference_perplexity:.3f}"
        if self.delta_nll is not None:
            change, error = 100 * math.expm1(self.delta_nll.mean), 100 * self.delta_nll.se
            rows["perplexity change"] = f"{change:+.2f} % +- {error:.2f} % (paired)"
        if self.kl is not None:
            rows["KL(reference||model)"] = f"{self.kl.mean:.5f} +- {self.kl.se:.5f} nats a token"
        if self.top1 is not None:
            rows["top-1 agreement"] = f"{100 * self.top1.mean:.2f} % +- {100 * self.top1.se:.2f} %"
        if self.kv_cache is not None:
            rows["KV cache, measured"] = str(self.kv_cache)
        return "\n".join([f"{name:<21} {value}" for name, value in rows.items()] + [f"note: {n}" for n in self.notes])

    def to_json(self) -> dict[str, Any]:
        """Every figure, and the means of every window, as plain JSON types; None where there is no reference."""
        out: dict[str, Any] = {
            "protocol": self.protocol,
            "windows": self.nll.shape[0],
            "tokens_scored": self.tokens_scored,
            "perplexity": self.perplexity,
            "perplexity_se": self.perplexity_se,
            "se_over": self.se_over,
            "bits_per_byte": self.bits_per_byte,
            "bytes_scored": self.nbytes,
            "reference_perplexity": self.reference_perplexity,
            "notes": list(self.notes),
            "kv_cache": self.kv_cache and dataclasses.asdict(self.kv_cache),
        }
        for name in ("delta_nll", "kl", "top1"):
            value: Estimate | None = getattr(self, name)
            out |= {name: value and value.mean, f"{name}_se": value and value.se}
        columns = {"nll": self.nll, "reference_nll": self.reference_nll, "kl": self.token_kl, "top1": self.token_agree}
        return out | {f"{k}_per_window": None if v is None else v.mean(dim=1).tolist() for k, v in columns.items()}
