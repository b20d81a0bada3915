"""The header of a GGUF file is held against the file before the gguf package counts as far as it says."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from test_gguf import write_gguf

from llmq.models.gguf import check_file
from llmq.models.gguf_header import check_header

NORM, EMBED = b"output_norm.weight", b"token_embd.weight"  # one dimension, two
TOKENS, TYPES = b"tokenizer.ggml.tokens", b"tokenizer.ggml.token_type"  # strings, 32-bit numbers


def test_a_whole_file(tmp_path: Path) -> None:
    check_header(write_gguf(tmp_path / "x.gguf")[0])


@pytest.mark.parametrize(
    ("after", "at", "form", "value", "message"),
    [
        (b"GGUF", 0, "<I", 9, "version 9; 2 and 3 are known"),
        (b"GGUF", 4, "<Q", 1 << 60, r"1152921504606846976 tensors need at least \d+ bytes, the file has"),
        (b"GGUF", 12, "<Q", 1 << 60, "1152921504606846976 metadata pairs need at least"),
        (TOKENS, 8, "<Q", 1 << 40, "1099511627776 tokenizer.ggml.tokens need at least 8796093022208 bytes"),
        (TYPES, 8, "<Q", 1 << 60, r"token_type \(1152921504606846976 numbers\) at byte \d+ needs 4611686018427387904"),
        (TYPES, 4, "<I", 9, "token_type is an array of type 9; numbers and strings were expected"),
        (TYPES, 0, "<I", 77, "token_type has type 77; types are 0 to 12"),
        (NORM, 0, "<I", 0, "tensor output_norm.weight has 0 dimensions; 1 to 4 were expected"),
        (NORM, 12, "<I", 999, "tensor output_norm.weight has type 999"),
        (NORM, 12, "<I", 2, "has rows of 48 numbers; blocks of its type have 32"),
        (NORM, 16, "<Q", 5, "begins at 5, which is no multiple of the alignment 32"),
        (NORM, 16, "<Q", 32, "tensor output_norm.weight begins at 32, inside token_embd.weight, which ends at 18816"),
        (NORM, 16, "<Q", 1 << 60, "tensor output_norm.weight ends at byte 11529215046068"),
        (EMBED, 4, "<Q", 1 << 62, "tensor token_embd.weight ends at byte 18077809"),
    ],
)
def test_what_a_header_cannot_say(after: bytes, at: int, form: str, value: int, message: str, tmp_path: Path) -> None:
    path, _ = write_gguf(tmp_path / "x.gguf")
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, data.index(after) + len(after) + at, value)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"x\.gguf \(\d+ bytes\) could not be read: .*{message}"):
        check_file(path)


def test_names_that_occur_twice(tmp_path: Path) -> None:
    path, _ = write_gguf(tmp_path / "x.gguf")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.0.attn_k.weight", b"blk.0.attn_q.weight"))
    with pytest.raises(ValueError, match="11 tensors have 10 names"):
        check_file(path)
    path.write_bytes(data.replace(b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id"))
    with pytest.raises(ValueError, match="metadata key 'tokenizer.ggml.eos_token_id' occurs twice"):
        check_file(path)
