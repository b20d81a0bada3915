"""GPTQModel (the package) and our GPTQ folders, both ways. Skips where it is not installed.

pip install gptqmodel (7.7 asks for torch 2.14 and worked with 2.13: --no-deps, then what it lacks), in an environment
of its own: where it is installed, peft asks for optimum.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_conversion import native
from test_dialects import IDS, check_logits, dense_logits, original  # noqa: F401
from tokenizers import Tokenizer, models

import llmq
from llmq.config import QuantScheme
from llmq.conversion import convert
from llmq.dialects import open_quantized

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("logs"))  # where it writes them
        patch.setenv("GPTQMODEL_CPU_WORKERS", "2")  # on two cores it gives itself one, and then asks for two
        yield pytest.importorskip("gptqmodel")


def add_tokenizer(folder: Path) -> None:
    """It does not load a folder without one."""
    words = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(160)}, unk_token="<0>"))
    names = {"unk_token": "<0>", "pad_token": "<1>", "bos_token": "<1>", "eos_token": "<2>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)


def opened(package: Any, folder: Path) -> Any:
    """The folder on its plain torch kernel, which has 16-bit floats only."""
    return package.GPTQModel.load(
        str(folder), device="cpu", backend=package.BACKEND.GPTQ_TORCH, dtype=torch.float16
    ).model


def check_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Logits computed in fp16, a relative 2**-11 a product and a sum, against fp32; a wrong zero gives others."""
    assert (found.float() - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize(
    "scheme",
    [QuantScheme(4, 32, True), QuantScheme(4, 64), QuantScheme(8, 32, True), QuantScheme(2, 32, True)],
    ids=str,
)
def test_it_loads_our_folder(package: Any, scheme: QuantScheme, original: Path, tmp_path: Path) -> None:  # noqa: F811
    held = native(original, tmp_path / "a", scheme)
    convert(tmp_path / "a", tmp_path / "b", "gptq")
    add_tokenizer(tmp_path / "b")
    theirs = opened(package, tmp_path / "b")
    linear = theirs.get_submodule(UP)
    assert type(linear).__module__.startswith("gptqmodel.")
    # fp16(scale) * whole number in fp16: one rounding, as half() of the exact product.
    assert torch.equal(linear.dequantize_weight().T, held[UP].dequantize().half())
    with torch.no_grad():
        found = theirs(IDS).logits
    check_close(found, dense_logits(original, {name: t.dequantize() for name, t in held.items()}))


@pytest.mark.parametrize("desc_act", [False, True])
def test_we_load_what_it_wrote(package: Any, desc_act: bool, original: Path, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(original, tmp_path / "o")
    add_tokenizer(tmp_path / "o")
    config = package.QuantizeConfig(bits=4, group_size=32, desc_act=desc_act, sym=True)
    model = package.GPTQModel.load(str(tmp_path / "o"), config, device="cpu")
    random = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 160, (1, 64), generator=random) for _ in range(32)]
    model.quantize([{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids], batch_size=1)
    model.save(str(tmp_path / "q"))
    found = open_quantized(tmp_path / "q")
    assert found.dialect == "gptq"
    assert UP in found.matrices
    theirs = opened(package, tmp_path / "q")
    # An acceptable layout of theirs for desc_act: our columns are put back in the module's order.
    assert torch.equal(theirs.get_submodule(UP).dequantize_weight().T, found.matrices[UP].dequantize().half())
    ours = llmq.AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    weights = {name: m.dequantize() for name, m in found.matrices.items()}
    # What it does not quantize it stores with fewer bits than the original has.
    kept = {n: t for file in (tmp_path / "q").glob("*.safetensors") for n, t in load_file(file).items()}
    weights |= {n.removesuffix(".weight"): t for n, t in kept.items() if n.endswith(".weight")}
    assert {"model.embed_tokens", "model.norm"} <= set(weights)
    expected = dense_logits(original, weights)
    check_logits(ours, expected)
    with torch.no_grad():
        check_close(theirs(IDS).logits, expected)
