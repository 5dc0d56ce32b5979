"""Verbs on a run's checkpoints that start no ranks: export and verify."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console as RichConsole
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from stack.checkpoint import manifest as manifests
from stack.checkpoint.files import check_file, verify
from stack.checkpoint.manifest import Manifest
from stack.checkpoint.storage import whole
from stack.config.compose import from_yaml, to_yaml
from stack.data.manifest import TOKENIZER
from stack.errors import CheckpointError
from stack.launch.driver import EXPORTED
from stack.models.build import parameter_shapes
from stack.models.export import export as export_model
from stack.train.rundir import RunDir

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def export(run: RunDir, out: Path, overrides: Sequence[str]) -> int:
    """Writes a checkpoint as a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` reads.

    Raises:
        CheckpointError: there is no whole checkpoint.
        UsageError: `out` is there already and not empty.
    """
    import torch

    cfg = from_yaml(run.config, overrides)
    root = manifests.root_of(cfg, run.path)
    folder, manifest = _newest(root, cfg.checkpoint.step)
    manifests.check_same_model(manifest, parameter_shapes(cfg), where=folder)
    for file in manifest.files:
        check_file(folder, file)
    with _progress() as progress:
        task = progress.add_task(f"step {manifest.step} -> {out}")

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        written = export_model(
            cfg,
            lambda name: whole(folder, manifest, name),
            out,
            dtype=getattr(torch, _DTYPES[cfg.export.dtype]),
            tokenizer=run.corpus / TOKENIZER,
            progress=show,
            extra={EXPORTED: to_yaml(cfg)},
        )
    print(f"exported step {manifest.step} as {cfg.export.dtype}, {written / 1e6:,.1f} MB: {out}")
    return 0


def verify_run(run: RunDir) -> int:
    """Reads every file of every checkpoint and prints a line each; the exit code says whether all are whole.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    root = manifests.root_of(from_yaml(run.config), run.path)
    if not manifests.steps(root):
        raise CheckpointError(f"{root} holds no checkpoint; train with checkpoint.every=50")
    files = faults = 0
    for path, fault in verify(root):
        files, faults = files + 1, faults + (fault is not None)
        print(f"{'FAULT' if fault else 'ok   '} {path.relative_to(root)}" + (f": {fault}" if fault else ""), flush=True)
    print(f"{files} files in {len(manifests.steps(root))} checkpoints, {faults} with faults: {root}")
    return CheckpointError.exit_code if faults else 0


def _newest(root: Path, step: int | str) -> tuple[Path, Manifest]:
    """The checkpoint of `step`, or the newest one with `auto`.

    Raises:
        CheckpointError: there is none, or its manifest or a file has a fault. An older one is not taken in silence.
    """
    there = manifests.steps(root)
    if not there or (step != "auto" and step not in there):
        listed = ", ".join(map(str, there)) or "none"
        raise CheckpointError(f"checkpoint.step={step}: no such checkpoint in {root}; there are {listed}")
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
