"""NativeCache: the sequences of the native decoder as the cache object that transformers passes around."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from llmq.config import KVCacheConfig
from llmq.runtime.native import NativeDecoder
from llmq.runtime.parts import Unsupported
from llmq.runtime.sequence import Sequence, shared_nbytes


class NativeCache(Cache):
    """Keys and values of a batch, held by the compiled decoder, one Sequence a row.

    transformers counts columns, padding included; a Sequence holds only the tokens that the attention mask shows.
    ``seen`` is the mask so far and ties the two together.

    Attributes:
        kv: bits of the keys and values; None: 16.
        sequences: one a row; empty until the first forward, which decides the batch.
        seen: bool[B, columns].
        prompt: i64[B, T] the tokens of the first columns, where they are known (a cache from a file); ``generate``
            refuses a prompt that does not begin with them.
        made_by: fingerprint of the decoder that began it.
        offsets: i64[B] position id of a row's first token, where the caller gave positions; rotary embedding depends on
            differences only.
    """

    def __init__(self, kv: KVCacheConfig | None = None) -> None:
        super().__init__(layers=[])
        self.kv = kv
        self.sequences: list[Sequence] = []
        self.seen = torch.zeros(0, 0, dtype=torch.bool)
        self.offsets: Tensor | None = None
        self.prompt: Tensor | None = None
        self.made_by = ""

    def begin(self, decoder: NativeDecoder, rows: int) -> None:
        """Make the sequences, as long as there is no column.

        Raises ValueError when the batch has grown or shrunk, or another model's decoder has made them.
        """
        if self.get_seq_length() == 0:
            self.made_by = decoder.fingerprint
            self.sequences = [decoder.new_sequence(kv=self.kv) for _ in range(rows)]
            self.seen = torch.zeros(rows, 0, dtype=torch.bool)
        if len(self.sequences) != rows:
            raise ValueError(f"the batch has {rows} rows, past_key_values holds {len(self.sequences)}")
        if self.made_by != decoder.fingerprint:
            raise ValueError(
                f"past_key_values holds {self.get_seq_length()} columns that a model with other weights or another "
                f"adapter has computed (fingerprints {self.made_by[:8]} and {decoder.fingerprint[:8]}); start with a "
                "new cache"
            )

    def extend(self, shown: Tensor) -> None:
        """Note columns that have been processed: bool[B, n], True where a token was stored."""
        self.seen = torch.cat([self.seen, shown.bool()], dim=1)

    def check_prompt(self, ids: Tensor) -> None:
        """Raise ValueError when the prompt i64[B, T] does not begin with the tokens that the cache is known to hold."""
        if self.prompt is None or len(ids) != len(self.prompt):
            return
        columns = min(ids.shape[1], self.prompt.shape[1])
        wrong = (ids[:, :columns] != self.prompt[:, :columns]) & self.seen[:, :columns]
        if bool(wrong.any()):
            row, column = (int(i) for i in wrong.nonzero()[0])
            raise ValueError(
                f"row {row} of the prompt has token {int(ids[row, column])} at column {column} where past_key_values "
                f"holds token {int(self.prompt[row, column])}; begin with the {self.prompt.shape[1]} tokens that it "
                "was saved with (tokens may differ where a text is cut), or leave it out"
            )

    @property
    def nbytes(self) -> int:
        """Bytes held by all sequences together; pages that several share count once."""
        return shared_nbytes(self.sequences)

    # What transformers asks of a cache, under its names. All layers are alike here.

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Columns processed so far, padding included."""
        return int(self.seen.shape[1])

    def get_max_length(self, layer_idx: int | None = None) -> int:  # noqa: ARG002
        """-1: grows as needed."""
        return -1

    get_max_cache_shape = get_max_length  # its name in older transformers

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:  # noqa: ARG002
        """(columns that a query sees, offset of the first)."""
        return self.get_seq_length() + queries(query_length), 0

    def update(self, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """The Hugging Face graph cannot store into this cache: raises TypeError."""
        raise TypeError(
            "a NativeCache holds keys and values inside the compiled decoder; the Hugging Face graph needs a "
            "DynamicCache: pass past_key_values=DynamicCache(config=model.config) from the first call on"
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` columns; a positive number is how many to keep (transformers 5.0)."""
        columns = self.get_seq_length()
        keep = columns + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, columns)
        if keep < 0:
            raise ValueError(f"cannot remove {-tokens_to_remove} columns from a cache of {columns}")
        lengths = self.seen[:, :keep].sum(1).tolist()
        for row, (sequence, length) in enumerate(zip(self.sequences, lengths, strict=True)):
            if 0 < length < sequence.least_crop:
                raise ValueError(
                    f"row {row} of {sequence.length} tokens cannot be cropped to {length}: layers of a sliding window "
                    f"hold what {sequence.least_crop} tokens or more need; start a new cache"
                )
        self.seen = self.seen[:, :keep].clone()
        self.prompt = None if self.prompt is None else self.prompt[:, :keep]
        for sequence, length in zip(self.sequences, lengths, strict=True):
            sequence.crop(length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        rows = beam_idx.tolist()
        taken: set[int] = set()
        sequences = []
        for row in rows:
            sequences.append(self.sequences[row].copy() if row in taken else self.sequences[row])
            taken.add(row)
        self.sequences = sequences
        self.seen = self.seen[rows]
        self.offsets = None if self.offsets is None else self.offsets[rows]
        self.prompt = None if self.prompt is None else self.prompt[rows]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (i64, or a bool mask)."""
        self.reorder_cache(torch.arange(len(self.sequences))[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times."""
        self.reorder_cache(torch.arange(len(self.sequences)).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything."""
        self.sequences, self.seen, self.offsets = [], torch.zeros(0, 0, dtype=torch.bool), None
        self.prompt = None

    def activate_past_recording(self) -> None:
        """Every past state is kept anyway."""

    def is_recording_past(self, layer_idx: int) -> bool:  # noqa: ARG002
        """Every past state is kept."""
        return True

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first forward."""
        return len(self.sequences) or -1

    @property
    def is_initialized(self) -> bool:
        """Whether it holds something."""
        return self.get_seq_length() > 0

    @property
    def is_compileable(self) -> bool:
        """Not for torch.compile."""
        return False

    @property
    def is_croppable(self) -> bool:
        """``crop`` leaves no trace."""
        return True

    @property
    def is_sliding(self) -> list[bool]:
        """``crop`` takes guesses back in every layer; how far else, ``Sequence.least_crop`` says."""
        return [False]

    def __len__(self) -> int:
        return len(self.sequences)

    def __repr__(self) -> str:
        return f"NativeCache({len(self.sequences)} sequences, {self.get_seq_length()} columns, {self.nbytes} bytes)"

    def __deepcopy__(self, memo: dict[int, Any]) -> NativeCache:
        made = NativeCache()
        made.__dict__.update({k: copy.copy(v) for k, v in self.__dict__.items()})
        made.sequences = [sequence.copy() for sequence in self.sequences]
        return made


def queries(query_length: int | Tensor) -> int:
    """Columns of a step: transformers 4 and 5.0 tell a cache their positions, later ones how many there are."""
    return query_length if isinstance(query_length, int) else query_length.shape[0]


def shown_columns(attention_mask: Any, past: Tensor, rows: int, columns: int) -> Tensor:
    """The new columns of a mask: bool[B, columns].

    Args:
        attention_mask: [B, past + columns] of zeros and ones, or None: everything is shown.
        past: bool[B, past], the mask of what a cache holds.
        rows, columns: of the new token ids.

    Raises:
        Unsupported: the mask is no two-dimensional padding mask.
        ValueError: its shape does not fit, or it disagrees with the cache.
    """
    if attention_mask is None:
        return torch.ones(rows, columns, dtype=torch.bool)
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        raise Unsupported("attention_mask is not a [batch, length] mask")
    if attention_mask.is_floating_point() and not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise Unsupported("attention_mask holds other numbers than 0 and 1")
    before = past.shape[1]
    if tuple(attention_mask.shape) != (rows, before + columns):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; {rows} rows of {columns} tokens after {before} "
            f"in the cache need ({rows}, {before + columns})"
        )
    mask = attention_mask != 0
    if not torch.equal(mask[:, :before], past):
        raise ValueError(f"attention_mask hides other tokens among the first {before} than when they were cached")
    return mask[:, before:]


def check_positions(position_ids: Tensor | None, shown: Tensor, cache: NativeCache) -> None:
    """Accept position ids that count a row's shown tokens one by one, from any start.

    Raises Unsupported for other positions in a new cache, ValueError where they do not continue the cache's.
    """
    if position_ids is None:
        return
    if position_ids.dim() != 2 or position_ids.shape[1] != shown.shape[1]:
        raise Unsupported(f"position_ids have shape {tuple(position_ids.shape)}")
    positions = position_ids.expand(shown.shape)
    start = positions - (shown.cumsum(1) - 1) - cache.seen.sum(1, keepdim=True)
    if cache.offsets is None:  # a row that shows nothing yet may begin anywhere
        first = shown.int().argmax(1)
        offsets = start.gather(1, first[:, None])[:, 0]
        natural = bool(((start == offsets[:, None]) | ~shown).all())
        if natural and (cache.get_seq_length() == 0 or bool((offsets == 0).all())):
            cache.offsets = offsets
            return
    elif bool(((start == cache.offsets[:, None]) | ~shown).all()):
        return
    if cache.get_seq_length() == 0:
        raise Unsupported("position_ids do not count the tokens one by one")
    raise ValueError(
        "position_ids do not continue those of the tokens in past_key_values; leave them out, or start with a new cache"
    )
