"""Batches as a pure function of (step, replica): no iterator, no state, no communication.

Every rank of a replica computes the same batch, and every layout sees the same global batches in the same order.
Therefore the step alone says where a run is in its data.
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
    """int64, same shape: the token's distance from the start of its document, or from the start of the sequence where
    the document began before the sequence."""
    global_target_tokens: int
    """Number of labels that are not `IGNORE` in the global batch, over all replicas."""


class Batches:
    """The sequences of a split, in global batches of `global_size` sequences that are divided over `replicas`.

    `pack=True`: the stream is cut into windows of seq_len + 1 tokens. Each window starts at the last token of the
    window before. A rest at the end of the stream that is shorter than a window is unused. A sequence may hold several
    documents; positions start at 0 in each document, and attention stays inside a document. The last token of a
    document has no target, because the next token belongs to another document.
    `pack=False`: a sequence is the first seq_len + 1 tokens of one document. A shorter document is padded on the right,
    where causal attention hides the padding from every token.
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
        """
        Args:
            split: the documents.
            seq_len: tokens in a sequence.
            pack: whether a sequence may hold several documents (see the class).
            seed: chooses the order of the sequences in each epoch.
            global_size: sequences in a global batch.
            micro_size: sequences in one microbatch of one replica.
            replicas: number of data-parallel replicas.
            before: sequences used before step 0. Global batch `step` begins with sequence
                `before` + step x global_size. Not 0 after a resume with another batch size or other data.

        Raises:
            LayoutError: a global batch is not a whole number of microbatches on each replica.
            DataError: the split is too small for one sequence.
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
        # `prepare` stores only documents of two tokens or more, so each document gives a sequence with a target.
        self.num_sequences = (split.num_tokens - 1) // seq_len if pack else split.num_documents
        """Sequences in one epoch."""
        if self.num_sequences < 1:
            raise DataError(
                f"data.seq_len={seq_len} is too long for the {split.name} split of {split.num_tokens} tokens; "
                f"use data.seq_len={max(split.num_tokens - 1, 1)} or less, more documents, or data.pack=false"
            )

    def train(self, step: int, replica: int) -> Batch:
        """The batch of optimizer step `step` (0, 1, ...) on `replica`. Epochs follow one another without end."""
        return self._batch(*self._bounds(self.order(step)), replica)

    def order(self, step: int) -> np.ndarray:
        """The numbers of the sequences of global batch `step`, in order: int64 [global_size].

        Each epoch has all sequences in an order of its own. A batch may hold the end of one epoch and the beginning of
        the next.
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

        All labels of the padding sequences are `IGNORE`.

        Raises:
            ValueError: unless 0 <= start, 1 <= count <= global_size and start + count <= num_sequences.
        """
        if not (start >= 0 and 1 <= count <= self.global_size and start + count <= self.num_sequences):
            raise ValueError(
                f"sequences {start} to {start + count} of {self.num_sequences}, {self.global_size} a batch"
            )
        starts, stops = np.zeros((2, self.global_size), dtype=np.int64)
        starts[:count], stops[:count] = self._bounds(np.arange(start, start + count))
        return self._batch(starts, stops, replica)

    def _bounds(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First token and end (exclusive) of each sequence in the stream; the range includes the last target."""
        if self.pack:
            starts = sequences * self.seq_len
            return starts, starts + self.seq_len + 1
        starts = self.split.starts[sequences]
        return starts, np.minimum(self.split.starts[sequences + 1], starts + self.seq_len + 1)

    def _batch(self, starts: np.ndarray, stops: np.ndarray, replica: int) -> Batch:
        if not 0 <= replica < self.replicas:
            raise ValueError(f"replica {replica} of {self.replicas}")
        lengths = np.maximum(stops - starts - 1, 0)
        # [first, end): the documents that begin after the first token of each sequence. Their number is how many
        # targets the sequence loses. The document bounds are enough for the count over all replicas; tokens are read
        # for this replica only.
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
        """For each token of the sequence that begins at token `start` of the stream: where its document begins, counted
        from the start of the sequence, or 0 where the document began before. int64 [seq_len]."""
        tokens = np.arange(start, start + self.seq_len)
        documents = np.searchsorted(self.split.starts, tokens, side="right") - 1
        return np.maximum(self.split.starts[documents] - start, 0)
