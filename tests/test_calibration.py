from __future__ import annotations

import copy
import hashlib
import importlib.machinery
import json
import math
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmq import calibration
from llmq.calibration import AUTO, SOURCES, check, files, hub, load, sample_from_model, stdlib_text, text_of, windows
from llmq.config import CalibConfig

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
CHAT = "{% for m in messages %}{{ bos_token if loop.first }}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "how are you today"}, {"role": "assistant", "content": "fine, and you"}]


def make_tokenizer(*, bos: bool = True, template: str | None = None) -> Any:
    """One token a character: a window can be read back, and every boundary is known exactly."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<unk>", "<bos>", "<eos>", *ALPHABET])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def text_of_length(n: int) -> str:
    """Text in which every stretch of a few characters is unique."""
    return "".join(f"{i} " for i in range(n))[:n]


def read_back(tokenizer: Any, tokens: Tensor) -> str:
    return str(tokenizer.decode(tokens.flatten().tolist()))


# ---- windows ----


def test_every_window_begins_with_bos_and_none_overlap(tmp_path: Path, tokenizer: Any) -> None:
    text = text_of_length(1000)
    (tmp_path / "a.txt").write_text(text)
    result = load(CalibConfig(str(tmp_path / "a.txt"), nsamples=500, seqlen=16), tokenizer)
    n = 1000 // 15  # each window holds BOS and 15 characters
    assert tuple(result.tokens.shape) == (n, 16)
    assert result.tokens.dtype == torch.int64
    assert result.bos is True
    assert (result.tokens[:, 0] == tokenizer.bos_token_id).all()
    assert read_back(tokenizer, result.tokens[:, 1:]) == text[: n * 15]


def test_no_bos_where_the_tokenizer_adds_none(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(bos=False)  # it knows a BOS, but does not put it before a text
    text = text_of_length(160)
    (tmp_path / "a.txt").write_text(text)
    result = load(CalibConfig(str(tmp_path / "a.txt"), nsamples=10, seqlen=16), tokenizer)
    assert result.bos is False
    assert tuple(result.tokens.shape) == (10, 16)
    assert read_back(tokenizer, result.tokens) == text


def test_draw_is_seeded_without_replacement_and_in_order() -> None:
    table = torch.arange(40)[:, None].expand(40, 8)
    first, others = windows.draw(table, 10, seed=3)
    assert torch.equal(first, windows.draw(table, 10, seed=3)[0])
    assert not torch.equal(first, windows.draw(table, 10, seed=4)[0])
    rows = first[:, 0].tolist()
    assert rows == sorted(set(rows))
    assert len(rows) == 10
    assert sorted(rows + others[:, 0].tolist()) == list(range(40))
    assert torch.equal(windows.draw(table, 40, seed=3)[0], table)
    assert torch.equal(windows.draw(table, 50, seed=3)[0], table)


def test_the_drawn_rows_of_a_seed_never_change() -> None:
    # Written down once: a report's hash is worth nothing if the next version draws other windows.
    assert windows.draw(torch.arange(100)[:, None], 5, seed=0)[0][:, 0].tolist() == [5, 33, 49, 53, 97]


def test_digest_is_of_little_endian_int64() -> None:
    tokens = torch.tensor([[1, 258], [3, 4]])
    expected = b"".join(v.to_bytes(8, "little") for v in (1, 258, 3, 4))
    assert windows.digest(tokens) == hashlib.sha256(expected).hexdigest()
    assert windows.digest(tokens.T) != windows.digest(tokens)


def test_provenance_tells_the_exact_source_and_goes_into_json(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text_of_length(100))
    result = load(CalibConfig(str(path), nsamples=3, seqlen=11), tokenizer)
    assert json.loads(json.dumps(result.provenance())) == {
        "source": str(path),
        "n_samples": 3,
        "seqlen": 11,
        "rows_read": 1,
        "tokens_available": 100,
        "tokens_kept": 33,
        "bos": True,
        "sha256": windows.digest(result.tokens),
        "note": "",
        "tune_samples": 7,
        "tune_sha256": windows.digest(result.more),
    }


def test_windows_for_tuning_are_others_of_the_same_text(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text_of_length(200))

    def rows(tokens: torch.Tensor) -> set[tuple[int, ...]]:
        return {tuple(row.tolist()) for row in tokens}

    few, many = (load(CalibConfig(str(path), nsamples=5, seqlen=11, tune_samples=n), tokenizer) for n in (4, 1000))
    none = load(CalibConfig(str(path), nsamples=5, seqlen=11, tune_samples=0), tokenizer)
    assert torch.equal(few.tokens, none.tokens)
    assert torch.equal(few.tokens, many.tokens)
    assert len(few.more) == 4
    assert rows(few.more) < rows(many.more)
    assert len(rows(many.more) | rows(many.tokens)) == 20
    assert len(none.more) == 0
    assert "tune_samples" not in none.provenance()
    with pytest.raises(ValueError, match="tune_samples is -1"):
        CalibConfig(tune_samples=-1)


def test_too_few_windows_are_used_and_said(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text(text_of_length(95))
    lines: list[str] = []
    result = load(CalibConfig(str(tmp_path / "a.txt"), nsamples=20, seqlen=11), tokenizer, log=lines.append)
    assert len(result.tokens) == 9
    assert result.note == "only 9 of 20 windows: the text holds 95 tokens, 200 are needed"
    assert result.note in lines[-1]


def test_not_one_window_is_an_error_with_both_numbers(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("too short")
    with pytest.raises(ValueError, match=r"a\.txt holds 9 tokens, and one window of seqlen 64 needs 63"):
        load(CalibConfig(str(tmp_path / "a.txt"), nsamples=1, seqlen=64), tokenizer)


@pytest.mark.parametrize("limit", [7, 64, 1000])
def test_split_text_loses_nothing_and_keeps_the_limit(limit: int) -> None:
    text = ("one two three\n\n" + "x" * 150 + "\nfour ") * 5
    parts = list(windows.split_text(text, limit))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= limit


@pytest.mark.parametrize("piece", [1 << 14, 1 << 16, 1 << 21])
def test_token_stream_is_the_joined_text_whatever_the_pieces(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any, piece: int
) -> None:
    monkeypatch.setattr(windows, "PIECE_CHARS", piece)
    texts = [text_of_length(n) for n in (40_000, 0, 3, 70_000, piece % 16_384 + 16_384)]
    joined = "\n\n".join(texts)
    stream = windows.token_stream(texts, tokenizer, separator="\n\n", budget=1 << 22)
    assert read_back(tokenizer, stream.tokens) == joined
    assert stream.rows_read == 5
    assert stream.exhausted


def test_token_stream_stops_soon_after_its_budget(tokenizer: Any) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield "a" * 100

    stream = windows.token_stream(endless(), tokenizer, separator=" ", budget=50_000)
    assert not stream.exhausted
    assert stream.rows_read == read
    # Tokens are one character here and 4 are planned for each: at most that plus the row it was in.
    assert 50_000 <= stream.tokens.numel() <= 4 * 50_000 + 101


def test_no_tokens_at_all_is_an_empty_stream(tokenizer: Any) -> None:
    stream = windows.token_stream([], tokenizer, separator=" ", budget=10)
    assert stream.tokens.dtype == torch.int64
    assert (stream.tokens.numel(), stream.rows_read, stream.exhausted) == (0, 0, True)


# ---- files ----

RECORDS = ["the first text of three", "the second, somewhat longer text", "and the third"]


def write_parquet(path: Path, **columns: list[Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)


def write_kind(folder: Path, suffix: str) -> Path:
    """The three RECORDS in a file of each kind (joined by a blank line in plain text)."""
    path = folder / f"data{suffix}"
    if suffix == ".txt":
        path.write_text("\n\n".join(RECORDS))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": r, "id": 1}) + "\n\n" for r in RECORDS))
    elif suffix == ".json":
        path.write_text(json.dumps([{"text": RECORDS[0]}, *RECORDS[1:]]))
    else:
        write_parquet(path, id=[1, 2, 3], text=RECORDS)
    return path


@pytest.mark.parametrize("suffix", list(files.READERS))
def test_every_file_kind_gives_the_same_windows(tmp_path: Path, tokenizer: Any, suffix: str) -> None:
    path = write_kind(tmp_path, suffix)
    cfg = CalibConfig(str(path), nsamples=100, seqlen=9)
    check(cfg, max_positions=9)
    result = load(cfg, tokenizer)
    joined = "\n\n".join(RECORDS)
    assert read_back(tokenizer, result.tokens[:, 1:]) == joined[: len(joined) // 8 * 8]
    assert result.rows_read == (1 if suffix == ".txt" else 3)
    assert text_of(str(path)) == joined


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_conversations_go_through_the_chat_template_without_its_bos(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"chat{suffix}"
    if suffix == ".parquet":
        write_parquet(path, messages=[MESSAGES, MESSAGES])
    else:
        records = [{"messages": MESSAGES}] * 2
        path.write_text(json.dumps(records) if suffix == ".json" else "\n".join(map(json.dumps, records)))
    tokenizer = make_tokenizer(template=CHAT)
    result = load(CalibConfig(str(path), nsamples=100, seqlen=9), tokenizer)
    one = "[user]how are you today[assistant]fine, and you"
    joined = f"{one}\n\n{one}"
    assert read_back(tokenizer, result.tokens[:, 1:]) == joined[: len(joined) // 8 * 8]
    assert (result.tokens == tokenizer.bos_token_id).sum() == len(result.tokens)


def test_folder_is_read_in_depth_in_the_order_of_names(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("bbbbbbbb")
    (tmp_path / "a.txt").write_text("aaaaaaaa")
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "cccccccc"}')
    (tmp_path / "ignored.csv").write_text("x,y")
    result = load(CalibConfig(str(tmp_path), nsamples=9, seqlen=10), tokenizer)
    assert read_back(tokenizer, result.tokens[:, 1:]) == "aaaaaaaa\n\nbbbbbbbb\n\ncccccccc"[:27]
    assert result.source == f"{tmp_path} (3 files)"
    assert result.rows_read == 3


@pytest.mark.parametrize("pattern", ["*.txt", "**/*.txt", "[ab].txt"])
def test_glob(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    (tmp_path / "a.txt").write_text("a" * 20)
    (tmp_path / "b.txt").write_text("b" * 20)
    (tmp_path / "b.bin").write_bytes(b"\0")
    monkeypatch.chdir(tmp_path)
    for name in (pattern, str(tmp_path / pattern)):
        result = load(CalibConfig(name, nsamples=9, seqlen=11), tokenizer)
        assert result.source == f"{name} (2 files)"
        assert result.tokens_available == 42


def test_a_folder_named_like_a_row_does_not_hide_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stdlib").mkdir()
    monkeypatch.chdir(tmp_path)
    check(CalibConfig("stdlib"), max_positions=None)


BAD_FILES: list[tuple[str, bytes, str]] = [
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON"),
    ("a.jsonl", b'{"body": "x", "id": 1}', r"line 1 has the fields \['body', 'id'\]; it needs 'text' or 'messages'"),
    ("a.jsonl", b"[1]", "line 1 is list; expected a string or an object with 'text' or 'messages'"),
    ("a.jsonl", b'{"text": 5}', "field 'text' holds int; expected a string or a list of messages"),
    ("a.jsonl", b'{"messages": ["hello"]}', "field 'messages' holds list; expected a string or a list of messages"),
    ("a.json", b'{"text": "x"}\n{"text": "y"}', r"is not JSON .*must be named \.jsonl"),
    ("a.json", b'{"text": "x"}', "holds dict; a .json file must hold a list"),
    ("a.json", b'[{"text": "x"}, 7]', "record 1 is int"),
    ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8 text \(byte 3\); save it as UTF-8"),
    ("a.parquet", b"PAR1 no parquet at all", r"a\.parquet is not a readable parquet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_content(tmp_path: Path, tokenizer: Any, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(CalibConfig(str(tmp_path / name), nsamples=1, seqlen=8), tokenizer)


def test_parquet_without_a_text_column(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", body=["x"], id=[1])
    with pytest.raises(ValueError, match=r"has the columns \['body', 'id'\]; it needs 'text' or 'messages'"):
        check(CalibConfig(str(tmp_path / "a.parquet")), max_positions=None)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the tokenizer has no chat template; use an instruction model, or a file with 'text'"),
        ("{{ raise_exception('no roles here') }}", "refuses a conversation of 2 messages: no roles here"),
    ],
)
def test_conversations_without_a_fitting_template(tmp_path: Path, template: str | None, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": MESSAGES}))
    with pytest.raises(ValueError, match=message):
        load(CalibConfig(str(tmp_path / "a.jsonl")), make_tokenizer(template=template))


# ---- check ----


def test_unknown_name_lists_the_known_ones_and_says_files_are_fine() -> None:
    known = ", ".join(["auto", *SOURCES])
    with pytest.raises(ValueError, match=f"calib is 'wikitext3'; known: {known}; or a file, folder or glob"):
        check(CalibConfig("wikitext3"), max_positions=None)


def test_missing_file() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"calibration file nowhere/a\.txt does not exist; give a file \(\.txt, "
    ):
        check(CalibConfig("nowhere/a.txt"), max_positions=None)


def test_glob_without_match(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file matches calibration text"):
        check(CalibConfig(str(tmp_path / "*.txt")), max_positions=None)


def test_ending_without_reader(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(ValueError, match=r"a\.docx ends in '\.docx'; endings that are read: \.txt, \.jsonl"):
        check(CalibConfig(str(tmp_path / "a.docx")), max_positions=None)


def test_folder_without_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no calibration text; files that are read"):
        check(CalibConfig(str(tmp_path)), max_positions=None)


@pytest.mark.parametrize(("name", "content"), [("a.txt", " \n"), ("a.jsonl", ""), ("a.json", "[]"), ("b.json", '[""]')])
def test_empty_file(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} is empty; give a file with text"):
        check(CalibConfig(str(tmp_path / name)), max_positions=None)


def test_seqlen_beyond_the_context_names_both_numbers() -> None:
    with pytest.raises(
        ValueError, match=r"seqlen is 2048, and the model's context is 512 tokens; use --seqlen 512 or less"
    ):
        check(CalibConfig("stdlib", seqlen=2048), max_positions=512)
    check(CalibConfig("stdlib", seqlen=512), max_positions=512)


# ---- hub ----

HUB_ROWS = [name for name, row in SOURCES.items() if row.hub is not None]
STREAMED = [name for name in HUB_ROWS if SOURCES[name].huge]
EXPECTED_CALLS: dict[str, dict[str, Any]] = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train", "streaming": False},
    "c4": {
        "path": "allenai/c4",
        "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
        "split": "train",
        "streaming": True,
    },
    "pileval": {"path": "mit-han-lab/pile-val-backup", "split": "validation", "streaming": True},
    "ptb": {
        "path": "ptb-text-only/ptb_text_only",
        "revision": "refs/convert/parquet",
        "split": "train",
        "streaming": False,
    },
}


class FakeHub:
    """Stands for ``datasets.load_dataset``: 3,000 numbered rows, and a note of every call."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.served = 0

    def __call__(self, path: str, **options: Any) -> Iterator[dict[str, str]]:
        self.calls.append({"path": path, **options})
        column = "sentence" if path.startswith("ptb") else "text"
        return self._rows(column)

    def _rows(self, column: str) -> Iterator[dict[str, str]]:
        for i in range(3000):
            self.served += 1
            yield {column: f"row {i}", "other": "x"}


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    datasets = pytest.importorskip("datasets")
    zstandard = types.ModuleType("zstandard")
    zstandard.__spec__ = importlib.machinery.ModuleSpec("zstandard", None)
    fake = FakeHub()
    monkeypatch.setitem(sys.modules, "zstandard", zstandard)
    monkeypatch.setattr(datasets, "load_dataset", fake)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setenv("LLMQ_CACHE", str(tmp_path / "cache"))
    return fake


