"""What physics allows: bytes read and operations done for a token, from a model's config and an engine's files."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmq.bench import peer_files
from llmq.models.load import open_model
from llmq.models.reader import WeightReader


@dataclass(frozen=True)
class Work:
    """The sizes that decide a decoder's work.

    Attributes:
        block_weights: weights of the linears of all blocks.
        head_weights: vocabulary x width, of the output head.
        windows: positions each layer can look back, one a layer (0: all).
        n_heads, n_kv_heads, head_dim: of the attention.
    """

    block_weights: int
    head_weights: int
    windows: tuple[int, ...]
    n_heads: int
    n_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, folder: Path) -> Work:
        """The work of the unquantized model in ``folder``. Raises ValueError as ``open_model``."""
        source = open_model(folder)
        config = source.config.get_text_config()
        linears = (source.block_linears(i) for i in range(len(source.block_names)))
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(source.block_names)
        window = getattr(config, "sliding_window", None) or 0
        heads = config.num_attention_heads
        return cls(
            block_weights=sum(n * k for block in linears for n, k in block.values()),
            head_weights=math.prod(source.reader.shape(f"{source.embed_name}.weight")),
            windows=tuple(window if kind == "sliding_attention" else 0 for kind in kinds),
            n_heads=heads,
            n_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Work:
        """The inverse of :meth:`to_json`."""
        return cls(**{**data, "windows": tuple(data["windows"])})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def _seen(self, position: float) -> float:
        """Positions that a token at ``position`` attends to, summed over the layers."""
        return sum(min(position, window) if window else position for window in self.windows)

    def decode_bytes(self, weight_bytes: float, position: float, *, batch: int = 1, kv_bits: float = 16) -> float:
        """Bytes read for one step of ``batch`` sequences at ``position``: the weights once, each sequence's cache."""
        cache = 2 * self._seen(position) * self.n_kv_heads * self.head_dim * kv_bits / 8
        return weight_bytes + batch * cache

    def decode_operations(self, position: float) -> float:
        """Operations for a token at ``position``; a multiply-add is two."""
        attention = 4 * self._seen(position) * self.n_heads * self.head_dim
        return 2 * (self.block_weights + self.head_weights) + attention

    def prefill_operations(self, tokens: int) -> float:
        """Operations for a prompt of ``tokens``, of whose logits only the last are wanted."""
        attention = 4 * self.n_heads * self.head_dim * sum(self._seen(position) for position in range(1, tokens + 1))
        return 2 * (tokens * self.block_weights + self.head_weights) + attention


@dataclass(frozen=True)
class Footprint:
    """Weights an engine reads for each token: ``nbytes`` in all, ``block_bits`` and ``head_bits`` a weight."""

    nbytes: float
    block_bits: float
    head_bits: float


def footprint(path: Path, work: Work, *, stored_bits: int | None = None) -> Footprint:
    """What an engine reads a token if its file or folder ``path`` is what it computes with.

    A token embedding is not counted unless it is the head too: one of its rows is read. ``stored_bits`` overrides the
    file's own width of every weight (torch converts when it loads).
    """
    read = next((reader for name, reader in peer_files.SIZES.items() if (path / name).is_file()), _safetensors_sizes)
    sizes = _gguf_sizes(path) if path.is_file() else read(path)
    if stored_bits is not None:
        sizes = {name: (n, n * stored_bits / 8) for name, (n, _) in sizes.items()}
    # A quantized matrix is several tensors (codes, scales, zeros) of one name and different endings.
    heads = [name for name in sizes if name.startswith(("lm_head.", "output.", "model.lm_head."))]
    tables = [name for name in sizes if "embed_tokens." in name or name.startswith("token_embd.")]
    head = sum(sizes[name][1] for name in heads or tables)
    blocks = sum(nbytes for name, (_, nbytes) in sizes.items() if name not in heads and name not in tables)
    return Footprint(blocks + head, 8 * blocks / work.block_weights, 8 * head / work.head_weights)


def _gguf_sizes(path: Path) -> dict[str, tuple[int, float]]:
    """Tensor name -> (values, bytes) of a GGUF file."""
    import gguf

    return {t.name: (int(t.n_elements), float(t.n_bytes)) for t in gguf.GGUFReader(path).tensors}


def _safetensors_sizes(folder: Path) -> dict[str, tuple[int, float]]:
    """Tensor name -> (values, bytes) of a safetensors folder."""
    reader = WeightReader(folder)
    return {name: (math.prod(reader.shape(name)), float(reader.nbytes(name))) for name in reader.names()}
