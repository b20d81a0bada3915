"""The compiled sampler: its passes against their twins, its distributions against transformers' own processors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from kernel_cases import assert_same, core, isa, seeded  # noqa: F401 - a fixture
from torch import Tensor
from transformers.generation import logits_process as lp

from llmq.kernels import reference

NEUTRAL = {"greedy": False, "repetition_penalty": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
SIZES = (1, 5, 384, 5000)


def logits_of(size: int, spread: float = 3.0) -> Tensor:
    return torch.randn(size, generator=seeded(size, spread)) * spread


def sample(
    logits: Tensor, *, history=(), banned=(), stream=0, position=0, seed=0, **options: Any
) -> tuple[int, Tensor]:
    """The token and the distribution f32[V] it was drawn from; ``logits`` are left alone."""
    sampler = core.Sampler(vocabulary=len(logits), seed=seed, **{**NEUTRAL, **options})
    x, out = logits.clone(), torch.full_like(logits, torch.nan)
    before, never = torch.tensor(history, dtype=torch.int64), torch.tensor(banned, dtype=torch.int64)
    token = sampler.sample(
        x.data_ptr(), before.data_ptr(), len(before), never.data_ptr(), len(never), stream, position, out.data_ptr()
    )
    return token, out


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("size", [1, 31, 32, 255, 256, 257, 5000])
def test_block_max_is_the_twins(size):
    x = logits_of(size)
    x[size // 2] = -math.inf
    for special in (None, math.inf, math.nan, -math.nan):
        if special is not None:
            x[size - 1] = special
        out = torch.empty(-(-size // reference.LOGIT_BLOCK))
        core.block_max(x=x.data_ptr(), n=size, out=out.data_ptr())
        assert_same(out, reference.block_max(x))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("size", [1, 16, 31, 33, 256])
def test_exp_sum_is_near_the_twin(size):
    x = logits_of(size, 20.0).clamp(-110, 80)
    out = torch.empty(size)
    total = core.exp_sum(x=x.data_ptr(), n=size, shift=80.0, scale=0.7, out=out.data_ptr())
    exact = torch.exp((x - 80.0).double() * 0.7)
    # Product and difference are rounded (2^-24 each, of up to 133), then 2^-22 of the polynomial.
    limit = exact * (133 * 2**-23 + 2**-22)
    assert ((out - exact).abs() <= limit + 1.2e-38).all()  # below the smallest normal float it may be 0
    assert ((reference.exp_sum(x, 80.0, 0.7)[0] - exact).abs() <= limit + 1.2e-38).all()
    assert total == pytest.approx(float(out.double().sum()), rel=size * 2**-24)


def test_exp_sum_is_the_same_bits_everywhere(isa):  # noqa: F811
    x, out, first = logits_of(5000, 20.0), torch.empty(5000), torch.empty(5000)
    shift = float(x.max())
    total = core.exp_sum(x=x.data_ptr(), n=5000, shift=shift, scale=1.0, out=out.data_ptr())
    core.use_isa("scalar")
    assert total == core.exp_sum(x=x.data_ptr(), n=5000, shift=shift, scale=1.0, out=first.data_ptr())
    core.use_isa(isa)
    assert_same(out, first)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_its_authors_vectors(counter, key, expected):
    assert tuple(core.philox(counter, key)) == expected


def test_uniform_numbers_are_uniform_and_differ_by_every_argument():
    numbers = [
        core.uniform(seed, stream, position) for seed in range(20) for stream in range(20) for position in range(25)
    ]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= u < 1 for u in numbers)
    counts = torch.histc(torch.tensor(numbers, dtype=torch.float64), 10, 0, 1)
    # 10,000 draws in 10 bins: standard deviation 30, and 5 of them.
    assert (counts - 1000).abs().max() < 150


def test_greedy_takes_the_first_of_equal_logits():
    for size in SIZES:
        x = logits_of(size).round()
        assert sample(x, greedy=True)[0] == int(x.argmax())
    x = torch.full((600,), -2.0)
    x[[300, 599]] = 1.0
    assert sample(x, greedy=True)[0] == 300
    assert sample(torch.tensor([-0.0, 0.0, -1.0]), greedy=True)[0] in (0, 1)


COMBINATIONS = [
    dict(zip(("temperature", "top_k", "top_p", "min_p"), values, strict=True))
    for values in itertools.product((1.0, 0.6, 1.7), (0, 1, 7, 50, 4000), (1.0, 0.9, 0.3), (0.0, 0.02, 0.5))
]


def kept_by_transformers(logits: Tensor, history: list[int], penalty: float, o: dict[str, Any]) -> Tensor:
    """Scores f32[V] after transformers' processors, -inf where a token is out."""
    processors = lp.LogitsProcessorList()
    if penalty != 1.0:
        processors.append(lp.RepetitionPenaltyLogitsProcessor(penalty))
    if o["temperature"] != 1.0:
        processors.append(lp.TemperatureLogitsWarper(o["temperature"]))
    if o["top_k"]:
        processors.append(lp.TopKLogitsWarper(o["top_k"]))
    if o["top_p"] < 1.0:
        processors.append(lp.TopPLogitsWarper(o["top_p"]))
    if o["min_p"]:
        processors.append(lp.MinPLogitsWarper(o["min_p"]))
    return processors(torch.tensor([history], dtype=torch.int64), logits[None].clone())[0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spread", [0.7, 4.0])
def test_distribution_is_that_of_transformers_processors(size, spread):
    logits = logits_of(size, spread)
    history = torch.randint(0, size, (9,), generator=seeded(size)).tolist() * 2
    for o, penalty in itertools.product(COMBINATIONS, (1.0, 1.4)):
        scores = kept_by_transformers(logits, history, penalty, o)
        _, found = sample(logits, history=history, repetition_penalty=penalty, **o)
        agree = (found > 0) == scores.isfinite()
        if not agree.all():
            # Cumulative sums of up to `size` fp32 terms decide about the token on the edge; nothing else may differ.
            plain = kept_by_transformers(logits, history, penalty, {**o, "top_p": 1.0, "min_p": 0.0})
            order = plain.argsort()
            below = plain.double().softmax(-1)[order].cumsum(-1)[order.argsort()]
            on_edge = (below - (1 - o["top_p"])).abs() < size * 2**-23
            assert (agree | on_edge).all(), (o, penalty)
        # On our own support against exact arithmetic: the exponent, up to 60 here, is rounded twice, then 2^-22 of exp.
        exact = kept_by_transformers(logits.double(), history, penalty, {**o, "top_k": 0, "top_p": 1.0, "min_p": 0.0})
        exact = exact.masked_fill(found == 0, -math.inf).softmax(-1)
        assert torch.allclose(found.double(), exact, rtol=60 * 2**-23 + 2**-20, atol=0), (o, penalty)


def test_draws_follow_the_distribution():
    logits = logits_of(300, 1.0)
    for o in ({}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.1}):
        draws, (_, p) = 4000, sample(logits, **o)
        tokens = torch.tensor([sample(logits, position=i, seed=5, **o)[0] for i in range(draws)])
        counts = torch.bincount(tokens, minlength=300).double()
        assert (p[tokens] > 0).all()
        # Chi-square over tokens expected at least 5 times: mean = degrees, deviation sqrt(2 degrees); 5 of them.
        usual = p.double() * draws >= 5
        degrees = int(usual.sum()) - 1
        chi2 = float((((counts - p * draws) ** 2) / (p * draws))[usual].sum())
        assert chi2 < degrees + 5 * math.sqrt(2 * degrees)


