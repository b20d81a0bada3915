"""AWQ's folds on real (tiny) blocks of every family: output unchanged, loss lowered, wrong folds taken back."""

import copy
import dataclasses

import pytest
import torch

from llmq.blockwise import BlockRunner, block_inputs
from llmq.config import AWQConfig, QuantScheme
from llmq.models.families import FAMILIES, SmoothPair
from llmq.models.load import materialize, open_model
from llmq.solvers import awq

SCHEME = QuantScheme(3, 32)
FAMILY_NAMES = [f.name for f in FAMILIES]


@pytest.fixture
def block_of(tiny_model):
    """block_of(family) -> (block with weights, runner, stats by linear, family row); inputs have outlier channels."""
    contexts = []

    def get(family):
        source = open_model(tiny_model(family))
        hidden, calls = block_inputs(source, torch.randint(3, 200, (2, 32), generator=torch.Generator().manual_seed(0)))
        for h in hidden:
            h[..., :3] *= 20  # what AWQ is for
        context = materialize(source.block(0), source.block_names[0], source.reader)
        contexts.append(context)
        block = context.__enter__()
        runner = BlockRunner(block, calls[0], hidden, {})
        return block, runner, runner.observe_all(source.family.linear_groups), source.family

    yield get
    for context in contexts:
        context.__exit__(None, None, None)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_folds_change_nothing_but_the_rounding(block_of, family):
    block, runner, stats, row = block_of(family)
    with torch.no_grad():
        before = runner.run(0)
        weights = {name: p.clone() for name, p in block.named_parameters()}
        reports = awq.transform_block(block, row, stats, SCHEME, AWQConfig(), lambda: runner.run(0))
        after = runner.run(0)
    applied = [r for r in reports if r.applied]
    assert applied, "outlier channels must make some fold worth it"
    assert len(reports) == len(row.smooth_pairs)
    assert (after - before).norm() <= awq.FOLD_TOLERANCE * before.norm()
    assert any(not torch.equal(p, weights[name]) for name, p in block.named_parameters())
    assert all(r.loss_after < r.loss_before for r in applied)


def test_v_to_o_is_folded_under_grouped_query_attention(block_of):
    block, runner, stats, row = block_of("llama")
    assert block.self_attn.v_proj.out_features != block.self_attn.o_proj.in_features, "the tiny model has shared heads"
    with torch.no_grad():
        reports = awq.transform_block(block, row, stats, SCHEME, AWQConfig(), lambda: runner.run(0))
    (report,) = [r for r in reports if r.source == "self_attn.v_proj"]
    assert report.reason != "channel counts of source and linears do not match"


def test_a_fold_that_changes_the_output_is_taken_back(block_of):
    block, runner, stats, row = block_of("gemma2")
    wrong = dataclasses.replace(row, norm_offset=0.0)  # as if Gemma's norm were x * w
    before = copy.deepcopy(block.state_dict())
    pair = SmoothPair("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj"))
    with torch.no_grad():
        (report,) = awq.transform_block(
            block, dataclasses.replace(wrong, smooth_pairs=(pair,)), stats, SCHEME, AWQConfig(), lambda: runner.run(0)
        )
    assert report.exponent > 0
    assert not report.applied
    assert "taken back: the fold moved the block's output" in report.reason
    assert all(torch.equal(p, before[name]) for name, p in block.state_dict().items())


def test_channels_that_do_not_line_up_are_reported(block_of):
    block, runner, stats, row = block_of("llama")
    pair = SmoothPair("self_attn.q_proj", ("mlp.down_proj",), source_is_norm=False)
    (report,) = awq.transform_block(
        block, dataclasses.replace(row, smooth_pairs=(pair,)), stats, SCHEME, AWQConfig(), lambda: runner.run(0)
    )
    assert report.reason == "channel counts of source and linears do not match"
    assert not report.applied