def test_the_fake_is_asked_of_every_hub_row() -> None:
    assert set(EXPECTED_CALLS) == set(HUB_ROWS)


@pytest.mark.parametrize("name", HUB_ROWS)
def test_hub_row_asks_for_its_data_set_and_cuts_it(fake_hub: FakeHub, tokenizer: Any, name: str) -> None:
    cfg = CalibConfig(name, nsamples=4, seqlen=32, seed=1)
    result = load(cfg, tokenizer)
    assert fake_hub.calls == [EXPECTED_CALLS[name]]
    joined = SOURCES[name].separator.join(f"row {i}" for i in range(3000))
    starts = [joined.index(read_back(tokenizer, window[1:])) for window in result.tokens]
    assert all(start % 31 == 0 for start in starts)
    assert starts == sorted(set(starts))
    assert tuple(result.tokens.shape) == (4, 32)
    assert result.source.startswith(EXPECTED_CALLS[name]["path"])
    assert result.source.endswith(EXPECTED_CALLS[name]["split"])
    assert result.sha256 == load(cfg, tokenizer).sha256
    assert result.sha256 != load(CalibConfig(name, nsamples=4, seqlen=32, seed=2), tokenizer).sha256


@pytest.mark.parametrize("name", STREAMED)
def test_streamed_row_is_not_read_to_its_end(fake_hub: FakeHub, tokenizer: Any, name: str) -> None:
    result = load(CalibConfig(name, nsamples=4, seqlen=32), tokenizer)
    assert result.rows_read < 3000
    assert "text was left" in result.note
    assert fake_hub.served == result.rows_read


