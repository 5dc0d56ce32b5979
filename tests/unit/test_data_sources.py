"""Every source gives its documents in a fixed order, and a wrong setting is refused with one line that names a fix."""

import bz2
import gzip
import io
import json
import lzma
import os
import socket
import sysconfig
import time
from collections import Counter
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from stack.config.schema import Data
from stack.data import documents as texts
from stack.data import formats, hub
from stack.data.files import Selection
from stack.data.sources import describe, documents
from stack.errors import DataError


def files(*paths: Path | str, **fields) -> Data:
    return Data(source="files", paths=[str(path) for path in paths], **fields)


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def refused(cfg: Data) -> str:
    with pytest.raises(DataError) as caught:
        list(documents(cfg))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_stdlib_is_sorted_and_skips_installed_and_undecodable_files(tmp_path, monkeypatch):
    for name, content in {
        "b.py": b"b = 1\n",
        "a/z.py": b"z = 1\n",
        "empty.py": b"",
        "latin.py": b"# \xe9\n",
        "notes.txt": b"no",
        "site-packages/x.py": b"x = 1\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert list(documents(Data())) == ["z = 1\n", "b = 1\n"]
    assert describe(Data())["files"] == 4


def test_real_stdlib_has_text():
    source = documents(Data())
    assert next(iter(source))
    assert source.unit == "bytes"
    assert source.total == describe(Data())["bytes"] > 1_000_000


def test_all_formats_in_the_order_of_paths(tmp_path):
    (tmp_path / "a[1].txt").write_bytes("\ufefftwo\r\nlines é".encode())
    write_jsonl(tmp_path / "b.jsonl", {"text": "j1", "meta": 1}, {"text": None}, {"text": "", "x": {}}, {"text": "j2"})
    write_jsonl(tmp_path / "c.jsonl", {"text": "other columns", "meta": "now a string", "extra": [1]})
    (tmp_path / "d.json").write_text('[{"text": "array"},\n {"text": "\\ud800 half a pair"}]')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["p1", "p2"], "k": [1, 2]}), tmp_path / "e.parquet")
    everything = ["two\r\nlines é", "j1", "j2", "other columns", "array", "\ufffd half a pair", "p1", "p2"]
    assert list(documents(files(tmp_path))) == everything
    assert list(documents(files(tmp_path / "e.parquet", tmp_path / "*.jsonl"))) == ["p1", "p2", *everything[1:4]]
    assert documents(files(tmp_path / "e.parquet")).total == 2


def test_documents_can_be_read_twice(tmp_path):
    source = documents(files(write_jsonl(tmp_path / "a.jsonl", {"text": "x"}, {"text": "y"})))
    assert list(source) == list(source) == ["x", "y"]


def test_a_file_named_twice_counts_once(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "x"})
    assert list(documents(files(path, tmp_path, tmp_path / "*.jsonl"))) == ["x"]


def test_prepared_corpora_below_a_folder_are_not_text(tmp_path):
    (tmp_path / "raw.txt").write_text("text")
    (tmp_path / "files-0123/tokenizer").mkdir(parents=True)
    (tmp_path / "files-0123/manifest.json").write_text("{}")
    assert list(documents(files(tmp_path))) == ["text"]


