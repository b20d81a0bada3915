"""llmq: quantize a Hugging Face language model and run it fast on an ordinary CPU.

Importing this package registers its format with transformers, so that ``AutoModelForCausalLM.from_pretrained`` opens
llmq folders.
"""

from llmq.config import (
    AWQConfig,
    BudgetConfig,
    CalibConfig,
    GPTQConfig,
    KVCacheConfig,
    QuantScheme,
    RecipeConfig,
    RuntimeConfig,
    StatsConfig,
)
from llmq.pipeline import QuantizationResult, quantize_model
from llmq.qtensor import QTensor
from llmq.runtime.auto import AutoModelForCausalLM
from llmq.runtime.causal_lm import set_kv_cache
from llmq.runtime.foreign import patch_transformers
from llmq.runtime.foreign import register as _register_foreign
from llmq.runtime.hf import register as _register
from llmq.runtime.peft_layers import patch_peft
from llmq.runtime.prompt_cache import load_prompt_cache, save_prompt_cache
from llmq.runtime.qlinear import QEmbedding, QLinear, set_activation_bits
from llmq.runtime.quantized_cache import QuantizedKVCache

_register()
_register_foreign()

__version__ = "0.1.0"

__all__ = [
    "AWQConfig",
    "AutoModelForCausalLM",
    "BudgetConfig",
    "CalibConfig",
    "GPTQConfig",
    "KVCacheConfig",
    "QEmbedding",
    "QLinear",
    "QTensor",
    "QuantScheme",
    "QuantizationResult",
    "RecipeConfig",
    "RuntimeConfig",
    "QuantizedKVCache",
    "StatsConfig",
    "load_prompt_cache",
    "patch_peft",
    "patch_transformers",
    "quantize_model",
    "save_prompt_cache",
    "set_activation_bits",
    "set_kv_cache",
]
