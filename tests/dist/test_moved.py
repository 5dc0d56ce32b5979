"""A fine-tuned run whose base folder, corpus and texts were moved; and the evaluation before the first step."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from stack.config.compose import from_yaml, to_yaml
from stack.launch import checkpoints
from stack.launch.evaluate import config_of_folder
from stack.launch.reread import config_of, of_export, of_run
from stack.observe.jsonl import latest, read
from stack.plan.layout import make_plan
from stack.train import rundir
from stack.train.rundir import RunDir
from tests.helpers.forked import tiny_again, tiny_run, tiny_settings

RUN = {"train.steps": 2, "checkpoint.every": 1, "train.eval_every": 1, "train.eval_sequences": 8}


def start(zygote, run: RunDir) -> None:
    assert zygote.run(["--config", str(run.config)], world_size=2) == [0, 0], _log(run)


def _log(run: RunDir) -> str:
    return "\n".join(file.read_text() for file in sorted(run.path.glob("ranks/*/log.txt")))


def losses(run: RunDir) -> list[tuple[int, str, float | None]]:
    """(step, loss with all bits, held-out loss) of each step that counts."""
    return [(row.step, row.loss.hex(), row.heldout_loss) for row in latest(read(run.metrics))]


def evaluated(zygote, evaluation: RunDir) -> float:
    assert zygote.run(["--config", str(evaluation.config)], world_size=2) == [0, 0], _log(evaluation)
    return json.loads(evaluation.result.read_text())["heldout_loss"]


@pytest.fixture(scope="module")
def project(zygote_of_module, tmp_path_factory) -> Path:
    """A folder with texts, a base model and a run that was fine-tuned from the base model."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(str(tiny_settings()["data.paths"])[1:-1], folder / "texts")
    data = {"data.paths": f"[{folder / 'texts'}]", "data.root": folder / "prepared"}
    first = tiny_run(folder / "first", {**data, **RUN})
    start(zygote_of_module, first)
    assert checkpoints.export(first, folder / "base", []) == 0
    shutil.rmtree(folder / "first")
    base = {"model": "folder", "model.config": "{}", "model.name": folder / "base", "model.init": "pretrained"}
    tuned = tiny_run(folder, {**data, **RUN, **base, "data.tokenizer": folder / "base", "optim.lr": 1e-4})
    start(zygote_of_module, tuned)
    return folder


@pytest.fixture(scope="module")
def zygote_of_module(_zygotes):
    from tests.helpers.forked import Zygote

    if not _zygotes or not _zygotes[-1].alive:
        _zygotes.append(Zygote())
    return _zygotes[-1]


@pytest.fixture
def moved(project, tmp_path) -> RunDir:
    """The run, moved to another folder, without its base model, corpus and texts."""
    shutil.copytree(project / "runs", tmp_path / "moved" / "runs")
    [config] = (tmp_path / "moved").glob("runs/*/*/config.yaml")
    text = config.read_text()
    # All paths in the config lead to a folder that does not exist.
    config.write_text(text.replace(str(project), str(tmp_path / "gone")))
    run = RunDir(config.parent)
    rundir.write_json(run.path / "corpus.json", {"folder": str(tmp_path / "gone" / run.corpus.name)})
    return run


def test_an_export_needs_nothing_but_the_run(project, moved, tmp_path, capsys):
    [original] = project.glob("runs/*/*/config.yaml")
    assert checkpoints.export(RunDir(original.parent), tmp_path / "one", []) == 0
    assert checkpoints.export(moved, tmp_path / "two", []) == 0
    assert f"cannot be read any more; the fields of the model are taken from {moved.model}" in capsys.readouterr().out
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert AutoTokenizer.from_pretrained(tmp_path / "two").eos_token_id is not None


