"""Copies batches to the device."""

from dataclasses import dataclass

import numpy as np
import torch

from stack.data.batches import Batch
from stack.models.documents import Documents


@dataclass(frozen=True)
class DeviceBatch:
    """A replica's part of a global batch on its device. Fields have the meaning that they have in `Batch`."""

    input_ids: torch.Tensor | None
    """int64 [microbatches x micro_size, seq_len]; None on ranks without the first stage."""
    labels: torch.Tensor
    """int64 [microbatches x micro_size, seq_len]."""
    positions: torch.Tensor
    """int64 [microbatches x micro_size, seq_len]."""
    bounds: torch.Tensor | None
    """`Documents.bounds`, int32 [microbatches, bounds]; None where the attention kernel does not take bounds."""
    documents: Documents
    global_target_tokens: int
    copied: torch.cuda.Event | None
    """Recorded after the copies; None on a CPU, where there is nothing to wait for."""

    def arrive(self) -> None:
        """Makes the current stream wait for the copies."""
        if self.copied is None:
            return
        stream = torch.cuda.current_stream()
        stream.wait_event(self.copied)
        for tensor in (self.input_ids, self.labels, self.positions, self.bounds):
            if tensor is not None:
                # The memory was allocated on the stream of the copies. Without this mark the allocator could reuse it
                # while the current stream still reads it.
                tensor.record_stream(stream)


class Loader:
    """Copies batches to the device on a stream of its own, so that the copy runs while the step before computes."""

    def __init__(self, device: torch.device, *, reads_ids: bool, reads_bounds: bool):
        self._device, self._reads_ids, self._reads_bounds = device, reads_ids, reads_bounds
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def load(self, batch: Batch) -> DeviceBatch:
        """Starts the copies of a batch. May be called from any thread."""
        if self._stream is None:
            return self._copied(batch, None)
        # The current device of a new thread is GPU 0, and torch makes the former device current when `stream` ends. On
        # the ranks of other GPUs that would open a context on GPU 0: half a GB of its memory for each of these ranks.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            return self._copied(batch, torch.cuda.Event())

    def _copied(self, batch: Batch, done: torch.cuda.Event | None) -> DeviceBatch:
        documents = Documents.of(batch.positions)
        loaded = DeviceBatch(
            input_ids=self._copy(_rows(batch.input_ids)) if self._reads_ids else None,
            labels=self._copy(_rows(batch.labels)),
            positions=self._copy(_rows(batch.positions)),
            bounds=self._copy(documents.bounds) if self._reads_bounds else None,
            documents=documents,
            global_target_tokens=batch.global_target_tokens,
            copied=done,
        )
        if done is not None:
            done.record()
        return loaded

    def _copy(self, numbers: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(numbers)
        # A copy from pageable memory would block the host until it is done.
        return tensor if self._stream is None else tensor.pin_memory().to(self._device, non_blocking=True)


def _rows(sequences: np.ndarray) -> np.ndarray:
    """[microbatches, micro_size, seq_len] as [microbatches x micro_size, seq_len]."""
    return sequences.reshape(-1, sequences.shape[-1])
