"""The values that replace `auto`, and the recipe for fine-tuning."""

import json
from pathlib import Path

import pytest

from stack.config.auto import without_auto
from stack.config.compose import compose, from_yaml, to_yaml
from stack.errors import ConfigError
from stack.plan.layout import make_plan
from stack.plan.report import render
from tests.unit.test_rotary import SIZES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with the files that composing a config reads."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
    (base / "model.safetensors").write_bytes(b"stands for weights")
    return base


def finetune(folder: Path, *overrides: str) -> list[str]:
    return ["experiment=finetune", f"model.name={folder}", "data.paths=[texts]", *overrides]


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (9, 0), (10, 1), (200, 20), (100_000, 2000)])
def test_a_warmup_fits_any_number_of_steps(steps: int, warmup: int) -> None:
    cfg = compose([f"train.steps={steps}", "train.eval_every=0"])
    assert (cfg.schedule.warmup_steps, cfg.optim.lr, cfg.data.tokenizer) == (warmup, 3e-4, "bpe")


def test_advice_for_a_warmup_that_does_not_fit_works() -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["train.steps=15", "schedule.warmup_steps=16"])
    assert str(caught.value).endswith("more than train.steps=15; use schedule.warmup_steps=1, at most 15")
    assert compose(["train.steps=15", "schedule.warmup_steps=1"]).schedule.warmup_steps == 1
    assert compose(["train.steps=15", "schedule.warmup_steps=15"]).schedule.warmup_steps == 15


@pytest.mark.parametrize(
    ("overrides", "works"),
    [
        (["model.init=pretrained"], "optim.lr=1e-5"),
        (["model.init=pretrained", "optim=sgd"], "optim.lr=1e-3"),
        (["optim=sgd"], "optim.lr=0.1"),
    ],
)
def test_no_rate_is_chosen_where_none_suits_every_model(overrides: list[str], works: str, folder: Path) -> None:
    given = ["model=folder", f"model.name={folder}", *overrides]
    with pytest.raises(ConfigError, match=f"^optim.lr=auto: .*{works}$"):
        compose(given)
    assert compose([*given, works]).optim.lr == float(works.partition("=")[2])


def test_the_recipe_for_finetuning_needs_a_folder_and_texts_alone(folder: Path) -> None:
    cfg = compose(finetune(folder))
    assert (cfg.optim.lr, cfg.model.init, cfg.data.tokenizer) == (1e-5, "pretrained", str(folder))
    for ranks in (1, 2, 4, 8):
        assert make_plan(cfg, ranks).replicas == ranks
    assert compose(finetune(folder, "data.tokenizer=bpe")).data.tokenizer == "bpe"


def test_what_auto_stood_for_is_saved_and_kept(folder: Path, tmp_path: Path) -> None:
    cfg = compose(finetune(folder))
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(cfg))
    assert "auto" not in (cfg.optim.lr, cfg.schedule.warmup_steps, cfg.data.tokenizer)
    assert from_yaml(saved) == without_auto(cfg) == cfg
    longer = from_yaml(saved, ["train.steps=1000"])
    assert longer.schedule.warmup_steps == 20
    assert from_yaml(saved, ["train.steps=1000", "schedule.warmup_steps=auto"]).schedule.warmup_steps == 100


def test_the_plan_says_what_is_trained_on_what(folder: Path) -> None:
    cfg = compose(finetune(folder))
    text = render(make_plan(cfg, 4), cfg)
    rows = {line[:14].strip(): " ".join(line[14:].split()) for line in text.splitlines()}
    assert rows["weights"] == f"pretrained read from {folder}"
    assert rows["corpus"] == "files texts"
    assert rows["tokenizer"] == f"pretrained {folder}"
    assert rows["learning rate"] == "1e-05 adamw; warm-up over 20 steps, then cosine to 1e-06 to step 200"
    cfg = compose(["schedule=wsd", "train.steps=1000"])
    rows = {line[:14].strip(): " ".join(line[14:].split()) for line in render(make_plan(cfg, 4), cfg).splitlines()}
    assert rows["weights"] == "scratch drawn from run.seed 1234"
    assert rows["tokenizer"] == "bpe byte-level, 4,096 entries, learnt from the corpus"
    assert rows["learning rate"].endswith("warm-up over 100 steps, then wsd to 3e-05 over the last 100 steps")
