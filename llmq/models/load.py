"""Open a model folder: its module tree without weights, its family, its weights on demand.

Nothing here runs code from the folder: no pickles, no remote code.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from llmq.compat import API
from llmq.models.families import FAMILIES, ModelFamily, family_of
from llmq.models.reader import WeightReader, read_json

__all__ = ["GenericFamily", "SourceModel", "WeightReader", "materialize", "open_model"]

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Where config.json gives no context length the model has no limit of its own.
UNLIMITED = 2**31 - 1


@dataclass(frozen=True)
class GenericFamily(ModelFamily):
    """A family found by looking at the module tree: each linear its own group, no tails, nowhere to fold scales."""

    block_list: str = ""

    @property
    def blocks(self) -> str:
        """Path of the list of decoder blocks."""
        return self.block_list


@dataclass
class SourceModel:
    """A model to quantize, open but not loaded.

    Attributes:
        folder: where it lies.
        config: the model's config, as in its config.json.
        family: its row of FAMILIES, or a :class:`GenericFamily`.
        model: its module tree in eval mode, parameters on meta, buffers real; gradients off.
        reader: its weights, named as in ``model`` (tied names are readable too).
        block_names: path of each decoder block, in running order.
        max_positions: tokens of context; ``UNLIMITED`` where the config gives no number.
        tied: one matrix serves as token embedding and head.
        embed_name: path of the token embedding.
        head_name: path of the output head.
        unused: stored tensors the model has no use for.
    """

    folder: Path
    config: Any
    family: ModelFamily
    model: nn.Module
    reader: WeightReader
    block_names: list[str]
    max_positions: int
    tied: bool
    embed_name: str
    head_name: str
    unused: list[str] = field(default_factory=list)

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's tokenizer, loaded at first use. Raises ValueError naming the folder when it has none."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
            reason = _first_line(error)
            raise ValueError(f"{self.folder} has no tokenizer that transformers can load: {reason}") from error

    @property
    def model_type(self) -> str:
        """``model_type`` of config.json."""
        return str(self.config.model_type)

    @property
    def parameter_count(self) -> int:
        """Parameters of the model, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def is_chat(self) -> bool:
        """Whether the model was trained to answer: its chat template ends a turn with a token at which it stops.

        A base model may carry a template too (Qwen2.5), but stops at another token. A template that does not render
        for a plain question and answer cannot be used, so such a model counts as a base model.
        """
        return _is_chat(self.tokenizer, self.folder)

    def block(self, i: int) -> nn.Module:
        """The i-th decoder block."""
        return self.model.get_submodule(self.block_names[i])

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """Linears of a block that share their input, in the order of solving."""
        return [group for group in self.family.linear_groups if set(group) <= set(self.block_linears(0))]

    def block_linears(self, i: int) -> dict[str, tuple[int, int]]:
        """Local name -> (out_features, in_features) of the linears of block ``i``, in the order of solving."""
        block = self.block(i)
        names = [name for group in self.family.linear_groups for name in group]
        linears = {name: m for name, m in block.named_modules() if name in names and isinstance(m, nn.Linear)}
        return {name: (linears[name].out_features, linears[name].in_features) for name in names if name in linears}


def open_model(folder: Path) -> SourceModel:
    """Open the model in ``folder`` without loading its weights.

    Raises:
        FileNotFoundError: no config.json or no weights.
        ValueError: a quantized model, weights that are damaged, missing, of another shape than the config says or not
            floating point, an architecture that transformers does not know or whose blocks cannot be found.
    """
    folder = Path(folder)
    raw = read_json(folder / "config.json")
    _refuse_quantized(folder, raw)
    config = load_config(folder, raw)
    family = family_of(config.model_type)
    reader = WeightReader(folder, renames=family.key_renames if family else API.head_renames)
    model = empty_model(config)
    family = family or discover_family(model, config.model_type)
    embed, head = embedding_names(model, folder)
    source = SourceModel(
        folder=folder,
        config=config,
        family=family,
        model=model,
        reader=reader,
        block_names=_block_names(model, family),
        max_positions=int(getattr(config.get_text_config(), "max_position_embeddings", None) or UNLIMITED),
        tied=model.get_parameter(f"{embed}.weight") is model.get_parameter(f"{head}.weight"),
        embed_name=embed,
        head_name=head,
    )
    _tie_names(source)
    _check_weights(source)
    return source


