"""Every rank finds damage of a checkpoint before a parameter changes, and the checkpoint before that one is used."""

import dataclasses
import functools
import json
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from stack.checkpoint import manifest as manifests
from stack.checkpoint.files import check_file, verify
from stack.checkpoint.manifest import File
from stack.errors import CheckpointError
from stack.models.tensorfile import digest
from tests.helpers.crafted import CRAFTED, whole_checkpoint
from tests.helpers.saved import logical_state, run_from


def find_on_rank(root: Path, step: int | str = "auto") -> tuple[int | None, list[str], str]:
    """Called on every rank: the step of the found checkpoint or None, the lines for the user, and the error message."""
    from datetime import timedelta

    import torch.distributed as dist

    from stack.checkpoint import load as loading
    from stack.parallel.mesh import make_mesh
    from stack.plan.layout import make_plan
    from tests.helpers.tiny import tiny_config

    told: list[str] = []
    mesh = make_mesh(make_plan(tiny_config(), dist.get_world_size()), timeout=timedelta(seconds=30))
    try:
        found = loading.find(root, step, mesh, tell=told.append)
    except CheckpointError as error:
        return None, told, str(error)
    return (found.manifest.step if found else None), told, ""


def find_beside_a_slow_disk(root: Path, disk_timeout_s: float) -> str:
    """Called on every rank: rank 1 takes two seconds to read its share of the files, and collectives of training have a
    timeout of half a second. Returns the result of `find`, or its error."""
    import time
    from datetime import timedelta
    from unittest.mock import patch

    import torch.distributed as dist

    from stack.checkpoint import load as loading
    from stack.parallel.mesh import make_mesh
    from stack.plan.layout import make_plan
    from tests.helpers.tiny import tiny_config

    plan = make_plan(tiny_config(), dist.get_world_size())
    mesh = make_mesh(plan, timeout=timedelta(seconds=0.5), disk_timeout=timedelta(seconds=disk_timeout_s))
    slow = (lambda *_: time.sleep(2)) if mesh.rank == 1 else (lambda *_: None)
    try:
        with patch.object(loading, "check_file", slow):
            found = loading.find(root, 2, mesh, tell=lambda _: None)
    except RuntimeError as error:
        return str(error)
    return f"step {found.manifest.step}" if found else "none"


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> Path:
    """Two checkpoints, of steps 1 and 2, saved by two ranks."""
    root = tmp_path_factory.mktemp("saved")
    ranks(2).run(functools.partial(run_from, step=0, until=1, save=root), {}, root)
    ranks(2).run(functools.partial(run_from, step=1, until=2, load=True, save=root), {}, root)
    return root


@pytest.fixture
def root(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def test_ranks_wait_for_a_slow_disk_longer_than_for_a_collective(ranks, root):
    assert ranks(2).run(find_beside_a_slow_disk, root, 30.0) == ["step 2", "step 2"]
    assert "imed out" in ranks(2).run(find_beside_a_slow_disk, root, 0.5)[0]


def files_of(root: Path, step: int = 2) -> list[Path]:
    return sorted(manifests.folder_of(root, step).iterdir())


def fault_of(root: Path, step: int = 2) -> str:
    """The fault that a reader of the whole checkpoint finds; empty where it is whole."""
    folder = manifests.folder_of(root, step)
    try:
        manifest = manifests.read(folder)
        for file in manifest.files:
            check_file(folder, manifest, file)
    except CheckpointError as error:
        return str(error)
    return ""


def passed_over(ranks: Any, root: Path) -> str:
    """Checks that every rank skips step 2 and uses step 1; returns the line for the user about step 2."""
    answers = ranks(2).run(find_on_rank, root)
    assert [answer[0] for answer in answers] == [1, 1]
    assert answers[0][1] == answers[1][1]
    [line] = answers[0][1]
    assert line.startswith("checkpoint of step 2 is skipped: ")
    return line


@pytest.mark.parametrize("cut", ["to nothing", "in half", "by a byte"])
def test_a_file_that_was_cut_short_is_found_by_its_size(ranks, root, cut):
    for path in files_of(root):
        content = path.read_bytes()
        keep = {"to nothing": 0, "in half": len(content) // 2, "by a byte": len(content) - 1}[cut]
        path.write_bytes(content[:keep])
        line = passed_over(ranks, root)
        assert path.name in line
        if path.name != manifests.MANIFEST:
            assert f"has {keep} bytes, the manifest says {len(content)} bytes" in line
        path.write_bytes(content)
    assert fault_of(root) == ""


def test_every_one_of_fifty_flipped_bits_is_found(root):
    draw = random.Random(1)
    files = files_of(root)
    for _ in range(50):
        path = draw.choice(files)
        content = bytearray(path.read_bytes())
        place = draw.randrange(len(content))
        bit = 1 << draw.randrange(8)
        content[place] ^= bit
        path.write_bytes(content)
        assert path.name in fault_of(root), (path, place)
        content[place] ^= bit
        path.write_bytes(content)
    assert fault_of(root) == ""


def test_a_flipped_bit_is_passed_over_by_all_ranks_though_one_reads_it(ranks, root):
    path = files_of(root)[-1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "has changed since it was written" in passed_over(ranks, root)


def test_a_missing_file_and_one_of_another_step_are_found(ranks, root):
    path = files_of(root)[-1]
    path.unlink()
    assert "is missing" in passed_over(ranks, root)
    shutil.copy(manifests.folder_of(root, 1) / path.name, path)
    assert "has changed since it was written" in passed_over(ranks, root)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self._marker = marker

    def __reduce__(self):
        return Path.touch, (self._marker,)


def test_a_planted_pickle_is_refused_and_not_executed(ranks, root, tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "executed"))
    planted = manifests.folder_of(root, 2) / ".metadata"
    planted.write_bytes(bomb)
    assert "is not in the manifest" in passed_over(ranks, root)
    planted.unlink()
    # A pickle in the place of a shard, with a manifest that has its size and hash.
    shard = files_of(root)[-1]
    shard.write_bytes(bomb)
    rewrite(root, shard)
    assert "is no safetensors file" in passed_over(ranks, root)
    assert not (tmp_path / "executed").exists()


def rewrite(root: Path, path: Path, **changes: Any) -> None:
    """Gives the manifest of step 2 the size and hash of a changed file, and changes other fields."""
    folder = manifests.folder_of(root, 2)
    manifest = (
        manifests.read(folder)
        if not path.exists()
        else manifests.Manifest.from_json((folder / manifests.MANIFEST).read_bytes())
    )
    now = digest(path)
    files = tuple(File(path.name, now.bytes, now.xxh3) if file.path == path.name else file for file in manifest.files)
    (folder / manifests.MANIFEST).write_text(dataclasses.replace(manifest, files=files, **changes).to_json())


def test_a_number_that_is_not_finite_is_found_though_the_hash_fits(ranks, root):
    shard = files_of(root)[-1]
    tensors = load_file(shard)
    name = next(iter(tensors))
    tensors[name] = tensors[name].copy()
    tensors[name][0] = np.inf
    save_file(tensors, shard)
    rewrite(root, shard)
    assert f"{name} is not finite" in passed_over(ranks, root)


def test_a_manifest_of_a_later_version_says_so(ranks, root):
    path = manifests.folder_of(root, 2) / manifests.MANIFEST
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "format": manifests.FORMAT + 1}))
    assert "has format 2, and this version reads 1; use a newer stack" in passed_over(ranks, root)