@pytest.mark.parametrize("name", STREAMED)
def test_streamed_row_works_again_without_a_network(
    fake_hub: FakeHub, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    cfg = CalibConfig(name, nsamples=4, seqlen=32)
    check(cfg, max_positions=None)  # keeps one row: the rest must be added to it
    online = load(cfg, tokenizer)
    calls = len(fake_hub.calls)
    monkeypatch.setattr(hub, "reachable", lambda: False)
    assert load(cfg, tokenizer).provenance() == online.provenance()
    assert len(fake_hub.calls) == calls
    more = load(CalibConfig(name, nsamples=2000, seqlen=32), tokenizer)
    assert f"only the {online.rows_read} rows" in more.note


def test_streaming_goes_on_where_the_kept_rows_end(fake_hub: FakeHub) -> None:
    row = SOURCES["c4"].hub
    assert row is not None
    for n in (3, 10, 5):
        texts = hub.rows(row, "train")
        assert [next(texts) for _ in range(n)] == [f"row {i}" for i in range(n)]
        texts.close()  # type: ignore[attr-defined]
    assert len(fake_hub.calls) == 2
    kept = list(hub.rows_folder().iterdir())
    assert [p.name for p in kept] == ["allenai--c4-train.jsonl"]
    assert len(kept[0].read_text().splitlines()) == 10


def test_a_damaged_cache_is_read_anew(fake_hub: FakeHub) -> None:
    row = SOURCES["c4"].hub
    assert row is not None
    hub.rows_folder().mkdir(parents=True)
    (hub.rows_folder() / "allenai--c4-train.jsonl").write_text('"row 0"\n"row ')
    assert next(hub.rows(row, "train")) == "row 0"
    assert len(fake_hub.calls) == 1


@pytest.mark.usefixtures("fake_hub")
@pytest.mark.parametrize("name", HUB_ROWS)
def test_out_of_reach_says_where_it_looked_and_what_works(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import datasets

    monkeypatch.setattr(hub, "reachable", lambda: False)
    seen = []

    def refuse(path: str, **_: Any) -> None:
        seen.append(datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError(f"Couldn't reach {path}")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    # conftest sets offline mode for all tests: here it must be seen to be switched on, and off again.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    path = EXPECTED_CALLS[name]["path"]
    cache = "cache" if name in STREAMED else "datasets"
    message = f"data set {path} .*the hub cannot be reached, and it is not in the cache .*{cache}.*'self' or 'stdlib'"
    with pytest.raises(FileNotFoundError, match=message):
        check(CalibConfig(name), max_positions=None)
    assert seen == [True]
    assert datasets.config.HF_HUB_OFFLINE is False


@pytest.mark.usefixtures("fake_hub")
def test_a_data_set_that_cannot_be_read_names_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("scripts are gone")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        FileNotFoundError, match=r"could not be read \(RuntimeError: scripts are gone\); without a network"
    ):
        check(CalibConfig("ptb"), max_positions=None)


@pytest.mark.usefixtures("fake_hub")
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "zstandard" else object())
    with pytest.raises(
        ValueError, match=r"mit-han-lab/pile-val-backup needs the package zstandard: pip install zstandard"
    ):
        check(CalibConfig("pileval"), max_positions=None)


def test_reachable_gives_up_quickly_and_obeys_offline_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")

    class Silent:
        def head(self, *_: Any, **__: Any) -> None:
            time.sleep(30)

    monkeypatch.setattr(huggingface_hub, "get_session", Silent)
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.2)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(pytest.importorskip("datasets").config, "HF_HUB_OFFLINE", False)
    begin = time.perf_counter()
    assert not hub.reachable()
    assert time.perf_counter() - begin < 5  # 0.2 s of waiting and what a loaded machine adds, far from the 30 s
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: pytest.fail("asked in offline mode"))
    with hub.offline_mode():
        assert not hub.reachable()


