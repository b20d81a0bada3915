"""Running a decoder one block at a time, and listening to the inputs of its linears.

No layer is replaced: forward pre-hooks listen, a private exception ends a forward pass early, and a submodule whose
linears are all solved answers from memory instead of computing the same output again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmq.models.families import ModelFamily
from llmq.models.load import SourceModel
from llmq.products import fast_products
from llmq.solvers.hessian import InputStats

# Inputs of a tail linear are kept for all windows only while they fit in this many bytes; else they are computed again.
MEMO_BYTES = 1 << 30


# How much each token counts for each group of linears with one input, f32[n, seqlen] by the group's first name.
Weights = dict[str, Tensor]


class _StopForwardError(Exception):
    """Ends a forward pass once the hook that raised it has what it came for."""


@dataclass(frozen=True)
class BlockCall:
    """What the decoder passes to one block besides the hidden states: masks, rotary tables, positions."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tail:
    """A submodule whose output is that of its last linear; ``extras`` values follow the output in its tuple.

    Nobody reads them while calibrating (they are attention weights, for users who ask), so None stands in for them.
    """

    submodule: str
    extras: int | None

    def answer(self, output: Tensor) -> Any:
        """What the submodule returns when its last linear returns ``output``."""
        return output if self.extras is None else (output, *(None,) * self.extras)


@contextmanager
def listening(module: nn.Module, hear: Callable[[Tensor], None]) -> Iterator[None]:
    """Within the context, ``hear`` gets the first argument of every call of ``module``."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hear(args[0] if args else next(iter(kwargs.values())))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class _Output(Tensor):
    """Hidden states for a decoder that takes them as they are, or as the first of a tuple (transformers 4)."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Any:
        return self.as_subclass(Tensor) if isinstance(index, int) and index == 0 else super().__getitem__(index)


def block_output(hidden: Tensor) -> Tensor:
    """What :func:`answering` has a whole block return, for hidden states [1, t, hidden]."""
    return hidden.as_subclass(_Output)