def test_a_crafted_manifest_is_passed_over(ranks, tmp_path):
    folder = whole_checkpoint(tmp_path / "checkpoints", 1).parent
    for name, craft in CRAFTED.items():
        craft(whole_checkpoint(folder, 2) / manifests.MANIFEST)
        if name != "state of training is empty":
            assert str(manifests.folder_of(folder, 2)) in passed_over(ranks, folder)
        shutil.rmtree(manifests.folder_of(folder, 2))
        (folder / "elsewhere").unlink(missing_ok=True)


def test_without_any_whole_checkpoint_nothing_starts_from_zero(ranks, root):
    for step in (1, 2):
        files_of(root, step)[-1].unlink()
    for step, _, error in ranks(2).run(find_on_rank, root):
        assert step is None
        assert error.startswith(f"none of 2 checkpoints in {root} is whole; the oldest: ")
    shutil.rmtree(root)
    assert ranks(2).run(find_on_rank, root) == [(None, [], "")] * 2


def test_a_step_that_was_asked_for_is_taken_or_refused(ranks, root):
    assert [answer[0] for answer in ranks(2).run(find_on_rank, root, 1)] == [1, 1]
    [(step, _, error), _] = ranks(2).run(find_on_rank, root, 7)
    assert step is None
    assert error == f"checkpoint.step=7: no such checkpoint in {root}; there are 1, 2"


def test_verify_has_a_line_for_every_file(root):
    assert [(path.name, fault) for path, fault in verify(root)] == 2 * [
        ("manifest.json", None),
        ("rank-00000.safetensors", None),
        ("rank-00001.safetensors", None),
    ]
    files_of(root, 1)[1].write_bytes(b"")
    assert ["has 0 bytes" in (fault or "") for _, fault in verify(root)] == [True, False, False, False]


def test_saving_what_was_loaded_gives_the_same_files(ranks, root, tmp_path):
    ranks(2).run(functools.partial(run_from, step=2, until=2, load=True, save=tmp_path), {}, root)
    again, before = (manifests.read(manifests.folder_of(where, 2)) for where in (tmp_path, root))
    assert again.files == before.files
    assert again.parameters == before.parameters


def test_torch_itself_reads_the_files(root):
    """DCP's own reader of safetensors can read the slices, so a checkpoint can be used without `stack`."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    expected = logical_state(root, 2)
    state = {name: torch.empty(tensor.numel()) for name, tensor in expected.items()}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(manifests.folder_of(root, 2))), no_dist=True)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor.flatten()), name


def test_another_model_is_refused_with_the_first_names_that_differ(root):
    manifest = manifests.read(manifests.folder_of(root, 2))
    shapes = {name: parameter.shape for name, parameter in manifest.parameters.items()}
    manifests.check_same_model(manifest, shapes, where=root)
    wide = {**shapes, "model.norm.weight": (64,), "extra": (2, 3)}
    del wide["lm_head.weight"]
    with pytest.raises(CheckpointError) as caught:
        manifests.check_same_model(manifest, wide, where=root)
    assert "model.norm.weight: [32] there, [64] here" in str(caught.value)
    assert "extra: nothing there, [2, 3] here" in str(caught.value)
    assert "lm_head.weight: [128, 32] there, nothing here" in str(caught.value)
