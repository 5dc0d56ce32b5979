"""`stack data` makes the same corpus every time, also after interruptions. A damaged corpus never counts as whole."""

import errno
import fcntl
import json
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stack.config.schema import Data
from stack.data import manifest, shards
from stack.data.corpus import Corpus
from stack.data.shards import locate, prepare
from stack.errors import DataError
from tests.helpers.corpora import SEED, corpus, hashes, stories
from tests.helpers.tokenizers import build, metaspace


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
    changes = [
        {"special_tokens": "text"},
        {"extensions": [".x"]},
        {"seed": 8},
        {"vocab_size": 280},
        {"heldout_fraction": 0.1},
        {"text_key": "body"},
    ]
    names = {same, *(name(**change) for change in changes)}
    corpus(tmp_path, [*stories(5), "one more"])
    assert len({*names, name()}) == 8


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


def test_a_document_has_the_tokens_of_the_tokenizer_and_the_end(tmp_path, capsys):
    chats = ["<s>user\nhi</s>", "<|x|>the small house", "the <|x|> door"]
    backend = build("unigram", pre_tokenizer=metaspace("always"))
    ids = [("<s>", backend.token_to_id("<s>"))]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ids)
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    hf.add_special_tokens({"additional_special_tokens": ["<|x|>"]})
    hf.add_special_tokens({"pad_token": "[PAD]"})
    hf.save_pretrained(tmp_path / "tokenizer")
    stored = {}
    for how in ("parse", "text"):
        cfg = corpus(tmp_path, chats, tokenizer=str(tmp_path / "tokenizer"), special_tokens=how)
        opened = Corpus.open(prepare(cfg, seed=SEED))
        said = [line for line in capsys.readouterr().err.splitlines() if "special" in line or "begins" in line]
        assert said[0] == "data: every document begins with <s>, which the tokenizer adds by itself"
        assert said[1].startswith(
            "data: 3 documents spell special tokens: <|x|> (2), </s> (1), <s> (1); they were read"
        )
        splits = [opened.split(name) for name in ("train", "heldout")]
        stored[how] = sorted(split.document(n).tolist() for split in splits for n in range(split.num_documents))
        # An added token that no document holds needs no embedding, such as the pad token, which was added last.
        assert opened.vocab_size == (len(hf) - 1 if how == "parse" else len(hf) - 2)
    end = [hf.eos_token_id]
    # The first document already begins with the tokenizer's first token, and gets no second one.
    begun = [hf(chats[0], add_special_tokens=False)["input_ids"], *hf(chats[1:])["input_ids"]]
    assert stored["parse"] == sorted(ids + end for ids in begun)
    assert all(document[0] == hf.bos_token_id for document in stored["text"])
    assert not {*hf.all_special_ids[3:]} & {token for document in stored["text"] for token in document[1:-1]}


def test_what_is_not_read_is_said(tmp_path, capsys):
    cfg = corpus(tmp_path, stories(30))
    (tmp_path / "raw/notes.docx").write_text("no text")
    prepare(cfg, seed=SEED)
    assert "data: 1 file or folder is not read: 1 .docx (" in capsys.readouterr().err


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


def test_without_locks_each_prepares_for_itself_and_the_first_one_counts(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    cfg = corpus(tmp_path, stories(30))
    target = manifest.folder_of(cfg, manifest.made_from(cfg, seed=SEED))
    others = target.with_name(f".{target.name}.tmp-abcd")
    others.mkdir(parents=True)
    write = manifest.write

    def write_second(*arguments):
        # Another process finishes the same corpus just before this one.
        write(*arguments)
        monkeypatch.setattr(manifest, "write", write)
        prepare(cfg, seed=SEED, progress=False)
        target.joinpath("first").touch()

    monkeypatch.setattr(manifest, "write", write_second)
    assert prepare(cfg, seed=SEED) == target
    assert (target / "first").exists()
    assert others.exists(), "it may be that of a process at work"
    assert len(list(target.parent.glob(".*.tmp-*"))) == 1


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
    # Three documents are stored: the blank one has no token and is left out.
    assert sorted(stored) == [[2, 70_000, 1], [70_000, 1], [70_000, 70_000, 1]]
    assert np.diff(splits[0].starts).min() >= 2
