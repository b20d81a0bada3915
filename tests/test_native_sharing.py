"""Copies of a sequence share pages: their memory, that no write is seen by another, and threads."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Tensor

from llmq import AutoModelForCausalLM, CalibConfig, KVCacheConfig, QuantScheme, quantize_model
from llmq.runtime.native import NativeDecoder
from llmq.runtime.sequence import Sequence, shared_nbytes

pytest.importorskip("llmq._core", reason="llmq was installed without its compiled module")

PAGE = 64  # tokens


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            out = tmp_path_factory.mktemp("sharing") / family
            calib = CalibConfig(calib="stdlib", nsamples=2, seqlen=32)
            source = tiny_model(family)
            made[family] = quantize_model(source, QuantScheme(4, 32), method="rtn", output=out, calib=calib).folder
        return made[family]

    return get


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def ids_of(n: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 384, (n,), generator=torch.Generator().manual_seed(seed))


def begun(decoder: NativeDecoder, kv: KVCacheConfig | None, *parts: Tensor) -> Sequence:
    made = decoder.new_sequence(kv=kv)
    for part in parts:
        decoder.forward([part], [made])
    return made


def test_a_copy_takes_memory_only_for_what_is_written(folders) -> None:
    decoder = NativeDecoder.of(load(folders("llama")))
    ids = ids_of(3 * PAGE + 10)
    first = begun(decoder, None, ids)
    page = first.nbytes // 4
    twins = [first.copy() for _ in range(3)]
    assert shared_nbytes([first, *twins]) == first.nbytes == twins[0].nbytes
    decoder.forward([ids[:1]], [twins[0]])
    assert shared_nbytes([first, *twins]) == first.nbytes + page  # the last page was copied
    decoder.forward([ids[:PAGE]], [twins[1]])
    assert shared_nbytes([first, *twins]) == first.nbytes + page + 2 * page  # copied, and one more
    del twins[0]
    assert shared_nbytes([first, *twins]) == first.nbytes + 2 * page
    whole = begun(decoder, None, ids[: 3 * PAGE])
    twin = whole.copy()
    decoder.forward([ids[:1]], [twin])
    assert shared_nbytes([whole, twin]) == 4 * page  # nothing of a full page is copied
    assert first.nbytes == 4 * page


@pytest.mark.parametrize("kv", ["16", "8", "4"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_no_write_is_seen_by_another(folders, family: str, kv: str) -> None:
    # Lengths at, before and behind the ends of pages; windows of 8 tokens in gemma3 that forget shared pages.
    decoder, config = NativeDecoder.of(load(folders(family))), KVCacheConfig.parse(kv)
    for length in (40, PAGE, 200, 300):
        ids, ends = ids_of(length), [ids_of(150, seed) for seed in (2, 3, 4)]
        original = begun(decoder, config, ids)
        twins = [original.copy(), original.copy()]
        found = [[], [], []]
        for a, b in ((0, 1), (1, 8), (8, 150)):  # in turn, so that one writes where another reads
            for i, sequence in enumerate((original, *twins)):
                found[i].append(decoder.forward([ends[i][a:b]], [sequence], output="all"))
        for end, parts in zip(ends, found, strict=True):
            alone = begun(decoder, config, ids)
            assert torch.equal(torch.cat(parts), decoder.forward([end], [alone], output="all"))


@pytest.mark.parametrize("kv", ["16", "4"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_crop_of_one_leaves_the_other(folders, family: str, kv: str) -> None:
    decoder, config = NativeDecoder.of(load(folders(family))), KVCacheConfig.parse(kv)
    ids, other = ids_of(150), ids_of(60, 2)
    original = begun(decoder, config, ids)
    twin = original.copy()
    before = original.nbytes
    twin.crop(130)
    decoder.forward([other], [twin])
    assert (original.length, original.nbytes, twin.length) == (150, before, 190)
    whole = begun(decoder, config, ids)
    assert torch.equal(decoder.forward([other], [original]), decoder.forward([other], [whole]))
    twin.crop(0)
    assert torch.equal(decoder.forward([ids], [twin]), decoder.forward([ids], [decoder.new_sequence(kv=config)]))


def test_rows_of_a_cache_share_their_prompt(folders) -> None:
    model = load(folders("gemma3"))
    ids = torch.stack([ids_of(200)])
    cache = model(input_ids=ids).past_key_values
    one = cache.nbytes
    twin = copy.deepcopy(cache)
    cache.batch_repeat_interleave(4)
    assert cache.nbytes == one == twin.nbytes
    cache.reorder_cache(torch.tensor([3, 3, 0, 1]))
    assert cache.nbytes == one
    ends = torch.stack([ids_of(5, seed) for seed in range(4)])
    found = model(input_ids=ends, past_key_values=cache).logits
    assert one < cache.nbytes < 4 * one
    for row, end in enumerate(ends):
        alone = model(input_ids=torch.cat([ids, end[None]], 1)).logits[0, 200:]
        assert torch.equal(found[row], alone)
    assert (twin.get_seq_length(), twin.nbytes) == (200, one)


def test_copies_are_used_in_several_threads(folders) -> None:
    decoder, config = NativeDecoder.of(load(folders("gemma3"))), KVCacheConfig.parse("8")
    ids, ends = ids_of(200), [ids_of(70, seed) for seed in range(4)]
    original = begun(decoder, config, ids)
    expected = [decoder.forward([e], [begun(decoder, config, ids)]) for e in ends]
    found: dict[int, list[Tensor]] = {}

    def work(i: int, own: Sequence) -> None:
        found[i] = []
        for _ in range(5):
            twin = own.copy()
            for token in ends[i][:-1]:
                decoder.forward([token[None]], [twin])
            found[i].append(decoder.forward([ends[i][-1:]], [twin]))

    workers = [threading.Thread(target=work, args=(i, original.copy())) for i in range(4)]
    del original
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    for i, e in enumerate(expected):
        assert len(found[i]) == 5
        assert all(torch.equal(f, e) for f in found[i])


def test_shared_windows_never_run_out_of_pages(folders) -> None:
    # Pages that are forgotten while others still hold them cannot be used again; token by token and in long steps.
    decoder = NativeDecoder.of(load(folders("gemma3")))
    config = KVCacheConfig.parse("4")
    ids = ids_of(480)
    plain = begun(decoder, config, ids[:300])
    keep = []
    for step in (1, 7, 64, 150):
        shared, alone = plain.copy(), begun(decoder, config, ids[:300])
        for part in ids[300:450].split(step):
            keep.append(shared.copy())
            assert torch.equal(decoder.forward([part], [shared]), decoder.forward([part], [alone]))


OUT_OF_MEMORY = """
import resource, sys, torch
from transformers import AutoModelForCausalLM
import llmq
from llmq.runtime.native import NativeDecoder
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], max_position_embeddings=1 << 24).eval()
decoder = NativeDecoder.of(model)
ids = torch.randint(3, 384, (100,), generator=torch.Generator().manual_seed(1))
sequence, twin = decoder.new_sequence(), decoder.new_sequence()
for s in (sequence, twin):
    decoder.forward([ids[:90]], [s])