def test_description_follows_content_and_not_place(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        os.utime(write_jsonl(folder / "a.jsonl", {"text": "x"}), ns=(1, 1))
    before = describe(files(one))
    assert describe(files(two)) == before
    os.utime(one / "a.jsonl", ns=(1, 2))
    assert describe(files(one)) != before
    assert describe(files(two, text_key="body")) != before


def parquet(column: pyarrow.Array) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.jsonl", b'{"body": "x", "id": 3}\n', "data.text_key=body"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl:2"),
        ("a.jsonl", b'{"text": 7}\n', "int"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1, a list"),
        ("a.json", b'[{"text": "x"},\n oops]', "a.json:2"),
        ("a.txt", b"abc\xff", "UTF-8 (byte 3)"),
        ("a.parquet", b"no parquet at all", "a.parquet"),
        ("a.docx", b"text", "data.extensions=[.docx]"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "x", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "a.jsonl:2"),
        ("a.jsonl", b'{"text": "x", "n": ' + b"7" * 5000 + b"}\n", "a.jsonl:1"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', "a.jsonl:2, which is not UTF-8"),
        ("a.json", b"[" * 200_000, "a.json:1"),
        ("a.json", b'[{"text": "x", "n": ' + b"7" * 5000 + b"}]", "a.json:1"),
        ("a.json", b'{"text": 1}', "int"),
        ("a.csv", b"body,id\nx,1\n", "columns of text: body, id"),
        ("a.csv", b"", "columns of text: none"),
        ("a.csv", b"id,text\n1,two, words\n", "a.csv:2, a row of 3 fields under a header of 2"),
        ("a.csv", b'id,text\n1,"never ends\n', "which is not CSV"),
        ("a.csv", b"id,text\n1,x\n2,\xe9\n", "a.csv:3, which is not UTF-8"),
        ("a.txt.gz", b"no gzip", "a.txt.gz"),
        ("a.txt.gz", gzip.compress(b"cut" * 999)[:-9], "a.txt.gz"),
        ("a.txt.gz", gzip.compress(b"x" * 99)[:10] + b"\xff" * 20, "a.txt.gz"),
        ("a.jsonl.zst", pyarrow.compress(b"x" * 9999, codec="zstd", asbytes=True)[:-3], "a.jsonl.zst"),
        ("a.csv.bz2", b"no bzip2", "a.csv.bz2"),
        ("a.md.xz", lzma.compress(b"x" * 99)[:-9], "a.md.xz"),
        ("a.parquet", b"PAR1" + b"\xff" * 99 + b"\x10\0\0\0PAR1", "a.parquet, which is no Parquet or damaged"),
        ("a.parquet", parquet(pyarrow.array([b"x", b"caf\xe9"]).view(pyarrow.string())), "row 2, which is not UTF-8"),
        ("a.parquet", parquet(pyarrow.array(["x" * 999] * 99))[:50] + b"\0" * 99, "a.parquet"),
    ],
)
def test_a_file_that_cannot_be_read_names_the_place(tmp_path, name, content, named):
    (tmp_path / name).write_bytes(content)
    assert named in refused(files(tmp_path / name))


def test_a_document_is_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_BYTES", 1000)
    for name in ("a.txt", "a.jsonl", "a.json", "a.csv"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(b"[" + b"x" * 10**6))
        assert "is longer than" in refused(files(tmp_path / f"{name}.gz"))


COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("codec", COMPRESS)
def test_every_format_also_compressed(tmp_path, codec):
    contents = {
        "a.csv": 'id,text\n1,"c, ""1""\nline"\n\n2,c2\n',
        "b.html": "<p>h</p>",
        "c.json": '[{"text": "j"}]',
        "d.jsonl": '{"text": "l1"}\n{"text": "l2"}',
        **{f"e.{ending}": ending for ending in ("md", "py", "rst", "tex", "txt")},
        "f.FOO": "foo",
    }
    for name, content in contents.items():
        # Each file consists of two compressed parts, like the output of `cat a.gz b.gz`.
        middle = len(content) // 2
        parts = [content[:middle], content[middle:]]
        (tmp_path / f"{name}{codec}").write_bytes(b"".join(COMPRESS[codec](part.encode()) for part in parts))
    source = documents(files(tmp_path, extensions=[".foo"]))
    texts = ['c, "1"\nline', "c2", "<p>h</p>", "j", "l1", "l2", "md", "py", "rst", "tex", "txt", "foo"]
    assert list(source) == list(source) == texts
    assert source.unread == ""
    assert (source.total is None) == bool(codec)


def test_an_extension_is_read_as_plain_text_whatever_it_is(tmp_path):
    (tmp_path / "a.csv").write_text("body\nx\n")
    whole = files(tmp_path, extensions=[".csv"])
    assert list(documents(whole)) == ["body\nx\n"]
    assert describe(whole) != describe(files(tmp_path))


def test_a_nested_field_is_named_by_its_path(tmp_path):
    record = {"data": {"text": "nested", "n": 1}, "id": 2}
    write_jsonl(tmp_path / "a.jsonl", record, {"data": None}, {"data.text": "by its own name"})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record, {"data": None}]), tmp_path / "b.parquet")
    assert list(documents(files(tmp_path, text_key="data.text"))) == ["nested", "by its own name", "nested"]
    assert "data.text_key=data.text" in refused(files(tmp_path / "a.jsonl", text_key="data.txt"))
    assert "data.text_key=data.text" in refused(files(tmp_path / "b.parquet", text_key="text"))
    datasets.Dataset.from_list([record, {"data": None, "id": 3}]).save_to_disk(tmp_path / "set")
    cfg = Data(source="hf", name=str(tmp_path / "set"), text_key="data.text")
    assert list(documents(cfg)) == ["nested"]
    cfg.text_key = "data.txt"
    assert "data.text_key=data.text" in refused(cfg)


