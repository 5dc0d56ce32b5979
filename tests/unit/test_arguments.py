"""How the words after a verb are read: as paths, and as the runs to which paths lead."""

import shlex

import pytest

from stack.cli.arguments import is_path
from stack.cli.main import main
from stack.config.compose import compose
from stack.plan.layout import make_plan
from stack.train import rundir
from stack.train.rundir import RunDir

AWKWARD = ["lr=0.1", "lr=0.1,bs={4} é", "train.steps=5", "model=x", "~experiment", "$(touch x)", "'"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def make(tmp_path):
    """`make(name)` makes a run of that name without checkpoints; `kind` makes it an evaluation or a check."""
    corpus = tmp_path / "corpus"
    (corpus / "tokenizer").mkdir(parents=True)

    def run(name: str, kind: str | None = None) -> RunDir:
        cfg = compose([f"run.root={tmp_path / 'runs'}"])
        made = rundir._new(tmp_path / "runs" / name)
        made.tokenizer.mkdir()
        rundir._describe(made, cfg, make_plan(cfg), corpus)
        if kind:
            (made.path / f"{kind}.json").write_text("{}")
        return made

    return run


@pytest.mark.parametrize(
    ("word", "is_one"),
    [
        ("out", True),
        ("out/lr=0.001/m", True),
        ("lr=0.001", True),
        ("runs/lr=0.1,bs={4} é/1", True),
        ("data/x=1/m", True),
        ("./train.steps=5", True),
        ("/train.steps=5", True),
        ("train.steps=5", False),
        ("train.stepz=5", False),
        ("+model.config.head_dim=4", False),
        ("~model.config.head_dim", False),
        ("~experiment", False),
        ("~/out", True),
        ("model=llama_4m", False),
        ("experiment=8b", False),
        ("hydra/launcher=stack", False),
        ("hydra.sweep.dir=x", False),
        ("-m", False),
        ("--parity", False),
    ],
)
def test_a_word_is_a_path_unless_it_sets_something(word, is_one):
    assert is_path(word) == is_one


@pytest.mark.parametrize("name", AWKWARD)
def test_a_folder_that_is_there_is_a_path_whatever_its_name(name, tmp_path):
    (tmp_path / name).mkdir()
    assert is_path(name)


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("verb", ["verify", "export", "eval"])
def test_every_verb_finds_a_run_whatever_its_name(make, capsys, name, verb, tmp_path):
    run = make(name)
    words = [verb, str(run.path.relative_to(tmp_path)), *(["out/lr=0.001/m"] if verb == "export" else [])]
    # The verb accepts its words and fails later, because the run has no checkpoint.
    assert main(words) == 6
    assert "checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("name", AWKWARD)
def test_what_a_run_says_to_type_is_what_a_shell_takes(make, name):
    run = make(name)
    assert shlex.split(run.resume_command) == ["stack", "resume", str(run.path)]


@pytest.mark.parametrize("verb", ["resume", "verify", "export", "eval", "wandb-sync"])
@pytest.mark.parametrize("kind", ["evaluation", "check"])
def test_what_does_not_train_is_no_run(make, capsys, verb, kind):
    other = make("doctor" if kind == "check" else "evaluations", kind)
    assert main([verb, str(other.path), "out"]) == 2
    expected = {"evaluation": "the directory of an evaluation, not", "check": "a directory that stack doctor left, not"}
    assert expected[kind] in capsys.readouterr().err


def test_the_run_that_is_meant_is_the_newest_that_trains(make, capsys):
    make("zoo", "check")
    meant = make("a b")
    make("aa", "evaluation")
    assert main(["export", "runs", "out", "export.dtype=bf16"]) == 2
    told = capsys.readouterr().err
    command = told.strip().partition("did you mean ")[2].removesuffix("?")
    assert shlex.split(command) == ["stack", "export", str(meant.path), "out", "export.dtype=bf16"]


def test_the_run_of_an_evaluation_is_named(make, capsys):
    run = make("quickstart")
    inside = rundir._new(run.evaluations)
    (inside.path / "config.yaml").write_text("")
    (inside.path / "evaluation.json").write_text("{}")
    assert main(["resume", str(inside.path)]) == 2
    assert f"did you mean stack resume {run.path}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resume"], "stack resume needs a run directory ahead of the overrides; write stack resume runs/NAME/RUN_ID"),
        (["resume", "train.steps=4"], "write stack resume runs/NAME/RUN_ID"),
        (["eval", "train.eval_sequences=1"], "stack eval needs a run directory"),
        (["export", "RUN"], "stack export needs the folder to write to"),
        (["export", "RUN", "export.dtyp=bf16"], "stack export needs the folder to write to"),
        (["export", "RUN", "model=x"], "./OUT if the folder is named like a key"),
        (["verify", "RUN", "x"], "x: stack verify takes a run directory and nothing else"),
        (["verify", "x" * 5000], "cannot be looked up"),
        (["resume", "lr=0.1"], "lr=0.1 is no run directory, it has no config.yaml"),
        (
            ["eval", "/gone"],
            "/gone is no run directory, it has no config.yaml, and no model folder, it has no config.json",
        ),
        (["eval", "gone/out"], "cannot be reached"),
    ],
)
def test_a_mistake_is_one_line(make, capsys, monkeypatch, words, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = make("quickstart")
    assert main([str(run.path) if word == "RUN" else word for word in words]) in (2, 3)
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_a_model_folder_is_no_run_and_the_line_says_what_it_is_for(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert main(["resume", str(tmp_path)]) == 2
    assert (
        "it is a model folder; to train it: stack train experiment=finetune model.name=FOLDER"
        in capsys.readouterr().err
    )
