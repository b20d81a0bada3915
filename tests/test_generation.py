"""``generate`` and ``forward`` of adopted models against the same model in the Hugging Face graph.

With float activations both compute the same numbers up to rounding, so tokens must be equal; the tiny models' logits
have a standard deviation of about 2.5, and no tie as close as 1e-4 stands in the texts used here.
"""

from __future__ import annotations

import copy
import logging
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, GenerationConfig, StoppingCriteria, TextIteratorStreamer, pipeline
from transformers.generation import LogitsProcessor
from transformers.generation.stopping_criteria import StopStringCriteria

from llmq import AutoModelForCausalLM, CalibConfig, QuantScheme, kernels, quantize_model, set_activation_bits
from llmq.runtime import options
from llmq.runtime.cache import NativeCache
from llmq.runtime.causal_lm import NativeCausalLM, graph_class
from llmq.runtime.generation import NgramIndex
from llmq.runtime.native import NativeDecoder
from llmq.runtime.stopping import StopStrings

pytest.importorskip("llmq._core", reason="llmq was installed without its compiled module")

FAMILIES = ("llama", "qwen2", "gemma3")
CONTEXT = 512
Folders = dict[str, Path]


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory) -> Folders:
    calib = CalibConfig(calib="stdlib", nsamples=2, seqlen=32)
    made = {}
    for family in (*FAMILIES, "gpt_neox"):
        out = tmp_path_factory.mktemp("generation") / family
        made[family] = quantize_model(tiny_model(family), QuantScheme(4, 32), method="rtn", output=out, calib=calib)
    return {family: result.folder for family, result in made.items()}


@pytest.fixture(scope="module")
def models(folders) -> dict[str, Any]:
    """Shared: do not change them."""
    return {family: load(folder) for family, folder in folders.items()}


@pytest.fixture(params=FAMILIES)
def model(request, models) -> Any:
    return models[request.param]


@pytest.fixture
def gemma(models) -> Any:
    return models["gemma3"]


@pytest.fixture(scope="module")
def tokenizer(folders) -> Any:
    return AutoTokenizer.from_pretrained(folders["gemma3"])


@pytest.fixture
def said(caplog, monkeypatch):
    """The warnings of this test, each of which can be said anew."""
    monkeypatch.setattr(options, "_said", set())
    caplog.set_level(logging.WARNING, "llmq")
    return lambda: [r.getMessage() for r in caplog.records if r.name.startswith("llmq")]