@contextmanager
def answering(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context, ``module`` answers with ``forward`` instead of its own computation."""
    module.__dict__["forward"] = forward  # shadows the class's method
    try:
        yield
    finally:
        del module.__dict__["forward"]


def run_block(block: nn.Module, parameters: dict[str, Tensor], hidden: Tensor, call: BlockCall) -> Tensor:
    """The block's output f32[1, t, hidden], ``parameters`` standing in for its own; gradients flow into both."""
    output = torch.func.functional_call(block, parameters, (hidden, *call.args), call.kwargs)
    result = output[0] if isinstance(output, tuple) else output
    assert isinstance(result, Tensor)
    return result


@contextmanager
def compact_embedding(source: SourceModel, tokens: Tensor) -> Iterator[Tensor]:
    """Load only the embedding rows that ``tokens`` use; yields the tokens renumbered to those rows.

    A vocabulary of 262144 rows is most of a small model; a calibration text touches a tenth of it.
    """
    embed = source.model.get_submodule(source.embed_name)
    assert isinstance(embed, nn.Embedding)
    ids, renumbered = torch.unique(tokens, return_inverse=True)
    old_weight, old_padding = embed.weight, embed.padding_idx
    embed.weight = nn.Parameter(source.reader.rows_at(f"{source.embed_name}.weight", ids).float(), requires_grad=False)
    embed.padding_idx = None
    try:
        yield renumbered
    finally:
        embed.weight, embed.padding_idx = old_weight, old_padding


@torch.no_grad()
def block_inputs(source: SourceModel, tokens: Tensor) -> tuple[list[Tensor], list[BlockCall]]:
    """Hidden states entering the first block, and how the decoder calls each block.

    All windows have one length and no padding, so the calls are the same for every window and are recorded once.

    Args:
        source: the opened model.
        tokens: i64[n, seqlen].

    Returns:
        n tensors f32[1, seqlen, hidden], and one BlockCall a block.
    """
    decoder = source.model.get_submodule(source.family.decoder)
    blocks = [source.model.get_submodule(name) for name in source.block_names]
    calls: list[BlockCall] = []

    def recorder(last: bool) -> Callable[..., Tensor]:
        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            calls.append(BlockCall(args, kwargs))
            if last:
                raise _StopForwardError
            return block_output(hidden)

        return forward

    hidden: list[Tensor] = []

    def hear(x: Tensor) -> None:
        hidden.append(x.detach().clone())
        raise _StopForwardError

    with compact_embedding(source, tokens) as ids:
        with ExitStack() as stack:
            for i, block in enumerate(blocks):
                stack.enter_context(answering(block, recorder(i == len(blocks) - 1)))
            _run_to_stop(decoder, ids[:1])
        with listening(blocks[0], hear):
            for window in ids:
                _run_to_stop(decoder, window[None])
    assert len(calls) == len(blocks), "the decoder must run its blocks in order, each once"
    return hidden, calls


def _run_to_stop(decoder: nn.Module, ids: Tensor) -> None:
    try:
        decoder(input_ids=ids, use_cache=False)
    except _StopForwardError:
        return
    raise AssertionError("the decoder returned without running its blocks")


@dataclass(frozen=True)
class Observed:
    """Input statistics of a group: what is fitted to, and windows held out to judge it (None: nothing was held out)."""

    train: InputStats
    held: InputStats | None = None


class BlockRunner:
    """Runs one block over all calibration windows.

    Args:
        block: the block, weights in memory.
        call: what the decoder passes to it.
        hidden: f32[1, seqlen, hidden] a window; :meth:`advance` replaces them by the block's outputs.
        tails: linear -> Tail, those of the family that :func:`verified_tails` has confirmed.
        sink_share: weight of first tokens in statistics, see :class:`InputStats`.
        counts: of every token in statistics, instead.
    """

    def __init__(
        self,
        block: nn.Module,
        call: BlockCall,
        hidden: list[Tensor],
        tails: dict[str, Tail],
        *,
        sink_share: float = 0.0,
        counts: Weights | None = None,
    ) -> None:
        self.sink_share, self.counts = sink_share, counts or {}
        self.block, self.call, self.hidden, self.tails = block, call, hidden, tails
        self._kept: list[Tensor] = []
        self._settled: list[tuple[Tail, list[Tensor]]] = []

    def run(self, i: int) -> Tensor:
        """The block's output for window i, f32[1, seqlen, hidden]."""
        with ExitStack() as stack:
            for tail, outputs in self._settled:
                answer = tail.answer(outputs[i])
                submodule = self.block.get_submodule(tail.submodule)
                stack.enter_context(answering(submodule, lambda *_args, answer=answer, **_kwargs: answer))
            stack.enter_context(fast_products())
            output = self.block(self.hidden[i], *self.call.args, **self.call.kwargs)
        result = output[0] if isinstance(output, tuple) else output
        assert isinstance(result, Tensor)
        return result

    def answered(self, i: int, tail: Tail, output: Tensor) -> Tensor:
        """The block's output for window i when the tail's submodule answers with ``output``."""
        with answering(self.block.get_submodule(tail.submodule), lambda *_args, **_kwargs: tail.answer(output)):
            return self.run(i)

    def input_of(self, name: str, i: int) -> Tensor:
        """What reaches the linear ``name`` for window i, f32[1, seqlen, in_features]; the block is run up to there."""
        heard: list[Tensor] = []

        def hear(x: Tensor) -> None:
            heard.append(x.detach())
            raise _StopForwardError

        with listening(self.block.get_submodule(name), hear):
            try:
                self.run(i)
            except _StopForwardError:
                return heard[0]
        raise AssertionError(f"{name} was not called")

    @torch.no_grad()
    def observe(
        self, group: Sequence[str], teacher: BlockRunner | None = None, n_held: int = 0, *, last: bool = False
    ) -> Observed:
        """Input statistics of a group of linears that share their input, up to which the block is run.

        Args:
            group: the linears.
            teacher: the original block on the original model's hidden states; its inputs are paired with this one's.
            n_held: the last windows, whose statistics are kept apart.
            last: nothing else of the block is observed: the teacher advances, window by window, which keeps less.
        """
        linear = self.block.get_submodule(group[0])
        assert isinstance(linear, nn.Linear)
        n, paired = len(self.hidden), teacher is not None
        train = InputStats(linear.in_features, paired=paired, sink_share=self.sink_share)
        held = InputStats(linear.in_features, paired=paired, sink_share=self.sink_share) if n_held else None
        fits = sum(h.shape[1] for h in self.hidden) * linear.in_features * 4 <= MEMO_BYTES
        keep = fits and len(group) == 1 and group[0] in self.tails
        self._kept, outputs = [], []
        for i in range(n):
            inputs = [runner.input_of(group[0], i) for runner in ((self,) if teacher is None else (self, teacher))]
            (train if held is None or i < n - n_held else held).add(*inputs, counts=self._counts(group, i))
            if keep:
                self._kept.append(inputs[0])
            if teacher is not None and keep:
                # The teacher's weights are final: its output is known now, and narrower than the input.
                with fast_products():
                    outputs.append(teacher.block.get_submodule(group[0])(inputs[1]))
            if teacher is not None and last:
                teacher._advance(i, (self.tails[group[0]], outputs.pop()) if keep else None)
        if teacher is not None and last:
            teacher.forget()
        elif teacher is not None and keep:
            teacher._settled.append((self.tails[group[0]], outputs))
        return Observed(train, held)

    def _counts(self, group: Sequence[str], i: int) -> Tensor | None:
        return self.counts[group[0]][i] if self.counts else None

    @torch.no_grad()
    def observe_all(self, groups: Sequence[Sequence[str]]) -> dict[str, InputStats]:
        """Input statistics of every group in one full pass, by the name of each of its linears."""
        by_group = []
        window = 0
        with ExitStack() as stack:
            for group in groups:
                linear = self.block.get_submodule(group[0])
                assert isinstance(linear, nn.Linear)
                stats = InputStats(linear.in_features, sink_share=self.sink_share)

                def hear(x: Tensor, group: Sequence[str] = group, stats: InputStats = stats) -> None:
                    stats.add(x, counts=self._counts(group, window))

                by_group.append(stats)
                stack.enter_context(listening(linear, hear))
            for window in range(len(self.hidden)):
                self.run(window)
        return {name: stats for group, stats in zip(groups, by_group, strict=True) for name in group}

    @torch.no_grad()
    def settle(self, group: Sequence[str]) -> None:
        """Call after the group's weights are final: if it ends a submodule, that submodule's outputs are remembered."""
        if not self._kept:
            return
        linear = self.block.get_submodule(group[0])
        outputs = []
        with fast_products():
            while self._kept:
                outputs.append(linear(self._kept.pop(0)))
        self._settled.append((self.tails[group[0]], outputs))

    def forget(self) -> None:
        """Call when settled weights change: what was remembered of submodules no longer holds."""
        self._settled = []

    @torch.no_grad()
    def advance(self) -> None:
        """Replace the hidden states by the block's outputs: the next block's inputs."""
        for i in range(len(self.hidden)):
            self._advance(i)
        self._settled = []

    def _advance(self, i: int, known: tuple[Tail, Tensor] | None = None) -> None:
        """Window i of :meth:`advance`; ``known``: a submodule's output besides those that are remembered."""
        self.hidden[i] = self.run(i) if known is None else self.answered(i, *known)
        for _, outputs in self._settled:
            outputs[i] = torch.empty(0)


@torch.no_grad()
def verified_tails(runner: BlockRunner, family: ModelFamily) -> dict[str, Tail]:
    """The family's tails that hold on the first window.

    That is: the submodule's output is the linear's output, and the block gives the same result when the submodule
    answers from memory.
    """
    seen: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, _args, output: seen.update({name: output})

    with ExitStack() as stack:
        for name in {*family.tails, *family.tails.values()}:
            stack.callback(runner.block.get_submodule(name).register_forward_hook(keep(name)).remove)
        whole = runner.run(0)
    tails = {}
    for linear, submodule in family.tails.items():
        output = seen[submodule]
        first, *rest = output if isinstance(output, tuple) else (output,)
        tail = Tail(submodule, len(rest) if isinstance(output, tuple) else None)
        if torch.equal(first, seen[linear]) and torch.equal(runner.answered(0, tail, first), whole):
            tails[linear] = tail
    return tails
