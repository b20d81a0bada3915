"""The native decoder's cache with a scale a column of keys: pages, crops, windows, memory."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from kernel_cases import core  # noqa: F401 - skips without the compiled module
from test_native import ids_of, load
from torch import Tensor

from llmq import CalibConfig, QuantScheme, quantize_model
from llmq.config import KVCacheConfig, replace
from llmq.runtime.native import NativeDecoder, Sequence

PAGE = 64
FOUR = KVCacheConfig(4, 4)


@pytest.fixture(scope="module")
def decoders(tiny_model, tmp_path_factory):
    """``decoders(family)``: of a quantized tiny model of three blocks."""
    made: dict[str, NativeDecoder] = {}
    models = []

    def get(family: str) -> NativeDecoder:
        if family not in made:
            out: Path = tmp_path_factory.mktemp("columns") / family
            calib = CalibConfig(calib="stdlib", nsamples=2, seqlen=32)
            source = tiny_model(family, blocks=3)
            models.append(
                load(quantize_model(source, QuantScheme(4, 32), method="rtn", output=out, calib=calib).folder)
            )
            made[family] = NativeDecoder.of(models[-1])
        return made[family]

    return get


def fed(decoder: NativeDecoder, row: Tensor, config: KVCacheConfig, *cuts: int) -> tuple[Tensor, Sequence]:
    """Logits of all tokens of ``row``, fed in pieces that begin at ``cuts``, and their sequence."""
    s = decoder.new_sequence(kv=config)
    ends = [*cuts, len(row)]
    pieces = [row[a:b] for a, b in zip([0, *cuts], ends, strict=True)]
    return torch.cat([decoder.forward([piece], [s], output="all") for piece in pieces]), s


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("config", [
    FOUR, KVCacheConfig(2, 2, sinks=0, recent=0), KVCacheConfig(4, 16, sinks=70, recent=100), KVCacheConfig(2, 8),
], ids=lambda c: f"{c} {c.sinks} {c.recent}")  # fmt: skip
def test_the_cache_does_not_depend_on_how_tokens_came(decoders, family: str, config: KVCacheConfig) -> None:
    decoder, [row] = decoders(family), ids_of(330)
    together, _ = fed(decoder, row, config)
    for cuts in ((63, 64, 65, 129, 200, 255), tuple(range(100, 330))):
        assert torch.equal(fed(decoder, row, config, *cuts)[0], together), cuts


def test_a_batch_is_its_rows_one_by_one(decoders) -> None:
    decoder, rows = decoders("qwen3"), ids_of(150, 64, 7)
    configs = [FOUR, replace(FOUR, key_scales="token"), KVCacheConfig(8, 4)]
    s = [decoder.new_sequence(kv=c) for c in configs]
    together = decoder.forward([r[:-1] for r in rows], s)
    together = decoder.forward([r[-1:] for r in rows], s)
    for i, (row, config) in enumerate(zip(rows, configs, strict=True)):
        assert torch.equal(fed(decoder, row, config)[0][-1], together[i])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_was_taken_back_leaves_no_trace(decoders, family: str) -> None:
    # Up to 32 tokens of a long step, and a whole step of up to 256, over the ends of pages.
    decoder, [row], [other] = decoders(family), ids_of(500), ids_of(500)
    other = other.flip(0)
    for config, length, back in itertools.product(
        (FOUR, KVCacheConfig(2, 4, sinks=0, recent=0)), (270, 320), (1, 20, 32)
    ):
        plain, _ = fed(decoder, row, config)
        _, s = fed(decoder, torch.cat([row[: length - back], other[:back]]), config)
        s.crop(length - back)
        assert torch.equal(decoder.forward([row[length - back :]], [s], output="all"), plain[length - back :])
    plain, s = fed(decoder, row[:310], FOUR)
    decoder.forward([other[:200]], [s])
    s.crop(310)
    expected, _ = fed(decoder, row, FOUR)
    assert torch.equal(decoder.forward([row[310:]], [s], output="all"), expected[310:])


def test_a_crop_into_a_page_of_codes_goes_on_from_what_they_say(decoders) -> None:
    decoder, [row] = decoders("llama"), ids_of(400)
    for config in (FOUR, KVCacheConfig(4, 16, sinks=70, recent=0), KVCacheConfig(2, 8, sinks=0, recent=100)):
        exact, _ = fed(decoder, row, config)
        for length in (10, 16, 40, 64, 100, 128, 150):
            _, s = fed(decoder, row, config)
            before = s.nbytes
            s.crop(length)
            assert (s.length, s.nbytes < before) == (length, True)
            twin = s.copy()
            after = decoder.forward([row[length:]], [s], output="all")
            steps = [decoder.forward([t[None]], [twin]) for t in row[length:]]
            assert torch.equal(torch.cat(steps), after), length
            # One more rounding of the tokens of one page, or none where the page was cut at its end.
            difference = float((after - exact[length:]).norm() / exact[length:].norm())
            assert difference < 0.3
            s.crop(0)
            assert torch.equal(decoder.forward([row], [s], output="all"), exact)


def test_memory_of_pages_and_of_the_tokens_seen_in_16_bits(decoders) -> None:
    decoder, [row] = decoders("llama"), ids_of(500)
    config = KVCacheConfig(4, 4, sinks=4, recent=32)
    # 3 layers, 2 heads of 12 columns: codes of 32 columns (least of keys and of values), f16 scales and u8 zeros of 12
    # columns (rounded to 16 bytes) and of 64 values; a head's part of a page is a multiple of 64 bytes.
    page = 3 * 2 * -(-(PAGE * (16 + 16) + 32 + 16 + PAGE * 3) // 64) * 64
    block = 3 * 2 * 16 * 2 * (12 + 16)
    _, s = fed(decoder, row[:450], config)
    for length in range(450, 500):
        held, left = divmod(s.nbytes - length // PAGE * page, block)
        assert left == 0
        # Sinks, and what a crop by 32 needs: the tokens from the start of its page on, and 32 recent ones.
        first = min((length - 1 - 32) // PAGE * PAGE, length - 1 - 32 - 32)
        assert held == 1 + -(-length // 16) - first // 16
        decoder.forward([row[length : length + 1]], [s])


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_a_window_forgets_pages_and_misses_none(decoders, family: str) -> None:
    decoder, [row] = decoders(family), ids_of(500)
    config = KVCacheConfig(4, 4, sinks=0, recent=0)
    together, _ = fed(decoder, row, config)
    logits, s = fed(decoder, row, config, *range(75, 500, 75))
    assert torch.equal(logits, together)
    assert 0 < s.least_crop <= 450
    with pytest.raises(ValueError, match=rf"to 100; use {s.least_crop} to 500, or 0"):
        s.crop(100)
    s.crop(s.least_crop)
    begin = s.length
    assert decoder.forward([row[begin:]], [s], output="all").isfinite().all()
    s.crop(0)
    assert torch.equal(decoder.forward([row], [s], output="all"), together)
