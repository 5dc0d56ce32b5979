"""The verbs that read a run's checkpoints and start no ranks: export and verify."""

import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console as RichConsole
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from safetensors import SafetensorError

from stack.checkpoint import manifest as manifests
from stack.checkpoint.files import check_file, verify
from stack.checkpoint.manifest import Manifest
from stack.checkpoint.storage import whole
from stack.config.compose import saved_value
from stack.config.facts import FACTS, facts
from stack.config.schema import Config
from stack.data.manifest import TOKENIZER
from stack.disk import size
from stack.errors import CheckpointError, UsageError
from stack.health.stopped import SIGNALLED
from stack.launch.reread import config_of
from stack.models.build import parameter_shapes
from stack.models.export import export as export_model
from stack.train.rundir import RunDir

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def export(run: RunDir, out: Path, overrides: Sequence[str]) -> int:
    """Writes a checkpoint as a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` reads.

    Raises:
        CheckpointError: there is no whole checkpoint, or the checkpoint was deleted during the export.
        UsageError: `out` exists and is not empty, or cannot be written; or the run directory has no tokenizer.
    """
    cfg = config_of(run, overrides)
    root = manifests.root_of(cfg.checkpoint.path, run.path)
    if not run.tokenizer.is_dir():
        copy = shlex.join(["cp", "-r", str(run.corpus / TOKENIZER), str(run.tokenizer)])
        raise UsageError(
            f"{run.tokenizer} is missing, and an export contains the tokenizer; copy the tokenizer there again: {copy}"
        )
    # An export that is stopped leaves nothing behind.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(SIGNALLED + signal.SIGTERM))
    try:
        folder, manifest = _newest(root, cfg.checkpoint.step)
        manifests.check_same_model(manifest, parameter_shapes(cfg), where=folder)
        written = _export(cfg, folder, manifest, out, run.tokenizer)
    except (FileNotFoundError, SafetensorError) as error:
        raise CheckpointError(f"{folder} was removed during the export ({error}); export again") from error
    finally:
        signal.signal(signal.SIGTERM, previous)
    print(f"exported step {manifest.step} as {cfg.export.dtype}, {size(written)}: {out}")
    return 0


def _export(cfg: Config, folder: Path, manifest: Manifest, out: Path, tokenizer: Path) -> int:
    with _progress() as progress:
        task = progress.add_task(f"verify step {manifest.step}", total=sum(file.bytes for file in manifest.files))
        for file in manifest.files:
            check_file(folder, manifest, file)
            progress.advance(task, file.bytes)
        progress.reset(task, description=f"step {manifest.step} -> {out}")
        return export_model(
            cfg,
            lambda name: whole(folder, manifest, name),
            out,
            dtype=getattr(torch, _DTYPES[cfg.export.dtype]),
            tokenizer=tokenizer,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
            extra={FACTS: facts(cfg)},
        )


def verify_run(run: RunDir) -> int:
    """Reads every file of every checkpoint and prints a line for each. The exit code is 0 if all files are whole.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    root = manifests.root_of(saved_value(run.config, "checkpoint.path"), run.path)
    checkpoints: set[str] = set()
    files = faults = 0
    for path, fault in verify(root):
        files, faults = files + 1, faults + (fault is not None)
        checkpoints.add(path.parent.name)
        print(f"{'FAULT' if fault else 'ok   '} {path.relative_to(root)}" + (f": {fault}" if fault else ""), flush=True)
    if not files:
        raise CheckpointError(f"{root} holds no checkpoint; train with checkpoint.every=50")
    print(f"{files} files in {len(checkpoints)} checkpoints, {faults} with faults: {root}")
    return CheckpointError.exit_code if faults else 0


def _newest(root: Path, step: int | str) -> tuple[Path, Manifest]:
    """The checkpoint of `step`, or the newest one with `auto`.

    Raises:
        CheckpointError: there is none, or its manifest is damaged. An older checkpoint is not used instead.
    """
    there = manifests.steps(root)
    if not there:
        raise CheckpointError(f"{root} holds no checkpoint; train further, or save more often (checkpoint.every)")
    manifests.check_step(step, there, where=root)
    folder = manifests.folder_of(root, there[-1] if step == "auto" else int(step))
    return folder, manifests.read(folder)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=RichConsole(file=sys.stderr, width=shutil.get_terminal_size().columns),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
