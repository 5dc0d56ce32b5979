"""Preparation: the same corpus every time, whatever interrupts it, and no damaged one is ever taken for whole."""

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from stack.config.schema import Data
from stack.data import manifest, shards
from stack.data.batches import Corpus
from stack.data.shards import locate, prepare
from stack.errors import DataError

SEED = 7


def corpus(folder: Path, documents: list[str], **fields) -> Data:
    """A config whose source is one jsonl file of `documents`; the prepared corpus goes to `folder`/data."""
    raw = folder / "raw"
    raw.mkdir(exist_ok=True)
    (raw / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    settings = {"tokenizer": "bpe", "vocab_size": 270, "heldout_fraction": 0.2, **fields}
    return Data(source="files", paths=[str(raw)], root=str(folder / "data"), **settings)


def stories(count: int) -> list[str]:
    return [f"story {number}: once upon a time, {'and then ' * (number % 7)}the end é" for number in range(count)]


def hashes(folder: Path) -> dict[str, str]:
    return {file["path"]: file["blake2b"] for file in manifest.read(folder)["files"]}


def start(code: str, cfg: Data) -> subprocess.Popen:
    script = (
        "import sys, json; from stack.config.schema import Data; from stack.data import manifest, shards;"
        f"cfg = Data(**json.loads(sys.argv[1]));{code}"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script, json.dumps(vars(cfg))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_documents_round_trip_through_small_shards_and_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 128)
    monkeypatch.setattr(shards, "PIECE_CHARS", 50)
    monkeypatch.setattr(shards, "BATCH_CHARS", 200)
    documents = [*stories(40), "x" * 500, "", "日本語" * 100]
    folder = prepare(corpus(tmp_path, documents), seed=SEED)
    opened = Corpus.open(folder)
    decode = AutoTokenizer.from_pretrained(folder / "tokenizer").decode
    found = []
    for name in ("train", "heldout"):
        split = opened.split(name)
        assert len(list((folder / name).glob("*.bin"))) == -(-split.num_tokens * 2 // 128) > 1
        for number in range(split.num_documents):
            tokens = split.document(number)
            assert tokens[-1] == opened.eos_id
            found.append(decode(tokens[:-1]))
    assert sorted(found) == sorted(filter(None, documents))
    counts = opened.manifest["splits"]
    assert counts["train"]["documents"] + counts["heldout"]["documents"] == 42
    assert not list(tmp_path.glob("data/.*.tmp-*"))


def test_preparing_is_deterministic_and_repeatable(tmp_path):
    (tmp_path / "a").mkdir()
    cfg = corpus(tmp_path / "a", stories(50))
    first = prepare(cfg, seed=SEED)
    before = (first / "manifest.json").stat()
    assert prepare(cfg, seed=SEED) == locate(cfg, seed=SEED) == first
    assert (first / "manifest.json").stat().st_mtime_ns == before.st_mtime_ns
    cfg.root = str(tmp_path / "other")
    assert hashes(prepare(cfg, seed=SEED)) == hashes(first)
    assert first.name == f"files-{manifest.verify(first)['fingerprint'][:12]}"


def test_split_does_not_depend_on_how_work_is_batched(tmp_path, monkeypatch):
    cfg = corpus(tmp_path, stories(50))
    first = hashes(prepare(cfg, seed=SEED))
    monkeypatch.setattr(shards, "BATCH_CHARS", 1)
    cfg.root = str(tmp_path / "other")
    assert hashes(prepare(cfg, seed=SEED)) == first


def test_splits_are_disjoint_near_their_share_and_chosen_by_the_seed():
    choose = shards._Chooser(0.02, SEED)
    heldout = {number for number in range(20_000) if choose(number) == "heldout"}
    assert 300 < len(heldout) < 500
    assert len(heldout & {0, 1}) == 1
    other = shards._Chooser(0.02, SEED + 1)
    assert heldout != {number for number in range(20_000) if other(number) == "heldout"}


def test_two_documents_are_enough_and_one_is_not(tmp_path):
    counts = Corpus.open(prepare(corpus(tmp_path, ["one one", "two"], vocab_size=257), seed=SEED)).manifest["splits"]
    assert {name: split["documents"] for name, split in counts.items()} == {"train": 1, "heldout": 1}
    for documents in (["", "only one"], [""]):
        with pytest.raises(DataError, match=f"{len(documents) - 1} documents"):
            prepare(corpus(tmp_path, documents, vocab_size=257), seed=SEED)


def test_fingerprint_follows_what_matters_and_nothing_else(tmp_path):
    cfg = corpus(tmp_path, stories(5))

    def name(**fields) -> str:
        changed = Data(**{**vars(cfg), **{key: value for key, value in fields.items() if key != "seed"}})
        return manifest.fingerprint(manifest.made_from(changed, seed=fields.get("seed", SEED)))

    same = name()
    assert name(seq_len=64) == name(pack=False) == name(root="elsewhere") == same
    changes = [{"seed": 8}, {"vocab_size": 280}, {"heldout_fraction": 0.1}, {"text_key": "body"}]
    names = {same, *(name(**change) for change in changes)}
    corpus(tmp_path, [*stories(5), "one more"])
    assert len({*names, name()}) == 6


def test_locate_says_what_to_run_and_what_differs(tmp_path):
    cfg = corpus(tmp_path, stories(30))
    with pytest.raises(DataError, match="run `stack data` with the same overrides"):
        locate(cfg, seed=SEED)
    prepare(cfg, seed=SEED)
    with pytest.raises(DataError, match="seed: 7 there, 8 here"):
        locate(cfg, seed=8)


def test_locate_imports_no_heavy_library(tmp_path):
    cfg = corpus(tmp_path, stories(30))
    prepare(cfg, seed=SEED)
    code = (
        f"print(shards.locate(cfg, seed={SEED})); import stack.data.batches;"
        "print([m for m in ('torch', 'datasets', 'transformers', 'tokenizers', 'pyarrow') if m in sys.modules])"
    )
    out, err = start(code, cfg).communicate()
    assert out.split("\n")[1] == "[]", err


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


def test_verify_finds_a_flipped_bit(tmp_path):
    folder = prepare(corpus(tmp_path, stories(30)), seed=SEED)
    shard = folder / "heldout/tokens-00000.bin"
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    manifest.read(folder)
    with pytest.raises(DataError, match="has changed"):
        manifest.verify(folder)


def test_killed_preparation_leaves_nothing_that_counts(tmp_path):
    cfg = corpus(tmp_path, stories(30))
    die = "import os; manifest.write = lambda *_: os.kill(os.getpid(), 9);"
    process = start(f"{die} shards.prepare(cfg, seed={SEED})", cfg)
    process.communicate()
    assert process.returncode == -9
    assert len(list((tmp_path / "data").glob(".*.tmp-*"))) == 1
    with pytest.raises(DataError, match="run `stack data`"):
        locate(cfg, seed=SEED)
    stale = tmp_path / "data/.files-000000000000.tmp-abcd"
    stale.mkdir()
    manifest.verify(prepare(cfg, seed=SEED))
    assert not list((tmp_path / "data").glob(".*.tmp-*"))


def test_a_failed_preparation_cleans_up(tmp_path, monkeypatch):
    cfg = corpus(tmp_path, stories(30))

    def full(*_):
        raise OSError(28, "No space left on device", "tokens")

    monkeypatch.setattr(manifest, "write", full)
    with pytest.raises(DataError, match="No space left on device"):
        prepare(cfg, seed=SEED)
    assert [path.suffix for path in (tmp_path / "data").iterdir()] == [".lock"]


def test_a_source_that_changes_meanwhile_is_not_published(tmp_path, monkeypatch):
    cfg = corpus(tmp_path, stories(30))
    write = manifest.write

    def write_late(*arguments):
        corpus(tmp_path, stories(31))
        write(*arguments)

    monkeypatch.setattr(manifest, "write", write_late)
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(cfg, seed=SEED)


def test_progress_is_plain_lines_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("stack.data.progress.LINE_INTERVAL_S", 0)
    prepare(corpus(tmp_path, stories(30)), seed=SEED)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "data: learning a byte-level BPE of 270 entries"
    assert lines[-1].startswith("data: 30 documents, ")
    (tmp_path / "quiet").mkdir()
    prepare(corpus(tmp_path / "quiet", stories(30)), seed=SEED, progress=False)
    assert not capsys.readouterr().err


def test_two_processes_at_once_do_the_work_once(tmp_path):
    cfg = corpus(tmp_path, stories(30))
    target = manifest.folder_of(cfg, manifest.made_from(cfg, seed=SEED))
    target.parent.mkdir()
    with open(shards._lock_path(target), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        processes = [start(f"print(shards.prepare(cfg, seed={SEED}))", cfg) for _ in range(2)]
        for process in processes:
            assert "waiting" in process.stderr.readline()
    results = [process.communicate() for process in processes]
    assert [out for out, _ in results] == [f"{target}\n"] * 2
    assert "".join(err for _, err in results).count("learning") == 1
    manifest.verify(target)


def test_large_vocabularies_take_four_bytes_a_token(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 70_000, "</s>": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path / "tokenizer")
    cfg = corpus(tmp_path, ["a a", "  ", "a", "b a"], tokenizer=str(tmp_path / "tokenizer"))
    opened = Corpus.open(prepare(cfg, seed=SEED))
    assert opened.manifest["dtype"] == "<u4"
    assert opened.vocab_size == 70_001
    splits = [opened.split(name) for name in ("train", "heldout")]
    stored = [split.document(number).tolist() for split in splits for number in range(split.num_documents)]
    # Three documents: the blank one has no token, so it is no document.
    assert sorted(stored) == [[2, 70_000, 1], [70_000, 1], [70_000, 70_000, 1]]
    assert np.diff(splits[0].starts).min() >= 2
