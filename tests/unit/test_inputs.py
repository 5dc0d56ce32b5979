"""Whether a corpus fits a model and a run: the rows of the embeddings, the vocabulary, the epochs."""

import json
from types import SimpleNamespace

import pytest

from stack.cli.main import main
from stack.config.compose import compose
from stack.config.schema import Config, Data, Model
from stack.data.corpus import Corpus
from stack.data.shards import prepare
from stack.errors import DataError
from stack.plan.layout import make_plan
from stack.train.inputs import _check_rows, sequences_of_epoch
from tests.helpers.corpora import corpus, stories


@pytest.mark.parametrize(
    ("init", "advice"),
    [
        ("scratch", "; use model.config.vocab_size=361$"),
        ("pretrained", r"have 360 rows, .*data.tokenizer=tok needs 361; .*m.resize_token_embeddings\(361\)"),
    ],
)
def test_ids_beyond_the_rows_are_refused_and_others_are_not(init, advice):
    cfg = Config(model=Model(name="folder", init=init), data=Data(tokenizer="tok"))
    _check_rows(cfg, 360, SimpleNamespace(vocab_size=360))
    with pytest.raises(DataError, match=advice):
        _check_rows(cfg, 360, SimpleNamespace(vocab_size=361))


@pytest.fixture
def settings(tmp_path) -> list[str]:
    data = corpus(tmp_path, stories(300))
    return [
        *("data.source=files", f"data.paths={data.paths}", f"data.root={data.root}", "data.seq_len=16"),
        *(f"data.vocab_size={data.vocab_size}", "batch.global_size=8", "train.steps=100"),
    ]


@pytest.mark.parametrize("pack", ["true", "false"])
def test_the_plan_says_how_many_epochs_the_steps_are(settings, pack, capsys):
    overrides = [*settings, f"data.pack={pack}"]
    cfg = compose(overrides)
    assert sequences_of_epoch(cfg, make_plan(cfg)) is None
    assert main(["plan", *overrides]) == 0
    assert "\nepochs " not in capsys.readouterr().out
    split = Corpus.open(prepare(cfg.data, seed=cfg.data.split_seed, progress=False)).split("train")
    sequences = (split.num_tokens - 1) // 16 if pack == "true" else split.num_documents
    assert main(["plan", *overrides]) == 0
    [row] = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("epochs ")]
    assert row[1:] == [f"{800 / sequences:.2f}", *f"800 sequences, and an epoch has {sequences:,}".split()]


def test_data_refuses_to_learn_a_vocabulary_for_pretrained_weights(settings, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (model / "model.safetensors").touch()
    words = ["model=folder", f"model.name={model}", "model.init=pretrained", "optim.lr=1e-5", "data.tokenizer=bpe"]
    assert main(["data", *settings, *words]) == 5
    told = capsys.readouterr().err
    assert told.startswith("DataError: data.tokenizer=bpe learns a new vocabulary, and the weights need their own")
    assert told.count("\n") == 1
    assert not (tmp_path / "data").exists()