@contextlib.contextmanager
def materialize(
    module: nn.Module, prefix: str, reader: WeightReader, *, dtype: torch.dtype = torch.float32
) -> Iterator[nn.Module]:
    """Load the parameters of ``module`` for the duration of a ``with``, then put it back to what it was (meta).

    Args:
        module: a module of the tree, changed in place; tied parameters stay one tensor.
        prefix: its path in the model, ``""`` for the whole model.
        reader: the model's weights.
        dtype: dtype of the loaded parameters.

    Raises:
        ValueError: a parameter that is not in the files, or has another shape there.
    """
    before: list[tuple[nn.Module, str, nn.Parameter]] = []
    loaded: dict[int, nn.Parameter] = {}
    try:
        for path, owner in module.named_modules():
            for name, old in list(owner._parameters.items()):
                if old is None:
                    continue
                if id(old) not in loaded:
                    value = _read_parameter(reader, ".".join(filter(None, (prefix, path, name))), old, dtype)
                    loaded[id(old)] = nn.Parameter(value, requires_grad=False)
                before.append((owner, name, old))
                owner._parameters[name] = loaded[id(old)]
        yield module
    finally:
        for owner, name, old in before:
            owner._parameters[name] = old


def discover_family(model: nn.Module, model_type: str) -> GenericFamily:
    """A family for an architecture without a row: the blocks are the longest list of modules that all hold linears.

    Raises:
        ValueError: no such list, or blocks that do not hold the same linears; says which and lists the known families.
    """
    known = f"Families with a row: {', '.join(f.name for f in FAMILIES)}"
    decoder = cast("Any", model).get_decoder() if hasattr(model, "get_decoder") else model
    inside = next((path for path, m in model.named_modules() if m is decoder), "")
    lists = [
        (path, m)
        for path, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) and f"{path}.".startswith(f"{inside}." if inside else "")
    ]
    with_linears = [(path, m) for path, m in lists if all(_linear_names(block) for block in m)]
    if not with_linears:
        found = "; ".join(f"{path} of {len(m)} {type(m[0]).__name__}" for path, m in lists) or "no list of modules"
        raise ValueError(
            f"model_type {model_type!r} has no family row, and its decoder blocks were not found: no list of modules"
            f" has a torch.nn.Linear in each item (found: {found}). {known}"
        )
    path, blocks = max(with_linears, key=lambda item: len(item[1]))
    names = _linear_names(blocks[0])
    for i, block in enumerate(blocks):
        if _linear_names(block) != names:
            raise ValueError(
                f"model_type {model_type!r} has no family row, and its blocks differ: {path}.0 holds"
                f" {', '.join(names)}, {path}.{i} holds {', '.join(_linear_names(block))}. {known}"
            )
    return GenericFamily(
        name=f"generic:{model_type}",
        model_types=(model_type,),
        decoder=path.rpartition(".")[0],
        linear_groups=tuple((name,) for name in names),
        tails={},
        smooth_pairs=(),
        no_clip=(),
        block_list=path,
    )


def _linear_names(block: nn.Module) -> list[str]:
    return [name for name, m in block.named_modules() if isinstance(m, nn.Linear)]


def _refuse_quantized(folder: Path, raw: dict[str, Any]) -> None:
    for key in ("quantization_config", "compression_config"):
        if raw.get(key):
            method = raw[key].get("quant_method", "an unnamed method") if isinstance(raw[key], dict) else raw[key]
            raise ValueError(
                f"{folder} is already quantized by {method} ({key} in its config.json); quantizing again would only add"
                " errors. Give the unquantized model, or dequantize it first"
            )


