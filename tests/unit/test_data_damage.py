"""A damaged or crafted corpus is refused with one line at any time, and the advice in the line repairs it."""

import json
import os
import shutil
from pathlib import Path

import pytest

from stack.data import manifest, shards
from stack.data.corpus import Corpus, Split
from stack.data.shards import locate, prepare
from stack.errors import DataError
from tests.helpers.corpora import SEED, corpus, hashes, stories


@pytest.mark.parametrize("damage", ["cut manifest", "edited manifest", "no manifest", "cut shard", "no shard"])
def test_damage_is_found_by_locate_and_healed_by_prepare(tmp_path, damage):
    cfg = corpus(tmp_path, stories(30))
    folder = prepare(cfg, seed=SEED)
    before = hashes(folder)
    path = folder / ("manifest.json" if damage.endswith("manifest") else "train/tokens-00000.bin")
    content = path.read_bytes()
    if damage.startswith("no"):
        path.unlink()
    else:
        path.write_bytes(content[:-10] if damage.startswith("cut") else content.replace(b'"eos_id": 0', b'"eos_id": 1'))
    with pytest.raises(DataError, match="run `stack data`"):
        locate(cfg, seed=SEED)
    assert hashes(prepare(cfg, seed=SEED)) == before
    assert locate(cfg, seed=SEED) == folder


MANIFESTS = {
    "no JSON": b"{",
    "nested": b"[" * 200_000,
    "digits": b'{"n": ' + b"7" * 5000 + b"}",
    "a list": b"[]",
    "another format": b'{"format": 1}',
    "no files": {"files": None},
    "outside": {"files": [{"path": "../docs.jsonl", "bytes": 1, "blake2b": ""}]},
    "absolute": {"files": [{"path": "/etc/passwd", "bytes": 1, "blake2b": ""}]},
    "no path": {"files": [{}]},
    "a number as path": {"files": [{"path": 7, "bytes": 1, "blake2b": ""}]},
    "no splits": {"splits": {}},
    "a text as number": {"vocab_size": "270"},
    "an odd dtype": {"dtype": "<f4"},
    "no shards": {"shard_tokens": 0},
    "no recipe": {"made_from": None},
    "no fingerprint": {"fingerprint": None},
}


def test_a_manifest_that_somebody_else_wrote_is_refused_in_one_line(tmp_path):
    cfg = corpus(tmp_path, stories(30))
    folder = prepare(cfg, seed=SEED)
    about = manifest.read(folder)
    for name, content in MANIFESTS.items():
        if isinstance(content, bytes):
            (folder / "manifest.json").write_bytes(content)
        else:
            manifest.write(folder, {**about, **content})
        with pytest.raises(DataError, match="run `stack data`") as caught:
            locate(cfg, seed=SEED)
        assert "\n" not in str(caught.value), name
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    with pytest.raises(DataError, match="it is no regular file"):
        locate(cfg, seed=SEED)
    prepare(cfg, seed=SEED)
    shards.verify(cfg, seed=SEED)


@pytest.mark.parametrize("name", ["train/tokens-00000.bin", "train"])
def test_a_link_that_leads_out_of_a_corpus_is_refused(tmp_path, name):
    cfg = corpus(tmp_path, stories(30))
    folder = prepare(cfg, seed=SEED)
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"train/\S+ is outside of the folder.*; run `stack data`"):
        locate(cfg, seed=SEED)


DAMAGE = {
    "cut": (lambda path: os.truncate(path, 20), "was cut"),
    "impossible ids": (lambda path: path.write_bytes(b"\xff\xff" * (path.stat().st_size // 2)), "token id 65535"),
    "gone": (lambda path: path.unlink(), "No such file"),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("opened_before", [True, False])
def test_damage_that_happens_while_a_corpus_is_read_names_the_file(tmp_path, name, opened_before):
    damage, words = DAMAGE[name]
    cfg = corpus(tmp_path, stories(300))
    folder = prepare(cfg, seed=SEED)
    split = Corpus.open(folder).split("train")
    if opened_before:
        split.read(0, 5)
    damage(folder / "train/tokens-00000.bin")
    if opened_before and name == "gone":
        split.read(0, split.num_tokens)  # a removed file can be read while it is open
        return
    with pytest.raises(DataError, match=f"tokens-00000.bin is damaged .*{words}.*; remove .* and run `stack data`"):
        split.read(0, split.num_tokens)
    shutil.rmtree(folder)
    prepare(cfg, seed=SEED)
    shards.verify(cfg, seed=SEED)


def test_an_index_that_is_cut_while_it_is_read_is_no_signal(tmp_path):
    folder = prepare(corpus(tmp_path, stories(3000)), seed=SEED)
    split = Corpus.open(folder).split("train")
    assert split.starts[-1] == split.num_tokens
    os.truncate(folder / "train/documents.npy", 200)
    for use in (lambda: split.document(2000), lambda: split.starts):
        with pytest.raises(DataError, match=r"documents.npy is damaged \(it was cut while it was read\)"):
            use()
    with pytest.raises(DataError, match=r"documents.npy is damaged"):
        Split(folder, "train", split_manifest(folder))


def split_manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def test_verify_finds_a_flipped_bit_and_its_advice_repairs_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shards, "LINE_INTERVAL_S", 0)
    cfg = corpus(tmp_path, stories(30))
    folder = prepare(cfg, seed=SEED, progress=False)
    assert shards.verify(cfg, seed=SEED) == folder
    lines = capsys.readouterr().err.splitlines()
    assert "GB compared" in lines[0]
    assert lines[-1].endswith("all are as they were written")
    shard = folder / "heldout/tokens-00000.bin"
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    assert prepare(cfg, seed=SEED) == folder  # compares sizes only
    with pytest.raises(DataError, match=f"{shard} has changed .*; remove {folder} and run `stack data`"):
        shards.verify(cfg, seed=SEED)
    shutil.rmtree(folder)
    prepare(cfg, seed=SEED)
    shards.verify(cfg, seed=SEED)
