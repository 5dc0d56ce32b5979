"""Batches as a pure function of (step, replica): no iterator, no state, no communication.

Every rank of a replica computes the same batch, and any layout sees the same global batches in the same order, so the
position of a run in its data is one integer: the step.
"""

from dataclasses import dataclass

import numpy as np

from stack.data.corpus import Split
from stack.data.permutation import Permutation
from stack.errors import DataError, LayoutError

IGNORE = -100
"""Label of a position without a target; the default `ignore_index` of torch's cross entropy."""


@dataclass(frozen=True)
class Batch:
    """One replica's part of a global batch."""

    input_ids: np.ndarray
    """int64 [microbatches, micro_size, seq_len]; padding is the end-of-document token, on the right."""
    labels: np.ndarray
    """int64, same shape: labels[..., t] is the target of position t, `IGNORE` where there is none."""
    positions: np.ndarray
    """int64, same shape: a token's place in its document, counted from the start of the document or the sequence."""
    global_target_tokens: int
    """Labels that are not `IGNORE`, in the whole global batch of all replicas."""


class Batches:
    """The sequences of a split, in global batches of `global_size`, for each of `replicas`.

    `pack=True`: the stream is cut into windows of seq_len + 1 tokens, each starting at the last token of the one
    before (the rest at the end of the stream, less than a window, is unused). A sequence may span documents; positions
    start at 0 in each, and attention does not reach past that. So the last token of a document has no target: what
    follows it is the first token of the next document, which cannot be predicted from this one.
    `pack=False`: a sequence is the first seq_len + 1 tokens of one document, padded on the right, where no token sees
    the padding.
    """

    def __init__(
        self,
        split: Split,
        *,
        seq_len: int,
        pack: bool,
        seed: int,
        global_size: int,
        micro_size: int,
        replicas: int,
        before: int = 0,
    ) -> None:
        """Sizes are in sequences, `micro_size` is one microbatch of one replica; `seed` orders epochs. Global batch
        `step` begins with sequence `before` + step x global_size: `before` is not 0 where a run went on with another
        size of batch, or with other data.

        Raises `LayoutError` where a global batch is no whole number of microbatches on each replica, `DataError`
        where the split is too small for one sequence.
        """
        slice_size = micro_size * replicas
        if global_size % slice_size:
            nearest = max(1, round(global_size / slice_size)) * slice_size
            raise LayoutError(
                f"batch.global_size={global_size} is no multiple of batch.micro_size={micro_size} x {replicas} "
                f"replicas; use batch.global_size={nearest}"
            )
        self.split, self.seq_len, self.pack, self.seed = split, seq_len, pack, seed
        self.global_size, self.micro_size, self.replicas, self.before = global_size, micro_size, replicas, before
        # Every stored document has two tokens or more (`prepare` sees to it), so each one is a sequence.
        self.num_sequences = (split.num_tokens - 1) // seq_len if pack else split.num_documents
        """Sequences in one epoch."""
        if self.num_sequences < 1:
            raise DataError(
                f"data.seq_len={seq_len} is too long for the {split.name} split of {split.num_tokens} tokens; "
                f"use data.seq_len={max(split.num_tokens - 1, 1)} or less, more documents, or data.pack=false"
            )

    def train(self, step: int, replica: int) -> Batch:
        """The batch of optimizer step `step` (0, 1, ...) on `replica`; there is one for every step, for ever."""
        return self._batch(*self._bounds(self.order(step)), replica)

    def order(self, step: int) -> np.ndarray:
        """Which sequences make global batch `step`, in order: int64 [global_size], depends on seed and step only.

        Batches take the epochs' sequences one after another, each epoch in a new order, and may span epochs.
        """
        first = self.before + step * self.global_size
        if step < 0 or first < 0:
            raise ValueError(f"there is no step {step}, whose batch would begin with sequence {first}")
        epochs, places = np.divmod(first + np.arange(self.global_size), self.num_sequences)
        sequences = np.empty(self.global_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            sequences[here] = Permutation(self.num_sequences, seed=self.seed, epoch=int(epoch))(places[here])
        return sequences

    def heldout(self, start: int, count: int, replica: int) -> Batch:
        """Sequences [start, start + count) in the order of the split, padded to a full global batch.

        Added sequences are all `IGNORE`. Needs 0 <= start, 1 <= count <= global_size, start + count <= num_sequences.
        """
        if not (start >= 0 and 1 <= count <= self.global_size and start + count <= self.num_sequences):
            raise ValueError(
                f"sequences {start} to {start + count} of {self.num_sequences}, {self.global_size} a batch"
            )
        starts, stops = np.zeros((2, self.global_size), dtype=np.int64)
        starts[:count], stops[:count] = self._bounds(np.arange(start, start + count))
        return self._batch(starts, stops, replica)

    def _bounds(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First token and end of each sequence in the stream, its last target included."""
        if self.pack:
            starts = sequences * self.seq_len
            return starts, starts + self.seq_len + 1
        starts = self.split.starts[sequences]
        return starts, np.minimum(self.split.starts[sequences + 1], starts + self.seq_len + 1)

    def _batch(self, starts: np.ndarray, stops: np.ndarray, replica: int) -> Batch:
        if not 0 <= replica < self.replicas:
            raise ValueError(f"replica {replica} of {self.replicas}")
        lengths = np.maximum(stops - starts - 1, 0)
        # Documents that begin after the first token of a sequence, by number. Found in the documents' bounds alone: the
        # tokens of the other replicas are not read.
        first, end = np.searchsorted(self.split.starts, starts + 1), np.searchsorted(self.split.starts, stops)
        targets = lengths - np.maximum(end - first, 0)
        rows = self.global_size // self.replicas
        input_ids = np.full((rows, self.seq_len), self.split.eos_id, dtype=np.int64)
        labels = np.full((rows, self.seq_len), IGNORE, dtype=np.int64)
        positions = np.tile(np.arange(self.seq_len, dtype=np.int64), (rows, 1))
        for row, sequence in enumerate(range(replica * rows, (replica + 1) * rows)):
            start, length = int(starts[sequence]), int(lengths[sequence])
            if length:
                tokens = self.split.read(start, start + length + 1)
                input_ids[row, :length], labels[row, :length] = tokens[:-1], tokens[1:]
                labels[row, self.split.starts[first[sequence] : end[sequence]] - start - 1] = IGNORE
                if self.pack:
                    positions[row] -= self._document_starts(start)
        shape = (-1, self.micro_size, self.seq_len)
        return Batch(
            input_ids=input_ids.reshape(shape),
            labels=labels.reshape(shape),
            positions=positions.reshape(shape),
            global_target_tokens=int(targets.sum()),
        )

    def _document_starts(self, start: int) -> np.ndarray:
        """For each token of the sequence that begins at `start`, where its document does: int64 [seq_len], counted in
        the sequence."""
        tokens = np.arange(start, start + self.seq_len)
        documents = np.searchsorted(self.split.starts, tokens, side="right") - 1
        return np.maximum(self.split.starts[documents] - start, 0)
