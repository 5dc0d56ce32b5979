"""Every source gives its documents in a fixed order, and every wrong setting gives one line that names a fix."""

import json
import os
import socket
import sysconfig
import time
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from stack.config.schema import Data
from stack.data import hub
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
        ("a.csv", b"text\nx\n", ".jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_names_the_place(tmp_path, name, content, named):
    (tmp_path / name).write_bytes(content)
    assert named in refused(files(tmp_path / name))


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
