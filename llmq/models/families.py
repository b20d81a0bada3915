"""FAMILIES: one row a model family. Data only: a new family is a new row, nothing else asks for a model's type.

Names are relative to a decoder block (``self_attn.q_proj``) or to the whole model (``model.layers``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class SmoothPair:
    """A place where AWQ may move a per-channel scale: from the inputs of ``linears`` into ``source``.

    ``source`` is the norm or the linear whose output channels feed ``linears``. ``repeat_heads`` marks value -> output
    projections, where each key/value head feeds several query heads (grouped-query attention).
    """

    source: str
    linears: tuple[str, ...]
    source_is_norm: bool = True
    repeat_heads: bool = False


@dataclass(frozen=True)
class DecoderNames:
    """Where the native decoder finds the norms of a block; None: the family has no such norm.

    ``attention_norm`` and ``ffn_norm`` come before the two halves of a block, the ``post`` norms after them, before the
    residual is added. ``all_slide``: every layer sees ``config.sliding_window`` tokens (where other families list their
    ``layer_types``).
    """

    attention_norm: str = "input_layernorm"
    attention_post_norm: str | None = None
    ffn_norm: str = "post_attention_layernorm"
    ffn_post_norm: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    all_slide: bool = False


@dataclass(frozen=True)
class ModelFamily:
    """What llmq must know of a family of decoders beyond what its Hugging Face module tree says.

    Attributes:
        name: the family's name, as users and reports read it.
        model_types: the ``model_type`` values of config.json that this row serves.
        decoder: module that runs embeddings, blocks and final norm, e.g. ``model``.
        linear_groups: linears of a block in the order of solving; those of one group share their input.
        tails: linear -> the submodule whose output that linear's output is.
        smooth_pairs: where AWQ may fold scales.
        no_clip: linears whose clipping AWQ leaves alone (q/k: errors pass through the softmax).
        norm_offset: 1.0 where the norm multiplies by ``1 + weight`` (Gemma), else 0.0.
        native: names for the native decoder; None: the family runs in the Hugging Face graph only.
        key_renames: (regex, replacement) from checkpoint tensor names to module names, applied in order.
    """

    name: str
    model_types: tuple[str, ...]
    decoder: str = "model"
    linear_groups: tuple[tuple[str, ...], ...] = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )
    tails: dict[str, str] = field(default_factory=lambda: {"self_attn.o_proj": "self_attn", "mlp.down_proj": "mlp"})
    smooth_pairs: tuple[SmoothPair, ...] = (
        SmoothPair("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        SmoothPair("self_attn.v_proj", ("self_attn.o_proj",), source_is_norm=False, repeat_heads=True),
        SmoothPair("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        SmoothPair("mlp.up_proj", ("mlp.down_proj",), source_is_norm=False),
    )
    no_clip: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj")
    norm_offset: float = 0.0
    native: DecoderNames | None = None
    key_renames: tuple[tuple[str, str], ...] = ()

    @property
    def blocks(self) -> str:
        """Path of the list of decoder blocks."""
        return f"{self.decoder}.layers"


_V_TO_O = SmoothPair("self_attn.v_proj", ("self_attn.o_proj",), source_is_norm=False, repeat_heads=True)
_UP_TO_DOWN = SmoothPair("mlp.up_proj", ("mlp.down_proj",), source_is_norm=False)
_GEMMA_FFN = SmoothPair("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj"))
# q_norm/k_norm follow the projections in Gemma 3: scaling the inputs of q/k/v there hurts (llm-compressor issue 2571).
_GEMMA3_PAIRS = (_V_TO_O, _GEMMA_FFN, _UP_TO_DOWN)
_GEMMA2_PAIRS = (
    SmoothPair("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    *_GEMMA3_PAIRS,
)

_QWEN3_NORMS = DecoderNames(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
_GEMMA2_NORMS = DecoderNames(
    attention_post_norm="post_attention_layernorm",
    ffn_norm="pre_feedforward_layernorm",
    ffn_post_norm="post_feedforward_layernorm",
)
_GEMMA3_NORMS = replace(_GEMMA2_NORMS, q_norm=_QWEN3_NORMS.q_norm, k_norm=_QWEN3_NORMS.k_norm)

FAMILIES: tuple[ModelFamily, ...] = (
    ModelFamily("llama", ("llama",), native=DecoderNames()),
    ModelFamily("mistral", ("mistral",), native=DecoderNames(all_slide=True)),
    ModelFamily("qwen2", ("qwen2",), native=DecoderNames()),
    ModelFamily("qwen3", ("qwen3",), native=_QWEN3_NORMS),
    ModelFamily("gemma2", ("gemma2",), smooth_pairs=_GEMMA2_PAIRS, norm_offset=1.0, native=_GEMMA2_NORMS),
    ModelFamily("gemma3", ("gemma3_text",), smooth_pairs=_GEMMA3_PAIRS, norm_offset=1.0, native=_GEMMA3_NORMS),
    ModelFamily(
        "gemma3-multimodal",
        ("gemma3",),
        decoder="model.language_model",
        smooth_pairs=_GEMMA3_PAIRS,
        norm_offset=1.0,
        key_renames=(
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^language_model\.(model\.)?", "model.language_model."),
            (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
        ),
    ),
)


def family_of(model_type: str) -> ModelFamily | None:
    """The row that serves ``model_type``, or None."""
    return next((f for f in FAMILIES if model_type in f.model_types), None)
