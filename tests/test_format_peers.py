"""Our files in the hands of the packages whose formats they are. Each test skips where its package is not installed.

pip install compressed-tensors llama-cpp-python peft
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_conversion import found, native
from test_dialects import IDS, check_logits, dense_logits, original  # noqa: F401
from test_formats import random_qtensor

import llmq
from llmq.config import QuantScheme
from llmq.conversion import convert
from llmq.dialects.targets import TARGETS, Places
from llmq.formats import FORMATS

pytestmark = pytest.mark.slow


def ct_scheme(scheme: QuantScheme) -> Any:
    """The package's own reading of the config block that we write."""
    from compressed_tensors.quantization import QuantizationConfig

    places = Places({"q": scheme}, (), "embed", "head", {})
    block = TARGETS["compressed-tensors"].block(places, "pack-quantized")["quantization_config"]
    return next(iter(QuantizationConfig.model_validate(block).config_groups.values()))


SCHEMES = [QuantScheme(b, g, s) for b in (2, 3, 4, 8) for g in (32, 128, -1) for s in (True, False)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_compressed_tensors_decompresses_to_the_same_weights(scheme: QuantScheme) -> None:
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    t = random_qtensor(48, 256, scheme)
    tensors = FORMATS["pack-quantized"].pack(t)
    tensors["weight_scale"] = tensors["weight_scale"].float()  # it computes in the scale's dtype
    theirs = base.PackedQuantizationCompressor.decompress(dict(tensors), ct_scheme(scheme))["weight"]
    assert torch.equal(theirs, t.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_compressed_tensors_packs_is_read(scheme: QuantScheme) -> None:
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    t = random_qtensor(48, 256, scheme)
    state = {"weight": t.dequantize(), "weight_scale": t.scale.float()}
    if t.zero is not None:
        state["weight_zero_point"] = (t.zero.int() - scheme.mid).to(torch.int8)
    packed = base.PackedQuantizationCompressor.compress(state, ct_scheme(scheme))
    assert FORMATS["pack-quantized"].unpack(packed, 48, 256, scheme).digest() == t.digest()


# Symmetric ones: compressed-tensors 0.20 makes room in an empty model for unpacked zero points, and then finds them
# packed, as its own compressor writes them. What it makes of asymmetric matrices is tested above.
@pytest.mark.parametrize("scheme", [QuantScheme(4, 64, True), QuantScheme(8, -1, True)], ids=str)
def test_transformers_loads_our_folder_through_compressed_tensors(
    scheme: QuantScheme,
    original: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    pytest.importorskip("compressed_tensors")
    held = native(original, tmp_path / "a", scheme)
    convert(tmp_path / "a", tmp_path / "b", "compressed-tensors")
    expected = dense_logits(original, {name: t.dequantize() for name, t in held.items()})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(IDS).logits
    assert type(theirs.get_submodule("model.layers.0.mlp.up_proj")).__module__.split(".")[0] != "llmq"
    # Scales are fp16 numbers in float32, codes are whole: the same products in another order.
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    check_logits(llmq.AutoModelForCausalLM.from_pretrained(tmp_path / "b"), expected)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_llama_cpp_runs_our_file(original: Path, tmp_path: Path) -> None:  # noqa: F811
    llama_cpp = pytest.importorskip("llama_cpp")
    held = native(original, tmp_path / "a", QuantScheme(4, 64, True), table=True)
    path = convert(tmp_path / "a", tmp_path / "b.gguf", "gguf")
    assert found(path).keys() == held.keys()
    expected = dense_logits(original, {name: t.dequantize() for name, t in held.items()})[0]
    model = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    model.eval(IDS[0].tolist())
    logits = torch.tensor(model.scores[: IDS.shape[1]])
    # It rounds activations to 8 bits in blocks of 32, a relative error of about 1/250 a product, over two layers.
    assert (logits - expected).norm() <= 0.03 * expected.norm()
    # A wrong order of the rows of q and k, or of nibbles, gives other logits altogether.
    assert (logits.argmax(-1) == expected.argmax(-1)).double().mean() >= 0.8
    # Our greedy text is its greedy text, wherever the best token leads by more than that rounding.
    ours = llmq.AutoModelForCausalLM.from_pretrained(path)
    llmq.set_activation_bits(ours, 16)
    text = ours.generate(IDS, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    model.reset()
    model.eval(text[0].tolist())
    theirs = torch.tensor(model.scores[IDS.shape[1] - 1 : text.shape[1] - 1])
    with torch.no_grad():
        best = ours(text).logits[0, IDS.shape[1] - 1 : -1].topk(2).values
    clear = best[:, 0] - best[:, 1] > 0.06 * theirs.std(-1)
    assert clear.sum() >= 12
    assert torch.equal(theirs.argmax(-1)[clear], text[0, IDS.shape[1] :][clear])


@pytest.mark.filterwarnings("ignore:Unsupported layer type", "ignore:`is_gradient_checkpointing`")
def test_peft_trains_an_adapter_on_our_integers(original: Path, tmp_path: Path) -> None:  # noqa: F811
    peft = pytest.importorskip("peft")
    from llmq.runtime.qlinear import QLinear

    native(original, tmp_path / "a", QuantScheme(4, 64, True))
    model = llmq.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    config = peft.LoraConfig(r=4, target_modules=["up_proj", "q_proj"], task_type="CAUSAL_LM")
    config._register_custom_module({QLinear: peft.tuners.lora.Linear})
    model = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05