def load(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    set_activation_bits(model, 16)
    return model


def graph(model: Any) -> Any:
    """The same modules in the Hugging Face graph."""
    made = copy.copy(model)
    made.__class__ = graph_class(model)
    return made


def prompt(*lengths: int) -> dict[str, Tensor]:
    """Random prompts, padded on the left."""
    draw = torch.Generator().manual_seed(7)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        ids[row, -n:] = torch.randint(3, 384, (n,), generator=draw)
        mask[row, -n:] = 1
    return {"input_ids": ids, "attention_mask": mask}


def same_as_graph(model: Any, inputs: dict[str, Tensor], **arguments: Any) -> Tensor:
    found = model.generate(**inputs, **arguments)
    expected = graph(model).generate(**inputs, **arguments)
    assert found.tolist() == expected.tolist()
    return found


# What generate returns


def test_greedy_tokens_are_the_graphs(model, said):
    same_as_graph(model, prompt(12), max_new_tokens=30, do_sample=False)
    same_as_graph(model, prompt(12), max_length=20, do_sample=False)
    assert said() == []


def test_a_padded_batch_is_its_rows_one_by_one(model, said):
    inputs = prompt(3, 17, 9)
    batch = same_as_graph(model, inputs, max_new_tokens=12, do_sample=False)
    for row, ids, mask in zip(batch, inputs["input_ids"], inputs["attention_mask"], strict=True):
        alone = model.generate(ids[mask == 1][None], max_new_tokens=12, do_sample=False)
        assert row[-12:].tolist() == alone[0, -12:].tolist()
    assert said() == []


def test_rows_that_end_early_are_padded(gemma):
    inputs = prompt(5, 6, 7)
    free = gemma.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    ends = [int(free[0, 10]), int(free[1, 20])]
    found = same_as_graph(gemma, inputs, max_new_tokens=20, do_sample=False, eos_token_id=ends)
    assert (found[0, 11:] == 0).all()
    assert found.shape[1] > 11
    same_as_graph(gemma, inputs, max_new_tokens=20, min_new_tokens=9, do_sample=False, eos_token_id=ends)
    same_as_graph(gemma, inputs, max_new_tokens=20, min_length=14, do_sample=False, eos_token_id=ends)


def test_repetition_penalty_and_the_folders_own_options(gemma, said):
    inputs = prompt(4, 11)
    plain = gemma.generate(**inputs, max_new_tokens=25, do_sample=False)
    found = same_as_graph(gemma, inputs, max_new_tokens=25, do_sample=False, repetition_penalty=1.6)
    assert not torch.equal(found, plain)
    own = copy.copy(gemma)
    own.generation_config = GenerationConfig(repetition_penalty=1.6, max_new_tokens=25, pad_token_id=0, eos_token_id=1)
    assert own.generate(**inputs).tolist() == found.tolist()
    assert said() == []


def test_seeds_decide_what_is_drawn(gemma, said):
    inputs = prompt(6, 4)
    arguments = {"do_sample": True, "max_new_tokens": 15, "temperature": 1.3, "top_p": 0.95, "min_p": 0.01}
    torch.manual_seed(1)
    first = gemma.generate(**inputs, **arguments)
    assert not torch.equal(first, gemma.generate(**inputs, **arguments))
    torch.manual_seed(1)
    assert torch.equal(first, gemma.generate(**inputs, **arguments))
    before = torch.get_rng_state()
    gemma.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(before, torch.get_rng_state()), "greedy decoding draws nothing"
    assert said() == []


def test_several_sequences_of_one_prompt(gemma):
    inputs, arguments = prompt(8, 5), {"do_sample": True, "max_new_tokens": 10, "temperature": 2.0}
    torch.manual_seed(2)
    found = gemma.generate(**inputs, **arguments, num_return_sequences=3)
    assert found.shape[0] == 6
    assert len({tuple(row) for row in found.tolist()}) == 6
    torch.manual_seed(2)  # the first row draws the same numbers alone
    assert torch.equal(found[0], gemma.generate(inputs["input_ids"][:1], **arguments)[0])


def test_sampling_follows_the_models_distribution(gemma):
    ids = prompt(6)["input_ids"]
    logits = gemma(ids).logits[0, -1].double()
    torch.manual_seed(3)
    draws = 3000
    rows = gemma.generate(ids, do_sample=True, top_k=0, max_new_tokens=1, num_return_sequences=draws)
    counts = torch.bincount(rows[:, -1], minlength=384).double()
    expected = logits.softmax(-1) * draws
    usual = expected >= 5
    degrees = int(usual.sum()) - 1
    # Chi-square: mean = degrees, standard deviation sqrt(2 degrees); 5 of them.
    chi2 = float(((counts - expected)[usual] ** 2 / expected[usual]).sum())
    assert chi2 < degrees + 5 * (2 * degrees) ** 0.5


def test_dictionary_holds_sequences_and_a_cache_to_go_on_with(model):
    inputs = prompt(9)
    whole = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    first = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, NativeCache)
    assert first.past_key_values.get_seq_length() == 9 + 8 - 1
    fork = copy.deepcopy(first.past_key_values)
    for cache in (first.past_key_values, fork):
        rest = model.generate(first.sequences, past_key_values=cache, max_new_tokens=12, do_sample=False)
        assert torch.equal(rest, whole)


# Stopping and streaming


