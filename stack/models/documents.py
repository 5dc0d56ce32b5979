"""Where documents begin in packed sequences: known on the host, so that no stage has to ask its device for it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from transformers import masking_utils


@dataclass(frozen=True)
class Documents:
    """The documents of a replica's batch."""

    packed: bool
    """Whether a sequence holds more than one."""
    longest: int
    """Tokens of the longest."""
    bounds: np.ndarray
    """int32 [microbatches, bounds]: where each document of a microbatch begins in its tokens, then their number, which
    is repeated so that all microbatches have equally many: documents of no tokens."""

    @classmethod
    def of(cls, positions: np.ndarray) -> "Documents":
        """From the positions of `Batch`: [microbatches, micro_size, seq_len]."""
        tokens = positions[0].size
        rows = [np.flatnonzero(microbatch == 0) for microbatch in positions.reshape(len(positions), tokens)]
        most = max(map(len, rows)) + 1
        # A few lengths, or compiled code would be compiled for each of them.
        bounds = np.full((len(rows), 1 << (most - 1).bit_length()), tokens, dtype=np.int32)
        for row, starts in zip(bounds, rows, strict=True):
            row[: len(starts)] = starts
        return cls(packed=bool((positions[..., 1:] == 0).any()), longest=int(np.diff(bounds).max()), bounds=bounds)


def uses_bounds(config: transformers.PretrainedConfig) -> bool:
    """Whether attention takes the documents' bounds; other kernels take a mask, which the model makes of positions."""
    return config._attn_implementation == "flash_attention_2"


@contextlib.contextmanager
def known(packed: bool | None) -> Iterator[None]:
    """Tells transformers whether sequences are packed, which it would read back from the device in every forward of
    every stage; None lets it look."""
    if packed is None:
        yield
        return
    look = masking_utils.find_packed_sequence_indices
    answer: Any = _documents_of_tokens if packed else _one_document
    masking_utils.find_packed_sequence_indices = answer
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look


def _one_document(_positions: torch.Tensor) -> torch.Tensor | None:
    return None


def _documents_of_tokens(positions: torch.Tensor) -> torch.Tensor | None:
    """The number of each token's document in its sequence, int64 [micro_size, seq_len]."""
    return (positions == 0).cumsum(-1)