# ---- evaluation text ----


@pytest.mark.parametrize(
    ("name", "split", "separator", "n_rows"),
    [("wikitext2", "test", "\n\n", 3000), ("ptb", "test", " ", 3000), ("c4", "validation", " ", 1100)],
)
def test_text_of_a_data_set(fake_hub: FakeHub, name: str, split: str, separator: str, n_rows: int) -> None:
    assert text_of(name) == separator.join(f"row {i}" for i in range(n_rows))
    assert fake_hub.calls[0]["split"] == split


def test_text_of_a_file_is_the_file(tmp_path: Path) -> None:
    content = "\n = Title = \r\n\n text é \n \n"
    (tmp_path / "a.txt").write_bytes(content.encode())
    (tmp_path / "a.md").write_bytes(content.encode())
    assert text_of(str(tmp_path / "a.txt")) == content
    assert text_of(str(tmp_path / "a.md")) == content


def test_text_of_errors(tmp_path: Path, fake_hub: FakeHub) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": MESSAGES}))
    scored = ", ".join(HUB_ROWS)
    with pytest.raises(
        ValueError, match=f"'stdlib' is calibration text only; to evaluate give one of {scored}, or a file"
    ):
        text_of("stdlib")
    with pytest.raises(ValueError, match=f"dataset is 'lambada'; known: {scored}; or a file"):
        text_of("lambada")
    with pytest.raises(FileNotFoundError, match=r"evaluation file no\.txt does not exist"):
        text_of("no.txt")
    with pytest.raises(ValueError, match="is a folder; evaluation needs one file"):
        text_of(str(tmp_path))
    with pytest.raises(ValueError, match="holds conversations; evaluation needs plain text"):
        text_of(str(tmp_path / "chat.jsonl"))
    with pytest.raises(ValueError, match="split of mit-han-lab/pile-val-backup is 'test'; known: validation"):
        text_of("pileval")
    assert fake_hub.calls == []