class EndsAfter(StoppingCriteria):
    """Ends a row at a token of the caller's choice, and looks at what it is given."""

    def __init__(self, token: int) -> None:
        self.token, self.shapes = token, []

    def __call__(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        self.shapes.append(tuple(input_ids.shape))
        return input_ids[:, -1] == self.token


def test_stopping_criteria_of_the_caller(gemma, said):
    inputs = prompt(5, 6)
    free = gemma.generate(**inputs, max_new_tokens=16, do_sample=False)
    criterion = EndsAfter(int(free[1, 10]))
    found = gemma.generate(**inputs, max_new_tokens=16, do_sample=False, stopping_criteria=[criterion])
    again = graph(gemma).generate(
        **inputs, max_new_tokens=16, do_sample=False, stopping_criteria=[EndsAfter(criterion.token)]
    )
    assert torch.equal(found, again)
    assert criterion.shapes[0] == (2, 7)
    assert said() == []


def test_stop_strings(gemma, tokenizer, said):
    arguments = {**prompt(6), "max_new_tokens": 60, "do_sample": True, "temperature": 2.0, "tokenizer": tokenizer}
    torch.manual_seed(5)
    free = gemma.generate(**arguments)[0]
    places = [i for i in range(20, 60) if (t := tokenizer.decode(free[i])).isascii() and t.strip()]
    stop = tokenizer.decode(free[places[0]])
    torch.manual_seed(5)
    found = gemma.generate(**arguments, stop_strings=[stop, "no such text"])[0]
    assert found.tolist() == free[: len(found)].tolist()
    assert len(found) <= places[0] + 1
    assert stop in tokenizer.decode(found[6:])
    assert stop not in tokenizer.decode(found[6:-1])
    with pytest.raises(ValueError, match="tokenizer"):
        gemma.generate(**prompt(6), max_new_tokens=3, stop_strings=["x"])
    assert said() == []


def test_stop_strings_end_where_transformers_criterion_ends(tokenizer):
    ids = tokenizer(
        "def parse(args, name):\n    return json.loads(args[name])  # parse(args)", return_tensors="pt"
    ).input_ids
    strings = ["args", "ame):", "ON", "  return", "s[", "parse(args)"]
    for chosen in (strings, *([s] for s in strings)):
        ours, theirs = StopStrings(chosen, tokenizer), StopStringCriteria(tokenizer, chosen)
        found = [bool(ours(ids[:, :n])) for n in range(1, ids.shape[1] + 1)]
        assert found == [bool(theirs(ids[:, :n], None)) for n in range(1, ids.shape[1] + 1)]
        assert any(found) == (chosen != ["ON"])


def test_max_time_ends_the_loop(gemma):
    class Slow(StoppingCriteria):
        def __call__(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
            time.sleep(0.02)
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    found = gemma.generate(**prompt(5), max_new_tokens=300, max_time=0.1, stopping_criteria=[Slow()], eos_token_id=None)
    assert 6 <= found.shape[1] < 20


class Recorder:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


def test_streamers_get_what_transformers_gives_them(gemma, said):
    for lengths in ((6,), (3, 5)):
        ours, theirs = Recorder(), Recorder()
        arguments = {**prompt(*lengths), "max_new_tokens": 7, "do_sample": False}
        gemma.generate(**arguments, streamer=ours)
        graph(gemma).generate(**arguments, streamer=theirs)
        assert ours.seen == theirs.seen
    assert said() == []


def test_text_is_streamed_from_a_thread(gemma, tokenizer):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    arguments = {**prompt(6), "max_new_tokens": 12, "do_sample": False}
    thread = threading.Thread(target=gemma.generate, kwargs={**arguments, "streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(gemma.generate(**arguments)[0, 6:])


def test_an_interrupt_between_two_tokens_leaves_all_in_order(gemma):
    class Interrupts(StoppingCriteria):
        def __call__(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
            if input_ids.shape[1] == 12:
                raise KeyboardInterrupt
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    inputs, cache = prompt(8), NativeCache()
    with pytest.raises(KeyboardInterrupt):
        gemma.generate(**inputs, max_new_tokens=20, stopping_criteria=[Interrupts()], past_key_values=cache)
    assert cache.get_seq_length() == cache.sequences[0].length == 11
    same_as_graph(gemma, inputs, max_new_tokens=10, do_sample=False)


# Prompt lookup


def test_prompt_lookup_gives_the_plain_tokens(model, said):
    ids = prompt(10)["input_ids"].repeat(1, 4)  # a text that repeats itself
    for arguments in ({"do_sample": False}, {"do_sample": False, "repetition_penalty": 1.3}, {"do_sample": True}):
        results = []
        for extra in (
            {},
            {"prompt_lookup_num_tokens": 4},
            {"prompt_lookup_num_tokens": 9, "max_matching_ngram_size": 3},
        ):
            torch.manual_seed(4)
            results.append(model.generate(ids, max_new_tokens=40, **arguments, **extra).tolist())
        assert results[0] == results[1] == results[2]
    assert said() == []


def test_prompt_lookup_takes_fewer_steps_and_stops_where_it_must(gemma, monkeypatch):
    steps = []
    forward = NativeDecoder.forward

    def counted(self: Any, tokens: Any, *args: Any, **kwargs: Any) -> Tensor:
        steps.append(len(tokens[0]))
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(NativeDecoder, "forward", counted)
    ids = prompt(10)["input_ids"]
    text = gemma.generate(ids, max_new_tokens=60, do_sample=False)
    lookup = {"do_sample": False, "prompt_lookup_num_tokens": 5}
    steps.clear()
    # The text itself stands in the prompt, so it is guessed right as long as the model repeats it.
    ours, cache = Recorder(), NativeCache()
    found = gemma.generate(text, max_new_tokens=30, streamer=ours, past_key_values=cache, **lookup)
    assert max(steps[1:]) > 1
    assert found.tolist() == gemma.generate(text, max_new_tokens=30, do_sample=False).tolist()
    assert sum(ours.seen[1:-1], []) == found[0, 70:].tolist()
    assert cache.sequences[0].length == cache.get_seq_length() == found.shape[1] - 1
    end = int(found[0, 85])
    ended = gemma.generate(text, max_new_tokens=30, eos_token_id=end, **lookup)
    assert ended.tolist() == gemma.generate(text, max_new_tokens=30, eos_token_id=end, do_sample=False).tolist()


def test_ngrams_are_looked_up_longest_and_latest_first():
    index = NgramIndex(2)
    index.extend([1, 2, 3, 9, 2, 4, 1, 2])
    assert index.lookup(3) == [3, 9, 2]  # after (1, 2), though 2 alone was last followed by 4
    index.extend([7, 2])
    assert index.lookup(2) == [7, 2]  # (7, 2) is new; 2 was last followed by 7
    assert index.lookup(0) == []
    assert NgramIndex(2).lookup(3) == []


# Options that go to transformers' own loop


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=2"),
        ({"num_beams": 3}, "num_beams=3"),
        ({"num_beams": 2, "repetition_penalty": 1.3, "length_penalty": 0.5}, "num_beams=2"),
        ({"suppress_tokens": [5, 6]}, "suppress_tokens"),
        ({"use_cache": False}, "use_cache=False"),
        ({"prefix_allowed_tokens_fn": lambda _row, _ids: [4, 8, 9]}, "logits processor PrefixConstrained"),
    ],
)
def test_other_options_run_in_transformers_loop_and_are_named_once(gemma, said, arguments, named):
    for _ in range(2):
        same_as_graph(gemma, prompt(7, 4), max_new_tokens=9, do_sample=False, **arguments)
    messages = said()
    assert len(messages) == 1
    assert named in messages[0]
    assert "transformers' own loop runs" in messages[0]


def test_an_option_nobody_has_heard_of_is_not_ignored(gemma, said):
    config = GenerationConfig(max_new_tokens=3, pad_token_id=0, option_of_the_future=3)
    gemma.generate(**prompt(4), generation_config=config)
    assert "option_of_the_future=3" in said()[0]


def test_logits_processors_of_the_caller(gemma, said):
    class Only(LogitsProcessor):
        def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([42]), 0.0)

    found = gemma.generate(**prompt(4), max_new_tokens=5, do_sample=False, logits_processor=[Only()])
    assert found[0, 4:].tolist() == [42] * 5
    assert "Only" in said()[0]


def test_assisted_decoding_with_a_model_gives_the_plain_tokens(gemma, models, said):
    inputs = prompt(9)
    plain = gemma.generate(**inputs, max_new_tokens=20, do_sample=False)
    helper = copy.deepcopy(models["gemma3"])
    found = gemma.generate(**inputs, max_new_tokens=20, do_sample=False, assistant_model=helper)
    assert torch.equal(found, plain)
    assert any("assisted decoding" in message for message in said())


def test_scores_and_hidden_states_can_be_had(gemma):
    arguments = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    wanted = {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    found = gemma.generate(**prompt(5), **arguments, **wanted)
    expected = graph(gemma).generate(**prompt(5), **arguments, **wanted)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    assert len(found.hidden_states) == 4
    # transformers leaves its collecting hooks behind; the native decoder must not mistake them for somebody's.
    assert isinstance(gemma.generate(**prompt(5), **arguments).past_key_values, NativeCache)


def test_a_cache_of_transformers_own_is_used(gemma, said):
    cache = DynamicCache(config=gemma.config)
    inputs = prompt(6)
    found = gemma.generate(**inputs, max_new_tokens=5, do_sample=False, past_key_values=cache)
    assert cache.get_seq_length() == 10
    assert torch.equal(found, gemma.generate(**inputs, max_new_tokens=5, do_sample=False))
    assert "past_key_values of class DynamicCache" in said()[0]


def test_a_family_without_a_decoder_says_so_and_works(models, said):
    found = models["gpt_neox"].generate(**prompt(5), max_new_tokens=4, do_sample=False)
    assert found.shape == (1, 9)
    assert any("'gpt_neox' has no native decoder" in message for message in said())


# Bad input


def test_bad_prompts_are_errors(gemma):
    with pytest.raises(ValueError, match=r"the prompt is empty: input_ids has shape \(1, 0\); give at least one token"):
        gemma.generate(torch.zeros(1, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match="the prompt has 600 tokens; the model's context is 512: shorten it"):
        gemma.generate(torch.full((1, 600), 5), max_new_tokens=5)
    for bad in (384, -1):
        with pytest.raises(ValueError, match=f"token id {bad}"):
            gemma.generate(torch.tensor([[4, bad, 4]]), max_new_tokens=5)
    inputs = prompt(3, 4)
    inputs["attention_mask"][0] = 0
    with pytest.raises(ValueError, match="row 0 of the prompt is empty: attention_mask shows none of its tokens"):
        gemma.generate(**inputs, max_new_tokens=5)
    with pytest.raises(ValueError, match="input_ids are empty"):
        gemma(torch.zeros(2, 0, dtype=torch.int64))


def test_the_end_of_the_context_ends_the_text(gemma, said):
    ids = prompt(CONTEXT - 3)["input_ids"]
    found = gemma.generate(ids, max_new_tokens=50, do_sample=False, eos_token_id=None)
    assert found.shape[1] == CONTEXT + 1
    assert "beyond the model's context of 512 positions" in said()[0]


# Threads


def test_several_threads_on_several_models(models):
    jobs = [(models[f], prompt(n)) for f in FAMILIES for n in (5, 9)]
    arguments = {"max_new_tokens": 25, "do_sample": False}
    alone = [model.generate(**inputs, **arguments).tolist() for model, inputs in jobs]
    found: dict[int, Any] = {}

    def work(i: int) -> None:
        model, inputs = jobs[i]
        found[i] = [model.generate(**inputs, **arguments).tolist() for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(jobs))] == [[tokens] * 3 for tokens in alone]


def test_kernels_follow_torchs_threads_unless_told_otherwise(gemma, monkeypatch):
    torch_before, before = torch.get_num_threads(), kernels.num_threads()
    monkeypatch.delenv("LLMQ_NUM_THREADS", raising=False)
    try:
        torch.set_num_threads(3)
        gemma.generate(**prompt(3), max_new_tokens=2)
        assert kernels._core.num_threads() == 3
        kernels.set_num_threads(2)
        gemma(**prompt(3))
        assert kernels.num_threads() == 2, "the last word counts"
        monkeypatch.setenv("LLMQ_NUM_THREADS", "2")
        torch.set_num_threads(4)
        gemma(**prompt(3))
        assert kernels.num_threads() == 2
        with pytest.raises(ValueError, match="number of threads is 0; use 1 to 1024"):
            kernels.set_num_threads(0)
    finally:
        torch.set_num_threads(torch_before)
        kernels.set_num_threads(before)


# The model as an object


def test_an_adopted_model_is_what_it_was(folders, tmp_path):
    model = load(folders["llama"])
    assert isinstance(model, NativeCausalLM)
    assert isinstance(model, graph_class(model))
    assert type(model).__name__ == "LlamaForCausalLM"
    ids = prompt(5)["input_ids"]
    expected = model(ids).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is type(model)
        assert torch.equal(copied(ids).logits, expected)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config.architectures == ["LlamaForCausalLM"]
    assert torch.equal(again(ids).logits, expected)


def test_pipeline_of_transformers_runs_natively(folders, said):
    generate = pipeline("text-generation", model=str(folders["llama"]), tokenizer=str(folders["llama"]))
    outputs = generate(["import", "def main"], max_new_tokens=4, batch_size=2, do_sample=False)
    assert [o[0]["generated_text"][:6] for o in outputs] == ["import", "def ma"]
    assert said() == []
