"""Streamed files are valid safetensors files, and their digests are those of their content."""

import pytest
import torch
import xxhash
from safetensors.torch import load_file, safe_open

from stack.models.tensorfile import Entry, digest, write

_TENSORS = {
    "a": torch.arange(7, dtype=torch.float32),
    "half": torch.randn(3, 5).bfloat16(),
    "empty": torch.empty(0, dtype=torch.float32),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "transposed": torch.randn(4, 6).T,
    "scalar": torch.tensor(3, dtype=torch.int64),
}


def save(path, tensors, **options):
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    return write(path, entries, lambda entry: tensors[entry.name], metadata={"format": "pt"}, **options)


def test_the_library_reads_back_every_bit(tmp_path):
    path = tmp_path / "x.safetensors"
    save(path, _TENSORS)
    read = load_file(path)
    assert read.keys() == _TENSORS.keys()
    for name, tensor in _TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_digest_is_that_of_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    found = save(path, _TENSORS)
    content = path.read_bytes()
    assert (found.bytes, found.xxh3) == (len(content), xxhash.xxh3_128(content).hexdigest())
    assert digest(path) == found


def test_progress_counts_the_bytes_of_the_tensors(tmp_path):
    seen: list[int] = []
    save(tmp_path / "x", {"one": torch.zeros(5_000_000), "two": torch.zeros(10)}, progress=seen.append)
    assert len(seen) > 2
    assert seen == sorted(seen)
    assert seen[-1] == 4 * 5_000_010


def test_a_tensor_that_is_not_what_was_announced_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"one is torch.float32 \[2\], not torch.float32 \[3\]"):
        write(tmp_path / "x", [Entry("one", torch.float32, (3,))], lambda _: torch.zeros(2), metadata={})