# ---- stdlib ----


def test_stdlib_is_long_english_text_and_the_same_every_time() -> None:
    texts = list(stdlib_text.texts())
    words = " ".join(texts).split()
    assert len(words) > 100_000
    # "the" is the most frequent word of English prose: 4 to 7 % of it; documentation mixed with code stays above 3 %.
    assert sum(word.lower() == "the" for word in words) > 0.03 * len(words)
    stdlib_text.docstring_texts.cache_clear()
    assert list(stdlib_text.texts()) == texts


def test_stdlib_names_the_python_whose_text_it_is(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MAX_TOKENS", 20_000)
    result = load(CalibConfig("stdlib", nsamples=4, seqlen=64), tokenizer)
    assert len(result.tokens) == 4
    assert result.source.startswith(f"Python {sys.version.split()[0]} documentation")
    assert "text was left" in result.note


def test_clean_joins_prose_and_leaves_code() -> None:
    raw = (
        "Heading\n*******\n\nFirst line\nsecond line.\n\n   code one\n     code two\n\n* an item\n  that goes on\n* b\n"
    )
    assert stdlib_text.clean(raw) == (
        "Heading\n\nFirst line second line.\n\n   code one\n     code two\n\n* an item that goes on\n* b"
    )


def test_python_without_pydoc_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(
        ValueError, match="'stdlib' needs the module pydoc_data, and Python at .* comes without it; give a"
    ):
        check(CalibConfig("stdlib"), max_positions=None)


def test_auto_is_a_row_that_needs_no_network(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert SOURCES[AUTO].hub is None
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("auto asked for the network"))
    monkeypatch.setattr(calibration, "MAX_TOKENS", 20_000)

    def write(n_samples: int, seqlen: int, seed: int) -> Tensor:
        return torch.full((n_samples, seqlen), seed)

    auto, named = (load(CalibConfig(c, 2, 16), tokenizer, sampler=write) for c in ("auto", AUTO))
    assert auto.provenance() == named.provenance()


# ---- self ----


@pytest.fixture(scope="module")
def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = len(ALPHABET) + 3 + 5  # five padding rows that the tokenizer does not know
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        eos_token_id=2,
        bos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    # A taste of the author's that plain sampling must not follow.
    model.generation_config.update(top_k=1, repetition_penalty=5.0, do_sample=True)
    return model


def test_self_is_sampled_reproducibly_and_never_ends(tiny_llama: Any, tokenizer: Any) -> None:
    n = calibration.self_generated.BATCH + 2  # two batches, the second not full
    before = torch.random.get_rng_state()
    first = sample_from_model(tiny_llama, tokenizer, n, 24, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert tuple(first.shape) == (n, 24)
    assert first.dtype == torch.int64
    assert (first[:, 0] == tokenizer.bos_token_id).all()
    # 0, 1, 2 are <unk>, <bos>, <eos>; what follows the alphabet is padding of the embedding.
    assert int(first[:, 1:].min()) >= 3
    assert int(first.max()) < len(tokenizer)
    assert torch.equal(first, sample_from_model(tiny_llama, tokenizer, n, 24, seed=5))
    assert not torch.equal(first, sample_from_model(tiny_llama, tokenizer, n, 24, seed=6))
    assert tiny_llama.generation_config.top_k == 1


def test_self_follows_the_model_s_own_distribution(tokenizer: Any) -> None:
    """A model that gives one token half of the mass everywhere: its share must be a half, in every window position."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
    )
    model = LlamaForCausalLM(config)
    favourite = 40
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        # All states equal (1, 0, ...): logit = first column of the head. The other 95 ordinary tokens share the rest.
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.model.norm.weight[0] = 1 / math.sqrt(8)  # RMSNorm of (1, 0, ..) is sqrt(8) in its first place
        model.lm_head.weight[favourite, 0] = math.log(size - 3 - 1)
    model.generation_config.update(top_k=3, temperature=0.1, do_sample=True)
    tokens = sample_from_model(model, tokenizer, 32, 66, seed=0)[:, 2:]
    share = (tokens == favourite).float().mean().item()
    # 2,048 independent draws with p = 1/2: standard deviation 0.011; six of them.
    assert abs(share - 0.5) < 6 * 0.5 / math.sqrt(tokens.numel())


def test_self_begins_with_many_different_tokens(tiny_llama: Any, tokenizer: Any) -> None:
    first = sample_from_model(tiny_llama, tokenizer, 16, 8, seed=0)[:, 1]
    # 16 uniform draws from 96: fewer than 8 different ones has a probability below 1e-6.
    assert len(set(first.tolist())) >= 8


def test_self_without_bos_starts_with_a_random_token(tiny_llama: Any) -> None:
    tokenizer = make_tokenizer(bos=False)
    tokens = sample_from_model(tiny_llama, tokenizer, 3, 12, seed=0)
    assert tuple(tokens.shape) == (3, 12)
    assert not (tokens == tokenizer.bos_token_id).any()


def test_self_reports_progress_to_the_end(tiny_llama: Any, tokenizer: Any) -> None:
    steps: list[tuple[int, int]] = []
    n = calibration.self_generated.BATCH + 1
    sample_from_model(tiny_llama, tokenizer, n, 10, seed=0, progress=lambda done, total: steps.append((done, total)))
    assert steps[-1] == (n * 10, n * 10)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_self_needs_room_for_a_sample(tiny_llama: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="seqlen is 2; sampling from the model needs more than 2 tokens a window"):
        sample_from_model(tiny_llama, tokenizer, 1, 2, seed=0)


def test_self_refuses_a_model_whose_logits_are_not_finite(tokenizer: Any, tiny_llama: Any) -> None:
    broken = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        broken.lm_head.weight[7] = float("nan")
    with pytest.raises(ValueError, match="the model's logits are not finite, so no text can be sampled"):
        sample_from_model(broken, tokenizer, 1, 8, seed=0)


def test_self_through_load(tiny_llama: Any, tokenizer: Any) -> None:
    def sampler(n_samples: int, seqlen: int, seed: int) -> Tensor:
        return sample_from_model(tiny_llama, tokenizer, n_samples, seqlen, seed)

    cfg = CalibConfig("self", nsamples=3, seqlen=16, seed=7)
    check(cfg, max_positions=64)
    result = load(cfg, tokenizer, sampler=sampler)
    assert torch.equal(result.tokens, sampler(3, 16, 7))
    assert result.provenance() == {
        "source": "sampled from the model itself",
        "n_samples": 3,
        "seqlen": 16,
        "rows_read": 3,
        "tokens_available": 48,
        "tokens_kept": 48,
        "bos": True,
        "sha256": windows.digest(result.tokens),
        "note": "",
    }


def test_self_without_a_sampler(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="calib 'self' is text sampled from the model, and no sampler was given"):
        load(CalibConfig("self"), tokenizer)


def test_a_sampler_of_the_wrong_shape(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"the sampler gave torch.int64\[2, 9\], expected torch.int64\[3, 16\]"):
        load(CalibConfig("self", 3, 16), tokenizer, sampler=lambda *_: torch.zeros(2, 9, dtype=torch.int64))


def test_pieces_of_long_windows_begin_as_the_windows_do():
    given = torch.tensor([[1, 10, 11, 12, 13, 14, 15, 16], [1, 20, 21, 22, 23, 24, 25, 26]])
    want = [[1, 10, 11, 12], [1, 13, 14, 15], [1, 20, 21, 22], [1, 23, 24, 25]]
    assert windows.pieces_of(given, 4, bos=True).tolist() == want
    assert windows.pieces_of(given, 4, bos=False).tolist() == [[*w[:4]] for w in given.view(4, 4).tolist()]
    assert torch.equal(windows.pieces_of(given[:, :3], 4, bos=True), given[:, :3])
