"""The quantized model as it learns: what of its linears may change, its blocks, its divergence from the teacher.

With the integers fixed, ``W_hat = s (q - z)`` is linear in the scales: ``dL/ds`` of a group is the sum of
``dL/dW_hat (q - z)`` over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from llmq.blockwise import BlockCall, run_block
from llmq.distill import Head
from llmq.products import fast_products, learning_linears
from llmq.qtensor import QTensor, by_group, centred, group_sums, storable_scale

# What blocks may hold for their gradients, together; those beyond it are run again on the way back.
GRAPH_BYTES = 1 << 30


@dataclass
class Linear:
    """A quantized linear whose scales are multiplied by ``factor``.

    Attributes:
        name: its full name.
        start: as the solver left it.
        factor: f32[N, G].
        codes: bf16[N, K], q - z, which bf16 holds exactly.
    """

    name: str
    start: QTensor
    factor: Tensor = field(init=False)
    codes: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.factor = torch.ones(self.start.scale.shape)
        self.codes = centred(self.start.q, self.start.zero, self.start.scheme).bfloat16()

    def scale(self, *, stored: bool) -> Tensor:
        """f32[N, G]; ``stored``: as fp16 holds it."""
        scale = self.start.scale.float() * self.factor
        return storable_scale(scale) if stored else scale

    def weight(self, *, stored: bool) -> Tensor:
        """W_hat [N, K]: f32 where ``stored``, else of bf16 codes and scales where gradients are of bf16."""
        dtype = torch.float32 if stored else _learning_dtype()
        W, scale = self.codes.to(dtype, copy=True), self.scale(stored=stored).to(dtype)
        for part, groups in by_group(W, self.start.scheme):
            part.mul_(scale[:, groups, None])
        return W

    def give_gradient(self, dW: Tensor) -> None:
        """Leave dL/dfactor in ``grad``, from dL/dW_hat [N, K], f32 or bf16. Raises ValueError when it is not finite."""
        scheme = self.start.scheme
        self.factor.grad = group_sums(self.codes * dW, scheme, torch.float32) * self.start.scale.float()
        if not torch.isfinite(self.factor.grad).all():
            raise ValueError(f"{self.name}: the gradient of its scales is not finite")

    def result(self) -> QTensor:
        """The matrix as it will be stored."""
        return replace(self.start, scale=self.scale(stored=True).half())


@dataclass
class Vector:
    """A norm's weight or a bias, which is kept in fp32: ``(start + offset) factor - offset``.

    Attributes:
        name: its full name.
        start: f32[n].
        offset: what its module adds to it before it multiplies, as Gemma's norms add 1.
        factor: f32[n].
    """

    name: str
    start: Tensor
    offset: float
    factor: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.factor = torch.ones_like(self.start)

    def value(self) -> Tensor:
        """f32[n]."""
        return (self.start + self.offset) * self.factor - self.offset

    def give_gradient(self, dv: Tensor) -> None:
        """Leave dL/dfactor in ``grad``, from dL/dvalue f32[n]. Raises ValueError when it is not finite."""
        self.factor.grad = dv * (self.start + self.offset)
        if not torch.isfinite(self.factor.grad).all():
            raise ValueError(f"{self.name}: its gradient is not finite")


def _learning_dtype() -> torch.dtype:
    with learning_linears():
        return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


@dataclass
class Block:
    """A decoder block as its shard holds it: linears, vectors and what does not change, by local name."""

    name: str
    module: nn.Module
    call: BlockCall
    linears: dict[str, Linear]
    vectors: dict[str, Vector]
    kept: dict[str, Tensor]

    def parameters(self, *, stored: bool) -> dict[str, Tensor]:
        """What stands in for the module's own parameters; see :meth:`Linear.weight`."""
        weights = {f"{name}.weight": m.weight(stored=stored) for name, m in self.linears.items()}
        return self.kept | weights | {name: v.value() for name, v in self.vectors.items()}

    @torch.no_grad()
    def run(self, x: Tensor, *, stored: bool) -> Tensor:
        """Output for x f32[b, t, hidden]; ``stored``: of the model as it will be stored, in fp32."""
        parameters = self.parameters(stored=stored)
        with fast_products() if stored else learning_linears():
            return self._finite(run_block(self.module, parameters, x, self.call))

    def _finite(self, y: Tensor) -> Tensor:
        if not torch.isfinite(y).all():
            raise ValueError(f"{self.name}: its output is not finite while it is tuned")
        return y

    def remember(self, x: Tensor) -> Passed:
        """Output for x f32[b, t, hidden], with all that its gradient needs."""
        parameters = self.parameters(stored=False)
        keys = (*(f"{name}.weight" for name in self.linears), *self.vectors)
        moving = [parameters[key].requires_grad_() for key in keys]
        x, held = x.detach().requires_grad_(), {}

        def count(t: Tensor) -> Tensor:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        counting = torch.autograd.graph.saved_tensors_hooks(count, lambda t: t)
        with torch.enable_grad(), learning_linears(), counting:
            y = self._finite(run_block(self.module, parameters, x, self.call))
        return Passed(x, y, moving, sum(held.values()))

    def backward(self, passed: Passed, dy: Tensor) -> Tensor:
        """dL/dx from dL/dy, f32[b, t, hidden]; leaves the gradients of what is learned."""
        learned: list[Linear | Vector] = [*self.linears.values(), *self.vectors.values()]
        dx, *grads = torch.autograd.grad(passed.y, [passed.x, *passed.moving], dy.to(passed.y.dtype))
        for item, grad in zip(learned, grads, strict=True):
            item.give_gradient(grad)
        return dx.float()


