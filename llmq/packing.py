"""Exact bit packing: unsigned codes of any width 1..8 in a dense little-endian bit stream.

Law: a row of E codes of B bits takes ``ceil(E * B / 8)`` bytes; code i occupies bits ``i*B .. i*B + B - 1`` of the
row's stream, bit j of the stream being bit ``j % 8`` of byte ``j // 8``; the spare bits of the last byte are zero.
Read as little-endian int32 words this is also the GPTQ order for 2, 3, 4 and 8 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Widths that divide a byte: the codes of a byte, spread over the bytes of one little-endian word and back by
# ``word |= word << shift`` in turn, four times as fast as code by code. Word, shifts, mask of the codes.
WORDS = {4: (torch.int16, (4,), 0x0F0F), 2: (torch.int32, (12, 6), 0x03030303)}


def packed_width(n_codes: int, bits: int) -> int:
    """Bytes that ``n_codes`` codes of ``bits`` bits take."""
    return -(-n_codes * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack along the last dimension.

    Args:
        codes: u8[..., E], each below ``2**bits``.
        bits: 1..8.

    Returns:
        u8[..., ceil(E*bits/8)], a new tensor.

    Raises:
        ValueError: ``bits`` out of range, or a code that does not fit.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes are {codes.dtype}, expected torch.uint8")
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit {bits} bits (largest: {(1 << bits) - 1})")
    if bits == 8:
        return codes.clone()
    if bits in WORDS:
        return _squeeze(codes, bits)
    # Eight codes fill exactly `bits` bytes: work on whole octets, then cut the padding off.
    *lead, n = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -n % 8)).reshape(*lead, -1, 8)
    out = torch.zeros(*padded.shape[:-1], bits, dtype=torch.uint8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        out[..., byte] |= padded[..., i] << shift
        if shift + bits > 8:
            out[..., byte + 1] |= padded[..., i] >> (8 - shift)
    return out.reshape(*lead, -1)[..., : packed_width(n, bits)].contiguous()


def _squeeze(codes: Tensor, bits: int) -> Tensor:
    dtype, shifts, _ = WORDS[bits]
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % dtype.itemsize))
    # Flat and a copy: a view of wider words minds strides and alignment.
    words = padded.reshape(-1).clone().view(dtype)
    for shift in reversed(shifts):
        words |= words >> shift
    return words.to(torch.uint8).reshape(*codes.shape[:-1], packed_width(codes.shape[-1], bits))


def unpack_bits(packed: Tensor, bits: int, n_codes: int) -> Tensor:
    """Inverse of :func:`pack_bits`: u8[..., ceil(n_codes*bits/8)] -> u8[..., n_codes].

    Raises:
        ValueError: ``bits`` out of range, or a last dimension that disagrees with ``n_codes``.
    """
    _check_bits(bits)
    width = packed_width(n_codes, bits)
    if packed.shape[-1] != width:
        raise ValueError(f"{n_codes} codes of {bits} bits take {width} bytes a row, the tensor has {packed.shape[-1]}")
    if bits == 8:
        return packed.clone()
    if bits in WORDS:
        dtype, shifts, mask = WORDS[bits]
        words = packed.to(dtype, memory_format=torch.contiguous_format)
        for shift in shifts:
            words |= words << shift
        words &= mask
        return words.view(torch.uint8)[..., :n_codes].contiguous()
    *lead, n = packed.shape
    octets = torch.nn.functional.pad(packed, (0, -n % bits)).reshape(*lead, -1, bits)
    out = torch.empty(*octets.shape[:-1], 8, dtype=torch.uint8)
    mask = (1 << bits) - 1
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = octets[..., byte] >> shift
        if shift + bits > 8:
            code = code | (octets[..., byte + 1] << (8 - shift))
        out[..., i] = code & mask
    return out.reshape(*lead, -1)[..., :n_codes].contiguous()


def word_width(n_codes: int, bits: int) -> int:
    """32-bit words that ``n_codes`` codes of ``bits`` bits take."""
    return -(-n_codes * bits // 32)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """As :func:`pack_bits`, in little-endian 32-bit words: u8[..., E] -> i32[..., ceil(E*bits/32)]."""
    packed = pack_bits(codes, bits)
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 4))
    # Flat: a view of another width minds the strides of dimensions of size 1, contiguous() does not.
    return padded.reshape(-1).view(torch.int32).reshape(*codes.shape[:-1], -1)


def unpack_words(words: Tensor, bits: int, n_codes: int) -> Tensor:
    """Inverse of :func:`pack_words`: i32 or u32[..., ceil(n_codes*bits/32)] -> u8[..., n_codes].

    Raises:
        ValueError: ``bits`` out of range, or a last dimension that disagrees with ``n_codes``.
    """
    _check_bits(bits)
    width = word_width(n_codes, bits)
    if words.shape[-1] != width:
        raise ValueError(f"{n_codes} codes of {bits} bits take {width} words a row, the tensor has {words.shape[-1]}")
    packed = words.reshape(-1).view(torch.uint8).reshape(*words.shape[:-1], -1)
    return unpack_bits(packed[..., : packed_width(n_codes, bits)], bits, n_codes)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}; codes of 1 to 8 bits can be packed")
