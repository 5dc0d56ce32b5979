"""Recipes outside the checkout: a folder of groups, a file as a choice, `stack show`; and harmful files."""

import json
import os
import re
import shlex
import time
from pathlib import Path

import pytest

from stack.cli.main import main
from stack.config import multirun
from stack.config.compose import compose, from_yaml, saved_value, to_yaml
from stack.config.model_folder import base_fields
from stack.errors import ConfigError

REPO = Path(__file__).parents[2]
MINE = """# @package _global_
defaults:
  - override /model: small
run: {name: mine}
train: {steps: 30}
"""
SMALL = "name: llama\nconfig: {vocab_size: 4096, hidden_size: 64, num_hidden_layers: 4, num_attention_heads: 4}\n"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `own` in the current folder, with a recipe and a model of the user."""
    monkeypatch.chdir(tmp_path)
    for group, name, text in (("experiment", "mine", MINE), ("model", "small", SMALL)):
        (tmp_path / "own" / group).mkdir(parents=True)
        (tmp_path / "own" / group / f"{name}.yaml").write_text(text)
    (tmp_path / "file.yaml").write_text("run: {name: from-file}\noptim: {lr: 0.002}\n")
    return tmp_path / "own"


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("words", [["--config-dir", "own"], ["--config-dir=own"]])
def test_a_folder_of_ones_own_stands_beside_the_built_in_groups(words: list[str], own: Path) -> None:
    del own
    cfg = compose([*words, "experiment=mine", "optim.lr=0.01"])
    assert (cfg.run.name, cfg.train.steps, cfg.model.config["hidden_size"]) == ("mine", 30, 64)
    assert compose([*words, "model=small", "experiment=quickstart"]).model.config["hidden_size"] == 64
    assert compose([*words, "experiment=8b"]) == compose(["experiment=8b"])
    assert "choices are 1b, 405b_plan, 70b, 8b, finetune, quickstart" in refusal("experiment=mine")


def test_a_file_is_a_choice_of_any_group(own: Path) -> None:
    cfg = compose(["experiment=file.yaml"])
    assert (cfg.run.name, cfg.optim.lr) == ("from-file", 0.002)
    assert compose([f"experiment={own}/../file.yaml", "optim.lr=0.01"]).optim.lr == 0.01
    assert compose(["model=own/model/small.yaml"]).model.config["hidden_size"] == 64
    # The choices in its defaults list are looked up in the folders of groups, not beside the file.
    assert "Could not find 'model/small'" in refusal("experiment=own/experiment/mine.yaml")
    assert compose(["--config-dir=own", "experiment=own/experiment/mine.yaml"]).run.name == "mine"


def test_what_cannot_be_found_is_named_with_what_is_near(own: Path) -> None:
    needs = "give a folder with groups in it, such as DIR/experiment"
    assert refusal("--config-dir", "nowhere") == f"--config-dir=nowhere: no such folder; {needs}"
    assert refusal("--config-dir=file.yaml") == f"--config-dir=file.yaml: is a file; {needs}"
    assert refusal("--config-dir") == f"--config-dir=: no such folder; {needs}"
    assert "--config-dir is given twice, first as own" in refusal("--config-dir=own", "--config-dir=own")
    assert refusal("--config-dir=own", "experiment=mime") == (
        "experiment=mime: no such choice; did you mean mine? choices are 1b, 405b_plan, 70b, 8b, finetune, mine, "
        "quickstart"
    )
    assert refusal("experiment=fil.yaml").startswith(
        f"experiment=fil.yaml: {own.parent}/fil.yaml: cannot be read (No such file or directory); give a file with keys"
    )
    (own / "experiment").rename(own / "experiments")
    assert refusal("--config-dir=own").endswith(f"{own}/experiments is no group; did you mean {own}/experiment?")
    (own / "model" / "llama_4m.yaml").write_text(SMALL)
    (own / "experiments").rename(own / "experiment")
    assert f"model=llama_4m is also in {REPO / 'conf'}; give {own}/model/llama_4m.yaml another name" in refusal(
        "--config-dir=own"
    )
    (own / "empty").mkdir()
    assert "no group in it has a .yaml file" in refusal("--config-dir=own/empty")


def test_a_file_is_held_to_the_schema(own: Path) -> None:
    (own / "typo.yaml").write_text("parallel: {pipelin: 2}\n")
    assert refusal("experiment=own/typo.yaml") == "parallel.pipelin=2: no such key; did you mean parallel.pipeline?"


def test_a_saved_config_takes_neither(own: Path, tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(compose(["--config-dir=own", "experiment=mine"])))
    assert from_yaml(saved, ["train.steps=40"]).run.name == "mine"
    for word in ("--config-dir=own", "experiment=file.yaml"):
        with pytest.raises(ConfigError, match="new run"):
            from_yaml(saved, [word])
    del own


def test_a_sweep_over_recipes_of_ones_own(own: Path, tmp_path: Path) -> None:
    (own / "experiment" / "other.yaml").write_text(MINE.replace("mine", "other"))
    seen: list[list[str]] = []

    def run_jobs(jobs: list[list[str]], **_: object) -> list[float | None]:
        seen.extend(jobs)
        return [1.0] * len(jobs)

    lines = ["--config-dir", "own", "experiment=mine,other,file.yaml", "train.steps=7"]
    request = multirun.read(lines)
    assert request.example().run.name == "mine"
    (tmp_path / "sweep").mkdir()
    multirun.multirun(request, tmp_path / "sweep", run_jobs)
    assert seen == [["experiment=mine"], ["experiment=other"], ["experiment=file.yaml"]]
    names = [compose(request.job(swept)).run.name for swept in seen]
    assert names == ["mine", "other", "from-file"]
    assert request.id == multirun.read([*lines[2:], f"--config-dir={own}"]).id
    assert request.id != multirun.read(["experiment=8b,1b", "train.steps=7"]).id


def test_show_prints_the_config_and_nothing_else(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del own
    assert main(["show", "--config-dir", "own", "experiment=mine", "train.steps=40"]) == 0
    head, text = capsys.readouterr().out.split("\n", 1)
    assert head == "# stack train --config-dir own experiment=mine train.steps=40"
    assert text == to_yaml(compose(shlex.split(head)[3:]))


def test_every_command_of_the_page_composes(own: Path, tmp_path: Path) -> None:
    page = (REPO / "docs" / "configs.md").read_text()
    commands = re.findall(r"^stack (?:plan|show|train) +(?!-m)(.*)$", page, re.MULTILINE)
    assert len(commands) >= 6
    (tmp_path / "mine.yaml").write_text("train: {steps: 30}\n")
    own.rename(tmp_path / "recipes")
    for command in commands:
        compose(shlex.split(command, comments=True))


# Harmful files.


FOR_EVER = pytest.mark.parametrize(
    ("text", "message"),
    {
        "a: " + "[" * 20_000: "line 1: nested more than 50 deep",
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)): (
            "line 2: aliases are not read; write the value out"
        ),
        f"run: {{seed: {'9' * 5000}}}\n": "Exceeds the limit",
        "x: " + "y" * (1 << 20): "larger than 1 MB",
        "run: \x00": "not YAML of a config",
    }.items(),
    ids=["brackets", "aliases", "digits", "size", "nul"],
)


@FOR_EVER
def test_a_config_that_would_take_for_ever_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text(text)
    began = time.process_time()
    for read in (from_yaml, lambda path: saved_value(path, "run.root"), lambda path: compose([f"experiment={path}"])):
        with pytest.raises(ConfigError, match=re.escape(message)) as caught:
            read(saved)
        assert "\n" not in str(caught.value)
    assert time.process_time() - began < 5


@FOR_EVER
def test_a_recipe_of_ones_own_that_would_take_for_ever_is_one_line(text: str, message: str, own: Path) -> None:
    (own / "experiment" / "other.yaml").write_text(text)
    began = time.process_time()
    line = refusal("--config-dir=own", "experiment=other")
    # Errors that are found at once are reported by Hydra with its own message.
    assert message in line or (len(text) < 10_000 and line.startswith("experiment=other: "))
    assert time.process_time() - began < 5


def test_a_config_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read \(it is no regular file\)"):
        from_yaml(tmp_path / "config.yaml")
    (tmp_path / "model").mkdir()
    os.mkfifo(tmp_path / "model" / "config.json")
    assert "its config.json cannot be read (it is no regular file)" in refusal(f"model.name={tmp_path / 'model'}")


def test_a_foreign_config_cannot_read_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(compose()).replace("path: null", "path: ${oc.env:SECRET}"))
    for read in (from_yaml, lambda path: saved_value(path, "checkpoint.path")):
        with pytest.raises(ConfigError) as caught:
            read(saved)
        assert "checkpoint.path=${oc.env:SECRET}" in str(caught.value)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": -5}, "hidden_size=-5: must be at least 1"),
        ({"hidden_size": "96"}, "hidden_size=96: an integer is needed, and this is text; drop the quotes"),
        ({"hidden_size": 10**18}, "hidden_size=1000000000000000000: must be at most 16777216"),
        ({"num_hidden_layers": None}, "num_hidden_layers=null: an integer is needed"),
        ({"model_type": ["llama"]}, "model_type [llama]; the families are"),
        ({"rope_scaling": "linear"}, "rope_scaling=linear, which is no section"),
    ],
)
def test_a_folder_of_impossible_numbers_names_the_folder(
    fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **fields}))
    line = refusal("model=folder", f"model.name={tmp_path}")
    assert line.startswith(f"model.name={tmp_path}"[:90])
    assert message in line


@pytest.mark.parametrize("text", ["[" * 100_000, '{"hidden_size": ' + "9" * 5000 + "}"], ids=["brackets", "digits"])
def test_a_config_json_that_python_cannot_read_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    assert "its config.json is" in refusal("model=folder", f"model.name={tmp_path}")


def test_a_folder_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    for layers in (2, 4):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": layers}))
        fields = base_fields(str(tmp_path))
        assert fields["num_hidden_layers"] == layers
        fields["num_hidden_layers"] = 99


# Words of the command line.


@pytest.mark.parametrize(
    ("line", "message"),
    {
        "run.name=" + "[" * 20_000: "brackets nested more than 20 deep; no key takes such a value",
        "train.steps=" + "9" * 5000: "not in Hydra's grammar (Exceeds the limit",
        "run.name='a\udcff'": "run.name='a\\udcff': must be UTF-8",
        "run.name=a\udcff": "not in Hydra's grammar",
        "optim.betas=[0.9,0.95],[0.9,0.99]": "this is one run; add -m to stack train, or give one value",
        "data.seq_len=${oc.env:HOME}": "data.seq_len=/home/x: an integer is needed",
        "data.vocab_size=${run.name}": "data.vocab_size=run: an integer is needed",
        "model.config.hidden_size=1000000000000000000": "must be at most 16777216",
        "batch.micro_size=1000000000000000003": "must be at most 16777216",
    }.items(),
    ids=lambda value: str(value)[:30].encode("ascii", "replace").decode(),
)
def test_a_word_beyond_reason_is_one_line(line: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    began = time.process_time()
    assert message in refusal(line)
    assert time.process_time() - began < 1


def test_an_output_that_cannot_be_written_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    code = os.waitstatus_to_exitcode(os.system(f"{REPO}/.venv/bin/stack plan > /dev/full"))
    assert code == 2
    told = capfd.readouterr().err
    assert told == "UsageError: the output cannot be written (No space left on device); redirect it elsewhere\n"


def test_a_removed_current_folder_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["plan"]) == 2
    assert "the folder that this command was started in was removed; cd to" in capsys.readouterr().err
    assert main(["--help"]) == 0
