"""What stands outside the decoder blocks: embedding, head, final norm, and whatever else a model carries."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.checkpoint import matrix_tensors
from llmq.models.load import SourceModel
from llmq.plan import Matrix, Plan
from llmq.qtensor import QTensor
from llmq.solvers import rtn

# Rows of an embedding or head that are in memory in fp32 at once.
TABLE_ROWS = 8192
# Clipping ranges tried for an embedding or head below 8 bits.
TABLE_GRID_STEPS = 20


def outside_blocks(source: SourceModel, plan: Plan) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors of the last shard by full name, digests of the quantized matrices among them).

    Raises ValueError for a matrix that holds NaN or infinity.
    """
    reader = source.reader
    tensors: dict[str, Tensor] = {}
    digests: dict[str, str] = {}
    for matrix in plan.tables:
        qtensor = quantize_table(source, matrix)
        digests[matrix.name] = qtensor.digest()
        tensors.update({f"{matrix.name}.{key}": value for key, value in matrix_tensors(qtensor).items()})
    for kept in plan.kept:
        if not any(kept.name.startswith(block + ".") for block in source.block_names):
            tensors[kept.name] = reader.tensor(kept.name).to(kept.dtype)
    persistent = source.model.state_dict().keys() - dict(source.model.named_parameters(remove_duplicate=False)).keys()
    tensors.update({name: reader.tensor(name) for name in persistent if name in reader})
    return tensors, digests


def quantize_table(source: SourceModel, matrix: Matrix) -> QTensor:
    """A large matrix, such as embedding or head, rounded to nearest chunk by chunk; below 8 bits ranges are clipped."""
    codes, scales, zeros = [], [], []
    grid_steps = TABLE_GRID_STEPS if matrix.scheme.bits < 8 else 0
    identity = torch.eye(matrix.k) if grid_steps else None
    for _, rows in source.reader.row_chunks(f"{matrix.name}.weight", TABLE_ROWS):
        W = rows.float()
        if not torch.isfinite(W).all():
            raise ValueError(f"{matrix.name}.weight holds NaN or infinity in {source.folder}; the model is damaged")
        part = rtn.solve(W, matrix.scheme, identity, grid_steps=grid_steps)
        codes.append(part.q)
        scales.append(part.scale)
        zeros.append(part.zero)
    zero = None if matrix.scheme.sym else torch.cat([z for z in zeros if z is not None])
    return QTensor(torch.cat(codes), torch.cat(scales), zero, matrix.scheme)
