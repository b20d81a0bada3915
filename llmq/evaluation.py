"""Perplexity, KL divergence and top-1 agreement of any Hugging Face causal language model.

The protocol is GPTQ's (Frantar et al. 2022, arXiv 2210.17323, section 4): tokenize the text once, cut it into windows
that do not overlap, drop the tail, and average the negative log-likelihood of every token but a window's first. One
thing is added: where the tokenizer begins a text with BOS, so does every window (Gemma's figures mean nothing without).

A model and a reference are scored on the same chunk of the same window, so their differences are paired.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from llmq import kv_feed
from llmq.calibration import text_of
from llmq.compat import API
from llmq.config import one_of, option
from llmq.kv_feed import KVFeed
from llmq.likelihood import Progress, score
from llmq.logits import engine_of
from llmq.models.resolve import resolve
from llmq.runtime.auto import AutoModelForCausalLM
from llmq.runtime.qlinear import set_activation_bits
from llmq.score import Score

BOS_MODES = ("auto", "each", "first", "none")
BOS_TEXT = {
    "each": "BOS and the next {n} tokens",
    "first": "{seqlen} tokens (BOS only before the first token of the text)",
    "none": "{seqlen} tokens (no BOS)",
}

Log = Callable[[str], None]


@dataclass(frozen=True)
class EvalProtocol:
    """How a text becomes the windows that are scored. Raises ValueError for values that score nothing."""

    seqlen: int = option(2048, "tokens a window")
    max_windows: int | None = option(None, "score the first N windows only (default: all)")
    bos: str = option("auto", "BOS in each window, before the first only, or none; auto: as the tokenizer")

    def __post_init__(self) -> None:
        if self.seqlen < 8:
            raise ValueError(f"seqlen is {self.seqlen}; a window needs at least 8 tokens (usual: 2048)")
        if self.max_windows is not None and self.max_windows < 1:
            raise ValueError(f"max-windows is {self.max_windows}; score at least 1 (without it: all)")
        one_of("bos", self.bos, BOS_MODES)

    def describe(self, count: int) -> str:
        """The protocol in words, for ``count`` windows; ``bos`` must be resolved."""
        content = BOS_TEXT[self.bos].format(n=self.seqlen - 1, seqlen=self.seqlen)
        which = "all" if self.max_windows is None else "first"
        return f"{which} {count} windows of {content}, not overlapping, tail dropped; first tokens not scored"


def resolve_bos(tokenizer: Any, bos: str) -> str:
    """``each``, ``first`` or ``none`` for ``bos``; ``auto`` is ``each`` if the tokenizer begins a text with BOS.

    Raises ValueError if BOS is wanted and the tokenizer has none.
    """
    one_of("bos", bos, BOS_MODES)
    bos_id = tokenizer.bos_token_id
    if bos == "auto":
        return "each" if bos_id is not None and tokenizer("x")["input_ids"][:1] == [bos_id] else "none"
    if bos != "none" and bos_id is None:
        raise ValueError(f"bos is {bos!r} but the tokenizer has no BOS token; use --bos none (or auto)")
    return bos


def windows(text: str, tokenizer: Any, protocol: EvalProtocol) -> Tensor:
    """Windows of ``text``, i64[W, seqlen]. Raises ValueError if the text does not fill one window."""
    bos = resolve_bos(tokenizer, protocol.bos)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if bos == "first":
        ids = [tokenizer.bos_token_id, *ids]
    width = protocol.seqlen - (bos == "each")
    count = len(ids) // width
    if count == 0:
        raise ValueError(f"the text has {len(ids)} tokens, a window needs {width}: use more text or a smaller seqlen")
    count = min(count, protocol.max_windows or count)
    tokens = torch.tensor(ids[: count * width], dtype=torch.int64).view(count, width)
    if bos == "each":
        tokens = torch.cat([torch.full((count, 1), tokenizer.bos_token_id), tokens], dim=1)
    return tokens


def scored_bytes(tokens: Tensor, tokenizer: Any) -> int:
    """UTF-8 bytes of the scored text of ``tokens`` i64[W, seqlen]: everything but each window's first token.

    A character cut by a window's end counts up to 3 bytes too many.
    """
    texts = (tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in tokens[:, 1:].tolist())
    return sum(len(t.encode()) for t in texts)


def check_fits(config: Any, tokens: Tensor) -> None:
    """Raise ValueError if windows ``tokens`` exceed the context or the vocabulary of a model with ``config``."""
    text = config.get_text_config()
    context = getattr(text, "max_position_embeddings", None)
    if context is not None and tokens.shape[1] > context:
        raise ValueError(f"seqlen is {tokens.shape[1]}; the model's context is {context}: use at most that")
    if int(tokens.max()) >= text.vocab_size:
        raise ValueError(
            f"the tokenizer gives token {int(tokens.max())} but the model knows {text.vocab_size}; "
            "tokenizer and model do not belong together"
        )


def evaluate(
    model: Any,
    tokenizer: Any,
    text: str,
    protocol: EvalProtocol,
    *,
    reference: Any = None,
    progress: Progress | None = None,
    kv: KVFeed | None = None,
) -> Score:
    """Score ``model`` on ``text``: windows, checks, likelihoods, bytes. Raises ValueError as its parts do.

    ``kv`` None: the cache that a checkpoint of llmq has by default.
    """
    kv = kv or kv_feed.of_checkpoint(model)
    protocol = replace(protocol, bos=resolve_bos(tokenizer, protocol.bos))
    tokens = windows(text, tokenizer, protocol)
    check_fits(model.config, tokens)
    result = score(model, tokens, reference=reference, progress=progress, kv=kv)
    words = [protocol.describe(len(tokens)), engine_of(model, graph=kv is not None and kv.native(model) is None)]
    if kv is not None:
        words.append(kv.describe(model))
    if reference is not None:
        words.append(f"reference: {engine_of(reference)}")
    return replace(result, nbytes=scored_bytes(tokens, tokenizer), protocol="; ".join(words))


@dataclass(frozen=True)
class Subject:
    """A model that was found but not loaded, so that everything about it can be checked first."""

    spec: str
    folder: Path
    config: Any
    tokenizer: Any

    def load(self) -> Any:
        """The model in fp32, in evaluation mode. Raises ValueError if its files are damaged or lack a weight."""
        # Shapes that disagree are collected as missing weights are, so that the error below names both.
        options: dict[str, Any] = {
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
            "local_files_only": True,
        }
        loaded: Any = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, **options)
        model, info = loaded
        bad = sorted({*info["missing_keys"], *map(API.mismatched_name, info["mismatched_keys"])})
        if bad:
            names = ", ".join(bad[:3]) + (" ..." if len(bad) > 3 else "")
            raise ValueError(
                f"{self.spec}: {len(bad)} weights are missing from its files or have another shape ({names}); "
                "they would be random, so it is not scored: the checkpoint is incomplete or needs its own loader"
            )
        return model.eval()


def find(spec: str, *, log: Log) -> Subject:
    """Find a folder, .gguf file, alias or hub id; read its config and tokenizer. Raises ValueError if there is none."""
    folder = resolve(spec, log=log).folder
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return Subject(spec, folder, config, AutoTokenizer.from_pretrained(folder, local_files_only=True))


def check_same_vocabulary(model: Subject, reference: Subject, *, text: str, protocol: EvalProtocol) -> None:
    """Raise ValueError unless both models read ``text`` as the same tokens, of as many; ``bos`` must be resolved."""
    sizes = [s.config.get_text_config().vocab_size for s in (model, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{model.spec} has a vocabulary of {sizes[0]} and {reference.spec} one of {sizes[1]}; "
            "KL needs one vocabulary: use the model it was made from as the reference"
        )
    if not torch.equal(*(windows(text, s.tokenizer, protocol) for s in (model, reference))):
        raise ValueError(f"{model.spec} and {reference.spec} read the text as different tokens; KL needs one tokenizer")


def load_for_eval(spec: str, *, log: Log = print) -> tuple[Any, Any]:
    """(model in fp32, tokenizer) of ``spec``: folder, .gguf file, alias or hub id, quantized by anyone or not."""
    subject = find(spec, log=log)
    return subject.load(), subject.tokenizer


# The commands eval/perplexity.py and eval/kl.py


def build_parser(description: str | None, *, require_reference: bool) -> argparse.ArgumentParser:
    """The options that perplexity.py and kl.py share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    fields = {f.name: f for f in dataclasses.fields(EvalProtocol)}
    parser.add_argument("--model", required=True, help="folder, .gguf file, alias or hub id")
    parser.add_argument("--dataset", required=True, metavar="NAME|FILE", help="wikitext2, ptb, c4, or a text file")
    parser.add_argument("--reference", required=require_reference, help="model to compare with; same forms as --model")
    parser.add_argument("--seqlen", type=int, default=fields["seqlen"].default, help=fields["seqlen"].metadata["help"])
    parser.add_argument("--max-windows", type=int, metavar="N", help=fields["max_windows"].metadata["help"])
    parser.add_argument("--bos", default="auto", choices=BOS_MODES, help=fields["bos"].metadata["help"])
    text = "8: as the kernels compute; 16: float, what the weights alone cost (llmq models; default: as the model says)"
    parser.add_argument("--activation-bits", type=int, help=text)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every figure to this file")
    kv_feed.add_options(parser)
    return parser


