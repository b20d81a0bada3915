"""Expand a GGUF file to an ordinary model folder: float32 safetensors, config and tokenizer.

transformers reads and dequantizes the file; what it leaves on the model to mark it as quantized is not carried over.
An expansion needs twice the model's memory, so :func:`expand_apart` runs it in a process of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from llmq.compat import API
from llmq.models.gguf_header import BadHeader, check_header

SHARD_SIZE = "500MB"
# Raised when an expansion would come out differently, so that folders cached by an older llmq are not used.
EXPANSION = 1
PROBE = "The quick brown fox,\n  12 km away: naïve?"


def expand_gguf(path: Path, folder: Path) -> Path:
    """Write the model in the GGUF file ``path`` to the new folder ``folder``, in float32, and return ``folder``.

    The folder is read back: its tokenizer must give the ids the file asks for (a BOS token included), its weights must
    fit its config.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a GGUF file, one part of a split one, damaged, of an architecture that transformers does not
            read, or larger than the free disk space; each names the file.
    """
    path, folder = Path(path), Path(folder)
    check_file(path)
    check_version(path)
    with one_reader():
        try:
            reader = _reader(path)
            fields = {name: _value(reader, name) for name in ("split.count", "tokenizer.ggml.add_bos_token")}
            values = sum(int(tensor.n_elements) for tensor in reader.tensors)
        except Exception as error:  # the parser indexes whatever the bytes say, so any error may come out of it
            raise damaged(path, error) from error
        if (fields["split.count"] or 1) > 1:
            raise ValueError(
                f"{path} is one part of a model split into {fields['split.count']} files;"
                " join them with llama-gguf-split --merge first"
            )
        _check_space(path, folder, values * 4)
        try:
            model, tokenizer = _load(path)
        except Exception as error:
            raise damaged(path, error) from error
    _check_bos(path, tokenizer, fields["tokenizer.ggml.add_bos_token"])
    _save(model, tokenizer, folder)
    ids = tokenizer(PROBE).input_ids
    del model
    _check_folder(path, folder, ids)
    return folder


def expand_apart(path: Path, folder: Path) -> Path:
    """:func:`expand_gguf` in a process of its own, whose memory is gone when it ends.

    Raises:
        FileNotFoundError, ValueError: as :func:`expand_gguf`; also if the process dies.
    """
    check_magic(path)
    check_version(path)
    root = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, "-c", "from llmq.models.gguf import main; main()", str(path), str(folder)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if run.returncode == 2:
        raise ValueError(run.stdout.strip())
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"{path} could not be expanded: the process ended with code {run.returncode} ({last})")
    return Path(folder)


def check_magic(path: Path) -> None:
    """Raise FileNotFoundError or ValueError unless ``path`` begins as a GGUF file does."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with Path(path).open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{path} begins with {magic!r}, a GGUF file with {b'GGUF'!r}: it is something else or damaged")


def check_version(path: Path) -> None:
    """Raise ValueError where the installed transformers cannot make config and tokenizer of ``path``."""
    if not API.makes_gguf_tokenizers:
        raise ValueError(
            f"{path}: transformers {transformers.__version__} makes wrong tokenizers of GGUF files (Gemma 3's "
            "gives twice as many tokens); install transformers 5, or take the model in safetensors. A folder that was "
            "expanded or quantized with transformers 5 opens with both"
        )


def check_file(path: Path) -> None:
    """As :func:`check_magic`, and ValueError for a header that the file contradicts. Comes before any parser."""
    check_magic(path)
    try:
        check_header(Path(path))
    except BadHeader as error:
        raise damaged(Path(path), error) from error


def open_reader(path: Path) -> Any:
    """A ``gguf.GGUFReader`` of the file. Raises FileNotFoundError or ValueError for what is no whole GGUF file."""
    check_file(path)
    with one_reader():
        try:
            return _reader(path)
        except Exception as error:  # the parser indexes whatever the bytes say, so any error may come out of it
            raise damaged(path, error) from error


def _reader(path: Path) -> Any:
    import gguf

    return gguf.GGUFReader(path)


def _value(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


@contextlib.contextmanager
def one_reader() -> Iterator[Any]:
    """Let transformers parse the file once for config, weights and tokenizer, and on plain arrays.

    It makes a new GGUFReader for each of the three, and each reads a vocabulary of 262144 tokens through slices of a
    numpy memmap: 25 s a time instead of 8. Yields what makes such a reader of a path.
    """
    import gguf
    import numpy as np

    original: Any = gguf.GGUFReader
    made: dict[str, Any] = {}

    class PlainReader(original):  # type: ignore[misc]
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, value: Any) -> None:
            self._plain = np.asarray(value)

    def reader(path: Any, mode: str = "r") -> Any:
        key = str(Path(path).resolve())
        if key not in made:
            made[key] = PlainReader(path, mode)
        return made[key]

    gguf.GGUFReader = reader  # type: ignore[misc, assignment]
    try:
        yield reader
    finally:
        gguf.GGUFReader = original  # type: ignore[misc]


def _load(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)
    return model, AutoTokenizer.from_pretrained(path.parent, **where)


def _check_bos(path: Path, tokenizer: Any, add_bos: bool | None) -> None:
    """The tokenizer must begin texts as the file says; else no perplexity would be right."""
    ids = tokenizer("x").input_ids
    begins = bool(ids) and ids[0] == tokenizer.bos_token_id
    if add_bos is not None and begins != add_bos:
        raise ValueError(
            f"{path} says add_bos_token is {add_bos}, but the tokenizer that transformers makes of it gives {ids} for"
            f" 'x' (BOS is {tokenizer.bos_token_id}); take the model in safetensors"
        )


def _check_space(path: Path, folder: Path, need: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if need > free:
        raise ValueError(
            f"{path} expands to {need / 1e9:.1f} GB in {folder.parent}, where {free / 1e9:.1f} GB are free;"
            " make room or set LLMQ_CACHE to another folder"
        )


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write weights (tied ones once), config, generation config and tokenizer."""
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        for copy_name in model.all_tied_weights_keys:
            state.pop(copy_name)
    save_torch_state_dict(state, folder, max_shard_size=SHARD_SIZE, metadata={"format": "pt"})
    for shard in folder.glob("*.safetensors"):
        shard.chmod(0o644)  # written as 0600
    config = model.config
    del config.quantization_config  # else from_pretrained would look for GGUF tensors
    for name in ("_model_name_or_path", "_is_quantized"):
        config.__dict__.pop(name, None)
    config.name_or_path = ""
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.init_kwargs.pop("local_files_only", None)  # saved as if it were the tokenizer's
    tokenizer.save_pretrained(folder)


def _check_folder(path: Path, folder: Path, ids: list[int]) -> None:
    from llmq.models.load import open_model

    got = open_model(folder).tokenizer(PROBE).input_ids
    if got != ids:
        raise ValueError(f"{path}: its tokenizer gives {ids} for {PROBE!r}, but once saved in {folder} gives {got}")


def damaged(path: Path, error: Exception) -> ValueError:
    """The error of a file that a parser stumbled over."""
    reason = (str(error).strip().splitlines() or [""])[0]
    return ValueError(
        f"{path} ({path.stat().st_size} bytes) could not be read: {type(error).__name__}: {reason}."
        " It is truncated or damaged, or of an architecture that transformers does not read from GGUF"
    )


def main() -> None:
    """One expansion, ``FILE FOLDER``; exit code 2 and the message on stdout for an error of the user's."""
    try:
        expand_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
    except (ValueError, FileNotFoundError) as error:
        print(error)
        sys.exit(2)
