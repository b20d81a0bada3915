"""ENGINES: one row an engine and its kind of weights; what each needs, and how its files are made of one checkpoint."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from llmq.bench.peer_files import ToolFailed, make_onnx, make_openvino
from llmq.config import QuantScheme, one_of
from llmq.models.gguf_export import export_gguf
from llmq.pipeline import quantize_model

Log = Callable[[str], None]
# Raised when an engine's files would come out differently, so that older ones are not used.
FILES = 1
INSTALL_ONNX = "pip install 'llmq[peers]' onnxruntime"
INSTALL_OPENVINO = (
    "pip install 'llmq[peers]' optimum-intel 'transformers==5.0.0' 'datasets<5', best in a new environment"
)
INSTALL_LLAMA = "CMAKE_ARGS=-DGGML_NATIVE=ON pip install 'llmq[bench]', or name a built llama-bench with --llama-bench"


@dataclass(frozen=True)
class Program:
    """A llama-bench program of any fork: a name for its rows, its path, and options of its own (ik's ``-rtr 1``)."""

    name: str
    path: Path
    options: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Program:
        """``[NAME=]PATH [OPTION ...]``. Raises ValueError or FileNotFoundError."""
        words = shlex.split(text)
        if not words:
            raise ValueError("--llama-bench is empty; give [NAME=]PATH, separated by commas if there are several")
        name, equals, path = words[0].rpartition("=")
        found = Path(path).expanduser()
        if not (found.is_file() and os.access(found, os.X_OK)):
            raise FileNotFoundError(f"--llama-bench: {found} is no program; give the path of a built llama-bench")
        return cls(name if equals else "llama.cpp", found.absolute(), tuple(words[1:]))

    def sibling(self, name: str) -> Path | None:
        """Another program of the same build, or None."""
        path = self.path.with_name(name)
        return path if path.is_file() else None


@dataclass(frozen=True)
class Source:
    """The checkpoint every engine's file is made of, the folder for these files, and the programs at hand."""

    folder: Path
    cache: Path
    programs: tuple[Program, ...] = ()
    threads: int = 1


@dataclass(frozen=True)
class Engine:
    """One way to run the model.

    Attributes:
        driver: row of ``llmq.bench.drivers.DRIVERS``.
        about: what it is, for the table.
        make: makes its file or folder at the path given, from the source.
        suffix: of that file; "" for a folder, None where the source itself is used.
        options: for the driver.
        stored_bits: bits of a weight in memory where the file's are other ones.
        module: Python module it needs, or None; ``install`` says how to get it.
        kv: bits of keys and values as ``llmq.KVCacheConfig.parse`` reads them; "": the engine's own 16 (OpenVINO: 8).
        program: the llama-bench that runs it.
    """

    driver: str
    about: str
    make: Callable[[Source, Path, Log], object] | None = None
    suffix: str | None = ""
    options: dict[str, object] = field(default_factory=dict)
    stored_bits: int | None = None
    module: str | None = None
    install: str = ""
    kv: str = ""
    program: Program | None = None

    def missing(self) -> str | None:
        """Why it cannot run here, with the way out; None if it can."""
        if self.module is None or _installed(self.module):
            return None
        return f"the package {self.module} is not installed; {self.install}"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _llmq(scheme: str, head_bits: int, kv: str = "") -> Engine:
    """Round-to-nearest: the solver does not matter for speed."""

    def make(source: Source, path: Path, log: Log) -> None:
        log(f"quantizing to {scheme}, head {head_bits}")
        quantize_model(source.folder, QuantScheme.parse(scheme), method="rtn", head_bits=head_bits, output=path)

    about = f"llmq {scheme}, head {head_bits}" + _cache_words(kv)
    return Engine("transformers", about, make, options={"kv_cache": kv} if kv else {}, kv=kv)


def _cache_words(kv: str) -> str:
    return f", cache {kv}" if kv else ""


def _torch(dtype: str, bits: int) -> Engine:
    options: dict[str, object] = {"dtype": dtype}
    return Engine("transformers", f"torch {dtype}", None, None, options, stored_bits=bits)


# The types of llama.cpp's cache, by the bits of a row.
LLAMA_CACHE = {"8": "q8_0", "4": "q4_0"}


def _llama(quantization: str, *options: str, kv: str = "") -> Engine:
    def make(source: Source, path: Path, log: Log) -> None:
        full = made(source, "f16.gguf", _export, log)
        log(f"writing the GGUF in {' '.join((quantization, *options))}")
        quantize_gguf(source, full, path, quantization, options)

    make_file = _export if quantization == "F16" else make
    about = " ".join(("llama.cpp", quantization, *(("head 4",) if options else ()))) + _cache_words(kv)
    types: dict[str, object] = {"cache_type": LLAMA_CACHE[kv]} if kv else {}
    return Engine(
        "llama-cpp-python", about, make_file, ".gguf", types, module="llama_cpp", install=INSTALL_LLAMA, kv=kv
    )


def _export(source: Source, path: Path, log: Log) -> None:
    log("writing the checkpoint as GGUF in float16")
    export_gguf(source.folder, path)


def _peer(
    driver: str, about: str, maker: Callable[[Path, Path], None], tools: tuple[str, ...], module: str, install: str
) -> Engine:
    """``tools``: modules that only the making of the files needs; another environment may have made them."""

    def make(source: Source, path: Path, log: Log) -> None:
        for tool in tools:
            if not _installed(tool):
                raise ToolFailed(f"making its files needs the package {tool}, which is not installed; {install}")
        log(f"writing the files of {about}")
        maker(source.folder, path)

    return Engine(driver, about, make, module=module, install=install)


# Name -> row. A llama.cpp row stands for each --llama-bench program where there are some.
ENGINES: dict[str, Engine] = {
    "llmq-w4-h4": _llmq("w4g128", 4),
    "llmq-w4-h8": _llmq("w4g128", 8),
    "llmq-w4g32-h4": _llmq("w4g32sym", 4),
    "llmq-w8": _llmq("w8g128", 8),
    "llmq-w4-h8-kv8": _llmq("w4g128", 8, kv="8"),
    "llmq-w4-h8-kv4": _llmq("w4g128", 8, kv="4"),
    "llama.cpp-q4_0": _llama("Q4_0"),
    "llama.cpp-q4_0-h4": _llama("Q4_0", "--output-tensor-type", "q4_0", "--token-embedding-type", "q4_0"),
    "llama.cpp-q4_k_m": _llama("Q4_K_M"),
    "llama.cpp-q8_0": _llama("Q8_0"),
    "llama.cpp-q4_0-kv8": _llama("Q4_0", kv="8"),
    "llama.cpp-f16": _llama("F16"),
    "onnx-genai-int4": _peer(
        "onnx-genai",
        "ONNX Runtime GenAI int4 g32 symmetric, int8 activations, head 4",
        make_onnx,
        ("onnx_ir",),
        "onnxruntime_genai",
        INSTALL_ONNX,
    ),
    "openvino-int4": _peer(
        "openvino",
        "OpenVINO GenAI int4 g32 symmetric, head 8",
        make_openvino,
        ("optimum.intel", "nncf"),
        "openvino_genai",
        INSTALL_OPENVINO,
    ),
    "torch-bf16": _torch("bfloat16", 16),
    "torch-fp32": _torch("float32", 32),
}
DEFAULT = ("llmq-w4-h4", "llmq-w4-h8", "llama.cpp-q4_0", "torch-bf16")


def select(names: list[str], programs: tuple[Program, ...]) -> dict[str, Engine]:
    """The rows called ``names``, in order; llama.cpp's once for each program. ValueError lists the known names."""
    chosen: dict[str, Engine] = {}
    for name in dict.fromkeys(names):
        one_of("engine", name, ENGINES)
        row = ENGINES[name]
        if row.module != "llama_cpp" or not programs:
            chosen[name] = row
        for program in programs if row.module == "llama_cpp" else ():
            label = name.replace("llama.cpp", program.name)
            about = row.about.replace("llama.cpp", program.name)
            if label in chosen:
                raise ValueError(f"two --llama-bench programs are called {program.name}; name them: NAME=PATH")
            chosen[label] = Engine(
                "llama-bench", about, row.make, row.suffix, options=row.options, kv=row.kv, program=program
            )
    return chosen


def file_name(name: str, kv: str, programs: tuple[Program, ...]) -> str:
    """The file of an engine: forks of llama.cpp share theirs, and rows that differ in the cache's bits ``kv``."""
    name = name.removesuffix(f"-kv{kv}")
    for program in programs:
        if name.startswith(program.name + "-"):
            return "llama.cpp" + name[len(program.name) :]
    return name


def made(source: Source, name: str, make: Callable[[Source, Path, Log], object], log: Log) -> Path:
    """The file or folder ``name`` in the cache of the source's content, made now if it is not there."""
    folder = source.cache / fingerprint(source.folder)
    path = folder / name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f"partial-{os.getpid()}-{name}"
        try:
            make(source, scratch, log)
            scratch.rename(path)
        finally:
            if scratch.is_dir():
                shutil.rmtree(scratch)
            scratch.unlink(missing_ok=True)
    return path


def fingerprint(folder: Path) -> str:
    """Name of a checkpoint's content: its folder's name and a hash of config, file names, sizes and times."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    return f"{folder.absolute().name}-{digest.hexdigest()[:12]}-v{FILES}"


def quantize_gguf(source: Source, full: Path, path: Path, quantization: str, options: tuple[str, ...]) -> None:
    """Quantize a GGUF with a program's llama-quantize, else with the llama_cpp package. Raises ValueError."""
    for program in source.programs:
        quantizer = program.sibling("llama-quantize")
        if quantizer is not None:
            command = [str(quantizer), *options, str(full), str(path), quantization, str(source.threads)]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                raise ValueError(f"{quantizer} ended with code {run.returncode}: {run.stderr.strip()[-300:]}")
            return
    if importlib.util.find_spec("llama_cpp") is None:
        raise ValueError(
            f"no llama-quantize beside the --llama-bench programs and no package llama_cpp: {INSTALL_LLAMA}"
        )
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quantization}")
    parameters.nthread = source.threads
    types = {"--output-tensor-type": "output_tensor_type", "--token-embedding-type": "token_embedding_type"}
    for flag, value in zip(options[::2], options[1::2], strict=True):
        setattr(parameters, types[flag], getattr(llama_cpp, f"GGML_TYPE_{value.upper()}"))
    code = llama_cpp.llama_model_quantize(bytes(full), bytes(path), parameters)
    if code:
        raise ValueError(f"llama_model_quantize of {full} to {quantization} ended with code {code}")
