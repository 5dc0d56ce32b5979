"""The corpus of a resumed or evaluated run: its own text, or other text with the run's tokenizer."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from stack.config.schema import Config
from stack.data.manifest import read
from stack.errors import DataError
from stack.launch.reread import config_of, of_run
from stack.plan.layout import make_plan
from stack.train.rundir import RunDir
from tests.helpers.forked import tiny_run, tiny_settings


@pytest.fixture
def run(tmp_path) -> RunDir:
    """A run on a corpus of its own, with a tokenizer learnt from that corpus."""
    texts = Path(str(tiny_settings()["data.paths"])[1:-1])
    shutil.copytree(texts, tmp_path / "texts")
    return tiny_run(tmp_path, {"data.paths": f"[{tmp_path / 'texts'}]", "data.root": tmp_path / "prepared"})


def found(run: RunDir, *overrides: str) -> tuple[Config, Path]:
    cfg = config_of(run, overrides)
    return of_run(run, cfg, make_plan(cfg))


def other_text(folder: Path) -> str:
    """Writes text from which a byte-level BPE learns other merges; returns its folder."""
    folder.mkdir()
    draw = random.Random(1)
    for number in range(6):
        words = ["".join(draw.choices("ijklmnop", k=draw.randint(2, 6))) for _ in range(400)]
        (folder / f"{number}.txt").write_text(" ".join(words))
    return f"data.paths=[{folder}]"


def vocabulary(corpus: Path) -> dict:
    return json.loads((corpus / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]


def test_a_run_keeps_its_tokenizer(run):
    there = {file.name: file.read_bytes() for file in run.tokenizer.iterdir()}
    assert there == {file.name: file.read_bytes() for file in (run.corpus / "tokenizer").iterdir()}


@pytest.mark.parametrize("change", [[], ["data.seq_len=16"], ["data.pack=false", "data.prefetch=false"]])
def test_the_same_text_is_the_corpus_that_the_run_has_read(run, change, tmp_path):
    shutil.rmtree(tmp_path / "texts")
    assert found(run, *change)[1] == run.corpus


def test_a_corpus_that_is_gone_is_made_again_as_it_was(run):
    before = read(run.corpus)["fingerprint"]
    shutil.rmtree(run.corpus)
    cfg, corpus = found(run)
    assert (corpus, read(corpus)["fingerprint"], cfg.data.tokenizer) == (run.corpus, before, "bpe")


def test_text_and_corpus_that_have_moved_are_known_again(run, tmp_path):
    (tmp_path / "texts").rename(tmp_path / "moved")
    (tmp_path / "prepared").rename(tmp_path / "there")
    cfg, corpus = found(run, f"data.paths=[{tmp_path / 'moved'}]", f"data.root={tmp_path / 'there'}")
    assert (corpus.parent, cfg.data.tokenizer) == (tmp_path / "there", "bpe")
    assert corpus.name == run.corpus.name


def test_other_text_is_in_the_tokens_of_the_run(run, tmp_path):
    cfg, corpus = found(run, other_text(tmp_path / "other"))
    assert cfg.data.tokenizer == str(run.tokenizer)
    assert vocabulary(corpus) == vocabulary(run.corpus)
    # A new run on the same text learns another vocabulary.
    learnt = tiny_run(tmp_path / "new", {"data.paths": f"[{tmp_path / 'other'}]"})
    assert vocabulary(learnt.corpus) != vocabulary(run.corpus)


def test_tokens_of_another_vocabulary_are_refused_and_the_advice_works(run, tmp_path):
    text = other_text(tmp_path / "other")
    learnt = tiny_run(tmp_path / "new", {"data.paths": f"[{tmp_path / 'other'}]"})
    with pytest.raises(DataError, match="was tokenized with another vocabulary") as refused:
        found(run, text, f"data.tokenizer={learnt.tokenizer}")
    advice = str(refused.value).rpartition("use ")[2]
    assert vocabulary(found(run, text, advice)[1]) == vocabulary(run.corpus)


def test_text_that_is_not_there_is_what_the_message_is_about(run):
    with pytest.raises(DataError, match=r"data\.paths"):
        found(run, "data.paths=[/nowhere]")


def test_what_was_said_for_one_resume_is_forgotten(run):
    cfg = config_of(run, ["checkpoint.step=7", "checkpoint.allow=[data]"])
    assert (cfg.checkpoint.step, cfg.checkpoint.allow) == (7, ["data"])
    from stack.config.compose import to_yaml

    run.config.write_text(to_yaml(replace(cfg, train=replace(cfg.train, steps=9))))
    again = config_of(run, [])
    assert (again.checkpoint.step, again.checkpoint.allow, again.train.steps) == ("auto", [], 9)
