"""Attention over keys with a scale a column, against the reference: kernel set by kernel set."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_cases import assert_same, isa, threads  # noqa: F401 - fixtures
from test_kernels_attend import SHAPES, case, limit

from llmq import kernels
from llmq.kernels import reference

PAIRS = [(4, 4), (2, 2), (4, 16), (2, 8), (4, 32)]


@pytest.mark.parametrize("bits", PAIRS, ids=str)
@pytest.mark.usefixtures("isa")
def test_scales_by_column_give_what_the_reference_says(bits: tuple[int, int]) -> None:
    near = (
        {},
        {"sinks": 4, "recent": 32},
        {"sinks": 70},
        {"recent": 150, "window": 90},
        {"softcap": 2.0, "window": 20},
    )
    for shape, options in itertools.product([*SHAPES, (90, 200, 2, 1, 48)], near):
        q, k, v = case(*shape)
        kwargs = {"k_bits": bits[0], "v_bits": bits[1], "key_scales": "channel", **options}
        actual, expected = kernels.attend(q, k, v, **kwargs), reference.attend(q, k, v, **kwargs)
        about = {name: options[name] for name in ("window", "softcap") if name in options}
        allowed = 2 * limit(q, k, v, bits, **about)  # up to three sums instead of one
        assert ((actual - expected).abs() <= allowed).all(), (shape, options)
        assert ((actual - 1.01 * expected).abs() > allowed).any(), (shape, options)  # one percent off would be seen


@pytest.mark.parametrize("bits", [(4, 4), (2, 16)], ids=str)
@pytest.mark.usefixtures("isa")
def test_tokens_of_a_page_that_is_not_full_are_seen_in_16_bits(bits: tuple[int, int]) -> None:
    q, k, v = case(1, 300, 6, 2, 64)
    for length in (64, 65, 127, 128, 150, 300):
        kwargs = {"k_bits": bits[0], "v_bits": bits[1], "key_scales": "channel"}
        actual = kernels.attend(q, k[:length], v[:length], **kwargs)
        for other, differs in ((0, False), (16, True), (64, True)):
            near = reference.attend(q, k[:length], v[:length], **kwargs, recent=length % 64 + other)
            assert ((near - actual).norm() > 1e-3 * actual.norm()) == differs, (length, other)


@pytest.mark.usefixtures("isa")
def test_columns_of_different_size_lose_less_with_scales_of_their_own() -> None:
    q, k, v = case(1, 512, 4, 2, 64)
    k[..., ::7] /= 4
    k[..., [5, 40]] += 20  # on one side of 0, as biased keys are
    exact = reference.attend(q, k, v, k_bits=32, v_bits=16)
    token, channel = (
        float((kernels.attend(q, k, v, k_bits=4, key_scales=scales) - exact).norm()) for scales in ("token", "channel")
    )
    assert 0.02 * exact.norm() < channel < 0.5 * token


@pytest.mark.parametrize("bits", [(4, 4), (2, 8)], ids=str)
@pytest.mark.usefixtures("isa", "threads")
def test_one_row_or_many_and_any_number_of_threads_give_the_same_bits(bits: tuple[int, int]) -> None:
    q, k, v = case(70, 330, 6, 2, 64)
    for options in ({"window": 200}, {"sinks": 4, "recent": 40}):
        kwargs = {"k_bits": bits[0], "v_bits": bits[1], "key_scales": "channel", **options}
        kernels.set_num_threads(1)
        together = kernels.attend(q, k, v, **kwargs)
        for count in (1, 2, 3):
            kernels.set_num_threads(count)
            assert_same(kernels.attend(q, k, v, **kwargs), together)
            for end in (1, 2, 17, 59, 60, 61, 70):  # row 59 fills a page
                n = 330 - 70 + end
                assert_same(kernels.attend(q[end - 1 : end], k[:n], v[:n], **kwargs), together[end - 1 : end])


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("which", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.usefixtures("isa")
def test_codes_hide_no_bad_number_from_a_row_that_sees_it(bits: int, which: int, bad: float) -> None:
    q, k, v = case(100, 100, 2, 1, 32)
    (k, v)[which][11, 0, 5] = bad
    out = kernels.attend(q, k, v, k_bits=bits, v_bits=bits, key_scales="channel")
    assert out[64:].isnan().all()  # those before see it in 16 bits
    if which == 0:  # a page is made of codes before the first row of the step looks at its keys
        assert out[:11].isfinite().all()


@pytest.mark.usefixtures("isa")
def test_pages_of_zeros_and_of_tiny_numbers() -> None:
    q, k, v = case(3, 130, 2, 1, 64)
    for factor in (0.0, 2.0**-30):  # below a float16's least scale everything is 0
        actual = kernels.attend(q, k * factor, v, k_bits=4, v_bits=16, key_scales="channel")
        expected = reference.attend(q, k * factor, v, k_bits=4, v_bits=16, key_scales="channel")
        assert (actual - expected).abs().max() <= 1e-6


def test_the_reference_itself_is_near_the_keys_it_rounds() -> None:
    k = torch.randn(64, 2, 48, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 48)
    k[..., ::5] = k[..., ::5].abs()
    for bits in (4, 2):
        codes, scale, zero = reference.key_columns(k, bits)
        back = scale * (codes - zero / (255 // (2**bits - 1)))
        # Half a step, plus what the zero is rounded by (half of one part of 255, cut off at an end), plus float16.
        allowed = scale * (0.5 + (2**bits - 1) / 510) * (1 + 2.0**-10) + 2.0**-11 * k.abs()
        assert ((back - k).abs() <= allowed).all()
        assert ((back - k).abs() > 0.4 * scale).any()


def test_an_unknown_kind_of_scales_is_an_error() -> None:
    q, k, v = case(1, 10, 1, 1, 16)
    with pytest.raises(ValueError, match="key_scales is 'row'; known: channel, token"):
        kernels.attend(q, k, v, k_bits=4, key_scales="row")