long = torch.full((1 << 20,), 5)
before = sequence.nbytes
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 27), -1))
try:
    decoder.forward([long], [sequence])
except MemoryError as error:
    print(error)
assert (sequence.length, sequence.nbytes) == (90, before)
assert torch.equal(decoder.forward([ids[90:]], [sequence]), decoder.forward([ids[90:]], [twin]))
cache = model(input_ids=ids[None, :90]).past_key_values
try:
    model.generate(torch.cat([ids[:90], long])[None], past_key_values=cache, max_new_tokens=2)
except MemoryError as error:
    print(error)
assert cache.get_seq_length() == 90
print("intact")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")
def test_no_memory_for_a_prompt_leaves_the_cache_as_it_was(folders) -> None:
    command = [sys.executable, "-c", OUT_OF_MEMORY, str(folders("llama"))]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    message = "no memory for 1048576 more tokens in the key/value cache: it takes"
    assert run.stdout.count(message) == 2
    assert "shorten the prompt, or cache fewer bits" in run.stdout
    assert run.stdout.endswith("intact\n")


def test_a_sequence_in_use_is_not_copied(folders) -> None:
    # A thread runs step after step, so that it is nearly always in one; a step that meets a copy is refused as well.
    decoder = NativeDecoder.of(load(folders("llama")))
    sequence, ids, stop = decoder.new_sequence(), ids_of(500), threading.Event()

    def work() -> None:
        while not stop.is_set():
            with contextlib.suppress(ValueError):
                decoder.forward([ids], [sequence])
                sequence.crop(0)

    def copy_on_and_on() -> None:
        for _ in range(100_000):
            sequence.copy()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        with pytest.raises(ValueError, match="in use by another call"):
            copy_on_and_on()
    finally:
        stop.set()
        worker.join()