def test_what_is_not_read_is_named(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "b.docx", "c.docx", "d.docx.gz", "LICENSE", ".hidden", "sub/e.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / ".git").mkdir()
    (tmp_path / "__pycache__").mkdir()
    os.mkfifo(tmp_path / "f.txt")
    (tmp_path / "g.txt").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "sub/up").symlink_to("..")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "h.txt"))
        source = documents(files(tmp_path))
        assert list(source) == ["a.txt", "sub/e.txt"]
        assert source.unread == (
            "12 files or folders are not read: 2 hidden, 2 dangling, 2 .docx, 1 named __pycache__, 1 FIFO, 1 socket, "
            "1 read under another name, 1 without an ending, 1 .docx.gz "
            "(data.extensions=[.EXT] reads plain text of another ending)"
        )
        # A glob does not wait for a pipe either, and does not follow links in a circle.
        assert list(documents(files(tmp_path / "**/*.txt"))) == ["a.txt", "sub/e.txt"]
        assert list(documents(files(tmp_path / "*"))) == ["a.txt", "sub/e.txt"]
        for name, reason in (("f.txt", "neither a file"), ("h.txt", "neither a file"), ("g.txt", "does not exist")):
            assert reason in refused(files(tmp_path / name))
        assert "neither a file nor a folder" in refused(files(tmp_path / "f.txt")), "a pipe is not waited for"


def test_a_linked_folder_or_file_is_read_once(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.txt").write_text("a")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/one").symlink_to("../real")
    (tmp_path / "in/two").symlink_to("../real")
    (tmp_path / "in/three.txt").symlink_to("../real/a.txt")
    source = documents(files(tmp_path / "in"))
    assert list(source) == ["a"]
    assert source.unread == "2 files or folders are not read: 2 read under another name"


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", denied)
    assert "data.paths cannot be listed" in refused(files(tmp_path))


def test_wrong_column_names_the_nearest(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"content": ["x"], "test": [1]}), tmp_path / "a.parquet")
    assert "data.text_key=content" in refused(files(tmp_path / "a.parquet"))


def test_missing_paths_name_the_nearest(tmp_path):
    (tmp_path / "corpus").mkdir()
    assert str(tmp_path / "corpus") in refused(files(tmp_path / "corpsu/*.txt"))
    assert str(tmp_path / "corpus") in refused(files(tmp_path / "Corpus"))
    assert "none of 0 files" in refused(files(tmp_path / "corpus"))
    assert "data.paths" in refused(files())


def test_save_to_disk_with_and_without_splits(tmp_path):
    table = datasets.Dataset.from_dict({"text": ["a", "", "b"], "n": [1, 2, 3]})
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "many")
    one, many = Data(source="hf", name=str(tmp_path / "one")), Data(source="hf", name=str(tmp_path / "many"))
    assert list(documents(one)) == list(documents(many)) == ["a", "b"]
    many.split = "test"
    assert list(documents(many)) == ["a"]
    many.split = "validation"
    assert "data.split=train or test" in refused(many)
    one.text_key = "txt"
    assert "data.text_key=text" in refused(one)
    one.text_key = "n"
    assert "int" in refused(one)


def test_local_dataset_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set/train.jsonl", {"text": "x"}, {"text": "y"})
    cfg = Data(source="hf", name=str(tmp_path / "set"))
    assert list(documents(cfg)) == ["x", "y"]
    cfg.split = "test"
    assert "train" in refused(cfg)


def test_an_unreachable_hub_is_one_line_at_once(monkeypatch):
    monkeypatch.setattr(hub, "reachable", lambda: False)
    started = time.monotonic()
    message = refused(Data(source="hf", name="nobody/no-such-set"))
    assert "cannot be reached" in message
    assert "data.source=files" in message
    assert time.monotonic() - started < 5
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_hf_names_that_can_be_no_name(tmp_path):
    assert "data.name" in refused(Data(source="hf"))
    assert "does not exist" in refused(Data(source="hf", name=str(tmp_path / "nothing")))
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "x"})
    assert f"data.paths=[{path}]" in refused(Data(source="hf", name=str(path)))


def test_the_probe_tells_an_open_door_from_a_closed_one(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.reachable()
    assert not hub.reachable()


def test_what_names_in_data_would_do_to_a_terminal_is_escaped():
    escape = "\x1b[31mred"
    assert texts.some([escape]) == "\\x1b[31mred"
    assert "\x1b" not in str(texts.no_column("text", [escape], "k.jsonl"))
    assert texts.one_line(ValueError(escape)) == "\\x1b[31mred"
    assert "\x1b" not in Selection(unread=Counter({f".{escape}": 1})).note()