def test_a_draw_depends_on_seed_row_and_position_only():
    logits = logits_of(5000, 1.0)
    token = sample(logits, seed=3, stream=2, position=7)[0]
    assert token == sample(logits, seed=3, stream=2, position=7)[0]
    others = [sample(logits, seed=4, stream=2, position=7)[0], sample(logits, seed=3, stream=1, position=7)[0]]
    assert token not in [*others, sample(logits, seed=3, stream=2, position=8)[0]]


def test_banned_tokens_never_come():
    logits = torch.tensor([0.0, 5.0, 1.0])
    assert sample(logits, greedy=True, banned=[1])[0] == 2
    assert sample(logits, banned=[1, 2])[1].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(bad):
    x = logits_of(700)
    x[650] = bad
    for greedy in (True, False):
        with pytest.raises(ValueError, match="the largest logit is .*: the model overflows or its weights are damaged"):
            sample(x, greedy=greedy)
    with pytest.raises(ValueError, match="the largest logit is -inf"):
        sample(torch.zeros(2), banned=[0, 1])


@pytest.mark.parametrize(
    ("option", "value"),
    [("temperature", 0.0), ("temperature", math.nan), ("top_k", -1), ("top_p", 1.5), ("min_p", -0.1)]
    + [("repetition_penalty", 0.0), ("repetition_penalty", math.inf)],
)
def test_options_out_of_range_are_an_error(option, value):
    with pytest.raises(ValueError, match=f"{option} is .*; use "):
        sample(torch.zeros(3), **{option: value})
    with pytest.raises(IndexError, match="history holds token 3; the vocabulary has 3"):
        sample(torch.zeros(3), history=[3], repetition_penalty=1.2)