@dataclass(frozen=True)
class Passed:
    """A block's pass over x: its output, the parameters that learn, and the bytes held for their gradients."""

    x: Tensor
    y: Tensor
    moving: list[Tensor]
    nbytes: int


class Student:
    """The quantized model: its divergence from the teacher, and the gradient.

    Args:
        blocks: in order.
        head: of the original model, loaded.
    """

    def __init__(self, blocks: Sequence[Block], head: Head) -> None:
        self.blocks, self.head = blocks, head
        self.linears = [m for block in blocks for m in block.linears.values()]
        self.vectors = [v for block in blocks for v in block.vectors.values()]
        self.learned: list[Linear | Vector] = [*self.linears, *self.vectors]

    def hidden(self, x: Tensor, *, stored: bool) -> list[Tensor]:
        """Input of every block and, last, the output of the last one, f32[b, t, hidden]."""
        hidden = [x]
        for block in self.blocks:
            hidden.append(block.run(hidden[-1], stored=stored))
        return hidden

    def loss(self, x: Tensor, target: Tensor) -> float:
        """Mean KL, nats a position, of the model as it will be stored.

        Args:
            x: f32[b, t, hidden], inputs of the first block.
            target: f32[b, t, hidden], the original model's outputs of the last block.
        """
        for block in self.blocks:
            x = block.run(x, stored=True)
        return self._head(x.flatten(0, 1), target.flatten(0, 1), None)

    def backward(self, x: Tensor, target: Tensor, positions: slice) -> float:
        """KL at ``positions``; arguments as of :meth:`loss`. Its gradient is left in the linears' parameters."""
        passed: list[Passed | Tensor] = []  # of a block that is to be run again: its input
        room = GRAPH_BYTES
        for block in self.blocks:
            if room > 0:
                here = block.remember(x)
                room -= here.nbytes
                passed.append(here)
                x = here.y.detach().float()
            else:
                passed.append(x)
                x = block.run(x, stored=False).float()
        h = x
        dy = torch.zeros_like(h)
        compared, wanted = h[:, positions], target[:, positions]
        slope = torch.zeros_like(compared).flatten(0, 1)
        with learning_linears():
            loss = self._head(compared.flatten(0, 1), wanted.flatten(0, 1), slope)
        dy[:, positions] = slope.view(compared.shape)
        for block in reversed(self.blocks):
            before = passed.pop()
            dy = block.backward(block.remember(before) if isinstance(before, Tensor) else before, dy)
        return loss

    def _head(self, h: Tensor, target: Tensor, dy: Tensor | None) -> float:
        """Mean KL from outputs h f32[p, hidden] of the last block; its gradient goes to ``dy``, if given, like h."""
        total = 0.0
        for rows in self.head.chunks(len(h)):
            x = h[rows].detach().requires_grad_(dy is not None)
            with torch.no_grad():
                log_p = self.head.logits(target[rows]).log_softmax(1)
            with torch.set_grad_enabled(dy is not None):
                logits = self.head.logits(x)
            log_q, p = logits.detach().log_softmax(1), log_p.exp()
            kl = float(torch.sum(log_p.sub_(log_q).mul_(p), dtype=torch.float64))
            if kl != kl:
                raise ValueError(f"{self.head.source.head_name}: the divergence behind it is not a number")
            if dy is not None:
                dy[rows] = torch.autograd.grad(logits, x, log_q.exp_().sub_(p).div_(len(h)))[0]
            total += kl / len(h)
        return total
