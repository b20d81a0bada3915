"""Run in the environment of a peer's package, which knows nothing of llmq: one model, quantized as JOB.json says.

``python peer_script.py JOB.json`` writes ``packed`` (the package's own files), ``plain`` (the same weights as floats)
and ``made.json`` (seconds, peak bytes, versions) into the job's folder.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

Job = dict[str, Any]


def peak_bytes() -> int:
    """Largest resident memory of this process, by llmq's own file for it, which needs nothing but Python."""
    peak: int = runpy.run_path(str(Path(__file__).absolute().parents[1] / "memory.py"))["peak_rss"]()
    return peak


def load(job: Job) -> Any:
    """The unquantized model in fp32."""
    return transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, local_files_only=True)


def save_plain(job: Job, quantized: Any) -> None:
    """Write the original model with the weights of the linears of ``quantized``, which hold rounded values."""
    plain, found = load(job), dict(quantized.named_modules())
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and name in found and name != "lm_head":
            module.weight.data.copy_(weight_of(found[name]).data.float())
    plain.save_pretrained(Path(job["folder"]) / "plain")


def weight_of(module: Any) -> Tensor:
    """[N, K], the values of a linear that holds them, or integers and scales in GPTQModel's way."""
    values: Tensor = _dequantized(module) if hasattr(module, "dequantize_weight") else module.weight
    return values


def _dequantized(module: Any) -> Tensor:
    module.scales = module.scales.float()  # scale times integer in fp32, not rounded to the scales' 16 bits
    values: Tensor = module.dequantize_weight().T
    return values


def autoround(job: Job, tokens: Tensor) -> None:
    """AutoRound; ``iters`` in the options, everything else its default."""
    library = importlib.import_module("auto_round")
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"], local_files_only=True)
    windows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in tokens]
    run = library.AutoRound(
        load(job),
        tokenizer,
        bits=job["bits"],
        group_size=job["group_size"],
        sym=job["sym"],
        dataset=windows,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        device_map="cpu",
        low_cpu_mem_usage=False,  # else it moves blocks to the disk when they are done
        **job["options"],
    )
    model, _ = run.quantize()
    save_plain(job, model)
    run.save_quantized(str(Path(job["folder"]) / "packed"), format="auto_round:auto_gptq")


def llmcompressor(job: Job, tokens: Tensor) -> None:
    """llm-compressor's GPTQ with its defaults."""
    library = importlib.import_module("llmcompressor")
    modifiers = importlib.import_module("llmcompressor.modifiers.gptq")
    datasets = importlib.import_module("datasets")
    weights = {"num_bits": job["bits"], "type": "int", "symmetric": job["sym"], "strategy": "group"}
    weights["group_size"] = job["group_size"]
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    model = load(job)
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    library.oneshot(
        model=model,
        dataset=datasets.Dataset.from_dict(rows),
        recipe=modifiers.GPTQModifier(config_groups=groups, ignore=["lm_head"], **job["options"]),
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
    )
    save_plain(job, model)
    model.save_pretrained(Path(job["folder"]) / "packed", save_compressed=True)


def gptqmodel(job: Job, tokens: Tensor) -> None:
    """GPTQModel's GPTQ with its defaults, in fp32."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(torch.get_num_threads()))  # else it wants more cores than two
    library = importlib.import_module("gptqmodel")
    config = library.QuantizeConfig(
        bits=job["bits"],
        group_size=job["group_size"],
        sym=job["sym"],
        **job["options"],
    )
    model = library.GPTQModel.load(job["model"], config, device="cpu", dtype=torch.float32)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens.tolist()]
    model.quantize(rows, batch_size=1)
    packed = str(Path(job["folder"]) / "packed")
    model.save(packed)
    del model
    # Read back: what is in memory after quantize has zeros that are one less than its own dequantization takes.
    save_plain(job, library.GPTQModel.load(packed, device="cpu", backend=library.BACKEND.TORCH).model)


FUNCTIONS: dict[str, Callable[[Job, Tensor], None]] = {
    "autoround": autoround,
    "gptqmodel": gptqmodel,
    "llmcompressor": llmcompressor,
}
PACKAGES = ("torch", "transformers", "auto-round", "GPTQModel", "llmcompressor", "compressed-tensors")


def main() -> None:
    """Do the job whose file is the only argument."""
    job: Job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder, began = Path(job["folder"]), time.monotonic()
    FUNCTIONS[job["function"]](job, load_file(folder / "tokens.safetensors")["tokens"])
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    made = {"seconds": time.monotonic() - began, "peak_bytes": peak_bytes()}
    versions = {name: installed[name] for name in PACKAGES if name in installed}
    (folder / "made.json").write_text(json.dumps({**made, "versions": versions}), encoding="utf-8")


if __name__ == "__main__":
    main()
