from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmq.models.load import open_model
from llmq.models.reader import MAX_HEADER, WeightReader, read_header

TinyModel = Callable[..., Path]


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file with any header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(shape: Any = (2, 2), begin: Any = 0, end: Any = 16, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize("shard_size", ["5GB", "60KB"])
def test_every_tensor_is_read_exactly(tiny_model: TinyModel, shard_size: str) -> None:
    folder = tiny_model("gemma3", shard_size=shard_size)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 1 if shard_size == "5GB" else len(files) > 2
    want = {name: tensor for file in files for name, tensor in load_file(file).items()}
    reader = WeightReader(folder)
    reader.validate()
    assert reader.names() == set(want)
    for name, tensor in want.items():
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.dtype(name) == tensor.dtype
        assert reader.nbytes(name) == tensor.nbytes
        assert torch.equal(reader.tensor(name), tensor)


DTYPES = (
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    + [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
    + [torch.bool]
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_odd_shapes(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = torch.arange(2 * 3 * 5).remainder(2).reshape(2, 3, 5)
    tensors = {"a": whole.to(dtype), "number": torch.tensor(1).to(dtype), "none": torch.zeros(0, 4).to(dtype)}
    save_file(tensors, tmp_path / "model.safetensors")
    reader = WeightReader(tmp_path)
    for name, tensor in tensors.items():
        got = reader.tensor(name)
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        assert got.reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()
    assert reader.rows("none", 0, 0).shape == (0, 4)


def test_rows(tmp_path: Path) -> None:
    table = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    save_file({"pad": torch.zeros(3), "t": table}, tmp_path / "model.safetensors")
    reader = WeightReader(tmp_path)
    assert torch.equal(reader.rows("t", 3, 11), table[3:11])
    ids = torch.tensor([[49, 0, 7], [7, 8, 9]])
    assert torch.equal(reader.rows_at("t", ids), table[ids])
    assert reader.rows_at("t", torch.zeros(0, dtype=torch.int64)).shape == (0, 7)
    assert torch.equal(torch.cat([chunk for _, chunk in reader.row_chunks("t", 16)]), table)
    assert [start for start, _ in reader.row_chunks("t", 16)] == [0, 16, 32, 48]


def test_rows_out_of_range(tmp_path: Path) -> None:
    save_file({"t": torch.zeros(5, 2), "n": torch.tensor(1.0)}, tmp_path / "model.safetensors")
    reader = WeightReader(tmp_path)
    with pytest.raises(ValueError, match=r"rows 3:6 of t were asked for; it has 5 rows"):
        reader.rows("t", 3, 6)
    for ids in ([0, 5], [-1, 2]):
        with pytest.raises(ValueError, match=r"row ids -?\d to \d of t were asked for; it has 5 rows"):
            reader.rows_at("t", torch.tensor(ids))
    with pytest.raises(ValueError, match=r"n is a single number; it has no rows"):
        reader.rows("n", 0, 1)
    with pytest.raises(ValueError, match=r"holds no tensor x \(2 tensors are there\)"):
        reader.tensor("x")


def test_tensors_are_private_copies(tmp_path: Path) -> None:
    save_file({"t": torch.zeros(5, 2)}, tmp_path / "model.safetensors")
    reader = WeightReader(tmp_path)
    reader.tensor("t").fill_(1)
    assert reader.tensor("t").sum() == 0


def peak_bytes() -> int:
    """Peak resident memory since the last reset."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is reset and read through Linux's /proc")
def test_reading_rows_never_holds_the_table(tmp_path: Path) -> None:
    save_file({"t": torch.zeros(1 << 16, 512)}, tmp_path / "model.safetensors")  # 128 MiB
    reader = WeightReader(tmp_path)
    ids = torch.randint(0, 1 << 16, (1 << 12,), generator=torch.Generator().manual_seed(0))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before = peak_bytes()
    reader.rows_at("t", ids)
    for _ in reader.row_chunks("t", 1 << 10):
        pass
    # 4096 rows of 2 KiB are held once as distinct rows and once in order: 16 MiB; twice that for the allocator.
    assert peak_bytes() - before < 32 << 20


def test_renames_and_collisions(tmp_path: Path) -> None:
    save_file({"lm.a": torch.zeros(1), "b": torch.ones(1)}, tmp_path / "model.safetensors")
    reader = WeightReader(tmp_path, renames=((r"^lm\.", "model."), (r"^model\.", "m.")))
    assert reader.names() == {"m.a", "b"}
    with pytest.raises(ValueError, match=r"two stored tensors become b in the model; one of them is"):
        WeightReader(tmp_path, renames=((r"^lm\.a$", "b"),))


# --- distrust -------------------------------------------------------------------------------------------------------

BAD_HEADERS: list[tuple[str, Any, bytes, str]] = [
    ("json", b'{"a": ', b"", r"the header is not valid JSON"),
    ("not text", b"\xff\xfe{}", b"", r"the header is not valid JSON"),
    ("deep", b"[" * 100_000, b"", r"the header is not valid JSON"),
    ("list", [], b"", r"the header is a JSON list; expected an object"),
    ("key twice", b'{"a": 1, "a": 2}', b"", r"a key occurs twice"),
    ("no dict", {"a": 3}, b"", r"tensor a is described by '3'; expected dtype, shape and data_offsets"),
    ("no offsets", {"a": {"dtype": "F32", "shape": []}}, b"", r"tensor a is described by .*; expected dtype"),
    ("dtype", {"a": entry(dtype="F31")}, bytes(16), r"tensor a has dtype 'F31'; known: F64, F32"),
    ("dtype list", {"a": entry(dtype=["F32"])}, bytes(16), r"tensor a has dtype \['F32'\]; known"),
    ("shape", {"a": entry(shape=(-2, -2))}, bytes(16), r"tensor a has shape \[-2, -2\]; expected a list of whole"),
    ("float shape", {"a": entry(shape=(2.0, 2))}, bytes(16), r"tensor a has shape \[2.0, 2\]"),
    ("bool shape", {"a": entry(shape=(True, 4))}, bytes(16), r"tensor a has shape \[True, 4\]"),
    ("offsets", {"a": entry(begin=16, end=0)}, bytes(16), r"data_offsets \[16, 0\]; expected \[begin, end\]"),
    ("negative", {"a": entry(begin=-8, end=8)}, bytes(16), r"data_offsets \[-8, 8\]"),
    ("size", {"a": entry(end=12)}, bytes(12), r"tensor a is F32 \[2, 2\] and needs 16 bytes; its offsets give it 12"),
    ("huge", {"a": entry(shape=(2**40, 2**40))}, bytes(16), r"needs \d+ bytes; its offsets give it 16"),
    ("truncated", {"a": entry()}, bytes(10), r"tensor a ends at byte \d+, the file has \d+ bytes: truncated"),
    ("overlap", {"a": entry(), "b": entry(begin=8, end=24)}, bytes(24), r"tensor b begins at byte .* it overlaps"),
    ("hole", {"a": entry(), "b": entry(begin=20, end=36)}, bytes(36), r"tensor b begins .* it leaves a hole"),
    ("rest", {"a": entry()}, bytes(20), r"its tensors end at byte \d+, the file has \d+ bytes: damaged"),
]


@pytest.mark.parametrize(
    ("header", "data", "message"), [row[1:] for row in BAD_HEADERS], ids=[r[0] for r in BAD_HEADERS]
)
def test_bad_headers(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ValueError, match=rf"(?s){path.name}.*{message}"):
        WeightReader(tmp_path)


def test_good_header_of_the_helper(tmp_path: Path) -> None:
    # So that the cases above fail for the reason they name.
    path = write(tmp_path / "x.safetensors", {"__metadata__": {"format": "pt"}, "a": entry()}, bytes(16))
    assert read_header(path)["a"].shape == (2, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is 0 bytes long; a safetensors file has at least 8: truncated"),
        (b"\x10\x00\x00", r"is 3 bytes long"),
        (struct.pack("<Q", 100) + b"{}", r"the header claims 100 bytes, the file has 2 after the length"),
        (struct.pack("<Q", 2**63) + b"{}", rf"the header claims {2**63} bytes, the file has 2 .*{MAX_HEADER}"),
    ],
)
def test_bad_lengths(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        WeightReader(tmp_path)


@pytest.fixture
def sharded(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A sharded model that the test may damage."""
    return shutil.copytree(tiny_model("llama", shard_size="60KB"), tmp_path / "sharded")


def edit_index(folder: Path, name: str, shard: Any) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][name] = shard
    path.write_text(json.dumps(index))


def test_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=rf"index.json names {shard.name} \(tensor .*\), which is not in the folder"):
        open_model(sharded)


def test_tensor_that_is_not_in_its_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0].name
    edit_index(sharded, "model.ghost.weight", shard)
    with pytest.raises(ValueError, match=rf"says that {shard} holds tensor model.ghost.weight, which it does not"):
        open_model(sharded)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", 7])
def test_shard_outside_the_folder(sharded: Path, shard: Any) -> None:
    edit_index(sharded, "model.norm.weight", shard)
    with pytest.raises(ValueError, match=r"model.norm.weight is said to be in .*; expected a file name without a path"):
        open_model(sharded)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_index_without_a_map(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index.json has no weight_map from tensor names to files"):
        open_model(sharded)


def test_file_cut_while_in_use(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"t": torch.zeros(1000, 100)}, path)
    reader = WeightReader(tmp_path)
    with path.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match=r"tensor t gave \d+ of 400000 bytes: the file was cut in use"):
        reader.tensor("t")


def test_validate_sees_a_change(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"t": torch.zeros(4)}, path)
    reader = WeightReader(tmp_path)
    reader.validate()
    save_file({"t": torch.zeros(5)}, path)
    with pytest.raises(ValueError, match=r"tensor t has changed since the folder was opened"):
        reader.validate()
