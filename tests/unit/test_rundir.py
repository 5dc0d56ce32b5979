"""A run directory through several attempts: no failure in between loses the run."""

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from stack import disk
from stack.config.compose import compose, from_yaml
from stack.config.places import settled
from stack.errors import ConfigError, DataError, UsageError
from stack.plan.layout import make_plan
from stack.train import rundir
from stack.train.rundir import RunDir


@pytest.fixture
def run(tmp_path) -> RunDir:
    cfg = compose([f"run.root={tmp_path}"])
    (tmp_path / "corpus" / "tokenizer").mkdir(parents=True)
    return rundir.create(cfg, make_plan(cfg), corpus=tmp_path / "corpus")


def begin_again(run: RunDir) -> None:
    cfg = from_yaml(run.config, ["train.steps=300"])
    rundir.begin_again(run, cfg, make_plan(cfg), corpus=run.corpus)


def test_a_check_and_an_evaluation_are_never_taken_for_a_run(tmp_path, monkeypatch):
    """The jobs of launch/ treat every folder with a config.yaml as a run, unless another file marks it as an evaluation
    or a check."""
    cfg = compose([f"run.root={tmp_path}"])
    written = []
    whole = disk.write_whole
    monkeypatch.setattr(disk, "write_whole", lambda path, text: (written.append(path.name), whole(path, text)))
    rundir.create_check(tmp_path / "doctor", cfg, make_plan(cfg), parity=[])
    assert written.index("check.json") < written.index("config.yaml")
    written.clear()
    rundir.create_evaluation(tmp_path / "e", cfg, make_plan(cfg), corpus=tmp_path, checkpoints=None)
    assert written.index("evaluation.json") < written.index("config.yaml")


def test_an_attempt_leaves_its_files_and_the_next_one_has_its_own(run):
    run.metrics.write_text("rows\n")
    rundir.write_json(run.failed, {"why": "test"})
    rundir.write_json(run.rank(1) / "error.json", {"time": 1})
    begin_again(run)
    assert run.attempt == 2
    first = run.path / "attempts" / "1"
    assert from_yaml(first / "config.yaml").train.steps == 200
    assert from_yaml(run.config).train.steps == 300
    assert (first / "ranks/1/error.json").exists()
    assert (first / "FAILED.json").exists()
    assert not run.failed.exists()
    assert not run.errors()
    assert run.metrics.read_text() == "rows\n"


@pytest.mark.parametrize("number", range(8))
def test_a_disk_that_is_full_at_any_write_costs_no_run(run, monkeypatch, number):
    begin_again(run)
    writes = iter(range(100))
    write = disk.write_whole

    def full(path: Path, content: str) -> None:
        if next(writes) == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(disk, "write_whole", full)
        if number < 5:
            with pytest.raises(UsageError, match="No space left on device"):
                begin_again(run)
    assert from_yaml(run.config).train.steps == 300
    assert run.corpus.name == "corpus"
    begin_again(run)
    assert from_yaml(run.config).train.steps == 300


LOST = {"message": "Connection closed by peer [192.0.2.2]:4711", "exit_code": 9}
CAUSE = {"message": "out of memory", "exit_code": 9}


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ([LOST, CAUSE, LOST], CAUSE),
        ([CAUSE, {**CAUSE, "message": "later"}], CAUSE),
        ([{"message": "saved", "exit_code": 75}] * 2, {"message": "saved", "exit_code": 75}),
    ],
)
def test_of_ranks_that_end_together_one_says_how_the_run_ended(run, told, kept):
    for one in told:
        rundir.record_end(run, one)
    assert rundir.read_json(run.ended_early(kept["exit_code"])) == kept
    assert not list(run.path.glob("*.tmp"))


def test_last_words_never_raise(run):
    run.failed.write_text("{")
    rundir.record_end(run, CAUSE)
    run.saved.mkdir()
    rundir.record_end(run, {**CAUSE, "exit_code": 75})
    rundir.write_last(run.path / "gone" / "error.json", CAUSE)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "a pipe": _pipe,
    "no JSON": lambda path: path.write_text("{"),
    "brackets": lambda path: path.write_text("[" * 200_000),
    "a list": lambda path: path.write_text("[1]"),
    "nothing in it": lambda path: path.write_text("{}"),
    "beyond a float": lambda path: path.write_text(f'{{"time": 1{"0" * 400}, "folder": 3}}'),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_of_a_run_costs_a_line_or_nothing(run, name):
    DAMAGE[name](run.path / "env.json")
    # The time of the first attempt is used by W&B and `stack ls` only, so a fallback is enough.
    assert run.started == run.path.stat().st_mtime
    DAMAGE[name](run.path / "corpus.json")
    with pytest.raises(DataError, match=r"corpus\.json is (damaged|missing).*; start a new run"):
        _ = run.corpus


def test_logs_are_not_for_everybody(run):
    for name in ("ranks", "launchers"):
        assert (run.path / name).stat().st_mode & 0o007 == 0


def test_a_saved_config_means_the_same_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokens").mkdir()
    cfg = compose(
        ["run.root=r", "data.source=files", 'data.paths=["a","~/b"]', "data.tokenizer=tokens", "checkpoint.path=c"]
    )
    found = settled(cfg)
    assert (found.run.root, found.data.root) == (str(tmp_path / "r"), str(tmp_path / "data"))
    assert found.data.paths == [str(tmp_path / "a"), str(Path.home() / "b")]
    assert found.data.tokenizer == str(tmp_path / "tokens")
    assert found.checkpoint.path == str(tmp_path / "c")
    assert found.model.name == "llama"
    assert settled(found) == found
    assert settled(replace(cfg, checkpoint=replace(cfg.checkpoint, path=None))).checkpoint.path is None


def test_a_family_is_never_the_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama").mkdir()
    assert settled(compose([])).model.name == "llama"
    with pytest.raises(ConfigError, match=r"give it \./llama for the folder"):
        compose(["model.init=pretrained", "optim.lr=1e-5"])
