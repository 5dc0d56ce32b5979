"""Storage classes for torch.distributed.checkpoint (DCP). DCP plans which rank writes and reads which slice.

DCP's own files pickle their metadata. The files here are safetensors, and a manifest in JSON, so no file is ever
unpickled. The headers of the safetensors have the places of the slices in the form that DCP's HuggingFaceStorageReader
reads. While it plans a save, DCP does send pickled plans between the ranks of a run.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from stack.checkpoint.manifest import File, Manifest, Parameter
from stack.models.tensorfile import Entry, write
from stack.parallel.parts import Part
from stack.plan.policies import MASTER

#: Header key under which DCP's HuggingFaceStorageReader finds the places of slices.
_PLACES = "DCP_SHARDING_INFO"
_FP32 = TensorProperties(dtype=torch.float32)


class Slice:
    """A rank's part of one flattened tensor, with the methods that DCP calls."""

    def __init__(self, tensor: torch.Tensor, start: int, numel: int):
        """
        Args:
            tensor: fp32 [length].
            start: place of its first element in the whole flattened tensor.
            numel: number of elements of the whole tensor.
        """
        self.tensor, self._numel = tensor, numel
        self.chunk = ChunkStorageMetadata(torch.Size([start]), torch.Size([tensor.numel()]))

    def __create_write_items__(self, key: str, _: object) -> list[WriteItem]:
        data = TensorWriteData(self.chunk, _FP32, torch.Size([self._numel]))
        return [WriteItem(MetadataIndex(key, self.chunk.offsets), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self.chunk]

    def size(self) -> torch.Size:
        """Shape of the whole flattened tensor."""
        return torch.Size([self._numel])


class SaveSlices(DefaultSavePlanner):
    """Plans a save of a state dict of slices."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].tensor


class LoadSlices(DefaultLoadPlanner):
    """Plans a load into the tensors of a state dict of slices."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].tensor


def slices_of(parts: list[Part]) -> dict[str, Slice]:
    """A state dict for DCP: `<state>/<Hugging Face name>` -> slice, for all states of all parts."""
    return {
        f"{state}/{part.name}": Slice(tensor, part.start, torch.Size(part.shape).numel())
        for part in parts
        for state, tensor in part.states.items()
    }


def file_of(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


class Writer(StorageWriter):
    """Writes one file for each rank into `folder`. The function `commit` then completes the checkpoint."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        *,
        prepare: Callable[[int], None],
        commit: Callable[[list[File], dict[str, list[tuple[int, int, int]]]], None],
        phase: Callable[[str], None],
    ):
        """
        Args:
            folder: folder for the files.
            rank: this rank.
            prepare: called on rank 0 before the ranks write, with the number of bytes that all of them will write.
            commit: called on rank 0 after every rank has written, with the files, and a dict from the name of a
                parameter to its slices (first element, length, index of the file).
            phase: called with the name of each phase of a save; tests inject faults there.
        """
        self._folder, self._rank, self._phase = folder, rank, phase
        self._prepare, self._commit = prepare, commit

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        items = {item.index.fqn: item for item in plan.items}
        places = {name: {"saved_offsets": list(_chunk(item).offsets)} for name, item in items.items()}
        entries = [Entry(name, torch.float32, tuple(_chunk(item).sizes)) for name, item in items.items()]
        total = sum(4 * entry.shape[0] for entry in entries)
        self._phase("save.before_shard")
        half = iter(["save.half_shard"])

        def progress(done: int) -> None:
            if done >= total // 2 and (phase := next(half, None)):
                self._phase(phase)

        written: list[WriteResult] = []
        if entries:
            path = self._folder / file_of(self._rank)
            digest = write(
                path,
                entries,
                lambda entry: planner.resolve_data(items[entry.name]).cpu(),  # type: ignore[union-attr]
                metadata={"format": "pt", _PLACES: json.dumps(places, separators=(",", ":"))},
                progress=progress,
            )
            file = File(path.name, digest.bytes, digest.xxh3)
            written = [WriteResult(item.index, 4 * _chunk(item).sizes[0], file) for item in plan.items]
        if self._rank > 0:
            self._phase("save.before_manifest")
        done: Future[list[WriteResult]] = Future()
        done.set_result(written)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:  # noqa: ARG002
        self._phase("save.before_manifest")
        files = [rank[0].storage_data for rank in results if rank]
        slices: dict[str, list[tuple[int, int, int]]] = {}
        for number, rank in enumerate(rank for rank in results if rank):
            for result in rank:
                state, _, name = result.index.fqn.partition("/")
                if state == MASTER:
                    assert result.index.offset is not None
                    place = (result.index.offset[0], result.size_in_bytes // 4, number)
                    slices.setdefault(name, []).append(place)
        self._commit(files, slices)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._prepare(sum(4 * _chunk(item).sizes[0] for plan in plans for item in plan.items))
        return plans

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        pass

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:  # noqa: ARG003
        return True


class Reader(StorageReader):
    """Reads slices of a checkpoint. The places of the slices come from the manifest."""

    def __init__(self, folder: Path, manifest: Manifest):
        self._folder, self._manifest = folder, manifest
        self._files: dict[MetadataIndex, str] = {}

    def read_metadata(self) -> Metadata:
        found: dict[str, Any] = {}
        for name, parameter in self._manifest.parameters.items():
            chunks = [
                ChunkStorageMetadata(torch.Size([start]), torch.Size([length])) for start, length, _ in parameter.slices
            ]
            whole = torch.Size([torch.Size(parameter.shape).numel()])
            for state in self._manifest.states:
                key = f"{state}/{name}"
                found[key] = TensorStorageMetadata(_FP32, whole, chunks)
                for chunk, (_, _, number) in zip(chunks, parameter.slices, strict=True):
                    self._files[MetadataIndex(key, chunk.offsets)] = self._manifest.files[number].path
        return Metadata(found)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            by_file.setdefault(self._files[item.storage_index], []).append(item)
        for name, items in by_file.items():
            with safe_open(self._folder / name, framework="pt") as file:
                for item in items:
                    start, length = item.storage_offsets[0], item.lengths[0]
                    target = planner.resolve_tensor(item)
                    target.copy_(file.get_slice(item.storage_index.fqn)[start : start + length])
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        pass

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:  # noqa: ARG003
        return True


def whole(folder: Path, manifest: Manifest, name: str, *, state: str = MASTER) -> torch.Tensor:
    """One state of one parameter, fp32 on the CPU in the parameter's shape.

    Args:
        folder: the checkpoint.
        manifest: its manifest.
        name: Hugging Face name of the parameter.
        state: one of `manifest.states`.
    """
    parameter: Parameter = manifest.parameters[name]
    flat = torch.empty(torch.Size(parameter.shape).numel(), dtype=torch.float32)
    for start, length, number in parameter.slices:
        with safe_open(folder / manifest.files[number].path, framework="pt") as file:
            flat[start : start + length] = file.get_tensor(f"{state}/{name}")
    return flat.view(parameter.shape)


def _chunk(item: WriteItem) -> ChunkStorageMetadata:
    assert item.tensor_data is not None
    return item.tensor_data.chunk