def to_stderr(message: str) -> None:
    """One line on stderr; stdout holds the result alone."""
    print(message, file=sys.stderr, flush=True)


def progress_line(start: float) -> Progress:
    """A progress callback: window i of n, perplexity so far, time left."""

    def show(done: int, total: int, perplexity: float) -> None:
        minutes, seconds = divmod(round((time.monotonic() - start) / done * (total - done)), 60)
        to_stderr(f"window {done}/{total}  perplexity {perplexity:.3f}  {minutes} min {seconds} s left")

    return show


def check_output(path: Path | None) -> None:
    """Raise ValueError or FileNotFoundError if ``path`` cannot be written; before the long work."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file to write to")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder {path.absolute().parent} does not exist; create it or write elsewhere")


def check_plot(path: Path | None) -> None:
    """Raise ImportError, ValueError or FileNotFoundError if ``path`` cannot be drawn to; before the long work."""
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib, which is not installed; pip install 'llmq[plot]'")
    if path.suffix != ".png":
        raise ValueError(f"--plot writes PNG; {path.name} does not end in .png")
    check_output(path)


def prepare(args: argparse.Namespace) -> tuple[list[Subject], str, EvalProtocol]:
    """Model (and reference) found, the text, the protocol with BOS resolved: every check that needs no weights."""
    protocol = EvalProtocol(seqlen=args.seqlen, max_windows=args.max_windows, bos=args.bos)
    check_output(args.json)
    text = text_of(args.dataset)
    subjects = [find(spec, log=to_stderr) for spec in (args.model, args.reference) if spec]
    protocol = replace(protocol, bos=resolve_bos(subjects[0].tokenizer, protocol.bos))
    tokens = windows(text, subjects[0].tokenizer, protocol)
    for subject in subjects:
        check_fits(subject.config, tokens)
    if len(subjects) == 2:
        check_same_vocabulary(*subjects, text=text, protocol=protocol)
    to_stderr(f"{protocol.describe(len(tokens))}; BOS id {subjects[0].tokenizer.bos_token_id}; fp32")
    return subjects, text, protocol


def run(args: argparse.Namespace) -> Score:
    """Check, load, score; print the table and write the JSON file."""
    kv = kv_feed.from_args(args)
    subjects, text, protocol = prepare(args)
    models = [subject.load() for subject in subjects]
    if kv is not None and kv_feed.chooses(args):
        kv, chosen = kv_feed.choose(kv, args, models[0], subjects[0].tokenizer)
        print(chosen)
    if args.activation_bits is not None:
        set_activation_bits(models[0], args.activation_bits)
    kv = kv or kv_feed.of_checkpoint(models[0], args.kv_chunk)
    start = time.monotonic()
    result = evaluate(
        models[0],
        subjects[0].tokenizer,
        text,
        protocol,
        reference=models[1] if len(models) == 2 else None,
        progress=progress_line(start),
        kv=kv,
    )
    print(result.table())
    if args.json:
        origin: dict[str, Any] = {"model": args.model, "reference": args.reference, "dataset": args.dataset}
        origin["activation_bits"] = args.activation_bits
        origin["kv"] = (
            None
            if kv is None
            else {**dataclasses.asdict(kv.config), "chunk": kv.chunk, "graph": kv.native(models[0]) is None}
        )
        origin["text_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        origin["seconds"] = round(time.monotonic() - start, 1)
        origin["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
        origin["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
        args.json.write_text(json.dumps(origin | result.to_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return result


def exit_code(work: Callable[[], object]) -> int:
    """Run ``work``; 0, or 2 with the reason on stderr when the input was wrong."""
    try:
        work()
    except (ValueError, TypeError, OSError, ImportError) as error:
        to_stderr(f"error: {error}")
        return 2
    return 0


def main(argv: Sequence[str] | None = None, *, require_reference: bool = False, description: str | None = None) -> int:
    """Score a model as the options in ``argv`` say. Returns the exit code: 0, or 2 for bad input."""
    args = build_parser(description, require_reference=require_reference).parse_args(argv)
    return exit_code(lambda: run(args))
