"""The block runner against the model's own forward pass."""

import pytest
import torch

from llmq.blockwise import BlockRunner, block_inputs, verified_tails
from llmq.models.families import FAMILIES
from llmq.models.load import materialize, open_model
from llmq.solvers.hessian import InputStats

FAMILY_NAMES = [f.name for f in FAMILIES]


def hidden_states(folder, tokens):
    """Hidden states entering each block and leaving the last, by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen = {}
    names = open_model(folder).block_names
    for i, name in enumerate(names):
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, kwargs, i=i: seen.update({i: args[0] if args else kwargs["hidden_states"]}),
            with_kwargs=True,
        )
    model.get_submodule(names[-1]).register_forward_hook(
        lambda _m, _a, out: seen.update({len(names): out[0] if isinstance(out, tuple) else out})
    )
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    return seen


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_blocks_run_one_by_one_give_the_models_hidden_states(tiny_model, family):
    folder = tiny_model(family)
    tokens = torch.randint(3, 200, (3, 40), generator=torch.Generator().manual_seed(1))
    source = open_model(folder)
    hidden, calls = block_inputs(source, tokens)
    tails = None
    for i, name in enumerate(source.block_names):
        for window in range(3):
            want = hidden_states(folder, tokens[window : window + 1])
            # The same operations in the same order; only the batch of the attention may differ.
            assert torch.allclose(hidden[window], want[i], rtol=1e-5, atol=1e-5), f"block {i}, window {window}"
        with materialize(source.block(i), name, source.reader) as block:
            runner = BlockRunner(block, calls[i], hidden, {})
            tails = tails or verified_tails(runner, source.family)
            assert set(tails) == set(source.family.tails), "each tail of the row must hold on the real module"
            runner.tails = tails
            everything = runner.observe_all(source.family.linear_groups)
            for group in source.family.linear_groups:
                stats = runner.observe(group).train
                assert torch.allclose(stats.H, everything[group[0]].H, rtol=1e-5, atol=1e-6), group
                runner.settle(group)
            runner.advance()
    assert torch.allclose(hidden[2], hidden_states(folder, tokens[2:])[len(calls)], rtol=1e-4, atol=1e-5)
    assert all(p.is_meta for p in source.model.parameters()), "nothing may stay in memory"


def test_linears_of_a_group_share_their_input(tiny_model):
    """The runner listens to the first linear of a group only: the rows of FAMILIES must be right about it."""
    for family in FAMILY_NAMES:
        source = open_model(tiny_model(family))
        hidden, calls = block_inputs(source, torch.randint(3, 200, (1, 24)))
        with materialize(source.block(0), source.block_names[0], source.reader) as block, torch.no_grad():
            runner = BlockRunner(block, calls[0], hidden, {})
            names = [n for group in source.family.linear_groups for n in group]
            alone = runner.observe_all([(n,) for n in names])
            for group in source.family.linear_groups:
                for name in group:
                    assert torch.equal(alone[name].H, alone[group[0]].H), (family, name)


def test_memory_limit_of_kept_inputs_changes_nothing(tiny_model, monkeypatch):
    source = open_model(tiny_model("llama"))
    tokens = torch.randint(3, 200, (2, 32))
    outputs = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr("llmq.blockwise.MEMO_BYTES", limit)
        hidden, calls = block_inputs(source, tokens)
        with materialize(source.block(0), source.block_names[0], source.reader) as block:
            runner = BlockRunner(block, calls[0], hidden, {})
            runner.tails = verified_tails(runner, source.family)
            for group in source.family.linear_groups:
                runner.observe(group)
                runner.settle(group)
            assert len(runner._settled) == (2 if limit else 0)
            runner.advance()
        outputs.append(torch.cat(hidden))
    assert torch.allclose(*outputs, rtol=1e-5, atol=1e-6)


def test_an_error_inside_the_model_is_not_swallowed(tiny_model):
    source = open_model(tiny_model("llama"))
    hidden, calls = block_inputs(source, torch.randint(3, 200, (1, 16)))
    with materialize(source.block(0), source.block_names[0], source.reader) as block:
        block.mlp.act_fn.forward = lambda _x: (_ for _ in ()).throw(ValueError("broken activation"))
        with pytest.raises(ValueError, match="broken activation"):
            BlockRunner(block, calls[0], hidden, {}).run(0)


def test_stats_type(tiny_model):
    source = open_model(tiny_model("qwen2"))
    hidden, calls = block_inputs(source, torch.randint(3, 200, (1, 16)))
    with materialize(source.block(0), source.block_names[0], source.reader) as block:
        stats = BlockRunner(block, calls[0], hidden, {}).observe(("mlp.down_proj",)).train
    assert isinstance(stats, InputStats)
    assert stats.n_tokens == 16


@pytest.mark.parametrize("last", [False, True])
@torch.no_grad()
def test_a_teacher_pairs_the_original_models_inputs_with_the_quantized_ones(tiny_model, last: bool) -> None:
    """Statistics of the pair, split into fitted and held-out windows, against inputs heard from two whole blocks."""
    source = open_model(tiny_model("gemma3"))
    tokens = torch.randint(3, 200, (5, 24), generator=torch.Generator().manual_seed(1))
    hidden, calls = block_inputs(source, tokens)
    other = [h + 0.1 * torch.randn(h.shape, generator=torch.Generator().manual_seed(i)) for i, h in enumerate(hidden)]
    name = source.block_names[0]
    with materialize(source.block(0), name, source.reader) as block:
        runner, teacher = BlockRunner(block, calls[0], other, {}), BlockRunner(block, calls[0], hidden, {})
        runner.tails = teacher.tails = verified_tails(runner, source.family)
        heard = {}
        for linear in ("self_attn.o_proj", "mlp.down_proj"):
            pairs = [(runner.input_of(linear, i)[0], teacher.input_of(linear, i)[0]) for i in range(5)]
            heard[linear] = [torch.cat(side).double() for side in zip(*pairs, strict=True)]
        groups = source.family.linear_groups
        before = [list(r.hidden) for r in (runner, teacher)]
        for group in groups:
            observed = runner.observe(group, teacher, n_held=2, last=last and group is groups[-1])
            assert observed.held is not None
            assert (observed.train.n_tokens, observed.held.n_tokens) == (3 * 24, 2 * 24)
            for part, rows in ((observed.train, slice(0, 72)), (observed.held, slice(72, None))):
                if group[0] in heard:
                    x, original = (side[rows] for side in heard[group[0]])
                    want = (original - x).T @ x / len(x)
                    assert torch.allclose(part.mean_cross(), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
                    assert torch.allclose(part.H, x.T @ x, rtol=1e-4, atol=1e-4)
            runner.settle(group)
        for r, states in zip((runner, teacher), before, strict=True):
            want = [BlockRunner(block, calls[0], states, {}).run(i) for i in range(5)]
            if r is runner or not last:
                r.advance()
            assert all(torch.equal(a, b) for a, b in zip(r.hidden, want, strict=True))


def test_deep_models_are_called_block_by_block(tiny_model) -> None:
    """In transformers 4 some decoders take the first of what a block returns: each would strip a dimension."""
    source = open_model(tiny_model("gemma3", blocks=6))
    hidden, calls = block_inputs(source, torch.arange(3, 20)[None])
    assert hidden[0].shape == (1, 17, 80)
    assert len(calls) == 6
