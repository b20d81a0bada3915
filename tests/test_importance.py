"""How much tokens count: squared gradients against autograd through the whole model, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmq import CalibConfig, QuantScheme, RecipeConfig, importance, quantize_model
from llmq.blockwise import BlockRunner, block_inputs
from llmq.importance import token_weights
from llmq.models.load import materialize, open_model
from llmq.report import silent

Tiny = Callable[..., Path]


def windows(n: int = 3, seqlen: int = 24) -> Tensor:
    return torch.randint(10, 384, (n, seqlen), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
def test_weights_are_squared_gradients_of_the_whole_model(
    tiny_model: Tiny, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance, "POSITIONS", 1.0)
    monkeypatch.setattr(importance, "HELD_BYTES", 1)  # one window at a time
    monkeypatch.setattr(importance, "_draw", lambda logp, _generator: logp.argmin(-1))
    said: list[str] = []
    source, tokens = open_model(tiny_model(family)), windows()
    found = token_weights(source, tokens, seed=0, log=said.append)
    assert [line.split()[4] for line in said] == ["1/3", "2/3", "3/3"]
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family)).eval()
    outputs: dict[str, Tensor] = {}
    for name in (f"{block}.{local}" for block in source.block_names for group in source.groups for local in group):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _m, _a, y, name=name: (y.retain_grad(), outputs.update({name: y}))[0])
    expected = [{group[0]: torch.zeros(tokens.shape) for group in source.groups} for _ in source.block_names]
    for w, ids in enumerate(tokens):
        logp = model(ids[None]).logits[0].log_softmax(-1)
        logp.amin(-1).sum().backward()
        for i, block in enumerate(source.block_names):
            for group in source.groups:
                squares = [outputs[f"{block}.{local}"].grad[0].square().sum(-1) for local in group]  # type: ignore[index]
                expected[i][group[0]][w] = torch.stack(squares).sum(0)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, t in ours.items():
            w = theirs[name] ** importance.POWER
            torch.testing.assert_close(t, w / w.mean(), rtol=1e-3, atol=1e-4)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    n = 20_000
    drawn = importance._draw(p.log().expand(n, 4), torch.Generator().manual_seed(1))
    shares = torch.bincount(drawn, minlength=4) / n
    # Five standard deviations of a share.
    assert ((shares - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


def test_a_seed_gives_the_same_weights(tiny_model: Tiny) -> None:
    source = open_model(tiny_model("llama"))
    first, again, other = (token_weights(source, windows(), seed=seed, log=silent) for seed in (0, 0, 1))
    name = source.groups[0][0]
    assert torch.equal(first[0][name], again[0][name])
    assert not torch.equal(first[0][name], other[0][name])


def test_statistics_count_as_told(tiny_model: Tiny) -> None:
    source, tokens = open_model(tiny_model("llama")), windows()
    counts = token_weights(source, tokens, seed=0, log=silent)[0]
    hidden, calls = block_inputs(source, tokens)
    group = source.groups[1]
    with materialize(source.block(0), source.block_names[0], source.reader) as block:
        runner = BlockRunner(block, calls[0], hidden, {}, sink_share=0.5, counts=counts)
        found = (runner.observe(group, n_held=1), runner.observe_all(source.groups)[group[0]])
        X = torch.cat([runner.input_of(group[0], i) for i in range(len(tokens))]).double()
    H = [(x.T * w.double()) @ x for x, w in zip(X, counts[group[0]], strict=True)]
    assert found[0].held is not None
    torch.testing.assert_close(found[0].train.H, H[0] + H[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0].held.H, H[2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1].H, sum(H), rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]


def test_the_step_changes_what_is_written(tiny_model: Tiny, tmp_path: Path) -> None:
    calib = CalibConfig("stdlib", nsamples=4, seqlen=64)
    found = {}
    for steps in ("refit", "importance,refit"):
        out = tmp_path / steps
        recipe = RecipeConfig(only=steps)
        quantize_model(tiny_model("llama"), QuantScheme(bits=3, group_size=32), calib=calib, recipe=recipe, output=out)
        found[steps] = (out / "model-00001-of-00003.safetensors").read_bytes()
    assert found["refit"] != found["importance,refit"]
