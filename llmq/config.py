"""Options of llmq: frozen dataclasses, each option once.

The command line is built from these fields (their ``help`` metadata is the help text), so an option's name, default,
rule and description live here and nowhere else. Rules are checked in ``__post_init__`` and name both the value and the
way out.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 32, 64, 128, 256, 512, 1024)
HEAD_BITS = (16, 8, 4)
KV_BITS = (16, 8, 4, 2)
KEY_SCALES = ("channel", "token")


def cache_folder() -> Path:
    """Where expanded models, streamed data sets and packed weights are kept: ``$LLMQ_CACHE``, or ``~/.cache/llmq``."""
    return Path(os.environ.get("LLMQ_CACHE") or "~/.cache/llmq").expanduser()


def option(default: Any, help_text: str, **metadata: Any) -> Any:
    """A dataclass field with its help text (and, where useful, ``choices``) for the command line."""
    return field(default=default, metadata={"help": help_text, **metadata})


def one_of(name: str, value: object, known: object) -> None:
    """Raise ``ValueError`` listing what is known when ``value`` is not in ``known`` (any iterable of names)."""
    names = list(known)  # type: ignore[call-overload]
    if value not in names:
        raise ValueError(f"{name} is {value!r}; known: {', '.join(map(str, names))}")


@dataclass(frozen=True)
class QuantScheme:
    """Uniform per-group grid of one weight matrix W [out_features, in_features].

    ``w = scale * (code - zero)`` with ``code`` in ``0 .. 2**bits - 1``; ``zero`` is ``2**(bits-1)`` when ``sym``.
    Groups run along in_features. A group size that does not divide in_features leaves a shorter last group.
    """

    bits: int = option(4, "bits of a weight", choices=BITS)
    group_size: int = option(128, "input columns that share a scale; -1: the whole row", choices=GROUP_SIZES)
    sym: bool = option(False, "symmetric grid (full range, no zero point); otherwise asymmetric")

    def __post_init__(self) -> None:
        one_of("bits", self.bits, BITS)
        one_of("group_size", self.group_size, GROUP_SIZES)

    @property
    def levels(self) -> int:
        """Number of codes, 2**bits."""
        return 1 << self.bits

    @property
    def mid(self) -> int:
        """The zero point of a symmetric grid."""
        return 1 << (self.bits - 1)

    def group_width(self, in_features: int) -> int:
        """Columns of a full group in a matrix of ``in_features`` columns."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def n_groups(self, in_features: int) -> int:
        """Number of groups a row of ``in_features`` columns is cut into, ``ceil(in_features / group_size)``."""
        return -(-in_features // self.group_width(in_features))

    def slices(self, in_features: int) -> list[slice]:
        """Column range of every group; the last one may be shorter."""
        g = self.group_width(in_features)
        return [slice(a, min(a + g, in_features)) for a in range(0, in_features, g)]

    def __str__(self) -> str:
        """``w4g128`` (asymmetric) or ``w4g128sym``; ``g-1`` is written ``grow``."""
        width = "row" if self.group_size == -1 else str(self.group_size)
        return f"w{self.bits}g{width}{'sym' if self.sym else ''}"

    @classmethod
    def parse(cls, text: str) -> QuantScheme:
        """The scheme that prints as ``text``. Raises ValueError naming the text and the form expected."""
        m = re.fullmatch(r"w(\d+)g(\d+|row)(sym)?", text)
        if not m:
            raise ValueError(f"scheme {text!r} is not of the form w<bits>g<group size|row>[sym], as in w4g128sym")
        return cls(int(m[1]), -1 if m[2] == "row" else int(m[2]), m[3] is not None)


@dataclass(frozen=True)
class GPTQConfig:
    """GPTQ (Frantar et al. 2022, arXiv 2210.17323) with static groups."""

    percdamp: float = option(
        0.01, "damping of the Hessian's diagonal, as a share of its mean (first try; escalated x10)"
    )
    act_order: bool = option(
        True, "columns in the order of decreasing diag(H); groups stay where they are (static groups)"
    )
    true_sequential: bool = option(True, "solve q/k/v, o, gate/up, down in turn, each on the inputs the former leave")
    grid_steps: int = option(20, "shrink factors tried in the Hessian-weighted scale search; 0: plain min-max")
    sink_share: float = option(
        0.0625, "what a window's first token counts in the Hessian, as a share of the window's tokens; 0: as any other"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.sink_share <= 1:
            raise ValueError(
                f"sink_share is {self.sink_share:g}; it is a share of a window's tokens: 0 to 1 (usual: 0.0625)"
            )
        if not 0 < self.percdamp < 1:
            raise ValueError(
                f"percdamp is {self.percdamp}; it is a share of the mean diagonal: 0 < percdamp < 1 (usual: 0.01)"
            )
        if not 0 <= self.grid_steps <= 1000:
            raise ValueError(f"grid_steps is {self.grid_steps}; use 0 (min-max) to 1000 (usual: 20)")


STEPS = ("importance", "target", "refit", "descent", "restarts", "damping", "rounding", "tune")
# Learned by gradients, within max_time.
LEARNED_STEPS = ("rounding", "tune")
PRESETS: dict[str, tuple[str, ...]] = {
    "fast": (),
    "balanced": ("target", "refit", "descent"),
    "best": ("target", "refit", "descent", "tune"),
}


@dataclass(frozen=True)
class RecipeConfig:
    """What is done around GPTQ, see ``llmq.solvers.recipe`` and ``llmq.learn``; ``only`` names the steps singly."""

    preset: str = option("balanced", "what is done around GPTQ; fast: nothing", choices=tuple(PRESETS))
    only: str = option("", f"just these steps instead of the preset's, comma-separated: {', '.join(STEPS)}")
    max_time: float = option(
        30.0,
        f"minutes for what is learned ({', '.join(LEARNED_STEPS)}); a run that they end is not reproducible bit by bit",
    )

    def __post_init__(self) -> None:
        one_of("preset", self.preset, PRESETS)
        if not 0 < self.max_time < float("inf"):
            raise ValueError(f"max_time is {self.max_time:g}; it is a number of minutes above 0 (usual: 30)")
        for step in self.steps:
            one_of("a step", step, STEPS)

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the steps that are tried."""
        return tuple(s for s in self.only.split(",") if s) if self.only else PRESETS[self.preset]


@dataclass(frozen=True)
class BudgetConfig:
    """Schemes by module instead of one for all: chosen for a size or a divergence, or read from a file."""

    target_bpw: float = option(
        0.0,
        "bits a weight over the linears, scales and zeros counted: bits and groups are chosen by module; 0: one scheme",
    )
    target_size: str = option("", "size of the whole folder, as 600M or 1.5GiB: the head, if quantized, is chosen too")
    max_kl: float = option(
        0.0, "the smallest model whose KL from the original stays below this, measured on held-out text; nats a token"
    )
    plan: str = option("", "JSON file of schemes by module, or the llmq_report.json of an earlier run")

    def __post_init__(self) -> None:
        used = [f.name for f in dataclasses.fields(self) if getattr(self, f.name)]
        if len(used) > 1:
            flags = " and ".join("--" + name.replace("_", "-") for name in used)
            raise ValueError(f"{flags} each say which schemes the modules get; use one of the two")
        for name, unit in (("target_bpw", "bits a weight"), ("max_kl", "nats a token")):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name):g}; it counts {unit}, or is 0 for one scheme")
        if self.target_size:
            parse_size(self.target_size)

    @property
    def chooses(self) -> bool:
        """Whether schemes are chosen by what they do to the model, for which text is needed."""
        return bool(self.target_bpw or self.target_size or self.max_kl)

    @property
    def flag(self) -> str:
        """The flag that was used, as it is written; empty if none was."""
        used = [f.name for f in dataclasses.fields(self) if getattr(self, f.name)]
        return f"--{used[0].replace('_', '-')}" if used else ""


def parse_size(text: str) -> int:
    """Bytes of ``600M`` (million), ``600MiB`` or a plain number. Raises ValueError naming the text."""
    m = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kKMG])(i?)B?|B)?", text.strip())
    if not m or not float(m[1]):
        raise ValueError(f"size {text!r} is not of the form 600M, 1.5G or 600MiB")
    return int(float(m[1]) * (1024 if m[3] else 1000) ** ("kMG".index(m[2].replace("K", "k")) + 1 if m[2] else 0))


@dataclass(frozen=True)
class StatsConfig:
    """Statistics of the original model's inputs, kept for runs with other bits, groups and options."""

    save_stats: str = option("", "folder for statistics of the original model, for later runs with --stats")
    stats: str = option("", "folders of --save-stats, comma-separated: solve from their sum, no text is run")

    def __post_init__(self) -> None:
        if self.save_stats and self.stats:
            raise ValueError("--stats runs no text of which --save-stats could keep statistics; use one of the two")


@dataclass(frozen=True)
class AWQConfig:
    """AWQ (Lin et al. 2023, arXiv 2306.00978): activation-aware scaling, then clipping."""

    n_grid: int = option(20, "exponents tried between 0 (no scaling) and 1 in the scale search")
    clip: bool = option(True, "search the clipping range of each group against the Hessian")

    def __post_init__(self) -> None:
        if not 2 <= self.n_grid <= 100:
            raise ValueError(f"n_grid is {self.n_grid}; use 2 to 100 (usual: 20)")


@dataclass(frozen=True)
class CalibConfig:
    """Calibration text: ``n_samples`` windows of ``seqlen`` tokens, BOS first where the tokenizer has one."""

    calib: str = option("auto", "data set, file, folder, glob, 'self', 'stdlib' or 'auto'")
    nsamples: int = option(32, "windows of calibration text; more is slower and a little better")
    seqlen: int = option(2048, "tokens a window")
    tune_samples: int = option(96, "further windows of the same text, as far as it reaches, for the step tune")
    seed: int = option(0, "seed of everything that is drawn")

    def __post_init__(self) -> None:
        for name in ("nsamples", "seqlen"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.tune_samples < 0:
            raise ValueError(f"tune_samples is {self.tune_samples}; use 0 for none")
        if self.seqlen < 8:
            raise ValueError(f"seqlen is {self.seqlen}; a window needs at least 8 tokens to hold any context")


@dataclass(frozen=True)
class KVCacheConfig:
    """Precision of cached keys and values; 16 bits is the unquantized cache.

    ``layers``: bits of each layer, one text a layer (``k8v4``); empty: every layer has the same.
    """

    k_bits: int = option(16, "bits of a cached key", choices=KV_BITS)
    v_bits: int = option(16, "bits of a cached value", choices=KV_BITS)
    key_scales: str = option(
        "channel",
        "scales of keys below 8 bits: of a column over a block of tokens (channel), or of a part of a token (token)",
        choices=KEY_SCALES,
    )
    rotate: bool = option(
        True, "rotate heads by a Hadamard matrix (keys with scales by token, values below 8 bits): evens out columns"
    )
    sinks: int = option(4, "first tokens of a text that stay in 16 bits; attention leans on them")
    recent: int = option(32, "last tokens of a text that stay in 16 bits, where the rest has fewer than 8")
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        one_of("k_bits", self.k_bits, KV_BITS)
        one_of("v_bits", self.v_bits, KV_BITS)
        one_of("key_scales", self.key_scales, KEY_SCALES)
        for name in ("sinks", "recent"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it counts tokens: 0 or more")
        for text in self.layers:
            _kv_bits(text)

    def of_layer(self, layer: int) -> tuple[int, int]:
        """(k_bits, v_bits) of a layer."""
        return _kv_bits(self.layers[layer]) if self.layers else (self.k_bits, self.v_bits)

    def __str__(self) -> str:
        """``8`` when keys and values have the same bits, else ``k8v4``; by layer ``8*2,k8v4``; ``parse`` reads it."""
        if self.layers:
            runs = [(text, len(list(same))) for text, same in itertools.groupby(self.layers)]
            return ",".join(f"{text}*{n}" if n > 1 or len(runs) == 1 else text for text, n in runs)
        return str(self.k_bits) if self.k_bits == self.v_bits else f"k{self.k_bits}v{self.v_bits}"

    @classmethod
    def parse(cls, text: str) -> KVCacheConfig:
        """The configuration called ``16``, ``8``, ``4``, ``2`` or ``k8v4``, or, layer by layer, ``8*2,k8v4``.

        Raises ValueError naming what is known.
        """
        if "," in text or "*" in text:
            return cls(layers=tuple(itertools.chain.from_iterable(map(_run_of_layers, text.split(",")))))
        k_bits, v_bits = _kv_bits(text)
        return cls(k_bits, v_bits)

    @classmethod
    def of(cls, kv: KVCacheConfig | str) -> KVCacheConfig:
        """``kv`` itself, or the configuration that its text names."""
        return kv if isinstance(kv, KVCacheConfig) else cls.parse(kv)


KV_AUTO = "auto"


@dataclass(frozen=True)
class RuntimeConfig:
    """What a checkpoint asks of whoever runs it, as long as nothing else is asked for."""

    kv_bits: str = option(
        "16",
        "bits of the keys and values that the native decoder caches by default: 16, 8, 4, k8v4, ..., by layer as "
        "8*2,4*16, or auto: 4, and more in layers whose attention needs it",
    )
    kv_budget: str = option(
        "", "instead of --kv-bits: bits by layer, so that the cache of --kv-context tokens takes at most this (200M)"
    )
    kv_context: int = option(0, "tokens that --kv-budget and auto count; 0: the model's context, at most 8192")

    def __post_init__(self) -> None:
        if self.kv_bits != KV_AUTO:
            KVCacheConfig.parse(self.kv_bits)
        if self.kv_budget:
            parse_size(self.kv_budget)
            if self.kv_bits != "16":
                raise ValueError(
                    f"--kv-bits {self.kv_bits} and --kv-budget {self.kv_budget} exclude each other; give one"
                )
        if self.kv_context < 0:
            raise ValueError(f"kv-context is {self.kv_context}; it counts tokens: at least 1")

    @property
    def chooses(self) -> bool:
        """Whether bits are chosen by what they do to the model."""
        return bool(self.kv_budget) or self.kv_bits == KV_AUTO


def _run_of_layers(text: str) -> list[str]:
    m = re.fullmatch(r"\s*(\w+)(?:\*(\d{1,4}))?\s*", text)
    if not m or m[2] and int(m[2]) == 0:
        raise ValueError(f"kv bits of layers {text!r} are not of the form <bits> or <bits>*<layers>, as in 8*2,k8v4*16")
    _kv_bits(m[1])
    return [m[1]] * int(m[2] or 1)


def _kv_bits(text: str) -> tuple[int, int]:
    m = re.fullmatch(r"(\d+)|k(\d+)v(\d+)", text)
    if not m:
        raise ValueError(f"kv bits {text!r} are not of the form <bits> or k<bits>v<bits>, as in 8 or k8v4")
    bits = (int(m[1]), int(m[1])) if m[1] else (int(m[2]), int(m[3]))
    for b in bits:
        one_of("kv bits", b, KV_BITS)
    return bits


def replace(options: Any, **changes: Any) -> Any:
    """``dataclasses.replace``, so that callers need only this module."""
    return dataclasses.replace(options, **changes)
