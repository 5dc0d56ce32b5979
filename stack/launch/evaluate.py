"""`stack eval`: held-out loss and perplexity of a run's checkpoint, or of any Hugging Face folder."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stack.checkpoint import manifest
from stack.config.compose import SOURCE_KEYS, compose
from stack.config.facts import CORPUS, DEFINING, FACTS, read_facts
from stack.config.multirun import key_of
from stack.config.places import settled
from stack.config.schema import Config, Data
from stack.data.tokenizer import has_tokenizer
from stack.errors import CheckpointError, DataError, UsageError
from stack.launch.driver import check_weights, launch, plan_of
from stack.launch.reread import config_of, of_export, of_run
from stack.launch.signals import stop_requests
from stack.train import rundir
from stack.train.rundir import EVALUATIONS, RunDir

#: Settings of `data` that change how batches are made of a corpus, but not the corpus.
_BATCHING = ("data.seq_len", "data.pack", "data.prefetch")


def evaluate_run(run: RunDir, overrides: Sequence[str]) -> int:
    """Held-out loss and perplexity of a run's checkpoint.

    Raises:
        StackError: as `driver.train`; or the run has no checkpoint.
    """
    cfg = config_of(run, overrides)
    checkpoints = manifest.root_of(cfg.checkpoint.path, run.path)
    if not manifest.steps(checkpoints):
        raise CheckpointError(f"{run.path} has saved no checkpoint to evaluate; train further, or save more often")
    plan = plan_of(cfg)
    cfg, corpus = of_run(run, cfg, plan)
    with stop_requests() as requests:
        made = rundir.create_evaluation(run.evaluations, cfg, plan, corpus=corpus, checkpoints=checkpoints)
        return launch(cfg, plan, made, requests)


def evaluate_folder(name: str, overrides: Sequence[str]) -> int:
    """Held-out loss and perplexity of a Hugging Face folder or hub name; `stack export` writes such folders.

    Raises:
        StackError: as `driver.train`; or the folder has no tokenizer.
    """
    cfg, there = config_of_folder(name, overrides)
    plan = plan_of(cfg)
    corpus = of_export(cfg, plan, there)
    check_weights(cfg)
    with stop_requests() as requests:
        parent = Path(cfg.run.root) / EVALUATIONS
        made = rundir.create_evaluation(parent, cfg, plan, corpus=corpus, checkpoints=None)
        return launch(cfg, plan, made, requests)


def config_of_folder(name: str, overrides: Sequence[str]) -> tuple[Config, Data | None]:
    """The config that evaluates a model folder: the model and tokenizer of the folder, the values in its file `FACTS`,
    and the defaults of a new run for the rest.

    Args:
        name: an absolute path, or a hub name.

    Returns:
        The config, settled; and `data` of the run that was exported, if `FACTS` has it and the overrides do not ask for
        other text: the corpus of that run may be on this disk.

    Raises:
        ConfigError: an override, or `FACTS`, is wrong.
        DataError: the folder has no tokenizer, and the overrides give none.
        UsageError: an override asks for another model.
    """
    given = {key_of(override) for override in overrides}
    for key in sorted(given & {"model", "model.name", "model.init", "checkpoint.step"}):
        raise UsageError(f"{key}: this evaluates {name}, which has one model and one set of weights; drop it")
    folder = Path(name)
    known = read_facts(folder / FACTS) if (folder / FACTS).is_file() else {}
    values = {
        **{key: value for key, value in known.items() if key in DEFINING and not _is_replaced(key, given)},
        "model.name": name,
        "model.init": "pretrained",
        # Nothing is trained, and `auto` is refused with pretrained weights.
        "optim.lr": 1e-5,
    }
    if "data.tokenizer" not in given:
        if folder.is_dir() and not has_tokenizer(folder):
            raise DataError(f"{name} holds no tokenizer; add data.tokenizer=FOLDER_OR_NAME of the model's tokenizer")
        values["data.tokenizer"] = name
    choices = [choice for choice in ("model=folder", "parallel=zero3") if key_of(choice) not in given]
    cfg = settled(compose([*choices, *overrides], values))
    if not known or any(key.partition(".")[0] == "data" and key not in _BATCHING for key in given):
        return cfg, None
    corpus = {key.partition(".")[2]: known[key] for key in CORPUS if key in known}
    return cfg, replace(cfg.data, **corpus)


def _is_replaced(key: str, given: set[str]) -> bool:
    """Whether overrides replace the value of `key`: by a group choice, or by another source of text."""
    section, _, name = key.partition(".")
    return section in given or ("data.source" in given and section == "data" and name in ("source", *SOURCE_KEYS))
