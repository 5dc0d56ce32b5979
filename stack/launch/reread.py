"""Reads the config of an existing run or model, and finds or makes a corpus tokenized for that model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stack.config.changes import ONCE
from stack.config.compose import as_saved, from_yaml
from stack.config.multirun import key_of
from stack.config.places import settled
from stack.config.schema import Config, Data
from stack.data import manifest, shards
from stack.data.vocabulary import check_choice, check_vocabulary
from stack.errors import DataError
from stack.plan.layout import Plan
from stack.train.inputs import open_batches
from stack.train.rundir import RunDir


def config_of(run: RunDir, overrides: Sequence[str]) -> Config:
    """The config of a run with overrides, settled. Keys in `ONCE` that an earlier resume has set are reset.

    Prints a line if the run's copy of its model folder is used because the folder cannot be read.

    Raises:
        ConfigError: as `from_yaml`.
    """
    given = {key_of(override) for override in overrides}
    again = [f"{key}={value}" for key, value in ONCE.items() if key not in given]
    cfg = settled(from_yaml(run.config, [*again, *overrides]))
    name = as_saved(run.config).model.name
    if cfg.model.name == str(run.model) != name:
        print(f"model.name={name} cannot be read any more; the fields of the model are taken from {run.model}")
    return cfg


def prepared(cfg: Config, plan: Plan) -> Path:
    """The corpus of a new run. Makes it if it does not exist, and checks that it fits the model and the batches.

    Raises:
        DataError: as `shards.prepare` and `open_batches`.
    """
    check_choice(cfg)
    corpus = shards.prepare(cfg.data, seed=cfg.data.split_seed)
    open_batches(cfg, plan, corpus)
    return corpus


def of_run(run: RunDir, cfg: Config, plan: Plan) -> tuple[Config, Path]:
    """The corpus for a run that goes on or is evaluated, and `cfg` with the tokenizer of that corpus.

    The corpus is the one that the run has read, unless `cfg` asks for other text. Other text is tokenized with the
    run's own tokenizer: `data.tokenizer=bpe` would learn a new tokenizer, with token ids that do not fit the model.

    Raises:
        DataError: as `prepared`, or `data.tokenizer` was set to another vocabulary than the run's.
    """
    before = as_saved(run.config).data
    if _same_text(cfg.data, before) and run.corpus.is_dir():
        corpus = run.corpus
    else:
        if cfg.data.tokenizer == before.tokenizer:
            # The tokenizer may come from a model folder that was moved. The run has a copy of that folder.
            likely = [replace(cfg.data, tokenizer=name) for name in (before.tokenizer, str(run.model))]
            own = replace(cfg.data, tokenizer=str(run.tokenizer))
            cfg = replace(cfg, data=next((data for data in likely if _is_the_same(data, run.corpus)), own))
        corpus = shards.prepare(cfg.data, seed=cfg.data.split_seed)
    check_vocabulary(corpus, run.tokenizer)
    open_batches(cfg, plan, corpus)
    return cfg, corpus


def of_export(cfg: Config, plan: Plan, there: Data | None) -> Path:
    """The corpus to evaluate a model folder on.

    Args:
        there: `data` of the run that the folder was exported from, if `cfg` asks for the same text. The corpus of that
            run may be on this disk. If so, it is read; nothing is ever written to the folder that the export names.

    Raises:
        DataError: as `prepared`.
    """
    if there is not None:
        try:
            corpus = shards.locate(there, seed=there.split_seed)
            check_vocabulary(corpus, Path(cfg.model.name))
        except DataError:
            pass
        else:
            open_batches(cfg, plan, corpus)
            return corpus
    return prepared(cfg, plan)


def _is_the_same(data: Data, corpus: Path) -> bool:
    """Whether `data` makes the corpus that is or was in the folder `corpus`. The name of the folder has the fingerprint
    of the settings, so the folder itself may be gone."""
    try:
        return manifest.folder_of(data, manifest.made_from(data, seed=data.split_seed)).name == corpus.name
    except DataError:
        # The text or the tokenizer is gone. If the text is gone, `prepare` raises an error.
        return False


def _same_text(one: Data, other: Data) -> bool:
    """Whether two settings make the same corpus. Its folder, and how batches are made of it, do not count."""
    return other == replace(one, root=other.root, seq_len=other.seq_len, pack=other.pack, prefetch=other.prefetch)
