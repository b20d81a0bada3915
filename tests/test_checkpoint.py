import errno
import json

import pytest
import torch

from llmq.checkpoint import (
    CheckpointWriter,
    check_files,
    check_output,
    copy_other_files,
    disk_errors,
    matrix_layout,
    matrix_tensors,
    parse_quantization_config,
    quantization_config,
    read_qtensor,
)
from llmq.config import QuantScheme
from llmq.qtensor import minmax_grid, quantize

SCHEME = QuantScheme(4, 32)


def matrix(n=6, k=40):
    W = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    return quantize(W, *minmax_grid(W, SCHEME), SCHEME)


def source_folder(path):
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "tokenizer.json").write_bytes(b'{"a": "\xc3\xa9"}\r\n')
    (path / "model.safetensors").write_bytes(b"weights")
    (path / "pytorch_model.bin").write_bytes(b"weights")
    (path / "model.safetensors.index.json").write_text("{}")
    (path / "extra").mkdir()
    (path / "extra" / "chat_template.jinja").write_bytes(b"{{ x }}")
    (path / ".cache").mkdir()
    (path / ".cache" / "junk").write_text("x")
    return path


def write(tmp_path, name="out", **options):
    source = source_folder(tmp_path / f"{name}-source")
    folder = tmp_path / name
    t = matrix()
    with CheckpointWriter(folder, 2, overwrite=options.get("overwrite", False)) as writer:
        writer.write_shard({f"a.{key}": value for key, value in matrix_tensors(t).items()})
        writer.write_shard({"norm.weight": torch.ones(3)})
        writer.finish(source, {"model_type": "llama"}, {"report": 1}, "# card\n")
        assert not folder.exists() or options.get("overwrite"), "nothing under the final name before publish"
        writer.publish()
    return folder, t, source


def test_folder_is_whole_and_reads_back(tmp_path):
    folder, t, source = write(tmp_path)
    assert read_qtensor(folder, "a", 6, 40, SCHEME).digest() == t.digest()
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names == {
        *("config.json", "llmq_report.json", "README.md", "tokenizer.json", "extra/chat_template.jinja"),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
    }
    assert (folder / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["norm.weight"] == "model-00002-of-00002.safetensors"
    assert index["metadata"]["total_size"] == sum(v.numel() * v.element_size() for v in matrix_tensors(t).values()) + 12
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == [], "no temporary folder is left"


def test_the_sources_own_card_is_kept(tmp_path):
    source = source_folder(tmp_path / "source")
    (source / "README.md").write_text("theirs")
    with CheckpointWriter(tmp_path / "out", 0, overwrite=False) as writer:
        writer.finish(source, {}, {}, "ours")
        writer.publish()
    assert (tmp_path / "out" / "README.md").read_text() == "theirs"
    assert (tmp_path / "out" / "README-llmq.md").read_text() == "ours"


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="boom"), CheckpointWriter(tmp_path / "out", 2, overwrite=False) as writer:  # noqa: PT012
        writer.write_shard({"x": torch.ones(3)})
        raise RuntimeError("boom")
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_only_when_whole(tmp_path):
    folder, _, _ = write(tmp_path)
    (folder / "mark").write_text("old")
    with pytest.raises(RuntimeError), CheckpointWriter(folder, 1, overwrite=True):  # noqa: PT012
        raise RuntimeError
    assert (folder / "mark").read_text() == "old", "a failed run must not touch the old folder"
    source = source_folder(tmp_path / "again-source")
    with CheckpointWriter(folder, 0, overwrite=True) as writer:
        writer.finish(source, {}, {}, "")
        writer.publish()
    assert not (folder / "mark").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_output_errors_come_first(tmp_path):
    folder, _, _ = write(tmp_path)
    with pytest.raises(FileExistsError, match="exists; use --overwrite to replace it"):
        check_output(folder, overwrite=False)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(FileExistsError, match="is not a folder"):
        check_output(file, overwrite=True)
    with pytest.raises(NotADirectoryError, match="file is a file, not a folder; choose another --output"):
        check_output(file / "new", overwrite=True)
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_text("x")
    with pytest.raises(FileExistsError, match="it is no model, so it is not replaced"):
        check_output(other, overwrite=True)
    with pytest.raises(OSError, match=r"needs about 1099511627776 MiB, its disk has \d+ MiB free"):
        check_output(tmp_path / "new", overwrite=False, expected_bytes=1 << 60)


def test_full_disk_names_folder_and_way_out(tmp_path):
    with pytest.raises(OSError, match=r"the disk of .* is full .* choose another --output") as e, disk_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert e.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="something else"), disk_errors(tmp_path):
        raise OSError(errno.EIO, "something else")


def test_full_disk_while_writing(tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llmq.checkpoint.save_file", full)
    with (
        pytest.raises(OSError, match="nothing was kept"),
        CheckpointWriter(tmp_path / "out", 1, overwrite=False) as writer,
    ):
        writer.write_shard({"x": torch.ones(3)})
    assert list(tmp_path.iterdir()) == []


def test_quantization_config_round_trip():
    block = quantization_config({"a": SCHEME, "e": QuantScheme(8, 64, sym=True)}, SCHEME, {"head": "e"}, "llmq 0")
    assert json.loads(json.dumps(block)) == block
    schemes, tied = parse_quantization_config(block, "here")
    assert schemes == {"a": SCHEME, "e": QuantScheme(8, 64, sym=True)}
    assert tied == {"head": "e"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq', expected 'llmq'"),
        ({"format_version": 99}, "format_version is 99, this llmq reads 1; update llmq"),
        ({"modules": None}, "'modules' must name the scheme"),
        ({"modules": {"a": "int4"}}, "'int4' is not of the form"),
        ({"modules": {"a": "w5g32"}}, "here: module a: bits is 5; known"),
        ({"tied": {"head": "b"}}, "head is tied to b, which is not among"),
    ],
)
def test_bad_quantization_config(change, message):
    block = quantization_config({"a": SCHEME}, SCHEME, {}, "llmq 0") | change
    with pytest.raises(ValueError, match=message):
        parse_quantization_config(block, "here")


def test_check_files_finds_what_is_wrong(tmp_path):
    folder, _, _ = write(tmp_path)
    files = sorted(folder.glob("*.safetensors"))
    good = {f"a.{key}": value for key, value in matrix_layout(6, 40, SCHEME).items()}
    check_files(files, good, "here")
    with pytest.raises(
        ValueError, match=r"a.qweight in .* is U8 \(6, 20\); config.json asks for torch.uint8 \(6, 24\)"
    ):
        check_files(files, {f"a.{key}": value for key, value in matrix_layout(6, 48, SCHEME).items()}, "here")
    with pytest.raises(ValueError, match="3 tensors are missing, among them b.qweight"):
        check_files(files, {key.replace("a.", "b."): value for key, value in good.items()}, "here")
    with pytest.raises(ValueError, match=r"integers of 1 modules that quantization_config does not name, .* a.qweight"):
        check_files(files, {}, "here")
    files[0].write_bytes(files[0].read_bytes()[:50])
    with pytest.raises(ValueError, match=r"model-00001-of-00002.safetensors cannot be read .* truncated or damaged"):
        check_files(files, good, "here")


def test_copy_other_files_skips_weights_and_hidden_files(tmp_path):
    source = source_folder(tmp_path / "s")
    target = tmp_path / "t"
    target.mkdir()
    copy_other_files(source, target)
    assert {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()} == {
        "tokenizer.json",
        "extra/chat_template.jinja",
    }
