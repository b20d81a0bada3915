"""llmq with the newest transformers 4, in an environment beside this one. Skips where pip cannot get the packages."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_gguf import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import llmq
from llmq import CalibConfig, QuantScheme, quantize_model
from llmq.compat import API, VERSIONS

ROOT = Path(__file__).resolve().parent.parent
PINS = (
    "transformers==4.57.6",
    "huggingface_hub==0.36.2",
    "tokenizers==0.22.2",
    # The newest that takes this huggingface_hub, and what it needs besides.
    "datasets==4.8.5",
    "httpx==0.28.1",
    "httpcore==1.0.9",
)
IDS = torch.arange(3, 40)[None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(API is VERSIONS[4], reason="this is transformers 4 already"),
]

TEXT = "naïve  words\n<bos> 12"
# Logits and token ids of every folder into one file.
LOGITS = (
    f"TEXT = {TEXT!r}"
    + """
import sys, torch, transformers, llmq
from safetensors.torch import load_file, save_file
assert transformers.__version__.startswith("4."), transformers.__version__
ids = torch.arange(3, 40)[None]
found = {}
for folder in sys.argv[2:]:
    with torch.no_grad():
        found[folder] = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found[folder + " tokens"] = torch.tensor(tokenizer(TEXT).input_ids)
save_file(found, sys.argv[1])
"""
)


def packages_of(environment: Path) -> Path:
    return next(environment.glob("lib/python*/site-packages"))


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that sees this one's packages behind those of PINS."""
    folder = tmp_path_factory.mktemp("transformers4") / "env"
    venv.create(folder, with_pip=False)
    packages = packages_of(folder)
    (packages / "outer.pth").write_text("\n".join([*site.getsitepackages(), site.getusersitepackages()]) + "\n")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", "--no-compile")
    got = subprocess.run(
        [*pip, "--retries", "1", "--timeout", "15", "--target", packages, *PINS],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if got.returncode:
        pytest.skip(f"pip cannot get {', '.join(PINS)}: {(got.stderr.strip().splitlines() or ['no message'])[-1]}")
    return folder / "bin" / "python"


def run(python: Path, *arguments: str | Path, code: int = 0) -> str:
    """The command's output in the other environment, which must end with ``code``."""
    # Where llmq is installed, transformers 5 lies beside it.
    path = [packages_of(python.parent.parent), Path(llmq.__file__).parent.parent, ROOT / "tests"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, *arguments], env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "select"),
    [
        ("test_runtime.py", ""),
        ("test_forward.py", ""),
        ("test_dialects.py", "integers_are_untouched or saved_again or desc_act or tied_embedding or own_class"),
        ("test_quantized_cache.py", "prompt_lookup or native_decoder or layers_that"),
    ],
)
def test_part_of_the_suite(file: str, select: str, python: Path) -> None:
    options = ("-q", "-p", "no:cacheprovider", "-m", "not slow", *(("-k", select) if select else ()))
    said = run(python, "-m", "pytest", *options, ROOT / "tests" / file)
    assert " passed" in said
    assert "no tests ran" not in said


def test_folders_of_transformers_5_are_the_same_model(
    tiny_model: Callable[..., Path], tmp_path: Path, python: Path
) -> None:
    """Its ropes by layer, a scaled one, and one of a part of the columns; dense and quantized."""
    sizes = {"num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 112, "vocab_size": 384}
    rope = {"rope_type": "llama3", "rope_theta": 5e3, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 16
    config = LlamaConfig(hidden_size=48, max_position_embeddings=64, rope_parameters=rope, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama3")
    AutoTokenizer.from_pretrained(tiny_model("llama")).save_pretrained(tmp_path / "llama3")
    quantized = [tiny_model(family) for family in ("gemma2", "gemma3", "mistral")]
    folders = [tmp_path / "llama3", *quantized, tiny_model("gemma3-multimodal"), tiny_model("gpt_neox")]
    calib = CalibConfig("stdlib", nsamples=1, seqlen=16)
    for source in quantized:
        output = tmp_path / f"{source.name}-q"
        quantize_model(source, QuantScheme(4, 32), method="rtn", head_bits=8, output=output, calib=calib)
        folders.append(output)
    run(python, "-c", LOGITS, tmp_path / "found", *folders)
    found = load_file(tmp_path / "found")
    for folder in folders:
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits
        assert found[f"{folder} tokens"].tolist() == AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
        assert (found[str(folder)] - expected).abs().max() < 1e-4 * expected.abs().max(), folder


def test_a_folder_quantized_there_opens_here(tiny_model: Callable[..., Path], tmp_path: Path, python: Path) -> None:
    output = tmp_path / "q"
    options = ("--bits", "4", "--group-size", "32", "--method", "gptq", "--calib", "stdlib", "--nsamples", "2")
    source = tiny_model("gemma3")
    run(python, "-m", "llmq.quantize", "--model", source, "--output", output, "--seqlen", "32", *options)
    run(python, "-c", LOGITS, tmp_path / "found", output)
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(load_file(tmp_path / "found")[str(output)], model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert model.generate(IDS, max_new_tokens=4).shape == (1, IDS.shape[1] + 4)


def test_gguf_files_are_refused_there(tmp_path: Path, python: Path) -> None:
    path, _ = write_gguf(tmp_path / "x.gguf")
    options = ("--model", path, "--output", tmp_path / "q")
    said = run(python, "-m", "llmq.quantize", *options, code=2)
    assert "transformers 4.57.6 makes wrong tokenizers of GGUF files" in said
    assert "install transformers 5, or take the model in safetensors" in said
    assert not (tmp_path / "q").exists()
