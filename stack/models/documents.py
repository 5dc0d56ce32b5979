"""The bounds of documents in packed sequences, computed on the host so that no stage has to read them from its device.

transformers finds packed sequences from the positions by itself, but would make the host wait for the device in every
forward.
"""

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
    """Whether any sequence holds more than one document."""
    longest: int
    """Tokens of the longest document."""
    bounds: np.ndarray
    """int32 [microbatches, bounds]: the first token of each document in the flattened tokens of a microbatch, then the
    number of tokens in the microbatch. The last value is repeated, so that all microbatches have equally many bounds;
    each repetition is a document without tokens."""

    @classmethod
    def of(cls, positions: np.ndarray) -> "Documents":
        """From the positions of a `Batch`, int64 [microbatches, micro_size, seq_len]."""
        tokens = positions[0].size
        rows = [np.flatnonzero(microbatch == 0) for microbatch in positions.reshape(len(positions), tokens)]
        most = max(map(len, rows)) + 1
        # Rounded up to a power of 2: torch.compile compiles again for each new length.
        bounds = np.full((len(rows), 1 << (most - 1).bit_length()), tokens, dtype=np.int32)
        for row, starts in zip(bounds, rows, strict=True):
            row[: len(starts)] = starts
        return cls(packed=bool((positions[..., 1:] == 0).any()), longest=int(np.diff(bounds).max()), bounds=bounds)


def uses_bounds(config: transformers.PretrainedConfig) -> bool:
    """Whether the attention kernel takes the bounds of documents. The others take a mask, which the model computes from
    the positions."""
    return config._attn_implementation == "flash_attention_2"


@contextlib.contextmanager
def known(packed: bool | None) -> Iterator[None]:
    """Tells transformers, inside a `with` block, whether sequences are packed. With None transformers finds out from
    the positions, for which the host waits for the device in every forward of every stage.

    Replaces the function `find_packed_sequence_indices` of `transformers.masking_utils`.
    """
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
    """The number of each token's document within its sequence, from 1: int64 [micro_size, seq_len]."""
    return (positions == 0).cumsum(-1)