def test_it_is_evaluated_on_text_in_a_new_place(zygote, project, moved, tmp_path):
    shutil.copytree(project / "texts", tmp_path / "texts")
    cfg = config_of(moved, [f"data.paths=[{tmp_path / 'texts'}]", f"data.root={tmp_path / 'data'}"])
    plan = make_plan(cfg)
    cfg, corpus = of_run(moved, cfg, plan)
    # The corpus is prepared again under the same name, because text and tokenizer are the same.
    assert corpus == tmp_path / "data" / moved.corpus.name
    made = rundir.create_evaluation(moved.evaluations, cfg, plan, corpus=corpus, checkpoints=moved.path / "checkpoints")
    assert evaluated(zygote, made) == pytest.approx(read(moved.metrics)[-1].heldout_loss, rel=1e-6)


def test_it_goes_on_where_it_was(zygote, project, moved):
    # The ranks need the corpus, but neither the base model nor the texts.
    [original] = project.glob("runs/*/*/config.yaml")
    rundir.write_json(moved.path / "corpus.json", {"folder": str(RunDir(original.parent).corpus)})
    start(zygote, tiny_again(moved, {"train.steps": 3}))
    assert "resumed from" in moved.notes.read_text()
    assert [row[0] for row in losses(moved)] == [1, 2, 3]
    assert from_yaml(moved.config).model.name == str(moved.model)


def test_without_a_checkpoint_it_says_which_folder_it_needs(zygote, project, moved):
    [original] = project.glob("runs/*/*/config.yaml")
    rundir.write_json(moved.path / "corpus.json", {"folder": str(RunDir(original.parent).corpus)})
    shutil.rmtree(moved.path / "checkpoints")
    tiny_again(moved)
    assert zygote.run(["--config", str(moved.config)], world_size=2) == [3, 3]
    told = moved.errors()[0]["message"]
    assert f"model.name={project / 'base'}: it was moved or deleted, and there is no checkpoint" in told


def test_an_export_is_evaluated_as_any_folder_is(zygote, project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [original] = project.glob("runs/*/*/config.yaml")
    assert checkpoints.export(RunDir(original.parent), tmp_path / "lr=0.1" / "é", []) == 0
    expected = read(RunDir(original.parent).metrics)[-1].heldout_loss
    for overrides in ([], ["data.source=files", f"data.paths=[{project / 'texts'}]"]):
        cfg, there = config_of_folder(str(tmp_path / "lr=0.1" / "é"), ["launch.ranks_per_node=2", *overrides])
        plan = make_plan(cfg)
        corpus = of_export(cfg, plan, there)
        made = rundir.create_evaluation(tmp_path / "evaluations", cfg, plan, corpus=corpus, checkpoints=None)
        assert evaluated(zygote, made) == pytest.approx(expected, rel=1e-6)


def test_an_evaluation_ahead_of_the_first_step_is_step_0_and_changes_no_other(zygote, tmp_path):
    without, run = (
        tiny_run(tmp_path / str(first), {**RUN, "train.steps": 3, "train.eval_first": first}) for first in (False, True)
    )
    start(zygote, without)
    start(zygote, run)
    first, *others = read(run.metrics)
    assert (first.step, first.tokens_total, first.attempt) == (0, 0, 1)
    assert losses(run)[1:] == losses(without)
    # About log(300), since the untrained model gives 300 tokens nearly equal probabilities.
    assert first.heldout_loss == pytest.approx(5.7, abs=0.1)
    assert first.heldout_loss > others[-1].heldout_loss
    assert "dtypes: " in _log(run)
    assert run.curve.is_file()
    before = run.metrics.read_bytes()
    start(zygote, tiny_again(run, {"train.steps": 4}))
    assert run.metrics.read_bytes().startswith(before)
    assert [row.step for row in read(run.metrics)] == [0, 1, 2, 3, 4]


def test_the_changes_of_each_attempt_are_kept(tmp_path):
    run = tiny_run(tmp_path)
    tiny_again(run, {"train.steps": 9})
    tiny_again(run)
    tiny_again(run, {"parallel.pipeline": 1, "optim.lr": 0.5})
    told = {number: [str(change) for change in found] for number, found in run.changes().items()}
    assert told == {2: ["train.steps 5 -> 9"], 3: [], 4: ["parallel.pipeline 2 -> 1", "optim.lr 0.0003 -> 0.5"]}
    assert asdict(from_yaml(run.attempts()[0])) != to_yaml(from_yaml(run.config))