def load_config(folder: Path, raw: dict[str, Any]) -> Any:
    """The folder's config as transformers makes it; ``raw`` is its config.json. ValueError where it makes none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and its config classes raise whatever a damaged field provokes
        kind = raw.get("model_type")
        remote = " It asks for code of its own (auto_map), which llmq never runs." if "auto_map" in raw else ""
        raise ValueError(
            f"transformers cannot make a config of {folder / 'config.json'} (model_type {kind!r}):"
            f" {_first_line(error)}.{remote} Families with a row: {', '.join(f.name for f in FAMILIES)}"
        ) from error


def empty_model(config: Any) -> nn.Module:
    """The causal LM of ``config`` with its parameters on meta. ValueError where transformers makes none."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            # A copy: from_config writes the dtype into the config it is given.
            own = copy.deepcopy(config)
            model = AutoModelForCausalLM.from_config(own, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # a config with impossible numbers fails wherever the model first uses them
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise ValueError(f"no causal LM can be made of this {config.model_type} config: {reason}") from error
    model.tie_weights()  # again: under init_empty_weights each name got a parameter of its own
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def check_depth(config: Mapping[str, Any], n_tensors: int, where: str) -> None:
    """Raise ValueError for a config.json of more layers than tensors: its modules alone may fill the memory."""
    text = config.get("text_config")
    layers = (text if isinstance(text, dict) else config).get("num_hidden_layers")
    if isinstance(layers, int) and layers > n_tensors:
        raise ValueError(f"{where}: config.json says {layers} layers, the files hold {n_tensors} tensors: damaged")


def embedding_names(model: Any, folder: Path) -> tuple[str, str]:
    """Paths of token embedding and output head. ValueError for a model without."""
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {id(m): path for path, m in model.named_modules()}
    if embed is None or head is None or id(embed) not in paths or id(head) not in paths:
        lacking = "token embedding" if embed is None or id(embed) not in paths else "output head"
        raise ValueError(f"{folder}: {type(model).__name__} has no {lacking}; llmq quantizes causal language models")
    return paths[id(embed)], paths[id(head)]


def _block_names(model: nn.Module, family: ModelFamily) -> list[str]:
    """Paths of all blocks, after checking that each has the family's linears."""
    names = [name for group in family.linear_groups for name in group]
    out = []
    blocks: Any = model.get_submodule(family.blocks)
    for i, block in enumerate(blocks):
        modules = dict(block.named_modules())
        lacking = [name for name in names if not isinstance(modules.get(name), nn.Linear)]
        if lacking:
            raise ValueError(f"{family.blocks}.{i} lacks linears that family {family.name} has: {', '.join(lacking)}")
        out.append(f"{family.blocks}.{i}")
    if not out:
        raise ValueError(f"{family.blocks} holds no decoder blocks: check num_hidden_layers in config.json")
    return out


def _tie_names(source: SourceModel) -> None:
    """Make every tied name readable from the one tensor that is stored."""
    groups: dict[int, list[str]] = {}
    for name, parameter in source.model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    for names in groups.values():
        stored = [name for name in names if name in source.reader]
        for copy_name in stored[1:]:
            if not _equal(source.reader, stored[0], copy_name):
                raise ValueError(
                    f"{source.folder}: the config ties {stored[0]} and {copy_name}, but the files hold two different"
                    " matrices; set tie_word_embeddings to false in config.json if both are meant"
                )
        for name in names:
            if stored and name != stored[0]:
                source.reader.tie(name, stored[0])


def _equal(reader: WeightReader, a: str, b: str, rows: int = 4096) -> bool:
    if reader.shape(a) != reader.shape(b) or reader.dtype(a) != reader.dtype(b):
        return False
    n = reader.shape(a)[0]
    return all(torch.equal(x, reader.rows(b, i, min(i + rows, n))) for i, x in reader.row_chunks(a, rows))


def _check_weights(source: SourceModel) -> None:
    """Names, shapes and dtypes of the files against the module tree."""
    needed = (source.family.decoder, source.embed_name, source.head_name)
    missing = []
    for name, parameter in source.model.named_parameters():
        if name in source.reader:
            _check_tensor(source.reader, name, tuple(parameter.shape))
        elif any(name.startswith(f"{path}." if path else "") for path in needed):
            missing.append(name)
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(f"{source.folder} lacks {len(missing)} of the model's tensors: {', '.join(missing[:5])}{more}")
    source.unused.extend(sorted(source.reader.names() - {name for name, _ in _all_state(source.model)}))


def _all_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _check_tensor(reader: WeightReader, name: str, shape: tuple[int, ...]) -> None:
    if reader.shape(name) != shape:
        raise ValueError(
            f"{reader.path(name)}: tensor {name} has shape {list(reader.shape(name))}, the config asks for"
            f" {list(shape)}; config.json and the weights are not of one model"
        )
    if reader.dtype(name) not in FLOATS:
        raise ValueError(
            f"{reader.path(name)}: tensor {name} is {reader.dtype(name)}; an unquantized model has"
            f" {', '.join(map(str, FLOATS))}. Dequantize it first"
        )


def _read_parameter(reader: WeightReader, name: str, old: nn.Parameter, dtype: torch.dtype) -> Tensor:
    _check_tensor(reader, name, tuple(old.shape))
    return reader.tensor(name).to(dtype)


def _is_chat(tokenizer: Any, folder: Path) -> bool:
    import jinja2

    if not getattr(tokenizer, "chat_template", None):
        return False
    turns = [{"role": "user", "content": "Which day is it?"}, {"role": "assistant", "content": "Monday."}]
    try:
        ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    except (jinja2.TemplateError, ValueError, TypeError):
        return False
    stops: set[Any] = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        if eos is not None:
            stops = set(eos) if isinstance(eos, list) else {eos}
            break
    return bool(stops & set(ids))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
