"""Manifests with impossible content are refused, and no file outside of the checkpoint's folder is read for them."""

import builtins
import json
import os

import pytest

from stack.checkpoint import manifest as manifests
from stack.checkpoint.files import verify
from stack.disk import checksum
from stack.errors import CheckpointError
from stack.train.state import TrainState
from tests.helpers.crafted import CRAFTED, whole_checkpoint


@pytest.fixture
def folder(tmp_path):
    return whole_checkpoint(tmp_path / "checkpoints", 2)


def test_a_whole_one_has_no_fault(folder):
    assert [fault for _, fault in verify(folder.parent)] == [None] * 3
    assert TrainState.restored(manifests.read(folder).state, attempt=1).step == 2


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_manifest_is_refused_in_a_line_and_named_by_verify(folder, name, monkeypatch):
    CRAFTED[name](folder / manifests.MANIFEST)
    opened: list[str] = []

    def spied(function):
        return lambda path, *args, **options: (opened.append(str(path)), function(path, *args, **options))[1]

    monkeypatch.setattr(os, "open", spied(os.open))
    monkeypatch.setattr(builtins, "open", spied(open))
    found = list(verify(folder.parent))
    monkeypatch.undo()
    with pytest.raises(CheckpointError) as caught:
        TrainState.restored(manifests.read(folder).state, attempt=1)
    if name != "state of training is empty":
        assert [(path, fault) for path, fault in found if fault] == [(folder / manifests.MANIFEST, str(caught.value))]
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()
    assert "passwd" not in " ".join(opened)


def test_tensors_that_are_not_where_the_manifest_says_are_a_fault(folder):
    path = folder / manifests.MANIFEST
    content = json.loads(path.read_text())
    del content["checksum"]
    content["parameters"]["b"]["slices"] = [[0, 4, 0]]
    path.write_text(json.dumps({**content, "checksum": checksum(content)}, indent=1) + "\n")
    faults = [fault for _, fault in verify(folder.parent) if fault]
    assert len(faults) == 2
    assert all("does not hold the tensors that the manifest says" in fault for fault in faults)
