"""`stack eval` of a model folder, which may come from an untrusted source."""

import json
import shutil
from pathlib import Path

import pytest

from stack.config.compose import compose, to_yaml
from stack.config.facts import FACTS, facts
from stack.config.schema import Config
from stack.data.shards import locate, prepare
from stack.errors import ConfigError, DataError, UsageError
from stack.launch.evaluate import config_of_folder
from stack.launch.reread import of_export
from stack.plan.layout import make_plan
from tests.helpers.forked import tiny_settings


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model folder without a stack.yaml."""
    made = tmp_path / "lr=0.1, é"
    made.mkdir()
    (made / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1}))
    for name in ("model.safetensors", "tokenizer.json"):
        (made / name).write_text("{}")
    return made


def config(folder: Path, *overrides: str) -> Config:
    return config_of_folder(str(folder), overrides)[0]


def test_a_folder_is_evaluated_with_its_own_model_and_tokenizer_and_the_defaults_of_a_run(folder, tmp_path):
    cfg = config(folder, "data.source=files", "data.paths=[a.txt]")
    assert (cfg.model.name, cfg.model.init, cfg.model.config) == (str(folder), "pretrained", {})
    assert cfg.data.tokenizer == str(folder)
    assert cfg.data.paths == [str(tmp_path / "a.txt")]
    # A model of one layer gets a single stage.
    assert make_plan(cfg).stages == 1
    assert cfg.run.root == str(tmp_path / "runs")


@pytest.mark.parametrize(
    "overrides",
    [["data=files", "data.paths=[a.txt]"], ["parallel=zero1_pipeline"], ["precision=bf16"], ["~experiment"]],
)
def test_groups_are_chosen_as_for_a_new_run(folder, overrides):
    assert config(folder, *overrides).model.name == str(folder)


def test_what_an_export_says_decides_neither_where_is_written_nor_which_host_is_reached(folder, tmp_path):
    evil = compose(
        [
            *("run.root=/evil/root", "checkpoint.path=/evil/checkpoints", "launch.hostfile=/evil/hosts"),
            *("launch.backend=torchrun", "launch.env=[SECRET]", "launch.slurm=[--evil]", "log.wandb.mode=online"),
            *("log.wandb.entity=evil", "parallel.offload.optimizer=nvme", "parallel.offload.folder=/evil/nvme"),
            *("data=files", "data.paths=[/texts]", "data.root=/evil/data", "data.seq_len=64", "precision.dtype=bf16"),
            *("model.attention=eager", "train.eval_sequences=7", "run.name=evil"),
        ]
    )
    for text in (facts(evil), to_yaml(evil)):
        (folder / FACTS).write_text(text)
        cfg, there = config_of_folder(str(folder), [])
        assert (cfg.data.paths, cfg.data.seq_len, cfg.precision.dtype) == (["/texts"], 64, "bf16")
        assert (cfg.model.attention, cfg.train.eval_sequences) == ("eager", 7)
        assert there is not None
        # The corpus folder named by stack.yaml is only read, never written.
        assert there.root == "/evil/data"
        default = compose()
        for section in ("launch", "log", "checkpoint", "health"):
            assert getattr(cfg, section) == getattr(default, section)
        assert cfg.parallel.offload == default.parallel.offload
        assert cfg.data.root == str(tmp_path / "data")
        assert cfg.run.root == str(tmp_path / "runs")
    assert "evil/root" not in facts(evil)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {name: '${oc.env:HOME}', source: hf}", r"stack\.yaml: data\.name=.*must not contain"),
        ("data: {seq_len: 1}", r"stack\.yaml: data\.seq_len=1: must be at least 8"),
        ("[", r"stack\.yaml: not YAML of a config .*; give what stack export writes there"),
        ("3", r"stack\.yaml: .*; give what stack export writes there"),
        ("data: &a {source: hf}\nmodel: *a", "aliases are not read"),
    ],
)
def test_what_an_export_says_is_checked(folder, text, message):
    (folder / FACTS).write_text(text)
    with pytest.raises(ConfigError, match=message):
        config(folder)


@pytest.mark.parametrize("text", ["", "data: 3", "other: {a: 1}", "run: {root: /evil}"])
def test_what_says_nothing_is_no_fault(folder, text, tmp_path):
    (folder / FACTS).write_text(text)
    assert config(folder).run.root == str(tmp_path / "runs")


def test_other_text_takes_the_place_of_the_runs(folder):
    run = compose(["data=hf", "data.seq_len=64", "data.heldout_fraction=0.1"])
    (folder / FACTS).write_text(facts(run))
    assert config(folder).data.name == "HuggingFaceFW/fineweb-edu"
    for overrides in (["data.source=files", "data.paths=[a.txt]"], ["data=files", "data.paths=[a.txt]"]):
        cfg, there = config_of_folder(str(folder), overrides)
        assert (cfg.data.name, cfg.data.subset, there) == (None, None, None)
    assert config(folder, "data.source=python_stdlib").data.heldout_fraction == 0.1
    # data.seq_len does not change the corpus, so the prepared one may be used.
    assert config_of_folder(str(folder), ["data.seq_len=32"])[1]


@pytest.mark.parametrize("override", ["model=llama_4m", "model.name=x", "model.init=scratch", "checkpoint.step=3"])
def test_what_is_evaluated_is_the_folder(folder, override):
    with pytest.raises(UsageError, match="has one model and one set of weights; drop it"):
        config(folder, override)


def test_a_folder_without_a_tokenizer_needs_one(folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"holds no tokenizer; add data\.tokenizer="):
        config(folder)
    (tmp_path / "tokens").mkdir()
    assert config(folder, "data.tokenizer=tokens").data.tokenizer == str(tmp_path / "tokens")


def test_the_corpus_of_the_exports_run_is_read_where_it_is_and_made_elsewhere_if_it_is_not(tmp_path):
    settings = {**tiny_settings(), "data.root": tmp_path / "prepared"}
    run = compose([f"{key}={value}" for key, value in settings.items()])
    corpus = prepare(run.data, seed=run.data.split_seed, progress=False)
    folder = tmp_path / "out"
    shutil.copytree(corpus / "tokenizer", folder)
    shape = {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps({**shape, "num_hidden_layers": 1, "intermediate_size": 64}))
    (folder / "model.safetensors").write_text("")
    (folder / FACTS).write_text(facts(run))
    before = sorted(tmp_path.rglob("prepared/*"))

    cfg, there = config_of_folder(str(folder), ["launch.ranks_per_node=1"])
    assert of_export(cfg, make_plan(cfg), there) == corpus
    (corpus / "manifest.json").unlink()
    made = of_export(cfg, make_plan(cfg), there)
    assert made.parent == tmp_path / "data"
    assert sorted(tmp_path.rglob("prepared/*")) == before
    # The held-out tokens are the same: documents are chosen by their number, and the tokenizer is that of the export.
    assert (made / "heldout/tokens-00000.bin").read_bytes() == (corpus / "heldout/tokens-00000.bin").read_bytes()
    assert locate(cfg.data, seed=cfg.data.split_seed) == made
