"""A tiny model as a case for the replay program (cpp/tests/replay_model.cpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmq.models.families import family_of
from llmq.runtime.qlinear import TiedHead


def raw(*arrays: Tensor) -> bytes:
    return b"".join(a.contiguous().view(torch.uint8).numpy().tobytes() for a in arrays)


def matrix(module: Any) -> bytes:
    t = module.qtensor()
    (n, k), s = t.shape, t.scheme
    about = f"n={n} k={k} group={s.group_width(k)} bits={s.bits} zeros={int(not s.sym)} mid={s.mid}"
    return f"matrix {about}\n".encode() + raw(*(a for a in (t.q, t.scale, t.zero) if a is not None))


def model_case(model: Any, ids: Tensor, expected: Tensor, tolerance: float, *, floats: bool) -> bytes:
    """``model`` is quantized, its head tied, its family gemma3; expected f32[T, V] are its logits for ids i64[T]."""
    config, family = model.config, family_of(model.config.model_type)
    assert family is not None
    assert family.native is not None
    assert isinstance(model.lm_head, TiedHead)
    names, decoder = family.native, model.get_submodule(family.decoder)
    kinds = list(dict.fromkeys(config.layer_types))
    rotary = type(decoder.rotary_emb)(config=config)
    embedding = model.get_input_embeddings()
    attention = decoder.layers[0].self_attn
    values = {
        "hidden": config.hidden_size, "heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads,
        "head_dim": attention.head_dim, "layers": len(decoder.layers), "ropes": len(kinds), "activation": 1,
        "max_positions": config.max_position_embeddings, "qk_norm": int(names.q_norm is not None),
        "post_norms": int(names.ffn_post_norm is not None), "count": len(ids), "floats": int(floats),
    }  # fmt: skip
    constants = [config.rms_norm_eps, attention.scaling, float(embedding.output_scale), 0.0, 0.0, tolerance, 0.0]
    out = [f"model {' '.join(f'{k}={v}' for k, v in values.items())}\n".encode(), raw(torch.tensor(constants))]
    out += [raw(getattr(rotary, f"{kind}_inv_freq").float()) for kind in kinds]

    def norm(module: Any) -> bytes:
        return raw(module.weight.detach().float() + family.norm_offset)

    out += [norm(decoder.norm), matrix(embedding)]
    for layer, kind in zip(decoder.layers, config.layer_types, strict=True):
        window = config.sliding_window if kind == "sliding_attention" else 0
        out.append(raw(torch.tensor([window, kinds.index(kind)])))
        order = (names.attention_norm, names.ffn_norm, names.attention_post_norm, names.ffn_post_norm)
        out += [norm(layer.get_submodule(n)) for n in (*order, names.q_norm, names.k_norm) if n is not None]
        a, m = layer.self_attn, layer.mlp
        out += [matrix(x) for x in (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj)]
    return b"".join([*out, raw(ids), raw(expected)])
