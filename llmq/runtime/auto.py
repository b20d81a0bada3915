"""llmq.AutoModelForCausalLM: transformers' class, and quantized folders and files of other tools besides."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from llmq.checkpoint import FORMAT_VERSION, REPORT_NAME
from llmq.config import cache_folder, one_of
from llmq.conversion import convert
from llmq.dialects import INEXACT, quantization_block
from llmq.dialects.source import open_source
from llmq.models.load import check_depth
from llmq.models.reader import read_header, read_json
from llmq.report import silent
from llmq.runtime.foreign import foreign_config

# Raised when a conversion of a GGUF file would come out differently, so that cached ones of an older llmq are not used.
CONVERSION = 1
# Options that say where a model's files are found.
HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
log = logging.getLogger(__name__)


class AutoModelForCausalLM(transformers.AutoModelForCausalLM):
    """As transformers' ``AutoModelForCausalLM``; opens GPTQ, AWQ, compressed-tensors and MLX folders, too.

    Their integers go onto llmq's kernels as they are.
    """

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, inexact: str = "refuse", **kwargs: Any
    ) -> Any:
        """A model from a folder or a hub id; all arguments of transformers' method, and one more.

        Args:
            pretrained_model_name_or_path: folder, hub id or ``.gguf`` file (converted once, into llmq's cache).
            args, kwargs: as transformers takes them. Folders of other tools are computed in float32 unless ``dtype``
                says otherwise.
            inexact: what to do with stored numbers that the kernels cannot hold exactly: ``refuse`` (an error that
                names them) or ``requantize`` (a warning for each matrix says what it cost).

        Raises:
            ValueError: a method that llmq does not read, a damaged folder, numbers that cannot be held.
        """
        one_of("inexact", inexact, INEXACT)
        with _clear_errors(pretrained_model_name_or_path, inexact):
            return cls._opened(pretrained_model_name_or_path, args, inexact, kwargs)

    @classmethod
    def _opened(cls, name: Any, args: tuple[Any, ...], inexact: str, kwargs: dict[str, Any]) -> Any:
        _check_folder(Path(str(name)).expanduser())
        if str(name).lower().endswith(".gguf") and Path(name).expanduser().is_file():
            kwargs.setdefault("dtype", torch.float32)
            return super().from_pretrained(expanded(Path(name).expanduser(), inexact), *args, **kwargs)
        if "config" in kwargs or "gguf_file" in kwargs:
            return super().from_pretrained(name, *args, **kwargs)
        hub: dict[str, Any] = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
        if not _is_foreign(name, hub):
            return super().from_pretrained(name, *args, **kwargs)
        config = transformers.AutoConfig.from_pretrained(name, **hub)
        kwargs.setdefault("dtype", torch.float32)
        return super().from_pretrained(name, *args, config=foreign_config(config, inexact), **kwargs)


def _check_folder(folder: Path) -> None:
    """Raise ValueError for what would keep transformers busy for ever."""
    shards = sorted(folder.glob("*.safetensors"))
    for file in shards:
        if file.exists() and not file.is_file():
            raise ValueError(f"{file} is no file but a folder, pipe or device, whose reading may never end")
    try:
        config, n_tensors = read_json(folder / "config.json"), sum(len(read_header(file)) for file in shards)
    except (ValueError, OSError):  # said better by whoever needs them
        return
    if shards:
        check_depth(config, n_tensors, str(folder))


@contextlib.contextmanager
def _clear_errors(name: Any, inexact: str) -> Iterator[None]:
    """Let a damaged file or folder be a ValueError that names it, whatever transformers stumbles over in it."""
    try:
        yield
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as error:
        path = Path(str(name)).expanduser()
        if (isinstance(error, ValueError) and path.name in str(error)) or not path.exists():
            raise
        try:
            open_source(path, inexact=inexact, log=silent)  # its messages say what is wrong with the files
        except (ValueError, OSError) as reason:
            if "is not quantized" not in str(reason):
                raise reason from error
        text = " ".join(str(error).split())
        if isinstance(error, SafetensorError):
            raise ValueError(f"a safetensors file in {name} is damaged ({text[:300]}); get it anew") from error
        raise ValueError(f"{name} cannot be opened: {type(error).__name__}: {text[:300]}") from error


def expanded(path: Path, inexact: str) -> Path:
    """The llmq folder of a GGUF file, in the cache, its integers the file's own; raises as ``convert`` does."""
    stat = path.stat()
    key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {inexact} {FORMAT_VERSION} {CONVERSION}"
    folder = cache_folder() / "gguf" / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}-llmq"
    if not folder.is_dir():  # it gets this name when it is complete
        convert(path, folder, "llmq", lossy=inexact == "requantize", log=log.info)
    for note in read_json(folder / REPORT_NAME)["converted"]["notes"]:
        log.warning("%s", note)
    return folder


def _is_foreign(name: Any, hub: dict[str, Any]) -> bool:
    """Whether a config.json is that of a foreign dialect; other methods, and its absence, are left to transformers."""
    try:
        raw, _ = transformers.PretrainedConfig.get_config_dict(name, **hub)
        found = quantization_block(raw)
    except (ValueError, OSError):
        return False
    return found is not None and found[0] != "llmq"
